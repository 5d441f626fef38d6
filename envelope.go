package stream

import (
	"crypto/rand"
	"errors"
	"strings"
	"sync"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/flow"
)

// This file sends packets of several streams to one peer in one message, an envelope; docs/PROTOCOL.md section 4.3. The
// outbox runs all of it. Writers also run openLocked, with the lock of the enveloping.

// envelopes are those that an outbox fills now.
type envelopes struct {
	open    []*enveloping // those with open envelopes that the outbox knows
	packets int           // in them
	more    bool          // another session waits behind the one that is being served
	refused uint32        // NATS refused an envelope on this connection, counted from 1 as outbox.connection is from 0

	trials    [maxTried]*enveloping // those that were tried last, a circle
	nextTrial int

	retained  retained
	unwatched []*session // of placed packets, the acknowledgements of which no check is scheduled for
}

// enveloping is the state of envelopes to one other end, with those that are open.
type enveloping struct {
	name       string // of the other end
	subject    string // of envelopes
	tells      bool   // the next CREDIT or PING tells the other end that this one receives envelopes
	known      bool   // the other end receives envelopes
	arrives    bool   // it has answered a trial
	trial      [nonceSize]byte
	tried      int64 // when the last trial was sent; 0 if none was
	introduced int64 // when introduce last sent a PING; 0 if it has sent none
	sizes      flow.Envelopes

	listed bool // on envelopes.open

	mu          sync.Mutex  // guards the fields below
	first, last *envelope   // the open envelopes, linked by envelope.next; nil if there are none. Only last is filled
	opened      int         // how many of them writers have opened
	most        int         // how many they may open; 0 if they place no packets. Only the outbox changes it
	size        int         // bytes of an envelope that a writer opens. Only the outbox changes it
	connection  uint32      // value of outbox.connection when most was set
	number      uint32      // of envelopes that were ever opened
	news        bool        // it is in outbox.placed
	next        *enveloping // in outbox.placed
}

const (
	// envelopeToken is the last element of the subject of envelopes. Tokens of streams begin with another character.
	envelopeToken = "e"
	// maxEnveloped bounds a packet in an envelope. A message costs about as much as a copy of this size.
	maxEnveloped = 2 << 10
	// maxEnclosed is how many packets all open envelopes hold together, and maxOpen how many of these there are, before
	// they are sent.
	maxEnclosed = 1 << 10
	maxOpen     = 1 << 6
	// maxTried is how many trials are remembered for answers that come after the end of their stream.
	maxTried = 1 << 6
	// trialPatience is how many AckTimeouts the answer to a trial may take before the next one.
	trialPatience = 4
)

// tellsEnvelopes notes that another stream to p began. From the second one on, this end tells p that it receives
// envelopes. It says so again whenever the streams have doubled, because the message may be lost.
func (p *remote) tellsEnvelopes() {
	if n := len(p.streams); n >= 2 && n&(n-1) == 0 && p.hasTokens() {
		p.enveloping().tells = true
	}
}

// takesStatement reports whether the next packet to the peer of s has to say that this end receives envelopes, and
// notes that it does. The caller adds ENVELOPES to a CREDIT or a PING. ENVELOPES is never alone: if the flag SEQ of
// such a packet was damaged, the packet would pass for one of records, and take the number of a record.
func takesStatement(s *session) bool {
	p := s.remote.Load()
	if p == nil || p.envelopes == nil || !p.envelopes.tells {
		return false
	}
	p.envelopes.tells = false
	return true
}

// hasTokens reports whether the subjects of p end with tokens, so that envelopes to it can name them.
func (p *remote) hasTokens() bool { return !strings.HasSuffix(p.name, noToken) }

func (p *remote) enveloping() *enveloping {
	if p.envelopes == nil {
		p.envelopes = &enveloping{name: p.name, subject: p.name + "." + envelopeToken}
	}
	return p.envelopes
}

// send publishes a packet to the peer of s, or puts a copy of it into the envelope to that peer. snd is the sender of a
// packet of records, nil for other packets. With alone, the packet has a message of its own. send returns where the
// packet ends in its envelope, 0 if it was published. A packet in an envelope is published before any later packet to
// the same peer. If packets of records probably follow, the connection may keep data for a write with them: see lent.
func (o *outbox) send(s *session, snd *sender, reply string, data []byte, alone bool) (end int, err error) {
	if p := s.remote.Load(); p != nil && p.envelopes != nil {
		e := p.envelopes
		if !alone && reply == "" && len(data) <= maxEnveloped && o.mayEnclose(e, s) {
			if end := o.enclose(e, s, snd, data); end != 0 {
				return end, nil
			}
		}
		o.sendEnvelope(e)
	}
	if snd != nil && !alone && reply == "" && (o.envelopes.more || snd.hasReady()) {
		o.lent, err = o.ep.lend(s.out.peer, data)
		return 0, err
	}
	return 0, o.ep.send(s.out.peer, reply, data)
}

