package stream

import (
	"hash/maphash"

	"github.com/natsstream/stream/internal/lifecycle"
)

// This file remembers streams that are over at this end. The peer may still ask about such a stream, because the last packet to
// it was lost; docs/PROTOCOL.md section 9.4. TCP calls this state TIME-WAIT.

// maxEnded bounds the streams that an endpoint remembers after their end. Each takes 64 bytes.
const maxEnded = 1 << 14

const (
	minEnded = 1 << 6 // places that an endpoint makes at first
	endedWay = 4      // places in which a stream may be kept
)

// endedStream is the record that an endpoint keeps of a stream after its normal end.
type endedStream struct {
	token  [TokenSize]byte
	until  int64  // by the outbox's clock, which may stand still while no stream is open; 0 if the place is free
	credit Credit // acknowledges the peer's CLOSE, if code is 0
	code   uint16 // if not 0, the code of the RESET to repeat
	failed bool   // the peer's CLOSE had another code than 1000
	sender uint64 // of this end
	peer   uint64 // the peer's sender number
}

// endedStreams is a hash table of places. The hash of a stream's token selects endedWay places that the stream may take. If
// all of them are taken, the table doubles, up to maxEnded. In a table of that size, the stream replaces the one that expires
// first. The outbox owns the table.
type endedStreams struct {
	seed   maphash.Seed
	places []endedStream
}

// set returns the places in which the stream with a token of this hash may be kept.
func (t *endedStreams) set(hash uint64) []endedStream {
	i := int(hash&uint64(len(t.places)/endedWay-1)) * endedWay
	return t.places[i : i+endedWay]
}

// first returns the place in set that expires first.
func first(set []endedStream) *endedStream {
	p := &set[0]
	for i := range set {
		if set[i].until < p.until {
			p = &set[i]
		}
	}
	return p
}

// add remembers e until it expires.
func (t *endedStreams) add(e endedStream, now int64) {
	if t.places == nil {
		t.seed = maphash.MakeSeed()
		t.places = make([]endedStream, minEnded)
	}
	hash := maphash.Bytes(t.seed, e.token[:])
	p := first(t.set(hash))
	for p.until > now && len(t.places) < maxEnded {
		old := t.places
		t.places = make([]endedStream, 2*len(old))
		for i := range old {
			if e := &old[i]; e.until > now {
				*first(t.set(maphash.Bytes(t.seed, e.token[:]))) = *e
			}
		}
		p = first(t.set(hash))
	}
	*p = e
}

// find returns the record of the stream with token, nil if there is none.
func (t *endedStreams) find(token string, now int64) *endedStream {
	if t.places == nil {
		return nil
	}
	set := t.set(maphash.String(t.seed, token))
	for i := range set {
		if p := &set[i]; p.until > now && string(p.token[:]) == token {
			return p
		}
	}
	return nil
}

// remember keeps the last control frame of a stream that ended normally. If that frame was lost, the peer asks for it, for as
// long as its connection may be down and it waits for an acknowledgement.
func (o *outbox) remember(s *session) {
	end := s.end.Load()
	if end.kind != endComplete && end.kind != endPeerClosed || s.reply == "" || s.bucket.acceptWord == 0 {
		return // after a normal end the mux no longer changes what the bucket is bound to
	}
	now := o.time()
	e := endedStream{
		until: now + max(o.ep.times.Resume, o.ep.times.Disconnect), sender: s.senderNumber, peer: s.bucket.sender(),
		failed: end.kind == endPeerClosed,
	}
	copy(e.token[:], s.token())
	if s.closeRead(end) || s.role == lifecycle.Handler && s.recv.readDone.Load() {
		e.credit = s.bucket.credit()
	} else {
		e.code = uint16(s.send.Load().packer.closing.Code)
	}
	o.ended.add(e, now)
}

// repeatEnd answers a packet for a remembered stream, and reports whether the answer is complete. It is not if the peer closed
// with an error: a handler may go on reading after that, but no record comes any longer. It needs a RESET for an unknown stream
// as well.
func (o *outbox) repeatEnd(c control) bool {
	e := o.ended.find(c.token, o.time())
	if e == nil || e.peer != c.sender {
		return false
	}
	o.publishEnd(e, c.reply)
	return !e.failed
}

// publishEnd publishes the last packet of stream e again, to subject.
func (o *outbox) publishEnd(e *endedStream, subject string) {
	f := Frame{Type: FrameReset, Code: e.code}
	if e.code == 0 {
		var payload [creditSize]byte
		f = Frame{Type: FrameCredit, Payload: AppendCredit(payload[:0], e.credit)}
	}
	o.ep.publish(subject, "", AppendPacket(o.scratch[:0], PacketHeader{Sender: e.sender}, f))
}
