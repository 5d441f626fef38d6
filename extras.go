package stream

import "sync/atomic"

// This file has the state that few streams need. Any goroutine may make it; its fields name their owners.

// extras is the state of a session that few streams need. It is made on first use, so that it costs other streams a pointer.
type extras struct {
	read, write deadline

	answered chan struct{} // closed for OpenRetry, and set to nil, when the producer has answered; nil without OpenRetry. The outbox's

	// The reader's.
	partial atomic.Pointer[partial] // the pieces of a record, if the read deadline passed before the last one. dropUnwanted drops it, too
	ahead   []byte                  // a record that Ready has read, while readLock has gateAhead
	aheadAs FrameFlags

	// The writers', with the lock of the packer.
	rest      []byte // the rest of a record in pieces, after its write returned. Its turn goes on
	restFlags FrameFlags
}

// extra returns the extras of s, made on first use.
func (s *session) extra() *extras {
	if x := s.extras.Load(); x != nil {
		return x
	}
	x := new(extras)
	x.read.session, x.write.session, x.write.write = s, s, true
	if !s.extras.CompareAndSwap(nil, x) {
		x = s.extras.Load()
	}
	return x
}
