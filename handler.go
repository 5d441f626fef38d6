package stream

import (
	"context"
	"io"
	"iter"
	"runtime/debug"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/lifecycle"
)

// This file has Handler and Request, runs handlers, and ends their streams with their results. The goroutines of
// handlers run it, except start, which the callbacks of NATS run, and dismiss, which the outbox runs. A handler may
// call the methods of its Request in other goroutines. returned locks the Writer, and handlerReturned locks Server.mu.
//
// The goroutine of a handler begins with a small stack, which a handler that writes a record outgrows. So a goroutine
// that has run one handler rests until the next request comes, or until the server has no stream. Before, copies of
// stacks were a twentieth of the cost of a short stream.

// Handler produces one stream: it reads the [Request] and writes to w. Each call has a goroutine of its own until it
// returns. The server may use that goroutine for another handler afterwards, so do not leave it locked to a thread. The
// result of the handler ends the stream:
//
//   - nil, or a bare [*CloseError] with [CloseNormalClosure]: the normal end. The consumer reads [io.EOF].
//   - an error that is or wraps a *CloseError with another valid code: that code and the text of the *CloseError,
//     without the text around it.
//   - an error that wraps [ErrRecordTooLarge]: [CloseMessageTooBig] and the error's text.
//   - any other error: [CloseInternalServerErr] and the error's text. Among these are errors that wrap or join a
//     *CloseError with CloseNormalClosure, and a nil *CloseError in a variable of type error.
//   - a panic: CloseInternalServerErr. The panic is logged.
//
// The text of a returned error is sent to the consumer. To keep internals private, return a *CloseError with the text
// to reveal.
//
// A relay that returns the error of another stream passes on the code of that stream: its consumer reads, for example,
// [CloseAbnormalClosure] or [CloseTryAgainLater] as if this server had sent it. To hide the code, return an error of
// your own, or format the other error with %v instead of %w.
//
// A handler that closed w normally can still fail: see [Writer.Close]. If CLOSE was published before the handler
// failed, the consumer reads the normal end. The server then logs the failure, and counts it in
// [Stats].UnreportedErrors.
//
// If both ends write before they read, both wait for credit when the windows are full, until a deadline ends the
// stream. Let one end read first, or read and write in two goroutines.
//
// When the consumer leaves or its deadline passes, the context of r ends and writes to w fail. The handler should
// return then. Use neither r nor w after the handler has returned. Records of the consumer that the handler did not
// read are then discarded, and the consumer's writes fail.
type Handler func(w *Writer, r *Request) error

// Request is the request that opened a stream, and the consumer's records on that stream. Its reads (Recv, Next,
// RecvRecord, RecvObject, All, Read, WriteTo and Ready) may be used by one goroutine at a time, also while others write
// to the [Writer].
type Request struct {
	Subject string      // the subject that the request was sent to
	Header  nats.Header // the headers that the consumer set; nil if it set none
	Data    []byte      // the data that the consumer gave to Open

	session  *session
	with     context.Context // of WithContext; nil without
	draining <-chan struct{}
}

// Context returns the context of the request, with the consumer's deadline. The context ends when the consumer leaves,
// when the consumer's deadline passes, when the consumer is silent for PeerTimeout, or when the server ends the stream.
// [context.Cause] returns the reason, a [*CloseError] if there is a code. A normal end of both directions does not end
// the context, so that the handler may finish its work: it may have closed its [Writer] and read [io.EOF], or its
// consumer may have read everything and written nothing.
func (r *Request) Context() context.Context {
	if r.with != nil {
		return r.with
	}
	return r.session.ctx.get(r.session.recv.parent)
}

