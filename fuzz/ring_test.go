package fuzz

import (
	"testing"

	"github.com/natsstream/stream/internal/ring"
)

// FuzzRing runs a sequence of operations on a ring and on a slice, and compares
// them after each. The first byte is the limit; of every other, the upper three
// bits are the operation and the lower five its count.
func FuzzRing(f *testing.F) {
	const (
		push = iota << 5
		pop
		pushMany // 2^(count mod 14)
		popMany
		drain
		limit // 2^(count mod 14), higher or lower
	)
	f.Add([]byte{4, push | 4, push | 1, pop | 2, push | 2, drain})          // fill, overrun, turn round
	f.Add([]byte{255, push | 5, pop | 3, push | 31, pop | 31, drain})       // grow while it is half drained
	f.Add([]byte{3, push | 4, limit | 3, push | 6, limit | 1, push | 1})    // raise, then lower the limit
	f.Add([]byte{1, limit | 13, pushMany | 13, popMany | 12, pushMany | 12, // segments of the largest size
		drain, pushMany | 12, drain})
	f.Fuzz(func(t *testing.T, ops []byte) {
		if len(ops) == 0 || len(ops) > 200 {
			return
		}
		now := int(ops[0])  // the limit now
		highest := now      // a lower limit may take hold late, a higher one not
		var model []*uint32 // what is queued
		var pushed uint32   // ever
		var r ring.Ring[*uint32]
		r.Init(now)
		doPush := func(n int) {
			for range n {
				v := new(uint32)
				*v = pushed
				ok := r.Push(v)
				if !ok && len(model) < now || ok && len(model) >= highest {
					t.Fatalf("Push = %v with %d queued, limit %d, once %d", ok, len(model), now, highest)
				}
				if !ok {
					return
				}
				model = append(model, v)
				pushed++
			}
		}
		doPop := func(n int) {
			for range n {
				v, ok := r.Pop()
				if ok != (len(model) > 0) {
					t.Fatalf("Pop = %v with %d queued", ok, len(model))
				}
				if !ok {
					return
				}
				if v != model[0] {
					t.Fatalf("Pop = %p, want element %d", v, *model[0])
				}
				model = model[1:]
			}
		}
		for _, op := range ops[1:] {
			n := int(op & 31)
			switch op &^ 31 {
			case push:
				doPush(n)
			case pop:
				doPop(n)
			case pushMany:
				doPush(1 << (n % 14))
			case popMany:
				doPop(1 << (n % 14))
			case drain:
				doPop(len(model) + 1)
			case limit:
				now = 1 << (n % 14)
				highest = max(highest, now)
				r.SetLimit(now)
			}
			if r.Len() != len(model) || r.Empty() != (len(model) == 0) || r.Pushed() != pushed {
				t.Fatalf("Len %d, Empty %v, Pushed %d; want %d queued, %d pushed",
					r.Len(), r.Empty(), r.Pushed(), len(model), pushed)
			}
		}
	})
}
