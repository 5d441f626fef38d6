package stream

import (
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/lifecycle"
)

// This file finds streams across accounts again; docs/PROTOCOL.md section 2.3.2. Both ends write to subjects that a
// NATS server has mapped. A mapping is lost with its server, or when a message is sent to it while nobody listens at
// its end. If both are lost, neither end can send its address to the other. Only the subject of the request still leads
// to the producer. So the consumer asks there for its stream, and both ends prove their new addresses.
//
// The outbox runs all of it, with three exceptions. The callbacks of a server's subscriptions run Server.sought. NATS's
// error callback runs deafen. Registration.hearSought is the goroutine of one registration. listen, hearSought and
// deafen lock Registration.mu.

// crossing is the state that only a stream across accounts has. A producer has it from the request on, a consumer when
// it knows the name of the stream. The outbox owns it.
type crossing struct {
	from  *Registration // at the producer: the registration of the request, where its consumer asks
	token string        // at the consumer: the producer's control token, the name of the stream
	asked int64         // at the consumer: when it last asked for the stream, by the endpoint's time
}

// unnamed reports whether s is a producer's stream across accounts and has not sent its name. After CLOSE was published
// it is too late: the consumer may be done.
func (s *session) unnamed() bool {
	return s.crossing() != nil && s.role == lifecycle.Handler && s.out.life.pinged == 0 && s.out.state.Send < lifecycle.Closing
}

// named stores the name of a stream across accounts, the first that its producer sends.
func (s *session) named(token []byte) {
	if s.role == lifecycle.Consumer && s.crossing() == nil {
		s.whereabouts().crossing = &crossing{token: string(token)}
	}
}

// seek lets the two ends find each other again, if s is a stream across accounts and a question was not answered.
func (o *outbox) seek(s *session) {
	p := s.remote.Load()
	if s.crossing() != nil && (s.out.life.pings > 1 || p != nil && (p.questions > 1 || p.absent)) {
		o.seekNow(s)
	}
}

// seekNow is seek without the condition. A producer subscribes to the subject of the request outside its queue group. A
// consumer asks there, at most once in half of AckTimeout.
func (o *outbox) seekNow(s *session) {
	c, now := s.crossing(), o.ep.now()
	switch {
	case c == nil:
	case s.role == lifecycle.Handler:
		c.from.listen(time.Duration(o.ep.times.Resume))
	case c.asked == 0 || now-c.asked >= o.ep.times.Ack/2:
		c.asked = now
		s.whereabouts().move = nil // an earlier unproved subject may be lost, too
		o.denials.publishes(s.out.subject, now, denialWindow*o.ep.times.Ack)
		// The packet does not have the sender's number, because other subscribers receive it, too.
		p := AppendPacket(o.scratch[:0], PacketHeader{}, Frame{Type: FrameResume, Payload: []byte(c.token)})
		if o.ep.conn.Publish(s.out.subject, s.reply(), p) != nil {
			o.ep.counters.unsent.Add(1)
		}
	}
}

// seeks reports whether s has asked for its stream so recently that the answer may still come.
func (o *outbox) seeks(s *session) bool {
	c := s.crossing()
	return c != nil && c.asked != 0 && o.ep.now()-c.asked < challengePatience*o.ep.times.Ack
}

// answerSought answers the challenge of a producer that was asked for a stream. The answer goes to the reply subject of
// the challenge, because the producer's address may lead nowhere. It goes before any other packet to that subject.
func (o *outbox) answerSought(s *session, c control) {
	if c.packet == nil || !o.seeks(s) || checkAnswer(c.reply) != nil {
		return
	}
	_, b, err := ParsePacketHeader(c.packet)
	if err != nil {
		return
	}
	if f, _, err := ParseFrame(b); err == nil && f.Type == FrameChallenge {
		o.tellAt(s, c.reply, "", Frame{Type: FrameResponse, Payload: f.Payload})
	}
}

// sought handles a message that asks for a stream, and reports whether m is one. The callbacks of the server's
// subscriptions call it.
func (s *Server) sought(m *nats.Msg, from *Registration) bool {
	token := soughtToken(m.Data)
	if token == "" || strings.HasPrefix(m.Subject, s.ep.prefix) || checkReply(m.Reply, from.subject, false) != nil {
		return false
	}
	s.ep.outbox.doLater(outOfStream{subject: m.Reply, sought: token})
	return true
}

// soughtToken returns the name of the stream that b asks for, or an empty string.
func soughtToken(b []byte) string {
	h, body, err := ParsePacketHeader(b)
	if err != nil || h.Flags&PacketSeq != 0 || h.Sender != 0 {
		return ""
	}
	f, _, err := ParseFrame(body)
	if err != nil || f.Type != FrameResume {
		return ""
	}
	return string(f.Payload)
}

// sought challenges the consumer that asks for the stream with token, at subject. Every subscriber of the request's
// subject has seen the name and can ask, or replay a question. The answer to the challenge proves that it is the
// consumer, because it needs the consumer's sender number. A member of the queue group that does not know the stream
// sends nothing.
func (o *outbox) sought(token, subject string) {
	s, ok := o.ep.find(token)
	if !ok {
		if e := o.ended.find(token, o.time()); e != nil {
			o.publishEnd(e, subject)
		} else {
			o.ep.counters.strays.Add(1)
		}
		return
	}
	now := o.ep.now()
	if s.crossing() == nil || s.role != lifecycle.Handler || s.end.Load() != nil || !o.connected() ||
		s.move() != nil && s.move().lost && now-s.move().at < o.ep.times.Ack {
		return
	}
	o.tellAt(s, subject, s.reply(), s.moveTo(subject, now, true), Frame{Type: FramePing})
}

// listen subscribes to the subject of r outside its queue group, for d. NATS gives a message to one member of a group
// and prefers a near one, so a consumer that asks for its stream might never reach this server. The outbox calls it.
func (r *Registration) listen(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.listens = time.Now().Add(d)
	if r.listening || r.deaf || r.queue == "" && r.unsubscribe != nil {
		return
	}
	r.listening = true
	r.server.helpers.Go(r.hearSought)
}

// hearSought is the goroutine of listen. It ends at the time that listen last set, or with the server.
func (r *Registration) hearSought() {
	s := r.server
	unsubscribe := r.hear()
	defer func() { unsubscribe() }()
	for {
		r.mu.Lock()
		left := time.Until(r.listens)
		over := left <= 0 || s.ep.ctx.Err() != nil
		if over {
			r.listening = false
		}
		r.mu.Unlock()
		if over {
			return
		}
		select {
		case <-time.After(left):
		case <-r.relisten:
			unsubscribe()
			unsubscribe = r.hear()
		case <-s.ep.ctx.Done():
		}
	}
}

// hear makes the subscription of hearSought.
func (r *Registration) hear() (unsubscribe func()) {
	unsubscribe, err := r.server.ep.conn.Subscribe(r.subject, "", func(m *nats.Msg) { r.server.sought(m, r) })
	if err != nil { // the connection is closed or drains
		return func() {}
	}
	return unsubscribe
}

// deafen records that NATS lets the server subscribe to the subject only in its queue group.
func (r *Registration) deafen() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.deaf = true
}
