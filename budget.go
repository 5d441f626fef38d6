package stream

// This file shares MaxBuffered out to the windows of an endpoint's streams. Any goroutine calls it; all of it is atomic.

// The more streams there are, the smaller their windows: what all of them hold in flight passes through the processor's
// caches, or does not fit and passes through memory. 100 streams of 256 KiB ran at little more than half the speed of
// the same 100 with what reserve gives them.
const (
	smallerFrom = 64 // with this part of the budget in use first windows begin to shrink, by half for each doubling
	growthPart  = 8  // windows grow within this part of the budget; the rest is for new streams
)

// reserve takes a first window for a stream out of the budget: want bytes, or half, a quarter, … of it. Below minWindow
// a stream would crawl, so that much is given in any case.
func (ep *endpoint) reserve(want uint64) uint64 {
	for used := ep.reserved.Load(); want > minWindow && used > ep.budget/smallerFrom; used /= 2 {
		want /= 2
	}
	for ; want > minWindow; want /= 2 {
		if ep.take(want, ep.budget) {
			return want
		}
	}
	ep.reserved.Add(int64(want))
	return want
}

// grow takes n more bytes for a window that is too small.
func (ep *endpoint) grow(n uint64) bool { return ep.take(n, ep.budget/growthPart) }

// take takes n bytes out of the budget, if no more than limit are in use then.
func (ep *endpoint) take(n uint64, limit int64) bool {
	if ep.reserved.Add(int64(n)) > limit {
		ep.reserved.Add(-int64(n))
		return false
	}
	return true
}

// grow reserves n more bytes for the stream's window.
func (s *session) grow(n uint64) bool {
	if !s.ep.grow(n) {
		return false
	}
	s.recv.window.Add(int64(n))
	if s.recv.released.Load() { // at the same time: whoever comes second finds the bytes
		s.ep.reserved.Add(-s.recv.window.Swap(0))
	}
	return true
}

// releaseWindow gives the window back to the budget, once.
func (s *session) releaseWindow() {
	s.recv.released.Store(true)
	s.ep.reserved.Add(-s.recv.window.Swap(0))
}
