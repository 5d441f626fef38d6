package stream

import (
	"strings"

	"github.com/natsstream/stream/internal/flow"
	"github.com/natsstream/stream/internal/lifecycle"
)

// This file lets the writers of slow streams place their records in the envelope that the outbox sends next. The outbox
// then neither serves the session nor copies the packet. With thousands of slow streams, no cache holds the session or
// the packet. Writers run placeLocked and the functions that it calls, with the locks of the packer and of the
// enveloping. The outbox runs the rest.
//
// The outbox must publish the packets of a stream in their order, and a placed packet has its number from its writer.
// So two rules hold. A writer places a packet only if the packer has no packet that the outbox has not published
// (packer.queued is false). And before the outbox publishes a packet of the packer, it takes the placed packets before
// it. After a failed publish, queued is false and packets wait. So publishFailed ends the invitation of the stream.

// place tells the writers of a packer where to place packets. The lock of the packer guards it.
type place struct {
	at    *enveloping // nil if the writers place no packets
	token [TokenSize]byte
}

const (
	// largestPlaced bounds a placed packet. It is the size of the smallest fragments. A stream cannot live on a way
	// that takes less.
	largestPlaced = flow.SmallFragment
	// leastOpened is the least size of an envelope that a writer opens.
	leastOpened = PacketHeaderSize + envelopedHead + largestPlaced
	// mostOpen bounds the envelopes to one other end that writers open before the outbox sends them. The writers of
	// many streams may be faster than the outbox for a time. mostOpenedHere bounds those to all other ends, because
	// their memory is in no budget.
	mostOpen       = 8
	mostOpenedHere = 1 << 6
	// Envelopes that are kept for their packets take at most the budget divided by retainedPart. The packets of an
	// envelope move to memory of their own at once if it takes more than sparse times the bytes in use.
	retainedPart = 4
	sparse       = 4
)

// placeLocked places the record p in an open envelope, and reports whether it did. It places one record of a stream in
// each envelope: the packets of a stream with more records should be larger.
func (pk *packer) placeLocked(p []byte, flags FrameFlags) bool {
	size := PacketHeaderSize + FrameHeaderSize + len(p)
	if size > largestPlaced || !pk.mayPlaceLocked() {
		return false
	}
	e, s := pk.place.at, pk.session
	if !e.mu.TryLock() {
		return false
	}
	d := e.placeLocked(pk, size)
	if d == nil {
		e.mu.Unlock()
		return false
	}
	pk.keepLocked(&d.packet) // before it is known whether the credit is used up
	b := d.buf
	seq := pk.sealed
	pk.sealed++
	pk.sealedBytes += uint64(size)
	pk.size = int32(size)
	pk.written.records++
	pk.written.bytes += uint64(len(p))
	packetFlags := PacketSeq
	if !pk.creditLocked() {
		packetFlags |= PacketAck
	}
	putPacketHeader(b, packetFlags, s.senderNumber, seq, size)
	putFrameHeader(b[PacketHeaderSize:], FrameData, flags, 0, len(p))
	copy(b[PacketHeaderSize+FrameHeaderSize:], p)
	d.through, d.sender = pk.written, s.send.Load()
	news := !e.news
	if news {
		s.ep.outbox.pushPlaced(e)
	}
	e.mu.Unlock()
	if news {
		s.ep.outbox.park.Wake()
	}
	return true
}

// mayPlaceLocked reports whether the next record may be placed. While the outbox sleeps, it may not: then the writer
// publishes it, or wakes the outbox. After a large packet, the stream is probably busy.
func (pk *packer) mayPlaceLocked() bool {
	if pk.place.at == nil || pk.size > largestPlaced || pk.queued || pk.open != nil || pk.turn || pk.closed.Load() || pk.held.Load() || pk.publishError != nil {
		return false
	}
	o := &pk.session.ep.outbox
	return !o.park.Announced() && o.up.Load() && pk.creditLocked() && !pk.over() && !pk.session.late()
}

