package stream

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/discovery"
	"github.com/natsstream/stream/internal/journal"
	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/natsconn"
)

// This file has Server and its parameters. Goroutines of the user run the exported functions. The callbacks of NATS, or
// the reader of a fast connection, run request, which starts the handler of a request in a goroutine of its own. The
// callbacks of NATS also run subscriptionRefused and inboxChanged. The watcher runs inboxChanged, too. The goroutines of
// handlers run count. The outbox runs streamEnded. The goroutine that retire starts runs unsubscribe. Server.mu guards
// the state that they share.

// ServerParams configure a [Server]. The zero value of every field except Conn selects the default that its comment
// names. A time must be at least 1 ms.
type ServerParams struct {
	// Conn is the connection to use. The server neither closes nor drains it. To receive permission errors, the server
	// puts a handler in front of the connection's error handler. If you set a handler of your own, set it before
	// NewServer.
	Conn *nats.Conn
	// MaxStreams is how many handlers may run at the same time, over all subjects: 10,000 by default. The server
	// answers further requests with CloseTryAgainLater. It does the same while 2*MaxStreams + 16,384 streams are open.
	// A stream counts as open until its handler has returned and its consumer has acknowledged everything.
	MaxStreams int
	// StayWhenFull keeps a full server in its queue groups: it refuses its share of the requests. By default, a full
	// server leaves its queue groups, so that members with room get the requests. It returns when an eighth of
	// MaxStreams is free, one stream at least. If all members of a group have left, consumers get nats.ErrNoResponders
	// instead of CloseTryAgainLater. Subjects outside queue groups are not affected.
	StayWhenFull bool
	// MaxFallback is how many handlers may serve consumers that speak only the JSON fallback, at the same time and
	// within MaxStreams. By default it is 0: such requests are refused with [CloseUnsupportedData]. Set it if consumers
	// use the original API. A fallback consumer acknowledges nothing and answers no PING, so a request of a few bytes
	// can direct a whole stream at any subject. Writers made by [NewWriter] are not affected.
	MaxFallback int
	// FallbackTimeout is how long a stream to a fallback consumer may last, 10 minutes by default. Then it ends with
	// [CloseDeadlineExceeded], as at a consumer's own deadline.
	FallbackTimeout time.Duration
	// Logger gets the panics of handlers and hooks, the errors that handlers return after their consumers have read the
	// normal end, and the refusals of subscriptions by NATS. It is called in the goroutines of handlers and hooks, and
	// for refusals in one of its own. So it may wait, also for answers over Conn. If 1,024 lines about refusals wait,
	// further ones are dropped, and a line states how many. slog.Default() by default.
	Logger *slog.Logger

	// Interceptors are put around each handler, the first one outermost. Handle and HandleQueue call each interceptor
	// once for each registration. It gets the next [Handler] and returns a Handler that calls the next one, usually
	// once. The returned Handler may replace the request by [Request.WithContext]. Its result ends the stream, whether
	// or not it has called the next handler. If it calls the next handler twice, the second call gets the same Writer
	// and Request, with the records that the first call has left. Panics of handlers pass through the interceptors,
	// which may recover them.
	Interceptors []func(Handler) Handler

	// Hooks are called for each stream that a handler serves; see [Hooks]. Their panics are logged to Logger.
	Hooks Hooks

	// These parameters are those of [ClientParams], for records that consumers send. A stream starts with a window of
	// at most 64 KiB.
	Window, MaxBuffered, MaxRecordSize                                   int
	KeepAlive, PeerTimeout, AckTimeout, ResumeTimeout, DisconnectTimeout time.Duration
}

const (
	defaultMaxStreams      = 10_000
	defaultFallbackTimeout = 10 * time.Minute
)

// lingering is how many streams in addition to 2*MaxStreams may wait for the acknowledgement of their end. It is enough
// for tens of thousands of short handlers in a second on a slow network, and it bounds consumers that never
// acknowledge.
const lingering = 1 << 14

