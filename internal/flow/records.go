package flow

import (
	"slices"
	"sync/atomic"
)

// Records shares memory among the records that streams put together from pieces. A record that finds no room waits for
// it, so its stream reads nothing more, gives no credit, and its sender stops.
//
//   - A peer's records may hold as much as is free beside them (Choudhury and Hahne, "Dynamic queue length thresholds
//     for shared-memory packet switches", 1998). So one peer leaves half of the memory to others, two leave a third.
//   - One record has the ticket. It may hold memory beyond the budget, up to the bound of one record, so it can always
//     be completed. Then the ticket passes to a record of another peer if there is one: one that waits, or otherwise
//     one that proceeds, which may have to wait next. A peer without a record that waits at this moment would otherwise
//     miss its turn.
//   - A record that does not proceed, while others wait, is overdue. See [Records.Overdue].
//
// K identifies a stream and P its peer. Times are nanoseconds of one monotonic clock. Any goroutine may call a Records
// with the lock around it, recordRoom.mu of package stream. NewRecords makes one.
type Records[K, P comparable] struct {
	budget int64
	held   *atomic.Int64 // bytes that all these records hold
	beside *atomic.Int64 // bytes that the owner uses of the budget beside them
	begun  map[K]*begun[P]
	peers  map[P]int64 // bytes that the records of each peer hold
	queue  []K         // waiting records, in the order of their arrival
	ticket K           // zero if no record has it
	last   P           // peer of the record that had the ticket last
}

// begun is a record with at least one arrived piece.
type begun[P comparable] struct {
	peer  P
	held  int64
	due   int64 // when it is overdue for a record of another peer
	took  int64 // when it took bytes last
	want  int64 // bytes that it waits for, 0 if it does not wait
	asked int64 // when it asked for them
}

// Bounds of a record that others wait for. The patience is long beside what a peer needs to answer, and the rate is
// that of a line on which the largest default record takes four minutes. Streams of one peer may share a slow line, on
// which a packet of one waits for the packets of all others. So if only records of the same peer wait, one proceeds as
// long as it takes any bytes within a minute.
const (
	recordPatience          = 10 * second
	recordPatienceAfterWait = recordPatience / 4
	recordRate              = 64 << 10 // bytes a second
	ownRecordPatience       = 60 * second
	justNow                 = second // longer than a round trip
)

// NewRecords returns a Records for a budget. It counts in held what the records hold. beside is what others use of the
// budget.
func NewRecords[K, P comparable](budget int64, held, beside *atomic.Int64) Records[K, P] {
	return Records[K, P]{budget: budget, held: held, beside: beside, begun: make(map[K]*begun[P]), peers: make(map[P]int64)}
}

// Take takes n bytes for the record of stream k, which peer sends. It reports false if the record has to wait. The
// bytes are taken when the wait ends.
func (r *Records[K, P]) Take(k K, peer P, n, now int64) bool {
	b := r.begun[k]
	if b == nil {
		b = &begun[P]{peer: peer, due: now + recordPatience}
		r.begun[k] = b
	}
	b.want, b.asked = n, now
	if r.mayHold(b) {
		r.grant(b, now)
		return true
	}
	r.queue = append(r.queue, k)
	r.passTicket(now)
	return b.want == 0
}

// Move records that peer sends the record of stream k, if there is one. It may have begun before its peer was known.
func (r *Records[K, P]) Move(k K, peer P) {
	b := r.begun[k]
	if b == nil || b.peer == peer {
		return
	}
	r.leave(b)
	r.peers[peer] += b.held
	b.peer = peer
}

// leave takes the bytes of b out of those of its peer.
func (r *Records[K, P]) leave(b *begun[P]) {
	if r.peers[b.peer] -= b.held; r.peers[b.peer] == 0 {
		delete(r.peers, b.peer)
	}
}

// Waits reports whether the record of stream k waits.
func (r *Records[K, P]) Waits(k K) bool {
	b := r.begun[k]
	return b != nil && b.want != 0
}

// Withdraw ends the wait of the record of stream k, which keeps the bytes that it has. It reports whether the record
// had got its bytes before. Otherwise the stream asks again with Take.
func (r *Records[K, P]) Withdraw(k K) bool {
	b := r.begun[k]
	if b == nil {
		return false
	}
	if b.want != 0 {
		r.unqueue(k)
		b.want = 0
		return false
	}
	return true
}

