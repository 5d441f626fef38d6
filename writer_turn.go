package stream

import "fmt"

// This file has the turn of writers, their waits, and the error of writes after the end of the stream. Writers run it
// with the lock of the packer.

// awaitTurnLocked waits until no other goroutine has the turn. It returns an error if the stream accepts no more
// records. With timed, it also fails if the write deadline has passed.
func (w *Writer) awaitTurnLocked(timed bool) error {
	for {
		if w.closed.Load() || w.held.Load() {
			return ErrClosed
		}
		if err := w.failedLocked(); err != nil {
			return err
		}
		if timed && w.session.late() {
			return errWriteDeadline
		}
		if !w.turn {
			return nil
		}
		if err := w.waitLocked(); err != nil {
			return err
		}
	}
}

// lateLocked returns the error of a write that would have to wait, after its deadline.
func (w *Writer) lateLocked() error {
	if w.session.late() {
		return errWriteDeadline
	}
	return nil
}

// waitLocked waits until something changes. It releases the lock meanwhile.
func (w *Writer) waitLocked() error { return w.sleepLocked(w.announceLocked()) }

// announceLocked announces that the caller is about to sleep. A caller that checks its condition between the
// announcement and the sleep misses no change.
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
	case <-w.context().Done():
		return w.endError()
	}
}

// failedLocked returns the error that ended the stream, or the error of the last publish. It returns an error of a
// publish only once: the packet is kept, and the next call tries again.
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

// endError returns the error of writes after the stream or its context ended. It is the error that reads return, or
// ErrClosed after an end that is no error of this direction.
func (w *Writer) endError() error {
	s := w.session
	end, gone := s.end.Load(), s.ep.gone.Load()
	if end != nil {
		s.endContexts(end) // the goroutine that set the end may not have done so yet, and the error promises that they have ended
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
	return (&ending{err: w.canceled()}).writeError()
}
