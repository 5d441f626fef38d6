package stream

import (
	"io"

	"github.com/natsstream/stream/internal/lifecycle"
)

// endKind says what the end of a stream means for records that arrived, for a handler at work, and for the peer.
type endKind uint8

const (
	endComplete   endKind = iota // nothing remains to be done. A handler at work goes on
	endPeerClosed                // the reader has read the peer's CLOSE, with another code than 1000
	endReset                     // the peer's RESET arrived
	endPeerDone                  // the same, and the peer's CLOSE may wait to be read: writes have no reason to give
	endFault                     // this end found that the stream cannot go on
	endLocal                     // this end wants no more: records that arrived are not delivered
)

// ending says how a stream ended.
type ending struct {
	kind  endKind
	err   error
	reset CloseError // for the peer; code 0 if there is nothing to tell
}

// event is what the end of a stream is in the table of its life.
func (e *ending) event() lifecycle.Event {
	switch e.kind {
	case endComplete:
		return lifecycle.Completed
	case endPeerClosed:
		return lifecycle.PeerFailed
	case endReset, endPeerDone:
		return lifecycle.ResetRead
	}
	return lifecycle.Ended
}

// requestEnd ends the stream, unless it has ended: the first end counts. Calls that wait return, and the outbox does the
// rest. It reports whether e is the end. No write that begins after it returned succeeds, whether or not e is the end. The mux
// calls endFromMux instead. The caller does not hold the writer's lock.
func (s *session) requestEnd(e *ending) bool {
	defer func() {
		if w := s.writer.Load(); w != nil {
			w.shut()
		}
	}()
	if !s.end.CompareAndSwap(nil, e) {
		return false
	}
	s.bucket.park.Wake()
	s.endContexts(e)
	if s.stream != nil && e.kind == endLocal {
		s.release(e)
	}
	if e.kind == endComplete || e.kind == endPeerClosed {
		s.markLater(workEndLater) // the peer has ended its direction, and waits for no answer
	} else {
		s.mark(workEnd)
	}
	return true
}

// closeRead reports whether the peer's CLOSE was read before the stream ended with e.
func (s *session) closeRead(e *ending) bool {
	return e.kind == endPeerClosed || s.role == lifecycle.Consumer && (e.kind == endComplete || s.readDone.Load())
}

// endFromMux is requestEnd for the mux, which takes no lock and so leaves contexts to the outbox.
func (s *session) endFromMux(e *ending) {
	if s.end.CompareAndSwap(nil, e) {
		s.bucket.park.Wake()
		s.mark(workEnd)
	}
}

// endContexts ends the contexts that writers and handlers wait on. Ending them again does nothing.
func (s *session) endContexts(e *ending) {
	if w := s.writer.Load(); w != nil {
		w.cancel(e.cause())
	}
	if s.stream == nil && s.cancel != nil && e.kind != endComplete { // that of a consumer ends with Stream.ended
		s.cancel(e.cause())
	}
}

// cause is the cause of the contexts of writers and handlers after the end.
func (e *ending) cause() error {
	if e.err == io.EOF {
		return ErrClosed
	}
	return e.err
}

// writeError is the error of writes after the end.
func (e *ending) writeError() error {
	if e.err == io.EOF || e.kind == endPeerDone || isNormal(e.err) {
		return ErrClosed
	}
	return e.err
}

// step moves the stream on in the table of its life, and does what the table asks for. The outbox calls it.
func (o *outbox) step(s *session, event lifecycle.Event) {
	before := s.state
	next, do, _ := before.On(event, s.role)
	s.state = next
	w := s.writer.Load()
	switch {
	case before.Send == lifecycle.Waiting && next.Send == lifecycle.Open:
		w.bind(s.peer)
		s.mark(workPackets) // a CLOSE, which needs no credit, may wait
	case before.Send == lifecycle.Closing && next.Send == lifecycle.Settled:
		w.releaseSent()
		s.life.closed = 0
	}
	if do&lifecycle.FailWrites != 0 {
		w.cancel(ErrOneWay)
	}
	if do&lifecycle.Probe != 0 && s.life.pings == 0 && !s.returned.Load() && o.connected() { // the table hears of returned later
		o.ping(s) // a consumer that never wrote may be gone, having read everything
	}
	if do&lifecycle.Release != 0 {
		o.release(s)
	}
	if do&lifecycle.AckClose != 0 {
		o.tellCredit(s, 0)
	}
	if do&lifecycle.Forget != 0 {
		o.peers.remove(s)
		o.wheel.Remove(s)
		o.answered(s)
		o.leaveRemote(s)
		o.remember(s)
		if s.server != nil {
			s.server.leave()
		}
	}
	if do&lifecycle.SendReset != 0 {
		o.sendReset(s)
	}
}

