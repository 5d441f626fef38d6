package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/ring"
)

// Writer is the producer's end of a stream. It packs records into packets. The outbox publishes the packets, keeps them until
// the consumer's end has acknowledged them, and retransmits lost ones. A Writer is safe for use by many goroutines at once;
// records of one goroutine keep their order.
//
// A record that is written while the stream is idle leaves at once. While the outbox is busy, records gather in the
// open packet and share a NATS message. No timer is involved.
//
// A Writer must be closed, by [Writer.Close] or [Writer.CloseWithCode], or its consumer waits for ever.
type Writer struct {
	// Owned by the outbox. Only the outbox reads unacked. A word that one processor writes takes its cache line from all
	// others. So the fields that writers use for each packet and those that the outbox uses for each packet lie apart, with
	// rarely used fields between them.
	unacked   unackedPackets
	published atomic.Uint32 // unacked.Next, for Flush
	waiting   atomic.Bool   // wake is not nil

	trailer []byte        // the headers of SetTrailer, in META form
	closing CloseError    // the code and reason in CLOSE
	wake    chan struct{} // closed when anything under the lock, or the credit, changes; nil while nobody waits

	// Set once.
	session  *session
	unusable error // the error of NewWriter, which cannot return it: this writer can never write
	ctx      context.Context
	json     bool // the consumer speaks only the fallback
	codec    FrameFlags

	subject      string // of the peer; a consumer's send half does not know it at first
	cancel       context.CancelCauseFunc
	publishError error    // the last publish failed; its packet is kept and published again by the next call
	acked        uint32   // how many packets the consumer acknowledged
	granted      credited // the credit that it granted

	sealed      uint32       // sequence number of the open packet, or of the next to be opened
	sealedBytes uint64       // of all packets before it
	shifted     uint32       // by how much sealed grew because packets were cut; changed by the outbox with the lock held
	packetSize  atomic.Int32 // bytes that a packet should hold at most, 0 before the outbox stored it
	kept        uint64       // bytes of the buffers of packets that are open, sealed, or published and not acknowledged
	object      int          // size of the object encoded last, at most an eighth of a packet

	mu sync.Mutex // guards the fields that the outbox does not own
	// The open packet and how much of it is written. fast is the part of its buffer that Write may fill, and empty
	// whenever Write must take the slow path: no open packet, a writer has the turn, closed, ended.
	n        int
	fast     []byte
	open     *packet
	queued   bool // the session is marked: the outbox will look for packets
	encoding bool // the turn's owner encodes into the rest of the open packet, without the lock
	turn     bool // one goroutine is writing something that takes several steps: others wait
	half     bool // CLOSE says that the handler goes on reading
	soon     bool // CLOSE asks to be acknowledged at once

	// held is set while a handler has closed w and CLOSE is not written yet: the handler may still fail. Stored with the lock held.
	held atomic.Bool

	closed atomic.Bool // CLOSE was written: no records after it. Stored with the lock held; part looks without

	size  int                // of the packet sealed last
	ready ring.Ring[*packet] // from the writers, who push with the lock held, to the outbox, which takes no lock to pop
}

// NewWriter returns the producer's end of the stream for a request with the reply subject subject. It neither blocks nor
// sends, and may be called in a NATS callback. client may be the client that opened the stream. The writer accepts no records
// from the consumer and does not see the headers of the request: use a [Server] for these.
func NewWriter(client *Client, subject string) *Writer { return client.NewWriter(subject) }

// NewWriter is the function NewWriter.
func (c *Client) NewWriter(subject string) *Writer {
	if c == nil || c.ep == nil {
		w := &Writer{subject: subject, unusable: noConnection("the client given to NewWriter", "pass one made by NewClient")}
		w.ctx, w.cancel = context.WithCancelCause(context.Background())
		w.cancel(w.unusable)
		w.session = &session{writer: atomic.Pointer[Writer]{}}
		return w
	}
	offer, err := ParseToken(lastToken(subject))
	refused := c.ep.inbox.refused.Load()
	switch {
	case subject == "":
		err = fmt.Errorf("stream: the request has no reply subject, so nobody waits for a stream: %w", nats.ErrBadSubject)
	case errors.Is(err, ErrVersion):
		err = fmt.Errorf("stream: cannot write to %s: %w", subject, err)
	case checkAnswer(subject) != nil:
		err = checkAnswer(subject)
	case refused != nil:
		err = refused.err
	default:
		w := c.ep.newProducer(lifecycle.Writer, c.ep.ctx, subject, offer, err != nil, 0)
		w.session.recv.readDone.Store(true)
		w.session.markLater(workWait)
		return w
	}
	w := c.ep.newProducer(lifecycle.Writer, c.ep.ctx, subject, offer, true, 0)
	w.unusable = err
	w.cancel(err)
	return w
}

