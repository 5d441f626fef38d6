package stream

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
)

// This file is about time: when a peer is asked whether it lives, when it is given up, how long what was sent is kept
// for it; docs/PROTOCOL.md section 13. One ticker per endpoint looks at a wheel of sessions, and the outbox, which owns
// all of this, looks at those that are due. A stream has neither a timer nor a goroutine.

// intervals are the parameters of the same names, in nanoseconds.
type intervals struct {
	keepAlive, ack, resume, disconnect int64
}

const (
	defaultKeepAlive         = 15 * time.Second
	defaultAckTimeout        = 250 * time.Millisecond
	defaultResumeTimeout     = 5 * time.Second
	defaultDisconnectTimeout = 30 * time.Second

	maxTick = 50 * time.Millisecond

	suspectPings = 3 // unanswered ones that make a peer suspect
)

// life is what the outbox knows of a session in time, in nanoseconds of the endpoint's time; 0 is never.
type life struct {
	born, heard, sent, pinged int64
	suspect                   int64 // since when the peer may be gone
	closed                    int64 // since when everything was sent, and waits to be acknowledged
	asked                     int64 // when the request was published
	pings                     int32 // since the peer was heard
	asks                      int32 // that were answered or may be, since something was sent
	seen                      uint32
	absent                    bool // suspect because NATS said that nobody received a question

	// Links of the wheel.
	slot       int64 // number of the tick it is due in, 0 if it is not on the wheel
	prev, next *session
}

// wheel keeps sessions by the tick in which they are due (Varghese and Lauck, "Hashed and hierarchical timing wheels",
// SOSP 1987). One that is due later than the wheel reaches is looked at early, and put on it again.
type wheel struct {
	tick  int64 // length of one, nanoseconds
	done  int64 // number of the last tick that was looked at
	count int
	slots [wheelSlots]*session
}

const wheelSlots = 256

// set sees to it that s is looked at when at is over, or earlier.
func (w *wheel) set(s *session, at int64) {
	slot := min(max(at/w.tick+1, w.done+1), w.done+wheelSlots-1)
	if l := &s.life; l.slot != 0 {
		if l.slot <= slot {
			return
		}
		w.remove(s)
	}
	head := &w.slots[slot%wheelSlots]
	s.life.slot, s.life.prev, s.life.next = slot, nil, *head
	if *head != nil {
		(*head).life.prev = s
	}
	*head = s
	w.count++
}

func (w *wheel) remove(s *session) {
	l := &s.life
	if l.slot == 0 {
		return
	}
	if l.prev != nil {
		l.prev.life.next = l.next
	} else {
		w.slots[l.slot%wheelSlots] = l.next
	}
	if l.next != nil {
		l.next.life.prev = l.prev
	}
	l.slot, l.prev, l.next = 0, nil, nil
	w.count--
}

// advance takes off the wheel what is due at now and calls f for each, which may set it again.
func (w *wheel) advance(now int64, f func(*session)) {
	until := now / w.tick
	if until-w.done > wheelSlots { // slept through a round: everything is due
		w.done = until - wheelSlots
	}
	for w.done < until {
		w.done++
		for {
			s := w.slots[w.done%wheelSlots]
			if s == nil {
				break
			}
			w.remove(s)
			f(s)
		}
	}
}

// ticker wakes the outbox every tick, as long as there is a session on its wheel.
type ticker struct {
	ep    *endpoint
	tick  time.Duration
	wake  chan struct{} // capacity 1
	quit  chan struct{}
	ended chan struct{}
}

func (t *ticker) init(ep *endpoint) {
	shortest := min(ep.times.keepAlive, ep.times.ack, ep.times.resume, ep.times.disconnect)
	t.ep = ep
	t.tick = min(max(time.Duration(shortest)/4, time.Millisecond), maxTick)
	t.wake = make(chan struct{}, 1)
	t.quit = make(chan struct{})
	t.ended = make(chan struct{})
	ep.outbox.wheel.tick = int64(t.tick)
}

func (t *ticker) run() {
	defer close(t.ended)
	clock := time.NewTicker(t.tick)
	defer clock.Stop()
	missed := int64(0) // ticks in a row that the outbox did not look at. They stand still with the process, as clocks do not
	for {
		select {
		case <-clock.C:
		case <-t.quit:
			return
		}
		ep := t.ep
		ep.clock.Store(ep.now())
		if ep.outbox.armed.Load() {
			if !ep.outbox.due.Swap(true) {
				missed = 0
			} else if missed++; missed*int64(t.tick) >= ep.times.keepAlive+ep.times.resume {
				ep.stuck()
			}
			ep.outbox.park.Wake()
			continue
		}
		clock.Stop()
		select {
		case <-t.wake:
		case <-t.quit:
			return
		}
		clock.Reset(t.tick)
	}
}

