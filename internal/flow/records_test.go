package flow

import (
	"slices"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"
)

func newRecords(budget int64) (Records[int, string], *atomic.Int64) {
	held := new(atomic.Int64)
	return NewRecords[int, string](budget, held, new(atomic.Int64)), held
}

// TestRecordsShare: a peer takes as much as it leaves free, the first that finds nothing has the ticket, and others
// wait until something is given back.
func TestRecordsShare(t *testing.T) {
	r, held := newRecords(100)
	r.beside.Add(10)
	take := func(k int, peer string, n int64, want bool) {
		t.Helper()
		if got := r.Take(k, peer, n, 0); got != want || r.Waits(k) == want {
			t.Errorf("record %d of %s takes %d: %v, want %v", k, peer, n, got, want)
		}
	}
	take(1, "a", 30, true)
	take(2, "a", 15, true) // half of 90
	take(3, "b", 20, true) // there is room for another peer
	take(2, "a", 1, true)  // the ticket
	take(1, "a", 30, false)
	take(4, "a", 30, false)
	take(5, "c", 30, false)
	take(2, "a", 200, true) // beyond the budget
	if n := held.Load(); n != 30+15+20+1+200 {
		t.Errorf("%d are in use", n)
	}
	if woken := r.Done(2, 0, nil); !slices.Equal(woken, []int{5}) {
		t.Errorf("%v go on, want 5: it is of another peer than the last that had the ticket", woken)
	}
	if woken := r.Done(5, 0, nil); !slices.Equal(woken, []int{1}) {
		t.Errorf("%v go on, want 1: it is the first", woken)
	}
	if woken := r.Done(4, 0, nil); len(woken) != 0 {
		t.Errorf("%v go on because one that waited ended", woken)
	}
	r.Done(1, 0, nil)
	r.Done(3, 0, nil)
	if n := held.Load(); n != 0 || r.Waiting() {
		t.Errorf("%d are in use at the end, records wait: %v", n, r.Waiting())
	}
}

// TestRecordsAdmit: memory that is given back beside the records lets them go on.
func TestRecordsAdmit(t *testing.T) {
	r, _ := newRecords(100)
	r.beside.Store(100)
	if !r.Take(1, "a", 50, 0) || r.Take(2, "b", 20, 0) {
		t.Fatal("the first record has the ticket, and the second waits")
	}
	r.beside.Add(-100)
	if woken := r.Admit(0, nil); !slices.Equal(woken, []int{2}) || r.Waiting() {
		t.Errorf("%v go on, want 2", woken)
	}
}

// TestRecordsOverdue: a record that does not proceed is overdue only while others wait, and sooner if these are of
// another peer.
func TestRecordsOverdue(t *testing.T) {
	for _, tt := range []struct {
		name    string
		waiting string // peer of the record that waits
		after   int64
		overdue bool
	}{
		{"nobody waits", "", 1000 * second, false},
		{"another peer waits, soon", "b", recordPatience, false},
		{"another peer waits", "b", recordPatience + 2*second, true},
		{"its own peer waits", "a", recordPatience + 2*second, false},
		{"its own peer waits long", "a", ownRecordPatience + 70*second, true},
	} {
		r, _ := newRecords(1)
		r.Take(1, "a", recordRate, 0)
		if tt.waiting != "" {
			r.Take(2, tt.waiting, 1, 0)
		}
		got := r.Overdue(tt.after, nil)
		if want := tt.overdue; slices.Equal(got, []int{1}) != want || len(got) > 1 {
			t.Errorf("%s: %v overdue, want record 1: %v", tt.name, got, want)
		}
	}
}

// TestRecordsAfterTheirWait: the time that a record waits for memory is not held against it.
func TestRecordsAfterTheirWait(t *testing.T) {
	for _, peers := range [][]string{{"a", "a", "a"}, {"a", "b", "c"}} {
		r, _ := newRecords(100)
		r.Take(1, peers[0], 90, 0)  // the ticket
		r.Take(2, peers[1], 90, 0)  // waits
		r.Take(3, peers[2], 200, 0) // waits
		const long = 10 * ownRecordPatience
		if woken := r.Done(1, long, nil); !slices.Equal(woken, []int{2}) {
			t.Fatalf("%v go on, want 2", woken)
		}
		if got := r.Overdue(long+recordPatienceAfterWait, nil); len(got) != 0 {
			t.Errorf("peers %v: %v overdue, though its wait has just ended", peers, got)
		}
		if got := r.Overdue(long+ownRecordPatience+second, nil); !slices.Equal(got, []int{2}) {
			t.Errorf("peers %v: %v overdue, want 2", peers, got)
		}
	}
}