// mayEnclose reports whether the next packet of s may go into an envelope. If that is not known, it tries.
func (o *outbox) mayEnclose(e *enveloping, s *session) bool {
	switch {
	case o.envelopes.refused == o.connection.Load()+1:
		return false
	case e.isOpen():
		return true
	case !o.envelopes.more || !e.known:
		return false
	case !e.arrives:
		o.try(e, s)
		return false
	}
	return true
}

// try sends an envelope that asks the peer of s for an answer. It has no records: NATS may refuse it, or the peer may
// not receive at its subject.
func (o *outbox) try(e *enveloping, s *session) {
	now := o.ep.now()
	if !s.registered() || e.tried != 0 && now-e.tried < trialPatience*o.ep.times.Ack {
		return
	}
	e.tried = now
	rand.Read(e.trial[:])
	o.envelopes.trials[o.envelopes.nextTrial%maxTried] = e
	o.envelopes.nextTrial++
	h := PacketHeader{Sender: s.senderNumber}
	if snd := s.send.Load(); snd != nil {
		h.Seq = snd.unacked.Cursor()
	}
	b := make([]byte, PacketHeaderSize, 128)
	b = append(b, s.out.peer[len(e.name)+1:]...)
	b = AppendPacket(b, h, Frame{Type: FrameChallenge, Payload: e.trial[:]}, Frame{Type: frameEnvelopes})
	putEnvelopeHeader(b, len(b))
	_ = o.ep.publish(e.subject, "", b)
}

// trialAnswered takes the answer to a challenge, and reports whether it is that to a trial.
func (o *outbox) trialAnswered(s *session, nonce []byte) bool {
	p := s.remote.Load()
	if p == nil {
		return o.trialAnsweredLate(nonce)
	}
	if p.envelopes == nil || p.envelopes.tried == 0 || string(nonce) != string(p.envelopes.trial[:]) {
		return false
	}
	p.envelopes.arrives = true
	return true
}

// trialAnsweredLate takes a RESPONSE for a stream that has ended, and reports whether it answers a trial. The
// acknowledgement of CLOSE, which ends a short stream, may have followed the trial at once. Nobody but the peer knows
// the nonce.
func (o *outbox) trialAnsweredLate(nonce []byte) bool {
	for _, e := range o.envelopes.trials {
		if e != nil && string(nonce) == string(e.trial[:]) {
			e.arrives = true
			return true
		}
	}
	return false
}

// knowsEnvelopes notes that the peer of s receives envelopes.
func (o *outbox) knowsEnvelopes(s *session) {
	if p := s.remote.Load(); p != nil && p.hasTokens() {
		p.enveloping().known = true
	}
}

// envelopeDenied handles a subject that NATS does not let this end publish to. It reports whether it is one of
// envelopes. Then this end sends none as long as its connection lasts, because its user probably may only answer. The
// streams retransmit the packets that were in it.
func (o *outbox) envelopeDenied(subject string) bool {
	e := o.tried(subject)
	if e == nil {
		return false
	}
	e.arrives = false
	o.stopPlaces(e)
	o.envelopes.refused = o.connection.Load() + 1
	return true
}

// tried returns the state of envelopes to subject, if an envelope was sent there. The record of the other end may be
// gone, because its last stream ended behind the trial.
func (o *outbox) tried(subject string) *enveloping {
	name, ok := strings.CutSuffix(subject, "."+envelopeToken)
	if !ok {
		return nil
	}
	if p := o.remotes[name]; p != nil && p.envelopes != nil && p.envelopes.tried != 0 {
		return p.envelopes
	}
	for _, e := range o.envelopes.trials {
		if e != nil && e.name == name {
			return e
		}
	}
	return nil
}

// enclose puts a copy of a packet into the envelope to the peer of s. It returns where the packet ends there, 0 if
// envelopes to that peer have to be smaller.
func (o *outbox) enclose(e *enveloping, s *session, snd *sender, data []byte) (end int) {
	for {
		v, end := e.enclose(s.out.peer[len(e.name)+1:], data)
		if v != nil {
			o.list(e)
			o.envelopes.packets++
			if snd != nil {
				v.senders = append(v.senders, snd)
				o.invite(e, snd)
			}
			return end
		}
		o.sendEnvelope(e)
		most := o.envelopeSize(e)
		if PacketHeaderSize+envelopedHead+len(data) > most {
			return 0
		}
		e.mu.Lock()
		if e.last == nil {
			e.openLocked(most)
		}
		e.mu.Unlock()
	}
}

// enclose copies a packet into the last open envelope, and returns that, with where the packet ends there. It returns
// nil if none is open or the packet does not fit.
func (e *enveloping) enclose(token string, data []byte) (in *envelope, end int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	v, size := e.last, envelopedHead+len(data)
	if v == nil || v.n+size > v.most {
		return nil, 0
	}
	b := v.buf.buf[v.n:]
	copy(b, token)
	copy(b[envelopedHead:], data)
	v.n += size
	v.packets++
	return v, v.n
}

