package flow

import "sync/atomic"

// Windows says how large the windows of the streams of one endpoint are. A window is a promise: it costs no memory
// until packets arrive. Its size matters in two ways. A window that is smaller than the capacity of the line holds its
// sender back. And the bytes of all senders on their way should fit into the caches of the processor.
//
// So the windows share a pool, and only busy streams count. A stream is busy if its sender used its credit up in this
// interval or the one before. Streams that are idle, or need less than their window, hold nobody back.
//
// Any goroutine may call First and Gone, and the reader that owns a Window calls Resize. They touch atomics. One
// goroutine, the outbox, calls Turn. NewWindows makes a Windows.
type Windows struct {
	smallest, pool uint64

	streams  atomic.Int64 // that are open
	interval atomic.Uint32
	now      busy // of this interval
	before   busy // of the interval before
	turned   int64
}

// busy is the number of busy streams and the sum of their windows.
type busy struct{ streams, bytes atomic.Int64 }

// Window is the window of one stream. Its reader owns it.
type Window struct {
	Bytes    uint64
	Packet   uint32 // the size of the largest packet since the last grant
	interval uint32 // when the stream counted as busy last
}

// Interval is the time in nanoseconds between two calls of Turn: longer than a round trip, in which a busy sender uses
// its credit up at least once.
const Interval = second / 2

// fewest is how many packets a window holds at least. With fewer, a sender waits for credit after each packet or two.
const fewest = 4

// NewWindows returns a Windows for windows of at least smallest bytes, which share pool bytes.
func NewWindows(smallest, pool uint64) *Windows {
	p := &Windows{smallest: smallest, pool: pool}
	p.interval.Store(1) // a new Window has not been busy
	return p
}

// First counts a new stream and returns its first window: want bytes, or half, a quarter, … of it if many streams are
// open.
func (p *Windows) First(want uint64) uint64 {
	n := uint64(p.streams.Add(1))
	for want > p.smallest && want*n > p.pool {
		want /= 2
	}
	return max(want, p.smallest)
}

// Gone counts a stream less.
func (p *Windows) Gone() { p.streams.Add(-1) }

// Resize changes the window of a stream after its sender has used its credit up. dry says that the reader waited for
// packets meanwhile, so the sender could have used more. largest is the most bytes of this window. free is the memory
// left for packets that arrive, in bytes: windows share at most a quarter of it.
func (p *Windows) Resize(w *Window, dry bool, largest uint64, free int64) {
	if i := p.interval.Load(); w.interval != i {
		w.interval = i
		p.now.streams.Add(1)
		p.now.bytes.Add(int64(w.Bytes))
	}
	streams := max(p.now.streams.Load(), p.before.streams.Load(), 1)
	bytes := max(p.now.bytes.Load(), p.before.bytes.Load())
	pool := int64(min(p.pool, uint64(max(free, 0)/4)))
	floor := max(int64(p.smallest), min(fewest*int64(w.Packet), fewest*pool/streams))
	size := int64(w.Bytes)
	next := min(resize(size, dry, pool-bytes, max(pool/streams, floor), floor), int64(largest))
	p.now.bytes.Add(next - size)
	w.Bytes = uint64(next)
}

// resize returns the next size of a busy window. room is the rest of the pool, below 0 if it is exceeded, share is the
// window's fair part of the pool, and floor the smallest useful window.
func resize(size int64, dry bool, room, share, floor int64) int64 {
	switch {
	case dry: // the window holds the sender back
		return min(2*size, max(size+room, share))
	case room < 0: // the reader holds it back, and would with less
		return min(size, max(size/2, floor))
	}
	return size
}

// Turn begins a new interval if it is time. It takes the time of a monotonic clock.
func (p *Windows) Turn(now int64) {
	since := now - p.turned
	if since < Interval {
		return
	}
	p.turned = now
	streams, bytes := p.now.streams.Swap(0), p.now.bytes.Swap(0)
	if since >= 2*Interval { // nobody turned for long, and so nobody was busy
		streams, bytes = 0, 0
	}
	p.before.streams.Store(streams)
	p.before.bytes.Store(bytes)
	p.interval.Add(1)
}