// WithContext returns a copy of r with another context, for interceptors that add values to it; see Interceptors of
// [ServerParams]. Derive ctx from the context of r, because the end of the stream ends no other context. The end of ctx
// itself ends no read and no stream. The copy reads the same records as r. WithContext panics if ctx is nil.
func (r *Request) WithContext(ctx context.Context) *Request {
	if ctx == nil {
		panic("stream: Request.WithContext got a nil context: pass one that is derived from that of the request")
	}
	c := *r
	c.with = ctx
	return &c
}

// Draining returns a channel that is closed when the server's end begins, by [Server.Drain] or [Server.Close]. Drain
// waits for handlers. A handler that would run until its consumer leaves should return when the channel is closed, for
// example with [CloseGoingAway]. Drain ends the context of r only if the context given to Drain ends first. All
// handlers of a server get the same channel.
func (r *Request) Draining() <-chan struct{} { return r.draining }

// Recv returns the next record from the consumer. It waits until the record arrives or the stream ends. It returns
// [io.EOF] after the consumer's CloseSend: all records have arrived then. At any other end it returns the error that
// ended the stream. If the consumer leaves without CloseSend, the error is a [*CloseError] with the consumer's code, or
// with [CloseCanceled] if that code is [CloseNormalClosure]. A consumer that speaks only the JSON fallback sends no
// records: Recv returns io.EOF.
//
// The library never reuses the record's memory. A small record that is kept keeps its packet of up to 32 KiB in memory.
func (r *Request) Recv() ([]byte, error) { return r.session.recvRecord(forever) }

// Next is [Request.Recv] with a record that is valid only until the next read, or until the handler returns; see
// [Stream.Next].
func (r *Request) Next() ([]byte, error) { return r.session.recvRecord(untilNext) }

// RecvRecord is [Request.Recv] with the codec of the record; see [Stream.RecvRecord].
func (r *Request) RecvRecord() ([]byte, Codec, error) { return r.session.recvWithCodec() }

// RecvObject decodes the consumer's next record into v; see [Stream.RecvObject].
func (r *Request) RecvObject(v any) error { return r.session.recvObject(v) }

// All returns an iterator over the consumer's records. It stops after the consumer's CloseSend. At any other end, the
// last pair holds the error.
func (r *Request) All() iter.Seq2[[]byte, error] { return r.session.all() }

// Read implements [io.Reader]. It reads the consumer's records as one sequence of bytes, without their boundaries; see
// [Stream.Read].
func (r *Request) Read(p []byte) (int, error) { return r.session.read(p) }

// Ready reports whether the next read returns at once; see [Stream.Ready].
func (r *Request) Ready() bool { return r.session.ready() }

// SetReadDeadline sets the time after which reads fail instead of waiting; see [Stream.SetReadDeadline]. It does not
// change the consumer's deadline, which ends the context of r.
func (r *Request) SetReadDeadline(t time.Time) error { return r.session.setDeadlines(t, true, false) }

// WriteTo implements [io.WriterTo]: it writes the consumer's records to w, one Write each, until its CloseSend.
func (r *Request) WriteTo(w io.Writer) (int64, error) { return r.session.writeTo(w) }

// handling is one request with its handler. The goroutine of the handler owns it.
type handling struct {
	Request
	server  *Server
	handler Handler
	w       *Writer
	json    bool            // it is counted among the fallbacks
	limited context.Context // ends with the consumer's deadline; nil if there is none
	cancel  context.CancelFunc
}

// resting are the goroutines of a server that wait for their next handler. The goroutines of handlers, the callbacks of
// NATS, the outbox, and a goroutine at the end of the endpoint's context use it.
type resting struct {
	mu      sync.Mutex // guards waiting
	waiting []chan *handling
}

// maxResting bounds the goroutines that rest. The stack of each has 4 KiB, or the size that its last handler needed.
const maxResting = 256

// start runs h in the goroutine that has rested for the shortest time, or in a new one. It does not wait for h.
func (s *Server) start(h *handling) {
	r := &s.resting
	r.mu.Lock()
	last := len(r.waiting) - 1
	if last < 0 {
		r.mu.Unlock()
		go s.handle(h)
		return
	}
	next := r.waiting[last]
	r.waiting[last] = nil
	r.waiting = r.waiting[:last]
	r.mu.Unlock()
	next <- h
}

