package stream

import (
	"context"
	"io"
	"iter"
	"math/bits"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/lifecycle"
)

// Stream is the consumer's end of a stream.
//
// Its read side, Recv, RecvObject, All, Read, WriteTo, Header and Trailer, is for one goroutine at a time. Its write
// side, Write, WriteObject, ReadFrom, Flush, Sync and CloseSend, may be used by many at once, and beside the read side. Close,
// CloseWithCode and Context may be called by any goroutine at any time.
//
// A stream on which nothing was written is over when the producer's end was read, unless its handler closed it to go on
// reading: then the write side stays open until the handler returns.
//
// Read until a read returns an error (and, once something was written, call CloseSend), or call Close, or end the
// context given to Open: otherwise the stream stays open.
type Stream struct {
	session      session
	ctx          context.Context
	watch        atomic.Pointer[watch]
	contextEnded atomic.Bool
}

// open registers a stream and has its request published. answered, unless nil, is closed when the request was answered or will
// not be.
func (ep *endpoint) open(ctx context.Context, msg *nats.Msg, codec Codec, answered chan struct{}) (*Stream, error) {
	window := ep.reserve(min(initialWindow, ep.window))
	st := new(Stream)
	s := &st.session
	s.init(ep, lifecycle.Consumer, initialPackets, window)
	s.stream, s.recv.parent, s.recv.rawCodec, s.out.answered = st, ctx, codecFlag(codec), answered
	s.recv.window.Store(int64(window))
	offer := Token{Codec: codec, LogPackets: uint8(bits.TrailingZeros(initialPackets)), LogBytes: uint8(bits.TrailingZeros64(window))}
	req := &nats.Msg{Subject: msg.Subject, Header: make(nats.Header, len(msg.Header)+2), Data: append([]byte(nil), msg.Data...)}
	for key, values := range msg.Header { // published later, when the caller may have changed its own
		req.Header[key] = slices.Clone(values)
	}
	req.Header[headerOpen] = []string{string(AppendOffer(nil, offer))}
	s.out.request, s.out.subject = req, req.Subject

	st.ctx, s.cancel = context.WithCancelCause(ctx)
	if e := ep.register(s, offer); e != nil {
		s.release(e)
		return nil, e.err
	}
	req.Reply = s.reply
	s.mark(workRequest)
	if ctx.Done() != nil {
		w := &watch{session: s}
		w.pending.Lock()
		w.stop = context.AfterFunc(ctx, w.run)
		st.watch.Store(w)
		if st.contextEnded.Load() { // meanwhile: whoever comes second finds the other's work
			w.takeBack()
		}
	}
	return st, nil
}

// endContext ends the stream's context, once.
func (st *Stream) endContext(cause error) {
	if !st.contextEnded.CompareAndSwap(false, true) {
		return
	}
	if w := st.watch.Load(); w != nil {
		w.takeBack()
	}
	st.session.cancel(cause)
}

// watch ends a stream when the context given to Open ends, in a goroutine of its own.
type watch struct {
	session *session
	stop    func() bool
	pending sync.Mutex // held until it has begun or was taken back
}

func (w *watch) run() {
	w.pending.Unlock() // before anything that asks the context, which is the user's
	if !w.session.stream.contextEnded.Load() {
		w.session.canceled()
	}
}

// takeBack sees to it that the goroutine need not begin any more, or waits until it has. Who opens, cancels and reads or
// closes in a loop would wait for nothing else, and pile those goroutines up.
func (w *watch) takeBack() {
	if !w.stop() {
		w.pending.Lock()
	}
	w.pending.Unlock()
}

// Recv returns the next record, or [io.EOF] after [CloseNormalClosure], a [*CloseError] after any other close code, the
// context's error when it ended, [nats.ErrNoResponders] when nobody answered. It waits for the record if need be; a
// context that ends is noticed at once, also before records that have arrived.
//
// The record is a part of the packet it came in, never reused and safe to keep and to change; keeping a small one
// keeps its packet, up to 32 KiB, alive.
func (st *Stream) Recv() ([]byte, error) { return st.session.recvRecord() }

