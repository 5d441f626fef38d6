package stream

import (
	"errors"
	"fmt"
	"net"
	"sync/atomic"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/flow"
	"github.com/natsstream/stream/internal/lifecycle"
)

// sender is the outbox's half of a send half. It publishes sealed packets, keeps them until they are acknowledged, and
// returns them to the pool. The outbox runs all of it, or a visitor (see visit.go). Other goroutines read only the
// atomic fields, and the fields that are set once.
type sender struct {
	unacked   unackedPackets
	published atomic.Uint32 // unacked.Next, for Flush

	// Set once.
	session *session
	packer  *packer // the writers' half
	writer  *Writer // the user's view of both

	// invited has the envelopes in which the writers may place packets, nil if they may not. The end of the stream does
	// not change it. The outbox's.
	invited *enveloping
}

// unackedPackets are the packets that were published and not acknowledged yet. The outbox owns it.
type unackedPackets struct {
	flow.Unacked[*packet]
	loss    flow.Loss
	passing *flow.Passing // nil until a packet may not pass
	failed  *packet       // could not be published; goes before any other packet
	queue   *packet       // the packets to publish after failed, linked by packet.next: taken from packer.ready, or cut
	bytes   uint64        // of all packets that were published
	waits   bool          // failed waits for credit, or for a packet that may not pass
	whole   int32         // bytes of the largest packet that was just acknowledged and had been published as a whole
	inside  int32         // the largest packet.enveloped of those that were just acknowledged

	refused bool // the peer has no room: the outbox publishes nothing before a CREDIT that reports room

	closeAt int64 // when a CLOSE that is held back for a handler's result is published, by the endpoint's time; 0 if none is

	// By the outbox's clock, 0 before CLOSE was published.
	closeSent int64 // when CLOSE was published
	closed    int64 // when CLOSE was published, or a packet was last acknowledged after that
}

// progress is the result of an attempt to publish a packet. The outbox acts on it.
type progress uint8

const (
	noPacket        progress = iota // there is nothing to publish. The next record marks the session
	heldBack                        // nothing can be published now. The event that changes this marks the session
	heldByLoss                      // as heldBack, because packets were lost and the peer has acknowledged nothing since: ask it
	placedFirst                     // the outbox has to take placed packets first
	tryAgain                        // there may be another packet to publish
	askAndTryAgain                  // as tryAgain, and a question about the packet published just now has to follow it
	packetPublished                 // a new packet was published, and there may be another
	closePublished                  // the packet with CLOSE was published, the last one
)

// publishNext publishes the next packet, if there is one that may be published now.
func (snd *sender) publishNext() progress {
	s, pk, q := snd.session, snd.packer, &snd.unacked
	json := s.peerTakesJSON()
	if q.refused {
		return heldBack
	}
	if q.loss.Full(q.OnTheWay()) {
		if q.loss.Ask() { // the answer lets the next ones go
			return heldByLoss
		}
		return heldBack
	}
	if p, ok := q.Missing(); ok {
		if snd.holdsAgain(p) {
			return heldBack
		}
		return snd.publishAgain(p)
	}
	retry := q.failed != nil
	q.waits = false
	p := snd.nextReady()
	if p == nil {
		if p = snd.sealOpen(); p == nil {
			return noPacket
		}
	}
	if !json && packetSeq(p.buf) != q.Next() && s.ep.outbox.placed.Load() != nil { // those before it are among the placed packets
		if retry {
			q.failed = p
		} else {
			p.next, q.queue = q.queue, p
		}
		return placedFirst
	}
	last := p.last
	fragment, ok := snd.form(p)
	if !ok {
		return tryAgain
	}
	// Cutting made more packets than the writers had credit for.
	if pk.shifted != 0 && !snd.creditFor(p) || snd.holds(p, fragment) {
		q.failed, q.waits = p, true
		return heldBack
	}
	err := snd.publishAs(p, q.Next(), fragment, retry)
	if err != nil && !json && isLoss(err) {
		err = nil // the peer misses the packet and asks for it
	}
	if err != nil {
		return snd.publishFailed(p, err)
	}
	snd.sent(p, retry)
	if s.role == lifecycle.Consumer && q.Next() == 1 && s.bucket.ring.Pushed() > 0 {
		s.mark(workProbe) // the end of the stream may have arrived already: then the producer reads no records
	}
	if last {
		pk.cancel(ErrClosed)
		return closePublished
	}
	return packetPublished
}

