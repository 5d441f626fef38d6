package stream

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"io"
	"math/bits"
	"sync/atomic"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/lifecycle"
)

// session is one stream at one end: what the mux finds under the stream's token. It has two halves, one to receive and
// one to send, which are the same at both ends.
type session struct {
	// What the mux looks at comes first, on two cache lines: with thousands of streams none of them is at hand.
	end          atomic.Pointer[ending] // set once: the first end counts
	role         lifecycle.Role
	controls     uint32 // control words ever handed to the outbox; the mux's
	senderNumber uint64 // this end's, in the header of each packet
	bucket       bucket // the receive half as the mux sees it

	// Set once. These lie apart from the fields that change with each packet.
	ep     *endpoint
	reply  string                  // this end's subject: prefix and token. Empty until the session is registered
	send   atomic.Pointer[sender]  // the send half; a consumer's is made when it first writes
	stream *Stream                 // at the consumer's end
	server *Server                 // at a handler's end
	cancel context.CancelCauseFunc // of the context of Stream or Request

	recv        receiver    // the receive half as its user sees it
	nobodyReads atomic.Bool // the handler returned, or the consumer parted: nobody reads what still comes

	// The outbox's queue. pending holds the marked work; a session is queued exactly while it is not zero.
	pending  atomic.Uint32
	patience atomic.Uint32 // how long the peer may be silent on this stream, milliseconds; 0 is as long as on others
	next     *session

	out   outboxState
	acted atomic.Uint32 // control words ever acted on

	remote  atomic.Pointer[remote] // whose stream this is. The outbox stores it, and the reader asks which records share a peer
	lastPop atomic.Int64           // endpoint's clock when the reader took the last packet: a sign of life that costs the mux nothing
}

// outboxState is the part of a session that the outbox alone uses, once the session is marked.
type outboxState struct {
	subject           string        // where the request went
	peer              string        // subject of the other end; a consumer learns it from the producer's first packet
	whereabouts       *whereabouts  // of a peer that moves or is in another account; nil of most
	request           *nats.Msg     // opens the stream; nil once it is published
	answered          chan struct{} // closed, and set to nil, when the producer has answered; nil if nobody waits for that
	deferredUntilUp   uint32        // work that waits for the connection; not zero while in outbox.waitingUntilUp
	deferredUntilPeer uint32        // work for the peer that was due before its subject was known
	state             lifecycle.State
	places            places // in which of the outbox's lists it is
	line              *line  // the way to the peer
	life              life
}

