package stream

import (
	"sync/atomic"

	"github.com/natsstream/stream/internal/ring"
)

// outbox is the one goroutine of an endpoint that publishes: requests, packets, credits, resets. Writers, readers and
// the mux mark a session and never call NATS themselves, because a publish can block for as long as the connection
// does, and a caller's context must be able to end the caller's wait. Sessions are served in turn, a packet a turn, so
// that a stream with much to say delays another by one packet.
//
// Queueing: session.pending is a set of work bits. Whoever sets the first bit pushes the session on the queue; the
// outbox clears all bits when it begins to serve. So a session is on the queue at most once, and work that is marked
// while it is being served brings it back.
type outbox struct {
	ep    *endpoint
	queue atomic.Pointer[session] // a stack; the outbox takes all of it and turns it round
	park  parker
	up    atomic.Bool // the connection is CONNECTED

	inbound ring.Ring[control] // mux pushes, outbox pops

	stopping atomic.Bool
	done     chan struct{}

	// Owned by the goroutine.
	held    []*session // have something to publish, and the connection is down
	scratch []byte
}

// Kinds of work, bits of session.pending.
const (
	workRequest = 1 << iota // publish the request
	workPackets             // the writer has packets
	workCredit              // tell the peer what was consumed
	workProbe               // ask the consumer what it got and grants
	workEnd                 // the session ended: tell the peer, let go of the buffers
)

// control is what the mux leaves to the outbox: a packet of control frames, or news from a data packet's envelope.
type control struct {
	session *session // nil for a token that is not in use
	reply   string   // the peer's subject, where the message had one
	packet  []byte   // frames to act on, or nil
	sender  uint16   // of a packet for a token that is not in use
}

// maxInbound bounds the control packets that wait for the outbox. A stream whose packet does not fit ends.
const maxInbound = 1 << 16

// maxControlPacket bounds one control packet: a RESET with the longest reason, and room for later frame types.
const maxControlPacket = 4 << 10

func (o *outbox) init(ep *endpoint) {
	o.ep = ep
	o.park.init()
	o.inbound.Init(maxInbound)
	o.done = make(chan struct{})
	o.scratch = make([]byte, 0, PacketHeaderSize+FrameHeaderSize+MaxReason)
}

// mark gives the session work. It neither blocks nor locks.
func (s *session) mark(work uint32) {
	if s.pending.Or(work) != 0 {
		return // queued, or about to be served
	}
	o := &s.ep.outbox
	o.push(s)
	o.park.wake()
}

func (o *outbox) push(s *session) {
	for {
		head := o.queue.Load()
		s.next = head // published by the swap below
		if o.queue.CompareAndSwap(head, s) {
			return
		}
	}
}

// take empties the queue and returns it in the order in which it was filled.
func (o *outbox) take() *session {
	if o.queue.Load() == nil {
		return nil
	}
	var first *session
	for s := o.queue.Swap(nil); s != nil; {
		next := s.next
		s.next = first
		first, s = s, next
	}
	return first
}

// deliver hands a control word over. One that finds no room is counted, and its stream ends: it might have been the
// credit, or the subject, without which the stream would wait for ever. Called by the mux alone.
func (o *outbox) deliver(c control) {
	if !o.inbound.Push(c) {
		o.ep.counters.overrun.Add(1)
		if c.session != nil {
			e := protocolError(CloseTryAgainLater, "control packets came faster than they could be acted on")
			c.session.endFromMux(&ending{err: e, tell: *e})
		}
	}
	o.park.wake()
}

func (o *outbox) run() {
	defer close(o.done)
	for {
		worked := o.receive()
		if len(o.held) > 0 && o.up.Load() {
			o.serveHeld()
			worked = true
		}
		for s := o.take(); s != nil; worked = true {
			next := s.next
			s.next = nil // a session must not keep another alive
			o.serve(s, s.pending.Swap(0))
			s = next
			o.receive() // an acknowledgement frees what the next packet needs
		}
		if worked {
			continue
		}
		if o.stopping.Load() {
			o.serveHeld() // if the connection is down, nothing waits for it any longer
			return
		}
		o.park.announce()
		if o.idle() {
			o.park.wait()
		} else {
			o.park.retract()
		}
	}
}

func (o *outbox) idle() bool {
	return o.queue.Load() == nil && o.inbound.Empty() && !o.stopping.Load() && (len(o.held) == 0 || !o.up.Load())
}

// stop lets the outbox finish what is marked and returns when it has.
func (o *outbox) stop() {
	o.stopping.Store(true)
	o.park.wake()
	<-o.done
}

// receive acts on the control packets that arrived.
func (o *outbox) receive() (worked bool) {
	for {
		c, ok := o.inbound.Pop()
		if !ok {
			return worked
		}
		worked = true
		s := c.session
		if s == nil {
			o.refuse(c)
			continue
		}
		if c.reply != "" && s.writer == nil {
			s.peer = c.reply
			if s.owed {
				s.owed = false
				s.mark(workCredit)
			}
			if end := s.end.Load(); s.finished && end.tell.Code != 0 { // the mux took the packet just before the end
				s.finished = false
				o.finish(s, end)
			}
		}
		if c.packet != nil {
			if ce := o.frames(s, c.packet[PacketHeaderSize:]); ce != nil {
				s.finish(&ending{err: ce, tell: *ce})
			}
		}
	}
}

