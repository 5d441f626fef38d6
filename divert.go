package stream

import (
	"bytes"
	"io"
	"weak"

	"github.com/nats-io/nats.go"
)

// This file passes packets that come to the token of a request of OpenMany to the streams of their senders;
// docs/PROTOCOL.md section 2.8. The mux runs it. It makes the stream of a new responder at once, because a packet that
// had to wait for that would be lost. So it allocates, and it takes the locks of the gathering, of random and of the
// observer. They are held for moments, once for each responder.

// divert handles a packet, or a message of the fallback, that came to the token of s, if that is the token of a request
// of OpenMany. It reports whether it is.
func (ep *endpoint) divert(s *session, m *nats.Msg) bool {
	g := s.gathering()
	if g == nil || g.request != s || len(m.Data) == 0 {
		return false
	}
	h, body, err := ParsePacketHeader(m.Data)
	if err != nil {
		if m.Data[0] != PacketMagic {
			ep.counters.foreign.Add(1)
			g.refuse(0, &CloseError{CloseUnsupportedData, "a producer speaks only the JSON fallback, in which several cannot be told apart: use Client.Open for it"})
		} else {
			ep.counters.malformed.Add(1)
		}
		return true
	}
	to, known := g.routes[h.Sender]
	subject := to.subject
	if !known {
		subject = ep.meet(g, h, body, m)
	}
	if subject != "" {
		ep.receive(&nats.Msg{Subject: subject, Reply: m.Reply, Data: bytes.Clone(m.Data)}, nil)
		g.tellAgain(h.Sender)
	}
	return true
}

// route is where packets of one sender go.
type route struct {
	subject string // of the stream; empty for a sender that refused
	next    int64  // when to tell the sender that subject again, by the endpoint's clock
	wait    int64  // the time from then to the next time
}

// tellAgain sends the PING with the stream's own token again if the sender still uses the token of the request. The
// first one or the proof may have been lost. A sender that never moves is told ever more rarely.
func (g *gathering) tellAgain(sender uint64) {
	ep, to := g.request.ep, g.routes[sender]
	now := ep.clock.Load()
	if now < to.next {
		return
	}
	to.next, to.wait = now+to.wait, 2*to.wait
	g.routes[sender] = to
	if s, ok := ep.find(to.subject[len(ep.prefix):]); ok {
		s.mark(workProbe)
	}
}

// meet returns the subject of the stream for a sender that was not heard before. It returns an empty string if there is
// none, because the sender refuses the request, is not wanted, or has not said where it receives.
func (ep *endpoint) meet(g *gathering, h PacketHeader, body []byte, m *nats.Msg) string {
	if f, _, err := ParseFrame(body); err == nil && h.Flags&PacketSeq == 0 && f.Type == FrameReset {
		g.refuse(h.Sender, &CloseError{Code: int(f.Code), Text: string(f.Payload)})
		return ""
	}
	if checkAnswer(m.Reply) != nil { // the packet with the reply subject was lost, or follows
		ep.counters.early.Add(1) // the sender retransmits that packet, and then this one
		return ""
	}
	subject := g.admit(h.Sender, m.Reply)
	if subject == "" {
		ep.counters.foreign.Add(1)
		ep.answerUnknown(g.request, m)
	}
	return subject
}

// admit makes the stream of a responder that receives at peer. It returns an empty string if the gathering is over.
func (g *gathering) admit(sender uint64, peer string) string {
	ep, o := g.request.ep, &g.options
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.over != nil || ep.draining.Load() {
		return ""
	}
	window := uint64(1) << g.offer.LogBytes // the producer relies on the offer
	ep.windows.First(window)
	st := ep.newStream(g.request.recv.parent, g.request.out.subject, o, window)
	s := &st.session
	s.join(g)
	s.out.peer = peer
	s.bucket.bind(sender)
	g.members.Add(1)
	if e := ep.register(s, g.offer); e != nil {
		s.releaseWindow()
		return ""
	}
	if ob := ep.observer; ob != nil {
		ob.opened(s, s.out.subject, 2)
	}
	if o.patience != 0 {
		s.setPeerTimeout(o.patience)
	}
	s.mark(workProbe)                            // its PING tells the responder the token
	patience := challengePatience * ep.times.Ack // the sender begins no other proof before
	g.routes[sender] = route{s.reply(), ep.clock.Load() + patience, 2 * patience}
	g.heard = ep.now()
	g.request.mark(workBind)
	g.queue, g.all = append(g.queue, st), append(g.all, weak.Make(st))
	if g.answered++; g.answered == o.many.maximum {
		g.endLocked(io.EOF)
	} else {
		g.tellLocked()
	}
	return s.reply()
}

// refuse notes that a responder ended its stream in its first packet. Senders that refused are remembered, so that a
// repeated packet does not count. Strangers can invent them, so there is a bound.
func (g *gathering) refuse(sender uint64, err error) {
	if _, known := g.routes[sender]; known {
		return
	}
	if len(g.routes) < g.options.many.maximum+defaultMaxResponders {
		g.routes[sender] = route{}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.over == nil {
		g.refused++
		g.refusal = err
	}
}
