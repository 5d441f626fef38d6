package stream

import (
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn"
)

// This file subscribes to the subjects of a server and leaves them. Goroutines of the user run the exported functions.
// Any goroutine but the mux may run change, which does not wait. NATS's error callback runs refuse. Goroutines of
// package time run retry and confirm, which waits for NATS. settle calls NATS: HandleQueue runs it for the first time,
// and goroutines of its own run it later. Registration.mu guards the state of a registration. The functions of Server
// with the suffix Locked need Server.mu. Server.request takes both locks in the goroutine that reads a fast connection,
// so neither is held while user code runs.

// Registration is a subject that a [Server] serves, made by [Server.Handle] or [Server.HandleQueue]. It is safe for use
// by many goroutines at once.
type Registration struct {
	server         *Server
	subject, queue string
	handler        Handler
	number         int // of the registrations of the server, in the order in which they were made

	urgent chan struct{}  // capacity 1: a reason was added that does not wait for minStay
	ending sync.WaitGroup // of subscriptions that NATS still delivers to

	mu          sync.Mutex // never held during a call to NATS
	reasons     suspension
	unsubscribe func()        // nil while there is no subscription
	since       time.Time     // when it was made
	left        chan struct{} // of the last subscription that was ended; closed when NATS has confirmed
	changing    chan struct{} // not nil while a goroutine runs settle; closed when it is done

	refused      error // the error with which NATS refused the subscription, nil if no refusal is known
	lastRefusal  error // as NATS reported it
	refusals     int
	refusedSince time.Time

	heard   *atomic.Int64 // endpoint.connected when a message last came on the subscription
	fitted  int64         // endpoint.connected when an examination found room for the subscription
	crowded error         // why r waits for room on the connection, nil if it does not

	relisten  chan struct{} // capacity 1: NATS may have refused the subscription of hearSought
	listening bool          // a goroutine runs hearSought
	listens   time.Time     // until when
	deaf      bool          // NATS refuses a subscription outside the queue group
}

// confirmation is how long a subscription must last after a refusal to count as accepted. NATS refuses within a round
// trip, and nats.go reports that a moment later.
const confirmation = time.Second

// minStay is the shortest time for which a server stays in a queue group before it leaves because it is full. Without
// it, short handlers would make the server leave and return all the time.
const minStay = 100 * time.Millisecond

// suspension is a set of reasons for which a registration has no subscription.
type suspension uint8

const (
	suspendedFull    suspension = 1 << iota // the server has no room for another stream
	suspendedRefused                        // NATS refuses the subject; the server subscribes again later
	suspendedUnheard                        // NATS refuses the inbox, so no stream could go on
	suspendedCrowded                        // the connection has too many subscriptions, or that is being examined
	suspendedStopped                        // for good: by Stop, Drain or Close, or because NATS accepts no more subscriptions
)

// Handle serves the requests on subject with h. The subject may have wildcards. Messages that are no requests, such as
// packets of streams, are dropped and counted in [Stats].DroppedStray. If the first element of subject is a wildcard,
// all messages on subjects that begin with $ or _ are dropped, too.
//
// If several servers handle the same subject, each of them gets every request. The consumer reads from the first that
// answers, or from all of them with [Client.OpenMany]. [Server.HandleQueue] distributes the requests instead. A request
// that is sent before the NATS server knows the subscription fails with [nats.ErrNoResponders]: call [nats.Conn.Flush]
// to wait for the NATS server.
//
// Errors: those of [nats.Conn.Subscribe]; [ErrServerClosed] after the server's end; an error if h is nil, or if an
// interceptor of [ServerParams] returns nil for it.
func (s *Server) Handle(subject string, h Handler) (*Registration, error) {
	return s.HandleQueue(subject, "", h)
}

// HandleQueue is [Server.Handle] as a member of a queue group: NATS gives each request to one member. A server that is
// full leaves its groups until it has room, unless [ServerParams].StayWhenFull is set.
func (s *Server) HandleQueue(subject, queue string, h Handler) (*Registration, error) {
	h, err := s.intercept(h)
	if err != nil {
		return nil, err
	}
	return s.register(subject, queue, h)
}

// intercept puts the interceptors around h.
func (s *Server) intercept(h Handler) (Handler, error) {
	if h == nil {
		return nil, errors.New("stream: Handle needs a handler, it got nil")
	}
	if h = chain(h, s.interceptors); h == nil {
		return nil, errors.New("stream: an interceptor of ServerParams returned a nil Handler: return the next one, or one that calls it")
	}
	return h, nil
}

