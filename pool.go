package stream

import (
	"sync"
	"unsafe"

	"github.com/natsstream/stream/concurrency"
	"github.com/natsstream/stream/internal/poison"
)

// This file has the pools of the send side's buffers, one for each size class. Any goroutine may run it. A packet
// belongs to the caller of getPacket. An open packet belongs to the writers, with the lock of their packer. A sealed
// packet belongs to the outbox, which returns it with putPacket after it was acknowledged or its writer ended. Only the
// outbox returns sealed packets, and it recalls those that the connection has kept first, so none is reused while it is
// being published. The buffers of envelopes come from here as well; see retained.go. Received packets are not in these
// pools: they are in buffers of nats.go or in slabs.

// Packet sizes. The buffer of a coalescing packet grows to coalesceSize. Records fill it up to coalesceMost, so that it
// has room for padding and, with a usual subject, for NATS's command. A record that does not fit into it travels alone
// in a packet of up to flow.MaxPacket. A larger record is cut into pieces (docs/PROTOCOL.md section 6). singleSize is
// the largest class.
const (
	coalesceSize = 32 << 10
	coalesceMost = coalesceSize - 128
	singleSize   = 256<<10 + PacketHeaderSize + FrameHeaderSize
)

// packetClasses are the buffer sizes. A sealed packet keeps its whole buffer until it is acknowledged. So there is a
// class near each size of a lone record: above 4 KiB at most a quarter of the buffer is not used.
var packetClasses = [...]int{
	smallSize, 512, 1 << 10, 2 << 10, 4 << 10,
	5 << 10, 6 << 10, 7 << 10, 8 << 10, 10 << 10, 12 << 10, 14 << 10, 16 << 10, 20 << 10, 24 << 10, 28 << 10, coalesceSize,
	40 << 10, 48 << 10, 56 << 10, 64 << 10, 80 << 10, 96 << 10, 112 << 10, 128 << 10, 160 << 10, 192 << 10, 224 << 10, singleSize,
}

// unpooled marks a buffer of no class: a message of the JSON fallback that is larger than every class, or a packet that
// was cut again. The garbage collector frees it.
const unpooled = int8(-1)

// packet is one NATS payload under way.
type packet struct {
	buf   []byte // full capacity while open; cut to the written bytes when sealed
	class int8   // index into packetClasses, or unpooled, or placedClass
	last  bool   // sealed with CLOSE in it: no packet follows
	free  bool   // set while in the pool, so that a double return is caught where it happens

	fragments  bool    // published in fragments, which shows nothing of its size
	enveloped  int32   // where it ends in its envelope; 0 if it was last published without one
	connection uint32  // which of this end's connections in turn took the whole packet last
	through    counted // what was written down to its last record; 0 if it was cut and another packet follows
	next       *packet // while p is sealed and not published: see readyPackets
}

// smallPacket is a packet of the smallest class, with its buffer. Each of many slow streams has such packets under way,
// which are in no cache. In one piece, a packet needs one entry in the processor's table of pages instead of two.
type smallPacket struct {
	packet // first: putPacket finds the whole from it
	bytes  [smallSize]byte
}

const (
	// smallSize makes a smallPacket fill a size class of the allocator, 256 bytes.
	smallSize = 3 * cacheLine
	cacheLine = 64
)

var (
	smallPackets sync.Pool // of the smallest class
	packetPools  [len(packetClasses)]sync.Pool
)

// memory returns the bytes that p keeps.
func (p *packet) memory() uint64 { return uint64(cap(p.buf)) }

// getPacket returns a packet with room for at least n bytes.
func getPacket(n int) *packet {
	if n <= smallSize {
		return getSmall()
	}
	for c := 1; c < len(packetClasses); c++ {
		size := packetClasses[c]
		if n > size {
			continue
		}
		if p, _ := packetPools[c].Get().(*packet); p != nil {
			p.free, p.last, p.fragments = false, false, false
			return p
		}
		return &packet{buf: make([]byte, size), class: int8(c)}
	}
	return &packet{buf: make([]byte, n), class: unpooled}
}

// getSmall is getPacket for the smallest class. With many slow streams the packet is in no cache. The stores to the
// buffer make the processor fetch all of its lines at once. Otherwise it would wait for the header, and then for each
// line that the record is copied to before the next locked instruction.
func getSmall() *packet {
	p, _ := smallPackets.Get().(*smallPacket)
	if p == nil {
		p = new(smallPacket)
		p.buf = p.bytes[:]
		return &p.packet
	}
	p.bytes[0], p.bytes[cacheLine], p.bytes[2*cacheLine] = 0, 0, 0
	p.free, p.last, p.fragments = false, false, false
	return &p.packet
}

// putPacket returns p to its pool. It panics on a second return of the same packet: the buffer would have two owners,
// and records of one stream would appear in packets of another.
func putPacket(p *packet) {
	if p.free {
		panic("stream: packet returned to the pool twice")
	}
	p.free = true
	switch p.class {
	case unpooled:
		return
	case placedClass:
		putPlaced((*placedPacket)(unsafe.Pointer(p)))
		return
	}
	p.buf = p.buf[:packetClasses[p.class]]
	poison.Fill(p.buf)
	if p.class == 0 {
		smallPackets.Put((*smallPacket)(unsafe.Pointer(p)))
		return
	}
	packetPools[p.class].Put(p)
}

// resultSlab is how many AsyncResults one allocation of OpenStream's channel holds. They are never reused, so a caller
// may keep them; keeping one keeps its slab.
const resultSlab = 64

// results hands out AsyncResults from slabs. One goroutine owns it.
type results struct {
	slab []concurrency.AsyncResult[[]byte]
}

func (r *results) next(value []byte, err error) *concurrency.AsyncResult[[]byte] {
	if len(r.slab) == 0 {
		r.slab = make([]concurrency.AsyncResult[[]byte], resultSlab)
	}
	res := &r.slab[0]
	r.slab = r.slab[1:]
	res.Value, res.Err = value, err
	return res
}
