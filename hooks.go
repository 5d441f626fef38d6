package stream

import (
	"io"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/natsstream/stream/internal/lifecycle"
)

// This file passes events of streams to the user's hooks. Any goroutine reports an event, which neither waits nor calls
// the user. A goroutine of the endpoint calls the hooks; it exists only if there are any. newEndpoint makes the
// observer. The watcher, or the goroutine that closes the endpoint, ends it. observer.mu guards the events that wait.
// result locks the packer.

// Hooks are functions that a [Client] or [Server] calls when something happens to one of its streams: for logs, metrics
// and traces. Each may be nil. A stream pays nothing for hooks that are not set.
//
// One goroutine of the client or server calls all of its hooks, one after the other, in the order of the events. So a
// hook that waits delays later calls of hooks, and delays no stream. If more than 16,384 events wait, further ones are
// dropped, and DroppedEvents of [Stats] counts them. Closed is never dropped: each stream that was reported by Opened
// is reported by Closed once. A panic of a hook is logged, and the next event follows.
//
// Close of the client or server ends all streams, and waits up to 2 s for the hooks that report this. A hook must not
// call it.
type Hooks struct {
	// Opened reports that a consumer has called Open, that a request has reached a handler, or that [NewWriter] has
	// made a [Writer]. With [WithRetry], each request is a stream of its own. With [Client.OpenMany], each responder
	// has one, from its first packet on.
	Opened func(StreamInfo)
	// FirstRecord reports that a read of the consumer has returned the first record, or that the producer has published
	// it.
	FirstRecord func(StreamInfo)
	// Closed reports that the stream has ended at this end, and that its packets were acknowledged or given up. A
	// consumer's stream ends when the consumer has read its end or closed it, and a handler's stream ends when the
	// handler has returned. err is nil if the stream ended normally. Otherwise err is the error that reads of the
	// consumer return, or that the consumer of the handler gets: [ErrClosed] for a consumer that left before the end,
	// and a [*CloseError] for a code.
	Closed func(info StreamInfo, totals Totals, err error)
	// Retransmitted reports that packets were published again because the peer missed them. One event may cover
	// retransmissions that follow each other.
	Retransmitted func(info StreamInfo, packets int)
	// Reconnected reports that the stream goes on after the connection of this end has come back.
	Reconnected func(StreamInfo)
}

// JoinHooks returns hooks that call the functions of all, one after the other: for example of metrics and of a log. A
// field that is nil in each of them is nil in the result. If a function panics, the functions after it do not get the
// event.
func JoinHooks(all ...Hooks) Hooks {
	var joined Hooks
	for _, h := range all {
		joined.Opened = joinInfo(joined.Opened, h.Opened)
		joined.FirstRecord = joinInfo(joined.FirstRecord, h.FirstRecord)
		joined.Reconnected = joinInfo(joined.Reconnected, h.Reconnected)
		if first, next := joined.Closed, h.Closed; first == nil {
			joined.Closed = next
		} else if next != nil {
			joined.Closed = func(i StreamInfo, t Totals, err error) { first(i, t, err); next(i, t, err) }
		}
		if first, next := joined.Retransmitted, h.Retransmitted; first == nil {
			joined.Retransmitted = next
		} else if next != nil {
			joined.Retransmitted = func(i StreamInfo, packets int) { first(i, packets); next(i, packets) }
		}
	}
	return joined
}

func joinInfo(first, next func(StreamInfo)) func(StreamInfo) {
	switch {
	case first == nil:
		return next
	case next == nil:
		return first
	}
	return func(i StreamInfo) { first(i); next(i) }
}

// StreamInfo identifies the stream of an event, and states when the event happened.
type StreamInfo struct {
	ID       uint64        // number of the stream at this client or server, from 1
	Subject  string        // of the request; empty for a Writer of NewWriter, which does not know it
	Producer bool          // this end is the producer
	Opened   time.Time     // when the stream was opened at this end
	Elapsed  time.Duration // from then until the event
}

type eventKind uint8

