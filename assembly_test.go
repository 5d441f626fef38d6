package stream

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"
)

// cut returns n bytes in pieces of the sizes that next returns.
func cut(n int, next func() int) (pieces [][]byte) {
	for n > 0 {
		p := make([]byte, min(n, max(1, next())))
		for i := range p {
			p[i] = byte(n + i)
		}
		n -= len(p)
		pieces = append(pieces, p)
	}
	return pieces
}

// A record is put together with work and memory in proportion to its size, whatever its pieces and their packets look like.
func TestAssemblyIsLinear(t *testing.T) {
	const size = 1 << 20
	r := rand.New(rand.NewPCG(1, 2))
	turn := 0
	alternate := func(sizes ...int) func() int {
		return func() int { turn++; return sizes[turn%len(sizes)] }
	}
	for name, c := range map[string]struct {
		size   int
		next   func() int
		packet func(piece int) int // that the piece came in
	}{
		"one byte each, one packet":          {size, alternate(1), func(int) int { return 4 << 20 }},
		"one byte each, a packet each":       {size, alternate(1), func(n int) int { return n + 20 }},
		"one byte each, in large packets":    {size / 16, alternate(1), func(int) int { return 1 << 20 }},
		"most of a packet":                   {size, alternate(30_000), func(n int) int { return n + 20 }},
		"a little less than half":            {size, alternate(30_000), func(n int) int { return 2*n + 2 }},
		"exactly half":                       {size, alternate(30_000), func(n int) int { return 2 * n }},
		"large pieces, larger packets":       {size, alternate(200_000), func(int) int { return 8 << 20 }},
		"just not worth keeping":             {size, alternate(minKept - 1), func(n int) int { return n + 20 }},
		"just worth keeping":                 {size, alternate(minKept), func(n int) int { return n + 20 }},
		"large and small in turn":            {size, alternate(minKept, 1), func(n int) int { return n + 20 }},
		"small ones behind each that is not": {size, alternate(5000, 1, 1, 1, 1, 1), func(n int) int { return n + 20 }},
		"any":                                {size, func() int { return 1 << r.IntN(17) }, func(n int) int { return n + r.IntN(1<<17) }},
		"two":                                {10, alternate(5), func(n int) int { return n + 20 }},
	} {
		t.Run(name, func(t *testing.T) {
			pieces := cut(c.size, c.next)
			packets := make([]int, len(pieces))
			for i, p := range pieces {
				packets[i] = c.packet(len(p))
			}
			want := bytes.Join(pieces, nil)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			var a assembly
			most, taken := uint64(2*minChunk+maxChunk), uint64(0)
			for i, p := range pieces[:len(pieces)-1] {
				if !a.add(p, packets[i], func(n uint64) bool { taken += n; return true }) {
					t.Fatal("memory that was granted is refused")
				}
				arrived := a.size
				if limit := 2*arrived + arrived/8 + most; a.held > limit {
					t.Fatalf("%d bytes are held for %d that arrived, want at most %d", a.held, arrived, limit)
				}
			}
			rec := a.record(pieces[len(pieces)-1])
			runtime.ReadMemStats(&after)
			if !bytes.Equal(rec, want) || cap(rec) != len(rec) {
				t.Errorf("a record of %d bytes, capacity %d; want %d", len(rec), cap(rec), len(want))
			}
			if taken != a.held {
				t.Errorf("%d bytes are held, %d were granted", a.held, taken)
			}
			// The record, once more in chunks, and the entries with what append left behind.
			if n, limit := after.TotalAlloc-before.TotalAlloc, uint64(3*c.size+4*minChunk+2*maxChunk); n > limit {
				t.Errorf("%d bytes were allocated, want at most %d", n, limit)
			}
		})
	}
}

// Where the memory for a piece is refused, nothing is counted for it.
func TestAssemblyRefused(t *testing.T) {
	for _, most := range []uint64{0, minChunk - 1, minChunk, 5000, 100_000} {
		t.Run(fmt.Sprint(most), func(t *testing.T) {
			var a assembly
			taken := uint64(0)
			take := func(n uint64) bool {
				if taken+n > most {
					return false
				}
				taken += n
				return true
			}
			for i := 0; a.add(make([]byte, 1+i%3000), 3020, take); i++ {
				if i > 1_000_000 {
					t.Fatal("more is held than was granted")
				}
			}
			if a.held != taken || a.held > most {
				t.Errorf("%d bytes are held, %d were granted of %d", a.held, taken, most)
			}
		})
	}
}
