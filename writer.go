package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/ring"
)

// Writer is the producer's end of a stream: records go in, and leave in packets that the outbox publishes. It is safe
// for use by many goroutines at once; records of one goroutine keep their order.
//
// A record that is written while the stream is idle leaves at once. While the outbox is busy, records gather in the
// open packet and share a NATS message. No timer is involved.
//
// A Writer must be closed, by Close or CloseWithCode, or its consumer waits for ever.
type Writer struct {
	session session
	subject string // of the consumer: the reply subject of its request
	json    bool   // the consumer speaks only the fallback
	codec   FrameFlags
	bad     error // why this writer can never write: what NewWriter could not return

	ctx    context.Context
	cancel context.CancelCauseFunc

	mu sync.Mutex
	// The open packet and how much of it is written. room is the part of its buffer that Write may fill, and empty
	// whenever Write must take the slow path: no open packet, a writer has the turn, closed, ended.
	n    int
	room []byte
	open *packet
	size int // of the packet sealed last

	object int // size of the object encoded last, at most an eighth of a packet

	encoding bool          // the turn's owner encodes into the rest of the open packet, without the lock
	turn     bool          // one goroutine is writing something that takes several steps: others wait
	closed   bool          // CLOSE was written: no records after it
	fault    error         // the last publish failed; its packet is kept and published again by the next call
	queued   bool          // the session is marked: the outbox will look for packets
	wake     chan struct{} // closed when any of the above, or the credit, changes; nil while nobody waits

	sealed      uint32   // sequence number of the open packet, or of the next to be opened
	sealedBytes uint64   // of all packets before it
	acked       credited // what the consumer acknowledged
	granted     credited // what it granted

	// Packets pass from the writers, who push them with the lock held, to the outbox, which takes no lock as long as
	// there is one. The outbox keeps them until they are acknowledged, and nobody else looks at sent.
	ready     ring.Ring[*packet]
	sent      sentPackets
	published atomic.Uint32 // sent.next, for Flush
	waiting   atomic.Bool   // wake is not nil
}

// NewWriter returns the producer's end of the stream whose request carried subject as its reply. It neither blocks nor
// sends, and may be called in a NATS callback. client may be the one that opened the stream.
func NewWriter(client *Client, subject string) *Writer { return client.NewWriter(subject) }

// NewWriter is the function NewWriter.
func (c *Client) NewWriter(subject string) *Writer {
	w := &Writer{subject: subject}
	if c == nil || c.ep == nil {
		w.bad = nats.ErrInvalidConnection
		w.ctx, w.cancel = context.WithCancelCause(context.Background())
		w.cancel(w.bad)
		return w
	}
	w.ctx, w.cancel = context.WithCancelCause(c.ep.ctx)
	s := &w.session
	s.ep, s.writer, s.peer, s.sender = c.ep, w, subject, newSender()
	s.bucket.init(initialPackets, unknownWindow)
	w.ready.Init(maxUnacked + 1) // one more for the packet that only closes
	switch t, err := ParseToken(lastToken(subject)); {
	case subject == "":
		w.bad = fmt.Errorf("stream: the request has no reply subject, so nobody waits for a stream: %w", nats.ErrBadSubject)
	case err == nil:
		w.codec = codecFlag(t.Codec)
		w.granted = credited{1 << t.LogPackets, 1 << t.LogBytes}
	case errors.Is(err, ErrVersion):
		w.bad = fmt.Errorf("stream: cannot write to %s: %w", subject, err)
	default:
		w.json = true
		w.codec = FlagJSON
		w.granted = credited{fallbackQueue, fallbackQueueBytes}
	}
	return w
}

// unknownWindow is what a sender may use where it cannot see what its peer offered, together with initialPackets.
const unknownWindow = 64 << 10

// A fallback peer grants nothing, so the credit toward it is this end's own bound on what waits to be published.
const (
	fallbackQueue      = maxPackets
	fallbackQueueBytes = 4 << 20
)

// Context ends when the stream does: when the consumer said that it left, this client's connection was lost for good,
// or the writer was closed. context.Cause tells why. A consumer that dies without a word is not noticed yet: bound the
// wait for it from outside, or close the client.
func (w *Writer) Context() context.Context { return w.ctx }

// Write sends p as one record. It returns len(p) once p was copied: p may be reused at once. It blocks while the
// consumer's credit is used up and returns when the writer's context ends. After Close it returns ErrClosed.
func (w *Writer) Write(p []byte) (int, error) { return w.write(p, FlagRaw) }

