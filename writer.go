package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/lifecycle"
)

// This file has Writer, the user's view of a send half. Goroutines that write run it, except newProducer, which the
// callbacks of NATS run for a handler. Functions with the suffix Locked need the lock of the packer.

// Writer is the producer's end of a stream. It packs records into packets. The outbox publishes the packets, keeps them
// until the consumer's end has acknowledged them, and retransmits lost ones. A Writer is safe for use by many
// goroutines at once; records of one goroutine keep their order.
//
// A record that is written while the stream is idle leaves at once. While the outbox is busy, records gather in the
// open packet and share a NATS message. No timer is involved.
//
// In a [Handler], the result of the handler closes the Writer. Close a Writer made by [NewWriter] with [Writer.Close]
// or [Writer.CloseWithCode]. Otherwise its consumer waits for ever.
type Writer struct {
	// Only the outbox uses sender. A processor that writes a word takes its cache line from all others. So the fields
	// that the outbox uses for each packet and those that the writers use for each packet lie apart, with rarely used
	// fields between them.
	sender sender

	// Set once.
	unusable error // the error of NewWriter, which cannot return it: this writer can never write
	codec    FrameFlags
	object   int32 // size of the object encoded last, at most an eighth of a packet; guarded by the lock

	packer // with the lock
}

// NewWriter returns the producer's end of the stream for a request with the reply subject subject. It neither blocks
// nor sends, and may be called in a NATS callback. client may be the client that opened the stream. The writer accepts
// no records from the consumer and does not see the headers of the request: use a [Server] for these.
func NewWriter(client *Client, subject string) *Writer { return client.NewWriter(subject) }

// NewWriter returns the producer's end of a stream, as the function [NewWriter] does.
func (c *Client) NewWriter(subject string) *Writer {
	if c == nil || c.ep == nil {
		w := &Writer{unusable: noConnection("the client given to NewWriter", "pass one made by NewClient")}
		w.init(&session{recv: receiver{parent: context.Background()}})
		w.cancel(w.unusable)
		return w
	}
	offer, err := ParseToken(lastToken(subject))
	refused := c.ep.inbox.refused.Load()
	switch {
	case subject == "":
		err = fmt.Errorf("stream: the request has no reply subject, so there is nowhere to send a stream: pass the Reply of a request: %w", nats.ErrBadSubject)
	case errors.Is(err, ErrVersion):
		err = fmt.Errorf("stream: cannot write to %s: %w", subject, err)
	case checkAnswer(subject) != nil:
		err = checkAnswer(subject)
	case refused != nil:
		err = refused.err
	default:
		w := c.ep.newProducer(lifecycle.Writer, c.ep.ctx, subject, offer, err != nil, 0)
		w.session.recv.readLock.Or(gateDone)
		if ob := c.ep.observer; ob != nil {
			ob.opened(w.session, "", 1)
		}
		w.session.markLater(workWait)
		return w
	}
	w := c.ep.newProducer(lifecycle.Writer, c.ep.ctx, subject, offer, true, 0)
	w.unusable = err
	w.cancel(err)
	return w
}

// producer is a producer's end, in one piece of memory.
type producer struct {
	session session
	Writer
}

// newProducer makes a producer's end toward subject. Its writes end with ctx. window is the first window for records of
// the consumer, 0 if it sends none.
func (ep *endpoint) newProducer(role lifecycle.Role, ctx context.Context, subject string, offer Token, json bool, window uint64) *Writer {
	p := new(producer)
	w, s := &p.Writer, &p.session
	s.init(ep, role, initialPackets, max(window, minWindow))
	s.out.state = lifecycle.Start(role, role == lifecycle.Handler && !json)
	s.bucket.ring.Between.released.Store(window == 0)
	s.recv.parent, s.out.peer, s.rawCodec = ctx, subject, FlagMsgPack
	w.init(s)
	w.subject = subject
	if json {
		s.bucket.form.Store(formJSON) // its consumer sends nothing: any packet is foreign
		w.codec = FlagJSON
		w.granted = credited{fallbackQueue, fallbackQueueBytes}
	} else {
		s.bucket.form.Store(formPackets)
		w.codec = codecFlag(offer.Codec)
		w.granted = offered(offer)
	}
	s.send.Store(&w.sender)
	return w
}