// sent records that the new packet p was published, or put in an envelope. retry is that of notePublished.
func (snd *sender) sent(p *packet, retry bool) {
	s, q := snd.session, &snd.unacked
	s.ep.counters.sent(len(p.buf))
	if s.ep.observer != nil && p.through.records != 0 {
		s.observeFirst()
	}
	s.out.life.sent, s.out.life.asks = s.ep.clock.Load(), 0
	if s.peerTakesJSON() {
		snd.sentJSON(p)
	} else {
		fresh := q.Cursor() == q.Next()
		q.Push(p)
		q.bytes += uint64(len(p.buf))
		if fresh {
			snd.onLine(q.Next()-1, p)
		}
	}
	if p.enveloped == 0 { // otherwise it is published with its envelope
		snd.notePublished(retry)
	}
}

// notePublished wakes the writers that wait for the packet that was published last. retry reports whether an earlier
// attempt failed.
func (snd *sender) notePublished(retry bool) {
	pk := snd.packer
	// Flush sets waiting before it loads published. So either it sees the new number, or the load below sees that it
	// waits.
	snd.published.Store(snd.unacked.Next())
	if retry || pk.waiting.Load() {
		pk.mu.Lock()
		if retry {
			pk.publishError = nil // the packet was published now
		}
		pk.wakeLocked()
		pk.mu.Unlock()
	}
}

// publishFailed handles the failed publish of a new packet.
func (snd *sender) publishFailed(p *packet, err error) progress {
	s, pk := snd.session, snd.packer
	switch {
	case errors.Is(err, nats.ErrMaxPayload):
		if snd.recut(p, int(s.ep.maxPayload.Load())) {
			return tryAgain
		}
		s.requestEnd(s.ep.exceeds(p))
		putPacket(p)
	case errors.Is(err, nats.ErrBadSubject): // the stream has ended
		putPacket(p)
	default:
		snd.unacked.failed = p
		pk.mu.Lock()
		pk.publishError = err
		pk.queued = false
		snd.invited, pk.place.at = nil, nil
		pk.wakeLocked()
		pk.mu.Unlock()
	}
	return heldBack
}

// isLoss reports whether a publish failed because the connection broke: nats.go writes its buffer to the socket within
// the call. The packet may have been sent or not.
func isLoss(err error) bool {
	_, network := errors.AsType[net.Error](err)
	return network || errors.Is(err, nats.ErrReconnectBufExceeded) || errors.Is(err, nats.ErrStaleConnection)
}

// publishAgain publishes p, the next packet that the peer misses.
func (snd *sender) publishAgain(p *packet) progress {
	s, q := snd.session, &snd.unacked
	fragment, asks := snd.formAgain(p)
	snd.envelopeLost(p)
	if err := snd.publishAs(p, q.Cursor(), fragment, true); err != nil {
		if errors.Is(err, nats.ErrMaxPayload) { // its number is taken, and the peer may have it
			if fragment == 0 && len(p.buf) > int(s.ep.maxPayload.Load()) {
				return tryAgain // in fragments, because publish has looked at the limit
			}
			s.requestEnd(s.ep.exceeds(p))
			return heldBack
		}
		q.GiveUp()      // the peer asks again if the connection comes back
		return tryAgain // records may have been written meanwhile
	}
	s.ep.counters.resent.Add(1)
	s.observe(eventRetransmitted)
	s.out.life.sent, s.out.life.asks = s.ep.clock.Load(), 0 // its acknowledgement is overdue as soon as that of a new packet
	q.Resent()
	snd.onLine(q.Cursor()-1, p)
	if asks {
		return askAndTryAgain
	}
	return tryAgain
}

// publish publishes packet p, number seq. With alone, it does not go into an envelope.
func (snd *sender) publish(p *packet, seq uint32, alone bool) (err error) {
	s := snd.session
	p.enveloped = 0
	if !s.registered() {
		if e := s.ep.register(s, s.controlToken()); e != nil {
			s.requestEnd(e)
			err = e.err
		}
	}
	switch {
	case err != nil:
	case s.peerTakesJSON():
		err = snd.publishJSON(p)
	default:
		reply := ""
		if seq == 0 && s.role != lifecycle.Consumer {
			reply = s.reply()
		}
		snd.markIfDue(p, seq)
		p.connection = s.ep.outbox.connection.Load()
		var end int
		end, err = s.ep.outbox.send(s, snd, reply, p.buf, alone || p.last)
		p.enveloped = int32(end)
	}
	switch { // errors that a repeated publish does not cure
	case errors.Is(err, nats.ErrMaxPayload):
		s.ep.lookAtMaxPayload()
	case errors.Is(err, nats.ErrBadSubject):
		s.requestEnd(unwritable(err))
	}
	return err
}

