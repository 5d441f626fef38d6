package fuzz

import (
	"bytes"
	"encoding/json"
	"io"
	"testing"
	"time"

	"github.com/vmihailenco/msgpack/v5"

	"github.com/natsstream/stream"
)

// object is what a program may decode records into.
type object struct {
	A     int
	B     string
	C     []byte
	D     []object
	E     *object
	Any   any
	At    time.Time
	Float float64
	Fixed [3]int8
}

// FuzzObject takes its input for a record in MessagePack, and in JSON, and reads it as an object from an open stream.
// Whatever it is, the next record arrives.
func FuzzObject(f *testing.F) {
	for _, v := range []any{nil, 1, "text", []any{1, "a", nil, 1.5}, map[string]any{"A": 1, "B": "b", "unknown": []any{true}}, object{Any: map[string]any{"x": 1}}} {
		for _, marshal := range []func(any) ([]byte, error){msgpack.Marshal, json.Marshal} {
			b, err := marshal(v)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
		}
	}
	l := newLab(f, stream.ClientParams{})
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) > 32<<10 {
			return
		}
		s, reply := l.open(t)
		defer s.Close()
		next := []byte("next")
		b := header(1, ownSender, 0)
		for _, codec := range []stream.FrameFlags{stream.FlagMsgPack, stream.FlagJSON} {
			for range targets() {
				b = frame(b, 1, byte(codec), 0, input)
				b = frame(b, 1, 0, 0, next)
			}
		}
		l.publish(t, reply, []message{{data: frame(b, 2, 0, 1000, nil)}})
		for _, codec := range []stream.FrameFlags{stream.FlagMsgPack, stream.FlagJSON} {
			for i, v := range targets() {
				err := s.RecvObject(v)
				if codec == stream.FlagJSON {
					if want := json.Unmarshal(input, targets()[i]); (err == nil) != (want == nil) {
						t.Fatalf("RecvObject into %T: %v; encoding/json: %v", v, err, want)
					}
				}
				if rec, err := s.Recv(); err != nil || !bytes.Equal(rec, next) {
					t.Fatalf("behind the object: %q, %v", rec, err)
				}
			}
		}
		if rec, err := s.Recv(); err != io.EOF {
			t.Fatalf("behind the last record: %q, %v", rec, err)
		}
	})
}

// targets are what an object is decoded into.
func targets() []any {
	return []any{new(any), new(object), new(map[string]any), new(map[any]any)}
}