// placeLocked returns a packet of size bytes in an open envelope, nil if none has a place for it.
func (e *enveloping) placeLocked(pk *packer, size int) *placedPacket {
	v, o := e.last, &pk.session.ep.outbox
	switch {
	case e.most == 0 || e.connection != o.connection.Load() || v != nil && pk.placedIn == e.number:
		return nil
	case v != nil && v.placed < maxPlaced && v.n+envelopedHead+size <= v.most:
	case e.opened >= e.most:
		return nil
	default:
		limit := min(e.size, int(o.ep.maxPayload.Load()))
		if limit < leastOpened {
			return nil
		}
		if o.openByWriters.Add(1) > mostOpenedHere {
			o.openByWriters.Add(-1)
			return nil
		}
		e.opened++
		v = e.openLocked(limit)
	}
	pk.placedIn = e.number
	from := v.n + envelopedHead
	copy(v.buf.buf[v.n:], pk.place.token[:])
	v.grow()
	d := v.at(v.placed)
	v.n = from + size
	v.packets++
	v.placed++
	d.packet = packet{buf: v.buf.buf[from:v.n:v.n], class: placedClass, enveloped: int32(v.n)}
	d.envelope = v
	return d
}

// pushPlaced passes e, in which a packet was placed, to the outbox. The caller has the lock of e. So if another writer
// finds news set, the outbox finds e.
func (o *outbox) pushPlaced(e *enveloping) {
	e.news = true
	for {
		head := o.placed.Load()
		e.next = head // published by the swap below
		if o.placed.CompareAndSwap(head, e) {
			return
		}
	}
}

// takePlaced takes all placed packets: the outbox counts them as published from here on. It reports whether there may
// have been any.
func (o *outbox) takePlaced() (worked bool) {
	if o.placed.Load() == nil {
		return false
	}
	for e := o.placed.Swap(nil); e != nil; {
		e.mu.Lock()
		next, v := e.next, e.first
		e.next, e.news = nil, false
		e.mu.Unlock()
		if v != nil {
			o.list(e)
		}
		for v != nil { // only the outbox removes open envelopes
			e.mu.Lock()
			placed, later := v.placed, v.next
			e.mu.Unlock()
			o.accountAll(v, placed)
			v = later
		}
		e = next
	}
	return true
}

// accountAll accounts for the first n placed packets of v, as far as that was not done.
func (o *outbox) accountAll(v *envelope, n int) {
	for ; v.taken < n; v.taken++ {
		o.account(v, v.at(v.taken))
	}
}

// account counts the placed packet d of v as published. sendEnvelope publishes it. If the stream has ended, d is sent
// all the same, and kept no longer.
func (o *outbox) account(v *envelope, d *placedPacket) {
	v.kept++
	o.envelopes.packets++
	snd := d.sender
	s := snd.session
	if s.out.state.Phase != lifecycle.Live {
		putPacket(&d.packet)
		return
	}
	o.resumeLine(s.out.line)
	d.connection = o.connection.Load()
	q := &snd.unacked
	if q.Cursor() == q.Next() {
		snd.markIfDue(&d.packet, q.Next())
	}
	snd.sent(&d.packet, false)
	if q.loss.Full(q.OnTheWay()) {
		snd.uninvite() // the next packet waits, or asks
	}
	v.senders = append(v.senders, snd)
	o.envelopes.unwatched = append(o.envelopes.unwatched, s)
}

// allowPlaces decides how many envelopes to the other end of e writers may open, and of which size.
func (o *outbox) allowPlaces(e *enveloping) {
	connection := o.connection.Load() // before the checks: a reconnect during them makes their result void
	size, most := o.envelopeSize(e), 0
	l := o.lines.byPeer[e.name]
	switch {
	case size < leastOpened:
	case !e.known || !e.arrives || !o.up.Load() || o.envelopes.refused == connection+1:
	case l == nil || l.turn != nil || l.turns != nil || l.resumed != o.resumed.Load():
	default:
		if room := l.Room(o.ep.clock.Load()); room > 0 {
			most = int(min(mostOpen, 1+room/uint64(size)))
		}
	}
	e.mu.Lock()
	e.most, e.size, e.connection = most, size, connection
	e.mu.Unlock()
}

