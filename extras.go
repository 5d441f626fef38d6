package stream

import (
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/slab"
)

// This file has the state that few streams need. Any goroutine may make it; its fields name their owners.

// extras is the state of a session that few streams need. It is made on first use, so that it costs other streams a
// pointer.
type extras struct {
	read, write deadline

	suspect     int64       // since when the peer is suspect, by the outbox's clock; 0 if it is not. The outbox's
	whereabouts whereabouts // more about the address of a peer in another account, or of one that has to be proved. The outbox's

	// Of the options of Open.
	window   uint64                     // the most bytes of the window; 0 for that of the endpoint
	answered chan struct{}              // closed for WithRetry, and set to nil, when the producer has answered; nil without WithRetry. The outbox's
	opening  atomic.Pointer[time.Timer] // fires at the end of WithOpenTimeout; nil without
	answer   atomic.Uint32              // the outbox and the timer set it, and the first counts

	gathering *gathering // of the request of OpenMany that the stream belongs to; nil without; see session.gathers

	observed atomic.Pointer[observed] // for hooks; nil without

	// The reader's.
	header, trailer nats.Header
	left            []byte                  // the rest of a record that Read has read in part, while readLock has gateRest
	partial         atomic.Pointer[partial] // the pieces of a record, if the read deadline passed before the last one. dropUnwanted drops it, too
	joined          *slab.Slab              // that the last large record lies in, if it was lent
	ahead           []byte                  // a record that Ready has read, while readLock has gateAhead
	aheadAs         FrameFlags

	// The writers', with the lock of the packer.
	rest      []byte // the rest of a record in pieces, after its write returned. Its turn goes on
	restFlags FrameFlags
}

// Values of extras.answer.
const (
	notAnswered uint32 = iota
	answerInTime
	answerLate
)

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