// Server answers requests with streams, each from a [Handler] in a goroutine of its own. It is safe for use by many
// goroutines at once. End it with [Server.Drain] or [Server.Close].
type Server struct {
	ep              *endpoint
	maxFallback     int64
	fallbackTimeout time.Duration
	fallbacks       atomic.Int64 // handlers that serve fallback consumers

	interceptors []func(Handler) Handler

	room  room
	stays bool // in its queue groups when it is full

	// The goroutines of handlers and hooks use log. All others use journal, because the user's code must not hold them
	// up.
	log     *slog.Logger
	journal *journal.Journal

	draining chan struct{} // closed when Drain or Close is called

	resting resting

	mu            sync.Mutex // never held while NATS is asked
	registrations map[*Registration]struct{}
	registered    int // registrations that were made, also those that ended
	services      map[*Service]struct{}
	suspended     suspension // reasons that suspend every registration that heeds them
	handlers      int
	sessions      int // of handlers that run, and of those whose streams have something left to send
	refusing      bool
	idle          chan struct{} // not nil once Drain or Close was called; closed when there are none of both
	quiet         chan struct{} // made with idle; closed when no more requests come

	doubts doubts

	helpers sync.WaitGroup // the goroutine of an examination, and those of registrations that listen for consumers across accounts
}

// NewServer returns a server on params.Conn, which must be open. Errors: [nats.ErrInvalidConnection] for a nil
// connection; the error of the subscription; an error that names the invalid field of params.
func NewServer(params ServerParams) (*Server, error) {
	if params.Conn == nil {
		return nil, noConnection("ServerParams.Conn", "set it to what nats.Connect returns")
	}
	return newServer(natsconn.New(params.Conn), params.Conn.Opts.InboxPrefix, params)
}

func newServer(conn natsconn.Conn, inbox string, params ServerParams) (*Server, error) {
	common, err := ClientParams{
		Window: params.Window, MaxBuffered: params.MaxBuffered, MaxRecordSize: params.MaxRecordSize,
		KeepAlive: params.KeepAlive, PeerTimeout: params.PeerTimeout, AckTimeout: params.AckTimeout,
		ResumeTimeout: params.ResumeTimeout, DisconnectTimeout: params.DisconnectTimeout, Hooks: params.Hooks,
	}.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := checkInterceptors(params.Interceptors); err != nil {
		return nil, err
	}
	if params.MaxStreams < 0 {
		return nil, fmt.Errorf("stream: parameter MaxStreams is %d: it must be at least 1, or 0 for %d", params.MaxStreams, defaultMaxStreams)
	}
	if params.MaxStreams == 0 {
		params.MaxStreams = defaultMaxStreams
	}
	switch {
	case params.MaxFallback < 0:
		return nil, fmt.Errorf("stream: parameter MaxFallback is %d: it must be at least 1, or 0 to refuse the JSON fallback", params.MaxFallback)
	case params.FallbackTimeout == 0:
		params.FallbackTimeout = defaultFallbackTimeout
	case params.FallbackTimeout < time.Millisecond:
		return nil, fmt.Errorf("stream: parameter FallbackTimeout is %v: it must be at least 1ms, or 0 for %v", params.FallbackTimeout, defaultFallbackTimeout)
	}
	s := &Server{
		maxFallback: int64(params.MaxFallback), fallbackTimeout: params.FallbackTimeout, interceptors: slices.Clone(params.Interceptors),
		room: roomFor(params.MaxStreams), stays: params.StayWhenFull, log: params.Logger,
		draining: make(chan struct{}), doubts: newDoubts(),
		registrations: make(map[*Registration]struct{}), services: make(map[*Service]struct{}),
	}
	if s.log == nil {
		s.log = slog.Default()
	}
	s.journal = journal.New(s.log)
	if s.ep, err = newEndpoint(conn, inbox, common); err != nil {
		return nil, err
	}
	if ob := s.ep.observer; ob != nil {
		ob.log = s.log // before there is a stream
	}
	s.ep.inbox.onChange(s.inboxChanged)
	refused := s.subscriptionRefused
	s.ep.onRefused.Store(&refused)
	s.ep.streamEnded = s.streamEnded // before a request arrives
	dismiss := s.dismiss
	s.ep.onIdle.Store(&dismiss)
	context.AfterFunc(s.ep.ctx, dismiss)
	return s, nil
}