// stopPlaces lets writers place no packets in envelopes to the other end of e until sendEnvelope decides anew.
func (o *outbox) stopPlaces(e *enveloping) {
	if e.most > 0 {
		e.mu.Lock()
		e.most = 0
		e.mu.Unlock()
	}
}

// fitPlaces lets writers open fewer envelopes to the peer of s if the line has less room than when they were allowed
// to.
func (o *outbox) fitPlaces(s *session) {
	p, l := s.remote.Load(), s.out.line
	if p == nil || l == nil || p.envelopes == nil || p.envelopes.most == 0 {
		return
	}
	if e := p.envelopes; uint64(e.most-1)*uint64(e.size) > l.Room(o.ep.clock.Load()) {
		o.allowPlaces(e)
	}
}

// invite lets the writers of snd place packets, if nothing has to happen before or after these are sent.
func (o *outbox) invite(e *enveloping, snd *sender) {
	s, pk, q := snd.session, snd.packer, &snd.unacked
	if snd.invited == e || !s.isProved() || pk.shifted != 0 || q.refused || q.failed != nil || q.loss.Full(q.OnTheWay()+1) || s.ep.maxRecord < largestPlaced {
		return
	}
	pk.mu.Lock()
	defer pk.mu.Unlock()
	if pk.queued && !pk.over() { // after an error of a publish, packets may wait although it is not queued
		snd.invited, pk.place.at = e, e
		copy(pk.place.token[:], s.out.peer[len(e.name)+1:])
	}
}

// uninvite lets the writers of snd place no more packets. Those that were placed may not be taken yet.
func (snd *sender) uninvite() {
	if snd.invited == nil {
		return
	}
	pk := snd.packer
	pk.mu.Lock()
	defer pk.mu.Unlock()
	snd.invited, pk.place.at = nil, nil
}

// settleRetained moves packets out of envelopes that were sent. One packet that is not acknowledged would keep the
// whole envelope, so the packets of an envelope that is nearly empty move at once, and those of the oldest ones if all
// take too much memory. The outbox calls it between the turns of sessions: a packet that is being published does not
// move.
func (o *outbox) settleRetained() {
	r := &o.envelopes.retained
	for v := r.last; v != nil && !v.seen; {
		older := v.older
		v.seen = true
		if sparse*int64(v.n) < v.memory() {
			v.vacate()
		}
		v = older
	}
	for r.first != nil && r.bytes > o.ep.budget/retainedPart {
		r.first.vacate()
	}
}

// vacate moves the packets that v keeps to memory of their own.
func (v *envelope) vacate() {
	for i := range v.placed {
		d := v.at(i)
		if d.free {
			continue
		}
		snd := d.sender
		p := getPacket(len(d.buf))
		copy(p.buf, d.buf)
		p.buf = p.buf[:len(d.buf)]
		p.enveloped, p.connection, p.through, p.fragments = d.enveloped, d.connection, d.through, d.fragments
		snd.unacked.Replace(&d.packet, p)
		pk := snd.packer
		pk.mu.Lock()
		pk.keepLocked(p)
		pk.freeLocked(d.memory())
		pk.mu.Unlock()
		last := v.kept == 1
		putPacket(&d.packet)
		if last { // v is back in its pool
			return
		}
	}
}

// subject returns where the only packet of v goes, to the stream with the given token.
func (v *envelope) subject(e *enveloping, token []byte) string {
	if len(v.senders) == 1 {
		if peer := v.senders[0].session.out.peer; strings.HasSuffix(peer, string(token)) {
			return peer
		}
	}
	return e.name + "." + string(token)
}
