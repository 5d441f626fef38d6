package stream

import (
	"time"

	"github.com/natsstream/stream/internal/lifecycle"
)

// This file ends the direction of a Writer: it writes CLOSE, or holds it back for the result of a handler. Writers run
// it, and the goroutine of a handler that returned. They take the lock of the packer.

// Close ends the stream normally: the consumer reads [io.EOF] after the last record. Close returns when NATS has
// accepted all records and the end. Unacknowledged packets are retransmitted for ResumeTimeout, unless the client is
// closed. [Writer.Sync] waits for the acknowledgement. A second Close does nothing. A Close that failed can be
// repeated.
//
// In a [Handler], Close returns at once, because the handler may still fail. If the handler returns an error or panics,
// that ends the stream, so "defer w.Close()" hides no failure. CLOSE is published when the handler returns. If the
// handler goes on, CLOSE is published earlier: when it waits for a record of its [Request], when it calls
// [Writer.Flush] or [Writer.Sync], and at the latest after 150 ms. The handler may go on reading until it returns.
func (w *Writer) Close() error { return w.CloseWithCode(CloseNormalClosure) }

// CloseWithCode ends the stream with a code and a reason. After the last record, the consumer reads [io.EOF] for
// [CloseNormalClosure] and a [*CloseError] for any other code. In a handler, any other code is published at once, and
// the result of the handler does not change it. The code must be from 1000 to 5999. Otherwise CloseWithCode fails with
// [ErrCloseCode] and the writer stays usable. The reason is cut to [MaxReason] bytes. CloseWithCode returns as
// [Writer.Close] does.
func (w *Writer) CloseWithCode(code int, text ...string) error {
	reason, err := closeReason(code, text)
	if err != nil {
		return err
	}
	held, err := w.closeNow(code, reason)
	if held || err != nil {
		return err
	}
	if w.canceled() == nil {
		<-w.context().Done() // the outbox ends it once the last packet is out
	}
	return nil
}

// closeNow writes CLOSE, if that was not done, and waits until it is published. It reports whether CLOSE is held back
// for the result of a handler instead.
func (w *Writer) closeNow(code int, reason string) (held bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.held.Load() {
		return true, nil
	}
	if !w.closed.Load() {
		if err := w.awaitTurnLocked(false); err != nil {
			return false, err
		}
		if w.session.role == lifecycle.Handler && code == CloseNormalClosure {
			w.closing = CloseError{code, reason}
			w.held.Store(true)
			w.fast = nil
			w.wakeLocked()
			w.session.markLater(workClose)
			return true, nil
		}
		w.appendCloseLocked(code, reason)
	}
	return false, w.flushLocked(false)
}

// closeReturned closes w for a handler that returned with end. It does not wait until CLOSE is published. It returns
// the code and text of CLOSE, and false if the stream ended before.
func (w *Writer) closeReturned(end CloseError) (closed CloseError, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.held.Load() {
		w.held.Store(false)
		if end.Code == CloseNormalClosure {
			end = w.closing // the user's Close may have a reason
		}
	}
	for !w.closed.Load() {
		err := w.awaitTurnLocked(false)
		if err == nil {
			w.appendCloseLocked(end.Code, cutReason(end.Text, MaxReason))
			w.markLocked()
		} else if w.over() {
			return CloseError{}, false
		}
	}
	return w.closing, true
}

// closeDelay is how long CLOSE is held back for a handler that closed and has not returned. It is far longer than the
// return of a handler takes, and short for a consumer that waits for the end.
const closeDelay = 50 * time.Millisecond
