package stream

import (
	"crypto/rand"

	"github.com/natsstream/stream/internal/lifecycle"
)

// This file follows the address of a peer; docs/PROTOCOL.md section 2.3. The outbox runs all of it. An address may change, because
// NATS maps a reply subject anew for each message that crosses accounts. A peer may also name a subject that is not its own. So
// the outbox sends nothing but a challenge to a new subject until the peer has proved that it receives there.

// move is a subject that the peer of a stream named and has not proved yet.
type move struct {
	subject string
	nonce   [nonceSize]byte
	at      int64 // when the challenge was sent
	lost    bool  // the previous subject leads nowhere any longer: packets sent there are missing
}

// whereabouts holds further facts about the address of a peer. Few streams need it. The outbox owns it.
type whereabouts struct {
	move     *move     // another subject that the peer named and has not proved; nil if there is none
	crossing *crossing // nil if the stream is within one account
}

func (s *session) whereabouts() *whereabouts {
	if s.out.whereabouts == nil {
		s.out.whereabouts = new(whereabouts)
	}
	return s.out.whereabouts
}

// move returns the unproved subject of the peer of s, nil if there is none.
func (s *session) move() *move {
	if w := s.out.whereabouts; w != nil {
		return w.move
	}
	return nil
}

// crossing returns the state that s has only as a stream across accounts. It returns nil if s is no such stream, or if a consumer
// does not know that yet.
func (s *session) crossing() *crossing {
	if w := s.out.whereabouts; w != nil {
		return w.crossing
	}
	return nil
}

// challengePatience is how many AckTimeouts the answer to a challenge may take before another subject is challenged. Each
// question of a peer across accounts comes from another subject; the first of them is as good as the next.
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

// challenge asks the peer of s to prove that it receives at subject. A peer can make this end send only these packets to a subject
// that is not its own, and only one for each period that a challenge waits for its answer.
func (o *outbox) challenge(s *session, subject string) {
	now := o.ep.now()
	if m := s.move(); m != nil && now-m.at < challengePatience*o.ep.times.Ack || !o.connected() {
		return
	}
	o.tellAt(s, subject, "", s.moveTo(subject, now, o.seeks(s)))
}

// moveTo stores subject as the unproved subject of the peer of s, and returns the challenge to send there.
func (s *session) moveTo(subject string, now int64, lost bool) Frame {
	m := &move{subject: subject, at: now, lost: lost}
	s.whereabouts().move = m
	rand.Read(m.nonce[:])
	return Frame{Type: FrameChallenge, Payload: m.nonce[:]}
}

// proved moves the peer of s to the challenged subject, if nonce is that of the challenge. Earlier packets of this end may have
// gone to a subject that leads nowhere any longer.
func (o *outbox) proved(s *session, nonce []byte) {
	if m := s.move(); m != nil && string(nonce) == string(m.nonce[:]) && s.out.state.Phase != lifecycle.Gone {
		o.peers.move(s, m.subject)
		o.joinRemote(s)
		s.out.whereabouts.move = nil
		if snd := s.send.Load(); snd != nil {
			snd.unacked.moved()
		}
		o.step(s, lifecycle.PeerKnown)
		if m.lost {
			s.mark(workGap)
		} else {
			s.mark(workCredit)
		}
	}
}
