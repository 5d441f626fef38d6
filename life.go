package stream

import (
	"io"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/lifecycle"
)

// This file moves streams through the table of package lifecycle, and carries out its actions. The outbox runs it.

// step applies an event to the lifecycle of s, and carries out the actions of the transition. The outbox calls it.
func (o *outbox) step(s *session, event lifecycle.Event) {
	before := s.out.state
	next, do, _ := before.On(event, s.role)
	s.out.state = next
	snd := s.send.Load()
	switch {
	case before.Send == lifecycle.Waiting && next.Send == lifecycle.Open:
		snd.packer.bind(s.out.peer, s.firstCredit())
		s.mark(workPackets) // a CLOSE, which needs no credit, may wait
	case before.Send == lifecycle.Closing && next.Send == lifecycle.Settled:
		snd.releaseSent()
		snd.unacked.closed = 0
	}
	if do&lifecycle.FailWrites != 0 {
		snd.packer.cancel(ErrOneWay)
	}
	if do&lifecycle.Probe != 0 && s.out.life.pings == 0 && !s.nobodyReads() && o.connected() { // HandlerReturned may not be in the table yet
		o.ping(s) // a consumer that never wrote may have read everything and left
	}
	if do&lifecycle.Release != 0 {
		o.release(s)
	}
	if do&lifecycle.AckClose != 0 {
		o.sendCredit(s, 0)
	}
	if do&lifecycle.Forget != 0 {
		o.peers.remove(s)
		o.wheel.Remove(s)
		o.answered(s)
		o.leaveRemote(s)
		o.remember(s)
		s.finished()
		if f := o.ep.streamEnded; f != nil && s.role == lifecycle.Handler {
			f()
		}
	}
	if do&lifecycle.SendReset != 0 {
		o.sendReset(s)
	}
}

// settle raises the events of the reader and the handler of s. The outbox calls it.
func (o *outbox) settle(s *session) {
	if s.readDone() && s.out.state.Recv == lifecycle.Reading {
		o.step(s, lifecycle.CloseRead)
	}
	if s.nobodyReads() && s.out.state.Phase == lifecycle.Live {
		switch {
		case s.role == lifecycle.Handler && s.out.state.Recv != lifecycle.Unread:
			o.step(s, lifecycle.HandlerReturned)
		case s.role == lifecycle.Consumer && s.out.state.Recv == lifecycle.Reading:
			o.step(s, lifecycle.ConsumerLeft)
		}
	}
	if s.unheard() && o.connected() {
		if pk := s.send.Load().packer; pk.half || s.bucket.ring.Pushed() > 0 && !pk.soon {
			o.ping(s)
		}
	}
}

// unheard reports whether to ask a consumer to acknowledge CLOSE, because the handler has returned and the consumer may
// still send. The RESET that stops the consumer must come after the acknowledgement. A consumer that waits for credit
// would otherwise wait for AckTimeout. The outbox calls it.
func (s *session) unheard() bool {
	return s.role == lifecycle.Handler && s.nobodyReads() && !s.readDone() && // neither may be in the table yet
		s.out.state.Phase == lifecycle.Live && s.out.state.Send == lifecycle.Closing && s.out.life.pinged <= s.send.Load().unacked.closed
}

// end ends a stream on the outbox. It runs again if the connection was down when the RESET was due.
func (o *outbox) end(s *session, e *ending) {
	switch s.out.state.Phase {
	case lifecycle.Live:
		o.step(s, e.event())
	case lifecycle.Ending:
		o.sendReset(s)
	}
}

// release takes the token of an ended stream out of use, and gives its buffers and windows back. The outbox calls it.
func (o *outbox) release(s *session) {
	e := s.end.Load()
	if e == nil { // the table ended the stream: both directions are complete
		pk := s.send.Load().packer
		e = &wholeEnd
		if s.out.state.Recv == lifecycle.Unread && (s.role == lifecycle.Consumer || pk.half || s.bucket.ring.Pushed() > 0) {
			e = &ending{kind: endComplete, err: io.EOF, reset: pk.closing} // nobody reads: the peer must stop sending
		}
		s.requestEnd(e)
		e = s.end.Load()
	}
	s.unregister()
	s.dropUnwanted()
	s.publishCount()
	s.dropOpening()
	s.answered()
	s.endContexts(e)
	s.endDeadlines()
	if snd := s.send.Load(); snd != nil {
		o.leaveLine(s, snd.unacked.onTheWay())
		snd.releaseAll()
	}
	switch {
	case s.role != lifecycle.Consumer:
		s.releaseWindow()
	case s.closeRead(e) || s.nobodyReads(): // otherwise the reader does this when it reads the end
		s.release(e)
	}
}

// sendReset sends the RESET of an ended stream when the connection is up. The outbox calls it.
func (o *outbox) sendReset(s *session) {
	e := s.end.Load()
	through := s.out.state.Send == lifecycle.Closing && s.readDone() && e == o.ep.gone.Load() // everything was sent and read
	if e.reset.Code != 0 && s.out.peer != "" && !through {
		switch {
		case o.connected():
			if s.role == lifecycle.Consumer && s.readDone() {
				o.sendCredit(s, 0) // acknowledges CLOSE, which RESET does not
			}
			o.sendEnd(s, e.reset)
		case o.ep.gone.Load() == nil && s.out.state.Phase == lifecycle.Ending:
			o.hold(s, workEnd) // without the RESET the peer would wait for ever
			return
		}
	}
	if s.out.state.Phase == lifecycle.Ending {
		if s.out.peer == "" && e.reset.Code != 0 && s.out.life.took != 0 && !s.peerTakesNone() {
			o.countRequest(s)
		}
		o.step(s, lifecycle.Told)
	}
}

// endDrained resets all streams, because the connection drains: no further credit and no acknowledgement arrives, and
// soon this end cannot send. A producer's stream ends here as well. A consumer goes on reading until the connection is
// closed, because packets that arrived may wait in nats.go. A stream of which both directions are complete needs no
// RESET.
func (o *outbox) endDrained() {
	for s := range o.wheel.All() {
		complete := s.out.state.Send >= lifecycle.Closing && s.out.state.Recv == lifecycle.Done
		switch {
		case complete || s.out.state.Phase != lifecycle.Live:
		case s.role != lifecycle.Consumer:
			s.requestEnd(&ending{kind: endFault, err: connectionLost(nats.ErrConnectionDraining), reset: drained})
		case s.out.peer != "": // otherwise learned does so
			o.sendEnd(s, drained)
		}
	}
}

var drained = CloseError{CloseGoingAway, "the connection drains"}
