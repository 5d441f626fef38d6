package stream

import (
	"errors"
	"fmt"
	"math/bits"
	"net"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/flow"
	"github.com/natsstream/stream/internal/lifecycle"
)

// This file is the outbox's half of a Writer: how a sealed packet reaches NATS, is kept until it is acknowledged, and goes back
// to the pool. The outbox runs all of it.

// publishNext publishes the next packet and reports whether there may be another. Called by the outbox alone.
func (w *Writer) publishNext(o *outbox) (more bool) {
	s := w.session
	if w.unacked.loss.Full(w.unacked.OnTheWay()) {
		if w.unacked.loss.Ask() { // the answer lets the next ones go
			o.ping(s)
		}
		return false
	}
	if p, ok := w.unacked.Missing(); ok {
		return w.publishAgain(o, p)
	}
	retry := w.unacked.failed != nil
	w.unacked.waits = false
	p := w.nextReady()
	if p == nil {
		if p = w.sealOpen(); p == nil {
			s.out.places.clear(steady)
			return false
		}
	}
	last := p.last
	if w.shifted != 0 && !w.creditFor(p) { // it was cut into more packets than the writers had credit for
		w.unacked.failed, w.unacked.waits = p, true
		return false
	}
	err := w.publish(o, p, w.unacked.Next())
	if err != nil && !w.json && isLoss(err) {
		err = nil // it is missed and asked for, like any other that was under way
	}
	if err != nil {
		return w.publishFailed(o, p, err)
	}
	s.ep.counters.sent(len(p.buf))
	now := o.ep.clock.Load()
	s.out.life.sent, s.out.life.asks = now, 0
	if w.json {
		w.sentJSON(p)
	} else {
		w.unacked.Push(p)
		w.unacked.bytes += uint64(len(p.buf))
		o.onLine(s, w.unacked.Next()-1, p)
		if !o.dueBy(s, now+2*o.ep.times.Ack) { // it was idle
			s.out.life.sent = o.time()
			o.schedule(s, s.out.life.sent+o.ep.times.Ack)
		}
	}
	// Whoever waits for this first says so and then looks at published: one of the two sees the other.
	w.published.Store(w.unacked.Next())
	if retry || w.waiting.Load() {
		w.mu.Lock()
		if retry {
			w.publishError = nil // it was sent after all
		}
		w.wakeLocked()
		w.mu.Unlock()
	}
	if s.stream != nil && w.unacked.Next() == 1 && s.bucket.ring.Pushed() > 0 {
		s.mark(workProbe) // the end of the stream may be among what arrived: then nobody reads what is written
	}
	if last {
		w.cancel(ErrClosed)
		o.step(s, lifecycle.ClosePublished)
		if w.json {
			o.step(s, lifecycle.CloseAcked)
		} else {
			w.unacked.closed = o.time()
			w.unacked.closeSent = w.unacked.closed
			o.schedule(s, w.unacked.closed+min(o.ep.times.Ack, o.ep.times.Resume))
		}
	}
	return !last
}

// publishFailed takes a new packet back that could not be published, and reports whether there is something to publish in its
// place.
func (w *Writer) publishFailed(o *outbox, p *packet, err error) (more bool) {
	switch {
	case errors.Is(err, nats.ErrMaxPayload):
		if w.recut(p, int(o.ep.maxPayload.Load())) {
			return true
		}
		w.session.requestEnd(o.ep.exceeds(p))
		putPacket(p)
	case errors.Is(err, nats.ErrBadSubject): // the stream has ended
		putPacket(p)
	default:
		w.unacked.failed = p
		w.mu.Lock()
		w.publishError = err
		w.queued = false
		w.wakeLocked()
		w.mu.Unlock()
	}
	return false
}

// isLoss reports whether a publish failed because the connection broke under it: nats.go writes its buffer out there. The
// packet may have been sent or not.
func isLoss(err error) bool {
	_, network := errors.AsType[net.Error](err)
	return network || errors.Is(err, nats.ErrReconnectBufExceeded) || errors.Is(err, nats.ErrStaleConnection)
}