// stuck ends all streams for the outbox, which waits in a publish: the connection has taken no bytes for longer than a
// peer may be silent. NATS notices only after its FlusherTimeout.
func (ep *endpoint) stuck() {
	e := CloseError{CloseAbnormalClosure, "the connection takes no bytes"}
	ep.sessions.Range(func(_ string, s *session) bool {
		s.finish(&ending{err: &e, tell: e})
		s.unregister()
		s.releaseWindow()
		return true
	})
}

// start makes a ticker that sleeps tick again. It never blocks.
func (t *ticker) start() {
	t.ep.outbox.armed.Store(true)
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

func (t *ticker) stop() {
	close(t.quit)
	<-t.ended
}

// now is the time since the endpoint was made, never 0.
func (ep *endpoint) now() int64 { return int64(time.Since(ep.started)) + 1 }

// schedule sees to it that the session is checked when at is over, or earlier. Called by the outbox.
func (o *outbox) schedule(s *session, at int64) {
	if s.finished {
		return
	}
	o.wheel.set(s, at)
	if o.wheel.count == 1 && !o.armed.Load() {
		o.ep.clock.Store(o.ep.now())
		o.ep.ticker.start()
	}
}

// hear notes a sign of life.
func (o *outbox) hear(s *session) {
	l := &s.life
	l.heard = o.ep.now()
	l.pings, l.suspect, l.absent = 0, 0, false
}

// resume says that the connection is there again: clocks stood still meanwhile.
func (o *outbox) resume() { o.resumed.Store(o.ep.now()) }

// tickIfDue ticks if the ticker did. With many streams and a slow connection the outbox is long under way with its queue.
func (o *outbox) tickIfDue() bool {
	if !o.due.Load() {
		return false
	}
	o.due.Store(false)
	o.tick()
	return true
}

// tick looks at what is due. Called by the outbox.
func (o *outbox) tick() {
	now := o.ep.now()
	o.ep.clock.Store(now)
	if o.up.Load() {
		o.down = 0
	} else if o.down == 0 || o.down < o.resumed.Load() { // it was up in between
		o.down = now
	} else if now-o.down >= o.ep.times.disconnect {
		o.abandon(now)
	}
	if !o.up.Load() { // opens that give up meanwhile leave nothing behind
		o.held = slices.DeleteFunc(o.held, func(s *session) bool {
			if s.finished {
				s.held = 0
			}
			return s.finished
		})
	}
	o.wheel.advance(now, func(s *session) { o.check(s, now) })
	if o.wheel.count == 0 && o.up.Load() {
		o.armed.Store(false)
		if !o.up.Load() { // down at the same time: whoever comes second sees the other
			o.armed.Store(true)
		}
	}
}

// abandon ends the streams that have waited for the connection for DisconnectTimeout.
func (o *outbox) abandon(now int64) {
	end := func(s *session) {
		if born := s.life.born; born != 0 && now-born >= o.ep.times.disconnect { // else it is about to be served
			s.finish(disconnected())
		}
	}
	o.ep.sessions.Range(func(_ string, s *session) bool { end(s); return true })
	for _, s := range o.held { // what was never published has no token
		end(s)
	}
}

// disconnected is how streams end that waited for the connection for too long. The peer is told when it is there again: a
// consumer that has not heard from its producer does not know whom to ask, and would wait for ever.
func disconnected() *ending {
	return &ending{err: connectionLost(nats.ErrDisconnected), tell: CloseError{CloseAbnormalClosure, "connection lost"}}
}

// check looks at a session that is due, and says when to look again.
func (o *outbox) check(s *session, now int64) {
	if s.finished {
		return
	}
	l, times := &s.life, &o.ep.times
	w := s.writer.Load()
	again := now + times.keepAlive
	if s.end.Load() != nil {
		o.schedule(s, again) // the end is on the queue
		return
	}
	if !o.up.Load() { // the other clocks stand still
		end := max(o.down, l.born) + times.disconnect
		if o.down != 0 && now >= end {
			s.finish(disconnected())
			return
		}
		if s.stream == nil && s.reply == "" {
			again = now + times.ack // probe will not find it, and its consumer waits to hear from it
		}
		o.schedule(s, min(again, end))
		return
	}
	if w != nil && s.returned.Load() && w.sent.failed != nil { // nobody else tries again
		s.mark(workPackets)
		again = now + times.ack
	}
	// Signs of life: control packets, which the outbox sees itself; packets, by the clock of when the reader took them;
	// and packets that the reader has not got to.
	resumed := o.resumed.Load()
	if n := s.bucket.ring.Pushed(); n != l.seen {
		if l.seen = n; s.bucket.ring.Len() > 0 {
			l.heard = now
		}
	}
	l.heard = max(l.heard, s.popped.Load())
	if l.pings > 0 && l.heard > l.pinged {
		l.pings, l.suspect, l.absent = 0, 0, false
	}

	unacked := w != nil && !w.json && w.sent.acked != w.sent.next
	silentHandler := s.stream == nil && w != nil && w.sent.next == 0 && l.pings == 0 && l.heard == 0
	switch {
	case l.closed != 0 && now-max(l.closed, resumed) >= times.resume:
		e := CloseError{CloseAbnormalClosure, "the end of the stream was not acknowledged"}
		s.finish(&ending{err: &e, tell: e})
		return
	case s.stream != nil && s.peer == "" || w != nil && w.json:
		// Nobody to ask: not answered yet, or a peer that knows no PING.
		if s.stream != nil && l.seen == 0 && l.asked != 0 && l.asked < resumed {
			if now-resumed >= times.resume {
				s.finish(&ending{err: &CloseError{CloseAbnormalClosure, "the request or its answer was lost with the connection"}})
				return
			}
			again = min(again, resumed+times.resume)
		}
		if l.suspect != 0 {
			if now-max(l.suspect, resumed) >= times.resume {
				s.finish(&ending{err: &CloseError{CloseAbnormalClosure, "packets are missing, and their sender did not say where to ask for them"}})
				return
			}
			again = min(again, max(l.suspect, resumed)+times.resume)
		}
		o.schedule(s, again)
		return
	case l.suspect != 0 && now-max(l.suspect, resumed) >= times.resume:
		e := CloseError{CloseAbnormalClosure, "the peer does not answer"}
		end := &ending{err: &e, tell: e}
		if l.absent {
			end.err = fmt.Errorf("%w: %w", &e, nats.ErrNoResponders)
		}
		s.finish(end)
		return
	}

	silent := max(l.heard, l.born, resumed) + jitter(times.keepAlive)
	ask := now >= silent || silentHandler
	if unacked || w != nil && w.stalled() {
		// Asked ever more rarely: a credit that was lost looks like a reader that takes its time.
		overdue := max(l.sent, l.pinged, resumed) + times.ack<<min(l.asks, 6)
		ask = ask || now >= overdue
		again = min(again, overdue)
	}
	if l.pings > 0 || l.suspect != 0 {
		repeat := l.pinged + times.ack
		ask = now >= repeat
		again = min(again, repeat)
	} else if silent > now {
		again = min(again, silent)
	}
	if ask {
		if l.pings == 0 { // what was not answered says nothing about the reader
			l.asks++
		}
		if w != nil && l.pings > 1 { // one may only be slower than AckTimeout
			w.sent.unanswered()
		}
		o.ping(s)
		again = min(now+times.keepAlive, now+times.ack)
	}
	if l.closed != 0 {
		again = min(again, max(l.closed, resumed)+times.resume)
	}
	if l.suspect != 0 {
		again = min(again, max(l.suspect, resumed)+times.resume)
	}
	o.schedule(s, again)
}

// ping asks the peer for a CREDIT.
func (o *outbox) ping(s *session) {
	l := &s.life
	if l.pings >= suspectPings && l.suspect == 0 {
		l.suspect = o.ep.now()
	}
	l.pings++
	l.pinged = o.ep.now()
	if s.reply == "" {
		if o.ep.register(s, s.controlToken()) != nil {
			s.finish(o.ep.gone.Load())
			return
		}
	}
	o.tell(s, s.reply, Frame{Type: FramePing})
	o.schedule(s, l.pinged+o.ep.times.ack)
}

// absent takes the server's word that nobody received a first packet or a PING. It is a hint: the peer's connection may
// be coming back.
func (o *outbox) absent(s *session) {
	l := &s.life
	l.absent = true
	if l.suspect == 0 {
		l.suspect = o.ep.now()
		o.schedule(s, l.suspect+o.ep.times.ack)
	}
}

// jitter makes d up to a tenth shorter, so that streams which began together are not asked together.
func jitter(d int64) int64 { return d - rand.Int64N(d/10+1) }