func (s *session) init(ep *endpoint, role lifecycle.Role, packets uint32, bytes uint64) {
	s.ep, s.role, s.senderNumber = ep, role, newSender(role == lifecycle.Consumer)
	s.recv.maxRecord = uint64(ep.maxRecord)
	s.bucket.init(packets, bytes)
}

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
// rest. It reports whether e is the end. When it returns, no write that begins later succeeds and the contexts have ended, whether
// or not e is the end. The mux
// calls endFromMux instead. The caller does not hold the writer's lock.
func (s *session) requestEnd(e *ending) bool {
	defer func() {
		if snd := s.send.Load(); snd != nil {
			snd.packer.shut()
		}
	}()
	if !s.end.CompareAndSwap(nil, e) {
		s.endContexts(s.end.Load()) // the goroutine that set it may not have come so far
		return false
	}
	s.bucket.park.Wake()
	s.endContexts(e)
	if s.role == lifecycle.Consumer && e.kind == endLocal {
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
	return e.kind == endPeerClosed || s.role == lifecycle.Consumer && (e.kind == endComplete || s.recv.readDone.Load())
}

// endContexts ends the contexts that writers and handlers wait on. Ending them again does nothing.
func (s *session) endContexts(e *ending) {
	if snd := s.send.Load(); snd != nil {
		snd.packer.cancel(e.cause())
	}
	if s.role != lifecycle.Consumer && s.cancel != nil && e.kind != endComplete { // that of a consumer ends with Stream.ended
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
	before := s.out.state
	next, do, _ := before.On(event, s.role)
	s.out.state = next
	snd := s.send.Load()
	switch {
	case before.Send == lifecycle.Waiting && next.Send == lifecycle.Open:
		snd.packer.bind(s.out.peer)
		s.mark(workPackets) // a CLOSE, which needs no credit, may wait
	case before.Send == lifecycle.Closing && next.Send == lifecycle.Settled:
		snd.releaseSent()
		snd.unacked.closed = 0
	}
	if do&lifecycle.FailWrites != 0 {
		snd.packer.cancel(ErrOneWay)
	}
	if do&lifecycle.Probe != 0 && s.out.life.pings == 0 && !s.nobodyReads.Load() && o.connected() { // the table hears of returned later
		o.ping(s) // a consumer that never wrote may be gone, having read everything
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
		if s.server != nil {
			s.server.streamEnded()
		}
	}
	if do&lifecycle.SendReset != 0 {
		o.sendReset(s)
	}
}

// settle tells the table of s what its reader and its handler did.
func (o *outbox) settle(s *session) {
	if s.recv.readDone.Load() && s.out.state.Recv == lifecycle.Reading {
		o.step(s, lifecycle.CloseRead)
	}
	if s.nobodyReads.Load() && s.out.state.Phase == lifecycle.Live {
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

// unheard reports whether to ask a consumer, which may still send, to acknowledge CLOSE: its handler has returned. The RESET that
// says so must come after the acknowledgement, and AckTimeout would be long for a writer that waits for credit.
func (s *session) unheard() bool {
	return s.role == lifecycle.Handler && s.nobodyReads.Load() && !s.recv.readDone.Load() && // the table hears of both later
		s.out.state.Phase == lifecycle.Live && s.out.state.Send == lifecycle.Closing && s.out.life.pinged <= s.send.Load().unacked.closed
}

// end ends a stream on the outbox. It is called again for a stream whose peer could not be told while the connection was
// down.
func (o *outbox) end(s *session, e *ending) {
	switch s.out.state.Phase {
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
		pk := s.send.Load().packer
		e = &ending{kind: endComplete, err: io.EOF}
		if s.out.state.Recv == lifecycle.Unread && (s.role == lifecycle.Consumer || pk.half || s.bucket.ring.Pushed() > 0) {
			e.reset = pk.closing // nobody reads: the peer must not wait for that
		}
		s.requestEnd(e)
		e = s.end.Load()
	}
	s.unregister()
	s.out.request = nil
	s.tellRetry()
	s.endContexts(e)
	if snd := s.send.Load(); snd != nil {
		o.leaveLine(s, snd.unacked.onTheWay())
		snd.releaseAll()
	}
	switch {
	case s.role != lifecycle.Consumer:
		s.releaseWindow()
	case s.closeRead(e) || s.nobodyReads.Load(): // else the reader does so when it comes to the end
		s.release(e)
	}
}

// sendReset tells the peer of a stream how it ended, as soon as the connection is up.
func (o *outbox) sendReset(s *session) {
	e := s.end.Load()
	through := s.out.state.Send == lifecycle.Closing && s.recv.readDone.Load() && e == o.ep.gone.Load() // everything was said, and heard
	if e.reset.Code != 0 && s.out.peer != "" && !through {
		switch {
		case o.connected():
			if s.role == lifecycle.Consumer && s.recv.readDone.Load() {
				o.sendCredit(s, 0) // that its CLOSE arrived: what this end's leaving alone does not say
			}
			o.sendEnd(s, e.reset)
		case o.ep.gone.Load() == nil && s.out.state.Phase == lifecycle.Ending:
			o.hold(s, workEnd) // a peer that is not told would wait for ever
			return
		}
	}
	if s.out.state.Phase == lifecycle.Ending {
		if s.out.peer == "" && e.reset.Code != 0 && s.out.life.took != 0 && !s.peerTakesNone() {
			o.unanswered.add(o.ep.now(), o.ep.times.Ack)
		}
		o.step(s, lifecycle.Told)
	}
}

// json reports whether the peer speaks the fallback.
func (s *session) json() bool { return s.bucket.form.Load() == formJSON }

// peerTakesJSON reports whether the peer is a consumer of the fallback, which takes each record as a JSON message.
func (s *session) peerTakesJSON() bool { return s.role != lifecycle.Consumer && s.json() }

// peerTakesNone reports whether the peer is a producer of the fallback, which takes no records.
func (s *session) peerTakesNone() bool { return s.role == lifecycle.Consumer && s.json() }

// register gives the session a token and makes the mux deliver to it. offer is what the token tells the peer. It returns why
// that cannot be, if so.
func (ep *endpoint) register(s *session, offer Token) *ending {
	buf := make([]byte, 0, len(ep.prefix)+TokenSize)
	buf = append(buf, ep.prefix...)
	var id [8]byte
	rand.Read(id[:])
	offer.ID = binary.BigEndian.Uint64(id[:])
	s.reply = string(AppendToken(buf, offer))
	ep.sessions.Store(s.token(), s)
	// The goroutine that ends the endpoint, or finds its inbox refused, says so first and visits the sessions afterwards: either it
	// sees this one, or this sees the reason.
	e := ep.barred()
	if e != nil {
		s.unregister()
	}
	return e
}

func (s *session) token() string { return s.reply[len(s.ep.prefix):] }

func (s *session) unregister() {
	if s.reply != "" {
		s.ep.sessions.Delete(s.token())
	}
}

// newSender returns a random number for a send half. It tells two answers to one request apart. It comes from a cryptographic
// source: a RESET with the receiver's own number says that the peer has forgotten the stream, so a stranger must not guess it.
// Those of consumers are odd and those of producers even: an end does not mistake such a RESET for one of its peer because both
// have drawn the same number.
func newSender(odd bool) uint64 {
	var b [8]byte
	rand.Read(b[:])
	n := binary.BigEndian.Uint64(b[:]) & maxSender &^ 1
	if odd {
		n |= 1
	}
	return n
}

// controlToken returns the offer in the token of a producer's control subject: the window for the consumer's records. Their objects
// are in the codec that the request asked for.
func (s *session) controlToken() Token {
	return Token{Codec: MsgPack, LogPackets: uint8(bits.TrailingZeros(initialPackets)), LogBytes: uint8(bits.TrailingZeros64(s.bucket.grantedBytes.Load()))}
}