// publishAgain publishes p, the next of the packets that the peer misses.
func (w *Writer) publishAgain(o *outbox, p *packet) (more bool) {
	if err := w.publish(o, p, w.unacked.Cursor()); err != nil {
		if errors.Is(err, nats.ErrMaxPayload) { // its number is taken, and the peer may have it
			w.session.requestEnd(o.ep.exceeds(p))
			return false
		}
		w.unacked.GiveUp() // asked for again, if the connection comes back
		return true        // records may have been written meanwhile
	}
	o.ep.counters.resent.Add(1)
	l := &w.session.out.life
	l.sent, l.asks = o.ep.clock.Load(), 0 // it may be lost again, and is as soon overdue as when it was new
	w.unacked.Resent()
	o.onLine(w.session, w.unacked.Cursor()-1, p)
	return true
}

// publish publishes packet p, number seq.
func (w *Writer) publish(o *outbox, p *packet, seq uint32) (err error) {
	s := w.session
	if s.reply == "" {
		if e := s.ep.register(s, s.controlToken()); e != nil {
			s.requestEnd(e)
			err = e.err
		}
	}
	reply := ""
	if seq == 0 && !w.json && s.stream == nil {
		reply = s.reply
	}
	switch {
	case err != nil:
	case w.json && o.probeDue(s, p):
		s.out.life.pinged = o.time()
		err = o.ep.conn.PublishMsg(&nats.Msg{Subject: s.out.peer, Reply: s.reply, Header: nats.Header{headerProbe: {"1"}}, Data: p.buf})
	default:
		if !w.json {
			o.aboutToPublish(s, p)
		}
		err = o.send(s.out.peer, reply, p.buf)
	}
	switch { // these do not go as they are
	case errors.Is(err, nats.ErrMaxPayload):
		o.ep.lookAtMaxPayload()
	case errors.Is(err, nats.ErrBadSubject):
		s.requestEnd(unwritable(err))
	}
	return err
}

// exceeds is how a stream ends whose packet p the server does not take any more, and which cannot be cut.
func (ep *endpoint) exceeds(p *packet) *ending {
	err := tooLarge("packet", int64(len(p.buf)), ep.maxPayload.Load())
	return &ending{
		kind:  endFault,
		err:   fmt.Errorf("stream: max_payload shrank under a stream: %w", err),
		reset: CloseError{CloseInternalServerErr, cutReason(err.Error(), ep.reasonLimit())},
	}
}