// newProducer makes a producer's end toward subject. Its writes end with ctx. window is the number of bytes reserved for
// records of the consumer.
func (ep *endpoint) newProducer(role lifecycle.Role, ctx context.Context, subject string, offer Token, json bool, window uint64) *Writer {
	p := new(struct {
		session session
		Writer
	})
	w, s := &p.Writer, &p.session
	s.init(ep, role, initialPackets, max(window, minWindow))
	s.out.state = lifecycle.Start(role, role == lifecycle.Handler && !json)
	s.recv.window.Store(int64(window))
	s.recv.parent, s.out.peer, s.recv.rawCodec = ctx, subject, FlagMsgPack
	w.init(s, ctx)
	w.subject = subject
	if w.json = json; json {
		s.bucket.mode = modeJSON // its consumer sends nothing: any packet is foreign
		w.codec = FlagJSON
		w.granted = credited{fallbackQueue, fallbackQueueBytes}
	} else {
		w.codec = codecFlag(offer.Codec)
		w.granted = offered(offer)
	}
	s.writer.Store(w)
	return w
}

// newConsumerWriter makes the send half of a consumer's end. It may send after bind has set the peer's credit.
func newConsumerWriter(s *session, ctx context.Context) *Writer {
	w := new(Writer)
	w.init(s, ctx)
	w.codec = s.recv.rawCodec
	return w
}

func (w *Writer) init(s *session, ctx context.Context) {
	w.session = s
	w.ctx, w.cancel = context.WithCancelCause(ctx)
	w.ready.Init(maxUnacked + 1) // one more for the packet that only closes
}

// A fallback peer grants no credit. So its credit is this end's own bound on the packets that wait to be published.
const (
	fallbackQueue      = maxPackets
	fallbackQueueBytes = 4 << 20
)

// SetPeerTimeout sets how long the consumer's end may be silent before the stream ends with [CloseAbnormalClosure], as
// [Stream.SetPeerTimeout] does for the producer's end. A consumer that speaks only the JSON fallback answers no PING, so its
// silence cannot be detected.
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
func (w *Writer) Context() context.Context { return w.ctx }

// Write sends p as one record. It returns len(p) once p was copied: p may be reused at once. It blocks while the
// consumer's credit is used up, until the writer's context ends. Errors:
//
//   - [ErrClosed] after [Writer.Close], and after the consumer left with [CloseNormalClosure].
//   - [ErrRecordTooLarge] for a record above MaxRecordSize. A handler that returns it ends the stream with [CloseMessageTooBig].
//   - Otherwise the error that ended the stream, as reads return it. After the end of a context it matches both the cause and
//     [context.Canceled] or [context.DeadlineExceeded].
//
// After any call has returned the end of the stream, every later Write fails. A Write just after the end of the context may
// still succeed if the open packet has room. Its record is not sent. The next [Writer.Flush], [Writer.Sync], [Writer.Close],
// or Write that needs a new packet returns the error.
func (w *Writer) Write(p []byte) (int, error) { return w.write(p, FlagRaw) }

func (w *Writer) write(p []byte, flags FrameFlags) (int, error) {
	w.mu.Lock()
	n, room := w.n, w.fast
	end := n + FrameHeaderSize + len(p)
	if end > len(room) {
		return w.writeSlow(p, flags)
	}
	b := room[n:end:end] // its capacity known, the compiler need not guard slices of it
	putFrameHeader(b, FrameData, flags, 0, len(p))
	copy(b[FrameHeaderSize:], p)
	w.n = end
	if w.queued {
		w.mu.Unlock()
		return len(p), nil
	}
	w.queued = true
	w.mu.Unlock()
	w.session.mark(workPackets)
	return len(p), nil
}

