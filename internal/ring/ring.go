// Package ring holds the queue between the goroutine that receives packets and
// the one that reads them: single producer, single consumer, lock-free, bounded.
// It also holds the [Parker] on which a consumer sleeps.
//
// A buffered channel would do but for three things: it takes a lock on both
// sides, it allocates its whole capacity at once, and its capacity is fixed. A
// [Ring] costs one atomic store per Push and one per Pop, allocates nothing
// until the first Push, and grows with the number of queued elements, up to its
// limit.
//
// # Memory
//
// The elements lie in segments, each a power of two of slots used in a circle.
// The first has 4. When the segment in use is full, the producer links one of
// twice the size behind it and never returns to the old one; the consumer
// drains the old one, follows the link and leaves it to the garbage collector.
// So after a burst a Ring stays as large as the burst made it, and the same load
// allocates nothing from then on. A segment has at most 4096 slots (32 KiB of
// pointers), so that no Push has to clear megabytes. Only a backlog deeper than
// that goes on allocating, a segment every 4096 elements, and gives them back
// when it is drained.
//
// # Parking
//
// A Ring never blocks. A consumer that sleeps on an empty ring does so on a
// [Parker], in this order:
//
//	consumer                               producer
//	v, ok := r.Pop()                       r.Push(v)
//	for !ok {                              p.Wake()
//		p.Announce()   // publish
//		if r.Empty() { // then look
//			p.Wait()
//		} else {
//			p.Retract()
//		}
//		v, ok = r.Pop()
//	}
//
// Each side first writes its own word (the announcement; the count of pushed
// elements) and then reads the other's. Go's atomics are sequentially
// consistent: all of them form one order, in which one of the two writes is
// first, and the side that writes second sees it. So either the consumer finds
// the element or the producer finds the announcement, or both, and no wake-up
// is lost. Both is harmless: Retract takes the signal that is left over.
package ring

import (
	"math"
	"sync/atomic"
)

const (
	minSlots  = 4
	maxSlots  = 4096
	cacheLine = 64
)

// Ring is a queue of at most limit elements. Push belongs to one goroutine at a
// time, the producer; Pop and Empty to one at a time, the consumer; the other
// methods may be called by any. Call Init before sharing it; do not copy it
// afterwards. The zero Ring is empty and accepts nothing.
//
// An element's position is the number of elements pushed before it, modulo
// 2^32; in a segment of n slots it lies in slot position mod n. Positions wrap,
// so code compares them for equality or subtracts them, and never orders them.
//
// To embed a Ring: it has no padding at its ends, so put the fields that the
// producer writes often before it, and those that the consumer writes often
// after it. A [Spaced] has fields of its container in place of the padding in
// its middle.
type Ring[T any] = Spaced[T, [space]byte]

// space is a cache line without root, which lies there as well: for any address
// of a Ring, no line holds words of both owners. Two lines would suit
// processors that fetch them in pairs, and are too much for a hundred thousand
// idle streams.
const space = cacheLine - 8

// Spaced is a [Ring] with fields of its container, Between, in its middle. Both owners seldom write these fields, so
// Between keeps the words of the two on different cache lines. Between has at least 56 bytes, a cache line without a
// word.
type Spaced[T, B any] struct {
	// Owned by the producer. Others read tail only.
	slots []T                         // of the segment that is filled
	link  *atomic.Pointer[segment[T]] // where to link the next segment
	tail  atomic.Uint32               // position of the next Push: its store publishes the element to the consumer
	stop  uint32                      // Push may run up to here without looking at head or limit
	base  uint32                      // slots from base (mod their number) up to tail are in use

	// Seldom written, so they may lie on either side's line.
	limit atomic.Uint32              // any goroutine -> producer
	root  atomic.Pointer[segment[T]] // producer -> consumer: link to the first segment

	Between B

	// Owned by the consumer. Others read head only.
	out   []T                         // slots of the segment that is drained
	next  *atomic.Pointer[segment[T]] // link to the segment after it
	head  atomic.Uint32               // position of the next Pop: its store gives the emptied slot back to the producer
	avail uint32                      // Pop may run up to here without looking at tail or next
}

// segment is immutable but for link, which the producer sets once. That store
// publishes the next segment to the consumer, and with it that this one ends
// where the next begins.
type segment[T any] struct {
	link  atomic.Pointer[segment[T]] // set by the producer, cleared by the consumer when it moves on
	first uint32                     // position of the first element in slots
	slots []T
}

