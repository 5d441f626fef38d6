package stream

import (
	"context"
	"io"
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/natsstream/stream/internal/lifecycle"
)

// session is one stream at one end. The mux finds it by the stream's token. It has a receive half and a send half,
// which are the same at both ends. Fields that are set once and atomics belong to any goroutine. out belongs to the
// outbox, recv and parts of bucket to the reader, and other parts of bucket to the mux. Before the session is
// registered or marked, the goroutine that makes it owns all of it. Any goroutine may run the functions of this file,
// but the mux must not run requestEnd and endContexts.
type session struct {
	// The fields that the mux reads come first, on two cache lines: with thousands of streams they are not in the
	// caches.
	end          atomic.Pointer[ending] // set once: the first end counts
	role         lifecycle.Role
	rawCodec     FrameFlags // the reader decodes objects by it that were written as bytes. Set once, and here because there is room
	gathers      bool       // extras has a gathering. Set once, and here for the same reason
	controls     uint32     // control packets ever passed to the outbox; the mux's
	senderNumber uint64     // this end's, in the header of each packet
	bucket       bucket     // the receive half as the mux sees it

	// Set once. These lie apart from the fields that change with each packet.
	ep    *endpoint
	token [TokenSize]byte        // this end's, the last element of its subject. Zero until the session is registered
	send  atomic.Pointer[sender] // the send half; a consumer's is made when it first writes
	watch atomic.Pointer[watch]  // of the context given to Open, nil without
	ctx   lazyContext            // of the Stream, or of the Request of a handler

	recv receiver // the receive half as its user sees it

	// The outbox's queue. pending holds the marked work; a session is queued exactly while it is not zero.
	pending  atomic.Uint32
	patience atomic.Uint32 // the stream's own peer timeout in milliseconds; 0 if it has none
	acted    atomic.Uint32 // control packets ever acted on; the outbox stores it
	next     *session

	out    outboxState
	extras atomic.Pointer[extras] // nil until it is needed: see extra

	remote  atomic.Pointer[remote] // the other end. The outbox stores it; the reader loads it to tell which records share a peer
	lastPop atomic.Int64           // reading of endpoint.clock when the reader took the last packet: a sign of life of the peer
}

// outboxState is the part of a session that only the outbox uses, after the session was marked.
type outboxState struct {
	subject           string   // of the request
	peer              string   // the address of the peer; empty at a consumer before its producer's first packet
	request           *opening // opens the stream; nil once it is published
	deferredUntilUp   uint32   // work that waits for the connection; not zero while in outbox.waitingUntilUp
	deferredUntilPeer uint32   // work for the peer that was due before its subject was known
	state             lifecycle.State
	requested         requestState
	places            places // in which of the outbox's lists it is
	line              *line  // the line to the peer
	life              life
}

func (s *session) init(ep *endpoint, role lifecycle.Role, packets uint32, bytes uint64) {
	s.ep, s.role, s.senderNumber = ep, role, newSender(role == lifecycle.Consumer)
	s.recv.maxRecord = uint64(ep.maxRecord)
	s.bucket.init(packets, bytes)
}

// newStream makes the consumer's end of a stream with the given first window. It has no token yet.
func (ep *endpoint) newStream(ctx context.Context, subject string, o *openOptions, window uint64) *Stream {
	st := new(Stream)
	s := &st.session
	s.init(ep, lifecycle.Consumer, initialPackets, window)
	s.recv.parent, s.rawCodec, s.out.subject = ctx, codecFlag(o.codec), subject
	if o.answered != nil || o.window != 0 {
		s.prepare(o, ep.largestWindow(o))
	}
	return st
}

// largestWindow returns the most bytes of the window of a stream with options o.
func (ep *endpoint) largestWindow(o *openOptions) uint64 {
	if o.window != 0 {
		return floorPow2(uint64(o.window))
	}
	return ep.window
}

// prepare stores the options of a stream that matter after it was opened. most is the largest window. The session is
// not registered yet.
func (s *session) prepare(o *openOptions, most uint64) {
	x := s.extra()
	x.answered, x.window = o.answered, most
}

// limitOpening ends s at the given time unless the request was answered. The session is registered, so it may have
// ended.
func (s *session) limitOpening(until time.Time) {
	x := s.extra()
	timer := time.AfterFunc(time.Until(until), func() {
		if x.answer.CompareAndSwap(notAnswered, answerLate) {
			s.endLocally(&ending{kind: endLocal, err: ErrOpenTimeout, reset: CloseError{Code: CloseCanceled}})
		}
	})
	// answered stores answer before it loads opening. So either it finds the timer, or the answer is found here.
	if x.opening.Store(timer); x.answer.Load() != notAnswered {
		timer.Stop()
	}
}

// readDone reports whether this direction is over and the stream is not: the reader read a normal CLOSE and the other
// direction goes on, or this end takes no records. It does not report a CLOSE that ends the whole stream.
func (s *session) readDone() bool { return s.recv.readLock.Load()&gateDone != 0 }

// nobodyReads reports whether the handler returned, or the consumer detached. Records that still arrive are not read
// then.
func (s *session) nobodyReads() bool { return s.recv.readLock.Load()&gateUnread != 0 }