// publishJSON publishes a message of the fallback, with a reply subject if NATS has to report whether it is received.
func (snd *sender) publishJSON(p *packet) error {
	s := snd.session
	if !snd.probeDue(p) {
		return s.ep.send(s.out.peer, "", p.buf)
	}
	s.out.life.pinged = s.ep.clock.Load()
	return s.ep.conn.PublishMsg(&nats.Msg{Subject: s.out.peer, Reply: s.reply(), Header: nats.Header{headerProbe: {"1"}}, Data: p.buf})
}

// probeDue reports whether the fallback message p gets a reply subject, so that NATS reports if nobody receives it. A
// fallback peer cannot be asked. The first message of a handler gets one, and then one message in each KeepAlive.
// Messages of NewWriter get none, because they are those of the original library.
func (snd *sender) probeDue(p *packet) bool {
	const header = len("NATS/1.0\r\n" + headerProbe + ": 1\r\n\r\n")
	s, ep := snd.session, snd.session.ep
	l := &s.out.life
	return s.role == lifecycle.Handler && (l.pinged == 0 || ep.clock.Load()-l.pinged >= ep.times.KeepAlive) &&
		int64(len(p.buf)+header) <= ep.maxPayload.Load() && len(s.out.peer) <= ep.longestPeer()
}

// markIfDue sets MARK in p if the line needs a measurement, or if p is larger than all that passed. The last packet
// never gets it, because its acknowledgement may be the last packet of the stream. A packet that is published again may
// differ from the first time in MARK.
func (snd *sender) markIfDue(p *packet, seq uint32) {
	ep, l := snd.session.ep, snd.session.out.line
	p.buf[1] &^= byte(PacketMark)
	tries := snd.tries(p, seq)
	if !p.last && (tries || l.WantsMark(len(p.buf), ep.clock.Load())) {
		p.buf[1] |= byte(PacketMark)
		l.began = ep.now() // the clock of ticks is too coarse to measure with
	}
}

// resumeLine resets the line if the connection was interrupted.
func (o *outbox) resumeLine(l *line) {
	if r := o.resumed.Load(); l.resumed != r {
		l.resumed = r
		l.Reset()
	}
}

// onLine records that p, packet seq, was published.
func (snd *sender) onLine(seq uint32, p *packet) {
	s, pk := snd.session, snd.packer
	l := s.out.line
	l.last, l.lastSeq = s, seq
	l.Sent(len(p.buf))
	if p.buf[1]&byte(PacketMark) != 0 {
		l.Mark(s, seq, l.began)
	}
	if n := int32(l.sizes.Most(l.Packet(), s.ep.clock.Load())); n != pk.packetSize.Load() {
		pk.packetSize.Store(n)
	}
}

// creditFor reports whether the peer's credit allows p now. Writers check credit when they open a packet, but cut
// packets need more. A packet with only CLOSE needs none.
func (snd *sender) creditFor(p *packet) bool {
	pk, q := snd.packer, &snd.unacked
	pk.mu.Lock()
	defer pk.mu.Unlock()
	return snd.session.peerTakesJSON() || int32(q.Next()-pk.granted.packets) < 0 && q.bytes < pk.granted.bytes ||
		onlyClose(p.buf[PacketHeaderSize:])
}

// nextReady returns the next sealed packet, nil if there is none.
func (snd *sender) nextReady() *packet {
	if p := snd.unacked.failed; p != nil {
		snd.unacked.failed = nil
		return p
	}
	if snd.unacked.queue == nil {
		snd.unacked.queue = snd.packer.ready.take()
	}
	p := snd.unacked.queue
	if p != nil {
		snd.unacked.queue, p.next = p.next, nil
	}
	return p
}

// hasReady reports whether a sealed packet waits to be published.
func (snd *sender) hasReady() bool {
	q := &snd.unacked
	return q.failed != nil || q.queue != nil || !snd.packer.ready.empty()
}

// sealOpen seals the open packet, because no other packet is left. It returns the packet to publish next, nil if
// there is no record to publish.
func (snd *sender) sealOpen() *packet {
	pk := snd.packer
	pk.mu.Lock()
	defer pk.mu.Unlock()
	if p := snd.nextReady(); p != nil { // sealed just now
		return p
	}
	pk.sealOpenLocked()
	return snd.nextReady()
}

