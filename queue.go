package stream

// This file is the outbox's queue. Any goroutine marks a session with work. The outbox takes all marked sessions at once.
//
// session.pending is a set of work bits. The goroutine that sets the first bit pushes the session on the queue. The
// outbox clears all bits when it begins to serve. So a session is on the queue at most once, and work that is marked while it is
// being served brings it back.

// Kinds of work, bits of session.pending.
const (
	workRequest  = 1 << iota // publish the request
	workPackets              // the writer has packets
	workCredit               // grant the peer new credit
	workGap                  // acknowledge the packets that arrived, and report missing ones
	workProbe                // ask the peer for its acknowledgement and its credit
	workResume               // both of these, where the peer is known: the connection was away
	workWait                 // nothing: the session is to be looked at in time
	workHello                // let the consumer know where its producer is
	workBind                 // the consumer has a send half now
	workSettle               // one half has come to its end: was it the last?
	workClose                // a handler closed its direction: CLOSE waits for the handler's result, but not for long
	workBegin                // the handler has begun: let the consumer know soon, if it does not hear anyway
	workEnd                  // the session ended: tell the peer, let go of the buffers
	workEndLater             // the same, and the peer waits for nothing
	workPatience             // the user has set how long the peer may be silent

	workNews    = workClose | workBind | workPatience
	workControl = workResume | workGap | workCredit | workHello | workProbe

	workLater = workWait | workBegin | workClose | workEndLater | workSettle // work that does not wake the outbox
)

// mark gives the session work. It neither blocks nor locks.
func (s *session) mark(work uint32) {
	before := s.pending.Or(work)
	if before&^workLater != 0 {
		return // queued, or about to be served
	}
	o := &s.ep.outbox
	if before == 0 {
		o.push(s)
	}
	o.park.Wake()
}

// markLater gives the session work that can wait until the outbox is up for another reason, at the latest the next tick. A
// stream that opens and ends at once need not wake it for that.
func (s *session) markLater(work uint32) {
	if s.pending.Or(work) != 0 {
		return
	}
	o := &s.ep.outbox
	o.push(s)
	if !s.ep.ticker.Armed() {
		s.ep.ticker.Arm()
	}
}

func (o *outbox) push(s *session) {
	for {
		head := o.queue.Load()
		s.next = head // published by the swap below
		if o.queue.CompareAndSwap(head, s) {
			return
		}
	}
}

// take empties the queue and returns it in the order in which it was filled.
func (o *outbox) take() *session {
	if o.queue.Load() == nil {
		return nil
	}
	var first *session
	for s := o.queue.Swap(nil); s != nil; {
		next := s.next
		s.next = first
		first, s = s, next
	}
	return first
}
