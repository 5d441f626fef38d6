package stream

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/vmihailenco/msgpack/v5"
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
		nil, true, false, 1, -1, 127, 128, -32, -33, 1 << 40, int8(-100), int16(-1000), int32(-100_000), int64(-1 << 40),
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
		if err := checkMsgPack(p); err != nil {
			t.Errorf("%T, %d bytes, %x…: %v", v, len(p), p[:min(len(p), 20)], err)
		}
		if err := checkMsgPack(append(p[:len(p):len(p)], 0xc1)); err != nil {
			t.Errorf("%T: what follows the object counts: %v", v, err)
		}
		for n := range len(p) {
			if n > 200 && n < len(p)-200 { // large ones are walked in time that is proportional to n
				continue
			}
			if checkMsgPack(p[:n]) == nil {
				t.Errorf("%T: %d bytes of %d are accepted", v, n, len(p))
			}
		}
	}
}

// An object is nested at most maxMsgPackDepth deep, whatever is nested in what.
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
		// The object itself is the first level.
		if err := checkMsgPack(nested(maxMsgPackDepth - 1)); err != nil {
			t.Errorf("%s: %d levels: %v", name, maxMsgPackDepth-1, err)
		}
		for _, depth := range []int{maxMsgPackDepth, 100 * maxMsgPackDepth} {
			if checkMsgPack(nested(depth)) == nil {
				t.Errorf("%s: %d levels are accepted", name, depth)
			}
		}
	}
	for depth := range 2 { // without an end
		var v any
		if decodeObject(bytes.Repeat([]byte{0x91 - byte(16*depth)}, 15<<20), FlagMsgPack, 0, &v) == nil {
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
				if checkMsgPack(p) == nil {
					t.Errorf("%x: accepted", p[:min(len(p), 20)])
				}
				var v any
				var list []struct{ A [20]int64 }
				var object struct{ X int }
				for _, v := range []any{&v, &list, &object} {
					if decodeObject(p, FlagMsgPack, 0, v) == nil {
						t.Errorf("%x: decoded into %T", p[:min(len(p), 20)], v)
					}
				}
			}
		}
	}
}

// Looking at a small object costs no allocation.
func TestCheckMsgPackAllocations(t *testing.T) {
	p, err := msgpack.Marshal(map[string]any{"id": 12345, "name": "some name", "value": 1.5, "tags": []any{"a", []any{"b"}}, "at": time.Unix(1, 2)})
	if err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(100, func() {
		if err := checkMsgPack(p); err != nil {
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
	if testing.Short() || raceEnabled {
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
		if checkMsgPack(p) != nil {
			var v any
			if decodeObject(p, FlagMsgPack, 0, &v) == nil {
				t.Fatalf("seed %d: %x is refused by the check and not by RecvObject", seed, p)
			}
			continue
		}
		accepted++
		var v any
		err := msgpack.Unmarshal(p, &v)
		if err != nil && (strings.Contains(err.Error(), "EOF") || strings.Contains(err.Error(), "short")) {
			t.Fatalf("seed %d: %x is accepted, and the decoder wants more: %v", seed, p, err)
		}
		var object struct {
			A int
			B []any
		}
		_ = msgpack.Unmarshal(p, &object)
	}
	if accepted < rounds/20 {
		t.Errorf("seed %d: %d of %d were accepted", seed, accepted, rounds)
	}
}