// refuse tells the sender of a packet that its stream does not exist. The answer carries the sender's own number,
// which nobody else knows. Senders ask rarely, with a first packet or a PING, and what waits to be answered is bounded
// by the inbound ring.
func (o *outbox) refuse(c control) {
	if !o.up.Load() {
		return
	}
	f := Frame{Type: FrameReset, Code: CloseCanceled, Payload: unknownStream}
	if o.ep.gone.Load() != nil {
		f.Code = CloseGoingAway
	}
	o.publish(c.reply, "", AppendFrame(AppendPacketHeader(o.scratch[:0], PacketHeader{Sender: c.sender}), f))
}

var unknownStream = []byte("no such stream")

// frames acts on the frames of a control packet; docs/PROTOCOL.md section 5. What it returns ends the stream.
func (o *outbox) frames(s *session, b []byte) *CloseError {
	if len(b) == 0 {
		return protocolError(CloseProtocolError, "control packet without a frame")
	}
	for len(b) > 0 {
		f, rest, err := ParseFrame(b)
		if err == nil && !(PacketHeader{}).Allows(f.Type) {
			err = ErrMisplaced
		}
		if err != nil {
			return protocolError(CloseUnsupportedData, "control packet: %v", err)
		}
		switch b = rest; f.Type {
		case FrameCredit:
			c, err := ParseCredit(f.Payload)
			if err == nil && s.writer != nil {
				err = s.writer.credit(c)
			}
			if err != nil {
				return protocolError(CloseProtocolError, "%v", err)
			}
		case FramePing:
			s.mark(workCredit)
		case FrameReset:
			s.finish(&ending{err: &CloseError{Code: int(f.Code), Text: string(f.Payload)}, now: true})
			return nil
		}
	}
	return nil
}

// hold keeps work for s until the connection is back.
func (o *outbox) hold(s *session, work uint32) {
	if s.held == 0 {
		o.held = append(o.held, s)
	}
	s.held |= work
}

// serveHeld serves the sessions that waited for the connection.
func (o *outbox) serveHeld() {
	held := o.held
	o.held = nil
	for _, s := range held {
		work := s.held
		s.held = 0
		o.serve(s, work)
		o.receive() // an end may have arrived that leaves nothing to publish
	}
}

// serve does work for s, of its packets at most one.
func (o *outbox) serve(s *session, work uint32) {
	end := s.end.Load()
	if gone := o.ep.gone.Load(); end == nil && gone != nil {
		s.finish(gone)
		end = gone
	}
	if end != nil {
		o.finish(s, end)
		return
	}
	if !o.up.Load() {
		o.hold(s, work)
		return
	}
	if work&workRequest != 0 {
		if err := o.ep.conn.publishMsg(s.request); err != nil {
			s.finish(&ending{err: err})
			return
		}
		s.request = nil
	}
	if work&workCredit != 0 && s.peer == "" {
		s.owed = true // the reader, or the mark of the mux, was faster than the subject on the inbound ring
	} else if work&workCredit != 0 {
		var payload [creditSize]byte
		o.tell(s, "", Frame{Type: FrameCredit, Payload: AppendCredit(payload[:0], s.bucket.credit())})
	}
	if work&workProbe != 0 && s.writer.sent.next > 0 {
		o.tell(s, s.reply, Frame{Type: FramePing})
	}
	if work&workPackets != 0 && s.writer.publishNext(o.ep.conn) {
		s.mark(workPackets)
	}
}

// finish does the outbox's part of ending a session, once.
func (o *outbox) finish(s *session, end *ending) {
	if s.finished {
		return
	}
	s.unregister()
	s.request = nil
	if s.writer != nil {
		s.writer.cancel(end.err)
		s.writer.ended()
	}
	if end.tell.Code != 0 && s.peer != "" {
		if o.up.Load() {
			o.tellEnd(s, end.tell)
		} else if o.ep.gone.Load() == nil {
			o.hold(s, workEnd) // a peer that is not told would wait for ever
			return
		}
	}
	s.finished = true
}

// tellEnd tells the peer of s that the stream ended early.
func (o *outbox) tellEnd(s *session, e CloseError) {
	e.Text = cutReason(e.Text, o.ep.reasonLimit())
	if s.binary() {
		o.tell(s, "", Frame{Type: FrameReset, Code: uint16(e.Code), Payload: []byte(e.Text)})
	} else {
		o.publish(s.peer, "", appendJSONClose(nil, e))
	}
}

// tell publishes one control frame to the peer of s. Its sequence number is that of the next packet, so that the peer
// sees what it missed.
func (o *outbox) tell(s *session, reply string, f Frame) {
	h := PacketHeader{Sender: s.sender}
	if s.writer != nil {
		h.Seq = s.writer.sent.next
	}
	o.publish(s.peer, reply, AppendFrame(AppendPacketHeader(o.scratch[:0], h), f))
}

// publish publishes what is not a stream's data. A failure is counted and not the stream's end: credit is said again
// after a reconnect, and a connection that takes no more bytes is noticed by itself.
func (o *outbox) publish(subject, reply string, data []byte) {
	if err := o.ep.conn.publish(subject, reply, data); err != nil {
		o.ep.counters.unsent.Add(1)
	}
}

// binary reports whether the peer understands packets. Called by the outbox.
func (s *session) binary() bool { return s.writer == nil || !s.writer.json }
