package stream

import (
	"sync/atomic"
	"time"
)

// This file sends the hello, the first packet of a handler that has not written. The outbox runs it, with three
// exceptions. newEndpoint runs init. The goroutine of a handler runs begin, and arm through it. A goroutine of package
// time runs the function of the timer, which stores due and wakes the outbox. A consumer cannot write before it knows
// the producer's address; docs/PROTOCOL.md section 2.3. A handler that reads sends a hello at once. One that writes
// needs none, because its first packet has the address. The outbox waits a moment for either, because most handlers
// answer at once and a separate hello would be wasted. A consumer in another account gets a hello in any case, because
// it carries the name of the stream.

// helloWait is this moment: a hello is due between one and two helloWait after the handler began.
const helloWait = time.Millisecond

// hellos lists the sessions of handlers with consumers that may not know the address yet, oldest first. One timer
// serves all of them. The first handler that begins starts it. It runs while the list has sessions, and is stopped
// otherwise.
type hellos struct {
	armed atomic.Bool // the timer runs, or due is not acted on yet
	due   atomic.Bool
	timer *time.Timer

	// Owned by the outbox.
	waiting []*session
	old     int // how many of them were in the list when the timer was last set
}

func (h *hellos) init(o *outbox) {
	h.timer = time.AfterFunc(helloWait, func() {
		h.due.Store(true)
		o.park.Wake()
	})
	h.timer.Stop()
}

// arm starts the timer, unless it runs. Any goroutine may call it.
func (h *hellos) arm() {
	if !h.armed.Load() && !h.armed.Swap(true) {
		h.timer.Reset(helloWait)
	}
}

// begin marks that the handler of s has begun. The handler's goroutine calls it. It does not wake the outbox.
func (s *session) begin() {
	s.markLater(workBegin)
	s.ep.outbox.hellos.arm()
}

// wantsHello reports whether the consumer may not know the address of its producer, or the name of the stream.
func (s *session) wantsHello() bool {
	return s.send.Load().unacked.Next() == 0 && s.out.life.pings == 0 && s.out.life.heard == 0 || s.unnamed()
}

// expect adds a session with a handler that has begun. Called by the outbox.
func (h *hellos) expect(s *session) {
	h.waiting = append(h.waiting, s)
	h.arm()
}

// greet sends the hellos that are due. The outbox calls it when it is idle, because packets that handlers wrote make
// most hellos needless.
func (o *outbox) greet() {
	h := &o.hellos
	h.due.Store(false)
	for i, s := range h.waiting[:h.old] {
		h.waiting[i] = nil
		if s.end.Load() == nil && s.wantsHello() {
			o.serve(s, workHello)
		}
	}
	n := copy(h.waiting, h.waiting[h.old:])
	clear(h.waiting[n:])
	h.waiting, h.old = h.waiting[:n], n
	if n > 0 {
		h.timer.Reset(helloWait)
		return
	}
	h.armed.Store(false) // a handler that begins meanwhile is on the outbox's queue, and expect arms the timer for it
}