// newSegment makes a segment of n slots. The first of a Ring is one allocation with its slots, because most streams
// need no other.
func newSegment[T any](first, n uint32) *segment[T] {
	if n != minSlots {
		return &segment[T]{first: first, slots: make([]T, n)}
	}
	s := new(struct {
		segment[T]
		slots [minSlots]T
	})
	s.segment.first, s.segment.slots = first, s.slots[:]
	return &s.segment
}

// Init makes r an empty ring for at most limit elements. It allocates nothing.
func (r *Spaced[T, B]) Init(limit int) {
	r.link, r.next = &r.root, &r.root
	r.SetLimit(limit)
}

// SetLimit changes the limit. A higher one holds from the next Push on; a lower
// one only once Push has used the room it has already seen. A limit below 0
// counts as 0, one above MaxInt32 as MaxInt32.
func (r *Spaced[T, B]) SetLimit(limit int) {
	r.limit.Store(uint32(min(max(limit, 0), math.MaxInt32)))
}

// Push appends v. It reports false, and does nothing, when limit elements are
// queued. Producer only.
func (r *Spaced[T, B]) Push(v T) bool {
	t := r.tail.Load()
	if t == r.stop && !r.pushSlow(t) {
		return false
	}
	r.slots[t&uint32(len(r.slots)-1)] = v // before tail: from then on the slot is the consumer's
	r.tail.Store(t + 1)
	return true
}

// pushSlow finds out how far Push may run from t, growing the ring if it must.
// With a consumer that keeps up, Push comes here once in a round of the slots,
// and otherwise leaves the consumer's line alone.
func (r *Spaced[T, B]) pushSlow(t uint32) bool {
	queued := t - r.head.Load() // this load takes over the slots below head
	limit := r.limit.Load()
	if queued >= limit {
		return false
	}
	// The consumer is in this segment, at head, or in an earlier one.
	used := min(queued, t-r.base)
	if used == uint32(len(r.slots)) { // zero slots before the first Push
		s := newSegment[T](t, min(max(2*used, minSlots), maxSlots))
		r.link.Store(s) // the consumer may follow, once tail has passed t
		r.link, r.slots, used = &s.link, s.slots, 0
	}
	r.base = t - used
	r.stop = t + min(limit-queued, uint32(len(r.slots))-used)
	return true
}

// Pop removes the oldest element and returns it; ok is false when there is
// none. The ring keeps no reference to it. Consumer only.
func (r *Spaced[T, B]) Pop() (v T, ok bool) {
	h := r.head.Load()
	if h == r.avail && !r.popSlow(h) {
		return v, false
	}
	p, zero := &r.out[h&uint32(len(r.out)-1)], v
	v, *p = *p, zero // before head: from then on the slot is the producer's
	r.head.Store(h + 1)
	return v, true
}

// popSlow finds out how far Pop may run from h in one segment, moving on to the
// next when the current one ends at h.
//
// The order of the loads matters. The producer stores a link after the tail at
// which the segment ends, and before any tail beyond it. So where no link is
// seen after tail was loaded, all up to tail is in this segment; where one is
// seen, all up to the segment's end is published, even past the tail loaded.
func (r *Spaced[T, B]) popSlow(h uint32) bool {
	t := r.tail.Load() // this load takes over the slots below tail
	if t == h {
		return false
	}
	s := r.next.Load()
	for s != nil && s.first == h {
		r.next.Store(nil) // otherwise root would keep the drained segments alive
		r.next, r.out = &s.link, s.slots
		s = r.next.Load()
	}
	if s != nil {
		t = s.first
	}
	r.avail = t
	return true
}

// Empty reports whether Pop would find nothing. Consumer only.
func (r *Spaced[T, B]) Empty() bool {
	return r.tail.Load() == r.head.Load()
}

// Len returns the number of elements queued, or more if some are popped meanwhile.
func (r *Spaced[T, B]) Len() int {
	h := r.head.Load() // first: a tail older than head would give a negative length
	return int(r.tail.Load() - h)
}

// Pushed returns how many elements have ever been pushed, modulo 2^32. If a
// caller sees a Push counted here, it also sees all writes that the producer
// made before that Push.
func (r *Spaced[T, B]) Pushed() uint32 {
	return r.tail.Load()
}
