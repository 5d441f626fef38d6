package stream

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/flow"
	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/lifecycle"
)

// This file handles control packets: the mux passes them to the outbox, and the outbox acts on them and sends its own;
// docs/PROTOCOL.md sections 5, 7 and 9.3. The outbox runs all of it, except deliver and hasRoom, which the mux runs.
// Both run control.size.

// control is work that the mux passes to the outbox: a control packet, the reply subject of a data packet, or a 503 of
// NATS.
type control struct {
	session *session // the one with the token of the message, nil if there is none
	reply   string   // the reply subject of the message, or empty
	packet  []byte   // frames to act on, or nil. If token is set, the nonce of a RESPONSE, or nil
	token   string   // set if no stream accepts the message: its token is unknown, or its session has ended
	sender  uint64   // sender number of the packet, if token is set
	absent  bool     // NATS reported that nobody received the message
}

// Bounds of the control packets that wait for the outbox, because a publish may block it. A flood on one stream must
// neither fill the ring nor keep the outbox from other streams.
const (
	maxInbound      = 1 << 16
	maxInboundBytes = 16 << 20 // of packets and reply subjects, and controlSize for each control
	controlSize     = 64
	maxControls     = 32 // of one stream. An honest peer has a few under way: a CREDIT for each quarter of a window, and a PING
	controlTurn     = 64 // acted on before the next session has its turn
)

// maxControlPacket bounds one control packet: a RESET with the longest reason, and room for later frame types.
const maxControlPacket = 4 << 10

// deliver passes c to the outbox. If there is no room, c is dropped and counted. Its peer repeats a dropped control
// packet when it is asked, as one that NATS lost. Only the mux calls deliver.
func (o *outbox) deliver(c control) {
	if n := c.size(); !o.hasRoom(c.session, n) || !o.inbound.Push(c) {
		o.ep.counters.overrun.Add(1)
		if s := c.session; s != nil && s.controls-s.acted.Load() < maxControls { // if maxControls of s wait, one dropped does no harm
			o.dropped.Store(true)
		}
	} else {
		o.delivered += n
		if s := c.session; s != nil {
			s.controls++
		}
	}
	o.park.Wake()
}

func (c control) size() uint64 { return controlSize + uint64(len(c.packet)+len(c.reply)+len(c.token)) }

// hasRoom reports whether n more bytes for s may wait. s is nil for a stranger; strangers leave room for streams.
func (o *outbox) hasRoom(s *session, n uint64) bool {
	n += o.delivered - o.acted.Load()
	if s == nil {
		return n <= maxInboundBytes/4 && o.inbound.Len() <= maxInbound/4
	}
	return n <= maxInboundBytes && s.controls-s.acted.Load() < maxControls
}

// receive acts on the next control packets, at most controlTurn of them, because they may arrive as fast as receive
// handles them.
func (o *outbox) receive() (worked bool) {
	for range controlTurn {
		c, ok := o.inbound.Pop()
		if !ok {
			return worked
		}
		worked = true
		o.acted.Store(o.acted.Load() + c.size())
		s := c.session
		if s != nil {
			s.acted.Store(s.acted.Load() + 1)
		}
		if c.token != "" {
			o.resetUnknown(c)
			continue
		}
		if !c.absent {
			o.noteAlive(s)
		}
		switch {
		case c.reply != "":
			o.answerSought(s, c)
			o.setPeer(s, c.reply)
		case c.absent:
			o.absent(s)
		}
		if c.packet != nil {
			if ce := o.takeControl(s, c.packet); ce != nil {
				s.requestEnd(&ending{kind: endFault, err: ce, reset: *ce})
			}
		}
	}
	return worked
}

// learned does the work that was deferred until the address of the peer is known.
func (o *outbox) learned(s *session) {
	if s.out.state.Phase == lifecycle.Gone {
		o.settleRequest(s, string(s.token[:])) // the table resets the producer
	}
	s.answered()
	o.step(s, lifecycle.PeerKnown)
	if s.out.state.Phase == lifecycle.Live && o.ep.draining.Load() {
		o.sendEnd(s, drained)
	}
	if s.out.deferredUntilPeer != 0 {
		s.mark(s.out.deferredUntilPeer)
		s.out.deferredUntilPeer = 0
	}
}

// answered informs the options of Open that the request was answered, or that the stream ended without an answer.
func (s *session) answered() {
	x := s.extras.Load()
	if x == nil {
		return
	}
	if x.answered != nil {
		close(x.answered)
		x.answered = nil
	}
	x.answer.CompareAndSwap(notAnswered, answerInTime)
	if timer := x.opening.Load(); timer != nil {
		timer.Stop()
	}
}

