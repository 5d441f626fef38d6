package stream

import (
	"cmp"
	"fmt"
	"io"
	"iter"

	"github.com/natsstream/stream/internal/poison"
)

// This file has the reads of Stream and Request. The reader runs them.
//
// A read either lends its record until the next read, or gives it to the user for ever. Next, Read, WriteTo and RecvObject lend it,
// and Recv and All give it. Memory that was only lent may be used again.

// recvRecord is Recv of Stream and Request if keep is set, and Next otherwise.
func (s *session) recvRecord(keep bool) ([]byte, error) {
	// This fast path takes a record at hand from the current packet. nextRecord handles all cases.
	if !s.recv.busy && !poison.Enabled && (s.recv.lent == nil || !keep) && len(s.recv.left) == 0 && s.recv.readLock.Load() == 0 && s.end.Load() == nil && s.recv.parent.Err() == nil {
		s.recv.busy = true
		if b := s.recv.data[s.recv.off:]; len(b) >= FrameHeaderSize && s.recv.off != 0 {
			h := frameHeader(b)
			n, rest := payloadLen(h), b[FrameHeaderSize:]
			if isPlainData(h) && n <= uint64(len(rest)) && n <= s.recv.maxRecord {
				s.recv.off += FrameHeaderSize + uint32(n)
				s.count(int(n))
				s.recv.busy = false
				return rest[:n:n], nil
			}
		}
		s.recv.busy = false
	}
	rec, _, err := s.nextRecord(keep)
	return rec, err
}

func (s *session) recvWithCodec() ([]byte, Codec, error) {
	rec, flags, err := s.nextRecord(true)
	return rec, codecOf(flags), err
}

func (s *session) recvObject(v any) error {
	rec, flags, err := s.nextRecord(false)
	if err != nil {
		return err
	}
	return decodeObject(rec, flags, s.rawCodec, v)
}

func (s *session) all() iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		for {
			rec, err := s.recvRecord(true)
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
	for len(s.recv.left) == 0 {
		rec, _, err := s.nextGated(false)
		if err != nil {
			return 0, err
		}
		s.took(len(rec))
		s.recv.left = rec
	}
	n := copy(p, s.recv.left)
	s.recv.left = s.recv.left[n:]
	return n, nil
}

func (s *session) writeTo(w io.Writer) (n int64, err error) {
	for {
		rec, err := s.recvRecord(false)
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

// nextRecord returns the next record and its flags. keep says that the user may keep the record.
func (s *session) nextRecord(keep bool) ([]byte, FrameFlags, error) {
	if err := s.lockRead(); err != nil {
		return nil, 0, err
	}
	defer s.unlockRead()
	if err := s.refusedNow(); err != nil {
		return nil, 0, err
	}
	if rest := s.recv.left; len(rest) != 0 { // of a record that Read began, and counted
		s.recv.left = nil
		return s.ownPart(rest, keep), FlagRaw, nil
	}
	rec, flags, err := s.nextGated(keep)
	if err != nil {
		return nil, 0, err
	}
	s.took(len(rec))
	return rec, flags, nil
}
