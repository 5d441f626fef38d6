package load

import (
	"sync"
	"testing"
)

// TestWindow checks that no more than the limit is ever in flight and that no
// wake-up is lost, with several consumers releasing at once.
func TestWindow(t *testing.T) {
	n := 100_000
	if testing.Short() {
		n = 10_000
	}
	for _, limit := range []int{1, 2, 3, 64} {
		w := NewWindow(limit)
		records := make(chan struct{}, limit)
		var consumers sync.WaitGroup
		for range 3 {
			consumers.Go(func() {
				for range records {
					w.Release(1)
				}
			})
		}
		for i := range n {
			w.Acquire(t.Context().Done())
			select {
			case records <- struct{}{}:
			default:
				t.Fatalf("limit %d: record %d exceeds what may be in flight", limit, i)
			}
		}
		w.Drain(t.Context().Done())
		if got := w.consumed.Load(); got != int64(n) {
			t.Errorf("limit %d: drained after %d of %d records", limit, got, n)
		}
		close(records)
		consumers.Wait()
	}
}

// TestChecker checks that the measurement itself would notice a lost, repeated,
// foreign or cut record.
func TestChecker(t *testing.T) {
	record := func(stream int, seq uint64, size int) []byte {
		rec := NewRecord(size, stream)
		Stamp(rec, seq)
		return rec
	}
	c := Checker{Size: 32, Stream: 7}
	for seq := range uint64(3) {
		if rec := record(7, seq, 32); !c.OK(rec) {
			t.Fatal(c.ErrorFor(rec))
		}
	}
	for name, rec := range map[string][]byte{
		"lost":     record(7, 4, 32),
		"repeated": record(7, 2, 32),
		"foreign":  record(8, 3, 32),
		"cut":      record(7, 3, 31),
	} {
		if c.OK(rec) {
			t.Errorf("a %s record was not noticed", name)
		} else if c.ErrorFor(rec) == nil {
			t.Errorf("a %s record has no error", name)
		}
	}
}

func TestShare(t *testing.T) {
	for _, n := range []int{0, 1, 99, 100, 101, 12345} {
		sum := 0
		for i := range 100 {
			sum += Share(n, i, 100)
		}
		if sum != n {
			t.Errorf("the shares of %d records sum up to %d", n, sum)
		}
	}
}
