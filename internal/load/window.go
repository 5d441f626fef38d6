package load

import (
	"math"
	"sync/atomic"
)

// A Window bounds the records on their way from one publisher to its subscribers. Plain NATS has no flow control: a
// publisher that is faster than its subscribers fills the buffers of the server and of the client until one of them
// drops messages. With a Window, an implementation without flow control loses nothing, and each of its records can be
// counted.
//
// The publisher owns sent and seen. It reads the consumers' progress only when it believes that the window is full, and
// parks on a channel only when it is.
type Window struct {
	limit int64
	sent  int64
	seen  int64
	wake  chan struct{}

	_        [64]byte
	consumed atomic.Int64
	resumeAt atomic.Int64 // progress the parked publisher waits for; MaxInt64: not parked
}

// NewWindow returns a window of limit records.
func NewWindow(limit int) *Window {
	w := &Window{limit: int64(limit), wake: make(chan struct{}, 1)}
	w.resumeAt.Store(math.MaxInt64)
	return w
}

// Acquire waits for room for one record. The publisher calls it before each send. It returns early when stop is closed.
func (w *Window) Acquire(stop <-chan struct{}) {
	if w.sent-w.seen >= w.limit {
		w.acquireSlow(stop)
	}
	w.sent++
}

func (w *Window) acquireSlow(stop <-chan struct{}) {
	w.seen = w.consumed.Load()
	if w.sent-w.seen < w.limit {
		return
	}
	// Park until half of the window is free, so that the switch is paid once
	// per half window and not once per record.
	w.park(w.sent-w.limit/2, stop)
}

// Drain waits until the consumers have taken all that was sent, or stop is closed.
func (w *Window) Drain(stop <-chan struct{}) { w.park(w.sent, stop) }

func (w *Window) park(at int64, stop <-chan struct{}) {
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

// Release makes room for n records. A consumer calls it after it took them; any number of consumers may.
func (w *Window) Release(n int64) {
	if w.consumed.Add(n) >= w.resumeAt.Load() && w.resumeAt.Swap(math.MaxInt64) != math.MaxInt64 {
		w.wake <- struct{}{}
	}
}