// bind raises the events of a consumer's new send half, and of a producer that speaks the fallback. A request of
// OpenMany is answered by its first responder, and ends with its gathering.
func (o *outbox) bind(s *session) {
	if g := s.gathering(); g != nil && g.request == s {
		s.out.life.took = 0 // no answer is missing after a reconnect
		s.answered()
		if e := g.ending(); e != nil {
			s.requestEnd(e)
		}
		return
	}
	if s.peerTakesNone() {
		s.answered()
	}
	if s.send.Load() != nil && s.out.state.Send == lifecycle.NoSender {
		o.step(s, lifecycle.Written)
		if s.out.peer != "" {
			o.step(s, lifecycle.PeerKnown)
		}
	}
	if s.peerTakesNone() && s.out.state.Send <= lifecycle.Waiting {
		o.step(s, lifecycle.PeerIsJSON)
	}
}

// resetUnknown answers a packet that belongs to no stream with a RESET. The answer carries the sender's own number,
// which only that sender knows. Such packets are rare, a first packet or a PING, and the inbound ring bounds those that
// wait for an answer.
func (o *outbox) resetUnknown(c control) {
	if c.absent { // nobody received the request of a stream that has ended
		o.settleRequest(c.session, c.token)
		return
	}
	if c.packet != nil {
		if !o.trialAnsweredLate(c.packet) {
			o.ep.counters.unknown.Add(1)
		}
		return
	}
	if !o.up.Load() || checkAnswer(c.reply) != nil || o.repeatEnd(c) {
		return
	}
	o.settleRequest(c.session, c.token)
	f := Frame{Type: FrameReset, Code: CloseCanceled, Payload: unknownStream}
	if o.ep.gone.Load() != nil {
		f.Code = CloseGoingAway
	} else if s, ok := o.ep.find(c.token); ok && s.gathering() != nil {
		f.Payload = enoughResponders
	}
	o.ep.publish(c.reply, "", AppendPacket(o.scratch[:0], PacketHeader{Sender: c.sender}, f))
}

var (
	unknownStream    = []byte("no such stream")
	enoughResponders = []byte("the consumer takes no more responders")
)

// takeControl acts on the frames of a control packet; docs/PROTOCOL.md section 5. An error that it returns ends the
// stream.
func (o *outbox) takeControl(s *session, packet []byte) *CloseError {
	h, b, err := ParsePacketHeader(packet)
	if err != nil || len(b) == 0 {
		return protocolError(CloseProtocolError, "control packet without a frame")
	}
	var challenge, question []byte
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
			if snd := s.send.Load(); err == nil && snd != nil {
				err = o.takeCredit(snd, c, f.Flags&FlagGap != 0)
			} else if err == nil && c.Ack != 0 {
				err = fmt.Errorf("packet %d acknowledged, none sent", c.Ack)
			}
			if err != nil {
				return protocolError(CloseProtocolError, "%v", err)
			}
		case FramePing:
			s.mark(workCredit)
		case FrameChallenge:
			challenge = f.Payload
		case FrameResponse:
			if err := o.proved(s, f.Payload); err != nil {
				return protocolError(CloseProtocolError, "%v", err)
			}
		case FrameResume:
			s.named(f.Payload)
		case FrameFragment:
			if question = f.Payload; len(question) != fragmentSize { // the mux takes one with bytes, if it is alone
				return protocolError(CloseProtocolError, "FRAGMENT is not alone in its packet")
			}
		case FrameProgress:
			o.takeProgress(s, f.Payload)
		case frameEnvelopes:
			o.knowsEnvelopes(s)
		case FrameReset:
			// Packets that arrived before can still be read: a CLOSE may be among them.
			e := &CloseError{Code: int(f.Code), Text: string(f.Payload)}
			if s.role == lifecycle.Consumer {
				s.requestEnd(s.resetByProducer(h, e))
			} else {
				s.requestEnd(s.resetByConsumer(h, e))
			}
			return nil
		}
	}
	o.answer(s, challenge, question)
	return nil
}

// answer answers the last CHALLENGE and the last question of a packet, for any number of them in it.
func (o *outbox) answer(s *session, challenge, question []byte) {
	if challenge == nil && question == nil || s.out.peer == "" || !o.connected() {
		return
	}
	if challenge != nil {
		o.sendControl(s, "", Frame{Type: FrameResponse, Payload: challenge})
	}
	if question != nil {
		o.answerProgress(s, question)
	}
}

