package stream

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/liveness"
	"github.com/natsstream/stream/internal/wheel"
)

// This file is about time: when a peer is asked whether it lives, when it is given up, how long what was sent is kept
// for it; docs/PROTOCOL.md section 13. One ticker per endpoint looks at a wheel of sessions, and the outbox, which owns
// all of this, looks at those that are due. A stream has neither a timer nor a goroutine.

const (
	defaultKeepAlive         = 500 * time.Millisecond
	defaultAckTimeout        = 250 * time.Millisecond
	defaultResumeTimeout     = 5 * time.Second
	defaultDisconnectTimeout = 30 * time.Second

	// defaultPatience is how long a peer that was asked may take, if ResumeTimeout is not less. A client of NATS whose
	// server went away is back after 2.1 s by default, and a network may be silent for three. With KeepAlive it makes less
	// than four seconds.
	defaultPatience = 3300 * time.Millisecond

	minTick = time.Millisecond
	maxTick = 50 * time.Millisecond
	// A tick that comes later than this many, and maxTick, after the one before was late: the process did not run.
	lateTicks = 2
)

// life is what the outbox knows of a session in time, in nanoseconds of its clock; 0 is never.
type life struct {
	upSince             int64 // since when the session waits for the connection, and when its request was published, by the endpoint's time
	heard, sent, pinged int64
	suspect             int64  // since when the peer may be gone
	closeAt             int64  // when a CLOSE that is held back for a handler's result is published, by the endpoint's time
	took                uint32 // which of this end's connections in turn took the request, from 1 on, or tookLost
	pings               int16  // since the peer was heard, at most math.MaxInt16
	asks                int16  // that were answered or may be, since something was sent, at most math.MaxInt16
	place               int32  // in remote.streams
	seen                uint32

	node wheel.Node[session]
}

// tookLost says that the request, or its answer, may have been lost with a connection, since life.pinged: nobody can be asked
// before the answer.
const tookLost = math.MaxUint32

// tickLength returns the length of a tick: a quarter of the shortest timeout, so that none is noticed much later than it
// ends. It is at most maxTick, because most ticks find nothing to do and one every 50 ms costs nothing that shows, and at
// least minTick, which is as exact as timers are.
func tickLength(t *liveness.Intervals) time.Duration {
	shortest := min(t.KeepAlive, t.Ack, t.Resume, t.Disconnect)
	return min(max(time.Duration(shortest)/4, minTick), maxTick)
}

// initTime prepares the wheel and the ticker.
func (ep *endpoint) initTime() {
	tick := tickLength(&ep.times)
	ep.ticker.Init(tick, time.Duration(ep.times.KeepAlive+ep.times.Resume))
	ep.outbox.clock = liveness.NewClock(int64(max(lateTicks*tick, maxTick)))
	ep.outbox.wheel.Init(tick, func(s *session) *wheel.Node[session] { return &s.out.life.node })
	ep.outbox.remoteWheel.Init(tick, func(p *remote) *wheel.Node[remote] { return &p.node })
	ep.outbox.remotes = make(map[string]*remote)
	ep.outbox.streamTimes, ep.outbox.repeat = ep.times, ep.times.Ack
}

// runTicker is the ticker's goroutine. It wakes the outbox at every tick, for as long as there is a session on its wheel.
func (ep *endpoint) runTicker() {
	ep.ticker.Run(wheel.Hooks{Wake: ep.outbox.park.Wake, Stuck: ep.stuck})
}

// stuck ends all streams for the outbox, which waits in a publish: the connection has taken no bytes for KeepAlive and
// ResumeTimeout. NATS notices only after its FlusherTimeout.
func (ep *endpoint) stuck() {
	e := CloseError{CloseAbnormalClosure, "the connection takes no bytes"}
	ep.sessions.Range(func(_ string, s *session) bool {
		s.requestEnd(&ending{kind: endFault, err: &e, reset: e})
		s.unregister() // the outbox may wait for long
		s.releaseWindow()
		return true
	})
}

// time reads the clock by which peers are judged. It stands still while this end cannot hear them.
func (o *outbox) time() int64 { return o.clock.Now(o.ep.now()) }

// schedule sees to it that the session is checked when the clock reads at, or earlier. Called by the outbox.
func (o *outbox) schedule(s *session, at int64) { o.lookAt(s, o.clock.Until(at)) }

