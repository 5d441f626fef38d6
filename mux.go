package stream

import (
	"bytes"
	"strings"
	"unsafe"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/slab"
)

// This file is the mux, the callback of the wildcard subscription. It runs in the subscription's goroutine, or in the
// goroutine that reads a fast connection. It touches atomics, its own counters, endpoint.enveloped, the fields of
// session.bucket that it owns, and the inbound ring of the outbox. It takes no lock, except in divert, and
// recordRoom.mu in dropLate if a record in pieces is dropped.

// receive is the mux: NATS calls it for one message after the other. It finds the session and passes the packet to it.
// For a packet in order it decodes no frame, takes no lock and allocates nothing. It never waits or publishes, because
// a message of one stream must not delay the others.
//
// The data may lie in a slab that lent counts. When receive returns, the data is in the bucket, or the slab was given
// back. The subject is valid until receive returns.
func (ep *endpoint) receive(m *nats.Msg, lent *slab.Slab) {
	s, ok := ep.find(m.Subject[len(ep.prefix):])
	if !ok {
		ep.receiveElsewhere(m, lent)
		return
	}
	ep.receiveFor(s, m, lent)
}

// receiveFor is receive for a message with the token of s.
func (ep *endpoint) receiveFor(s *session, m *nats.Msg, lent *slab.Slab) {
	end := s.end.Load()
	if lent != nil && (end != nil || !s.mayTake(m)) {
		m.Data = bytes.Clone(m.Data)
		lent.Release()
		lent = nil
	}
	if end != nil { // the outbox is about to remove the session from the map
		if ep.divert(s, m) {
			return
		}
		if m.Reply != "" && s.closeRead(end) {
			s.mark(workCredit) // repeats the acknowledgement of CLOSE, or the RESET
			return
		}
		ep.receiveUnknown(s, m)
		return
	}
	if m.Size() > len(m.Subject)+len(m.Reply)+len(m.Data) {
		m.Data = bytes.Clone(m.Data) // without the copy the message's header, which no budget counts, would stay in memory
	}
	data := m.Data
	if s.acceptNext(m, lent) { // most packets
		ep.counters.received(len(data))
		s.dropLate()
		return
	}
	if len(data) == 0 || data[0] != PacketMagic {
		ep.receiveJSON(s, m)
		return
	}
	if m.Reply != "" && s.role == lifecycle.Consumer && s.bucket.impostor(data, m.Reply) {
		ep.answerUnknown(nil, m)
		ep.refuse(s, m, violation, protocolError(CloseProtocolError, "two producers answer with one sender number; open the stream again"))
		lent.Release()
		return
	}
	if len(data) >= 2 && data[1]&byte(PacketSeq) == 0 {
		ep.receiveControl(s, m)
		return
	}
	if s.role == lifecycle.Writer {
		ep.receiveBack(s, m)
		return
	}
	asked := len(data) >= 2 && data[1]&byte(PacketAck|PacketMark) != 0 // an accepted packet belongs to the reader
	v, err := s.bucket.accept(data, lent, false)
	if v == noRoom {
		v, err = s.makeRoom(data, lent)
	}
	if v != accepted {
		ep.refuse(s, m, v, err)
		lent.Release()
		return
	}
	ep.counters.received(len(data))
	if m.Reply != "" {
		ep.outbox.deliver(control{session: s, reply: m.Reply})
	}
	if asked {
		s.mark(workCredit)
	}
	s.dropLate()
}

// acceptNext is the fast path of receive: the next packet of records, without a reply subject. If it returns false,
// receive goes on.
func (s *session) acceptNext(m *nats.Msg, lent *slab.Slab) bool {
	return m.Reply == "" && s.role != lifecycle.Writer && s.bucket.acceptNext(m.Data, lent)
}

// receiveElsewhere handles a message with the token of no stream: an envelope, or one for an unknown token.
func (ep *endpoint) receiveElsewhere(m *nats.Msg, lent *slab.Slab) {
	if m.Subject[len(ep.prefix):] == envelopeToken {
		ep.receiveEnvelope(m, lent)
		return
	}
	if lent != nil {
		m.Data = bytes.Clone(m.Data)
		lent.Release()
	}
	ep.receiveUnknown(nil, m)
}