// backlog returns the number of bytes to publish. It is exact if all of them are in the open packet, and flow.MaxPacket
// otherwise. If it is 0, the next record marks the session again.
func (snd *sender) backlog() int {
	pk, q := snd.packer, &snd.unacked
	if snd.hasReady() || q.Cursor() != q.Next() {
		return flow.MaxPacket
	}
	pk.mu.Lock()
	defer pk.mu.Unlock()
	switch {
	case !pk.ready.empty():
		return flow.MaxPacket
	case pk.hasOpenLocked():
		return pk.n
	}
	pk.queued = false
	return 0
}

// sentJSON gives a fallback message back at once, because the peer acknowledges nothing. The credit is this end's own
// bound on the messages that wait to be published, and grows by the message.
func (snd *sender) sentJSON(p *packet) {
	pk := snd.packer
	snd.unacked.Skip()
	n, memory := uint64(len(p.buf)), p.memory()
	putPacket(p)
	pk.mu.Lock()
	defer pk.mu.Unlock()
	pk.grantLocked(1, memory, credited{pk.granted.packets + 1, pk.granted.bytes + n})
}

// grant takes an acknowledgement and a grant of the consumer. Both are absolute, so an old or repeated one changes
// nothing. It returns the bytes of the packets that were acknowledged.
func (snd *sender) grant(c Credit) (bytes uint64, err error) {
	if next := snd.unacked.Next(); int32(c.Ack-next) > 0 {
		return 0, fmt.Errorf("packet %d acknowledged, %d sent", c.Ack, next)
	}
	n, bytes, memory, through := snd.release(c.Ack)
	snd.packer.mu.Lock()
	defer snd.packer.mu.Unlock()
	snd.packer.acknowledgeLocked(through)
	snd.packer.grantLocked(n, memory, credited{c.Packets, c.Bytes})
	return bytes, nil
}

// releaseSent gives all published packets back.
func (snd *sender) releaseSent() {
	_, _, memory, through := snd.release(snd.unacked.Next())
	snd.packer.mu.Lock()
	defer snd.packer.mu.Unlock()
	snd.packer.acknowledgeLocked(through)
	snd.packer.freeLocked(memory)
}

// releaseAll gives all packets back, because the stream has ended.
func (snd *sender) releaseAll() {
	snd.packer.dropOpen()
	for p := snd.nextReady(); p != nil; p = snd.nextReady() {
		putPacket(p)
	}
	snd.release(snd.unacked.Next())
}

// onTheWay returns the bytes that were published and not acknowledged, without those that are to be published again.
func (q *unackedPackets) onTheWay() uint64 { return q.sizeOf(q.OnTheWay()) }

// sizeOf returns the bytes of the oldest packets, count of them.
func (q *unackedPackets) sizeOf(count uint32) (n uint64) {
	for p := range q.All() {
		if count == 0 {
			break
		}
		n += uint64(len(p.buf))
		count--
	}
	return n
}

// again prepares the retransmission of all packets from seq on, and reports whether there are any. If this is a new
// loss, it returns the bytes that were on their way. For a repeated request it looks at no packet.
func (q *unackedPackets) again(seq uint32, now, patience int64) (again bool, bytes uint64) {
	again, lost := q.Again(seq, now, patience)
	if lost != 0 {
		q.loss.Lost(lost)
		bytes = q.sizeOf(lost)
	}
	return again, bytes
}

// release returns the packets before seq to the pool. It returns their number, their bytes, the bytes of their buffers,
// and the count of records and bytes that were written down to the last of them. The connection may have kept packets
// for a write with others, so release recalls them. It does so also if none is given back: a CREDIT may then ask for
// packets again, and these change before they are published again.
func (snd *sender) release(seq uint32) (n uint32, bytes, memory uint64, through counted) {
	snd.session.ep.conn.Recall()
	q := &snd.unacked
	n = q.Release(seq, func(p *packet) {
		memory += p.memory()
		if p.through != (counted{}) {
			through = p.through
		}
		bytes += uint64(len(p.buf))
		if !p.fragments {
			q.whole = max(q.whole, int32(len(p.buf)))
		}
		q.inside = max(q.inside, p.enveloped)
		putPacket(p)
	})
	return n, bytes, memory, through
}