// newConsumerWriter makes the send half of a consumer's end. It may send after bind has set the peer's credit.
func newConsumerWriter(s *session) *Writer {
	w := new(Writer)
	w.init(s)
	w.codec = s.rawCodec
	return w
}

func (w *Writer) init(s *session) {
	w.packer.session = s
	w.sender.session, w.sender.packer, w.sender.writer = s, &w.packer, w
}

// A fallback peer grants no credit. So its credit is this end's own bound on the packets that wait to be published.
const (
	fallbackQueue      = maxPackets
	fallbackQueueBytes = 4 << 20
)

// SetPeerTimeout sets how long the consumer's end may be silent before the stream ends with [CloseAbnormalClosure], as
// [Stream.SetPeerTimeout] does for the producer's end. A consumer that speaks only the JSON fallback answers no PING,
// so its silence cannot be detected.
func (w *Writer) SetPeerTimeout(d time.Duration) {
	if w.unusable == nil {
		w.session.setPeerTimeout(d)
	}
}

// Context returns the context of the stream. [context.Cause] returns the reason for its end. It ends:
//
//   - when the consumer left or its deadline passed, with a [*CloseError] that has the consumer's code
//   - when the consumer was silent for PeerTimeout, with [CloseAbnormalClosure]
//   - when this end's connection was lost for good
//   - when the writer was closed
//
// The first two do not happen with a consumer that speaks only the JSON fallback.
func (w *Writer) Context() context.Context { return w.context() }

// Write sends p as one record. It returns len(p) once p was copied: p may be reused at once. It blocks while the
// consumer's credit is used up, until the writer's context ends. Errors:
//
//   - [ErrClosed] after [Writer.Close], and after the consumer left with [CloseNormalClosure].
//   - [ErrRecordTooLarge] for a record above MaxRecordSize. A handler that returns it ends the stream with
//     [CloseMessageTooBig].
//   - [os.ErrDeadlineExceeded] after the deadline of [Writer.SetWriteDeadline]. The stream goes on.
//   - Otherwise the error that ended the stream, as reads return it. After the end of a context it matches both the
//     cause and [context.Canceled] or [context.DeadlineExceeded].
//
// After any call has returned the end of the stream, every later Write fails. A Write just after the end of the context
// may still succeed if the open packet has room. Its record is not sent. The next [Writer.Flush], [Writer.Sync],
// [Writer.Close], or Write that needs a new packet returns the error.
func (w *Writer) Write(p []byte) (int, error) { return w.write(p, FlagRaw) }

func (w *Writer) write(p []byte, flags FrameFlags) (int, error) {
	w.mu.Lock()
	n, room := w.n, w.fast
	end := n + FrameHeaderSize + len(p)
	if end > len(room) {
		return w.writeSlow(p, flags)
	}
	b := room[n:end:end] // with this capacity the compiler omits bounds checks of slices of b
	putFrameHeader(b, FrameData, flags, 0, len(p))
	copy(b[FrameHeaderSize:], p)
	w.n = end
	w.records++
	if w.queued {
		w.mu.Unlock()
		return len(p), nil
	}
	w.queued = true
	w.mu.Unlock()
	w.session.markWritten(len(p))
	return len(p), nil
}

// writeSlow is write if the open packet has no room. It is called with the lock held and releases it.
func (w *Writer) writeSlow(p []byte, flags FrameFlags) (int, error) {
	if w.placeLocked(p, flags) {
		w.mu.Unlock()
		return len(p), nil
	}
	if err := w.appendRecordLocked(p, flags); err != nil {
		w.mu.Unlock()
		return lengthSent(len(p), err), err
	}
	mark := !w.queued
	w.queued = true
	w.mu.Unlock()
	if mark { // after the lock, which the outbox is about to take
		w.session.markWritten(len(p))
	}
	return len(p), nil
}

// lengthSent returns the first result of a write of n bytes that returns err.
func lengthSent(n int, err error) int {
	if err == errRestFollows {
		return n
	}
	return 0
}