// writeSlow is write if the open packet has no room. It is called with the lock held and releases it.
func (w *Writer) writeSlow(p []byte, flags FrameFlags) (int, error) {
	if err := w.appendRecordLocked(p, flags); err != nil {
		w.mu.Unlock()
		return 0, err
	}
	mark := !w.queued
	w.queued = true
	w.mu.Unlock()
	if mark { // after the lock, which the outbox is about to take
		w.session.mark(workPackets)
	}
	return len(p), nil
}

func (w *Writer) appendRecordLocked(p []byte, flags FrameFlags) error {
	if err := w.awaitTurnLocked(); err != nil {
		return err
	}
	if max := w.session.ep.maxRecord; len(p) > max {
		return fmt.Errorf("%w: %d bytes, MaxRecordSize is %d", ErrRecordTooLarge, len(p), max)
	}
	switch {
	case w.json:
		return w.appendJSONLocked(p, false)
	case len(p) <= w.singleLimit():
		return w.appendLocked(p, flags, false)
	}
	return w.appendPiecesLocked(p, flags)
}

// singleLimit returns the largest payload that travels in one frame. It follows the server's max_payload. While most of the
// budget for kept packets is in use, pieces are smaller, because every stream may open one packet.
func (w *Writer) singleLimit() int {
	ep, size := w.session.ep, singleSize
	if ep.kept.Load() > ep.budget-ep.budget/4 {
		size = coalesceSize
	}
	return max(1, min(size, w.packetLimit())-PacketHeaderSize-FrameHeaderSize)
}

// appendLocked appends one DATA frame. If the open packet has no room, it opens a new one. It may wait for credit. Meanwhile
// records of other goroutines may go first, unless the turn is mine.
func (w *Writer) appendLocked(p []byte, flags FrameFlags, mine bool) error {
	b, err := w.frameLocked(FrameHeaderSize+len(p), mine)
	if err != nil {
		return err
	}
	putFrameHeader(b, FrameData, flags, 0, len(p))
	copy(b[FrameHeaderSize:], p)
	return nil
}

// appendPiecesLocked cuts a record that fits no packet. It holds the turn, so that no other record comes between.
func (w *Writer) appendPiecesLocked(p []byte, flags FrameFlags) error {
	w.turn = true
	defer w.endTurnLocked()
	for more, first := FlagMore, true; len(p) > 0; first = false {
		piece := p[:min(len(p), w.singleLimit())]
		if p = p[len(piece):]; len(p) == 0 {
			more = 0
		}
		b, err := w.frameLocked(FrameHeaderSize+len(piece), true)
		if err != nil && first {
			return err
		}
		if err != nil {
			// A part of the record was sent and no other record can follow it. If the context ended, the peer gets the code
			// for that; the context's own callback may come second.
			w.mu.Unlock() // which ending a stream takes
			if w.session.recv.parent.Err() != nil {
				w.session.canceled()
			}
			w.session.requestEnd(&ending{kind: endFault, err: err, reset: CloseError{Code: CloseInternalServerErr, Text: "record cut off"}})
			w.mu.Lock()
			return err
		}
		putFrameHeader(b, FrameData, flags|more, 0, len(piece))
		copy(b[FrameHeaderSize:], piece)
		w.markLocked()
	}
	return nil
}

// markLocked tells the outbox that there is something to publish.
func (w *Writer) markLocked() {
	if !w.queued {
		w.queued = true
		w.session.mark(workPackets)
	}
}

// awaitTurnLocked waits until no other goroutine has the turn, and returns why nothing can be written, if so.
func (w *Writer) awaitTurnLocked() error {
	for {
		if w.closed.Load() || w.held.Load() {
			return ErrClosed
		}
		if err := w.failedLocked(); err != nil {
			return err
		}
		if !w.turn {
			return nil
		}
		if err := w.waitLocked(); err != nil {
			return err
		}
	}
}

// failedLocked returns the error that ended the stream, or the error of the last publish. It returns an error of a publish only
// once: the packet is kept, and the next call tries again.
func (w *Writer) failedLocked() error {
	switch {
	case w.unusable != nil:
		return w.unusable
	case w.over():
		return w.endError()
	case w.publishError != nil:
		err := w.publishError
		w.publishError = nil
		w.markLocked()
		return fmt.Errorf("stream: publish to %s: %w", w.subject, err)
	}
	return nil
}