// handle runs h, and further handlers as long as rest returns one. It also ends if a handler ends its goroutine, as
// t.FailNow of a test does.
func (s *Server) handle(h *handling) {
	var next chan *handling
	for h != nil {
		h.run()
		h = s.rest(&next)
	}
}

// rest waits on next for the next handler of the calling goroutine, and makes the channel at the first time. It returns
// nil if the server no longer needs the goroutine.
func (s *Server) rest(next *chan *handling) *handling {
	r := &s.resting
	r.mu.Lock()
	// The outbox disarms the ticker, and endAll ends the context, before dismiss runs. So either that is found here, or
	// dismiss finds next.
	if len(r.waiting) == maxResting || !s.ep.ticker.Armed() || s.ep.ctx.Err() != nil {
		r.mu.Unlock()
		return nil
	}
	if *next == nil {
		*next = make(chan *handling, 1)
	}
	r.waiting = append(r.waiting, *next)
	r.mu.Unlock()
	return <-*next
}

// dismiss ends the goroutines that rest. The outbox calls it when the server has no stream, and so does the end of the
// endpoint's context.
func (s *Server) dismiss() {
	r := &s.resting
	r.mu.Lock()
	waiting := r.waiting
	r.waiting = nil
	r.mu.Unlock()
	for _, next := range waiting {
		next <- nil
	}
}

// run runs the handler of h and closes its stream with the handler's result.
func (h *handling) run() {
	s, session := h.server, h.session
	if h.json {
		defer s.fallbacks.Add(-1)
	} else {
		session.begin()
	}
	defer session.ctx.end(nil)
	defer h.w.cancel(nil)
	if h.limited != nil {
		defer h.cancel()
		defer context.AfterFunc(h.limited, session.canceled)()
	}
	defer s.handlerReturned(h.w)
	end := CloseError{CloseInternalServerErr, "handler exited"} // after runtime.Goexit, for example by t.FailNow of a test
	defer func() { h.returned(end) }()
	end = h.call()
}

// returned closes the stream of a handler that returned with end.
func (h *handling) returned(end CloseError) {
	h.session.recv.readLock.Or(gateUnread) // before CLOSE is published: the outbox acts on the answer to it
	h.session.leave()
	closed, ok := h.w.closeReturned(end)
	switch {
	case ok && closed.Code == CloseNormalClosure && end.Code != CloseNormalClosure:
		h.server.ep.counters.unreported.Add(1)
		h.server.log.Error("stream: handler failed after its Writer was closed normally: the consumer does not know",
			"subject", h.Subject, "error", end.Error())
	case !ok && h.session.recv.parent.Err() != nil: // the context's own callback may come too late
		h.session.canceled()
	}
}

// call calls the handler and returns how its stream ends. It recovers panics, also those of the Error method of the
// result.
func (h *handling) call() (end CloseError) {
	defer func() {
		if v := recover(); v != nil {
			h.server.log.Error("stream: handler panicked", "subject", h.Subject, "panic", v, "stack", string(debug.Stack()))
			end = CloseError{CloseInternalServerErr, "handler panicked"}
		}
	}()
	return handlerEnd(h.handler(h.w, &h.Request))
}

// handlerReturned takes a handler off the server's count. Its session goes on until the consumer has acknowledged
// everything.
func (s *Server) handlerReturned(w *Writer) {
	w.session.finished()
	w.session.markLater(workSettle)
	s.count(-1, 0)
	if o := &s.ep.outbox; o.stopping.Load() { // otherwise the outbox sees the session, which is on its queue
		<-o.done
		if w.session.out.state.Phase != lifecycle.Gone {
			s.streamEnded()
		}
	}
}
