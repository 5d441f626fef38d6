package stream

import (
	"cmp"
	"fmt"
	"io"
	"iter"

	"github.com/natsstream/stream/internal/poison"
)

// This file has the reads of Stream and Request. The reader runs them, and owns the fields of session.recv that they
// use, except the atomics.
//
// A read either lends its record until the next read, or gives it to the user for ever. Next, Read, WriteTo and
// RecvObject lend it, and Recv and All give it. Memory that was only lent may be used again.

// recvRecord returns the next record, for use u.
func (s *session) recvRecord(u use) ([]byte, error) {
	// This fast path takes a record at hand from the current packet. nextRecord handles all cases.
	switch r := &s.recv; {
	case poison.Enabled, r.busy, r.readLock.Load()&uint32(u) != 0, s.end.Load() != nil, r.parent.Err() != nil:
	default:
		r.busy = true
		if start := uint64(r.off) + FrameHeaderSize; start <= uint64(len(r.data)) && r.off != 0 {
			h := frameHeader(r.data[r.off:])
			if n := payloadLen(h); isPlainData(h) && n <= uint64(len(r.data))-start && n <= r.maxRecord {
				r.off = uint32(start + n)
				s.count(int(n))
				r.busy = false
				return r.data[start : start+n : start+n], nil
			}
		}
		r.busy = false
	}
	rec, _, err := s.nextRecord(u)
	return rec, err
}

func (s *session) recvWithCodec() ([]byte, Codec, error) {
	rec, flags, err := s.nextRecord(forever)
	return rec, codecOf(flags), err
}

func (s *session) recvObject(v any) error {
	rec, flags, err := s.nextRecord(untilNext)
	if err != nil {
		return err
	}
	err = decodeObject(rec, flags, s.rawCodec, v)
	s.returnJoined()
	return err
}

func (s *session) all() iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for {
			rec, err := s.recvRecord(forever)
			if err == io.EOF {
				return
			}
			if !yield(rec, err) || err != nil {
				return
			}
		}
	}
}

func (s *session) read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if err := s.lockRead(); err != nil {
		return 0, err
	}
	defer s.unlockRead()
	if err := s.refusedNow(); err != nil {
		return 0, err
	}
	rec := s.rest()
	for len(rec) == 0 {
		err := s.endedNow() // a peer may send empty records for ever
		if err != nil {
			return 0, err
		}
		if rec, _, err = s.nextGated(untilNext); err != nil {
			return 0, err
		}
		s.took(len(rec))
	}
	n := copy(p, rec)
	s.setRest(rec[n:])
	if n == len(rec) {
		s.returnJoined()
	}
	return n, nil
}

func (s *session) writeTo(w io.Writer) (n int64, err error) {
	for {
		rec, err := s.recvRecord(untilNext)
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		m, err := w.Write(rec)
		if m < 0 || m > len(rec) {
			return n, cmp.Or(err, fmt.Errorf("stream: invalid write result: %T returned %d for %d bytes: correct that Writer", w, m, len(rec)))
		}
		n += int64(m)
		s.returnJoined()
		if err != nil {
			return n, err
		}
		if m < len(rec) {
			return n, io.ErrShortWrite
		}
	}
}

// took counts a record of n bytes that a read on the slow path returns. The first one is an event.
func (s *session) took(n int) {
	s.count(n)
	if s.recv.readLock.Load()&gateFirst != 0 {
		s.recv.readLock.And(^gateFirst)
		s.observe(eventFirstRecord)
	}
}

// lockRead begins a read that may wait. unlockRead ends it.
func (s *session) lockRead() error {
	for !s.recv.busy {
		old := s.recv.readLock.Load()
		if old&gateReading != 0 {
			break
		}
		if s.recv.readLock.CompareAndSwap(old, old|gateReading) {
			return nil
		}
	}
	return ErrConcurrentRecv
}

func (s *session) unlockRead() {
	s.recv.readLock.And(^gateReading)
	s.dropUnwanted() // if the user left meanwhile
}

// nextRecord is recvRecord without a fast path. It returns the flags of the record, too.
func (s *session) nextRecord(u use) ([]byte, FrameFlags, error) {
	if err := s.lockRead(); err != nil {
		return nil, 0, err
	}
	defer s.unlockRead()
	if err := s.refusedNow(); err != nil {
		return nil, 0, err
	}
	if rest := s.rest(); len(rest) != 0 { // of a record that Read began, and counted
		s.setRest(nil)
		return s.ownPart(rest, u), FlagRaw, nil
	}
	if err := s.awaitRecord(); err != nil {
		return nil, 0, err
	}
	rec, flags, err := s.nextGated(u)
	if err != nil {
		return nil, 0, err
	}
	s.took(len(rec))
	return rec, flags, nil
}

// awaitRecord waits for the next packet, if the next record lies in it. With extras, a read may have taken the record
// already, so nextGated looks there first. nextPacket would wait as well, in more calls: a goroutine that wakes up
// there returns through stack frames that are in no cache, if there are many slow streams.
func (s *session) awaitRecord() error {
	if int(s.recv.off) != len(s.recv.data) || s.extras.Load() != nil {
		return nil
	}
	s.leavePacket()
	for s.bucket.ring.Empty() && s.end.Load() == nil {
		if err := s.awaitPacket(); err != nil {
			return err
		}
	}
	return nil
}