// resetByProducer returns how a RESET ends a consumer's stream; docs/PROTOCOL.md sections 9.3 and 12.3.
func (s *session) resetByProducer(h PacketHeader, e *CloseError) *ending {
	end := &ending{kind: endReset, err: e}
	arrived := s.bucket.ring.Pushed() > 0
	switch {
	case h.Sender == s.senderNumber:
		end.err = &CloseError{CloseAbnormalClosure, "the producer does not know the stream any longer"}
	case e.Code == CloseNormalClosure: // the acknowledged CLOSE that must come before it did not arrive
		end.err = &CloseError{CloseAbnormalClosure, "the producer reset the stream and did not close it"}
	case e.Code == CloseTryAgainLater && s.out.peer == "" && !arrived:
		end.err = refusal{e}
	default:
		end.err = s.resetError(e)
	}
	if arrived && (h.Sender == s.senderNumber || e.Code == CloseNormalClosure) {
		end.kind = endPeerDone
	}
	return end
}

// resetError returns the error for a RESET. The two ends of a stream share a deadline, but each has a timer. The error
// is the same for either timer.
func (s *session) resetError(e *CloseError) error {
	if _, ok := s.recv.parent.Deadline(); ok && e.Code == CloseDeadlineExceeded {
		return fmt.Errorf("%w: %w", e, context.DeadlineExceeded)
	}
	return e
}

// resetByConsumer returns how a RESET ends a producer's stream; docs/PROTOCOL.md sections 9.3 and 12.3.
func (s *session) resetByConsumer(h PacketHeader, e *CloseError) *ending {
	end := &ending{kind: endReset, err: s.resetError(e)}
	if s.out.state.Send < lifecycle.Closing {
		return end
	}
	normal := e.Code == CloseNormalClosure
	if normal && s.bucket.ring.Pushed() == 0 && h.Seq == 0 {
		end.err = io.EOF // a consumer that never wrote leaves
	}
	if normal || h.Sender == s.senderNumber { // the consumer may have forgotten a complete stream
		end.kind = endComplete
	}
	return end
}

// takeCredit handles a CREDIT: the peer's acknowledgement, its grant, and its report of missing packets.
func (o *outbox) takeCredit(snd *sender, c Credit, missing bool) error {
	s, q := snd.session, &snd.unacked
	if s.out.state.Phase != lifecycle.Live {
		return nil
	}
	c, missing = o.withhold(s, c, missing)
	before := q.Acked()
	bytes, err := snd.grant(c)
	if err != nil {
		return err
	}
	o.envelopePassed(s, q)
	o.offLine(s, c.Ack, bytes)
	if o.takePassed(s, q) {
		s.mark(workPackets)
	}
	if n := q.Acked() - before; n != 0 {
		s.out.life.asks = 0
		if now := o.time(); q.closed != 0 && o.lingers(q, now) {
			q.closed = now
		}
		if q.loss.Arrived(n, maxPackets) {
			s.mark(workPackets)
		}
	}
	if o.takeRefusal(snd, c) {
		return nil
	}
	if q.waits {
		s.mark(workPackets)
	}
	again, lost := false, uint64(0)
	if missing {
		again, lost = q.again(c.Ack, o.time(), o.ep.times.Ack/2)
	}
	switch {
	case again:
		snd.uninvite()
		o.lostOnLine(s, lost)
		s.mark(workPackets)
	case q.closed != 0 && q.Empty():
		o.step(s, lifecycle.CloseAcked)
	}
	return nil
}

// takeRefusal reports whether c is a refusal: the peer has no room for packets that it granted. These packets are not
// on their way, and were not too large. The outbox publishes nothing before the peer has room. A stream that has closed
// goes on waiting and asking; docs/PROTOCOL.md section 8.
func (o *outbox) takeRefusal(snd *sender, c Credit) bool {
	s, q := snd.session, &snd.unacked
	before := q.refused
	q.refused = c.refuses() && c.Ack == q.Acked() && !q.Empty()
	if !q.refused {
		if before {
			s.mark(workPackets)
		}
		return false
	}
	now := o.time()
	if again, lost := q.again(c.Ack, now, 0); again {
		o.lostOnLine(s, lost)
	}
	if !before {
		snd.uninvite()
		q.pardon()
		q.passing.Refused()
	}
	if q.closed != 0 && o.lingers(q, now) {
		q.closed = now
		s.out.life.asks = min(s.out.life.asks, 1) // ResumeTimeout must not end before it is asked again
	}
	return true
}

// sendCredit acknowledges the packets that arrived and grants credit.
func (o *outbox) sendCredit(s *session, flags FrameFlags) {
	switch {
	case s.json():
	case s.out.peer == "":
		s.out.deferredUntilPeer |= workCredit // the reply subject may still be on the ring from the mux
		if flags&FlagGap == 0 {
			break
		}
		s.out.deferredUntilPeer |= workGap
		if s.suspect() == 0 { // the packet with the reply subject may be missing as well
			now := o.time()
			s.extra().suspect = now
			o.schedule(s, now+o.ep.times.Resume)
		}
	default:
		o.publishCredit(s, flags, s.bucket.credit())
	}
}

