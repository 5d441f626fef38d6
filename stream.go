package stream

import (
	"context"
	"io"
	"iter"
	"math/bits"
	"time"

	"github.com/nats-io/nats.go"
)

// This file has Stream, the consumer's view of a session. Goroutines of the user run it.

// Stream is the consumer's end of a stream.
//
// The read side (Recv, Next, RecvRecord, RecvObject, All, Read, WriteTo, Ready, Header and Trailer) may be used by one
// goroutine at a time. The write side (Write, TryWrite, WriteObject, WriteAppend, ReadFrom, Flush, Sync and CloseSend)
// may be used by many goroutines at once, also while another reads. All other methods may be called by any goroutine at
// any time.
//
// If the consumer wrote nothing, the stream is over when the producer's end was read. If the handler half-closed to go
// on reading, the write side stays open until the handler returns.
//
// A stream stays open until one of these happens:
//
//   - A read has returned the end of the stream, io.EOF or the error that ended it, and CloseSend was called if
//     anything was written.
//   - Close or CloseWithCode is called.
//   - The context given to Open ends.
type Stream struct {
	session session
}

// open registers a stream and queues its request for the outbox.
func (ep *endpoint) open(ctx context.Context, msg *nats.Msg, o openOptions) (*Stream, error) {
	window := ep.windows.First(min(initialWindow, ep.largestWindow(&o)))
	st := ep.newStream(ctx, msg.Subject, &o, window)
	s := &st.session
	offer := Token{Codec: o.codec, LogPackets: uint8(bits.TrailingZeros(initialPackets)), LogBytes: uint8(bits.TrailingZeros64(window))}
	s.out.request = newOpening(msg, offer)
	if o.many != nil {
		s.gather(&o, offer)
	}

	if e := ep.register(s, offer); e != nil {
		s.release(e)
		return nil, e.err
	}
	if ob := ep.observer; ob != nil && o.many == nil {
		ob.opened(s, msg.Subject, 2)
	}
	if o.timeout != 0 {
		s.limitOpening(o.until)
	}
	s.mark(workRequest)
	if o.patience != 0 {
		s.setPeerTimeout(o.patience)
	}
	s.heed(ctx)
	if o.many != nil {
		s.gathering().begin()
	}
	return st, nil
}

// heed ends the stream when ctx, which was given to Open, ends.
func (s *session) heed(ctx context.Context) {
	if ctx.Done() == nil {
		return
	}
	w := &watch{session: s}
	w.pending.Lock()
	w.stop = context.AfterFunc(ctx, w.run)
	s.watch.Store(w)
	// endContext ends s.ctx before it loads watch. So either it finds this watch, or the end is found here.
	if s.ctx.ended() {
		w.takeBack()
	}
}

// Recv returns the next record. It waits until the record arrives or the stream ends. Errors:
//
//   - [io.EOF] after [CloseNormalClosure].
//   - [os.ErrDeadlineExceeded] after the deadline of [Stream.SetReadDeadline]. The stream goes on.
//   - A [*CloseError] after any other close code.
//   - The error of the context given to [Client.Open] after it ended. Recv returns it at once, also if records have
//     arrived.
//   - [nats.ErrNoResponders] if nobody serves the subject.
//
// The record is a slice of the packet that it arrived in. The library never reuses the packet, so the caller may keep
// and change the record. A small record that is kept keeps its packet of up to 32 KiB in memory.
func (st *Stream) Recv() ([]byte, error) { return st.session.recvRecord(forever) }

// Next is [Stream.Recv] with a record that is valid only until the next call of the read side, as with
// [bufio.Scanner.Bytes]. The library may reuse its memory from then on. Copy a record that is needed for longer. Until
// then the caller may change the record.
//
// Read, WriteTo, RecvObject and [io.Copy] take their records in this way. Race builds overwrite a packet after its last
// record, unless Recv or All returned one of its records, and the memory of a large record at a later read. So a test
// finds a record that was used for too long.
func (st *Stream) Next() ([]byte, error) { return st.session.recvRecord(untilNext) }

// RecvRecord is [Stream.Recv] with the codec of the record: [JSON] or [MsgPack] of an object, and [CodecDefault] of
// bytes.
func (st *Stream) RecvRecord() ([]byte, Codec, error) { return st.session.recvWithCodec() }

// RecvObject decodes the next record into v, a pointer, by the codec that the record was written with. A record written
// as bytes is decoded by the codec that this stream requested. RecvObject waits and fails as [Stream.Recv] does. If a
// record does not decode, only this call fails, with an error that matches neither [io.EOF] nor a [*CloseError]. The
// next call decodes the next record.
//
// JSON is decoded by encoding/json, and MessagePack in the same way. If the target holds an earlier record, maps keep
// their entries, slices keep their memory, and interfaces and byte slices get new values. Fields have the names of
// their json tags in both codecs; see [Writer.WriteObject]. A number that its target cannot hold is an error. Data
// behind the object is an error, too.
//
// If the target has no type, such as an any, one byte of the record may take 160 bytes of memory in MessagePack and 80
// in JSON. If you do not trust the producer, decode into a struct, or lower MaxRecordSize.
func (st *Stream) RecvObject(v any) error { return st.session.recvObject(v) }

