package stream

import (
	"sync/atomic"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/flow"
)

// This file receives packets in fragments; docs/PROTOCOL.md section 7.1. The mux runs it: it assembles a packet, and
// then accepts it like one that arrived whole. Few streams ever need that.

// fragments is the packet of a stream that is being assembled, the one that the stream expects next. The mux owns it.
type fragments struct {
	packet uint32
	whole  []byte // the bytes that arrived; the capacity is the length of the packet
	held   uint64 // bytes of the budget that the packet takes

	// Number of the packet, and how many bytes of it have arrived; 0 if none have. Stored by the mux and read by the
	// outbox.
	progress atomic.Uint64
}

// maxFragmented bounds a packet in fragments. It is the largest packet that senders make.
const maxFragmented = flow.MaxPacket

// fragment returns the frame of a control packet that is a FRAGMENT with bytes, and alone.
func fragment(packet []byte) (f Frame, ok bool) {
	body := packet[PacketHeaderSize:]
	if len(body) == 0 || FrameType(body[0]) != FrameFragment {
		return Frame{}, false
	}
	f, rest, err := ParseFrame(body)
	return f, err == nil && len(rest) == 0 && len(f.Payload) > fragmentSize
}

// receiveFragment appends the bytes of a fragment to its packet. Fragments must arrive in order. The mux drops all
// fragments behind a missing one, and the peer retransmits them.
func (ep *endpoint) receiveFragment(s *session, m *nats.Msg, f Frame) {
	at, _ := ParseFragment(f.Payload[:fragmentSize])
	part := f.Payload[fragmentSize:]
	b := &s.bucket
	switch d := int32(at.Packet - b.expect); {
	case d < 0:
		ep.counters.duplicate.Add(1)
		s.mark(workCredit) // the answer to the first one was lost
		return
	case d > 0:
		ep.counters.early.Add(1)
		ep.askForGap(s)
		return
	}
	p := b.ring.Between.fragments.Load()
	if p == nil {
		p = new(fragments)
		b.ring.Between.fragments.Store(p)
	}
	began := p.whole != nil && p.packet == at.Packet
	if at.Length <= PacketHeaderSize || at.Length > maxFragmented || began && int(at.Length) != cap(p.whole) {
		ep.refuse(s, m, violation, protocolError(CloseProtocolError, "packet of %d bytes in fragments; %d are allowed, and no change", at.Length, maxFragmented))
		return
	}
	if !began {
		p.drop(s)
		if at.Offset != 0 {
			return
		}
		if !p.begin(s, at) {
			ep.refuse(s, m, noRoom, nil)
			return
		}
	}
	if int(at.Offset) != len(p.whole) || len(part) > cap(p.whole)-len(p.whole) {
		return
	}
	p.whole = append(p.whole, part...)
	p.progress.Store(uint64(p.packet)<<32 | uint64(len(p.whole)))
	if len(p.whole) == cap(p.whole) {
		whole := p.whole
		p.drop(s)
		ep.receiveReassembled(s, m, whole)
	}
}

// receiveReassembled accepts an assembled packet.
func (ep *endpoint) receiveReassembled(s *session, m *nats.Msg, whole []byte) {
	h, _, err := ParsePacketHeader(whole)
	if err != nil || h.Flags&PacketSeq == 0 || h.Seq != s.bucket.expect {
		ep.refuse(s, m, violation, protocolError(CloseUnsupportedData, "what came in fragments is not packet %d", s.bucket.expect))
		return
	}
	ep.receive(&nats.Msg{Subject: m.Subject, Data: whole}, nil)
	s.mark(workCredit) // the sender waits for that
}

// begin takes memory for the packet whose first fragment is at. It reports false if there is no memory.
func (p *fragments) begin(s *session, at Fragment) bool {
	switch b := &s.bucket; {
	case s.take(int64(at.Length)):
		p.held = uint64(at.Length)
	case b.received >= b.open.Load(): // as for a packet that arrives whole
		return false
	}
	p.packet, p.whole = at.Packet, make([]byte, 0, at.Length)
	return true
}

// drop discards the fragments that arrived.
func (p *fragments) drop(s *session) {
	s.giveBack(p.held)
	p.whole, p.held = nil, 0
	p.progress.Store(0)
}
