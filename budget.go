package stream

import (
	"github.com/natsstream/stream/internal/flow"
	"github.com/natsstream/stream/internal/slab"
)

// This file bounds the memory of packets that have arrived and were not read. A peer may use all its credit, and the
// windows of all streams may add up to more than MaxBuffered. So the mux takes memory out of the budget when packets
// arrive, and the reader gives it back. A packet that finds no room is dropped, and repaired like one that was lost.
//
// A stream takes memory in steps, and the first minWindow bytes of each are free, so that most packets cost the mux one
// comparison. The mux may accept packets up to bucket.open, and they take no memory of the budget up to bucket.free.
// The bytes between them are the stream's part of endpoint.arrived, and session.recv.held counts them. A stream has no
// part while its reader waits for packets.
//
// The mux calls makeRoom, admit and take, the reader consumed and ranDry, and any goroutine the rest.

const (
	growthPart  = 8         // busy windows share this part of the budget, and records in pieces leave it to packets
	recordPart  = 4         // packets leave this part of the budget to records in pieces
	roomStep    = 128 << 10 // the most that a stream takes beyond its need, and keeps for the next packets
	settleAfter = 32 << 10  // the reader gives memory back in such steps, unless it runs dry
)

// memory returns the bytes of the budget that are in use.
func (ep *endpoint) memory() int64 { return ep.arrived.Load() + ep.assembled.Load() }

// roomForPackets returns how many bytes of the budget arrived packets may have together.
func (ep *endpoint) roomForPackets() int64 {
	return max(ep.budget-max(ep.assembled.Load(), ep.budget/recordPart), ep.budget/growthPart)
}

// admit lets the mux accept n more bytes than it may now, and a few more if there is room. It reports whether there is
// room for n bytes. A stream may have as much as it leaves free. So a few streams get all that they need, and neither
// one stream nor one peer with several takes everything from others (Choudhury and Hahne, "Dynamic queue length
// thresholds for shared-memory packet switches", 1998). Called by the mux alone.
func (s *session) admit(n uint64) bool {
	b := &s.bucket
	for {
		open, end := b.open.Load(), b.received+n
		if end <= open { // the reader moved it meanwhile
			return true
		}
		need := end - open
		more := max(b.grantedBytes.Load(), end) - open
		more = min(more, need+headroom(uint64(s.recv.held.Load()), need))
		if !s.take(int64(more)) {
			if more = need; !s.take(int64(more)) {
				return false
			}
		}
		for !b.open.CompareAndSwap(open, open+more) {
			open = b.open.Load()
		}
	}
}

// headroom returns the bytes that a stream takes beyond its need. The share of a stream doubles until it is roomStep, which
// settle leaves to it. A larger need gets at most roomStep more.
func headroom(held, need uint64) uint64 {
	if held+need < roomStep {
		return min(held, roomStep-held-need)
	}
	return min(held, roomStep)
}

// take takes n bytes out of the budget for packets of s.
func (s *session) take(n int64) bool {
	ep := s.ep
	if all := ep.arrived.Add(n); s.recv.held.Load()+n > ep.roomForPackets()-all {
		ep.arrived.Add(-n)
		return false
	}
	s.recv.held.Add(n)
	if s.bucket.ring.Between.released.Load() { // releaseWindow may run at the same time: the later of the two calls finds the bytes
		s.giveBackAll()
		return false
	}
	return true
}

// giveBack gives n bytes back to the budget, or all that s has if that is less.
func (s *session) giveBack(n uint64) {
	for n > 0 {
		held := s.recv.held.Load()
		less := min(int64(n), held)
		if less == 0 {
			return
		}
		if s.recv.held.CompareAndSwap(held, held-less) {
			s.ep.arrived.Add(-less)
			return
		}
	}
}

func (s *session) giveBackAll() { s.ep.arrived.Add(-s.recv.held.Swap(0)) }

// releaseWindow gives back all that s has in the budget, once. From then on it takes nothing more.
func (s *session) releaseWindow() {
	if !s.bucket.ring.Between.released.Swap(true) {
		s.ep.windows.Gone()
	}
	s.giveBackAll()
}

// consumed accounts for the current packet, which was read to its end. It grants the peer more, and gives memory back, if
// that is due.
func (s *session) consumed() {
	b := &s.bucket
	if b.consume(len(s.recv.data), s.recv.ackWanted) {
		if b.limited {
			b.resize(s.ep.windows, s.maxWindow(), s.ep.budget-s.ep.memory())
		}
		b.grant(s.recv.ackWanted)
		s.mark(workCredit)
	}
	if b.unsettled() >= settleAfter {
		s.giveBack(b.settle(false))
	}
}

// ranDry notes that the reader found no packet. The stream needs no memory then, and there is room for a packet that
// was dropped.
func (s *session) ranDry() {
	b := &s.bucket
	b.ranDry = true
	if !b.ring.Empty() { // packets arrived just now
		return
	}
	if b.open.Load() != b.free || b.unsettled() >= minWindow/2 {
		s.giveBack(b.settle(true))
	}
	if b.dropped.Load() {
		b.dropped.Store(false)
		b.window.Bytes = max(b.window.Bytes/2, minWindow)
		s.mark(workGap)
	}
}

// maxWindow returns the most bytes of the window of s.
func (s *session) maxWindow() uint64 {
	if x := s.extras.Load(); x != nil && x.window != 0 {
		return x.window
	}
	return s.ep.window
}

// newWindows returns the Windows of an endpoint with the given budget.
func newWindows(budget int64) *flow.Windows {
	return flow.NewWindows(minWindow, uint64(budget/growthPart))
}

// makeRoom accepts a packet that is within the credit of s, if there is memory for it. A stream that has less than
// minWindow may have one packet in any case, so that none stands still. Called by the mux alone.
func (s *session) makeRoom(data []byte, lent *slab.Slab) (verdict, *CloseError) {
	b := &s.bucket
	if !s.admit(uint64(len(data))) && b.received >= b.open.Load() {
		return noRoom, nil
	}
	return b.accept(data, lent, true)
}