func (w *Writer) appendRecordLocked(p []byte, flags FrameFlags) error {
	if err := w.awaitTurnLocked(true); err != nil {
		return err
	}
	if err := w.checkSize(len(p)); err != nil {
		return err
	}
	switch {
	case w.session.peerTakesJSON():
		return w.appendJSONLocked(p, false)
	case len(p) <= w.singleLimit():
		return w.appendLocked(p, flags, false)
	}
	return w.appendPiecesLocked(p, flags)
}

// checkSize returns the error for a record of n bytes that is too large.
func (w *Writer) checkSize(n int) error {
	if max := w.session.ep.maxRecord; n > max {
		return fmt.Errorf("%w: %d bytes, MaxRecordSize is %d", ErrRecordTooLarge, n, max)
	}
	return nil
}

// appendLocked appends one DATA frame. If the open packet has no room, it opens a new one. It may wait for credit.
// Meanwhile records of other goroutines may go first, unless the turn is mine.
func (w *Writer) appendLocked(p []byte, flags FrameFlags, mine bool) error {
	b, err := w.frameLocked(FrameHeaderSize+len(p), mine)
	if err != nil {
		return err
	}
	w.records++
	putFrameHeader(b, FrameData, flags, 0, len(p))
	copy(b[FrameHeaderSize:], p)
	return nil
}

// appendPiecesLocked cuts a record that fits no packet. It holds the turn, so that no other record comes between.
//
// Of a record in pieces, all is sent or nothing. If the write deadline passes after the first piece, the outbox appends
// the rest as credit arrives, and the turn ends with the last piece.
func (w *Writer) appendPiecesLocked(p []byte, flags FrameFlags) error {
	w.turn = true
	for rest := p; ; {
		if rest = w.appendSomeLocked(rest, flags); len(rest) == 0 {
			w.endTurnLocked()
			return nil
		}
		err := w.waitCreditLocked(true)
		switch {
		case err == nil:
		case len(rest) == len(p):
			w.endTurnLocked()
			return err
		case err == errWriteDeadline:
			w.keepRestLocked(rest, flags)
			return errRestFollows
		default:
			// A part of the record was sent, so no other record can follow. If the context ended, the peer gets its
			// code, even if the context's own callback has not run yet.
			w.mu.Unlock() // ending a stream takes the lock
			if w.session.recv.parent.Err() != nil {
				w.session.canceled()
			}
			w.session.requestEnd(&ending{kind: endFault, err: err, reset: CloseError{Code: CloseInternalServerErr, Text: "record cut off"}})
			w.mu.Lock()
			w.endTurnLocked()
			return err
		}
	}
}

// frameLocked returns the next n bytes of the open packet, or of another one. If there is no credit, it waits. mine
// reports that the caller has the turn.
func (w *Writer) frameLocked(n int, mine bool) ([]byte, error) {
	for {
		if b := w.spaceLocked(n); b != nil {
			return b, nil
		}
		if err := w.waitCreditLocked(mine); err != nil {
			return nil, err
		}
	}
}

// waitCreditLocked waits until credit may have changed and the caller may write again. During the wait, another
// goroutine may have closed the writer or taken the turn, and the stream may have ended.
func (w *Writer) waitCreditLocked(mine bool) error {
	if err := w.lateLocked(); err != nil { // the deadline may have passed while the lock was free
		return err
	}
	if err := w.waitLocked(); err != nil {
		return err
	}
	if !mine {
		return w.awaitTurnLocked(true)
	}
	if err := w.failedLocked(); err != nil {
		return err
	}
	return w.lateLocked()
}

