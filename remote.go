package stream

import (
	"math"
	"slices"
	"time"

	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/liveness"
	"github.com/natsstream/stream/internal/wheel"
)

// This file watches the other ends of an endpoint's streams. One question serves all streams that two ends share;
// docs/PROTOCOL.md section 13.2. The outbox runs all of it, except setPeerTimeout and ownPatience, which any goroutine
// may call.

// remote is the other end of one or more streams: the subjects of these streams there differ only in the token. The
// outbox owns it. Times are those of the outbox's clock; 0 is never.
type remote struct {
	name      string // the subjects without their tokens, or a whole subject that has none, and noToken
	heard     int64  // on any of the streams
	asked     int64
	suspect   int64 // when the first unanswered question was sent, or NATS reported that nobody received one
	questions int32 // since it was heard
	records   int64 // when arrived records were last seen on any of the streams
	paid      int32 // repeated questions that answers paid for
	unpaid    int64 // when the last other question was repeated
	trip      int64 // time from the last question on a single stream to its answer
	lookedAt  int64 // when all streams were looked at, by the endpoint's time
	absent    bool  // NATS reported that nobody received a question
	shortest  int64 // the shortest timeout that a stream has had of its own, 0 if none had one

	envelopes *enveloping // nil until this end or the other one speaks of envelopes

	waiting []*session // to ask; those whose places say neither toResume nor toAsk have asked meanwhile
	resumed int64      // value of outbox.resumed when paid and ahead were last reset
	ahead   int32      // the most that paid may be
	least   int64      // the shortest time from a question to its answer since then

	streams []*session // session.life.place is the place of each
	next    int        // place of the stream of the last question
	node    wheel.Node[remote]
}

const (
	// streamSilence is the longest silence of a single stream, if there are few streams, and keepAlivesPerStream the
	// same as a multiple of KeepAlive. A living peer may have lost a stream, if a RESET was lost.
	streamSilence       = int64(15 * time.Second)
	keepAlivesPerStream = 30

	// streamQuestion is the time between two questions on single streams, if there are many: 125 a second take a
	// quarter of a percent of a core, both ends and the NATS server together. remoteQuestion is the same for questions
	// to other ends.
	streamQuestion = int64(8 * time.Millisecond)
	remoteQuestion = int64(500 * time.Microsecond)
	// repeatedQuestion is the same for repeated questions. Only an overloaded machine has that many.
	repeatedQuestion = int64(50 * time.Microsecond)

	// candidates bounds the search for a stream that can be asked.
	candidates = 8

	// patienceParts is the least number of questions to the peer within a stream's own timeout.
	patienceParts = 4
)

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
	switch {
	case p == nil:
		p = new(remote)
		*p = newRemote(name, o.time())
		o.remotes[name] = p
		o.lookAtRemote(p, o.clock.Until(p.heard+p.keepAlive(o)))
	case len(p.streams) == 0: // its record is old, and it is on the wheel
		o.idleRemotes--
		streams, node, envelopes := p.streams, p.node, p.envelopes
		*p = newRemote(p.name, o.time())
		p.streams, p.node, p.envelopes = streams, node, envelopes
	}
	s.remote.Store(p)
	o.ep.room.move(s, p)
	s.out.life.place = int32(len(p.streams))
	p.streams = append(p.streams, s)
	p.tellsEnvelopes()
	p.hear(s.out.life.heard) // before its address was known
	o.setPatience(s)
}

// newRemote returns the record of another end that lives at now, as far as is known.
func newRemote(name string, now int64) remote {
	return remote{name: name, heard: now, paid: firstPaid, ahead: firstPaid, least: math.MaxInt64}
}

// maxIdleRemotes bounds the remotes without streams, because each request can name another peer. A list of streams with
// more than maxIdleStreams places is not kept.
const (
	maxIdleRemotes = 1 << 10
	maxIdleStreams = 1 << 6
)

// leaveRemote takes a stream from its peer. Its last packets show that the peer lives, as all do. A peer without
// streams stays until it is looked at: a consumer that opens one stream after the other uses its record again.
func (o *outbox) leaveRemote(s *session) {
	p := s.remote.Load()
	if p == nil {
		return
	}
	o.noteArrivals(s, o.time())
	s.remote.Store(nil)
	last := len(p.streams) - 1
	moved := p.streams[last]
	moved.out.life.place = s.out.life.place
	p.streams[s.out.life.place], p.streams[last] = moved, nil
	if p.streams = p.streams[:last]; last == 0 {
		if cap(p.streams) > maxIdleStreams {
			p.streams = nil
		}
		if o.idleRemotes++; o.idleRemotes > maxIdleRemotes {
			o.remoteWheel.Remove(p)
			o.forgetRemote(p)
		}
	}
}