func (w *Writer) write(p []byte, flags FrameFlags) (int, error) {
	w.mu.Lock()
	n, room := w.n, w.room
	end := n + FrameHeaderSize + len(p)
	if end > len(room) {
		return w.writeSlow(p, flags)
	}
	b := room[n:end]
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

// writeSlow is write where the open packet has no room. It is called with the lock held and releases it.
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

// singleLimit is the largest payload that travels in one frame. It follows the server's max_payload.
func (w *Writer) singleLimit() int {
	return max(1, min(singleSize, int(w.session.ep.maxPayload.Load()))-PacketHeaderSize-FrameHeaderSize)
}

// appendLocked appends one DATA frame, opening a packet where the open one has no room. It may wait for credit, and
// other goroutines' records may go first while it does, unless the turn is mine.
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
			// Half a record was sent and cannot be taken back, nor can another one follow it.
			w.session.finish(&ending{err: err, tell: CloseError{Code: CloseInternalServerErr, Text: "record cut off"}})
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
		if w.closed {
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

// failedLocked returns what ended the stream, or what the last publish failed with. The latter is said once: the
// packet is kept, and the next call tries again.
func (w *Writer) failedLocked() error {
	switch {
	case w.bad != nil:
		return w.bad
	case w.ctx.Err() != nil:
		return context.Cause(w.ctx)
	case w.fault != nil:
		err := w.fault
		w.fault = nil
		w.markLocked()
		return fmt.Errorf("stream: publish to %s: %w", w.subject, err)
	}
	return nil
}

// waitLocked waits until something changes. It gives the lock up meanwhile.
func (w *Writer) waitLocked() error { return w.sleepLocked(w.announceLocked()) }

// announceLocked says that the caller is about to sleep. What it looks at between announcing and sleeping, it does not
// miss.
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
		return context.Cause(w.ctx)
	}
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
	w.roomLocked()
	if w.open != nil && w.n > PacketHeaderSize {
		w.markLocked()
	}
	w.wakeLocked()
}

// WriteObject sends v as one record, encoded as the consumer asked: JSON or MessagePack. It returns the length of the
// encoding. It blocks and fails as Write does; an error of the encoder leaves the stream as it was. Methods of v that
// encode it must not write to the same Writer.
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

// ReadFrom sends what r yields, each read as one record, until io.EOF. It makes io.Copy(w, r) read straight into
// buffers of the packet size. It returns the bytes sent.
func (w *Writer) ReadFrom(r io.Reader) (n int64, err error) {
	p := getPacket(coalesceSize)
	defer putPacket(p)
	buf := p.buf[:min(coalesceSize, w.recordLimit())]
	for {
		m, err := r.Read(buf)
		if m > 0 {
			m, werr := w.Write(buf[:m])
			n += int64(m)
			if werr != nil {
				return n, werr
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

// recordLimit is the size of a chunk of ReadFrom: one that fills a packet.
func (w *Writer) recordLimit() int {
	switch {
	case w.bad != nil:
		return minWindow
	case w.json:
		return min(fallbackRecord(int(w.session.ep.maxPayload.Load())), w.session.ep.maxRecord)
	}
	return min(w.coalesceLimit()-PacketHeaderSize-FrameHeaderSize, w.session.ep.maxRecord)
}

// Flush hands everything written so far to NATS and returns when that is done, or when the writer's context ends.
func (w *Writer) Flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.turn {
		if err := w.waitLocked(); err != nil {
			return err
		}
	}
	return w.flushLocked()
}

// flushLocked seals the open packet and waits until the outbox has published it.
func (w *Writer) flushLocked() error {
	if !w.closed { // else the end may be that of the stream itself
		if err := w.failedLocked(); err != nil {
			return err // also for records that the end threw away
		}
	}
	if w.open != nil && w.n > PacketHeaderSize {
		w.sealLocked()
	}
	target := w.sealed
	for {
		wake := w.announceLocked()
		if int32(w.published.Load()-target) >= 0 {
			return nil
		}
		if err := w.failedLocked(); err != nil {
			return err
		}
		w.markLocked()
		if err := w.sleepLocked(wake); err != nil && int32(w.published.Load()-target) < 0 {
			return err
		}
	}
}

// Close ends the stream: the reader sees io.EOF after the last record. It returns when everything was handed to NATS.
// Closing again does nothing; a Close that failed can be tried again.
func (w *Writer) Close() error { return w.CloseWithCode(CloseNormalClosure) }

// CloseWithCode ends the stream with a code and a reason: the reader sees io.EOF for CloseNormalClosure and a
// *CloseError for any other, after the last record. The code is one from 1000 to 5999, else it fails with ErrCloseCode
// and the writer goes on. The reason is cut to MaxReason bytes. It returns as Close does.
func (w *Writer) CloseWithCode(code int, text ...string) error {
	reason, err := closeReason(code, text)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.closed {
		if err := w.awaitTurnLocked(); err != nil {
			return err
		}
		if err := w.appendCloseLocked(code, reason); err != nil {
			return err
		}
	}
	return w.flushLocked()
}

// appendCloseLocked writes the last frame. It needs no credit: one packet beyond it is reserved for it.
func (w *Writer) appendCloseLocked(code int, reason string) error {
	if w.json {
		return w.appendCloseJSONLocked(code, reason)
	}
	reason = cutReason(reason, w.session.ep.reasonLimit())
	n := FrameHeaderSize + len(reason)
	if w.open != nil && w.n+n > w.coalesceLimit() {
		w.sealLocked()
	}
	if w.open == nil {
		w.openLocked(PacketHeaderSize + n)
	}
	if w.n+n > len(w.open.buf) {
		w.growLocked(w.n + n)
	}
	b := w.open.buf[w.n : w.n+n]
	putFrameHeader(b, FrameClose, 0, uint16(code), len(reason))
	copy(b[FrameHeaderSize:], reason)
	w.n += n
	w.closed = true
	w.room = nil
	return nil
}
