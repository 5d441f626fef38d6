package stream

import (
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/lifecycle"
)

// This file is about streams across accounts; docs/PROTOCOL.md section 2.3.2. Both ends write to subjects that a NATS server has
// mapped, and a mapping goes with its server, or when somebody writes to it while nobody listens at its end. If both are gone,
// neither end can tell the other where it is. The subject of the request is the only one that still leads from account to
// account. So the consumer asks there for its stream, and the two prove their new addresses to each other.

// crossing is what a stream across accounts has beyond others. A producer has it from the request on, a consumer when it knows
// the stream's name. The outbox owns it.
type crossing struct {
	from  *Registration // at the producer: where the request arrived, and consumers ask
	token string        // at the consumer: the producer's, which names the stream
	asked int64         // at the consumer: when it asked for the stream last, by the endpoint's time
}

// unnamed reports whether s is a stream across accounts whose consumer was not told the name yet. After CLOSE was published it
// is too late: the consumer may be done.
func (s *session) unnamed() bool {
	return s.crossing() != nil && s.role == lifecycle.Handler && s.out.life.pinged == 0 && s.out.state.Send < lifecycle.Closing
}

// named notes the name of a stream across accounts, the first that its producer gives.
func (s *session) named(token []byte) {
	if s.role == lifecycle.Consumer && s.crossing() == nil {
		s.whereabouts().crossing = &crossing{token: string(token)}
	}
}

// seek does what one end can do to find the other, if s is a stream across accounts and a question was not answered.
func (o *outbox) seek(s *session) {
	p := s.remote.Load()
	if s.crossing() != nil && (s.out.life.pings > 1 || p != nil && (p.questions > 1 || p.absent)) {
		o.seekNow(s)
	}
}

// seekNow is seek without the question. A producer listens, beside its queue group, at the subject of the request. A consumer asks
// there, not more often than an answer takes.
func (o *outbox) seekNow(s *session) {
	c, now := s.crossing(), o.ep.now()
	switch {
	case c == nil:
	case s.role == lifecycle.Handler:
		c.from.listen(time.Duration(o.ep.times.Resume))
	case c.asked == 0 || now-c.asked >= o.ep.times.Ack/2:
		c.asked = now
		s.out.whereabouts.move = nil // a subject that was named before may be gone too
		o.denials.publishes(s.out.subject, now, denialWindow*o.ep.times.Ack)
		// The sender's number is not told: others may hear this, as other members of the queue group do.
		p := AppendPacket(o.scratch[:0], PacketHeader{}, Frame{Type: FrameResume, Payload: []byte(c.token)})
		if o.ep.conn.Publish(s.out.subject, s.reply, p) != nil {
			o.ep.counters.unsent.Add(1)
		}
	}
}

// seeks reports whether s has asked for its stream a moment ago.
func (o *outbox) seeks(s *session) bool {
	c := s.crossing()
	return c != nil && c.asked != 0 && o.ep.now()-c.asked < challengePatience*o.ep.times.Ack
}

// answerSought answers the challenge that a producer sends when it was asked for a stream. The answer goes to where the challenge
// says, because the producer's address may lead nowhere. It goes before anything else is sent there.
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

// sought takes a message that asks for a stream, and reports whether m is one. Subscriptions of the server call it.
func (s *Server) sought(m *nats.Msg, from *Registration) bool {
	token := soughtToken(m.Data)
	if token == "" || strings.HasPrefix(m.Subject, s.ep.prefix) || checkReply(m.Reply, from.subject, false) != nil {
		return false
	}
	s.ep.outbox.doLater(outOfStream{subject: m.Reply, sought: token})
	return true
}

// soughtToken returns the name of the stream that b asks for, empty if b does not ask for one.
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

// sought challenges the consumer that asks at subject for the stream with token. Whoever has heard the name can ask, and asks again
// with what others said. So an answer to the challenge, which takes the consumer's number, must show that it is the consumer.
// Another member of the queue group does not know the stream and says nothing.
func (o *outbox) sought(token, subject string) {
	s, ok := o.ep.sessions.Load(token)
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
	o.tellAt(s, subject, s.reply, s.moveTo(subject, now, true), Frame{Type: FramePing})
}

// listen has r hear its subject beside its queue group for d. NATS gives a message to one member of a group, and prefers a near
// one, so a consumer that asks for its stream might never reach this server. The outbox calls it.
func (r *Registration) listen(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.listens = time.Now().Add(d)
	if r.listening || r.deaf || r.queue == "" && r.unsubscribe != nil {
		return
	}
	r.listening = true
	r.server.listeners.Go(r.hearSought)
}

// hearSought is the goroutine of listen. It ends when nobody has called listen for a while, or with the server.
func (r *Registration) hearSought() {
	s := r.server
	unsubscribe, err := s.ep.conn.Subscribe(r.subject, "", func(m *nats.Msg) { s.sought(m, r) })
	if err == nil {
		defer unsubscribe()
	}
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
		case <-s.ep.ctx.Done():
		}
	}
}

// deafen takes NATS's word that the server may subscribe to the subject only in its queue group.
func (r *Registration) deafen() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.deaf = true
}
