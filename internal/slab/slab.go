// Package slab has the receive buffers of fast connections, and the memory of large records that are lent to their
// readers. A slab holds many messages, one behind the other. It is used again once all messages that were lent out of
// it were given back. One goroutine fills a slab: the goroutine that reads a fast connection, or the reader of a large
// record. The mux, a reader, or a goroutine that ends a stream gives a message back. A lock guards the free slabs of
// each size.
//
// A slab that is not given back costs memory only: the garbage collector takes it. A slab that is given back too often
// would have two owners. So Release panics if it finds that, and builds that look for uses after release overwrite the
// slab.
package slab

import (
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/natsstream/stream/internal/poison"
)

// Sizes of slabs in bytes. Size holds four packets of the usual size, 32 KiB, with their control lines. LargeSize holds
// the largest packet that this library sends.
const (
	Size      = 132 << 10
	LargeSize = 320 << 10
)

// Bounds of the memory in slabs. maxLive bounds the bytes of all slabs that exist in the process. At this bound, a
// connection copies its packets, so that readers that stand still do not hold ever more slabs. maxFree bounds the bytes
// of the free slabs of each size.
const (
	maxLive = 32 << 20
	maxFree = 4 << 20
)

// filling is counted in refs while the slab is being filled. It is more than any number of messages.
const filling = 1 << 40

// Slab is one buffer. The filler owns Buf, except the messages that it has lent. The reader of a message owns its bytes
// until Release.
type Slab struct {
	Buf  []byte
	lent int64        // messages lent since it was taken; the filler's
	refs atomic.Int64 // filling, less the messages given back; the messages not given back once it is retired
	pool *pool
}

// pool has the free slabs of one size, the last one used on top.
type pool struct {
	size int
	mu   sync.Mutex
	free []*Slab
}

var (
	live  atomic.Int64 // bytes of all slabs that exist
	pools = [...]*pool{{size: Size}, {size: LargeSize}}
)

// Get returns a slab of at least n bytes for one filler, or nil if n is more than LargeSize or there is no room for
// another slab.
func Get(n int) *Slab {
	for _, p := range pools {
		if n <= p.size {
			return p.get()
		}
	}
	return nil
}

func (p *pool) get() *Slab {
	p.mu.Lock()
	var s *Slab
	if last := len(p.free) - 1; last >= 0 {
		s, p.free[last] = p.free[last], nil
		p.free = p.free[:last]
	}
	p.mu.Unlock()
	if s == nil {
		if live.Add(int64(p.size)) > maxLive {
			live.Add(-int64(p.size))
			return nil
		}
		s = &Slab{Buf: make([]byte, p.size), pool: p}
		runtime.AddCleanup(s, func(size int) { live.Add(-int64(size)) }, p.size)
	}
	s.lent = 0
	s.refs.Store(filling)
	return s
}

// Live returns the bytes of all slabs that exist.
func Live() int64 { return live.Load() }

// Crowded reports whether slabs take more than half of maxLive. Connections then copy small messages.
func Crowded() bool { return live.Load() > maxLive/2 }

// Lend counts one more message that a reader will give back. Only the filler calls it, before the reader gets the
// message.
func (s *Slab) Lend() { s.lent++ }

// Restart lets the filler begin again at the start of Buf, where it moves the bytes that are pending, a part of Buf. It
// does nothing and reports false if not all messages that were lent are back.
func (s *Slab) Restart(pending []byte) bool {
	if s.refs.Load() != filling-s.lent {
		return false
	}
	n := copy(s.Buf, pending)
	if s.lent > 0 {
		poison.Fill(s.Buf[n:])
	}
	s.lent = 0
	s.refs.Store(filling)
	return true
}

// Share counts n more holders of a message. Only a holder calls it.
func (s *Slab) Share(n int) { s.add(int64(n)) }

// Retire ends the filling. The slab is free when all messages are back. The filler must not touch it afterwards.
func (s *Slab) Retire() { s.add(s.lent - filling) }

// Release gives one message back. Its bytes must not be touched afterwards. A nil Slab has nothing to give back.
func (s *Slab) Release() {
	if s != nil {
		s.add(-1)
	}
}

func (s *Slab) add(n int64) {
	switch left := s.refs.Add(n); {
	case left == 0:
		poison.Fill(s.Buf)
		s.pool.put(s)
	case left < 0:
		panic("stream: a message was given back twice: report this as a bug of the library")
	}
}

func (p *pool) put(s *Slab) {
	p.mu.Lock()
	if len(p.free) < maxFree/p.size {
		p.free = append(p.free, s)
	}
	p.mu.Unlock()
}