// forgetRemote forgets a peer without streams that is not on the wheel.
func (o *outbox) forgetRemote(p *remote) {
	o.idleRemotes--
	delete(o.remotes, p.name)
}

// setPeerTimeout is Stream.SetPeerTimeout.
func (s *session) setPeerTimeout(d time.Duration) {
	ms := (min(max(d, 0), never) + time.Millisecond - 1) / time.Millisecond
	s.patience.Store(uint32(min(ms, math.MaxUint32)))
	s.mark(workPatience)
}

// ownPatience returns the stream's own peer timeout in nanoseconds, 0 if it has none.
func (s *session) ownPatience() int64 { return int64(s.patience.Load()) * int64(time.Millisecond) }

// setPatience applies the stream's own timeout, if it has one.
func (o *outbox) setPatience(s *session) {
	p, patience := s.remote.Load(), s.ownPatience()
	if p != nil && patience != 0 && (p.shortest == 0 || patience < p.shortest) {
		p.shortest = patience
		o.lookAtRemote(p, o.clock.Until(o.time()+p.keepAlive(o)))
	}
}

// keepAlive returns the silence after which p is asked. It grows with the number of other ends.
func (p *remote) keepAlive(o *outbox) int64 {
	d := max(o.ep.times.KeepAlive, int64(o.remoteWheel.Len()-o.idleRemotes)*remoteQuestion)
	if p.shortest != 0 {
		d = max(1, min(d, p.shortest/patienceParts))
	}
	return d
}

// hear records a sign of life at a time on the outbox's clock.
func (p *remote) hear(at int64) {
	p.heard = max(p.heard, at)
	switch {
	case at >= p.asked:
		p.questions, p.suspect, p.absent = 0, 0, false
	case p.suspect != 0 && at > p.suspect: // a packet that is seen only now arrived between two questions
		p.suspect, p.absent = at, false
	}
}

// lookAtRemote schedules a check of p at the given time of the endpoint, or earlier.
func (o *outbox) lookAtRemote(p *remote, at int64) { o.remoteWheel.Set(p, at) }

// checkRemote decides about an other end that is due. now is the endpoint's time.
func (o *outbox) checkRemote(p *remote, now int64) {
	if len(p.streams) == 0 {
		o.forgetRemote(p)
		return
	}
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
			o.forgetRemote(p)
			return
		}
	}
	if d.Ask && s != nil && s.remote.Load() == p {
		o.askRemote(p, s, now)
	}
	o.lookAtRemote(p, o.clock.Until(d.Next))
}

// Each question that p answers pays for another one that repeats a question, asks after a reconnect, or asks about an
// acknowledgement or credit that is overdue. Otherwise the questions of many streams could fill a slow line, and each
// would wait too long for its answer behind the others. firstPaid questions may be sent ahead of answers. The number
// grows up to mostPaid while answers come about as fast as the fastest one did. One question in each AckTimeout is
// free, and while p is silent, one in each unpaidPart of AckTimeout.
const (
	firstPaid  = 32
	mostPaid   = 1 << 10
	unpaidPart = 4

	// slowTrips is how many AckTimeouts longer than the fastest one an answer may take before fewer questions are sent
	// ahead.
	slowTrips = 4
)

// pays notes that p answered a question after trip, and returns how many others that pays for. trip is 0 if it is not
// known.
func (p *remote) pays(trip, ack int64) (n int32) {
	if trip <= 0 {
		return p.pay(1)
	}
	p.least = min(p.least, trip)
	switch late := trip - p.least; {
	case late <= ack && p.ahead < mostPaid && !p.resumes():
		p.ahead++
		return p.pay(2)
	case late > slowTrips*ack && p.ahead > firstPaid:
		p.ahead--
		return p.pay(0)
	}
	return p.pay(1)
}

// resumes reports whether streams wait to ask p after a reconnect. The questions of the peer, which come at that time,
// look like answers.
func (p *remote) resumes() bool { return len(p.waiting) > 0 && p.waiting[0].out.places.has(toResume) }

func (p *remote) pay(n int32) int32 {
	p.paid = min(p.paid+n, p.ahead)
	return n
}

// mayRepeat reports whether p may be sent a question that has to be paid for.
func (p *remote) mayRepeat(now, ack int64) bool {
	wait := ack
	if now-p.heard >= ack {
		wait /= unpaidPart
	}
	return p.paid > 0 || now-p.unpaid >= wait
}

// repeatAfter returns the time after which a question on a single stream is repeated: twice the time that an answer
// took last, because questions may queue on a slow line. A lost stream must still be noticed, so it is half of
// ResumeTimeout at most.
func (p *remote) repeatAfter(repeat, resume int64) int64 { return max(repeat, min(2*p.trip, resume/2)) }