// lookAt is schedule by the endpoint's time.
func (o *outbox) lookAt(s *session, at int64) {
	if s.out.state.Phase == lifecycle.Gone {
		return
	}
	o.wheel.Set(s, at)
	if o.wheel.Len() == 1 && !o.ep.ticker.Armed() {
		now := o.ep.now()
		o.clock.Start(now)
		o.ep.clock.Store(o.clock.Now(now))
		o.ep.ticker.Arm()
	}
}

// dueBy reports whether the session is looked at before the clock reads at.
func (o *outbox) dueBy(s *session, at int64) bool {
	due := s.out.life.node.Due()
	return due != 0 && due <= o.clock.Until(at)
}

// noteAlive notes a sign of life.
func (o *outbox) noteAlive(s *session) {
	s.out.life.heard = o.time()
	o.answered(s)
	if p := s.remote.Load(); p != nil {
		p.hear(s.out.life.heard)
	}
}

// answered notes that no question of the session waits for an answer any longer.
func (o *outbox) answered(s *session) {
	l := &s.out.life
	if l.pings > 0 {
		o.asking--
	}
	l.pings, l.suspect = 0, 0
}

// resume says that the connection is there again. Called by the watcher.
func (o *outbox) resume() {
	o.resumed.Store(o.ep.now())
	o.connection.Add(1)
}

// tickIfDue ticks if the ticker did. With many streams and a slow connection the outbox is long under way with its queue.
func (o *outbox) tickIfDue() bool {
	if !o.ep.ticker.TakeDue() {
		return false
	}
	o.tick()
	return true
}

// tick looks at what is due. Called by the outbox.
func (o *outbox) tick() {
	now := o.ep.now()
	up, resumed := o.up.Load(), o.resumed.Load()
	o.clock.Tick(now, up && !o.dropped.Swap(false), resumed > o.ticked)
	if resumed > o.ticked {
		for _, p := range slices.Collect(o.remoteWheel.All()) {
			o.lookAtRemote(p, now) // what was due while the connection was down is due now
		}
	}
	o.ticked = now
	o.ep.clock.Store(o.clock.Now(now))
	o.spread()
	o.checkRecords()
	if up {
		o.ep.lookAtMaxPayload()
		o.decideDenials(now)
		o.down = 0
	} else if o.down == 0 || o.down < resumed { // it was up in between
		o.down = now
	} else if now-o.down >= o.ep.times.Disconnect {
		o.abandon(now)
	}
	if !o.up.Load() { // opens that give up meanwhile leave nothing behind
		o.waitingUntilUp = slices.DeleteFunc(o.waitingUntilUp, func(s *session) bool {
			gone := s.out.state.Phase == lifecycle.Gone
			if gone {
				s.out.deferredUntilUp = 0
			}
			return gone
		})
	}
	o.tickLines(now)
	o.wheel.Advance(now, func(s *session) { o.check(s, now) })
	o.remoteWheel.Advance(now, func(p *remote) { o.checkRemote(p, now) })
	if o.wheel.Len() == 0 && o.up.Load() {
		o.ep.ticker.Disarm()
		if !o.up.Load() { // the watcher arms the ticker after it stores up: the second of the two sees the first
			o.ep.ticker.Arm()
		}
	}
}

// spread sets the times of questions about single streams: the more streams, the rarer.
func (o *outbox) spread() {
	t := &o.ep.times
	few := min(keepAlivesPerStream*t.KeepAlive, streamSilence)
	o.streamTimes.KeepAlive = max(t.KeepAlive, few, int64(o.wheel.Len())*streamQuestion)
	o.repeat = max(t.Ack, int64(o.asking)*repeatedQuestion)
}

// abandon ends the streams that have waited for the connection for DisconnectTimeout.
func (o *outbox) abandon(now int64) {
	end := func(s *session) {
		if waits := s.out.life.upSince; waits != 0 && now-waits >= o.ep.times.Disconnect { // else it is about to be served
			s.requestEnd(disconnected())
		}
	}
	o.ep.sessions.Range(func(_ string, s *session) bool { end(s); return true })
	for _, s := range o.waitingUntilUp { // what was never published has no token
		end(s)
	}
}

