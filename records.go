package stream

import (
	"sync"

	"github.com/natsstream/stream/internal/flow"
)

// This file shares the memory for records in pieces. The readers of such records run it. The outbox runs checkRecords.
// Any goroutine may run recordDone and dropPartial. recordRoom.mu guards the fields of recordRoom.

// recordRoom is the memory for records in pieces. All streams of an endpoint share it.
type recordRoom struct {
	mu      sync.Mutex
	records flow.Records[*session, *remote]
	looked  int64 // when the outbox last looked for overdue records
}

// recordLook is the time between two looks for overdue records, in nanoseconds: a tenth of the shortest patience.
const recordLook = int64(1e9)

// waits reports whether the record of s waits.
func (r *recordRoom) waits(s *session) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.records.Waits(s)
}

// withdraw ends the wait of the record of s. It reports whether the record got its bytes before.
func (r *recordRoom) withdraw(s *session) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.records.Withdraw(s)
}

// move assigns the record of s to its peer, which is known now. Before, the record counted as one of another peer. The
// outbox calls it after it has stored s.remote, so a record that begins at this moment finds the peer.
func (r *recordRoom) move(s *session, p *remote) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.records.Move(s, p)
}

// recordDone gives the bytes of the record of s back. Any goroutine may call it.
func (s *session) recordDone() {
	r := &s.ep.room
	r.mu.Lock()
	woken := r.records.Done(s, s.ep.clock.Load(), nil)
	r.mu.Unlock()
	wakeReaders(woken)
}

// checkRecords wakes readers of records for which there is room now, because windows became smaller. It ends streams
// with records that do not proceed while others wait. The outbox calls it at each tick.
func (o *outbox) checkRecords() {
	r, now := &o.ep.room, o.ep.clock.Load()
	r.mu.Lock()
	woken := r.records.Admit(now, nil)
	var overdue []*session
	if r.records.Waiting() && now-r.looked >= recordLook {
		r.looked = now
		overdue = r.records.Overdue(now, nil)
	}
	r.mu.Unlock()
	wakeReaders(woken)
	for _, s := range overdue {
		e := protocolError(CloseTryAgainLater, "a record in pieces did not proceed while others waited for its memory")
		s.requestEnd(&ending{kind: endLocal, err: e, reset: *e})
	}
}

// dropPartial drops the record that a read began and kept at its deadline. Its bytes go back to the budget.
func (s *session) dropPartial(x *extras) {
	if x.partial.Swap(nil) != nil {
		s.recordDone()
	}
}

func wakeReaders(woken []*session) {
	for _, s := range woken {
		s.bucket.park.Wake()
	}
}
