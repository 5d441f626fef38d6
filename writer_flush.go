package stream

import "context"

// This file waits for written records: until NATS has accepted them (Flush), or the peer has acknowledged them (Sync).
// Writers run it with the lock of the packer, which they release while they wait.

// Flush returns when NATS has accepted all records written so far, or when the writer's context ends. After
// [Writer.Close] in a handler, it also waits until NATS has accepted the end of the stream. It returns the error that
// ended the stream, if any.
func (w *Writer) Flush() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.turn {
		if w.session.late() {
			return errFlushDeadline
		}
		if err := w.waitLocked(); err != nil {
			return err
		}
	}
	w.publishHeldLocked()
	return w.flushLocked(true)
}

// flushLocked seals the open packet and waits until the outbox has published it. With timed, it waits no longer than
// the write deadline.
func (w *Writer) flushLocked(timed bool) error {
	if !w.closed.Load() { // after CLOSE the end may be the normal one
		if err := w.failedLocked(); err != nil {
			return err // the end of the stream may have dropped records
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
		if timed && w.session.late() {
			return errFlushDeadline
		}
		if err := w.sleepLocked(wake); err != nil && !w.publishedLocked(target) {
			return err
		}
	}
}

// publishedLocked reports whether all packets are published that were sealed when sealed-shifted was target. Packets
// that were cut since then shift the number. If packets behind them were cut, the shift is too large, and the caller
// also waits for some later packets.
func (w *Writer) publishedLocked(target uint32) bool {
	return int32(w.sender.published.Load()-w.shifted-target) >= 0
}

// Sync returns nil when the peer's end has acknowledged all records written so far. Acknowledged records have been
// received, but perhaps not been read. After Close, Sync also waits for the acknowledgement of the end of the stream.
// Errors: the error of ctx if it ends first; the error that ended the stream. Records may have been received in spite
// of an error, because the last acknowledgement may have been lost. A peer that speaks only the JSON fallback
// acknowledges nothing: Sync is [Writer.Flush] then.
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
		if !asked && !w.session.peerTakesJSON() && w.publishedLocked(target) {
			asked = true
			s.mark(workProbe)
		}
		if err := w.sleepSyncLocked(ctx, wake); err != nil {
			return err
		}
	}
}

// sleepSyncLocked is sleepLocked for Sync. Sync goes on waiting if the writer's context ended because CLOSE was
// published.
func (w *Writer) sleepSyncLocked(ctx context.Context, wake <-chan struct{}) error {
	over := w.context().Done()
	if w.closed.Load() && w.canceled() == ErrClosed {
		over = nil
	}
	w.mu.Unlock()
	defer w.mu.Lock()
	select {
	case <-wake:
	case <-ctx.Done():
		return contextError(ctx)
	case <-over:
		if w.canceled() != ErrClosed { // with ErrClosed the last packet was published just now
			return w.endError()
		}
	}
	return nil
}
