package stream

import (
	"crypto/rand"
	"encoding/binary"
	"sync"
)

// This file draws the numbers and tokens that name streams. Any goroutine may run it. randomNumbers has a lock.

// random is the source of the numbers that name streams and their ends.
var random randomNumbers

// randomNumbers draws numbers from the system's cryptographic source, many at once: a draw costs a call of the system,
// and each stream takes four numbers.
type randomNumbers struct {
	mu    sync.Mutex
	left  []byte // of bytes, not used yet
	bytes [512]byte
}

func (r *randomNumbers) next() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.left) == 0 {
		rand.Read(r.bytes[:])
		r.left = r.bytes[:]
	}
	b := r.left[:8]
	r.left = r.left[8:]
	n := binary.NativeEndian.Uint64(b)
	clear(b) // a number that names a stream is not found here
	return n
}

// newSender returns a random sender number. It distinguishes two answers to one request. It comes from a cryptographic
// source, because a RESET with the receiver's own number ends a stream, so a stranger must not guess it. Numbers of
// consumers are odd and numbers of producers even, so that such a RESET never looks like one of the peer.
func newSender(odd bool) uint64 {
	n := random.next() & maxSender &^ 1
	if odd {
		n |= 1
	}
	return n
}

// newToken returns a new token, which tells the peer offer.
func newToken(offer Token) (token [TokenSize]byte) {
	offer.ID = random.next()
	AppendToken(token[:0], offer)
	return token
}
