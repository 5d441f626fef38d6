package stream

// This file has reads that continue an earlier read, which ended at its deadline or looked ahead. The reader runs it,
// and owns the fields of extras that it uses. Any goroutine may drop extras.partial, through dropUnwanted.

// nextKept returns the record that Ready has read ahead, or goes on with a record in pieces that an earlier read began.
func (s *session) nextKept(x *extras, u use) ([]byte, FrameFlags, error) {
	if s.recv.readLock.Load()&gateAhead != 0 {
		rec := x.ahead
		x.ahead = nil
		s.recv.readLock.And(^gateAhead)
		return rec, x.aheadAs, nil
	}
	return s.assemble(*x.partial.Swap(nil), u)
}

// ready implements Stream.Ready. It reads the next record ahead, because only a read can tell whether the whole record
// has arrived.
func (s *session) ready() bool {
	if s.lockRead() != nil {
		return false
	}
	defer s.unlockRead()
	if s.endedNow() != nil || len(s.rest()) != 0 || s.recv.readLock.Load()&gateAhead != 0 {
		return true
	}
	s.recv.readLock.Or(gatePeeking)
	rec, flags, err := s.nextGated(untilNext)
	s.recv.readLock.And(^gatePeeking)
	if err != nil {
		return err != errReadDeadline // every other error is that of the next read as well
	}
	x := s.extra()
	x.ahead, x.aheadAs = rec, flags
	s.recv.readLock.Or(gateAhead)
	return true
}