// register subscribes to subject.
func (s *Server) register(subject, queue string, h Handler) (*Registration, error) {
	r := &Registration{
		server: s, subject: subject, queue: queue, handler: h,
		urgent: make(chan struct{}, 1), relisten: make(chan struct{}, 1), changing: make(chan struct{}),
	}
	s.mu.Lock()
	ending := s.idle != nil
	if !ending { // the goroutine that ends a server does not look for later registrations
		r.reasons = s.suspended & r.heeds()
		s.registered++
		r.number = s.registered
		s.registrations[r] = struct{}{}
	}
	s.mu.Unlock()
	if ending {
		return nil, ErrServerClosed
	}
	var err error
	if e := s.ep.gone.Load(); e != nil { // the connection is closed
		err = fmt.Errorf("%w: %w", ErrServerClosed, e.err)
	} else if e := s.ep.inbox.refused.Load(); e != nil {
		err = fmt.Errorf("stream: handle %s: %w", subject, e.err)
	} else if s.ep.inbox.confirm(); s.ep.inbox.refused.Load() == nil { // while it is refused, r waits for the inbox
		err = r.subscribe() // also if r begins suspended: NATS then reports a subject that it does not accept
	}
	if err != nil {
		r.mu.Lock()
		r.reasons |= suspendedStopped
		r.mu.Unlock()
	}
	r.settle()
	if err != nil {
		s.forget(r)
		return nil, err
	}
	return r, nil
}

// Stop ends the registration: no further requests on its subject reach the handler. Requests that NATS has delivered
// before are served, and running handlers go on. Stop returns when NATS has confirmed the end of the subscription,
// within 2 s. It does not wait for handlers, so a handler may call it. A second call, or one after the server's end,
// does nothing.
func (r *Registration) Stop() {
	if changing := r.change(suspendedStopped, 0); changing != nil {
		<-changing
	}
	r.ending.Wait() // nothing is added to it any more
	r.server.forget(r)
}

// Err returns the error with which NATS refuses the subscription to the subject, nil if NATS has reported no refusal.
// NATS reports a refusal some time after [Server.Handle] has returned, and also later if permissions change. During a
// refusal no requests reach the handler, and the server subscribes again at least every 5 s. The refusal is also logged
// to [ServerParams].Logger. A refusal because of max_subscriptions names no subject. The server finds out which of its
// subjects are not served, and their errors match [nats.ErrMaxSubscriptionsExceeded]. A server that may not publish to
// its own inbox cannot find that out. It then only logs the refusal, and subscribes again to every subject that NATS
// may have refused.
func (r *Registration) Err() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.refused != nil {
		return r.refused
	}
	return r.crowded
}

// refuse records that NATS refused the subscription, and schedules the next attempt. NATS's error callback calls it.
func (r *Registration) refuse(denied error) {
	err := fmt.Errorf("stream: may not subscribe to %s; allow it (docs/PROTOCOL.md section 15): %w", r.subject, denied)
	r.mu.Lock()
	first := r.refused == nil
	if first {
		r.refusedSince = time.Now()
	}
	r.refused, r.lastRefusal = err, denied
	r.refusals++
	n, again := r.refusals, renewal(r.refusedSince)
	if first { // with the lock held, which gives the lines their order
		r.server.journal.Error("stream: a subject is not served", "subject", r.subject, "queue", r.queue, "error", err)
	}
	r.mu.Unlock()
	r.change(suspendedRefused, 0)
	time.AfterFunc(again, func() { r.retry(n) })
}

// retry subscribes again after refusal number n. A goroutine of package time calls it.
func (r *Registration) retry(n int) {
	r.mu.Lock()
	stale := r.refusals != n || r.reasons&suspendedStopped != 0
	r.mu.Unlock()
	if !stale {
		r.change(0, suspendedRefused)
	}
}

// confirm forgets refusal number n if NATS accepted the subscription that was made after it, at since. The answer to
// the flush comes behind a refusal, and nats.go notes a refusal before it takes that answer. It may report the refusal
// later.
func (r *Registration) confirm(n int, since time.Time) {
	s := r.server
	stale := func() bool {
		return r.refusals != n || r.unsubscribe == nil || !r.since.Equal(since) || s.ep.ctx.Err() != nil
	}
	r.mu.Lock()
	old := stale()
	r.mu.Unlock()
	if old {
		return
	}
	answered := s.ep.conn.Flush(probeTimeout) == nil
	last := s.ep.conn.LastError()
	d, denied := natsconn.Denied(last)
	denied = denied && d == natsconn.Denial{Subject: r.subject, Queue: r.queue, Subscribe: true}
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case stale():
	case !answered || denied && last != r.lastRefusal:
		time.AfterFunc(confirmation, func() { r.confirm(n, since) })
	default:
		r.refused = nil
		s.journal.Info("stream: a subject is served again", "subject", r.subject, "queue", r.queue)
	}
}

// heeds returns the set of reasons that can suspend r. A full server outside any queue group keeps its subscription: it
// refuses requests with a reason. Without a subscription, consumers would only get [nats.ErrNoResponders].
func (r *Registration) heeds() suspension {
	if r.queue == "" {
		return ^suspendedFull
	}
	return ^suspension(0)
}