// All returns an iterator over the records until the stream ends. After normal closure it stops. At any other end, the
// last pair holds the error. A loop that is left early leaves the stream open.
func (st *Stream) All() iter.Seq2[[]byte, error] { return st.session.all() }

// Read implements [io.Reader]. It reads the records as one sequence of bytes, without their boundaries. It waits and
// fails as [Stream.Recv] does. The next Recv or Next returns the rest of a record that Read has read in part.
func (st *Stream) Read(p []byte) (int, error) { return st.session.read(p) }

// WriteTo implements [io.WriterTo]. It writes the records to w, one Write each, until the stream ends. After normal
// closure it returns nil. Errors: those of [Stream.Recv]; the error of w; [io.ErrShortWrite]; an error for an
// [io.Writer] that returns a count outside its record.
func (st *Stream) WriteTo(w io.Writer) (n int64, err error) { return st.session.writeTo(w) }

// Header returns the headers that the producer set with [Writer.SetHeader], nil if it set none. It waits for the
// producer's first packet. It belongs to the read side, but consumes no record. If the stream ended with an error
// before any header or record, Header returns that error, as [Stream.Recv] does. Do not change the map.
func (st *Stream) Header() (nats.Header, error) { return st.session.readHeader() }

// Ready reports whether the next read returns at once: a record has arrived as a whole, or the stream has ended. It
// belongs to the read side. It returns false while another goroutine reads. A read deadline does not change its result.
func (st *Stream) Ready() bool { return st.session.ready() }

// SetReadDeadline sets the time after which reads fail instead of waiting. It applies to Recv, Next, RecvRecord,
// RecvObject, All, Read, WriteTo and Header, also to a call that waits now. Their error matches
// [os.ErrDeadlineExceeded] and is a [net.Error] with Timeout. The stream goes on and loses nothing: after a later
// deadline, or the zero time for none, reads return the next record, also if a part of it had arrived. A time in the
// past ends a waiting call at once.
//
// SetReadDeadline fails with [ErrClosed] or the error of the stream if this end has ended it. It may be called at any
// time, by any goroutine. A stream that never had a deadline pays nothing for it.
func (st *Stream) SetReadDeadline(t time.Time) error { return st.session.setDeadlines(t, true, false) }

// SetWriteDeadline sets the time after which writes fail instead of waiting; see [Writer.SetWriteDeadline]. It also
// ends the wait for the producer's first packet. It does not apply to CloseSend.
func (st *Stream) SetWriteDeadline(t time.Time) error { return st.session.setDeadlines(t, false, true) }

// SetDeadline sets both deadlines: it is [Stream.SetReadDeadline] and [Stream.SetWriteDeadline].
func (st *Stream) SetDeadline(t time.Time) error { return st.session.setDeadlines(t, true, true) }

// Trailer returns the headers that the producer set with [Writer.SetTrailer], nil if it set none. Before a read has
// returned [io.EOF] or the producer's [*CloseError], Trailer returns nil. It belongs to the read side.
func (st *Stream) Trailer() nats.Header {
	if x := st.session.extras.Load(); x != nil {
		return x.trailer
	}
	return nil
}

// send returns the send half, made on first use.
func (st *Stream) send() *Writer {
	s := &st.session
	if snd := s.send.Load(); snd != nil {
		return snd.writer
	}
	w := newConsumerWriter(s)
	if !s.send.CompareAndSwap(nil, &w.sender) {
		return s.send.Load().writer
	}
	// The goroutine that ends the stream sets end first and loads the sender afterwards. So either it sees this one, or
	// the load below sees the end.
	if e := s.end.Load(); e != nil {
		w.cancel(e.cause())
	}
	s.mark(workBind)
	return w
}

// Write sends p to the producer as one record, which the handler reads from its [Request]. It waits until the
// producer's first packet has arrived, and then for the producer's credit. It returns len(p) once p was copied: p may
// be reused at once. Errors:
//
//   - [ErrClosed] after [Stream.CloseSend] and [Stream.Close], and after the handler returned without an error, because
//     the handler does not read the record. Reads report how the stream ended.
//   - Otherwise the error that ended the stream, as [Stream.Recv] returns it; see [Writer.Write] for the end of a
//     context.
//   - [ErrOneWay] if the producer speaks only the JSON fallback.
//
// A successful Write does not mean that the handler has read the record: the handler may return before it does. If that
// matters, let the handler answer with a record. If both ends write before they read, both can wait until a deadline;
// see [Handler].
//
// A producer made by [NewWriter] accepts no records: the first one ends the stream with [CloseProtocolError].
func (st *Stream) Write(p []byte) (int, error) { return st.send().Write(p) }

