package stream

import (
	"cmp"
	"time"
)

// This file has the deadline of writes, and writes that do not wait. Writers run it. TryWrite takes the lock of the
// packer. Any goroutine may set the deadline.

// SetWriteDeadline sets the time after which writes fail instead of waiting. It applies to Write, WriteObject,
// WriteAppend, ReadFrom, Flush, SetHeader and SetTrailer, also to calls that wait now. Their error matches
// [os.ErrDeadlineExceeded] and is a [net.Error] with Timeout. The stream goes on: after a later deadline, or the zero
// time for none, writes succeed again. A time in the past ends waiting calls at once. The library sends all of a
// record, or nothing of it:
//
//   - If nothing of the record is sent, the write returns 0 and the error.
//   - If the deadline passes when a part of a record larger than a packet was sent, the write returns the length of the
//     record and the error. Its rest is sent as credit arrives. Meanwhile other writes wait for their turn. Do not
//     repeat such a write.
//
// The deadline does not apply to [Writer.Close], [Writer.CloseWithCode], [Writer.Sync] and [Writer.TryWrite].
// SetWriteDeadline fails with [ErrClosed] or the error of the stream if this end has ended it. It may be called at any
// time, by any goroutine. A stream that never had a deadline pays nothing for it.
func (w *Writer) SetWriteDeadline(t time.Time) error {
	if w.unusable != nil {
		return w.unusable
	}
	return w.session.setDeadlines(t, false, true)
}

// TryWrite sends p as one record if it need not wait, and reports whether it did. If it would have to wait, it sends
// nothing of p, and returns false and no error. It would have to wait if the peer's credit is used up, if the
// producer's first packet has not arrived, or if a large record or an object is half written: by another goroutine, or
// after an earlier call. A record larger than a packet needs credit for its first packet only. TryWrite copies the
// rest, which is sent as credit arrives. p may be reused at once. The write deadline does not apply.
//
// Errors are those of [Writer.Write].
func (w *Writer) TryWrite(p []byte) (sent bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.failedLocked(); err != nil || w.closed.Load() || w.held.Load() {
		return false, cmp.Or(err, ErrClosed)
	}
	if err := w.checkSize(len(p)); err != nil {
		return false, err
	}
	switch {
	case w.turn:
		return false, nil
	case w.session.peerTakesJSON():
		if err := w.fitsJSON(len(p)); err != nil || !w.creditLocked() {
			return false, err
		}
		w.putJSONLocked(p)
		return true, nil
	case len(p) > w.singleLimit():
		return w.tryPiecesLocked(p), nil
	}
	b := w.spaceLocked(FrameHeaderSize + len(p))
	if b == nil {
		return false, nil
	}
	w.records++
	putFrameHeader(b, FrameData, FlagRaw, 0, len(p))
	copy(b[FrameHeaderSize:], p)
	w.markLocked()
	return true, nil
}

// tryPiecesLocked appends a record in pieces as far as there is credit, and keeps the rest. It reports whether it
// began.
func (w *Writer) tryPiecesLocked(p []byte) bool {
	w.turn = true
	rest := w.appendSomeLocked(p, FlagRaw)
	if 0 < len(rest) && len(rest) < len(p) {
		w.keepRestLocked(rest, FlagRaw)
		return true
	}
	w.endTurnLocked()
	return len(rest) == 0
}
