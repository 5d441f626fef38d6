package stream

import (
	"hash/maphash"

	"github.com/natsstream/stream/internal/lifecycle"
)

// This file remembers streams that are over at this end. The peer may still ask about such a stream, because the last
// packet to it was lost; docs/PROTOCOL.md section 9.4. TCP calls this state TIME-WAIT. The outbox runs all of it.

// maxEnded bounds the streams that an endpoint remembers after their end. Each takes 68 bytes.
const maxEnded = 1 << 14

// minEnded is how many streams an endpoint has room for at first.
const minEnded = 1 << 6

// endedStream is the record that an endpoint keeps of a stream after its normal end.
type endedStream struct {
	token  [TokenSize]byte
	until  int64  // by the outbox's clock, which may stand still while no stream is open; 0 if the place is free
	credit Credit // acknowledges the peer's CLOSE, if code is 0
	code   uint16 // if not 0, the code of the RESET to repeat
	failed bool   // the peer's CLOSE had another code than 1000
	before uint32 // number of an earlier stream whose token has the same hash, 0 if there was none
	sender uint64 // of this end
	peer   uint64 // the peer's sender number
}

// endedStreams remembers streams in a circle, in the order in which they ended, which is the order in which they
// expire. So an end writes to memory that lies beside that of the end before. The hash of a stream's token selects the
// newest of a chain of streams. A chain ends with a stream that the circle no longer holds. A circle that is full of
// streams that have not expired doubles, up to maxEnded. In a circle of that size, a new stream replaces the oldest.
// The outbox owns all of it.
type endedStreams struct {
	seed   maphash.Seed
	circle []endedStream // stream number n is circle[n & (len-1)]
	newest []uint32      // by the hash of the token, as many as the circle has places
	next   uint32        // number of the next stream, modulo 2^32, but never 0
}

// add remembers e until it expires.
func (t *endedStreams) add(e endedStream, now int64) {
	if t.circle == nil {
		t.seed = maphash.MakeSeed()
		t.resize(minEnded)
	}
	if size := len(t.circle); size < maxEnded && t.circle[t.next&uint32(size-1)].until > now {
		old, from := t.circle, t.next
		t.resize(2 * size)
		for i := range uint32(size) {
			if e := &old[(from+i)&uint32(size-1)]; e.until > now {
				t.push(e)
			}
		}
	}
	t.push(&e)
}

func (t *endedStreams) resize(size int) {
	t.circle, t.newest, t.next = make([]endedStream, size), make([]uint32, size), 1
}

// push puts e in the place of the oldest stream.
func (t *endedStreams) push(e *endedStream) {
	newest := &t.newest[maphash.Bytes(t.seed, e.token[:])&uint64(len(t.newest)-1)]
	p := &t.circle[t.next&uint32(len(t.circle)-1)]
	*p = *e
	p.before, *newest = *newest, t.next
	if t.next++; t.next == 0 {
		t.next = 1
	}
}

// find returns the record of the stream with token, nil if there is none.
func (t *endedStreams) find(token string, now int64) *endedStream {
	if t.circle == nil {
		return nil
	}
	n := t.newest[maphash.String(t.seed, token)&uint64(len(t.newest)-1)]
	for n != 0 && t.next-n <= uint32(len(t.circle)) {
		p := &t.circle[n&uint32(len(t.circle)-1)]
		if p.until > now && string(p.token[:]) == token {
			return p
		}
		n = p.before
	}
	return nil
}

// remember keeps the last control frame of a stream that ended normally. If that frame was lost, the peer asks for it.
// It may ask as long as its connection may be down, and as long as it waits for an acknowledgement.
func (o *outbox) remember(s *session) {
	end := s.end.Load()
	if end.kind != endComplete && end.kind != endPeerClosed || !s.registered() || s.bucket.acceptWord == 0 {
		return // after a normal end the mux no longer changes what the bucket is bound to
	}
	now := o.time()
	e := endedStream{
		token: s.token, until: now + max(o.ep.times.Resume, o.ep.times.Disconnect),
		sender: s.senderNumber, peer: s.bucket.sender(), failed: end.kind == endPeerClosed,
	}
	if s.closeRead(end) || s.role == lifecycle.Handler && s.readDone() {
		e.credit = s.bucket.credit()
	} else {
		e.code = uint16(s.send.Load().packer.closing.Code)
	}
	o.ended.add(e, now)
}

// repeatEnd answers a packet for a remembered stream, and reports whether the answer is complete. It is incomplete if
// the peer closed with an error: a handler may read on after that, but no record comes any more. Such a peer needs a
// RESET for an unknown stream as well.
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
