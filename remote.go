package stream

import (
	"math"
	"strings"
	"time"

	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/liveness"
	"github.com/natsstream/stream/internal/wheel"
)

// This file is about the other ends of an endpoint's streams: one question asks for all streams that two ends share;
// docs/PROTOCOL.md section 13.2.

// remote is the other end of one or more streams: the subjects of these streams there differ only in the token. The outbox owns
// it. Times are those of the outbox's clock; 0 is never.
type remote struct {
	name      string // the subjects without their tokens, or a whole subject that has none
	heard     int64  // on any of the streams
	asked     int64
	suspect   int64 // the first question that was not answered, or when NATS said that nobody received one
	questions int32 // since it was heard
	records   int64 // when records were last seen to have arrived on any of the streams
	lookedAt  int64 // when all streams were looked at, by the endpoint's time
	absent    bool  // NATS said that nobody received a question
	shortest  int64 // patience that a stream ever had of its own, 0 if none had

	streams []*session // session.life.place is the place of each
	next    int        // place of the stream that was asked on last
	node    wheel.Node[remote]
}

const (
	// streamSilence is the longest silence of a single stream, if there are few streams, and keepAlivesPerStream the same
	// as a multiple of KeepAlive. A living peer may have lost a stream, if a RESET was lost.
	streamSilence       = int64(15 * time.Second)
	keepAlivesPerStream = 30

	// streamQuestion is how far questions about single streams lie apart: 125 a second take a quarter of a percent of a core,
	// both ends and the NATS server together. remoteQuestion is the same for questions to other ends, if there are so many.
	streamQuestion = int64(8 * time.Millisecond)
	remoteQuestion = int64(500 * time.Microsecond)
	// repeatedQuestion is the same for repeated ones. That is more than there can be unless the machine is overloaded.
	repeatedQuestion = int64(50 * time.Microsecond)

	// candidates bounds the streams among which one is sought that can be asked.
	candidates = 8

	// patienceParts is into how many parts a stream's own patience is divided: so often is its peer asked at least.
	patienceParts = 4
)

// remoteName returns the part of a subject that all streams of one end share. A subject that was mapped between accounts ends
// with no token, and says nothing about other streams.
func remoteName(subject string) string {
	i := strings.LastIndexByte(subject, '.')
	if _, err := ParseToken(subject[i+1:]); i < 0 || err != nil {
		return subject
	}
	return subject[:i]
}

// joinRemote assigns s to its remote, once the address of the other end is known, and again when the address changes.
func (o *outbox) joinRemote(s *session) {
	name := remoteName(s.out.peer)
	if p := s.remote.Load(); p != nil {
		if p.name == name {
			return
		}
		o.leaveRemote(s)
	}
	if s.peerTakesJSON() || s.out.state.Phase == lifecycle.Gone {
		return
	}
	p := o.remotes[name]
	if p == nil {
		p = &remote{name: name, heard: o.time()}
		o.remotes[name] = p
	}
	s.remote.Store(p)
	s.out.life.place = int32(len(p.streams))
	if p.streams = append(p.streams, s); len(p.streams) == 1 {
		o.lookAtRemote(p, o.clock.Until(o.time()+p.keepAlive(o)))
	}
	o.setPatience(s)
}

// leaveRemote takes a stream from its peer. A peer without streams is forgotten.
func (o *outbox) leaveRemote(s *session) {
	p := s.remote.Load()
	if p == nil {
		return
	}
	s.remote.Store(nil)
	last := len(p.streams) - 1
	moved := p.streams[last]
	moved.out.life.place = s.out.life.place
	p.streams[s.out.life.place], p.streams[last] = moved, nil
	if p.streams = p.streams[:last]; last == 0 {
		o.remoteWheel.Remove(p)
		delete(o.remotes, p.name)
	}
}

// setPeerTimeout is Stream.SetPeerTimeout.
func (s *session) setPeerTimeout(d time.Duration) {
	ms := (min(max(d, 0), never) + time.Millisecond - 1) / time.Millisecond
	s.patience.Store(uint32(min(ms, math.MaxUint32)))
	s.mark(workPatience)
}

// ownPatience is how long the peer may be silent on this stream, in nanoseconds, 0 if that is as long as on others.
func (s *session) ownPatience() int64 { return int64(s.patience.Load()) * int64(time.Millisecond) }

// setPatience notes that a stream has a patience of its own, if it has.
func (o *outbox) setPatience(s *session) {
	p, patience := s.remote.Load(), s.ownPatience()
	if p != nil && patience != 0 && (p.shortest == 0 || patience < p.shortest) {
		p.shortest = patience
		o.lookAtRemote(p, o.clock.Until(o.time()+p.keepAlive(o)))
	}
}