// waitLocked waits until something changes. It releases the lock meanwhile.
func (w *Writer) waitLocked() error { return w.sleepLocked(w.announceLocked()) }

// announceLocked announces that the caller is about to sleep. A caller that checks its condition between the announcement and
// the sleep misses no change.
func (w *Writer) announceLocked() (wake <-chan struct{}) {
	if w.wake == nil {
		w.wake = make(chan struct{})
		w.waiting.Store(true)
	}
	return w.wake
}

func (w *Writer) sleepLocked(wake <-chan struct{}) error {
	w.mu.Unlock()
	defer w.mu.Lock()
	select {
	case <-wake:
		return nil
	case <-w.ctx.Done():
		return w.endError()
	}
}

// endError returns why nothing can be written after the stream or its context ended. It is the error that reads return, or
// ErrClosed after an end that is no error of this direction.
func (w *Writer) endError() error {
	s := w.session
	end, gone := s.end.Load(), s.ep.gone.Load()
	if end != nil {
		s.endContexts(end) // the goroutine that set it may not have come so far, and the error says that they have ended
	}
	switch {
	case end != nil && end.kind == endLocal:
		return end.writeError()
	case s.recv.parent.Err() != nil && gone != nil:
		return gone.writeError()
	case s.recv.parent.Err() != nil:
		return contextError(s.recv.parent)
	case end != nil:
		return end.writeError()
	}
	return (&ending{err: context.Cause(w.ctx)}).writeError()
}

// over reports whether the stream or its context ended. The context that the user gave ends first; those below it follow.
func (w *Writer) over() bool {
	return w.session.end.Load() != nil || w.session.recv.parent.Err() != nil || w.ctx.Err() != nil
}

// shut makes Write take its slow path, which sees that the stream has ended.
func (w *Writer) shut() {
	w.mu.Lock()
	w.fast = nil
	w.mu.Unlock()
}

func (w *Writer) wakeLocked() {
	if w.wake != nil {
		close(w.wake)
		w.wake = nil
		w.waiting.Store(false)
	}
}

func (w *Writer) endTurnLocked() {
	w.turn = false
	w.resetFastLocked()
	if w.open != nil && w.n > PacketHeaderSize {
		w.markLocked()
	}
	w.wakeLocked()
}

// WriteObject sends v as one record in the codec that the consumer requested, JSON or MessagePack. It returns the length of the
// encoding. It blocks and fails as [Writer.Write] does. An error of the encoder does not change the stream, and matches
// neither [ErrClosed] nor a [*CloseError]. WriteObject does not recover panics of methods of v. Methods that encode v must not
// write to the same Writer.
//
// Names, embedding and omission follow the json tags for both codecs, as encoding/json has them. A msgpack tag stands in for
// the json tag. MessagePack knows no ",string": it carries the number. It takes a value's form from the first of its
// methods EncodeMsgpack, MarshalMsgpack, MarshalBinary and MarshalText, and ignores MarshalJSON.
//
// These are errors: a value that is nested deeper than 10,000 levels or contains itself, a Protocol Buffers message (send the
// bytes of proto.Marshal with Write), and, for MessagePack, a struct without exported fields that only encodes itself as JSON.
func (w *Writer) WriteObject(v any) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.awaitTurnLocked(); err != nil {
		return 0, err
	}
	if w.json {
		return w.writeObjectJSONLocked(v)
	}
	return w.writeObjectLocked(v)
}

