package stream

import (
	"math/bits"
	"sync/atomic"

	"github.com/natsstream/stream/internal/race"
)

// This file has a count that costs its owner no locked instruction. Only the owner adds to it. Any goroutine may read
// it.

// tally is a count that one goroutine at a time changes, and that any goroutine reads. An atomic store costs as much as
// the rest of Recv on some processors. So 64-bit builds store a plain word: a reader gets one of the values that were
// stored, as the memory model of Go promises for a word. Race builds and 32-bit builds use atomic stores.
type tally struct {
	_ [0]atomic.Uint64 // aligns n on 32-bit processors
	n uint64
}

func (t *tally) add(n uint64) {
	if race.Enabled || bits.UintSize < 64 {
		atomic.StoreUint64(&t.n, t.n+n)
		return
	}
	t.n += n
}

func (t *tally) load() uint64 { return atomic.LoadUint64(&t.n) }