// recut makes smaller packets of p and of all that is sealed behind it, for a server that takes limit bytes. p was refused
// before it left, so none of them has been seen by the peer, and they may have other numbers. It reports false, and changes
// nothing, if p holds a frame that must stay whole and is too large. Called by the outbox.
func (w *Writer) recut(p *packet, limit int) bool {
	pieces, ok := cutPacket(p.buf, limit)
	if w.json || !ok || len(pieces) < 2 {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sealedBytes -= uint64(len(p.buf))
	all := make([]*packet, 0, len(pieces))
	for i, piece := range pieces {
		w.sealedBytes += uint64(len(piece))
		all = append(all, &packet{buf: piece, class: unpooled, last: p.last && i == len(pieces)-1})
		w.keepLocked(all[i])
	}
	w.freeLocked(p.memory())
	putPacket(p)
	extra := uint32(len(pieces) - 1)
	w.sealed += extra
	w.shifted += extra
	for next := w.nextReady(); next != nil; next = w.nextReady() {
		all = append(all, next)
	}
	for i, packet := range all {
		if h, _, err := ParsePacketHeader(packet.buf); err == nil { // this end has made it
			putPacketHeader(packet.buf, h.Flags, h.Sender, w.unacked.Next()+uint32(i), len(packet.buf))
		}
	}
	w.unacked.cut = all
	return true
}

// cutPacket distributes the frames of a packet over packets of at most limit bytes. It cuts DATA frames that are too large, and
// reports false if another frame is.
func cutPacket(p []byte, limit int) (pieces [][]byte, ok bool) {
	h, body, err := ParsePacketHeader(p)
	room := limit - PacketHeaderSize - FrameHeaderSize
	if err != nil || room < 1 {
		return nil, false
	}
	var frames []Frame
	size := PacketHeaderSize
	flush := func(flags PacketFlags) {
		pieces = append(pieces, AppendPacket(make([]byte, 0, size), PacketHeader{Flags: flags, Sender: h.Sender, Seq: h.Seq}, frames...))
		frames, size = nil, PacketHeaderSize
	}
	add := func(f Frame) {
		n := FrameHeaderSize + len(f.Payload)
		if size+n > limit && len(frames) > 0 {
			flush(PacketSeq)
		}
		frames = append(frames, f)
		size += n
	}
	for len(body) > 0 {
		var f Frame
		if f, body, err = ParseFrame(body); err != nil || f.Type != FrameData && len(f.Payload) > room {
			return nil, false
		}
		rest := f.Payload
		for len(rest) > room {
			piece := f
			piece.Flags |= FlagMore
			piece.Payload, rest = rest[:room], rest[room:]
			add(piece)
		}
		f.Payload = rest
		add(f)
	}
	flush(h.Flags)
	return pieces, true
}

// creditFor reports whether the peer's credit allows p now. Writers look at it when they open a packet, but a packet that was
// cut takes more of it. One that only closes needs none. Called by the outbox.
func (w *Writer) creditFor(p *packet) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	q := &w.unacked
	return w.json || int32(q.Next()-w.granted.packets) < 0 && q.bytes < w.granted.bytes || onlyClose(p.buf[PacketHeaderSize:])
}

// nextReady returns the packet to publish next among those sealed.
func (w *Writer) nextReady() *packet {
	if p := w.unacked.failed; p != nil {
		w.unacked.failed = nil
		return p
	}
	if cut := w.unacked.cut; len(cut) > 0 {
		w.unacked.cut = cut[1:]
		return cut[0]
	}
	p, _ := w.ready.Pop()
	return p
}

// backlog returns how many bytes there are to publish: exactly, as long as they are in the open packet. If there are none, the
// next record marks the session again.
func (w *Writer) backlog() int {
	if w.unacked.failed != nil || len(w.unacked.cut) > 0 || w.unacked.Cursor() != w.unacked.Next() || !w.ready.Empty() {
		return flow.MaxPacket
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case !w.ready.Empty():
		return flow.MaxPacket
	case w.hasOpenLocked():
		return w.n
	}
	w.queued = false
	return 0
}

// hasOpenLocked reports whether the open packet holds records that are complete.
func (w *Writer) hasOpenLocked() bool {
	return w.open != nil && (!w.turn || w.encoding) && w.n != PacketHeaderSize
}

// sealOpen seals and returns the open packet, because there is nothing else to publish: while the outbox is busy, it
// fills. It returns nil, and lets the next record mark the session again, if there is no record to publish.
func (w *Writer) sealOpen() *packet {
	w.mu.Lock()
	defer w.mu.Unlock()
	if p := w.nextReady(); p != nil { // sealed just now
		return p
	}
	if !w.hasOpenLocked() {
		w.queued = false
		return nil
	}
	if w.encoding { // what is complete does not wait; the rest of the buffer is the encoder's, so it is not pooled
		w.open = &packet{buf: w.open.buf, class: unpooled}
	}
	w.sealLocked()
	return w.nextReady()
}

// sentJSON gives a fallback message back at once: its peer acknowledges nothing, and what it may take is this end's
// own bound on what waits to be published.
func (w *Writer) sentJSON(p *packet) {
	w.unacked.Skip()
	n, memory := uint64(len(p.buf)), p.memory()
	putPacket(p)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.acked++
	w.freeLocked(memory)
	w.granted.packets++
	w.granted.bytes += n
	w.wakeLocked()
}