// receiveEnvelope passes each packet of an envelope to its stream, as if it had come alone. It passes none of a broken
// envelope. A packet of a few bytes must not keep the whole envelope in memory, so each gets memory of its own, or
// shares that of a slab, which is bounded.
func (ep *endpoint) receiveEnvelope(m *nats.Msg, lent *slab.Slab) {
	body, packets, err := openEnvelope(m.Data)
	if err != nil {
		ep.counters.malformed.Add(1)
		lent.Release()
		return
	}
	ep.counters.envelopesReceived.add(1)
	shared := lent
	if slab.Crowded() {
		shared = nil
	}
	if shared != nil {
		shared.Share(packets)
	}
	inner := &ep.enveloped
	var found [lookAhead]*session
	for packets > 0 {
		n := min(packets, lookAhead)
		packets -= n
		ep.findAhead(body, found[:n])
		for _, s := range found[:n] {
			var token, packet []byte
			token, packet, body = nextEnveloped(body)
			if shared == nil {
				packet = bytes.Clone(packet)
			}
			copy(inner.token, token)
			inner.msg = nats.Msg{Subject: inner.subject, Data: packet}
			if s != nil {
				ep.receiveFor(s, &inner.msg, shared)
			} else {
				ep.receiveElsewhere(&inner.msg, shared)
			}
		}
	}
	lent.Release()
}

// lookAhead is how many streams of an envelope are looked up at once.
const lookAhead = 32

// findAhead looks up the streams of the next packets of an envelope. With thousands of slow streams, their sessions are
// in no cache. Here the processor fetches many of them at the same time. The locked instructions that accept a packet
// would prevent that. findAhead returns a sum of the values that it read, so that the compiler keeps the reads.
func (ep *endpoint) findAhead(body []byte, found []*session) (touched uint64) {
	for i := range found {
		var token []byte
		token, _, body = nextEnveloped(body)
		s, _ := ep.sessions.Load([TokenSize]byte(token))
		found[i] = s
	}
	for _, s := range found {
		if s != nil {
			touched += s.bucket.received + uint64(s.bucket.ring.Pushed())
			if s.end.Load() != nil {
				touched++
			}
		}
	}
	return touched
}

// enveloped is the message that stands for a packet in an envelope. The mux owns it.
type enveloped struct {
	msg     nats.Msg
	subject string // of the stream. Its last bytes are those of token
	token   []byte
}

func (m *enveloped) init(prefix string) {
	b := append([]byte(prefix), make([]byte, TokenSize)...)
	m.subject, m.token = unsafe.String(unsafe.SliceData(b), len(b)), b[len(prefix):]
}

// mayTake reports whether the bucket of s takes m if it is the next packet. All other data is copied out of lent
// memory: control packets wait for the outbox, and messages of the fallback are decoded in place.
func (s *session) mayTake(m *nats.Msg) bool {
	return s.role != lifecycle.Writer && len(m.Data) >= PacketHeaderSize && m.Data[0] == PacketMagic && m.Data[1]&byte(PacketSeq) != 0 && len(m.Header) == 0
}

// receiveUnknown handles a message for an unknown token, or for session s, which has ended. If the message has a reply
// subject, the sender gets a RESET: a consumer that left before the first packet came could not send one.
// docs/PROTOCOL.md section 9.3.
func (ep *endpoint) receiveUnknown(s *session, m *nats.Msg) {
	if m.Subject[len(ep.prefix):] == probeToken {
		ep.inbox.receive(m.Data)
		return
	}
	if nonce, ok := response(m); ok { // perhaps of a trial. The copy keeps no headers in memory
		ep.outbox.deliver(control{session: s, token: strings.Clone(m.Subject[len(ep.prefix):]), packet: bytes.Clone(nonce)})
		return
	}
	ep.counters.unknown.Add(1)
	if len(m.Data) == 0 && m.Header.Get("Status") == "503" { // nobody received the request of a stream that has ended
		ep.outbox.deliver(control{session: s, token: strings.Clone(m.Subject[len(ep.prefix):]), absent: true})
		return
	}
	ep.answerUnknown(s, m)
}

// response returns the bytes of the RESPONSE that is alone in a control packet without a reply subject.
func response(m *nats.Msg) (nonce []byte, ok bool) {
	if m.Reply != "" {
		return nil, false
	}
	h, body, err := ParsePacketHeader(m.Data)
	if err != nil || h.Flags != 0 {
		return nil, false
	}
	f, rest, err := ParseFrame(body)
	return f.Payload, err == nil && f.Type == FrameResponse && len(f.Payload) == nonceSize && len(rest) == 0
}

// answerUnknown makes the outbox reset the sender of a packet that no stream accepts, if the packet has a reply
// subject. s is the session that has ended and had the packet's token, nil if there is none.
func (ep *endpoint) answerUnknown(s *session, m *nats.Msg) {
	if m.Reply == "" {
		return
	}
	if h, _, err := ParsePacketHeader(m.Data); err == nil {
		ep.outbox.deliver(control{session: s, reply: m.Reply, token: strings.Clone(m.Subject[len(ep.prefix):]), sender: h.Sender})
	}
}

