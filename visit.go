package stream

import (
	"time"

	"github.com/natsstream/stream/internal/natsconn"
)

// This file lets a goroutine that writes publish its packet in the place of the outbox, which saves a handover from one
// goroutine to the other. Writers run it, without the lock of the packer. While one of them has taken the announcement
// of the sleeping outbox, it is a visitor: it owns the fields of the outbox as the outbox does when it is awake. A
// visitor waits for nothing but the lock of its own packer, because a context must be able to end each Write. So it
// publishes one packet of its own stream, and only if nothing keeps it from doing so. It leaves all other work to the
// outbox.

// visits decides when a writer publishes in the place of the outbox. A producer that writes without a pause is faster
// through the outbox, because its records gather in a packet while the outbox publishes the packet before. So a visit
// needs a pause before it. If no pause follows, the visit was a mistake, and more pauses pass without one.
type visits struct {
	judge bool  // the last packet was published by a visitor, and the next record judges the visit
	left  uint8 // pauses that pass without a visit
	skip  uint8 // pauses that passed after the last mistake, less those forgiven
}

const (
	visitPause = int64(5 * time.Microsecond) // for which the outbox has had nothing to do
	mostSkips  = 63
)

// due reports whether a visit may come after the outbox has had nothing to do for idle, in ns.
func (v *visits) due(idle int64) bool {
	switch {
	case !v.judge:
	case idle < visitPause:
		v.skip = min(2*v.skip+1, mostSkips)
		v.left = v.skip
	default:
		v.skip /= 2
	}
	v.judge = false
	switch {
	case idle < visitPause:
		return false
	case v.left > 0:
		v.left--
		return false
	}
	return true
}

// markWritten marks s for the outbox because of a record of n bytes that was written just now, or publishes the record.
// The caller does not have the lock of the packer.
func (s *session) markWritten(n int) {
	if n > natsconn.MostNow {
		s.mark(workPackets)
		return
	}
	before := s.pending.Or(workPackets)
	if before&^workLater != 0 {
		return // queued, or about to be served
	}
	o := &s.ep.outbox
	switch {
	case before != 0: // queued
		o.park.Wake()
	case !o.park.Take():
		o.push(s)
		o.park.Wake() // it may have announced itself meanwhile
	case !o.mayVisit(s) || !s.pending.CompareAndSwap(workPackets, 0): // or other work was marked meanwhile
		o.push(s)
		o.park.Signal()
	default:
		rest := o.visit(s)
		o.slept = o.ep.now()
		if !o.announce() || rest {
			o.park.Wake()
		}
	}
}

// mayVisit reports whether a visitor may publish the next packet of s: the outbox would do nothing else for s. s is not
// queued.
func (o *outbox) mayVisit(s *session) bool {
	snd, l := s.send.Load(), s.out.line
	q := &snd.unacked
	switch {
	case !o.ep.conn.TakesNow() || !o.visits.due(o.ep.now()-o.slept) || !o.up.Load():
		return false
	case o.placed.Load() != nil: // earlier packets of this stream may be among them
		return false
	case q.Next() == 0 || !s.registered() || s.peerTakesJSON() || s.end.Load() != nil || o.ep.barred() != nil:
		return false
	case l == nil || l.resumed != o.resumed.Load() || l.turn != nil || l.waits() > 0 || !l.MaySend(o.ep.clock.Load()):
		return false
	}
	if q.refused || q.failed != nil || q.queue != nil || q.Cursor() != q.Next() || q.loss.Full(q.OnTheWay()) {
		return false
	}
	return snd.backlog() <= natsconn.MostNow
}

// visit publishes the next packet of s, or leaves the packet to the outbox. rest reports that the outbox has to send
// the rest of it.
func (o *outbox) visit(s *session) (rest bool) {
	snd := s.send.Load()
	p := snd.nextReady()
	if p == nil {
		if p = snd.sealOpen(); p == nil {
			return false
		}
	}
	sent := false
	if o.mayPublishNow(s, p) {
		p.enveloped, p.fragments, p.connection = 0, false, o.connection.Load()
		snd.markIfDue(p, snd.unacked.Next())
		sent, rest = o.ep.conn.PublishNow(s.out.peer, p.buf)
	}
	if !sent {
		p.next, snd.unacked.queue = snd.unacked.queue, p
		s.mark(workPackets)
		return false
	}
	o.visits.judge = true
	snd.sent(p, false)
	o.watchAck(s)
	o.nextTurn(s.out.line)
	o.fitPlaces(s)
	if snd.backlog() > 0 {
		s.mark(workPackets)
	}
	return rest
}

// mayPublishNow reports whether p, a new packet of s, goes out as it is, with nothing to do before or after it.
func (o *outbox) mayPublishNow(s *session, p *packet) bool {
	snd, sizes, n := s.send.Load(), &s.out.line.sizes, len(p.buf)
	return !p.last && n <= natsconn.MostNow && (s.isProved() || snd.unacked.bytes+uint64(n) < proveFrom) && n <= int(o.ep.maxPayload.Load()) && len(s.out.peer) <= o.ep.longestPeer() &&
		!sizes.Doubts(n) && !sizes.Fails(n, o.ep.clock.Load()) && (snd.packer.shifted == 0 || snd.creditFor(p))
}