// TestTicketGoesRound: the ticket passes to a record of another peer also if that one does not wait at the moment, but
// not to one that brings nothing.
func TestTicketGoesRound(t *testing.T) {
	for _, c := range []struct {
		name  string
		later int64 // when the first record with the ticket ends
		want  int
	}{
		{"proceeds", justNow, 3},
		{"stands still", justNow + 1, 2},
	} {
		r, _ := newRecords(100)
		r.Take(1, "a", 90, 0) // the ticket
		r.Take(2, "a", 90, 0) // waits
		r.Take(3, "b", 1, 0)
		woken := r.Done(1, c.later, nil)
		if r.ticket != c.want || len(woken) != 3-c.want {
			t.Errorf("another peer's record %s: record %d has the ticket, want %d; %v go on", c.name, r.ticket, c.want, woken)
		}
		if took := r.Take(3, "b", 500, c.later); took != (c.want == 3) {
			t.Errorf("another peer's record %s: it may exceed the budget: %v", c.name, took)
		}
	}
}

// TestRecordsOfOneSlowPeer: records of one peer that take little at a time, on a slow line, are not overdue for each
// other.
func TestRecordsOfOneSlowPeer(t *testing.T) {
	r, _ := newRecords(1)
	r.Take(1, "a", 1, 0) // the ticket
	r.Take(2, "a", 1, 0) // waits
	now := int64(0)
	for range 1000 {
		now += ownRecordPatience
		if got := r.Overdue(now, nil); len(got) != 0 {
			t.Fatalf("%v overdue after %d s", got, now/second)
		}
		r.Take(1, "a", 1, now)
	}
}

// TestRecordsMove: a record that begins before its peer is known counts as one of that peer from then on.
func TestRecordsMove(t *testing.T) {
	r, held := newRecords(1)
	r.Take(1, "", recordRate, 0) // the ticket
	r.Take(2, "a", 1, 0)         // waits
	r.Move(1, "a")
	r.Move(3, "a") // has not begun
	if got := r.Overdue(recordPatience+2*second, nil); len(got) != 0 {
		t.Errorf("%v overdue, although only a record of its peer waits", got)
	}
	if len(r.peers) != 1 || r.peers["a"] != recordRate {
		t.Errorf("the peers hold %v", r.peers)
	}
	r.Done(1, 0, nil)
	r.Done(2, 0, nil)
	if len(r.peers) != 0 || held.Load() != 0 {
		t.Errorf("at the end the peers hold %v, all %d", r.peers, held.Load())
	}
}

// TestRecordsAlwaysProceed: whatever happens, some record need not wait, beyond the budget is no more than one record,
// and nothing is left at the end.
func TestRecordsAlwaysProceed(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const budget, most = 1000, 3000
		r, held := newRecords(budget)
		sizes := map[int]int64{} // of the records that were begun
		granted := map[int]int64{}
		ticket := int64(0)
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			k := rapid.IntRange(1, 12).Draw(t, "record")
			switch {
			case rapid.IntRange(0, 3).Draw(t, "step") == 0:
				for _, other := range r.Done(k, 0, nil) {
					granted[other] = sizes[other]
				}
				delete(sizes, k)
				delete(granted, k)
			case r.Waits(k):
			case sizes[k] < most:
				n := rapid.Int64Range(1, most-sizes[k]).Draw(t, "n")
				sizes[k] += n
				if r.Take(k, string(rune('a'+k%3)), n, 0) {
					granted[k] = sizes[k]
				}
			}
			sum, waiting := int64(0), 0
			for k, n := range granted {
				sum += n
				if r.Waits(k) != (n != sizes[k]) {
					t.Fatalf("record %d waits: %v", k, r.Waits(k))
				}
			}
			for k := range sizes {
				if r.Waits(k) {
					waiting++
				}
			}
			ticket = granted[r.ticket]
			if held.Load() != sum || sum > budget+most {
				t.Fatalf("%d in use, want %d, at most %d", held.Load(), sum, budget+ticket)
			}
			if waiting > 0 && waiting == len(sizes) {
				t.Fatalf("all of %d records wait", waiting)
			}
		}
		for k := range 13 {
			r.Done(k, 0, nil)
		}
		if held.Load() != 0 || r.Waiting() || len(r.begun) != 0 || len(r.peers) != 0 {
			t.Fatalf("%d are in use at the end", held.Load())
		}
	})
}