// Waiting reports whether any record waits.
func (r *Records[K, P]) Waiting() bool { return len(r.queue) > 0 }

// Done ends the record of stream k, which is complete or given up. It appends the streams that need not wait any longer
// to woken.
func (r *Records[K, P]) Done(k K, now int64, woken []K) []K {
	b := r.begun[k]
	if b == nil {
		return woken
	}
	delete(r.begun, k)
	if b.want != 0 {
		r.unqueue(k)
	}
	r.held.Add(-b.held)
	r.leave(b)
	var none K
	if r.ticket == k {
		r.ticket, r.last = none, b.peer
	}
	return r.Admit(now, woken)
}

// Admit grants waiting records their bytes while there is room, in their order, and appends their streams to woken.
func (r *Records[K, P]) Admit(now int64, woken []K) []K {
	if len(r.queue) == 0 {
		return woken
	}
	if r.left() > 0 {
		r.queue = slices.DeleteFunc(r.queue, func(k K) bool {
			b := r.begun[k]
			if !r.mayHold(b) {
				return false
			}
			r.grant(b, now)
			woken = append(woken, k)
			return true
		})
	}
	if k, ok := r.passTicket(now); ok {
		woken = append(woken, k)
	}
	return woken
}

// Overdue appends the streams to end because their records do not proceed while others wait. A record has a patience,
// which grows with the bytes that arrived. It is shorter if a record of another peer waits.
func (r *Records[K, P]) Overdue(now int64, overdue []K) []K {
	if len(r.queue) == 0 {
		return overdue
	}
	first, several := r.begun[r.queue[0]].peer, false
	for _, k := range r.queue {
		several = several || r.begun[k].peer != first
	}
	for k, b := range r.begun {
		late := now-b.took > ownRecordPatience
		if several || b.peer != first {
			late = now > b.due
		}
		if b.want == 0 && late {
			overdue = append(overdue, k)
		}
	}
	return overdue
}

// mayHold reports whether b may take the bytes that it waits for.
func (r *Records[K, P]) mayHold(b *begun[P]) bool {
	return r.holdsTicket(b) || r.peers[b.peer]+b.want <= r.left()-b.want
}

// left returns how much of the budget is not in use.
func (r *Records[K, P]) left() int64 { return r.budget - r.held.Load() - r.beside.Load() }

func (r *Records[K, P]) holdsTicket(b *begun[P]) bool {
	t := r.begun[r.ticket]
	return t != nil && t == b
}

func (r *Records[K, P]) grant(b *begun[P], now int64) {
	r.held.Add(b.want)
	r.peers[b.peer] += b.want
	b.held += b.want
	if now > b.asked { // its peer may have sent nothing meanwhile
		b.due = max(b.due, now+recordPatienceAfterWait)
	}
	b.due += b.want * second / recordRate
	b.took = now
	b.want = 0
}

// passTicket gives a free ticket to a record if any waits. It reports whether that record need not wait any longer.
func (r *Records[K, P]) passTicket(now int64) (k K, woken bool) {
	var none K
	if r.ticket != none || len(r.queue) == 0 {
		return none, false
	}
	i := slices.IndexFunc(r.queue, func(k K) bool { return r.begun[k].peer != r.last })
	if i < 0 {
		if r.ticket = r.proceeding(now); r.ticket != none {
			return none, false
		}
		i = 0
	}
	k = r.queue[i]
	r.queue = slices.Delete(r.queue, i, i+1)
	r.ticket = k
	r.grant(r.begun[k], now)
	return k, true
}

// proceeding returns the largest record that took bytes just now, of another peer than the last with the ticket. It
// returns zero if there is none.
func (r *Records[K, P]) proceeding(now int64) (largest K) {
	held := int64(0)
	for k, b := range r.begun {
		if b.peer != r.last && b.held > held && now-b.took <= justNow {
			largest, held = k, b.held
		}
	}
	return largest
}

func (r *Records[K, P]) unqueue(k K) {
	if i := slices.Index(r.queue, k); i >= 0 {
		r.queue = slices.Delete(r.queue, i, i+1)
	}
}
