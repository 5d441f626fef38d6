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

// This file looks at streams in time: when a peer is asked, when a stream is given up, and how long its packets are
// kept; docs/PROTOCOL.md section 13. The outbox runs all of it, with three exceptions. The ticker runs runTicker and
// stuck, the watcher runs resume, and newEndpoint runs initTime. The outbox keeps sessions on a wheel, and looks at
// those that are due at each tick. A stream has neither a timer nor a goroutine. internal/liveness makes the decisions.

const (
	defaultKeepAlive         = 500 * time.Millisecond
	defaultAckTimeout        = 250 * time.Millisecond
	defaultResumeTimeout     = 5 * time.Second
	defaultDisconnectTimeout = 30 * time.Second

	// defaultPatience is how long a peer may take to answer, unless ResumeTimeout is shorter. A NATS client that lost
	// its server is back after 2.1 s by default, and a network may be silent for three. Together with KeepAlive it is
	// less than four seconds.
	defaultPatience = 3300 * time.Millisecond

	minTick = time.Millisecond
	maxTick = 50 * time.Millisecond
	// A tick that comes later than this many, and maxTick, after the one before was late: the process did not run.
	lateTicks = 2
)

// life holds the times of a session, in nanoseconds of the outbox's clock; 0 is never. The outbox owns it.
type life struct {
	upSince             int64 // since when the session waits for the connection, and when its request was published, by the endpoint's time
	heard, sent, pinged int64
	took                uint32 // which of this end's connections in turn took the request, from 1 on, or tookLost
	pings               int16  // since the peer was heard, at most math.MaxInt16
	asks                int16  // that were answered or may be, since something was sent, at most math.MaxInt16
	place               int32  // in remote.streams
	seen                uint32

	node wheel.Node[session]
}

// tookLost marks a request that may have been lost with a connection since life.pinged, or whose answer may have been
// lost. Before the answer there is no peer to ask.
const tookLost = math.MaxUint32

// tickLength returns the length of a tick: a quarter of the shortest timeout, so that every timeout is noticed soon
// after its end. It is at most maxTick, because one tick in 50 ms costs almost nothing. It is at least minTick, the
// precision of timers.
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

// runTicker is the ticker's goroutine. It wakes the outbox at every tick while there are sessions on its wheel.
func (ep *endpoint) runTicker() {
	ep.ticker.Run(wheel.Hooks{Wake: ep.outbox.park.Wake, Stuck: ep.stuck})
}

// stuck ends all streams because the outbox has waited in a publish for KeepAlive and ResumeTimeout: the connection
// takes no bytes. NATS notices that only after its FlusherTimeout. The ticker calls it.
func (ep *endpoint) stuck() {
	e := CloseError{CloseAbnormalClosure, "the connection takes no bytes"}
	ep.sessions.Range(func(_ [TokenSize]byte, s *session) bool {
		s.requestEnd(&ending{kind: endFault, err: &e, reset: e})
		s.unregister() // the outbox may wait for much longer
		s.releaseWindow()
		return true
	})
}

// time reads the clock by which peers are judged. It stands still while this end cannot hear its peers.
func (o *outbox) time() int64 { return o.clock.Now(o.ep.now()) }

// schedule puts the session on the wheel, to be checked when the clock reads at, or earlier.
func (o *outbox) schedule(s *session, at int64) { o.lookAt(s, o.clock.Until(at)) }

// lookAt is schedule with a time of the endpoint.
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

// dueBy reports whether the session will be checked before the clock reads at.
func (o *outbox) dueBy(s *session, at int64) bool {
	due := s.out.life.node.Due()
	return due != 0 && due <= o.clock.Until(at)
}

// noteAlive records a sign of life of the peer of s.
func (o *outbox) noteAlive(s *session) {
	l := &s.out.life
	l.heard = o.time()
	if p := s.remote.Load(); p != nil {
		p.hear(l.heard)
		if l.pings == 1 { // otherwise it may be the answer to any of them
			p.trip = l.heard - l.pinged
		}
	}
	o.answered(s)
}

// answered records that the peer has answered all questions of the session.
func (o *outbox) answered(s *session) {
	l := &s.out.life
	if l.pings > 0 {
		o.asking--
		if p := s.remote.Load(); p != nil {
			trip := l.heard - l.pinged
			if l.pinged < o.clock.Resumed() { // a reconnect is a part of it
				trip = 0
			}
			o.askNext(p, p.pays(trip, o.ep.times.Ack))
		}
	}
	l.pings = 0
	if x := s.extras.Load(); x != nil {
		x.suspect = 0
	}
}

// resume records that the connection is up again. Called by the watcher.
func (o *outbox) resume() {
	o.resumed.Store(o.ep.now())
	o.connection.Add(1)
}

