package stream

import (
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// This file has the deadlines of reads and writes. Any goroutine sets one, and any may run late. When its time has
// come, a goroutine of package time runs expire. The outbox runs endDeadlines. deadline.mu is held while deadlinePassed
// locks the packer.

// deadlineError is the error of a call after its deadline. It implements net.Error.
type deadlineError struct{ text string }

func (e *deadlineError) Error() string        { return e.text }
func (e *deadlineError) Timeout() bool        { return true }
func (e *deadlineError) Temporary() bool      { return true }
func (e *deadlineError) Is(target error) bool { return target == os.ErrDeadlineExceeded }

var (
	errReadDeadline  error = &deadlineError{"stream: read deadline exceeded: to read on, set a later one, or the zero time for none"}
	errWriteDeadline error = &deadlineError{"stream: write deadline exceeded, and nothing was sent: to write on, set a later one, or the zero time for none"}
	errFlushDeadline error = &deadlineError{"stream: write deadline exceeded before NATS has accepted all records: they are sent later; Flush again, with a later deadline"}
	// errRestFollows is the error of a write that returns the length of its record.
	errRestFollows error = &deadlineError{"stream: write deadline exceeded within a record: do not repeat it, because its rest is sent as the peer grants credit"}
)

// deadline is the time after which the reads or the writes of a session fail. It has a timer only while the time is in
// the future, and the outbox stops that at the end of the stream.
type deadline struct {
	session *session
	write   bool
	late    atomic.Bool // the time has come; stored with the lock held

	mu    sync.Mutex
	at    time.Time
	timer *time.Timer // nil until a time in the future was set
	over  bool        // the stream has ended: no call waits
}

// set is SetReadDeadline or SetWriteDeadline. It returns an error if the user of this end has left.
func (d *deadline) set(at time.Time) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.session.leftError(); err != nil {
		return err
	}
	if d.timer != nil {
		d.timer.Stop()
	}
	d.at = at
	d.lookLocked()
	return nil
}

// lookLocked compares the deadline with the time, wakes the calls for which it has come, and sets the timer if it has
// not.
func (d *deadline) lookLocked() {
	left := time.Until(d.at)
	d.applyLocked(!d.at.IsZero() && left <= 0)
	switch {
	case d.at.IsZero() || left <= 0 || d.over:
	case d.timer == nil:
		d.timer = time.AfterFunc(left, d.expire)
	default:
		d.timer.Reset(left)
	}
}

// expire looks again when the timer fires. The deadline may have changed meanwhile, and so may the clock.
func (d *deadline) expire() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.at.IsZero() {
		d.lookLocked()
	}
}

// applyLocked makes reads or writes take their slow paths, which look at the deadline, while it has passed.
func (d *deadline) applyLocked(late bool) {
	s := d.session
	if was := d.late.Swap(late); !was && !late {
		return // no call needs to notice: a program may set a new deadline before each call
	}
	switch {
	case d.write:
		// send stores the send half before it loads late. So either it finds late, or the send half is found here.
		if snd := s.send.Load(); snd != nil {
			snd.packer.deadlinePassed()
		}
	case late:
		s.recv.readLock.Or(gateLate)
		s.bucket.park.Wake()
	default:
		s.recv.readLock.And(^gateLate)
	}
}

// stop stops the timer for good, because the stream has ended.
func (d *deadline) stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.over = true
	if d.timer != nil {
		d.timer.Stop()
	}
}

// endDeadlines stops the timers of s, which has ended. A record that is kept between two reads gives its bytes back to
// the budget.
func (s *session) endDeadlines() {
	x := s.extras.Load()
	if x == nil {
		return
	}
	x.read.stop()
	x.write.stop()
	if x.partial.Load() != nil {
		s.recordDone()
	}
}

// leftError returns the error of SetReadDeadline and SetWriteDeadline after the user of this end has left, nil before.
func (s *session) leftError() error {
	switch e := s.end.Load(); {
	case s.recv.readLock.Load()&gateLeft != 0:
		return ErrClosed
	case e != nil && e.kind == endLocal:
		return e.writeError()
	}
	return nil
}

// setDeadlines sets the deadline of reads, of writes, or both.
func (s *session) setDeadlines(at time.Time, read, write bool) (err error) {
	x := s.extra()
	if read {
		err = x.read.set(at)
	}
	if write && err == nil {
		err = x.write.set(at)
	}
	return err
}

// deadlinePassed makes writers look at their deadline, because it has passed or was changed.
func (pk *packer) deadlinePassed() {
	pk.mu.Lock()
	defer pk.mu.Unlock()
	pk.resetFastLocked()
	pk.wakeLocked()
}

// late reports whether the deadline of writes has passed.
func (s *session) late() bool {
	x := s.extras.Load()
	return x != nil && x.write.late.Load()
}