// repeats records that p is sent a question that has to be paid for.
func (p *remote) repeats(now int64) {
	if p.paid > 0 {
		p.paid--
	} else {
		p.unpaid = now
	}
}

// mayResume reports whether s may ask its peer now, after a reconnect. If too many other streams have asked and got no
// answer, s waits.
func (o *outbox) mayResume(s *session) bool {
	p, now := s.remote.Load(), o.time()
	if p == nil || s.crossing() != nil { // a stream across accounts may have lost its mapping, and others say nothing of it
		return true
	}
	if r := o.resumed.Load(); p.resumed != r { // earlier questions were lost, or their answers are still coming
		p.resumed, p.paid, p.ahead, p.least = r, firstPaid, firstPaid, math.MaxInt64
	}
	if p.mayRepeat(now, o.ep.times.Ack) {
		p.repeats(now)
		s.out.places.clear(toResume | toAsk)
		return true
	}
	o.waitToAsk(s, toResume)
	return false
}

// waitToAsk lets s ask its peer after the streams that wait already. why is toResume or toAsk.
func (o *outbox) waitToAsk(s *session, why places) {
	p := s.remote.Load()
	if waits := s.out.places.has(toResume | toAsk); !waits {
		if p.waiting = append(p.waiting, s); len(p.waiting) == 1 {
			o.askers = append(o.askers, p)
		}
	}
	s.out.places.set(why)
}

// askNext lets the next n streams ask that wait to ask p. Streams that need no answer any longer do not count.
func (o *outbox) askNext(p *remote, n int32) {
	if !o.up.Load() { // all streams ask anew when it is up again
		return
	}
	for n > 0 && len(p.waiting) > 0 {
		s := p.waiting[0]
		p.waiting[0], p.waiting = nil, p.waiting[1:]
		why := s.out.places & (toResume | toAsk)
		s.out.places.clear(toResume | toAsk)
		switch {
		case s.out.state.Phase == lifecycle.Gone:
		case why.has(toResume):
			p.repeats(o.time())
			s.mark(workGap | workProbe)
			n--
		case why.has(toAsk) && s.remote.Load() == p && s.out.life.pings == 0 && s.wantsAnswer():
			p.repeats(o.time())
			s.out.life.asks = min(s.out.life.asks, math.MaxInt16-1) + 1
			s.mark(workProbe)
			n--
		}
	}
}

// wantsAnswer reports whether s has packets that are not acknowledged, or a writer without credit.
func (s *session) wantsAnswer() bool {
	snd := s.send.Load()
	return snd != nil && !s.peerTakesJSON() && (!snd.unacked.Empty() || snd.unacked.waits || snd.packer.stalled())
}

// tickAskers lets the next streams ask if answers were lost, and forgets lists that are empty.
func (o *outbox) tickAskers() {
	o.askers = slices.DeleteFunc(o.askers, func(p *remote) bool {
		n := p.paid
		if n == 0 && p.mayRepeat(o.time(), o.ep.times.Ack) {
			n = 1
		}
		o.askNext(p, n)
		empty := len(p.waiting) == 0
		if empty {
			p.waiting = nil
		}
		return empty
	})
}

// introduce sends a PING before the first packet of a producer, if its consumer has to know that this end receives
// envelopes: a consumer that writes nothing gets no CREDIT, which tells others. Short streams begin and end all the time,
// so it is sent at most once in trialPatience AckTimeouts.
func (o *outbox) introduce(s *session) {
	p := s.remote.Load()
	if p == nil || p.envelopes == nil || !p.envelopes.tells || s.role == lifecycle.Consumer || s.send.Load().unacked.Next() != 0 || s.out.life.pings != 0 {
		return
	}
	e, now := p.envelopes, o.ep.now()
	if e.introduced != 0 && now-e.introduced < trialPatience*o.ep.times.Ack {
		return
	}
	e.introduced = now
	o.ping(s)
}

// speaker returns a stream on which p can be sent a PING, another one each time, or nil if none is found. It records
// the arrivals on the streams that it looks at.
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

// queued returns how long the data on its way to p takes to arrive. All streams to p share one line.
func (o *outbox) queued(p *remote) int64 {
	if l := o.lines.byPeer[p.name]; l != nil {
		return l.Patience()
	}
	return 0
}

// recordsArrive records the arrivals on all streams of p, once a tick, and reports whether it did.
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

// giveUpRemote ends streams of p after their own timeouts, and all streams if all is set. It returns the time of the
// next check.
func (o *outbox) giveUpRemote(p *remote, now int64, all bool) (next int64) {
	for _, s := range p.streams {
		o.noteArrivals(s, now) // records that arrive on any stream show that the peer lives
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