// openLocked opens an envelope of at most size bytes.
func (e *enveloping) openLocked(size int) *envelope {
	v := getEnvelope(size)
	if e.last == nil {
		e.first = v
	} else {
		e.last.next = v
	}
	e.last = v
	e.number++
	return v
}

func (e *enveloping) isOpen() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.last != nil
}

// envelopeSize returns how large an envelope to e may be.
func (o *outbox) envelopeSize(e *enveloping) int {
	now := o.ep.clock.Load()
	most := min(coalesceMost, int(o.ep.maxPayload.Load()), e.sizes.Most(now))
	if l := o.lines.byPeer[e.name]; l != nil {
		most = l.sizes.Most(min(most, l.Packet()), now)
	}
	return most
}

// list puts e on the list of open envelopes.
func (o *outbox) list(e *enveloping) {
	if e.listed {
		return
	}
	if len(o.envelopes.open) == maxOpen {
		o.sendEnvelopes()
	}
	e.listed = true
	o.envelopes.open = append(o.envelopes.open, e)
}

// sendEnvelopes sends all open envelopes.
func (o *outbox) sendEnvelopes() {
	for _, e := range o.envelopes.open {
		o.sendEnvelope(e)
		e.listed = false
	}
	clear(o.envelopes.open)
	o.envelopes.open, o.envelopes.packets = o.envelopes.open[:0], 0
}

// sendEnvelope publishes the open envelopes to the other end, and decides how many writers may open before it is called
// again. e stays on the list of those with open envelopes until that is emptied.
func (o *outbox) sendEnvelope(e *enveloping) {
	e.mu.Lock()
	first := e.first
	if e.opened > 0 {
		o.openByWriters.Add(-int32(e.opened))
	}
	e.first, e.last, e.opened = nil, nil, 0
	e.mu.Unlock()
	if first == nil && (e.most > 0 || !e.arrives) {
		return
	}
	for v := first; v != nil; v = v.next {
		o.accountAll(v, v.placed)
	}
	o.allowPlaces(e)
	for v := first; v != nil; v = v.next {
		o.publishEnvelope(e, v)
	}
	for v := first; v != nil; {
		next := v.next
		for i, snd := range v.senders {
			snd.notePublished(false)
			v.senders[i] = nil
		}
		v.senders = v.senders[:0]
		if v.kept > 0 {
			o.envelopes.retained.push(v)
		} else {
			putEnvelope(v)
		}
		v = next
	}
}

// publishEnvelope publishes v, or its only packet. A publish that fails is a loss: each stream repairs its own. The
// connection may have broken since the packets were put in. Then nats.go would keep the message for a server that may
// take less.
func (o *outbox) publishEnvelope(e *enveloping, v *envelope) {
	b := v.buf.buf[:v.n]
	var err error
	switch {
	case !o.up.Load() || !isUp(o.ep.conn.Status()):
		err = nats.ErrDisconnected
	case v.packets == 1:
		token, packet, _ := nextEnveloped(b[PacketHeaderSize:])
		err = o.ep.send(v.subject(e, token), "", packet)
	case o.envelopes.refused == o.connection.Load()+1: // after writers opened it
		err = o.publishSingly(e, b)
	default:
		putEnvelopeHeader(b, len(b))
		if err = o.ep.send(e.subject, "", b); errors.Is(err, nats.ErrMaxPayload) {
			o.ep.lookAtMaxPayload()
			err = o.publishSingly(e, b)
		} else if err == nil {
			o.ep.counters.envelopesSent.Add(1)
		}
	}
	if err != nil {
		o.ep.counters.unsent.Add(1)
	}
}

// publishSingly publishes the packets of an envelope that is too large.
func (o *outbox) publishSingly(e *enveloping, b []byte) (err error) {
	for body := b[PacketHeaderSize:]; len(body) > 0; {
		var token, packet []byte
		token, packet, body = nextEnveloped(body)
		if e := o.ep.send(e.name+"."+string(token), "", packet); e != nil {
			err = e
		}
	}
	return err
}

// envelopePassed records the sizes of the envelopes in which packets of s arrived that were acknowledged just now.
func (o *outbox) envelopePassed(s *session, q *unackedPackets) {
	if q.inside == 0 {
		return
	}
	if p := s.remote.Load(); p != nil && p.envelopes != nil {
		p.envelopes.sizes.Passed(int(q.inside), o.ep.clock.Load())
	}
	q.inside = 0
}

// envelopeLost records that the peer misses p, if p came in an envelope, was not dropped with earlier packets, and this
// end's connection is no reason for the loss.
func (snd *sender) envelopeLost(p *packet) {
	s, q := snd.session, &snd.unacked
	if p.enveloped == 0 || q.Cursor() != q.Acked() || p.connection != s.ep.outbox.connection.Load() {
		return
	}
	if p, enveloped := s.remote.Load(), p.enveloped; p != nil && p.envelopes != nil {
		p.envelopes.sizes.Lost(int(enveloped), s.ep.clock.Load())
		s.ep.outbox.stopPlaces(p.envelopes)
	}
}
