package stream

import (
	"crypto/rand"

	"github.com/natsstream/stream/internal/lifecycle"
)

// This file follows the address of a peer; docs/PROTOCOL.md section 2.3. The outbox runs all of it, except whereabouts:
// for a new stream, the callback of a server's subscription runs it, before the outbox knows the stream. An address may
// change, because NATS maps a reply subject anew for each message that crosses accounts. A peer may also name a subject
// that is not its own. So the outbox sends nothing but a challenge to a new subject until the peer has proved that it
// receives there. Before that proof, the first subject of a producer gets at most unprovedBytes.

// move is a subject that the peer of a stream named and has not proved yet.
type move struct {
	subject string
	nonce   [nonceSize]byte
	at      int64 // when the challenge was sent
	lost    bool  // the previous subject no longer reaches the peer: packets sent there are missing
}

// whereabouts holds further facts about the address of a peer. Few streams need it. The outbox owns it.
type whereabouts struct {
	move     *move     // a subject that the peer named and has not proved; nil if there is none
	crossing *crossing // nil if the stream is within one account
	proved   bool      // the peer has proved that it receives at its address
	withheld Credit    // granted beyond unprovedBytes by a producer that has not proved its address
	missing  bool      // the same producer also reported missing packets
}

func (s *session) whereabouts() *whereabouts { return &s.extra().whereabouts }

// move returns the unproved subject of the peer of s, nil if there is none.
func (s *session) move() *move {
	if x := s.extras.Load(); x != nil {
		return x.whereabouts.move
	}
	return nil
}

// crossing returns the state that s has only as a stream across accounts. It returns nil if s is no such stream, or if
// a consumer does not know that yet.
func (s *session) crossing() *crossing {
	if x := s.extras.Load(); x != nil {
		return x.whereabouts.crossing
	}
	return nil
}

// challengePatience is how many AckTimeouts the answer to a challenge may take before another subject is challenged.
// Each question of a peer across accounts comes from another subject, and any of them will do.
const challengePatience = 4

// setPeer handles a reply subject of the peer of s: the first one is its address, and a new one is challenged.
func (o *outbox) setPeer(s *session, subject string) {
	switch {
	case subject == s.out.peer || checkAnswer(subject) != nil:
	case s.out.peer == "":
		o.peers.move(s, subject)
		o.joinRemote(s)
		o.learned(s)
	default:
		o.challenge(s, subject)
	}
}

// challenge asks the peer of s to prove that it receives at subject. A peer can make this end send only these packets
// to a subject that is not its own, and only one for each period that a challenge waits for its answer.
func (o *outbox) challenge(s *session, subject string) {
	now := o.ep.now()
	if m := s.move(); m != nil && now-m.at < o.patience(s, m) || !o.connected() {
		return
	}
	o.tellAt(s, subject, "", s.moveTo(subject, now, o.seeks(s)))
}

// patience returns how long to wait for the answer to a challenge before the next one.
func (o *outbox) patience(s *session, m *move) int64 {
	if m.subject == s.out.peer {
		return o.ep.times.Ack
	}
	return challengePatience * o.ep.times.Ack
}

// moveTo stores subject as the unproved subject of the peer of s, and returns the challenge to send there.
func (s *session) moveTo(subject string, now int64, lost bool) Frame {
	m := &move{subject: subject, at: now, lost: lost}
	s.whereabouts().move = m
	rand.Read(m.nonce[:])
	return Frame{Type: FrameChallenge, Payload: m.nonce[:]}
}

// proved takes the answer to a challenge. If nonce is that of the challenge, the peer moves to the challenged subject.
// The previous subject may have failed earlier, so packets that this end sent there may be missing.
func (o *outbox) proved(s *session, nonce []byte) error {
	if o.trialAnswered(s, nonce) {
		return nil
	}
	m := s.move()
	if m == nil || string(nonce) != string(m.nonce[:]) || s.out.state.Phase == lifecycle.Gone {
		return nil
	}
	s.whereabouts().move = nil
	if m.subject != s.out.peer {
		o.follow(s, m.subject)
		if snd := s.send.Load(); snd != nil {
			snd.unacked.pardon()
		}
		o.step(s, lifecycle.PeerKnown)
		if m.lost {
			s.mark(workGap)
		} else {
			s.mark(workCredit)
		}
	}
	return o.grantWithheld(s)
}

// follow sends later packets of s to another subject. Those in open envelopes go first.
func (o *outbox) follow(s *session, subject string) {
	if snd := s.send.Load(); snd != nil {
		snd.uninvite()
	}
	if p := s.remote.Load(); p != nil && p.envelopes != nil {
		o.sendEnvelope(p.envelopes)
	}
	o.peers.move(s, subject)
	o.joinRemote(s)
}

// The first packet of a producer names the subject at which it receives. A hostile producer may name the subject of
// another program. It knows its own numbers, so it could grant credit although it received nothing. So until the
// producer has answered a challenge at its first subject, the outbox sends few bytes there, and none of them twice. The
// outbox sends the challenge early enough for an answer before the first credit is used up, so an honest producer loses
// no time. A stream that sends less needs no challenge.
const (
	unprovedBytes = handlerWindow
	proveFrom     = unprovedBytes / 2
)

// firstCredit returns the credit that a consumer has at the first address of its producer.
func (s *session) firstCredit() credited {
	first := credited{initialPackets, minWindow} // for a subject without an offer: every offer is at least this
	if t, err := ParseToken(lastToken(s.out.peer)); err == nil {
		first = offered(t)
	}
	if !s.isProved() && first.bytes > unprovedBytes {
		s.whereabouts().withheld = Credit{Packets: first.packets, Bytes: first.bytes}
		first.bytes = unprovedBytes
	}
	return first
}

// prove asks the peer of s to prove its address, if that is needed, unless it was just asked.
func (o *outbox) prove(s *session) {
	if s.isProved() || s.out.peer == "" {
		return
	}
	o.challenge(s, s.out.peer)
}

// withhold returns the part of a CREDIT that counts before the peer of s has proved its address, and keeps the rest
// until then.
func (o *outbox) withhold(s *session, c Credit, missing bool) (Credit, bool) {
	if s.isProved() {
		return c, missing
	}
	missing = missing && c.Ack != s.send.Load().unacked.Next()
	if !missing && c.Bytes <= unprovedBytes {
		return c, false
	}
	w := s.whereabouts()
	w.withheld, w.missing = c, w.missing || missing
	o.prove(s)
	c.Bytes = min(c.Bytes, unprovedBytes)
	return c, false
}

// grantWithheld notes that the peer of s has proved its address, and takes the credit that was withheld.
func (o *outbox) grantWithheld(s *session) error {
	w := s.whereabouts()
	c, missing := w.withheld, w.missing
	w.proved, w.withheld, w.missing = true, Credit{}, false
	if snd := s.send.Load(); snd != nil && c != (Credit{}) {
		return o.takeCredit(snd, c, missing)
	}
	return nil
}