// ReadFrom sends the bytes of r until [io.EOF]: the bytes of each read are one record. It returns the number of bytes sent.
// Errors: those of r and of [Writer.Write]; [io.ErrNoProgress] if 100 reads in a row return no bytes and no error; an error for
// a Reader that returns a count outside its buffer.
//
// With ReadFrom, io.Copy(w, r) reads straight into buffers of the packet size. If r has a WriteTo method, as a bytes.Reader has,
// io.Copy calls that instead, and it may write all bytes as one record. Call ReadFrom directly for such an r.
func (w *Writer) ReadFrom(r io.Reader) (n int64, err error) {
	p := getPacket(coalesceSize)
	defer putPacket(p)
	buf := p.buf[:min(coalesceSize, w.recordLimit())]
	clear(buf) // a Reader that counts more than it read must not send what others wrote
	for empty := 0; ; {
		m, err := r.Read(buf)
		switch {
		case m < 0 || m > len(buf):
			return n, fmt.Errorf("stream: invalid read result: %T returned %d for a buffer of %d bytes: mend that Reader", r, m, len(buf))
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

// maxEmptyReads is how many reads in a row may return nothing and no error, as in package bufio.
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

// recordLimit is the size of a chunk of ReadFrom: one that fills a packet.
func (w *Writer) recordLimit() int {
	switch {
	case w.unusable != nil:
		return minWindow
	case w.json:
		return min(fallbackRecord(int(w.session.ep.maxPayload.Load())), w.session.ep.maxRecord)
	}
	return min(w.coalesceLimit()-PacketHeaderSize-FrameHeaderSize, w.session.ep.maxRecord)
}

// Flush returns when NATS has accepted all records written so far, or when the writer's context ends. After [Writer.Close] in a
// handler, it also waits until NATS has accepted the end of the stream. It returns the error that ended the stream, if any.
func (w *Writer) Flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.turn {
		if err := w.waitLocked(); err != nil {
			return err
		}
	}
	w.publishHeldLocked()
	return w.flushLocked()
}

// Sync returns nil when the peer's end has acknowledged all records written so far. Acknowledged records have been received,
// but perhaps not been read. After Close, Sync also waits for the acknowledgement of the end of the stream. Errors: the error
// of ctx if it ends first; the error that ended the stream. Records may have been received in spite of an error, because the
// last acknowledgement may have been lost. A peer that speaks only the JSON fallback acknowledges nothing: Sync is
// [Writer.Flush] then.
func (w *Writer) Sync(ctx context.Context) error {
	if ctx == nil {
		return noContext("Sync")
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.unusable != nil {
		return w.unusable
	}
	for w.turn {
		if err := w.sleepSyncLocked(ctx, w.announceLocked()); err != nil {
			return err
		}
	}
	w.publishHeldLocked()
	if w.open != nil && w.n > PacketHeaderSize {
		w.sealLocked()
	}
	s, target, asked := w.session, w.sealed-w.shifted, false
	for {
		wake := w.announceLocked()
		if int32(w.acked-w.shifted-target) >= 0 {
			return nil
		}
		if s.end.Load() != nil {
			return w.endError()
		}
		if w.publishError != nil {
			return w.failedLocked()
		}
		w.markLocked()
		if !asked && !w.json && w.publishedLocked(target) {
			asked = true
			s.mark(workProbe)
		}
		if err := w.sleepSyncLocked(ctx, wake); err != nil {
			return err
		}
	}
}

// sleepSyncLocked is sleepLocked for Sync, which waits on when the writer's own context ended because all was published.
func (w *Writer) sleepSyncLocked(ctx context.Context, wake <-chan struct{}) error {
	over := w.ctx.Done()
	if w.closed.Load() && context.Cause(w.ctx) == ErrClosed {
		over = nil
	}
	w.mu.Unlock()
	defer w.mu.Lock()
	select {
	case <-wake:
	case <-ctx.Done():
		return contextError(ctx)
	case <-over:
		if context.Cause(w.ctx) != ErrClosed { // with ErrClosed the last packet was published just now
			return w.endError()
		}
	}
	return nil
}

// flushLocked seals the open packet and waits until the outbox has published it.
func (w *Writer) flushLocked() error {
	if !w.closed.Load() { // after CLOSE the end may be the normal one
		if err := w.failedLocked(); err != nil {
			return err // also for records that the end threw away
		}
	}
	if w.open != nil && w.n > PacketHeaderSize {
		w.sealLocked()
	}
	target := w.sealed - w.shifted
	for {
		wake := w.announceLocked()
		if w.publishedLocked(target) {
			return nil
		}
		if err := w.failedLocked(); err != nil {
			return err
		}
		w.markLocked()
		if err := w.sleepLocked(wake); err != nil && !w.publishedLocked(target) {
			return err
		}
	}
}

// publishedLocked reports whether all packets are published that were sealed when sealed-shifted was target. Packets that were
// cut since then shift the number. The shift may be too large: then the caller only waits for some later packets as well.
func (w *Writer) publishedLocked(target uint32) bool {
	return int32(w.published.Load()-w.shifted-target) >= 0
}

// Close ends the stream normally: the consumer reads [io.EOF] after the last record. Close returns when NATS has accepted all
// records and the end. Unacknowledged packets are retransmitted for ResumeTimeout, unless the client is closed. [Writer.Sync]
// waits for the acknowledgement. A second Close does nothing. A Close that failed can be repeated.
//
// In a [Handler], Close returns at once, because the handler may still fail. If the handler returns an error or panics, that
// ends the stream, so "defer w.Close()" hides no failure. CLOSE is published when the handler returns. If the handler goes on,
// CLOSE is published earlier: when it waits for a record of its [Request], when it calls [Writer.Flush] or [Writer.Sync], and
// at the latest after 150 ms. The handler may go on reading until it returns.
func (w *Writer) Close() error { return w.CloseWithCode(CloseNormalClosure) }

// CloseWithCode ends the stream with a code and a reason. After the last record, the consumer reads [io.EOF] for
// [CloseNormalClosure] and a [*CloseError] for any other code. In a handler, any other code is published at once, and the result
// of the handler does not change it. The code must be from 1000 to 5999. Otherwise CloseWithCode fails with [ErrCloseCode] and
// the writer stays usable. The reason is cut to [MaxReason] bytes. CloseWithCode returns as [Writer.Close] does.
func (w *Writer) CloseWithCode(code int, text ...string) error {
	reason, err := closeReason(code, text)
	if err != nil {
		return err
	}
	held, err := w.closeNow(code, reason)
	if held || err != nil {
		return err
	}
	<-w.ctx.Done() // the outbox ends it once the last packet is out
	return nil
}

// closeNow writes CLOSE, if that was not done, and waits until it is published. It reports whether CLOSE is held back for the
// result of a handler instead.
func (w *Writer) closeNow(code int, reason string) (held bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.held.Load() {
		return true, nil
	}
	if !w.closed.Load() {
		if err := w.awaitTurnLocked(); err != nil {
			return false, err
		}
		if w.session.server != nil && code == CloseNormalClosure {
			w.closing = CloseError{code, reason}
			w.held.Store(true)
			w.fast = nil
			w.wakeLocked()
			w.session.markLater(workClose)
			return true, nil
		}
		if err := w.appendCloseLocked(code, reason); err != nil {
			return false, err
		}
	}
	return false, w.flushLocked()
}

// closeDelay is how long CLOSE is held back for a handler that closed and has not returned. It is far longer than the return
// of a handler takes, and short for a consumer that waits for the end.
const closeDelay = 50 * time.Millisecond

// publishHeld publishes a CLOSE that was held back, because the handler goes on.
func (w *Writer) publishHeld() {
	if w.held.Load() {
		w.mu.Lock()
		w.publishHeldLocked()
		w.mu.Unlock()
	}
}

func (w *Writer) publishHeldLocked() {
	if !w.held.Load() || w.over() {
		return
	}
	w.held.Store(false)
	w.half = !w.json
	if w.appendCloseLocked(w.closing.Code, w.closing.Text) == nil {
		w.markLocked()
	}
}

// closeReturned closes w for a handler that returned with end. It does not wait until CLOSE is published. It returns how w was
// closed, and false if the stream ended before.
func (w *Writer) closeReturned(end CloseError) (closed CloseError, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.held.Load() {
		w.held.Store(false)
		if end.Code == CloseNormalClosure {
			end = w.closing // it may have a reason
		}
	}
	for !w.closed.Load() {
		err := w.awaitTurnLocked()
		if err == nil {
			err = w.appendCloseLocked(end.Code, cutReason(end.Text, MaxReason))
			w.markLocked()
		}
		if err != nil && w.over() {
			return CloseError{}, false
		}
	}
	return w.closing, true
}

// closeToLeave closes w for a consumer that leaves. It does not wait. It reports false if not all records before can be sent:
// the stream has ended, the producer is not known yet, or another goroutine is in the middle of a record.
func (w *Writer) closeToLeave(reason string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.turn || w.subject == "" || w.session.end.Load() != nil || w.ctx.Err() != nil && !w.closed.Load():
		return false
	case w.closed.Load():
		w.closing.Text = reason // for the RESET
		w.session.mark(workProbe)
		return true
	}
	w.soon = true
	if w.appendCloseLocked(CloseNormalClosure, reason) != nil {
		return false
	}
	w.markLocked()
	w.wakeLocked()
	return true
}
