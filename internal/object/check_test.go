package object

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vmihailenco/msgpack/v5"

	"github.com/natsstream/stream/internal/race"
)

// msgPackValues are objects that between them make the encoder use every form it has.
func msgPackValues() []any {
	type inner struct {
		When time.Time
		Tags []string
	}
	type outer struct {
		A, B  int
		Inner *inner
		Any   map[string]any
	}
	long := map[string]int{}
	for i := range 70_000 {
		long[fmt.Sprint(i)] = i
	}
	values := []any{
		nil, true, false, 1, -1, 127, 128, -32, -33, int64(1) << 40, int8(-100), int16(-1000), int32(-100_000), int64(-1 << 40),
		uint8(200), uint16(60_000), uint32(1 << 31), uint64(1 << 63), float32(2), 1.5,
		time.Unix(1, 0), time.Unix(1, 1), time.Unix(-1, 1), time.Unix(1<<40, 5),
		map[string]any{"a": []int{1, 2}, "b": nil, "c": true}, map[int]string{1: "a"}, map[string]int{}, []int{}, long,
		outer{1, 2, &inner{time.Unix(3, 4), []string{"x", "y"}}, map[string]any{"deep": []any{[]any{map[string]any{"er": 1}}}}}, outer{},
		[3]int{1, 2, 3}, []outer{{}, {}},
	}
	for _, n := range []int{0, 1, 15, 16, 31, 32, 255, 256, 65_535, 65_536} {
		values = append(values, strings.Repeat("x", n), make([]byte, n), make([]int, n), make([]any, n))
	}
	// Extensions of every length, which Marshal writes for types that are registered, and for time.
	for _, n := range []int{1, 2, 4, 8, 16, 3, 300, 70_000} {
		var b bytes.Buffer
		if err := msgpack.NewEncoder(&b).EncodeExtHeader(5, n); err != nil {
			panic(err)
		}
		values = append(values, msgpack.RawMessage(append(b.Bytes(), make([]byte, n)...)))
	}
	return values
}

// What the encoder makes is accepted as a whole, and no part of it is.
func TestCheckMsgPackAcceptsWhatIsWhole(t *testing.T) {
	for _, v := range msgPackValues() {
		p, err := msgpack.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		if err := scanMsgPack(p); err != nil {
			t.Errorf("%T, %d bytes, %x…: %v", v, len(p), p[:min(len(p), 20)], err)
		}
		if err := scanMsgPack(append(p[:len(p):len(p)], 0xc1)); err != nil {
			t.Errorf("%T: what follows the object counts: %v", v, err)
		}
		for n := range len(p) {
			if n > 200 && n < len(p)-200 { // large ones are walked in time that is proportional to n
				continue
			}
			if scanMsgPack(p[:n]) == nil {
				t.Errorf("%T: %d bytes of %d are accepted", v, n, len(p))
			}
		}
	}
}

// An object is nested at most MaxDepth deep, whatever is nested in what.
func TestCheckMsgPackDepth(t *testing.T) {
	for name, level := range map[string]string{
		"array": "\x91", "array16": "\xdc\x00\x01", "array32": "\xdd\x00\x00\x00\x01",
		"map": "\x81\xa1k", "map16": "\xde\x00\x01\xa1k", "map32": "\xdf\x00\x00\x00\x01\xa1k", "map key": "\x81",
	} {
		rest := "\xc0"
		nested := func(depth int) []byte {
			end := rest
			if name == "map key" {
				end += strings.Repeat("\xc0", depth)
			}
			return []byte(strings.Repeat(level, depth) + end)
		}
		if err := scanMsgPack(nested(MaxDepth - 1)); err != nil {
			t.Errorf("%s: %d levels: %v", name, MaxDepth, err)
		}
		for _, depth := range []int{MaxDepth + 1, 100 * MaxDepth} {
			if scanMsgPack(nested(depth)) == nil {
				t.Errorf("%s: %d levels are accepted", name, depth)
			}
		}
	}
	for depth := range 2 { // without an end
		var v any
		if Decode(bytes.Repeat([]byte{0x91 - byte(16*depth)}, 15<<20), MsgPack, &v) == nil {
			t.Error("a run of opening bytes is decoded")
		}
	}
}

// A length that the record does not hold is no reason to ask for memory.
func TestCheckMsgPackLengths(t *testing.T) {
	for _, code := range []byte{0xc6, 0xc9, 0xdb, 0xdd, 0xdf} {
		for _, n := range []uint32{1 << 24, 1 << 31, 1<<32 - 1} {
			p := binary.BigEndian.AppendUint32([]byte{code}, n)
			for _, p := range [][]byte{p, append(p[:5:5], make([]byte, 1000)...), bytes.Repeat(p, 20), append([]byte{0x91}, p...), append([]byte{0x81, 0xa1, 'k'}, p...)} {
				if scanMsgPack(p) == nil {
					t.Errorf("%x: accepted", p[:min(len(p), 20)])
				}
				var v any
				var list []struct{ A [20]int64 }
				var object struct{ X int }
				for _, v := range []any{&v, &list, &object} {
					if Decode(p, MsgPack, v) == nil {
						t.Errorf("%x: decoded into %T", p[:min(len(p), 20)], v)
					}
				}
			}
		}
	}
}