// disconnected is how streams end that waited for the connection for too long. The peer is told when it is there again: a
// consumer that has not heard from its producer does not know whom to ask, and would wait for ever.
func disconnected() *ending {
	return &ending{kind: endFault, err: connectionLost(nats.ErrDisconnected), reset: CloseError{CloseAbnormalClosure, "connection lost"}}
}

// check looks at a session that is due, acts on what that shows, and sees to it that it is looked at again.
func (o *outbox) check(s *session, now int64) {
	if s.out.state.Phase == lifecycle.Gone {
		return
	}
	f := o.facts(s, now)
	d := liveness.Decide(&f)
	if d.GiveUp != liveness.Alive && s.remote.Load() != nil && o.recordsArrive(s.remote.Load(), now) {
		f = o.facts(s, now)
		d = liveness.Decide(&f)
	}
	if d.GiveUp != liveness.Alive {
		o.giveUp(s, d.GiveUp)
		return
	}
	o.checkHeldClose(s, now)
	if d.Republish {
		s.mark(workPackets)
	}
	if d.Ping {
		if !d.Repeated { // an answer that does not come says nothing about the reader
			s.out.life.asks = min(s.out.life.asks, math.MaxInt16-1) + 1
		}
		if snd := s.send.Load(); snd != nil && d.Lost {
			snd.unacked.loss.Unanswered()
		}
		o.ping(s)
	}
	if f.Disconnected {
		o.lookAt(s, d.Next)
	} else {
		o.schedule(s, d.Next)
	}
}

// checkHeldClose publishes a CLOSE that was held back for the result of a handler which takes its time. A look that is late says
// that the process stood still, and its handlers with it: they get the time again.
func (o *outbox) checkHeldClose(s *session, now int64) {
	l := &s.out.life
	late := now - l.closeAt
	switch {
	case l.closeAt == 0:
		return
	case late > int64(2*maxTick):
		l.closeAt = now + int64(closeDelay)
	case late >= 0:
		l.closeAt = 0
		s.send.Load().packer.publishHeld()
		return
	}
	o.lookAt(s, l.closeAt)
}

// noteArrivals notes the signs of life that the outbox does not see itself: packets that the reader took, by the clock of
// when it did, and packets that wait for the reader.
func (o *outbox) noteArrivals(s *session, now int64) {
	l := &s.out.life
	before := l.heard
	if n := s.bucket.ring.Pushed(); n != l.seen {
		if l.seen = n; s.bucket.ring.Len() > 0 {
			l.heard = now
		}
		if p := s.remote.Load(); p != nil {
			p.records = now
		}
	}
	l.heard = max(l.heard, s.lastPop.Load())
	if l.pings > 0 && l.heard > l.pinged {
		o.answered(s)
	}
	if p := s.remote.Load(); p != nil && l.heard != before {
		p.hear(l.heard)
	}
}

// facts gathers what liveness.Decide goes by.
func (o *outbox) facts(s *session, now int64) liveness.Facts {
	l, snd := &s.out.life, s.send.Load()
	if !o.up.Load() {
		return liveness.Facts{
			Now: now, Times: &o.streamTimes, Born: l.upSince, Down: o.down,
			Ending: s.end.Load() != nil, Disconnected: true, Consumer: s.role == lifecycle.Consumer, Registered: s.reply != "",
		}
	}
	now = o.clock.Now(now)
	if s.end.Load() == nil {
		o.noteArrivals(s, now)
	}
	f := liveness.Facts{
		Now: now, Times: &o.streamTimes, Repeat: o.repeat, Patience: s.ownPatience(), Jitter: jitter(o.streamTimes.KeepAlive),
		Born: o.clock.At(l.upSince), Heard: l.heard, Sent: l.sent, Pinged: l.pinged,
		Suspect: l.suspect, Resumed: o.clock.Resumed(),
		Pings: int32(l.pings), Asks: int32(l.asks),
		Ending: s.end.Load() != nil, Consumer: s.role == lifecycle.Consumer, Registered: s.reply != "",
		Received: l.seen != 0, NoPeer: s.role == lifecycle.Consumer && s.out.peer == "" || s.peerTakesJSON(),
	}
	if l.took == tookLost {
		f.Lost = l.pinged
	}
	if l := s.out.line; l != nil {
		f.Queued = l.Patience()
	}
	if p := s.remote.Load(); p != nil {
		f.Others = p.records
	}
	if snd != nil {
		q := &snd.unacked
		f.Closed = q.closed
		f.Unacked = !s.peerTakesJSON() && !q.Empty()
		f.Stalled = !f.Unacked && (q.waits || snd.packer.stalled())
		f.Failed = s.nobodyReads.Load() && q.failed != nil
		f.Silent = s.role != lifecycle.Consumer && q.Next() == 0 && l.heard == 0 || s.unnamed()
	}
	return f
}