// ReadFrom sends the bytes of r until [io.EOF]: the bytes of each read are one record. It returns the number of bytes
// sent. Errors: those of r and of [Writer.Write]; [io.ErrNoProgress] if 100 reads in a row return no bytes and no
// error; an error for a Reader that returns a count outside its buffer.
//
// With ReadFrom, io.Copy(w, r) reads straight into buffers of the packet size. If r has a WriteTo method, as a
// bytes.Reader has, io.Copy calls that instead, and it may write all bytes as one record. Call ReadFrom directly for
// such an r.
func (w *Writer) ReadFrom(r io.Reader) (n int64, err error) {
	p := getPacket(coalesceSize)
	defer putPacket(p)
	buf := p.buf[:min(coalesceSize, w.recordLimit())]
	clear(buf) // a Reader that returns too large a count must not send bytes of other streams
	for empty := 0; ; {
		m, err := r.Read(buf)
		switch {
		case m < 0 || m > len(buf):
			return n, fmt.Errorf("stream: invalid read result: %T returned %d for a buffer of %d bytes: correct that Reader", r, m, len(buf))
		case m > 0:
			empty = 0
			m, werr := w.Write(buf[:m])
			n += int64(m)
			if werr != nil {
				return n, werr
			}
		case err == nil:
			if err := w.checkOpen(); err != nil {
				return n, err
			}
			if empty++; empty == maxEmptyReads {
				return n, io.ErrNoProgress
			}
		}
		if err != nil {
			if err == io.EOF {
				err = nil
			}
			return n, err
		}
	}
}

// maxEmptyReads is how many reads in a row may return no bytes and no error, as in package bufio.
const maxEmptyReads = 100

// checkOpen returns the error of writes after the end of the stream, nil while it is open.
func (w *Writer) checkOpen() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.closed.Load() || w.held.Load():
		return ErrClosed
	case w.unusable != nil:
		return w.unusable
	case w.over():
		return w.endError()
	}
	return nil
}

// recordLimit returns the size of a record of ReadFrom: it fills a packet.
func (w *Writer) recordLimit() int {
	switch {
	case w.unusable != nil:
		return minWindow
	case w.session.peerTakesJSON():
		return min(fallbackRecord(int(w.session.ep.maxPayload.Load())), w.session.ep.maxRecord)
	}
	return min(w.coalesceLimit()-PacketHeaderSize-FrameHeaderSize, w.session.ep.maxRecord)
}

// SetHeader sends h to the consumer: [Stream.Header] returns it there. Call SetHeader once, before the first record.
// The headers are sent with the first record, or by [Writer.Flush] or [Writer.Close]. h may be changed afterwards. As
// in NATS's own headers, white space around a value is not kept, and a name without values is not sent. A consumer that
// speaks only the JSON fallback gets no headers.
//
// Errors: [ErrHeader] after the first record or an earlier SetHeader, or if h cannot be sent; those of [Writer.Write].
func (w *Writer) SetHeader(h nats.Header) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.awaitTurnLocked(true); err != nil {
		return err
	}
	meta, err := w.meta(h)
	if err != nil || w.session.peerTakesJSON() {
		return err
	}
	if w.sealed > 0 || w.open != nil && w.n > PacketHeaderSize {
		return fmt.Errorf("%w: set it once, before the first record", ErrHeader)
	}
	b, err := w.frameLocked(FrameHeaderSize+len(meta), false)
	if err != nil {
		return err
	}
	w.besideLocked(len(b))
	putFrameHeader(b, FrameMeta, 0, 0, len(meta))
	copy(b[FrameHeaderSize:], meta)
	return nil
}

// SetTrailer sends h to the consumer with the end of the stream. [Stream.Trailer] returns it there. The last call
// before Close counts. h may be changed afterwards. A consumer that speaks only the JSON fallback gets no trailers.
//
// Errors: [ErrHeader] if h cannot be sent; [ErrClosed] after Close; the error that ended the stream.
func (w *Writer) SetTrailer(h nats.Header) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.awaitTurnLocked(true); err != nil {
		return err
	}
	meta, err := w.meta(h)
	if err != nil {
		return err
	}
	w.trailer = meta
	return nil
}

// meta encodes h, if it fits.
func (w *Writer) meta(h nats.Header) ([]byte, error) {
	meta, err := appendMeta(nil, h)
	most := int(w.session.ep.maxPayload.Load()) - PacketHeaderSize - 3*FrameHeaderSize - MaxReason // CLOSE goes with trailers
	if max := min(maxMeta, most); err == nil && len(meta) > max {
		err = fmt.Errorf("%w: %d bytes, at most %d can be sent", ErrHeader, len(meta), max)
	}
	return meta, err
}
