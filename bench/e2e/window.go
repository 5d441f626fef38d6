package e2e

import (
	"math"
	"sync/atomic"
)

// Plain NATS has no flow control: a publisher that is faster than its
// subscriber fills the server's and the client's buffers until one of them
// drops. window bounds the bytes in flight, so that the implementations without
// flow control lose nothing and their every record can be counted.
//
// The publisher owns sent and seen. It reads the consumer's progress only when
// it believes the window full, and parks on a channel only when it is.
type window struct {
	limit int64
	sent  int64
	seen  int64
	wake  chan struct{}

	_        [64]byte
	consumed atomic.Int64
	resumeAt atomic.Int64 // progress the parked publisher waits for; MaxInt64: not parked
}

func newWindow(limit int) *window {
	w := &window{limit: int64(limit), wake: make(chan struct{}, 1)}
	w.resumeAt.Store(math.MaxInt64)
	return w
}

// acquire is called by the publisher before each send.
func (w *window) acquire(stop <-chan struct{}) {
	if w.sent-w.seen >= w.limit {
		w.acquireSlow(stop)
	}
	w.sent++
}

func (w *window) acquireSlow(stop <-chan struct{}) {
	w.seen = w.consumed.Load()
	if w.sent-w.seen < w.limit {
		return
	}
	// Park until half of the window is free, so that the switch is paid once
	// per half window and not once per record.
	w.park(w.sent-w.limit/2, stop)
}

// drain waits until the consumer has taken everything.
func (w *window) drain(stop <-chan struct{}) { w.park(w.sent, stop) }

func (w *window) park(at int64, stop <-chan struct{}) {
	w.resumeAt.Store(at)
	// Either nobody saw resumeAt yet and the progress made meanwhile suffices,
	// or a consumer took resumeAt and its wake is on the way.
	if w.consumed.Load() < at || w.resumeAt.Swap(math.MaxInt64) == math.MaxInt64 {
		select {
		case <-w.wake:
		case <-stop:
		}
	}
	w.seen = w.consumed.Load()
}

// release is called by the consumer after it took n records.
func (w *window) release(n int64) {
	if w.consumed.Add(n) >= w.resumeAt.Load() && w.resumeAt.Swap(math.MaxInt64) != math.MaxInt64 {
		w.wake <- struct{}{}
	}
}
