package stream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"reflect"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/vmihailenco/msgpack/v5"

	"github.com/natsstream/stream"
)

// eachCodec runs f with a writer and its stream, for each codec.
func eachCodec(t *testing.T, f func(t *testing.T, w *stream.Writer, s *stream.Stream)) {
	for _, codec := range []stream.Codec{stream.JSON, stream.MsgPack} {
		t.Run(codec.String(), func(t *testing.T) {
			w, s := newWriterStream(t, newPair(t, pairOptions{consumer: stream.ClientParams{Codec: codec}}))
			f(t, w, s)
		})
	}
}

// One variable takes all records of a stream, whatever their fields hold, and copies of it stay as they are.
func TestRecvObjectIntoOneVariable(t *testing.T) {
	type event struct {
		Kind  string `json:"kind"`
		Data  any
		Bytes []byte
		Token string `json:"-"`
	}
	events := []event{
		{"a", "text", []byte("first"), "secret"}, {"b", []any{1.5, "x"}, []byte("2nd"), "secret"},
		{"c", map[string]any{"k": true}, nil, "secret"}, {"d", nil, []byte{}, "secret"}, {"e", false, []byte("the last of them"), "secret"},
	}
	eachCodec(t, func(t *testing.T, w *stream.Writer, s *stream.Stream) {
		for i := range events {
			if _, err := w.WriteObject(events[i]); err != nil {
				t.Fatal(err)
			}
		}
		closeWriter(t, w)
		var ev event
		var got []event
		for {
			err := s.RecvObject(&ev)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, ev)
		}
		for i, want := range events {
			if want.Token = ""; i >= len(got) || !reflect.DeepEqual(got[i], want) {
				t.Fatalf("%+v; record %d should be %+v", got, i, want)
			}
		}
	})
}

// fails has methods that fail, at both ends.
type fails struct{ err error }

func (f fails) MarshalJSON() ([]byte, error)              { return nil, f.err }
func (f fails) EncodeMsgpack(*msgpack.Encoder) error      { return f.err }
func (f *fails) UnmarshalJSON([]byte) error               { return f.err }
func (f *fails) DecodeMsgpack(dec *msgpack.Decoder) error { _ = dec.Skip(); return f.err }

// A method of an object that fails does not look like the end of the stream, whatever error it returns. Its error is found
// all the same.
func TestErrorsOfObjectsAreNoEnds(t *testing.T) {
	ends := []error{
		io.EOF, stream.ErrClosed, stream.ErrClientClosed, stream.ErrServerClosed, stream.ErrConcurrentRecv, stream.ErrOneWay,
		context.Canceled, context.DeadlineExceeded, nats.ErrNoResponders, nats.ErrConnectionClosed, nats.ErrConnectionDraining,
	}
	own := &fs.PathError{Op: "own", Err: errors.New("error")}
	eachCodec(t, func(t *testing.T, w *stream.Writer, s *stream.Stream) {
		errs := append([]error{&stream.CloseError{Code: stream.CloseNormalClosure}, &stream.CloseError{Code: 4000, Text: "x"}}, ends...)
		check := func(err error) {
			t.Helper()
			if err == nil {
				t.Error("no error")
			}
			for _, end := range ends {
				if errors.Is(err, end) {
					t.Errorf("%v is %v", err, end)
				}
			}
			if ce, ok := errors.AsType[*stream.CloseError](err); ok {
				t.Errorf("%v is %v", err, ce)
			}
			if errors.Is(err, &stream.CloseError{Code: stream.CloseNormalClosure}) {
				t.Errorf("%v is a close", err)
			}
		}
		for _, err := range errs {
			for _, err := range []error{err, fmt.Errorf("wrapped: %w", err), errors.Join(own, err)} {
				for _, v := range []any{fails{err}, []any{"begun", fails{err}}, map[string]fails{"a": {err}}} {
					_, got := w.WriteObject(v)
					check(got)
					if errors.Is(err, own) != errors.Is(got, own) {
						t.Errorf("%v hides %v", got, own)
					}
				}
				if _, err := w.WriteObject([]any{"a", 1}); err != nil {
					t.Fatal(err)
				}
				if err := w.Flush(); err != nil {
					t.Fatal(err)
				}
				into := []*fails{{err}, {err}}
				got := s.RecvObject(&into)
				check(got)
				if errors.Is(err, own) != errors.Is(got, own) {
					t.Errorf("%v hides %v", got, own)
				}
			}
		}
		if _, err := w.WriteObject(fails{own}); !errors.Is(err, own) {
			t.Error(err)
		} else if got, ok := errors.AsType[*fs.PathError](err); !ok || got != own {
			t.Errorf("%v has no %v", err, own)
		}
		closeWriter(t, w)
		wantEOF(t, s)
	})
}

// What no reader could take is an error at its writer, which goes on.
func TestWriteObjectRefusesWhatCannotBeRead(t *testing.T) {
	type list struct{ Next *list }
	cycle := new(list)
	cycle.Next = cycle
	loose := []any{nil}
	loose[0] = map[string]any{"x": loose}
	eachCodec(t, func(t *testing.T, w *stream.Writer, s *stream.Stream) {
		deep := func(n int) (l *list) {
			for range n {
				l = &list{l}
			}
			return l
		}
		for _, v := range []any{cycle, loose, deep(20_000), make(chan int), []any{func() {}}} {
			if n, err := w.WriteObject(v); n != 0 || err == nil || !strings.HasPrefix(err.Error(), "stream: encode ") {
				t.Errorf("WriteObject of %T: %d, %v", v, n, err)
			}
		}
		if _, err := w.WriteObject(deep(1100)); err != nil {
			t.Error(err)
		}
		closeWriter(t, w)
		var got *list
		if err := s.RecvObject(&got); err != nil {
			t.Error(err)
		}
		n := 0
		for ; got != nil; got = got.Next {
			n++
		}
		if n != 1100 {
			t.Errorf("%d of 1100", n)
		}
		wantEOF(t, s)
	})
}

// The codec in use is that of the record. Bytes in another one are an error, not another value.
func TestRecvObjectOfAnotherCodec(t *testing.T) {
	w, s := newWriterStream(t, newPair(t, pairOptions{consumer: stream.ClientParams{Codec: stream.MsgPack}}))
	for _, text := range []string{`{"a":1}`, `[1,2]`, `"text"`, `12`, `true`} {
		write(t, w, []byte(text))
	}
	closeWriter(t, w)
	for range 5 {
		var v any
		if err := s.RecvObject(&v); err == nil || err == io.EOF {
			t.Errorf("%v, %v", v, err)
		}
	}
	wantEOF(t, s)
}