// RecvObject decodes the next record into v, a pointer, by the codec it was written with. A record written as bytes is
// decoded by the codec this stream asked for. It returns as [Stream.Recv] does. A record that does not decode is an
// error of that call alone, which matches neither [io.EOF] nor a [*CloseError]: the next call goes on with the next
// record.
//
// JSON is decoded by encoding/json, and MessagePack in the same way, also into a variable that holds an earlier record: maps
// keep their entries and slices their memory, interfaces and byte slices get new values. Fields have the names of their json
// tags in both codecs; see [Writer.WriteObject]. A number that its target cannot hold is an error, and so is anything behind
// the object.
//
// Without a type to decode into, as in an any, a byte of the record may take 160 bytes of memory in MessagePack and 80 in
// JSON. If you do not trust the producer, decode into a struct, or lower MaxRecordSize.
func (st *Stream) RecvObject(v any) error { return st.session.recvObject(v) }

// All returns the records until the stream ends: without an error on normal closure, with one error as the last pair
// otherwise. Leaving the loop early leaves the stream open.
func (st *Stream) All() iter.Seq2[[]byte, error] { return st.session.all() }

// Read implements [io.Reader]: the records as one stream of bytes, without their boundaries. It returns as
// [Stream.Recv] does. A Recv after it begins with the rest of the record that Read had begun.
func (st *Stream) Read(p []byte) (int, error) { return st.session.read(p) }

// WriteTo implements [io.WriterTo]: it writes the records to w, one Write each, until the stream ends. Normal closure
// is no error. It fails as [Stream.Recv] does, with the error of w, with [io.ErrShortWrite], or with an error for a
// [Writer] that returns a count outside its record.
func (st *Stream) WriteTo(w io.Writer) (n int64, err error) { return st.session.writeTo(w) }

// Header waits for the producer's first packet and returns the headers it set with [Writer.SetHeader], nil if it set
// none. It is a read and takes no record. If the stream ended with an error before any header or record, it returns that error,
// as [Stream.Recv] does. Do not change the map.
func (st *Stream) Header() (nats.Header, error) { return st.session.readHeader() }

// Trailer returns the headers that the producer set with [Writer.SetTrailer]. They are there once a read has returned
// [io.EOF] or the producer's [*CloseError], nil before and if it set none. It belongs to the read side.
func (st *Stream) Trailer() nats.Header { return st.session.recv.trailer }

// send returns the send half, made on first use.
func (st *Stream) send() *Writer {
	s := &st.session
	if w := s.writer.Load(); w != nil {
		return w
	}
	w := newConsumerWriter(s, st.ctx)
	if !s.writer.CompareAndSwap(nil, w) {
		w.cancel(nil)
		return s.writer.Load()
	}
	// Whoever ends the stream sets end first and looks for a writer afterwards: either it sees this one, or this
	// sees the end.
	if e := s.end.Load(); e != nil {
		w.cancel(e.cause())
	}
	s.mark(workBind)
	return w
}

// Write sends p to the producer as one record, which its handler reads from the [Request]. It returns len(p) once p was
// copied: p may be reused at once. It waits until the producer is known, which is when its first packet comes, and
// then for its credit. Errors:
//
//   - [ErrClosed] after [Stream.CloseSend] and [Stream.Close], and after the handler returned without an error: nobody reads the
//     record. Reads tell how the stream ended.
//   - Otherwise the error that ended the stream, as [Stream.Recv] returns it; see [Writer.Write] for the end of a context.
//   - [ErrOneWay] from a producer that speaks only the JSON fallback.
//
// Records that were written before the handler returned may not have been read, although their writes succeeded. If that
// matters, let the handler answer. If both ends write before they read, both can wait until a deadline; see [Handler].
//
// A producer made by [NewWriter] takes no records: the first one ends the stream with [CloseProtocolError].
func (st *Stream) Write(p []byte) (int, error) { return st.send().Write(p) }