// change adds and removes reasons, and starts a goroutine that subscribes or unsubscribes if necessary. It returns a
// channel that is closed when the goroutine is done, nil if there is nothing to do. change itself does not call NATS,
// so callbacks of NATS may call it, with Server.mu held.
func (r *Registration) change(add, remove suspension) (changing <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reasons = r.reasons&^remove | add&r.heeds()
	if add&^suspendedFull != 0 {
		select {
		case r.urgent <- struct{}{}:
		default:
		}
	}
	if r.changing == nil {
		if r.settledLocked() {
			return nil
		}
		r.changing = make(chan struct{})
		go r.settle() // Stop waits for it, and so does the end of the server
	}
	return r.changing
}

// settledLocked reports whether there is a subscription exactly if there is no reason against it.
func (r *Registration) settledLocked() bool { return (r.unsubscribe != nil) == (r.reasons == 0) }

// settle subscribes and unsubscribes until the subscription agrees with the reasons, and closes changing then. The
// goroutine that made changing calls it.
func (r *Registration) settle() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for !r.settledLocked() {
		if r.unsubscribe == nil {
			r.mu.Unlock()
			err := r.subscribe()
			if err != nil {
				r.server.journal.Error("stream: cannot serve a subject again", "subject", r.subject, "queue", r.queue, "error", err)
			}
			r.mu.Lock()
			if err != nil { // the connection is closed or drains: it accepts no more subscriptions
				r.reasons |= suspendedStopped
			}
		} else if stay := time.Until(r.since.Add(minStay)); stay > 0 && r.reasons == suspendedFull {
			r.mu.Unlock()
			select {
			case <-time.After(stay):
			case <-r.urgent:
			}
			r.mu.Lock()
		} else {
			unsubscribe, left := r.unsubscribe, make(chan struct{})
			r.unsubscribe, r.left = nil, left
			r.ending.Go(func() { // it may take long, and there may be room again before
				defer close(left)
				unsubscribe()
			})
		}
	}
	close(r.changing)
	r.changing = nil
}

func (r *Registration) subscribe() error {
	s, heard, headers := r.server, new(atomic.Int64), new(requestHeaders)
	unsubscribe, err := natsconn.SubscribeRequests(s.ep.conn, r.subject, r.queue, func(m *nats.Msg, header []byte) {
		if connected := s.ep.connected.Load(); heard.Load() != connected {
			heard.Store(connected)
		}
		if header != nil {
			m.Header = headers.decode(header)
		}
		s.request(m, r)
	})
	if err != nil {
		return fmt.Errorf("stream: handle %s: %w", r.subject, err)
	}
	r.mu.Lock()
	now := time.Now()
	r.unsubscribe, r.since, r.heard = unsubscribe, now, heard
	if n := r.refusals; r.refused != nil {
		time.AfterFunc(confirmation, func() { r.confirm(n, now) })
	}
	r.mu.Unlock()
	return nil
}

func (s *Server) forget(r *Registration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.registrations, r)
}

// suspendLocked adds a reason to have no subscription to all present and later registrations that heed it.
func (s *Server) suspendLocked(why suspension) {
	s.suspended |= why
	for r := range s.registrations {
		r.change(why, 0)
	}
}

// resumeLocked removes a reason from all registrations.
func (s *Server) resumeLocked(why suspension) {
	s.suspended &^= why
	for r := range s.registrations {
		r.change(0, why)
	}
}

// checkRoomLocked makes the server leave its queue groups if it is full, and return if it has room again.
func (s *Server) checkRoomLocked() {
	if s.stays {
		return
	}
	full := s.suspended&suspendedFull != 0
	switch now := s.room.full(s.handlers, s.sessions, full); {
	case now && !full:
		s.suspendLocked(suspendedFull)
	case full && !now:
		s.resumeLocked(suspendedFull)
	}
}

// room is the capacity of a server in streams.
type room struct {
	handlers int // that run
	sessions int // of handlers that run, and of those whose streams have something left to send
}

func roomFor(maxStreams int) room {
	return room{handlers: maxStreams, sessions: 2*min(maxStreams, math.MaxInt/4) + lingering}
}

// spare is the divisor for the part of the room that must be free before a full server returns to its queue groups: an
// eighth. Without it, a busy server would leave and return with each handler that ends.
const spare = 8

// full reports whether a server with that many handlers and sessions is full. was reports that it was full before: then
// it stays full until the spare part is free.
func (r room) full(handlers, sessions int, was bool) bool {
	if was {
		return handlers > r.handlers-max(1, r.handlers/spare) || sessions > r.sessions-max(1, r.sessions/spare)
	}
	return handlers >= r.handlers || sessions >= r.sessions
}
