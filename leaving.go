package stream

import (
	"context"
	"io"
	"sync"

	"github.com/natsstream/stream/internal/lifecycle"
)

// This file ends a stream for its user, by a call or by the end of a context. Any goroutine may run it, but the mux
// runs only dropLate. If the context given to Open ends, a goroutine of its own runs watch.run. The file touches
// atomics. dropUnwanted also empties the ring of the bucket while no read is under way, and then owns the reader's side
// of it.

// leaving returns the code of the RESET when the user of this end leaves.
func (s *session) leaving() int {
	if s.role == lifecycle.Consumer && s.readDone() && s.send.Load() == nil {
		return CloseNormalClosure // everything was read, and nothing was written
	}
	return CloseCanceled
}

// detachIfDone detaches a consumer that has read everything and closed its own direction. It sends no RESET:
// unacknowledged packets are still repaired. It reports false if the consumer has not done both. If it reports true,
// the caller calls release.
func (s *session) detachIfDone() bool {
	snd := s.send.Load()
	if s.role != lifecycle.Consumer || !s.readDone() || snd == nil || !snd.packer.closed.Load() {
		return false
	}
	s.recv.readLock.Or(gateUnread)
	s.mark(workPackets) // the last publish may have failed, and no writer will try again
	return true
}

// detach detaches a consumer before the producer's end was read. It closes the consumer's direction, unless that was
// done. Unacknowledged packets are still repaired. When all are acknowledged, the outbox sends a RESET with the code of
// CLOSE, because the producer may still be sending. detach reports false if not all written records can be sent.
func (s *session) detach(reason string) bool {
	snd := s.send.Load()
	if snd == nil || !snd.packer.closeToLeave(reason) {
		return false
	}
	if s.detachIfDone() {
		s.release(&ending{err: ErrClosed})
		return true
	}
	s.recv.readLock.Or(gateUnread)
	s.leave()
	s.endContext(ErrClosed)
	s.mark(workPackets | workSettle)
	return true
}

// leave records that the user of this end reads no more.
func (s *session) leave() {
	s.recv.readLock.Or(gateLeft)
	s.bucket.park.Wake()
	if s.end.Load() != nil { // otherwise more packets may come, and the end drops all
		s.dropUnwanted()
	}
}

// unwanted reports whether no read returns another record.
func (s *session) unwanted() bool {
	e := s.end.Load()
	return e != nil && e.kind == endLocal || s.recv.readLock.Load()&gateLeft != 0
}

// dropUnwanted drops the packets that wait for the reader, if no read returns another record: the application may refer
// to the stream for long. If a read is under way, unlockRead drops them. A read that begins later pops no packet,
// because it looks first whether any is wanted. Any goroutine may call dropUnwanted.
func (s *session) dropUnwanted() {
	for s.unwanted() {
		old := s.recv.readLock.Load()
		if old&(gateReading|gateDropping) != 0 {
			return
		}
		if s.recv.readLock.CompareAndSwap(old, old|gateDropping) {
			for ok := true; ok; {
				var unread arrival
				unread, ok = s.bucket.ring.Pop()
				unread.lent.Release()
			}
			if x := s.extras.Load(); x != nil {
				s.dropPartial(x)
			}
			s.recv.readLock.And(^gateDropping)
			if s.bucket.ring.Empty() { // otherwise a packet came between Pop and the line above, and its dropUnwanted saw gateDropping
				return
			}
		}
	}
}

// dropLate drops the packet that was pushed just now if the stream has ended meanwhile. The end stores end before it
// drops packets, and the mux calls dropLate after the push. So one of the two sees the packet.
func (s *session) dropLate() {
	if s.end.Load() != nil {
		s.dropUnwanted()
	}
}

// canceled ends the stream because its parent context ended.
func (s *session) canceled() {
	if s.detachIfDone() {
		s.release(&ending{err: contextError(s.recv.parent)})
		return
	}
	if s.role == lifecycle.Consumer && s.nobodyReads() {
		return // the user left before, and the outbox ends the rest
	}
	e := &ending{kind: endLocal, err: contextError(s.recv.parent), reset: CloseError{Code: s.leaving()}}
	if s.recv.parent.Err() == context.DeadlineExceeded {
		e.reset.Code = CloseDeadlineExceeded
	}
	if gone := s.ep.gone.Load(); gone != nil { // the parent of handlers' contexts ends with the endpoint
		e = gone
	}
	s.endLocally(e)
}

// endLocally ends the stream and releases it at once.
func (s *session) endLocally(e *ending) {
	s.requestEnd(e)
	s.release(e)
}

// release gives the window back to the budget and, at the consumer's end, ends the stream's context, once.
func (s *session) release(e *ending) {
	s.releaseWindow()
	if s.role == lifecycle.Consumer {
		cause := e.err
		if e.kind == endPeerDone && s.readDone() {
			cause = io.EOF // the CLOSE that was read counts, not the RESET after it
		}
		s.endContext(cause)
	}
}

// endContext ends the context of a Stream, once.
func (s *session) endContext(cause error) {
	if !s.ctx.end(cause) {
		return
	}
	s.finished()
	if w := s.watch.Load(); w != nil {
		w.takeBack()
	}
}

// watch ends a stream when the context given to Open ends, in a goroutine of its own.
type watch struct {
	session *session
	stop    func() bool
	pending sync.Mutex // held until run has started or was taken back
}

func (w *watch) run() {
	w.pending.Unlock() // first: later calls use the context, which may run code of the user
	if !w.session.ctx.ended() {
		w.session.canceled()
	}
}

// takeBack keeps the goroutine from starting, or waits until it has started. Without the wait, a loop that opens,
// cancels and closes streams would start goroutines faster than they run.
func (w *watch) takeBack() {
	if !w.stop() {
		w.pending.Lock()
	}
	w.pending.Unlock()
}