// giveUp ends a stream in which nothing can happen any longer. The peer is told, if it may come back.
func (o *outbox) giveUp(s *session, why liveness.Reason) {
	e := CloseError{Code: CloseAbnormalClosure}
	switch why {
	case liveness.Disconnected:
		s.requestEnd(disconnected())
		return
	case liveness.EndUnconfirmed:
		e.Text = "the end of the stream was not acknowledged"
	case liveness.RequestLost:
		e.Text = "the request or its answer was lost with the connection"
	case liveness.NobodyToAsk:
		e.Text = "packets are missing, and their sender did not say where to ask for them"
	case liveness.PeerGone:
		e.Text = "the peer does not answer"
	}
	end := &ending{kind: endFault, err: &e}
	if s.out.peer != "" && !s.peerTakesJSON() {
		end.reset = e
	}
	if why == liveness.PeerGone && s.remote.Load() != nil && s.remote.Load().absent {
		end.err = fmt.Errorf("%w: %w", &e, nats.ErrNoResponders)
	}
	s.requestEnd(end)
}

// maxLinger is for how long what is left of a stream is kept for a peer that acknowledges it bit by bit. A slow line may
// take minutes for a window.
const maxLinger = int64(time.Hour)

// lingers reports whether to go on waiting for a peer that acknowledged some of what is left of a stream that has closed: for
// maxLinger in all, and no longer than for one that acknowledges nothing while half of what may be kept is in use.
func (o *outbox) lingers(q *unackedPackets, now int64) bool {
	limit := max(maxLinger, o.ep.times.Resume)
	if o.ep.kept.Load() > o.ep.budget/2 {
		limit = o.ep.times.Resume
	}
	return now-q.closeSent < limit
}

// ping asks the peer for a CREDIT.
func (o *outbox) ping(s *session) {
	l := &s.out.life
	if l.pings >= liveness.SuspectPings && l.suspect == 0 {
		l.suspect = o.time()
	}
	if l.pings == 0 {
		o.asking++
	}
	l.pings = min(l.pings, math.MaxInt16-1) + 1
	l.pinged = o.time()
	o.publishPing(s)
	o.schedule(s, l.pinged+o.ep.times.Ack)
}

// publishPing publishes a PING on a stream.
func (o *outbox) publishPing(s *session) {
	if s.reply == "" {
		if e := o.ep.register(s, s.controlToken()); e != nil {
			s.requestEnd(e)
			return
		}
	}
	if s.crossing() != nil && s.role == lifecycle.Handler {
		o.tellAt(s, s.out.peer, s.reply, Frame{Type: FramePing}, Frame{Type: FrameResume, Payload: []byte(s.token())})
	} else {
		o.tellAt(s, s.out.peer, s.reply, Frame{Type: FramePing})
	}
	o.seek(s)
}

// absent takes the server's word that nobody received a first packet or a PING. It is a hint: the peer's connection may
// be coming back.
func (o *outbox) absent(s *session) {
	if s.peerTakesJSON() { // what nobody received is lost, and cannot be sent again
		e := &CloseError{CloseAbnormalClosure, "nobody receives the stream"}
		s.requestEnd(&ending{kind: endFault, err: fmt.Errorf("%w: %w", e, nats.ErrNoResponders)})
		return
	}
	p := s.remote.Load()
	if p == nil {
		return
	}
	p.absent = true
	if p.suspect == 0 {
		p.suspect = o.time()
	}
	o.lookAtRemote(p, o.clock.Until(o.time()))
	o.seek(s)
}

// jitter is by how much an interval of d is made shorter, at random: up to a tenth.
func jitter(d int64) int64 { return rand.Int64N(d/10 + 1) }
