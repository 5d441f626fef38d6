package stream

import "sync/atomic"

// This file is the queue of sealed packets from the writers to the outbox. Writers run push with the lock of the packer,
// and so does the outbox if it seals a packet. Only the outbox runs take. empty touches one atomic.

// readyPackets are the sealed packets of a stream that the outbox has not taken yet, linked by packet.next. It needs no
// memory besides the packets: a ring would take 150 bytes of each idle stream.
type readyPackets struct {
	newest atomic.Pointer[packet] // a stack; the outbox takes all of it and reverses it
}

func (r *readyPackets) push(p *packet) {
	for {
		head := r.newest.Load()
		p.next = head // published by the swap below
		if r.newest.CompareAndSwap(head, p) {
			return
		}
	}
}

// take empties r and returns the packets, the oldest first.
func (r *readyPackets) take() (first *packet) {
	if r.empty() {
		return nil
	}
	for p := r.newest.Swap(nil); p != nil; {
		next := p.next
		p.next = first
		first, p = p, next
	}
	return first
}

func (r *readyPackets) empty() bool { return r.newest.Load() == nil }

// link makes a list of packets in the order in which they are given.
func link(packets []*packet) (first *packet) {
	for i := len(packets) - 1; i >= 0; i-- {
		packets[i].next = first
		first = packets[i]
	}
	return first
}
