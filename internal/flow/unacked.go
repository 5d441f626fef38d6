package flow

import "iter"

// Unacked holds the published packets of a stream until they are acknowledged, by their sequence numbers, and yields
// those to publish again. Sequence numbers are modulo 2^32; fewer than 2^31 packets are held at once. It allocates when
// it has to hold more packets than ever before.
//
// The zero Unacked is empty, and must not be copied once it was used. All methods belong to one goroutine, the outbox.
type Unacked[P comparable] struct {
	packets []P    // packets[seq & (len-1)] is number seq, for acked <= seq < next
	one     [1]P   // the first packets, as long as no two are held at once
	acked   uint32 // everything before it is acknowledged
	next    uint32 // number of the next packet that is new
	cursor  uint32 // number of the next packet to publish again; next if there is none

	againFrom uint32 // the packet from which on the peer last asked
	againAt   int64  // when it did; 0 is never
}

// Acked returns the number of the first packet that is not acknowledged.
func (q *Unacked[P]) Acked() uint32 { return q.acked }

// Next returns the number of the next packet that is new.
func (q *Unacked[P]) Next() uint32 { return q.next }

// Cursor returns the number of the packet to publish next, new or again. The peer should have received all before it.
func (q *Unacked[P]) Cursor() uint32 { return q.cursor }

// Empty reports whether all packets are acknowledged.
func (q *Unacked[P]) Empty() bool { return q.acked == q.next }

// OnTheWay returns how many packets were published and are neither acknowledged nor known to be lost.
func (q *Unacked[P]) OnTheWay() uint32 { return q.cursor - q.acked }

// All yields the packets that are not acknowledged, in their order. None may be pushed or released meanwhile.
func (q *Unacked[P]) All() iter.Seq[P] {
	return func(yield func(P) bool) {
		for seq := q.acked; seq != q.next; seq++ {
			if !yield(q.packets[seq&uint32(len(q.packets)-1)]) {
				return
			}
		}
	}
}

// Push holds p, which was published as number Next. If packets are left to publish again, p follows them again: the
// peer drops it now.
func (q *Unacked[P]) Push(p P) {
	switch {
	case q.packets == nil:
		q.packets = q.one[:]
	case int(q.next-q.acked) == len(q.packets):
		old := q.packets
		q.packets = make([]P, max(4, 2*len(old)))
		for seq := q.acked; seq != q.next; seq++ {
			q.packets[seq&uint32(len(q.packets)-1)] = old[seq&uint32(len(old)-1)]
		}
		clear(old) // one is kept
	}
	q.packets[q.next&uint32(len(q.packets)-1)] = p
	if q.next++; q.cursor == q.next-1 {
		q.cursor = q.next
	}
}

// Replace holds p instead of was. It does nothing if was is not held.
func (q *Unacked[P]) Replace(was, p P) {
	for seq := q.acked; seq != q.next; seq++ {
		if at := &q.packets[seq&uint32(len(q.packets)-1)]; *at == was {
			*at = p
			return
		}
	}
}

// Skip counts a packet that was published to a peer without acknowledgements, as acknowledged.
func (q *Unacked[P]) Skip() {
	q.next++
	q.acked, q.cursor = q.next, q.next
}

// Release handles the acknowledgement of all packets before seq, and calls free for each of them, in order. A seq that
// cannot be acknowledged now is old, and Release does nothing. It returns the number of released packets.
func (q *Unacked[P]) Release(seq uint32, free func(P)) (n uint32) {
	if seq-q.acked > q.next-q.acked {
		return 0 // old, or half the number space away
	}
	n = seq - q.acked
	var zero P
	for ; q.acked != seq; q.acked++ {
		p := &q.packets[q.acked&uint32(len(q.packets)-1)]
		free(*p)
		*p = zero
	}
	if int32(q.cursor-q.acked) < 0 {
		q.cursor = q.acked
	}
	return n
}

// Again handles the peer's report that everything from seq on is missing. It returns whether there are packets to
// publish again. A repeated report for the same seq is ignored until patience has passed, because the answer to the
// first one may be on its way. lost is the number of packets that were on their way if this is a new loss, and 0
// otherwise.
func (q *Unacked[P]) Again(seq uint32, now, patience int64) (again bool, lost uint32) {
	if seq != q.acked || seq == q.next {
		return false, 0 // old news
	}
	if q.againAt != 0 && q.againFrom == seq && now-q.againAt < patience {
		return false, 0
	}
	if seq == q.cursor {
		return true, 0 // the packets published again have arrived, and the rest is about to be published
	}
	lost = q.OnTheWay()
	q.cursor, q.againFrom, q.againAt = seq, seq, now
	return true, lost
}

// Missing returns the next packet to publish again; ok is false if there is none. Resent or GiveUp must follow.
func (q *Unacked[P]) Missing() (p P, ok bool) {
	if q.cursor == q.next {
		return p, false
	}
	return q.packets[q.cursor&uint32(len(q.packets)-1)], true
}

// Resent records that the packet of Missing was published.
func (q *Unacked[P]) Resent() { q.cursor++ }

// GiveUp records that missing packets cannot be published now. The peer will ask for them again.
func (q *Unacked[P]) GiveUp() { q.cursor = q.next }
