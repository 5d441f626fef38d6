// Package wheel keeps items by the time at which they are due, and wakes their owner while there are any. It is made
// for many items of which few are ever due: an idle stream costs three words in the item, and no timer and no
// goroutine.
//
// A [Wheel] belongs to one goroutine. A [Ticker] is the goroutine that wakes it.
package wheel

import (
	"iter"
	"time"
)

// Slots is the number of ticks that a [Wheel] reaches ahead. An item that is due later is looked at when the wheel has
// gone round, and set again. With 100,000 items that are due in some minutes these looks are most of the work. 2,048
// slots are 16 KiB for each wheel, and with ticks of 50 ms they reach 102 s ahead; 256 slots made 8,000 looks a second.
// A power of two makes the remainder a mask.
const Slots = 2048

// Wheel keeps items by the tick in which they are due (Varghese and Lauck, "Hashed and hierarchical timing wheels",
// SOSP 1987). Set and Remove take constant time, Advance takes the time of the ticks and items that it passes. None of
// them allocates.
//
// All methods belong to one goroutine at a time. Init must come first.
type Wheel[T any] struct {
	node  func(*T) *Node[T]
	tick  int64 // length of a tick, nanoseconds
	done  int64 // number of the last tick that Advance passed
	count int
	slots [Slots]*T // heads of the lists of items, by the number of their tick modulo Slots
}

// Node links an item into a [Wheel]. It is a field of the item. The zero Node is on no wheel.
type Node[T any] struct {
	due        int64 // begin of the tick in which the item is due; 0 if it is on no wheel
	prev, next *T
}

// Due returns when the wheel gives the item out, in the time of [Wheel.Advance], and 0 if the item is on no wheel.
func (n *Node[T]) Due() int64 { return n.due }

// Init makes w an empty wheel with time 0. The length of a tick is at least a nanosecond. node returns the Node of an
// item; with it, a Node needs no pointer to its item.
func (w *Wheel[T]) Init(tick time.Duration, node func(*T) *Node[T]) {
	*w = Wheel[T]{node: node, tick: int64(max(tick, 1))}
}

// Len returns the number of items on the wheel.
func (w *Wheel[T]) Len() int { return w.count }

// Set puts x on the wheel so that Advance gives it out in the first tick that begins after at, or earlier if at is
// further ahead than the wheel reaches. If x is on the wheel and due earlier, Set does nothing.
func (w *Wheel[T]) Set(x *T, at int64) {
	n := w.node(x)
	due := min(max(at/w.tick+1, w.done+1), w.done+Slots-1) * w.tick
	if n.due != 0 {
		if n.due <= due {
			return
		}
		w.Remove(x)
	}
	head := w.slot(due)
	n.due, n.prev, n.next = due, nil, *head
	if *head != nil {
		w.node(*head).prev = x
	}
	*head = x
	w.count++
}

// Remove takes x off the wheel. If x is not on it, Remove does nothing.
func (w *Wheel[T]) Remove(x *T) {
	n := w.node(x)
	if n.due == 0 {
		return
	}
	if n.prev != nil {
		w.node(n.prev).next = n.next
	} else {
		*w.slot(n.due) = n.next
	}
	if n.next != nil {
		w.node(n.next).prev = n.prev
	}
	*n = Node[T]{}
	w.count--
}

// Advance takes every item that is due at now off the wheel and calls f for it, one tick after the other. f may Set and
// Remove any item, also x. now must not be smaller than that of an earlier call.
func (w *Wheel[T]) Advance(now int64, f func(x *T)) {
	until := now / w.tick
	if until-w.done > Slots { // it slept through a round: everything is due
		w.done = until - Slots
	}
	for w.done < until {
		w.done++
		for head := &w.slots[w.done%Slots]; *head != nil; {
			x := *head
			w.Remove(x)
			f(x)
		}
	}
}

// All yields every item on the wheel, in no order. Each may be removed once it was yielded.
func (w *Wheel[T]) All() iter.Seq[*T] {
	return func(yield func(*T) bool) {
		for _, x := range w.slots {
			for x != nil {
				next := w.node(x).next
				if !yield(x) {
					return
				}
				x = next
			}
		}
	}
}

// slot returns the head of the list of items that are due at due, which is the begin of a tick.
func (w *Wheel[T]) slot(due int64) **T { return &w.slots[due/w.tick%Slots] }
