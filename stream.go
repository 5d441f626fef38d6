package stream

import (
	"context"
	"io"
	"iter"
	"math/bits"
	"slices"
	"sync/atomic"

	"github.com/nats-io/nats.go"
)

// Stream is the consumer's end of a stream. One goroutine at a time may read: Recv, RecvObject, All, Read and WriteTo
// are reads. Close, CloseWithCode and Context may be called by any goroutine at any time.
//
// Read until a read returns an error, or call Close, or end the context given to Open: otherwise the stream stays open.
type Stream struct {
	session   session
	parent    context.Context // the one given to Open
	ctx       context.Context
	cancel    context.CancelCauseFunc
	stopAfter atomic.Pointer[func() bool] // takes back what watches parent
	asked     FrameFlags                  // codec this end asked for
	maxRecord uint64
	reserved  atomic.Int64
	released  atomic.Bool

	// gate is 1 while a read is on its slow path, where it may wait: another read gets an error then, always. Two
	// reads that both find their record at hand are told apart by busy, a plain flag, as Go's maps do it: an exact
	// answer costs a locked instruction (Attiya et al., "Laws of Order", POPL 2011), more than all the rest of Recv.
	// Race builds pay for it.
	gate atomic.Uint32

	// Owned by the reader.
	busy bool
	data []byte // the current packet
	off  int    // where its next frame begins
	ack  bool   // its sender asked for credit
	left []byte // what Read did not have room for
	done error  // what every read returns from now on
}

// open registers a stream and has its request published.
func (ep *endpoint) open(ctx context.Context, msg *nats.Msg, codec Codec) (*Stream, error) {
	window := ep.reserve(min(initialWindow, ep.window))
	s := &Stream{parent: ctx, asked: codecFlag(codec), maxRecord: uint64(ep.maxRecord)}
	s.reserved.Store(int64(window))
	s.session.ep, s.session.stream = ep, s
	s.session.sender = newSender()
	s.session.bucket.init(initialPackets, window)
	offer := Token{Codec: codec, LogPackets: uint8(bits.TrailingZeros(initialPackets)), LogBytes: uint8(bits.TrailingZeros64(window))}
	req := &nats.Msg{Subject: msg.Subject, Header: make(nats.Header, len(msg.Header)+1), Data: append([]byte(nil), msg.Data...)}
	for key, values := range msg.Header { // published later, when the caller may have changed its own
		req.Header[key] = slices.Clone(values)
	}
	req.Header[headerOpen] = []string{string(AppendOffer(nil, offer))}
	s.session.request = req

	s.ctx, s.cancel = context.WithCancelCause(ctx)
	if err := ep.register(&s.session, offer); err != nil {
		s.release(err)
		return nil, err
	}
	req.Reply = s.session.reply
	s.session.mark(workRequest)
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, s.canceled)
		s.stopAfter.Store(&stop)
		if s.released.Load() { // meanwhile: whoever comes second finds the other's work
			stop()
		}
	}
	return s, nil
}

// Recv returns the next record, or io.EOF after CloseNormalClosure, a *CloseError after any other close code, the
// context's error when it ended, nats.ErrNoResponders when nobody answered. It waits for the record if need be; a
// context that ends is noticed at once, also before records that have arrived.
//
// The record is a part of the packet it came in, never reused and safe to keep and to change; keeping a small one
// keeps its packet, up to 32 KiB, alive.
func (s *Stream) Recv() ([]byte, error) {
	// Only the record at hand is taken here; next does the same and all the rest, without haste.
	if !s.busy && !raceEnabled && len(s.left) == 0 && s.gate.Load() == 0 && s.session.end.Load() == nil && s.parent.Err() == nil {
		s.busy = true
		if b := s.data[s.off:]; len(b) >= FrameHeaderSize {
			h := frameHeader(b)
			n, rest := payloadLen(h), b[FrameHeaderSize:]
			if isPlainData(h) && n <= uint64(len(rest)) && n <= s.maxRecord {
				s.off += FrameHeaderSize + int(n)
				s.busy = false
				return rest[:n:n], nil
			}
		}
		s.busy = false
	}
	rec, _, err := s.next()
	return rec, err
}

// RecvObject decodes the next record into v, by the codec it was written with; a record written as bytes is decoded
// by the codec this stream asked for. It returns as Recv does. A record that does not decode is an error of that call
// alone: the next one goes on with the next record.
func (s *Stream) RecvObject(v any) error {
	rec, flags, err := s.next()
	if err != nil {
		return err
	}
	return decodeObject(rec, flags, s.asked, v)
}