const (
	eventOpened eventKind = iota
	eventFirstRecord
	eventClosed
	eventRetransmitted
	eventReconnected
)

// event is a call of a hook that waits for its turn.
type event struct {
	kind    eventKind
	stream  *observed
	elapsed time.Duration
	packets int
	totals  Totals
	err     error
}

// observed is a stream of an endpoint with hooks.
type observed struct {
	info    StreamInfo
	session *session
	first   bool         // FirstRecord of a producer was reported; the outbox's
	ends    atomic.Int32 // how many of its users have not finished yet: the outbox, and the consumer or the handler
	closed  bool         // Closed was reported; guarded by observer.mu
}

// observer passes the events of an endpoint to its hooks.
type observer struct {
	hooks   Hooks
	log     *slog.Logger
	dropped *atomic.Uint64 // a counter of the endpoint
	done    chan struct{}  // closed when the goroutine has ended
	most    int            // of events that wait: maxEvents, or fewer in tests

	mu     sync.Mutex
	wake   sync.Cond
	events []event
	open   map[*observed]struct{}
	last   uint64 // number of the stream that was opened last
	ending bool   // no further stream is opened
	over   bool   // the end of every stream was reported: no further event comes
}

// Bounds of the events that wait, and of the wait for them.
const (
	maxEvents = 1 << 14
	hooksEnd  = 2 * time.Second
)

// newObserver returns an observer that calls hooks, nil if there are none.
func newObserver(hooks Hooks, dropped *atomic.Uint64) *observer {
	if hooks.Opened == nil && hooks.FirstRecord == nil && hooks.Closed == nil && hooks.Retransmitted == nil && hooks.Reconnected == nil {
		return nil
	}
	ob := &observer{hooks: hooks, dropped: dropped, most: maxEvents, log: slog.Default(), done: make(chan struct{}), open: make(map[*observed]struct{})}
	ob.wake.L = &ob.mu
	go ob.run()
	return ob
}

// run calls the hooks until the endpoint has ended and no event waits.
func (ob *observer) run() {
	defer close(ob.done)
	for {
		ob.mu.Lock()
		for len(ob.events) == 0 && !ob.over {
			ob.wake.Wait()
		}
		events := ob.events
		ob.events = nil
		ob.mu.Unlock()
		if len(events) == 0 {
			return
		}
		for i := range events {
			ob.call(&events[i])
		}
	}
}

// call calls the hook for e.
func (ob *observer) call(e *event) {
	info := e.stream.info
	info.Elapsed = e.elapsed
	defer func() {
		if v := recover(); v != nil {
			ob.log.Error("stream: hook panicked", "subject", info.Subject, "panic", v, "stack", string(debug.Stack()))
		}
	}()
	h := &ob.hooks
	switch {
	case e.kind == eventOpened && h.Opened != nil:
		h.Opened(info)
	case e.kind == eventFirstRecord && h.FirstRecord != nil:
		h.FirstRecord(info)
	case e.kind == eventClosed && h.Closed != nil:
		h.Closed(info, e.totals, e.err)
	case e.kind == eventRetransmitted && h.Retransmitted != nil:
		h.Retransmitted(info, e.packets)
	case e.kind == eventReconnected && h.Reconnected != nil:
		h.Reconnected(info)
	}
}

// report queues an event of st. It takes a lock for a moment, and calls nothing of the user.
func (ob *observer) report(kind eventKind, st *observed) {
	ob.mu.Lock()
	defer ob.mu.Unlock()
	if st.closed {
		return
	}
	e := event{kind: kind, stream: st, elapsed: time.Since(st.info.Opened)}
	if kind == eventRetransmitted {
		if n := len(ob.events); n > 0 && ob.events[n-1].kind == kind && ob.events[n-1].stream == st {
			ob.events[n-1].packets++
			return
		}
		e.packets = 1
	}
	if len(ob.events) >= ob.most {
		ob.dropped.Add(1)
		return
	}
	ob.queueLocked(e)
}

func (ob *observer) queueLocked(e event) {
	ob.events = append(ob.events, e)
	ob.wake.Signal()
}