// isProved reports whether the credit that the peer of s grants may be used. A producer needs no proof from its
// consumer: credit must come to the producer's control subject, which only the owner of the consumer's address learns.
func (s *session) isProved() bool {
	x := s.extras.Load()
	return s.role != lifecycle.Consumer || x != nil && x.whereabouts.proved
}

// endKind is the meaning of an end for arrived records, for a running handler, and for the peer.
type endKind uint8

const (
	endComplete   endKind = iota // both directions are complete. A running handler goes on
	endPeerClosed                // the reader has read the peer's CLOSE with another code than 1000
	endReset                     // the peer's RESET arrived
	endPeerDone                  // as endReset, but the peer's CLOSE may wait to be read: writes fail with ErrClosed
	endFault                     // this end found that the stream cannot go on
	endLocal                     // this end ends the stream: records that arrived are not delivered
)

// ending is the end of a stream. It does not change after session.end points to it.
type ending struct {
	kind  endKind
	err   error
	reset CloseError // code and text of the RESET for the peer; code 0 if none is sent
}

// wholeEnd is the end of a stream that is complete in both directions. The peer needs no RESET. wholeEnd is never
// changed.
var wholeEnd = ending{kind: endComplete, err: io.EOF}

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

// requestEnd ends the stream with e, unless it has ended before: the first end counts. It reports whether e is the end.
// Waiting calls return, and the outbox does the rest. When requestEnd returns, in either case, the contexts have ended,
// and no later write succeeds. Any goroutine may call it without the writer's lock, except the mux, which calls
// endFromMux.
func (s *session) requestEnd(e *ending) bool {
	defer func() {
		if snd := s.send.Load(); snd != nil {
			snd.packer.shut()
		}
	}()
	if !s.end.CompareAndSwap(nil, e) {
		s.endContexts(s.end.Load()) // the goroutine that set the end may not have done so yet
		return false
	}
	s.bucket.park.Wake()
	s.dropUnwanted()
	s.endContexts(e)
	if s.role == lifecycle.Consumer && e.kind == endLocal {
		s.release(e)
	}
	if e.kind == endComplete || e.kind == endPeerClosed {
		s.markLater(workEndLater) // the peer has ended its direction, and does not wait for an answer
	} else {
		s.mark(workEnd)
	}
	return true
}

// closeRead reports whether the peer's CLOSE was read before the stream ended with e.
func (s *session) closeRead(e *ending) bool {
	return e.kind == endPeerClosed || s.role == lifecycle.Consumer && (e.kind == endComplete || s.readDone())
}

// endContexts ends the contexts of writers and handlers, and the gathering of a request. A second call does nothing.
func (s *session) endContexts(e *ending) {
	if snd := s.send.Load(); snd != nil {
		snd.packer.cancel(e.cause())
	}
	if s.role == lifecycle.Handler && e.kind != endComplete {
		s.ctx.end(e.cause())
	}
	if g := s.gathering(); g != nil && g.request == s {
		g.requestEnded(e)
	}
}

// cause returns the cause of the contexts of writers and handlers after the end.
func (e *ending) cause() error {
	if e.err == io.EOF {
		return ErrClosed
	}
	return e.err
}

// writeError returns the error of writes after the end.
func (e *ending) writeError() error {
	if e.err == io.EOF || e.kind == endPeerDone || isNormal(e.err) {
		return ErrClosed
	}
	return e.err
}

// json reports whether the peer speaks the fallback.
func (s *session) json() bool { return s.bucket.form.Load() == formJSON }

// peerTakesJSON reports whether the peer is a consumer of the fallback, which takes each record as a JSON message.
func (s *session) peerTakesJSON() bool { return s.role != lifecycle.Consumer && s.json() }

// peerTakesNone reports whether the peer is a producer of the fallback, which takes no records.
func (s *session) peerTakesNone() bool { return s.role == lifecycle.Consumer && s.json() }

// register gives the session a token with the given offer, and makes the mux deliver to it. It returns the reason if no
// stream may begin, and nil otherwise.
func (ep *endpoint) register(s *session, offer Token) *ending {
	s.token = newToken(offer)
	ep.sessions.Store(s.token, s)
	// The goroutine that ends the endpoint, or finds its inbox refused, stores the reason before it visits the
	// sessions. So either it sees this session, or barred returns the reason.
	e := ep.barred()
	if e != nil {
		s.unregister()
	}
	return e
}

// registered reports whether the session has a token.
func (s *session) registered() bool { return s.token[0] != 0 }

// reply returns this end's subject, empty until the session is registered. It makes the string each time: few messages
// of a stream carry it, and an idle stream keeps nothing of it.
func (s *session) reply() string {
	if !s.registered() {
		return ""
	}
	return s.ep.prefix + string(s.token[:])
}

func (s *session) unregister() {
	switch g := s.gathering(); {
	case !s.registered():
	case g != nil:
		g.leave(s)
	default:
		s.ep.sessions.Delete(s.token)
	}
}

// controlToken returns the offer in the token of a producer's control subject: the window for the consumer's records.
// Their objects are in the codec that the request asked for.
func (s *session) controlToken() Token {
	return Token{Codec: MsgPack, LogPackets: uint8(bits.TrailingZeros(initialPackets)), LogBytes: uint8(bits.TrailingZeros64(s.bucket.grantedBytes.Load()))}
}