// subscriptionRefused handles NATS's refusal of a subscription of the connection, which may be one of the server's.
func (s *Server) subscriptionRefused(d natsconn.Denial, err error) {
	if d.Subject == "" { // the error names no subject
		s.doubt()
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.services) > 0 && strings.HasPrefix(d.Subject, discovery.Subjects) {
		s.journal.Error("stream: tools do not find the services of the server; allow it to subscribe to "+discovery.Subjects+"> (docs/PROTOCOL.md section 15.6)",
			"subject", d.Subject, "error", err)
	}
	for r := range s.registrations {
		switch {
		case r.subject != d.Subject:
		case r.queue == d.Queue:
			r.refuse(err)
		case d.Queue == "":
			r.deafen()
		}
	}
}

// inboxChanged ends the server's subscriptions when NATS refuses its inbox, so that other servers get the requests.
// refused is the reason. With nil, when messages reach the inbox again, it makes the subscriptions again. The watcher
// and NATS's error callback call it, and so do NewServer and HandleQueue if they find a refusal.
func (s *Server) inboxChanged(refused error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if refused != nil {
		s.suspendLocked(suspendedUnheard) // first: each request that still comes has to be refused
		s.journal.Error("stream: the server serves nothing until its inbox is heard", "error", refused)
	} else {
		s.journal.Info("stream: the server's inbox is heard again")
		s.resumeLocked(suspendedUnheard)
	}
}

// request handles one message to the subject of from. The callback of the subscription calls it, or the goroutine that
// reads a fast connection. It does not wait. It keeps the strings and the data of m, and headers of the user.
func (s *Server) request(m *nats.Msg, from *Registration) {
	req, err := parseRequest(m, from.subject, s.ep.prefix)
	switch {
	case err == errStray:
		if !s.sought(m, from) {
			s.ep.counters.strays.Add(1)
		}
		return
	case err != nil: // an answer is impossible, or would not be understood
		s.ep.counters.requests.Add(1)
		return
	}
	offer, json := req.offer, req.json
	refuse := func(code int, text string) {
		s.ep.outbox.doLater(outOfStream{subject: m.Reply, json: json, refuse: &CloseError{code, text}})
	}
	timeout, err := parseTimeout(m.Header)
	if err != nil {
		refuse(CloseBadRequest, err.Error())
		return
	}
	if json {
		if ce := s.enterFallback(); ce != nil {
			refuse(ce.Code, ce.Text)
			return
		}
		if timeout == 0 || timeout > s.fallbackTimeout {
			timeout = s.fallbackTimeout
		}
	}
	admitted := s.admit()
	if admitted != entered && json {
		s.fallbacks.Add(-1)
	}
	switch admitted {
	case full:
		refuse(CloseTryAgainLater, fmt.Sprintf("%d handlers run, or as many streams as this server takes wait for their consumers", s.room.handlers))
		return
	case refused:
		refuse(CloseGoingAway, "server is shutting down")
		return
	case unheard:
		refuse(CloseTryAgainLater, "the NATS server refuses this server's inbox")
		return
	}

	h := &handling{server: s, handler: from.handler, json: json}
	ctx := s.ep.ctx
	if timeout > 0 {
		ctx, h.cancel = context.WithTimeoutCause(ctx, timeout, &CloseError{Code: CloseDeadlineExceeded})
		h.limited = ctx
	}
	window := uint64(0)
	if !json {
		window = s.ep.windows.First(min(handlerWindow, s.ep.window))
	}
	h.w = s.ep.newProducer(lifecycle.Handler, ctx, m.Reply, offer, json, window)
	session := h.w.session
	h.Subject, h.Header, h.Data, h.draining, h.Request.session = m.Subject, userHeader(m.Header), m.Data, s.draining, session
	if req.crossed {
		session.whereabouts().crossing = &crossing{from: from}
	}
	if json {
		session.recv.done = io.EOF
		session.recv.readLock.Or(gateDone)
	}
	if ob := s.ep.observer; ob != nil {
		ob.opened(session, m.Subject, 2)
	}
	session.markLater(workWait)
	s.start(h)
}

type admission uint8

const (
	entered admission = iota
	full
	refused
	unheard
)

// admit counts a new handler and its session, if there is room.
func (s *Server) admit() admission {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.refusing || s.ep.gone.Load() != nil || s.ep.draining.Load():
		return refused
	case s.ep.inbox.refused.Load() != nil:
		return unheard
	case s.room.full(s.handlers, s.sessions, false):
		return full
	}
	s.handlers++
	s.sessions++
	s.checkRoomLocked()
	return entered
}

