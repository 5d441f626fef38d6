package stream

import (
	"sync"
	"unsafe"

	"github.com/natsstream/stream/internal/poison"
)

// This file has the buffers of envelopes. Packets that writers placed in an envelope stay there until they are
// acknowledged, so the envelope is kept as long. Writers run getEnvelope, at and grow with the lock of the enveloping.
// The outbox runs all of it.

// envelope is the buffer of an envelope, with the packets that were placed in it.
type envelope struct {
	buf *packet

	// Guarded by enveloping.mu while the envelope is open, then the outbox's.
	n       int // bytes in use
	most    int // bytes that it may have
	packets int
	placed  int // of these, packets in lists
	lists   [maxPlaced / placedList]*[placedList]placedPacket
	next    *envelope // that was opened behind it; later, the next one of retained

	// The outbox's.
	taken   int       // placed packets that it has accounted for
	senders []*sender // of packets of records that are not placed, and of live streams that are
	kept    int       // of these, packets that were not given back; with 0, and once it was sent, v is in the pool
	in      *retained // nil before it is sent
	older   *envelope // in retained
	seen    bool      // by settleRetained
}

// placedPacket is a packet that a writer placed in an envelope.
type placedPacket struct {
	packet   // first: putPacket finds the whole from it
	envelope *envelope
	sender   *sender
}

const (
	// maxPlaced bounds the packets that are placed in one envelope. Each takes 80 bytes besides the buffer, in a list
	// of placedList packets.
	maxPlaced  = 192
	placedList = 16
	// placedClass is the class of a placed packet.
	placedClass = int8(-2)
)

var envelopePool sync.Pool

// getEnvelope returns an empty envelope of at most size bytes.
func getEnvelope(size int) *envelope {
	v, _ := envelopePool.Get().(*envelope)
	if v == nil {
		v = new(envelope)
	}
	v.buf, v.n, v.most = getPacket(size), PacketHeaderSize, size
	return v
}

// putEnvelope returns v to its pool.
func putEnvelope(v *envelope) {
	putPacket(v.buf)
	v.buf, v.packets, v.placed, v.taken, v.next, v.seen = nil, 0, 0, 0, nil, false
	envelopePool.Put(v)
}

// at returns placed packet i.
func (v *envelope) at(i int) *placedPacket { return &v.lists[i/placedList][i%placedList] }

// grow makes room for one more placed packet.
func (v *envelope) grow() {
	if list := &v.lists[v.placed/placedList]; *list == nil {
		*list = new([placedList]placedPacket)
	}
}

// putPlaced gives a placed packet back, and its envelope with the last one. The packet of a stream that has ended may
// be given back before it was sent.
func putPlaced(d *placedPacket) {
	v := d.envelope
	if v.in != nil {
		poison.Fill(d.buf)
	}
	d.buf, d.sender = nil, nil // the list is used again, and must not keep them in memory
	if v.kept--; v.kept == 0 && v.in != nil {
		v.in.remove(v)
		putEnvelope(v)
	}
}

// retained are envelopes that were sent and have packets that are not acknowledged, the oldest first. The outbox owns
// it.
type retained struct {
	first, last *envelope
	bytes       int64 // of their buffers and lists
}

func (r *retained) push(v *envelope) {
	v.in, v.older, v.next = r, r.last, nil
	if r.last != nil {
		r.last.next = v
	} else {
		r.first = v
	}
	r.last = v
	r.bytes += v.memory()
}

func (r *retained) remove(v *envelope) {
	if v.older != nil {
		v.older.next = v.next
	} else {
		r.first = v.next
	}
	if v.next != nil {
		v.next.older = v.older
	} else {
		r.last = v.older
	}
	v.in, v.older, v.next = nil, nil, nil
	r.bytes -= v.memory()
}

// memory returns the bytes that v takes while it is retained.
func (v *envelope) memory() int64 {
	lists := (v.placed + placedList - 1) / placedList
	return int64(v.buf.memory()) + int64(unsafe.Sizeof(*v)) + int64(lists)*int64(unsafe.Sizeof(*v.lists[0]))
}