// Looking at a small object costs no allocation, unless there are extensions to remember.
func TestCheckMsgPackAllocations(t *testing.T) {
	p, err := msgpack.Marshal(map[string]any{"id": 12345, "name": "some name", "value": 1.5, "tags": []any{"a", []any{"b"}}})
	if err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() {
		if err := scanMsgPack(p); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Whatever is accepted can be decoded: into a value or an error, with memory in proportion to it, and by a decoder that
// reads no further than the check did.
func TestCheckMsgPackAgreesWithDecoder(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	rounds := 200_000
	if testing.Short() || race.Enabled {
		rounds /= 10
	}
	accepted := 0
	for range rounds {
		p := make([]byte, 1+r.IntN(30))
		for i := range p {
			p[i] = byte(r.Uint32())
			if r.IntN(3) == 0 { // a container, a string, an extension
				p[i] = [...]byte{0x81, 0x82, 0x91, 0x92, 0xa1, 0xc0, 0xd4, 0xdc, 0xde}[r.IntN(9)]
			}
		}
		if scanMsgPack(p) != nil {
			var v any
			if Decode(p, MsgPack, &v) == nil {
				t.Fatalf("seed %d: %x is refused by the check and not by RecvObject", seed, p)
			}
			continue
		}
		accepted++
		var v any
		err := reference(p, &v)
		if err != nil && (strings.Contains(err.Error(), "EOF") || strings.Contains(err.Error(), "short")) {
			t.Fatalf("seed %d: %x is accepted, and the decoder wants more: %v", seed, p, err)
		}
		var object struct {
			A int
			B []any
		}
		_ = reference(p, &object)
	}
	if accepted < rounds/20 {
		t.Errorf("seed %d: %d of %d were accepted", seed, accepted, rounds)
	}
}

// reference decodes p by the msgpack package alone. On processors of 32 bits that package panics at the number of an
// interned string that does not fit. Decode recovers such panics.
func reference(p []byte, v any) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	return msgpack.Unmarshal(p, v)
}

func scanMsgPack(p []byte) error {
	var bodies []int
	_, err := check(p, MaxDepth, len(p), &bodies)
	return err
}

// The body of an extension is not taken for an object, whatever the decoder looks for in its place.
func TestMsgPackExtensionIsNoObject(t *testing.T) {
	attack := []byte("\xc9\x00\x00\x00\x08\x05\x81\xa1\x61\xdd\xff\xff\xff\xff")
	if err := scanMsgPack(attack); err != nil {
		t.Fatalf("the attack is not even well formed: %v", err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for _, v := range []any{new(map[string]any), new(map[any]any), new(struct{ M map[string]any }), new(any), new([]any), new(map[string]string)} {
		for _, p := range [][]byte{attack, append([]byte("\x81\xa1M"), attack...), append([]byte{0x91}, attack...)} {
			if err := decodeMsgPack(p, v); err == nil {
				t.Errorf("%x decodes into %T", p, v)
			}
		}
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
		t.Errorf("%d bytes were allocated", n)
	}
}

func TestMsgPackTimes(t *testing.T) {
	type object struct {
		A time.Time
		M map[string]time.Time
	}
	for _, nanos := range []int64{0, 1, 560e6, 807e6} {
		for _, seconds := range []int64{0, 1, 1 << 31, 1 << 34, -5} {
			at := time.Unix(seconds, nanos)
			p, err := msgpack.Marshal(object{at, map[string]time.Time{"x": at}})
			if err != nil {
				t.Fatal(err)
			}
			var got object
			if err := decodeMsgPack(p, &got); err != nil || !got.A.Equal(at) || !got.M["x"].Equal(at) {
				t.Errorf("%v: %v, %v", at, got, err)
			}
		}
	}
}

// A time becomes a time and nothing else.
func TestMsgPackTimeIsATime(t *testing.T) {
	rec := encoded(t, time.Unix(5, 0), MsgPack)
	for _, v := range []any{new(string), new(int), new(struct{ A int }), new(map[string]any), new([]byte), new([]any), new(bool)} {
		if err := Decode(rec, MsgPack, v); err == nil || !strings.Contains(err.Error(), "time.Time") {
			t.Errorf("%T: %v", v, err)
		}
	}
	for _, at := range []any{"1970-01-01T00:00:05Z", [2]int{5, 0}} { // other forms in use
		var got time.Time
		if err := Decode(encoded(t, at, MsgPack), MsgPack, &got); err != nil || got.Unix() != 5 {
			t.Errorf("%v: %v, %v", at, got, err)
		}
	}
	for _, rec := range []string{"\xd4\x05\x00", "\xd4\xff\x00", "\xd6\x0e\x00\x00\x00\x05", "\xa1x", "\x05", "\x93\x01\x02\x03"} {
		var got time.Time
		if err := Decode([]byte(rec), MsgPack, &got); err == nil {
			t.Errorf("%x became %v", rec, got)
		}
	}
	var v any
	if err := Decode(rec, MsgPack, &v); err != nil || !v.(time.Time).Equal(time.Unix(5, 0)) {
		t.Errorf("%v, %v", v, err)
	}
}

// A map whose keys cannot be keys is an error of that record, not a panic.
func TestMsgPackUnhashableKey(t *testing.T) {
	var v map[any]any
	if err := decodeMsgPack([]byte{0x81, 0x91, 1, 1}, &v); !errors.Is(err, errKey) {
		t.Errorf("decoded into %v: %v", v, err)
	}
}
