package stream

// This file is the outbox's queue. Any goroutine may mark a session with work. The outbox takes all marked sessions at
// once.
//
// session.pending is a set of work bits. The goroutine that sets the first bit pushes the session on the queue. The
// outbox clears all bits when it begins to serve. So a session is on the queue at most once, and work that is marked
// while it is being served brings it back.

// Kinds of work, bits of session.pending.
const (
	workRequest  = 1 << iota // publish the request
	workPackets              // the writer has packets
	workCredit               // grant the peer new credit
	workGap                  // acknowledge the packets that arrived, and report missing ones
	workRefusal              // inform the peer that a granted packet found no room
	workProbe                // ask the peer for its acknowledgement and its credit
	workResume               // workGap and workProbe, if the peer is known: the connection was interrupted
	workWait                 // none: put the session on the wheel
	workHello                // send the consumer the producer's address
	workBind                 // the consumer has a send half now
	workSettle               // one half has ended: raise its event, which may end the stream
	workClose                // a handler closed its direction: CLOSE waits for the handler's result, for closeDelay at most
	workBegin                // the handler has begun: a hello may be due
	workEnd                  // the session ended: reset the peer, release the buffers
	workEndLater             // as workEnd, but the peer does not wait for it
	workPatience             // the user has set a peer timeout for the stream

	workNews    = workClose | workBind | workPatience
	workControl = workResume | workGap | workCredit | workRefusal | workHello | workProbe

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

// markLater gives the session work that can wait until the outbox is awake for another reason, or until the next tick.
// So a stream that opens and ends at once does not wake the outbox for its end.
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
