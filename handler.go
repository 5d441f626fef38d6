package stream

import (
	"context"
	"io"
	"iter"
	"runtime/debug"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/lifecycle"
)

// This file has Handler and Request, and ends the stream of a handler with its result. The handler's goroutine runs it.

// Handler produces one stream: it reads the [Request] and writes to w, in a goroutine of its own. Its result ends the stream:
//
//   - nil, or a bare [*CloseError] with [CloseNormalClosure]: the normal end. The consumer reads [io.EOF].
//   - an error that is or wraps a *CloseError with another valid code: that code and the text of the *CloseError, without the
//     text around it.
//   - an error that wraps [ErrRecordTooLarge]: [CloseMessageTooBig] and the error's text.
//   - any other error: [CloseInternalServerErr] and the error's text. Among these are errors that wrap or join a *CloseError with
//     CloseNormalClosure, and a nil *CloseError in a variable of type error.
//   - a panic: CloseInternalServerErr. The panic is logged.
//
// The text of a returned error is sent to the consumer. To keep internals private, return a *CloseError with the text to reveal.
//
// A relay that returns the error of another stream passes on the code of that stream: its consumer reads, for example,
// [CloseAbnormalClosure] or [CloseTryAgainLater] as if this server had said so. To hide the code, return an error of
// your own, or format the other error with %v instead of %w.
//
// A handler that closed w normally can still fail: see [Writer.Close]. If CLOSE was published before the handler failed, the
// consumer has the normal end. The failure is logged then and counted in [Stats].UnreportedErrors.
//
// If both ends write before they read, both wait for credit when the windows are full, until a deadline ends the stream. Let
// one end read first, or read and write in two goroutines.
//
// When the consumer leaves or its deadline passes, the context of r ends and writes to w fail; the handler should return
// then. Neither r nor w may be used after it returned. When it returns, records of the consumer that it did not read are
// discarded, and the consumer's writes fail.
type Handler func(w *Writer, r *Request) error

// Request is the request that opened a stream, and the consumer's records on that stream. Its reads (Recv, RecvObject, All, Read
// and WriteTo) may be used by one goroutine at a time, also while others write to the [Writer].
type Request struct {
	Subject string      // that it was sent to
	Header  nats.Header // that the consumer set; nil if none
	Data    []byte

	session  *session
	ctx      context.Context
	draining <-chan struct{}
}

// Context returns the context of the request. It has the consumer's deadline. It ends when the consumer leaves, its deadline
// passes, it is silent for PeerTimeout, or the server ends the stream. [context.Cause] returns the reason, a [*CloseError] if
// there is a code. A normal end of both directions does not end the context, so that the handler may finish its work: it may
// have closed its [Writer] and read [io.EOF], or its consumer may have read everything and written nothing.
func (r *Request) Context() context.Context { return r.ctx }

// Draining returns a channel that is closed when the server's end begins, by [Server.Drain] or [Server.Close]. Drain waits for the
// handler: one that would run until its consumer leaves should return then, for example with [CloseGoingAway]. The context of r
// does not end because of Drain until the context given to Drain does. All handlers of a server get the same channel.
func (r *Request) Draining() <-chan struct{} { return r.draining }

// Recv returns the next record from the consumer. It waits until the record arrives or the stream ends. It returns [io.EOF] after
// the consumer's CloseSend: all records have arrived then. At any other end it returns the error that ended the stream. If the
// consumer leaves without CloseSend, that is a [*CloseError] with its code, or with [CloseCanceled] if it left with
// [CloseNormalClosure]. A consumer that speaks only the JSON fallback sends no records: Recv returns io.EOF.
//
// The library never reuses the record's memory. A small record that is kept keeps its packet of up to 32 KiB in memory.
func (r *Request) Recv() ([]byte, error) { return r.session.recvRecord() }

// RecvObject decodes the consumer's next record into v; see [Stream.RecvObject].
func (r *Request) RecvObject(v any) error { return r.session.recvObject(v) }

// All returns the consumer's records until its CloseSend; any other end is the error of the last pair.
func (r *Request) All() iter.Seq2[[]byte, error] { return r.session.all() }

// Read implements [io.Reader]: the consumer's records as one stream of bytes, without their boundaries.
func (r *Request) Read(p []byte) (int, error) { return r.session.read(p) }

// WriteTo implements [io.WriterTo]: it writes the consumer's records to w, one Write each, until its CloseSend.
func (r *Request) WriteTo(w io.Writer) (int64, error) { return r.session.writeTo(w) }

// run runs a handler and closes its stream with the handler's result.
func (s *Server) run(h Handler, w *Writer, r *Request) {
	defer s.handlerReturned(w)
	end := CloseError{CloseInternalServerErr, "handler exited"} // after runtime.Goexit, for example by t.FailNow of a test
	defer func() {
		w.session.nobodyReads.Store(true) // before CLOSE is published: the outbox acts on the answer to it
		w.session.leave()
		closed, ok := w.closeReturned(end)
		switch {
		case ok && closed.Code == CloseNormalClosure && end.Code != CloseNormalClosure:
			s.ep.counters.unreported.Add(1)
			s.log.Error("stream: handler failed after its Writer was closed normally: the consumer does not know",
				"subject", r.Subject, "error", end.Error())
		case !ok && w.session.recv.parent.Err() != nil: // the context's own callback may come too late
			w.session.canceled()
		}
	}()
	end = s.call(h, w, r)
}

// call calls a handler and returns how its stream ends. It recovers panics, also those of the Error method of the result.
func (s *Server) call(h Handler, w *Writer, r *Request) (end CloseError) {
	defer func() {
		if v := recover(); v != nil {
			s.log.Error("stream: handler panicked", "subject", r.Subject, "panic", v, "stack", string(debug.Stack()))
			end = CloseError{CloseInternalServerErr, "handler panicked"}
		}
	}()
	return handlerEnd(h(w, r))
}

// handlerReturned discounts a handler. Its session goes on until the consumer has acknowledged everything.
func (s *Server) handlerReturned(w *Writer) {
	w.session.markLater(workSettle)
	s.count(-1, 0)
	if o := &s.ep.outbox; o.stopping.Load() { // otherwise the outbox sees the session, which is on its queue
		<-o.done
		if w.session.out.state.Phase != lifecycle.Gone {
			s.streamEnded()
		}
	}
}