// WriteObject sends v to the producer as one record, in the codec that this stream requested. It returns the length of
// the encoding. It waits and fails as [Stream.Write] does, and it returns the encoder's error if v cannot be encoded.
func (st *Stream) WriteObject(v any) (int, error) { return st.send().WriteObject(v) }

// WriteAppend sends one record that encode appends to a packet; see [Writer.WriteAppend]. It waits and fails as
// [Stream.Write] does.
func (st *Stream) WriteAppend(encode func(dst []byte) ([]byte, error)) (int, error) {
	return st.send().WriteAppend(encode)
}

// ReadFrom sends all bytes of r to the producer until r ends; see [Writer.ReadFrom].
func (st *Stream) ReadFrom(r io.Reader) (int64, error) { return st.send().ReadFrom(r) }

// Flush returns when NATS has accepted all records written so far. It fails as [Stream.Write] does.
func (st *Stream) Flush() error { return st.send().Flush() }

// Sync returns when the producer's end has acknowledged all records written so far; see [Writer.Sync].
func (st *Stream) Sync(ctx context.Context) error { return st.send().Sync(ctx) }

// TryWrite sends p to the producer as one record if it need not wait, and reports whether it did; see
// [Writer.TryWrite].
func (st *Stream) TryWrite(p []byte) (sent bool, err error) { return st.send().TryWrite(p) }

// CloseSend half-closes the stream: this end sends no more records, and the handler's reads return [io.EOF] after the
// last one. The read side stays open. CloseSend returns when NATS has accepted all records. It fails as [Stream.Write]
// does. A second call does nothing.
func (st *Stream) CloseSend() error { return st.send().Close() }

// SetPeerTimeout sets how long the producer's end may be silent before the stream ends with [CloseAbnormalClosure].
// This end sends PINGs as often as the timeout needs. The default is zero. It selects PeerTimeout of [ClientParams], as
// does a negative d. A timeout is rounded up to whole milliseconds. SetPeerTimeout may be called at any time, by any
// goroutine.
func (st *Stream) SetPeerTimeout(d time.Duration) { st.session.setPeerTimeout(d) }

// Context returns the context of the stream. The context ends when this end has read the end of the stream and sent all
// of its own records, when the stream was closed, or when the context given to Open ended. [context.Cause] returns the
// reason.
func (st *Stream) Context() context.Context { return st.session.ctx.get(st.session.recv.parent) }

// Close ends the stream. Waiting and later calls return [ErrClosed]; a read that has returned the end of the stream
// returns it again. Records that arrived and were not read are dropped. If the producer has not finished, Close resets
// the stream at the producer's end with [CloseCanceled]. Without [Stream.CloseSend], unacknowledged records may be
// lost: call [Stream.Sync] first if they matter. After [io.EOF] and CloseSend, unacknowledged packets are still
// retransmitted for ResumeTimeout, unless the client is closed. Close may be called at any time, also after the end of
// the stream, and never fails.
func (st *Stream) Close() error {
	st.endWith(true, CloseError{Code: st.session.leaving()})
	return nil
}

// CloseWithCode is Close with a code and a reason for the producer. The handler gets them as the cause of its context.
// If the producer has not answered yet, the handler gets [CloseCanceled] instead, because the address of the producer
// is not known before its first packet. The code must be from 1000 to 5999. Otherwise CloseWithCode fails with
// [ErrCloseCode] and the stream stays open. The reason is cut to [MaxReason] bytes.
//
// [CloseNormalClosure] includes [Stream.CloseSend]: all records that were written before arrive. Unacknowledged packets
// are retransmitted for ResumeTimeout, unless the client is closed. The handler reads [io.EOF] after the last record.
// If not all records can be sent, the handler gets CloseCanceled instead of io.EOF. This happens if another goroutine
// is in the middle of a large record, or if the producer is not known yet. With any other code, unacknowledged records
// are lost.
func (st *Stream) CloseWithCode(code int, text ...string) error {
	reason, err := closeReason(code, text)
	if err != nil {
		return err
	}
	tell := CloseError{code, reason}
	if s := &st.session; code == CloseNormalClosure && s.send.Load() != nil {
		if s.detach(reason) {
			return nil
		}
		tell.Code = CloseCanceled // not all records were sent
	}
	st.endWith(code == CloseNormalClosure, tell)
	return nil
}

// endWith ends the stream for its user. With part, it detaches a finished stream, so that the outbox still retransmits
// the last packets. In all other cases the stream ends at once. No write succeeds afterwards.
func (st *Stream) endWith(part bool, tell CloseError) {
	s := &st.session
	switch {
	case part && s.detachIfDone():
		s.release(&ending{err: ErrClosed})
	case s.nobodyReads(): // it left before
	default:
		e := &closedByUser
		if tell != e.reset {
			e = &ending{kind: endLocal, err: ErrClosed, reset: tell}
		}
		s.endLocally(e)
		s.leave() // the stream may have ended before, and records that arrived can still be read
	}
}

// closedByUser is the end by Close. It is never changed.
var closedByUser = ending{kind: endLocal, err: ErrClosed, reset: CloseError{Code: CloseCanceled}}
