package stream

import (
	"fmt"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/flow"
)

// This file sends packets that are too large for a NATS server or a device between the two ends; docs/PROTOCOL.md
// section 7.1. They go in fragments, control packets that carry their bytes. The outbox runs it, and flow.Passing
// decides.

// form returns the form in which to publish the new packet p: the size of the messages that carry p in fragments, or 0
// for a whole packet. It returns false if it has cut p instead, because packets of that size do not pass.
func (snd *sender) form(p *packet) (fragment int, ok bool) {
	s := snd.session
	if s.peerTakesJSON() {
		return 0, true
	}
	sizes, now := &s.out.line.sizes, s.ep.clock.Load()
	switch {
	case !sizes.Fails(len(p.buf), now):
		return 0, true
	case snd.recut(p, sizes.Most(len(p.buf), now)):
		return 0, false
	}
	return sizes.Fragment(), true
}

// formAgain is form for p, the next packet that the peer misses. asks reports whether a question has to follow p, to
// learn how much of p arrived.
func (snd *sender) formAgain(p *packet) (fragment int, asks bool) {
	s, q := snd.session, &snd.unacked
	ep, sizes, now := s.ep, &s.out.line.sizes, s.ep.clock.Load()
	if q.Cursor() != q.Acked() { // the peer dropped p because it misses an earlier packet, so p may pass
		if sizes.Fails(len(p.buf), now) || len(p.buf) > int(ep.maxPayload.Load()) {
			fragment = sizes.Fragment()
		}
		return fragment, false
	}
	fresh := p.connection != ep.outbox.connection.Load()
	fragment = q.passingOf().Again(q.Acked(), len(p.buf), int(ep.maxPayload.Load()), fresh, sizes, now)
	return fragment, q.passing.Asks()
}

// holds reports whether the new packet p waits: it is larger than all that passed, and another such packet may not
// pass. Packets in fragments do not wait.
func (snd *sender) holds(p *packet, fragment int) bool {
	s := snd.session
	return fragment == 0 && !s.peerTakesJSON() && s.out.line.sizes.Doubts(len(p.buf)) &&
		snd.unacked.passing.Holds(s.ep.clock.Load(), s.ep.times.Ack/2)
}

// holdsAgain is holds for a packet that the peer dropped because of the one that it misses.
func (snd *sender) holdsAgain(p *packet) bool {
	s, q := snd.session, &snd.unacked
	if q.Cursor() == q.Acked() || !q.passing.InFragments() {
		return false
	}
	sizes := &s.out.line.sizes
	return sizes.Doubts(len(p.buf)) && !sizes.Fails(len(p.buf), s.ep.clock.Load())
}

// tries reports whether to ask for the acknowledgement of p, number seq, at once: p is new and larger than all that
// passed.
func (snd *sender) tries(p *packet, seq uint32) bool {
	q, l := &snd.unacked, snd.session.out.line
	if seq != q.Next() || !l.sizes.Doubts(len(p.buf)) {
		return false
	}
	return q.passingOf().Try(seq, snd.session.ep.clock.Load()) && l.CanMark()
}

// passingOf returns the state of packets that may not pass.
func (q *unackedPackets) passingOf() *flow.Passing {
	if q.passing == nil {
		q.passing = new(flow.Passing)
	}
	return q.passing
}

// pardon records that the losses so far show nothing about sizes: the peer has moved, or it has dropped packets that
// had arrived.
func (q *unackedPackets) pardon() {
	for p := range q.All() {
		p.connection--
	}
}

// publishAs publishes p, number seq, in fragments if fragment is not 0. With alone, p does not go into an envelope.
func (snd *sender) publishAs(p *packet, seq uint32, fragment int, alone bool) error {
	if p.fragments = fragment != 0; !p.fragments {
		return snd.publish(p, seq, alone)
	}
	p.enveloped = 0
	s, whole := snd.session, p.buf
	whole[1] &^= byte(PacketMark) // its acknowledgement comes later than that of one message
	const head = PacketHeaderSize + FrameHeaderSize + fragmentSize
	message := make([]byte, fragment)
	for at := snd.unacked.passing.Arrived(seq); at < len(whole); {
		n := min(fragment-head, len(whole)-at)
		b := message[:head+n]
		putPacketHeader(b, 0, s.senderNumber, seq, len(b))
		putFrameHeader(b[PacketHeaderSize:], FrameFragment, 0, 0, fragmentSize+n)
		AppendFragment(b[:PacketHeaderSize+FrameHeaderSize], Fragment{Packet: seq, Offset: uint32(at), Length: uint32(len(whole))})
		copy(b[head:], whole[at:at+n])
		if _, err := s.ep.outbox.send(s, nil, "", b, true); err != nil {
			return err
		}
		at += n
	}
	return nil
}

// doesNotPass returns the end of a stream with a packet of size bytes that does not pass in any form.
func doesNotPass(size int) *ending {
	e := CloseError{CloseInternalServerErr, fmt.Sprintf("a packet of %d bytes does not pass", size)}
	if size > flow.SmallFragment {
		e.Text += fmt.Sprintf(", nor its parts in %d", flow.SmallFragment)
	}
	return &ending{
		kind:  endFault,
		err:   fmt.Errorf("%w: let the NATS servers and devices between the two ends take larger messages: %w", &e, nats.ErrMaxPayload),
		reset: e,
	}
}