// sendRefusal informs the peer that a packet found no room. It sends a refusal if there is room again, because the
// credit of sendCredit is no refusal then. Without it, the peer would take the packet for lost on its way, and might
// suspect its size.
func (o *outbox) sendRefusal(s *session) {
	if s.out.peer != "" && !s.json() && !s.bucket.dropped.Load() {
		o.publishCredit(s, 0, s.bucket.credit().refusing())
	}
}

func (o *outbox) publishCredit(s *session, flags FrameFlags, c Credit) {
	var payload [creditSize]byte
	f := Frame{Type: FrameCredit, Flags: flags, Payload: AppendCredit(payload[:0], c)}
	if takesStatement(s) {
		o.tellAt(s, s.out.peer, "", f, Frame{Type: frameEnvelopes})
	} else {
		o.sendControl(s, "", f)
	}
}

// sendEnd sends the peer of s the early end of the stream: RESET, or a close message of the fallback.
func (o *outbox) sendEnd(s *session, e CloseError) {
	e.Text = cutReason(e.Text, o.ep.reasonLimit())
	if s.peerTakesJSON() {
		o.ep.publish(s.out.peer, "", jsonwire.AppendClose(nil, jsonwire.Close(e)))
	} else {
		o.sendControl(s, "", Frame{Type: FrameReset, Code: uint16(e.Code), Payload: []byte(e.Text)})
	}
}

// sendControl publishes one control frame to the peer of s. Its sequence number is that of the packet to be published
// next, new or retransmitted, so that the peer notices if it missed any packet before.
func (o *outbox) sendControl(s *session, reply string, f Frame) { o.tellAt(s, s.out.peer, reply, f) }

// tellAt sends control frames as sendControl does, to a subject that may not be the address of the peer.
func (o *outbox) tellAt(s *session, subject, reply string, frames ...Frame) {
	h := PacketHeader{Sender: s.senderNumber}
	if snd := s.send.Load(); snd != nil {
		h.Seq = snd.unacked.Cursor()
	}
	packet := AppendPacket(o.scratch[:0], h, frames...)
	if subject != s.out.peer {
		_ = o.ep.publish(subject, reply, packet)
		return
	}
	_, err := o.send(s, nil, reply, packet, false)
	if err != nil {
		o.ep.counters.unsent.Add(1)
	}
	if errors.Is(err, nats.ErrBadSubject) {
		s.requestEnd(unwritable(err))
	}
}

// answerProgress answers how much of the expected packet has arrived in fragments. The mux has handled everything that
// was published before the question.
func (o *outbox) answerProgress(s *session, question []byte) {
	asked, _ := ParseFragment(question)
	at := Fragment{Packet: s.bucket.ring.Pushed(), Question: asked.Question}
	if p := s.bucket.ring.Between.fragments.Load(); p != nil {
		if progress := p.progress.Load(); uint32(progress>>32) == at.Packet {
			at.Offset = uint32(progress)
		}
	}
	var payload [fragmentSize]byte
	o.sendControl(s, "", Frame{Type: FrameProgress, Payload: AppendFragment(payload[:0], at)})
}

// askProgress asks the peer how much arrived of the packet that it misses. The question is small and goes behind the
// packet, so the answer also shows that small messages pass.
func (o *outbox) askProgress(snd *sender) {
	q := &snd.unacked
	var payload [fragmentSize]byte
	o.sendControl(snd.session, "", Frame{Type: FrameFragment, Payload: AppendFragment(payload[:0], Fragment{Packet: q.Acked(), Question: q.passing.Ask()})})
}

// takeProgress handles the answer to askProgress.
func (o *outbox) takeProgress(s *session, payload []byte) {
	snd := s.send.Load()
	at, err := ParseFragment(payload)
	if snd == nil || snd.unacked.passing == nil || err != nil {
		return
	}
	q, now := &snd.unacked, o.time()
	if q.passing.Answer(at.Packet, int(min(at.Offset, flow.MaxPacket)), at.Question, now) && q.closed != 0 && o.lingers(q, now) {
		q.closed = now
	}
	if size, hopeless := q.passing.Hopeless(now, o.ep.times.Resume/2); hopeless {
		s.requestEnd(doesNotPass(size))
	}
}

// takePassed records the sizes of the packets that the peer acknowledged just now. It reports whether waiting packets
// may go.
func (o *outbox) takePassed(s *session, q *unackedPackets) (more bool) {
	l := s.out.line
	if l == nil {
		return false
	}
	l.sizes.Passed(int(q.whole))
	q.whole = 0
	return q.passing != nil && q.passing.Acked(q.Acked(), &l.sizes, o.time())
}