// settle tells the table of s what its reader and its handler did.
func (o *outbox) settle(s *session) {
	if s.readDone.Load() && s.state.Recv == lifecycle.Reading {
		o.step(s, lifecycle.CloseRead)
	}
	if s.returned.Load() && s.state.Phase == lifecycle.Live {
		switch {
		case s.role == lifecycle.Handler && s.state.Recv != lifecycle.Unread:
			o.step(s, lifecycle.HandlerReturned)
		case s.role == lifecycle.Consumer && s.state.Recv == lifecycle.Reading:
			o.step(s, lifecycle.ConsumerLeft)
		}
	}
	if w := s.writer.Load(); s.unheard() && (w.half || s.bucket.ring.Pushed() > 0 && !w.soon) && o.connected() {
		o.ping(s)
	}
}

// unheard reports whether to ask a consumer, which may still send, to acknowledge CLOSE: its handler has returned. The RESET that
// says so must come after the acknowledgement, and AckTimeout would be long for a writer that waits for credit.
func (s *session) unheard() bool {
	return s.role == lifecycle.Handler && s.returned.Load() && !s.readDone.Load() && // the table hears of both later
		s.state.Phase == lifecycle.Live && s.state.Send == lifecycle.Closing && s.life.pinged <= s.life.closed
}

// end ends a stream on the outbox. It is called again for a stream whose peer could not be told while the connection was
// down.
func (o *outbox) end(s *session, e *ending) {
	switch s.state.Phase {
	case lifecycle.Live:
		o.step(s, e.event())
	case lifecycle.Ending:
		o.sendReset(s)
	}
}

// release lets go of what a stream holds that is no longer live.
func (o *outbox) release(s *session) {
	e := s.end.Load()
	if e == nil { // the table came to the end: both directions are through
		w := s.writer.Load()
		e = &ending{kind: endComplete, err: io.EOF}
		if s.state.Recv == lifecycle.Unread && (s.role == lifecycle.Consumer || w.half || s.bucket.ring.Pushed() > 0) {
			e.reset = w.closing // nobody reads: the peer must not wait for that
		}
		s.requestEnd(e)
		e = s.end.Load()
	}
	s.unregister()
	s.request = nil
	s.answer()
	s.endContexts(e)
	if w := s.writer.Load(); w != nil {
		o.leaveLine(s, w.sent.onTheWay())
		w.ended()
	}
	switch {
	case s.stream == nil:
		s.releaseWindow()
	case s.closeRead(e) || s.returned.Load(): // else the reader does so when it comes to the end
		s.release(e)
	}
}

// sendReset tells the peer of a stream how it ended, as soon as the connection is up.
func (o *outbox) sendReset(s *session) {
	e := s.end.Load()
	through := s.state.Send == lifecycle.Closing && s.readDone.Load() && e == o.ep.gone.Load() // everything was said, and heard
	if e.reset.Code != 0 && s.peer != "" && !through {
		switch {
		case o.connected():
			if s.stream != nil && s.readDone.Load() {
				o.tellCredit(s, 0) // that its CLOSE arrived: what this end's leaving alone does not say
			}
			o.tellEnd(s, e.reset)
		case o.ep.gone.Load() == nil && s.state.Phase == lifecycle.Ending:
			o.hold(s, workEnd) // a peer that is not told would wait for ever
			return
		}
	}
	if s.state.Phase == lifecycle.Ending {
		if s.peer == "" && e.reset.Code != 0 && s.life.took != 0 && !s.oneWay.Load() {
			o.unanswered.add(o.ep.now(), o.ep.times.Ack)
		}
		o.step(s, lifecycle.Told)
	}
}
