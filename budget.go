package stream

// This file shares MaxBuffered out to the windows of an endpoint's streams. Any goroutine calls it; all of it is atomic.

// The more streams there are, the smaller their windows. The bytes in flight of all streams then fit the processor's caches.
// 100 streams with windows of 256 KiB ran at little more than half the speed of 100 streams with the windows that reserve
// returns.
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
	s.settleWindow()
	return true
}

// releaseWindow gives the window back to the budget, once.
func (s *session) releaseWindow() {
	s.recv.released.Store(true)
	s.ep.reserved.Add(-s.recv.window.Swap(0))
}

// settleWindow gives bytes back that were reserved while the stream ended: the later of settleWindow and releaseWindow
// finds them.
func (s *session) settleWindow() {
	if s.recv.released.Load() {
		s.ep.reserved.Add(-s.recv.window.Swap(0))
	}
}