// keepAlive is after which silence p is asked. The more other ends there are, the rarer is each asked.
func (p *remote) keepAlive(o *outbox) int64 {
	d := max(o.ep.times.KeepAlive, int64(o.remoteWheel.Len())*remoteQuestion)
	if p.shortest != 0 {
		d = max(1, min(d, p.shortest/patienceParts))
	}
	return d
}

// hear notes a sign of life at a time on the outbox's clock.
func (p *remote) hear(at int64) {
	p.heard = max(p.heard, at)
	switch {
	case at >= p.asked:
		p.questions, p.suspect, p.absent = 0, 0, false
	case p.suspect != 0 && at > p.suspect: // a packet that the outbox sees only now arrived between two questions
		p.suspect, p.absent = at, false
	}
}

// lookAtRemote sees to it that p is looked at when at is over, by the endpoint's time, or earlier.
func (o *outbox) lookAtRemote(p *remote, at int64) { o.remoteWheel.Set(p, at) }

// checkRemote looks at a peer that is due. now is the endpoint's time.
func (o *outbox) checkRemote(p *remote, now int64) {
	if !o.up.Load() {
		o.lookAtRemote(p, now+o.ep.times.KeepAlive)
		return
	}
	now = o.clock.Now(now)
	s := o.speaker(p, now)
	f := liveness.PeerFacts{
		Now: now, Times: &o.ep.times, KeepAlive: p.keepAlive(o), Jitter: jitter(p.keepAlive(o)),
		Heard: p.heard, Asked: p.asked, Suspect: p.suspect, Resumed: o.clock.Resumed(),
		Questions: p.questions, Absent: p.absent, Queued: o.queued(p),
	}
	d := liveness.DecidePeer(&f)
	if d.GiveUp || p.shortest != 0 && p.suspect != 0 {
		d.Next = min(d.Next, o.giveUpRemote(p, now, d.GiveUp))
		if len(p.streams) == 0 {
			return
		}
	}
	if d.Ask && s != nil && s.remote.Load() == p {
		o.askRemote(p, s, now)
	}
	o.lookAtRemote(p, o.clock.Until(d.Next))
}

// speaker returns a stream on which p can be sent a PING, another one each time, or nil if none is found. It records the arrivals
// on the streams that it looks at.
func (o *outbox) speaker(p *remote, now int64) *session {
	for range min(candidates, len(p.streams)) {
		p.next = (p.next + 1) % len(p.streams)
		if s := p.streams[p.next]; s.end.Load() == nil {
			o.noteArrivals(s, now)
			return s
		}
	}
	return nil
}

// askRemote asks p for a sign of life, on one stream for all.
func (o *outbox) askRemote(p *remote, s *session, now int64) {
	p.questions++
	p.asked = now
	if p.suspect == 0 {
		p.suspect = now
	}
	o.publishPing(s)
}

// queued returns how long the data on its way to p takes to arrive. All streams of p share one line.
func (o *outbox) queued(p *remote) int64 {
	if l := o.lines.byPeer[p.name]; l != nil {
		return l.Patience()
	}
	return 0
}

// recordsArrive looks at all streams of p, once a look of the outbox, and reports whether it did.
func (o *outbox) recordsArrive(p *remote, now int64) bool {
	if p.lookedAt == now {
		return false
	}
	p.lookedAt = now
	at := o.clock.Now(now)
	for _, s := range p.streams {
		if s.end.Load() == nil {
			o.noteArrivals(s, at)
		}
	}
	return true
}

// giveUpRemote ends streams after their peer timeout: streams with a timeout of their own, and if all is set the others as well.
// It returns when to look again.
func (o *outbox) giveUpRemote(p *remote, now int64, all bool) (next int64) {
	for _, s := range p.streams {
		o.noteArrivals(s, now) // a stream on which records arrive shows that the peer lives
	}
	next = now + o.ep.times.Ack
	if p.suspect == 0 {
		return next
	}
	for _, s := range p.streams {
		over := all
		if patience := s.ownPatience(); patience != 0 {
			end := max(p.heard, s.out.life.heard) + patience
			over = now >= end && (p.absent || p.questions > 1) // one may be slow or lost
			if !over {
				next = min(next, max(end, now+1))
			}
		}
		if over && s.end.Load() == nil {
			o.giveUp(s, liveness.PeerGone)
		}
	}
	return next
}