// unackedPackets are the packets that were published and not acknowledged yet. The outbox owns it.
type unackedPackets struct {
	flow.Unacked[*packet]
	loss   flow.Loss
	failed *packet   // could not be published; to be tried again before any other
	cut    []*packet // were sealed, and cut or numbered again since: they go before what is ready
	bytes  uint64    // of all packets that were published
	waits  bool      // failed waits for credit

	// By the outbox's clock, 0 before CLOSE was published.
	closeSent int64 // when it was
	closed    int64 // since when CLOSE, and all before it, waits for any of it to be acknowledged
}

// onTheWay returns the bytes that were published and not acknowledged, without those that are to be published again.
func (q *unackedPackets) onTheWay() (n uint64) {
	left := q.OnTheWay()
	for p := range q.All() {
		if left == 0 {
			break
		}
		n += uint64(len(p.buf))
		left--
	}
	return n
}

// again sees to it that everything from seq on is published again, and reports whether there is anything.
func (q *unackedPackets) again(seq uint32, now, patience int64) bool {
	again, lost := q.Again(seq, now, patience)
	if lost != 0 {
		q.loss.Lost(lost)
	}
	return again
}

// release gives the packets before seq back to the pool and returns how many they were, and the bytes that they kept.
func (q *unackedPackets) release(seq uint32) (n uint32, bytes, memory uint64) {
	n = q.Release(seq, func(p *packet) {
		memory += p.memory()
		bytes += uint64(len(p.buf))
		putPacket(p)
	})
	return n, bytes, memory
}

// grant takes what the consumer acknowledged and granted. Both are absolute, so an old or repeated one changes
// nothing. It returns the bytes of the packets that were acknowledged. Called by the outbox.
func (w *Writer) grant(c Credit) (bytes uint64, err error) {
	if next := w.unacked.Next(); int32(c.Ack-next) > 0 {
		return 0, fmt.Errorf("packet %d acknowledged, %d sent", c.Ack, next)
	}
	n, bytes, memory := w.unacked.release(c.Ack)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.acked += n
	w.freeLocked(memory)
	if int32(c.Packets-w.granted.packets) > 0 {
		w.granted.packets = c.Packets
	}
	w.granted.bytes = max(w.granted.bytes, c.Bytes)
	w.wakeLocked()
	return bytes, nil
}

// releaseSent lets go of what was published. Called by the outbox.
func (w *Writer) releaseSent() {
	_, _, memory := w.unacked.release(w.unacked.Next())
	w.mu.Lock()
	defer w.mu.Unlock()
	w.freeLocked(memory)
}

// releaseAll lets go of everything, because the stream has. Called by the outbox.
func (w *Writer) releaseAll() {
	w.mu.Lock()
	if w.open != nil && !w.turn { // an encoder may be writing into it: then it is the garbage collector's
		putPacket(w.open)
	}
	if w.open != nil && w.n > PacketHeaderSize {
		w.sealed++ // records that are thrown away are never acknowledged
	}
	w.open, w.n, w.fast = nil, 0, nil
	w.freeLocked(w.kept)
	w.wakeLocked()
	w.mu.Unlock()
	for p := w.nextReady(); p != nil; p = w.nextReady() {
		putPacket(p)
	}
	w.unacked.release(w.unacked.Next())
}

// bind lets a consumer's send half begin: its producer, and what that takes, is known. Called by the outbox.
func (w *Writer) bind(subject string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.subject != "" {
		return
	}
	w.subject = subject
	w.granted = credited{initialPackets, minWindow} // where the subject does not say: nobody offers less
	if t, err := ParseToken(lastToken(subject)); err == nil {
		w.granted = offered(t)
	}
	w.wakeLocked()
}

// stalled reports whether writes wait for the peer's credit.
func (w *Writer) stalled() bool {
	if w.json || !w.waiting.Load() {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.wake != nil && !w.creditLocked()
}

// controlToken is what the token in a producer's control subject says: the window for what its consumer sends. Objects that
// come are in the codec that the request asked for.
func (s *session) controlToken() Token {
	return Token{Codec: MsgPack, LogPackets: uint8(bits.TrailingZeros(initialPackets)), LogBytes: uint8(bits.TrailingZeros64(s.bucket.grantedBytes.Load()))}
}