// tickIfDue calls tick if a tick is due. The outbox also calls it between sessions, because with many streams and a
// slow connection one round takes long.
func (o *outbox) tickIfDue() bool {
	if !o.ep.ticker.TakeDue() {
		return false
	}
	o.tick()
	return true
}

// tick handles all work that is due.
func (o *outbox) tick() {
	now := o.ep.now()
	up, resumed := o.up.Load(), o.resumed.Load()
	o.clock.Tick(now, up && !o.dropped.Swap(false), resumed > o.ticked)
	if resumed > o.ticked {
		for _, p := range slices.Collect(o.remoteWheel.All()) {
			o.lookAtRemote(p, now) // questions that were due while the connection was down are due now
		}
	}
	o.ticked = now
	o.ep.clock.Store(o.clock.Now(now))
	o.spread()
	o.checkRecords()
	o.ep.windows.Turn(now)
	if up {
		o.ep.lookAtMaxPayload()
		o.decideDenials(now)
		o.down = 0
	} else if o.down == 0 || o.down < resumed { // the connection was up in between
		o.down = now
	} else if now-o.down >= o.ep.times.Disconnect {
		o.abandon(now)
	}
	if !o.up.Load() { // sessions that ended meanwhile must not pile up
		o.waitingUntilUp = slices.DeleteFunc(o.waitingUntilUp, func(s *session) bool {
			gone := s.out.state.Phase == lifecycle.Gone
			if gone {
				s.out.deferredUntilUp = 0
			}
			return gone
		})
	}
	o.tickLines(now)
	o.tickAskers()
	o.wheel.Advance(now, func(s *session) { o.check(s, now) })
	o.remoteWheel.Advance(now, func(p *remote) { o.checkRemote(p, now) })
	if o.wheel.Len() == 0 && o.up.Load() {
		o.ep.ticker.Disarm()
		if !o.up.Load() { // the watcher arms the ticker after it stores up: the second of the two sees the first
			o.ep.ticker.Arm()
		} else if f := o.ep.onIdle.Load(); f != nil {
			(*f)()
		}
	}
}

// spread sets the interval of questions on single streams. It grows with the number of streams.
func (o *outbox) spread() {
	t := &o.ep.times
	few := min(keepAlivesPerStream*t.KeepAlive, streamSilence)
	o.streamTimes.KeepAlive = max(t.KeepAlive, few, int64(o.wheel.Len())*streamQuestion)
	o.repeat = max(t.Ack, int64(o.asking)*repeatedQuestion)
}

// abandon ends the streams that have waited for the connection for DisconnectTimeout.
func (o *outbox) abandon(now int64) {
	end := func(s *session) {
		if waits := s.out.life.upSince; waits != 0 && now-waits >= o.ep.times.Disconnect { // 0: it is about to be served
			s.requestEnd(disconnected())
		}
	}
	o.ep.sessions.Range(func(_ [TokenSize]byte, s *session) bool { end(s); return true })
	for _, s := range o.waitingUntilUp { // sessions that published nothing have no token
		end(s)
	}
}

// disconnected returns the end of streams that waited too long for the connection. The peer gets a RESET when the
// connection is back, because a consumer that has not heard from its producer cannot ask, and would wait for ever.
func disconnected() *ending {
	return &ending{kind: endFault, err: connectionLost(nats.ErrDisconnected), reset: CloseError{CloseAbnormalClosure, "connection lost"}}
}

// check decides about a session that is due, acts on the decision, and schedules the next check.
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
		if p := s.remote.Load(); d.Paid && p != nil {
			p.repeats(o.time())
		}
		if !d.Repeated { // a missing answer is no sign of a slow reader
			s.out.life.asks = min(s.out.life.asks, math.MaxInt16-1) + 1
		}
		if snd := s.send.Load(); snd != nil && d.Lost {
			snd.unacked.loss.Unanswered()
		}
		o.ping(s)
	}
	if d.Wait {
		o.waitToAsk(s, toAsk)
	}
	if f.Disconnected {
		o.lookAt(s, d.Next)
	} else {
		o.schedule(s, d.Next)
	}
}

// checkHeldClose publishes a CLOSE that was held back for closeDelay, because the handler has not returned. A late
// check shows that the process stood still, and its handlers with it. The handler then gets closeDelay again.
func (o *outbox) checkHeldClose(s *session, now int64) {
	snd := s.send.Load()
	if snd == nil || snd.unacked.closeAt == 0 {
		return
	}
	q := &snd.unacked
	switch late := now - q.closeAt; {
	case late > int64(2*maxTick):
		q.closeAt = now + int64(closeDelay)
	case late >= 0:
		q.closeAt = 0
		snd.packer.publishHeld()
		return
	}
	o.lookAt(s, q.closeAt)
}