// WriteObject sends v to the producer as one record, in the codec that this stream asked for, and returns the length
// of the encoding. It waits and fails as [Stream.Write] does, or with the error of the encoder.
func (st *Stream) WriteObject(v any) (int, error) { return st.send().WriteObject(v) }

// ReadFrom sends what r yields to the producer; see [Writer.ReadFrom].
func (st *Stream) ReadFrom(r io.Reader) (int64, error) { return st.send().ReadFrom(r) }

// Flush hands everything written so far to NATS and returns when that is done. It fails as [Stream.Write] does.
func (st *Stream) Flush() error { return st.send().Flush() }

// Sync waits until the producer's end has received everything written so far; see [Writer.Sync].
func (st *Stream) Sync(ctx context.Context) error { return st.send().Sync(ctx) }

// CloseSend says that no more records come from this end: the handler's reads return [io.EOF] after the last one. The
// read side stays open. It returns when everything was handed to NATS, and fails as [Stream.Write] does. Closing again does
// nothing.
func (st *Stream) CloseSend() error { return st.send().Close() }

// SetPeerTimeout sets for how long nothing may be heard from the producer's end before the stream ends with
// [CloseAbnormalClosure]. The producer's end is asked as often as that takes. Zero, which is the default, stands
// for PeerTimeout in [ClientParams]. It may be called at any time, by any goroutine.
func (st *Stream) SetPeerTimeout(d time.Duration) { st.session.setPeerTimeout(d) }

// Context ends when the stream does: when its end was read and nothing remains to be sent, when it was closed, when
// the context given to Open ended. [context.Cause] tells why.
func (st *Stream) Context() context.Context { return st.ctx }

// Close stops the stream: calls that wait return [ErrClosed], and a producer that is not done is told that the consumer
// canceled. After [io.EOF] and [Stream.CloseSend] there is nothing to stop: what the producer has not acknowledged yet
// goes on being resent for ResumeTimeout, unless the client is closed. Without CloseSend it is given up: [Stream.Sync]
// waits for it. Close is always safe to call, also after the end, and never fails.
func (st *Stream) Close() error {
	st.endWith(true, CloseError{Code: st.session.leaving()})
	return nil
}

// CloseWithCode is Close with a code and a reason for the producer, whose handler finds them in the cause of its context, or
// [CloseCanceled] if it has not answered yet: before its first packet nobody knows where to tell it. The code is one from 1000
// to 5999, else it fails with [ErrCloseCode] and the stream goes on. The reason is cut to [MaxReason] bytes.
//
// With [CloseNormalClosure] everything that was written before arrives: it includes [Stream.CloseSend], and packets
// that are not acknowledged yet are retransmitted for ResumeTimeout, unless the client is closed. The handler reads
// [io.EOF] after the last record. If the records cannot be sent to their end, because another goroutine is within a
// large record or the producer is not known yet, the handler gets CloseCanceled instead of io.EOF. With any other code,
// records that are not acknowledged are lost.
func (st *Stream) CloseWithCode(code int, text ...string) error {
	reason, err := closeReason(code, text)
	if err != nil {
		return err
	}
	tell := CloseError{code, reason}
	if s := &st.session; code == CloseNormalClosure && s.writer.Load() != nil {
		if s.detach(reason) {
			return nil
		}
		tell.Code = CloseCanceled // not all records were sent
	}
	st.endWith(code == CloseNormalClosure, tell)
	return nil
}

// endWith ends the stream because its user wants it so, as part does where that may and can be, else at once. No write
// succeeds from then on.
func (st *Stream) endWith(part bool, tell CloseError) {
	s := &st.session
	switch {
	case part && s.detachIfDone():
		s.release(&ending{err: ErrClosed})
	case s.nobodyReads.Load(): // it left before
	default:
		s.endLocally(&ending{kind: endLocal, err: ErrClosed, reset: tell})
	}
}