// enterFallback counts a handler for a fallback consumer, or returns the reason for a refusal.
func (s *Server) enterFallback() *CloseError {
	switch {
	case s.maxFallback == 0:
		return &CloseError{CloseUnsupportedData, "this server does not serve the JSON fallback: use a client that sends the header Stream-Open, or set ServerParams.MaxFallback"}
	case s.fallbacks.Add(1) > s.maxFallback:
		s.fallbacks.Add(-1)
		return &CloseError{CloseTryAgainLater, fmt.Sprintf("%d handlers serve fallback consumers", s.maxFallback)}
	}
	return nil
}

// streamEnded discounts a session. The outbox calls it. After the outbox has ended, the goroutine of a handler does.
func (s *Server) streamEnded() { s.count(0, -1) }

func (s *Server) count(handlers, sessions int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handlers += handlers
	s.sessions += sessions
	s.checkRoomLocked()
	s.checkIdleLocked()
}

func (s *Server) checkIdleLocked() {
	if s.refusing && s.idle != nil && s.handlers == 0 && s.sessions == 0 {
		select {
		case <-s.idle:
		default:
			close(s.idle)
		}
	}
}

// Drain ends the server gracefully. It unsubscribes, serves the requests that NATS has already delivered, and returns
// when all handlers have returned and their consumers have acknowledged everything that the handlers wrote. It closes
// the channel of [Request.Draining]. If ctx ends first, the remaining streams end with [CloseGoingAway], their
// handlers' contexts end, and Drain returns the error of ctx without waiting for handlers that ignore their contexts.
// The connection stays open; drain it afterwards.
//
// A handler must not wait for Drain, because Drain waits for the handler: both would wait until ctx ends. In a handler,
// start Drain in a goroutine: go server.Drain(ctx).
func (s *Server) Drain(ctx context.Context) error {
	if ctx == nil {
		return noContext("Server.Drain")
	}
	quiet, idle := s.retire()
	var err error
	for _, done := range []chan struct{}{quiet, idle} {
		select {
		case <-done:
		case <-ctx.Done():
			err = contextError(ctx)
		}
	}
	if err == nil {
		return s.Close()
	}
	closed := make(chan struct{})
	go func() { // ends with the outbox, which a stalled connection may hold
		defer close(closed)
		_ = s.Close()
	}()
	select {
	case <-closed:
	case <-time.After(drainGrace):
	}
	return err
}

// drainGrace is how long Drain waits for the RESETs of its streams after its context has ended.
const drainGrace = 25 * time.Millisecond

// retire begins to unsubscribe, once. From then on Handle fails.
func (s *Server) retire() (quiet, idle chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.idle == nil {
		s.idle, s.quiet = make(chan struct{}), make(chan struct{})
		close(s.draining)
		go s.unsubscribe()
	}
	return s.quiet, s.idle
}

// unsubscribe ends all registrations. It ends when NATS has confirmed and all delivered requests are handled, or after
// natsconn.UnsubscribeTimeout.
func (s *Server) unsubscribe() {
	defer close(s.quiet)
	s.mu.Lock()
	all := slices.Collect(maps.Keys(s.registrations))
	services := slices.Collect(maps.Keys(s.services))
	s.mu.Unlock()
	var wg sync.WaitGroup
	for _, v := range services {
		wg.Go(v.stopListening)
	}
	for _, r := range all {
		wg.Go(r.Stop)
	}
	wg.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refusing = true
	s.checkIdleLocked()
}

// Close ends the server at once: it accepts no more requests, open streams end with [CloseGoingAway], and handlers'
// contexts end. Close does not wait for handlers, so a handler may call it. It takes as long as [Client.Close], and up
// to 2 s longer if lines wait for a slow Logger. The connection stays open. Close never fails. A second Close does
// nothing.
func (s *Server) Close() error {
	s.mu.Lock()
	s.refusing = true
	s.mu.Unlock()
	e := &ending{kind: endLocal, err: ErrServerClosed, reset: CloseError{CloseGoingAway, "server closed"}}
	s.ep.endAll(e) // before handlers see Draining: a handler that returns because of it must not end its stream normally
	quiet, _ := s.retire()
	<-quiet // requests that still come are refused, and the outbox sends the refusals
	s.ep.close(e)
	s.helpers.Wait() // none starts any more: the outbox has ended, and doubt starts none after retire
	s.journal.Wait(hooksEnd)
	return nil
}
