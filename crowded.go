package stream

import (
	"cmp"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// This file finds out which subjects of a server are not served because the connection has too many subscriptions:
// NATS's refusal for max_subscriptions names no subject. NATS's error callback runs doubt. NewServer runs newDoubts.
// The goroutine of an examination runs the rest. It starts with a refusal, and ends when every registration is heard.
// Both doubt and the examination lock Server.mu. The examination also locks Registration.mu.

// doubts are the refusals that name no subject.
type doubts struct {
	count     atomic.Int64
	first     atomic.Pointer[time.Time] // time of the first of them since the last round
	news      chan struct{}             // capacity 1: wakes the examination
	examining bool                      // guarded by Server.mu
}

func newDoubts() doubts { return doubts{news: make(chan struct{}, 1)} }

const (
	// suspicion is how long after it was sent a subscription may still be refused. By default, nats.go gives up a write
	// to the connection after this time.
	suspicion = time.Minute

	maxTrials = 64 // subscriptions at once that look for free room
)

// doubt notes that NATS refused a subscription of the connection. It may be one of the server's.
func (s *Server) doubt() {
	now := time.Now()
	s.doubts.first.CompareAndSwap(nil, &now)
	s.doubts.count.Add(1)
	select {
	case s.doubts.news <- struct{}{}:
	default:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.doubts.examining && s.idle == nil {
		s.doubts.examining = true
		s.helpers.Go((&examination{server: s, began: now}).run)
	}
}

// examination is the search for the registrations that refusals are about. Its goroutine owns it.
type examination struct {
	server *Server
	began  time.Time
	seen   int64     // refusals that a round has looked at
	own    int64     // refusals of trial subscriptions
	last   time.Time // of the last round
	series time.Time // when the present series of refusals began. It ends when none comes for the time of confirmation
	again  time.Time // when the series ends, zero without one. The watcher may see a new connection later than refusals on it
	mute   bool      // this end may not publish to its inbox, so nothing can be found out
}

func (x *examination) run() {
	s := x.server
	timer := time.NewTimer(never)
	defer timer.Stop()
	for {
		timer.Reset(time.Until(x.next(time.Now(), x.fresh() > 0)))
		select {
		case <-timer.C:
		case <-s.doubts.news: // the next round may be due sooner
			continue
		case <-s.draining:
			return
		case <-s.ep.ctx.Done():
			return
		}
		if x.round() && x.over() {
			return
		}
	}
}

// fresh returns how many refusals came that no round has looked at. It is negative while refusals of trials are not
// reported yet.
func (x *examination) fresh() int64 { return x.server.doubts.count.Load() - x.own - x.seen }

// next returns the time of the next round. fresh reports that refusals came which no round has looked at.
func (x *examination) next(now time.Time, fresh bool) time.Time {
	at := x.last.Add(backOff(x.last.Sub(x.began)))
	switch {
	case fresh && x.again.IsZero():
		at = now
	case fresh:
		at = earliest(at, x.last.Add(backOff(x.last.Sub(x.series))))
	case !x.again.IsZero():
		at = earliest(at, x.again)
	}
	if soonest := now.Add(minRenewal); fresh && at.Before(soonest) {
		return soonest // refusals come in bursts
	}
	return at
}

func earliest(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// over ends the examination unless there is news.
func (x *examination) over() bool {
	x.server.mu.Lock()
	defer x.server.mu.Unlock()
	if x.fresh() > 0 {
		return false
	}
	x.server.doubts.examining = false
	return true
}

// round suspends the registrations that NATS may have refused, and resumes as many as there is room for. It reports
// whether nothing is left to do.
func (x *examination) round() (done bool) {
	ep := x.server.ep
	x.last = time.Now()
	// The answer to a flush comes behind the refusals of all earlier subscriptions.
	if !ep.outbox.up.Load() || ep.inbox.refused.Load() != nil || ep.conn.Flush(probeTimeout) != nil {
		return false
	}
	first := x.server.doubts.first.Swap(nil)
	n := x.fresh()
	switch {
	case n > 0:
		if x.again.IsZero() {
			x.series = x.last
		}
		x.seen, x.again = x.seen+n, x.last.Add(confirmation)
	case !x.last.Before(x.again):
		x.again = time.Time{}
	}
	waiting := x.suspend(n > 0, first)
	for trials := 1; len(waiting) > 0; trials *= 2 {
		trials = min(trials, maxTrials, len(waiting))
		if x.mute {
			x.resume(waiting, 0)
			return x.again.IsZero()
		}
		free, ok := ep.inbox.room(trials)
		switch {
		case ok:
			x.own += int64(trials - free)
			x.resume(waiting[:free], ep.connected.Load())
			waiting = waiting[free:]
		case ep.inbox.cannotProbe():
			x.guess()
			continue
		default: // the watcher looks after the inbox and the connection
			return false
		}
		if free < trials {
			break
		}
	}
	for _, r := range waiting {
		r.crowd()
	}
	return len(waiting) == 0 && x.again.IsZero()
}

// suspend ends the subscriptions that NATS may have refused. It returns all registrations that wait for room, in the
// order in which they were made. refused is the time of the first of the refusals.
func (x *examination) suspend(fresh bool, refused *time.Time) (waiting []*Registration) {
	s := x.server
	connected := s.ep.connected.Load()
	up := s.ep.started.Add(time.Duration(connected))
	s.mu.Lock()
	for r := range s.registrations {
		r.mu.Lock()
		f := facts{
			subscribed: r.unsubscribe != nil, age: x.last.Sub(latest(r.since, up)), fresh: fresh,
			heard: connected != 0 && r.heard != nil && r.heard.Load() == connected, fitted: connected != 0 && r.fitted == connected,
		}
		if refused != nil {
			f.lasted = refused.Sub(r.since)
		}
		waits := r.reasons&suspendedCrowded != 0
		if fresh && r.listening {
			select {
			case r.relisten <- struct{}{}:
			default:
			}
		}
		r.mu.Unlock()
		if waits || f.suspected() {
			r.change(suspendedCrowded, 0)
			waiting = append(waiting, r)
		}
	}
	s.mu.Unlock()
	slices.SortFunc(waiting, func(a, b *Registration) int { return cmp.Compare(a.number, b.number) })
	return slices.DeleteFunc(waiting, func(r *Registration) bool { return !r.awaitsRoom() })
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// facts describe a subscription after NATS has refused a subscription without naming it.
type facts struct {
	subscribed bool
	heard      bool          // a message came on it, on this connection
	fitted     bool          // it was made when there was room for it, on this connection
	age        time.Duration // since it was sent
	fresh      bool          // NATS has refused a subscription since the last look
	lasted     time.Duration // from its making to the first refusal
}

// suspected reports whether the subscription may be the one that NATS refused.
func (f facts) suspected() bool {
	switch {
	case !f.subscribed || f.heard || f.age >= suspicion:
		return false
	case f.fitted: // another subscription of the connection may have taken its room
		return f.fresh && f.lasted < confirmation
	}
	return true
}

// resume ends the wait of registrations for which there is room, and returns when NATS has their subscriptions.
func (x *examination) resume(all []*Registration, connected int64) {
	var settling []<-chan struct{}
	for _, r := range all {
		r.mu.Lock()
		r.fitted = connected
		r.mu.Unlock()
		settling = append(settling, r.change(0, suspendedCrowded))
	}
	for _, settled := range settling {
		if settled != nil {
			<-settled
		}
	}
	if len(all) == 0 || x.server.ep.conn.Flush(probeTimeout) != nil {
		return
	}
	for _, r := range all {
		r.uncrowd()
	}
}

// guess is for a server that may not publish to its inbox, so it cannot find out whether there is room.
func (x *examination) guess() {
	x.mute = true
	x.server.journal.Error("stream: NATS refused a subscription of the server's connection, which has too many, and did not say which; "+
		"if it is one of the server's, its subject is not served; raise max_subscriptions, or let the server publish to its inbox",
		"error", nats.ErrMaxSubscriptionsExceeded)
}

// awaitsRoom waits until NATS has no subscription of r, and reports whether r waits for room only. If there are other
// reasons, r is doubted again when it subscribes.
func (r *Registration) awaitsRoom() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.changing != nil || r.left != nil {
		changing, left := r.changing, r.left
		r.mu.Unlock()
		if changing != nil {
			<-changing
		}
		if left != nil {
			<-left
		}
		r.mu.Lock()
		if r.left == left {
			r.left = nil
		}
	}
	if r.reasons == suspendedCrowded {
		return true
	}
	r.reasons &^= suspendedCrowded
	r.crowded = nil
	return false
}

// crowd records that NATS refuses the subscription of r because the connection has too many.
func (r *Registration) crowd() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.crowded == nil {
		r.crowded = fmt.Errorf("stream: %s is not served, because the connection has too many subscriptions; raise max_subscriptions: %w",
			r.subject, nats.ErrMaxSubscriptionsExceeded)
		r.server.journal.Error("stream: a subject is not served", "subject", r.subject, "queue", r.queue, "error", r.crowded)
	}
}

// uncrowd records that there is room for the subscription of r.
func (r *Registration) uncrowd() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.crowded != nil {
		r.server.journal.Info("stream: a subject is served again", "subject", r.subject, "queue", r.queue)
	}
	r.crowded = nil
}