// All returns the records until the stream ends: without an error on normal closure, with one error as the last pair
// otherwise. Leaving the loop early leaves the stream open.
func (s *Stream) All() iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for {
			rec, err := s.Recv()
			if err == io.EOF {
				return
			}
			if !yield(rec, err) || err != nil {
				return
			}
		}
	}
}

// Read implements io.Reader: the records as one stream of bytes, without their boundaries. It returns as Recv does.
func (s *Stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := s.enter(); err != nil {
		return 0, err
	}
	defer s.leave()
	if err := s.endedNow(); err != nil {
		return 0, err
	}
	for len(s.left) == 0 {
		rec, _, err := s.nextGated()
		if err != nil {
			return 0, err
		}
		s.left = rec
	}
	n := copy(p, s.left)
	s.left = s.left[n:]
	return n, nil
}

// WriteTo implements io.WriterTo: it writes the records to w, one Write each, until the stream ends. Normal closure is
// no error.
func (s *Stream) WriteTo(w io.Writer) (n int64, err error) {
	for rec, err := range s.All() {
		if err != nil {
			return n, err
		}
		m, err := w.Write(rec)
		n += int64(m)
		if err != nil {
			return n, err
		}
		if m < len(rec) {
			return n, io.ErrShortWrite
		}
	}
	return n, nil
}

// Context ends when the stream does: when its end was read, when it was closed, when the context given to Open ended.
// context.Cause tells why.
func (s *Stream) Context() context.Context { return s.ctx }

// Close stops the stream: a read that waits returns ErrClosed, and a producer that is not done is told that the
// consumer canceled. It is always safe to call, also after the end, and never fails.
func (s *Stream) Close() error {
	s.stop(&ending{err: ErrClosed, now: true, tell: CloseError{Code: CloseCanceled}})
	return nil
}

// CloseWithCode is Close with a code and a reason for the producer. The code is one from 1000 to 5999, else it fails
// with ErrCloseCode and the stream goes on. The reason is cut to MaxReason bytes.
func (s *Stream) CloseWithCode(code int, text ...string) error {
	reason, err := closeReason(code, text)
	if err != nil {
		return err
	}
	s.stop(&ending{err: ErrClosed, now: true, tell: CloseError{code, reason}})
	return nil
}

// canceled runs when the context given to Open ends.
func (s *Stream) canceled() {
	e := &ending{err: contextError(s.parent), now: true, tell: CloseError{Code: CloseCanceled}}
	if s.parent.Err() == context.DeadlineExceeded {
		e.tell.Code = CloseDeadlineExceeded
	}
	s.stop(e)
}

// stop ends the stream now and lets go of what it holds.
func (s *Stream) stop(e *ending) {
	s.session.finish(e)
	s.release(e.err)
}

// release gives the window back to the budget and ends the stream's context, once.
func (s *Stream) release(cause error) {
	if !s.released.CompareAndSwap(false, true) {
		return
	}
	s.session.ep.reserved.Add(-s.reserved.Swap(0))
	if stop := s.stopAfter.Load(); stop != nil {
		(*stop)()
	}
	s.cancel(cause)
}

// grow reserves n more bytes for the stream's window.
func (s *Stream) grow(n uint64) bool {
	ep := s.session.ep
	if !ep.grow(n) {
		return false
	}
	s.reserved.Add(int64(n))
	if s.released.Load() { // at the same time: whoever comes second finds the bytes
		ep.reserved.Add(-s.reserved.Swap(0))
	}
	return true
}

// enter begins a read that may wait; leave ends it.
func (s *Stream) enter() error {
	if s.busy || !s.gate.CompareAndSwap(0, 1) {
		return ErrConcurrentRecv
	}
	return nil
}

func (s *Stream) leave() { s.gate.Store(0) }

// next returns the next record and its flags.
func (s *Stream) next() ([]byte, FrameFlags, error) {
	if err := s.enter(); err != nil {
		return nil, 0, err
	}
	defer s.leave()
	if err := s.endedNow(); err != nil {
		return nil, 0, err
	}
	if rec := s.left; len(rec) != 0 { // the rest of a record that Read began
		s.left = nil
		return rec, FlagRaw, nil
	}
	return s.nextGated()
}