// noteArrivals records the signs of life that do not pass through the outbox: packets that the reader took, at the time
// when it took them, and packets that wait for the reader.
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

// facts gathers the facts for liveness.Decide.
func (o *outbox) facts(s *session, now int64) liveness.Facts {
	l, snd := &s.out.life, s.send.Load()
	if !o.up.Load() {
		return liveness.Facts{
			Now: now, Times: &o.streamTimes, Born: l.upSince, Down: o.down,
			Ending: s.end.Load() != nil, Disconnected: true, Consumer: s.role == lifecycle.Consumer, Registered: s.registered(),
		}
	}
	now = o.clock.Now(now)
	if s.end.Load() == nil {
		o.noteArrivals(s, now)
	}
	f := liveness.Facts{
		Now: now, Times: &o.streamTimes, Repeat: o.repeat, Patience: s.ownPatience(), Jitter: jitter(o.streamTimes.KeepAlive),
		Born: o.clock.At(l.upSince), Heard: l.heard, Sent: l.sent, Pinged: l.pinged,
		Suspect: s.suspect(), Resumed: o.clock.Resumed(),
		Pings: int32(l.pings), Asks: int32(l.asks),
		Ending: s.end.Load() != nil, Consumer: s.role == lifecycle.Consumer, Registered: s.registered(),
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
		f.Repeat = p.repeatAfter(o.repeat, o.ep.times.Resume)
		f.Unpaid = !p.mayRepeat(now, o.ep.times.Ack)
	}
	if snd != nil {
		q := &snd.unacked
		f.Closed = q.closed
		f.Scarce = o.scarce()
		f.Unacked = !s.peerTakesJSON() && !q.Empty()
		f.Stalled = !f.Unacked && (q.waits || snd.packer.stalled())
		f.Failed = s.nobodyReads() && q.failed != nil
		f.Silent = s.role != lifecycle.Consumer && q.Next() == 0 && l.heard == 0 || s.unnamed()
	}
	return f
}

// giveUp ends a stream for a reason of liveness.Decide. It sends a RESET if the peer has an address.
func (o *outbox) giveUp(s *session, why liveness.Reason) {
	e := CloseError{Code: CloseAbnormalClosure}
	switch why {
	case liveness.Disconnected:
		s.requestEnd(disconnected())
		return
	case liveness.EndUnconfirmed:
		if m := s.send.Load().unacked.passing; m != nil {
			if size, stuck := m.Stuck(); stuck {
				s.requestEnd(doesNotPass(size))
				return
			}
		}
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

// maxLinger is how long the packets of a closed stream are kept for a peer that acknowledges them bit by bit. A slow
// line may take minutes for a window.
const maxLinger = int64(time.Hour)

// lingers reports whether to keep waiting for a peer that acknowledged some packets of a closed stream. The outbox
// waits for maxLinger in all, and only for ResumeTimeout while half of the budget for kept packets is in use.
func (o *outbox) lingers(q *unackedPackets, now int64) bool {
	limit := max(maxLinger, o.ep.times.Resume)
	if o.scarce() {
		limit = o.ep.times.Resume
	}
	return now-q.closeSent < limit
}

// scarce reports whether half of what may be kept for all peers is in use.
func (o *outbox) scarce() bool { return o.ep.kept.Load() > o.ep.budget/2 }

// suspect returns since when the peer of s is suspect, 0 if it is not.
func (s *session) suspect() int64 {
	if x := s.extras.Load(); x != nil {
		return x.suspect
	}
	return 0
}

// ping asks the peer for a CREDIT.
func (o *outbox) ping(s *session) {
	l := &s.out.life
	if l.pings >= liveness.SuspectPings && s.suspect() == 0 {
		s.extra().suspect = o.time()
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
	if !s.registered() {
		if e := o.ep.register(s, s.controlToken()); e != nil {
			s.requestEnd(e)
			return
		}
	}
	frames, n := [3]Frame{{Type: FramePing}}, 1
	if s.crossing() != nil && s.role == lifecycle.Handler {
		frames[n] = Frame{Type: FrameResume, Payload: s.token[:]}
		n++
	}
	if takesStatement(s) {
		frames[n] = Frame{Type: frameEnvelopes}
		n++
	}
	o.tellAt(s, s.out.peer, s.reply(), frames[:n]...)
	o.seek(s)
}

// absent handles NATS's report that nobody received a first packet or a PING. It is only a hint, because the peer may
// be reconnecting.
func (o *outbox) absent(s *session) {
	if s.peerTakesJSON() { // the lost message cannot be sent again
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

// jitter returns a random part of d, up to a tenth, by which an interval is made shorter.
func jitter(d int64) int64 { return rand.Int64N(d/10 + 1) }