// opened begins to observe s. ends is the number of its users that finish before Closed. The session is not marked yet.
// So the outbox knows it only if the endpoint has just ended, and then close reports its end.
func (ob *observer) opened(s *session, subject string, ends int32) {
	st := &observed{session: s, info: StreamInfo{Subject: subject, Producer: s.role != lifecycle.Consumer, Opened: time.Now()}}
	st.ends.Store(ends)
	ob.mu.Lock()
	defer ob.mu.Unlock()
	if ob.ending {
		return
	}
	if len(ob.events) >= ob.most { // it is not observed at all, because its Closed would come without Opened
		ob.dropped.Add(1)
		return
	}
	ob.last++
	st.info.ID = ob.last
	ob.open[st] = struct{}{}
	s.extra().observed.Store(st)
	if s.role == lifecycle.Consumer {
		s.recv.readLock.Or(gateFirst)
	}
	ob.queueLocked(event{kind: eventOpened, stream: st})
}

// close reports the end of all streams that have not ended, and lets the goroutine end.
func (ob *observer) close() {
	ob.mu.Lock()
	ob.ending = true
	left := make([]*observed, 0, len(ob.open))
	for st := range ob.open {
		left = append(left, st)
	}
	ob.mu.Unlock()
	for _, st := range left {
		ob.closed(st)
	}
	ob.mu.Lock()
	defer ob.mu.Unlock()
	ob.over = true
	ob.wake.Signal()
}

// wait waits until the goroutine has ended, or hooksEnd.
func (ob *observer) wait() {
	timer := time.NewTimer(hooksEnd)
	defer timer.Stop()
	select {
	case <-ob.done:
	case <-timer.C:
	}
}

// closed reports the end of st, once.
func (ob *observer) closed(st *observed) {
	e := event{kind: eventClosed, stream: st, elapsed: time.Since(st.info.Opened), totals: st.session.totals(), err: st.session.result()}
	ob.mu.Lock()
	defer ob.mu.Unlock()
	if !st.closed {
		st.closed = true
		delete(ob.open, st)
		ob.queueLocked(e)
	}
}

// observed returns s as its hooks see it, nil if it has none.
func (s *session) observed() *observed {
	if x := s.extras.Load(); x != nil {
		return x.observed.Load()
	}
	return nil
}

// observe reports an event of s if its endpoint has hooks.
func (s *session) observe(kind eventKind) {
	if ob := s.ep.observer; ob != nil {
		if st := s.observed(); st != nil {
			ob.report(kind, st)
		}
	}
}

// finished records that one user of s has finished: the outbox, the consumer, or the handler. The last of them reports
// Closed.
func (s *session) finished() {
	if ob := s.ep.observer; ob != nil {
		if st := s.observed(); st != nil && st.ends.Add(-1) == 0 {
			ob.closed(st)
		}
	}
}

// observeFirst reports FirstRecord when a producer has published its first record. Called by the outbox.
func (s *session) observeFirst() {
	if st := s.observed(); st != nil && s.role != lifecycle.Consumer && !st.first {
		st.first = true
		s.observe(eventFirstRecord)
	}
}

// result returns the error of the stream for Closed, nil if it ended normally.
func (s *session) result() error {
	end := s.end.Load()
	if end == nil {
		end = &wholeEnd
		if gone := s.ep.gone.Load(); gone != nil {
			end = gone
		}
	}
	err := end.err
	if s.role == lifecycle.Consumer {
		if cause := s.ctx.endCause(); cause != nil {
			err = cause
		}
		if err == io.EOF || err == ErrClosed && s.readDone() {
			return nil
		}
		return err
	}
	if end.kind == endComplete {
		snd := s.send.Load()
		snd.packer.mu.Lock()
		closing := snd.packer.closing
		snd.packer.mu.Unlock()
		if closing.Code != 0 && closing.Code != CloseNormalClosure {
			return &closing
		}
		return nil
	}
	if err == io.EOF {
		return nil
	}
	return err
}