// receiveBack handles a sequenced packet for a producer that takes no records. A packet with only CLOSE is accepted.
// Records end the stream, because nobody would read them.
func (ep *endpoint) receiveBack(s *session, m *nats.Msg) {
	if _, body, err := ParsePacketHeader(m.Data); err == nil && onlyClose(body) {
		v, err := s.bucket.accept(m.Data, nil, false)
		if v == noRoom {
			v, err = s.makeRoom(m.Data, nil)
		}
		if v != accepted {
			ep.refuse(s, m, v, err)
		} else {
			s.mark(workCredit)
		}
		return
	}
	v, err := s.bucket.acceptControl(m.Data, s.senderNumber)
	if v == accepted || v == gap {
		v, err = violation, protocolError(CloseProtocolError, "this producer takes no records")
	}
	ep.refuse(s, m, v, err)
}

// receiveControl checks the header of a control packet, and passes the packet to the outbox, which acts on its frames.
func (ep *endpoint) receiveControl(s *session, m *nats.Msg) {
	v, err := s.bucket.acceptControl(m.Data, s.senderNumber)
	if v == gap {
		ep.askForGap(s)
	} else if v != accepted {
		ep.refuse(s, m, v, err)
		return
	}
	if f, ok := fragment(m.Data); ok {
		ep.receiveFragment(s, m, f)
		return
	}
	ep.outbox.deliver(control{session: s, reply: m.Reply, packet: m.Data})
}

func (ep *endpoint) receiveJSON(s *session, m *nats.Msg) {
	if len(m.Data) == 0 {
		// NATS reports that nobody listens, docs/PROTOCOL.md section 9.3. For a request, the stream has no producer.
		// Later, the peer may be gone.
		switch {
		case m.Header.Get("Status") != "503":
			ep.refuse(s, m, violation, protocolError(CloseUnsupportedData, "empty message"))
		case s.nobodyAnswered():
			if !s.endFromMux(&ending{kind: endFault, err: nats.ErrNoResponders}) {
				ep.receiveUnknown(s, m) // it ended just now
			}
		default:
			ep.outbox.deliver(control{session: s, absent: true})
		}
		return
	}
	if s.role != lifecycle.Consumer { // a consumer that gets packets answers in packets: this message is foreign
		ep.refuse(s, m, foreign, nil)
		return
	}
	first := s.bucket.form.Load() == formUnknown
	if jsonwire.IsPubAck(m.Data) {
		ep.counters.pubAcks.Add(1)
		return
	}
	v, err := s.bucket.acceptJSON(m.Data, ep.fallback)
	if v != accepted {
		ep.refuse(s, m, v, err)
		return
	}
	ep.counters.received(len(m.Data))
	if first {
		s.mark(workBind | workSettle) // the reader may have read the end before this
	}
	s.dropLate()
}

// refuse counts a packet that was not accepted, asks for missing packets, and ends the stream if it cannot go on.
func (ep *endpoint) refuse(s *session, m *nats.Msg, v verdict, err *CloseError) {
	switch v {
	case duplicate:
		ep.counters.duplicate.Add(1)
		if m.Data[1]&byte(PacketAck|PacketMark) != 0 {
			s.mark(workCredit) // the answer to the first one was lost
		}
	case gap:
		ep.counters.early.Add(1)
		ep.askForGap(s)
	case foreign:
		if !ep.divert(s, m) {
			ep.counters.foreign.Add(1)
			ep.answerUnknown(nil, m)
		}
	case noRoom:
		ep.counters.noRoom.Add(1)
		if !s.bucket.dropped.Swap(true) {
			s.mark(workCredit | workRefusal) // the peer is to stop, and not to count the refused packet as on its way
			s.bucket.park.Wake()             // the reader may be about to wait for this packet
		}
	case malformed:
		ep.counters.malformed.Add(1)
	case violation:
		s.endFromMux(&ending{kind: endFault, err: err, reset: *err})
	}
}

// askForGap makes the outbox ask for missing packets, unless they were asked for a moment ago.
func (ep *endpoint) askForGap(s *session) {
	if s.bucket.shouldAskForGap(ep.clock.Load(), ep.times.Ack) {
		s.mark(workGap)
	}
}

// endFromMux is requestEnd for the mux. The mux takes no lock, so the outbox ends the contexts.
func (s *session) endFromMux(e *ending) bool {
	if !s.end.CompareAndSwap(nil, e) {
		return false
	}
	s.bucket.park.Wake()
	s.mark(workEnd)
	return true
}