func (s *Stream) nextGated() ([]byte, FrameFlags, error) {
	var record []byte // pieces of a large record so far
	var flags FrameFlags
	for {
		if err := s.endedNow(); err != nil {
			return nil, 0, err
		}
		if s.off == len(s.data) {
			if err := s.nextPacket(); err != nil {
				return nil, 0, err
			}
			if s.session.bucket.mode == modeJSON {
				return s.fallbackRecord()
			}
			if s.off == len(s.data) { // no sender numbers such a packet: this one was cut off
				return nil, 0, s.broken(protocolError(CloseProtocolError, "sequenced packet without a frame"))
			}
			continue
		}
		f, rest, err := ParseFrame(s.data[s.off:])
		if err != nil {
			return nil, 0, s.broken(protocolError(CloseUnsupportedData, "%v", err))
		}
		s.off = len(s.data) - len(rest)
		switch {
		case f.Type == FrameData:
			if uint64(len(record)+len(f.Payload)) > s.maxRecord {
				return nil, 0, s.broken(protocolError(CloseMessageTooBig, "record exceeds %d bytes", s.maxRecord))
			}
			if record == nil {
				flags = f.Flags & FlagCodecMask
				if f.Flags&FlagMore == 0 {
					return f.Payload, flags, nil
				}
			}
			if record != nil && f.Flags&FlagCodecMask != flags {
				return nil, 0, s.broken(protocolError(CloseProtocolError, "pieces of one record in two codecs"))
			}
			record = append(record, f.Payload...)
			if f.Flags&FlagMore == 0 {
				return record, flags, nil
			}
		case f.Type == FrameClose:
			if record != nil && f.Code == CloseNormalClosure {
				return nil, 0, s.broken(protocolError(CloseProtocolError, "closed within a record"))
			}
			return nil, 0, s.closed(int(f.Code), string(f.Payload))
		case f.Type == FrameMeta || f.Type.Skippable():
			if record != nil && f.Type == FrameMeta {
				return nil, 0, s.broken(protocolError(CloseProtocolError, "META within a record"))
			}
		default:
			return nil, 0, s.broken(protocolError(CloseUnsupportedData, "%v: %v", f.Type, ErrMisplaced))
		}
	}
}

// endedNow returns what every read returns from now on, if there is such a thing.
func (s *Stream) endedNow() error {
	if s.done != nil {
		return s.done
	}
	if e := s.session.end.Load(); e != nil && e.now {
		return s.finish(e)
	}
	if s.parent.Err() != nil || s.ctx.Err() != nil { // the parent ends first: its Done may have been seen already
		// The context's own callback is under way and says the same to the producer.
		s.canceled()
		return s.finish(s.session.end.Load())
	}
	return nil
}

// nextPacket waits for the next packet and makes it the current one. It gives credit for the one before.
func (s *Stream) nextPacket() error {
	b := &s.session.bucket
	if len(s.data) > 0 {
		if b.consume(len(s.data), s.ack, s.session.ep.window, s.grow) {
			s.session.mark(workCredit)
		}
		s.data, s.off = nil, 0
	}
	for {
		// The order matters: whoever ends the stream does so after the last push, so a ring that is empty after
		// the end was seen stays empty.
		end := s.session.end.Load()
		if data, ok := b.ring.Pop(); ok {
			s.data = data
			if b.mode == modeJSON {
				s.off = len(data)
				return nil
			}
			s.off = PacketHeaderSize
			s.ack = data[1]&byte(PacketAck) != 0
			return nil
		}
		if end != nil {
			return s.finish(end)
		}
		b.dry = true
		b.park.announce()
		if b.ring.Empty() && s.session.end.Load() == nil && s.parent.Err() == nil {
			b.park.wait()
		} else {
			b.park.retract()
		}
		if err := s.endedNow(); err != nil {
			return err
		}
	}
}

// fallbackRecord decodes the current message of a peer that speaks the original protocol.
func (s *Stream) fallbackRecord() ([]byte, FrameFlags, error) {
	rec, end, broken := parseJSON(s.data)
	switch {
	case broken != nil:
		return nil, 0, s.broken(broken)
	case end != nil:
		return nil, 0, s.closed(end.Code, end.Text)
	case uint64(len(rec)) > s.maxRecord:
		return nil, 0, s.broken(protocolError(CloseMessageTooBig, "record of %d bytes exceeds %d", len(rec), s.maxRecord))
	}
	return rec, FlagJSON, nil
}

// closed ends the stream as the producer said.
func (s *Stream) closed(code int, text string) error {
	if code == CloseNormalClosure {
		return s.finish(&ending{err: io.EOF})
	}
	return s.finish(&ending{err: &CloseError{code, text}})
}

// broken ends the stream because of what the producer sent, and tells it.
func (s *Stream) broken(err *CloseError) error {
	return s.finish(&ending{err: err, now: true, tell: *err})
}

// finish makes e the result of this and every later read.
func (s *Stream) finish(e *ending) error {
	s.done = e.err
	s.data, s.off, s.left = nil, 0, nil
	s.stop(e)
	return s.done
}
