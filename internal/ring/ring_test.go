package ring_test

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"weak"

	"github.com/natsstream/stream/internal/ring"
)

// item stands in for *nats.Msg: a pointer, and large enough not to be packed
// with others by the tiny allocator, which would disturb weak pointers.
type item struct {
	n uint32
	_ [28]byte
}

func newRing(limit int) *ring.Ring[*item] {
	r := new(ring.Ring[*item])
	r.Init(limit)
	return r
}

func TestZeroValue(t *testing.T) {
	var r ring.Ring[*item]
	if r.Push(new(item)) {
		t.Error("the zero Ring accepted an element")
	}
	if _, ok := r.Pop(); ok || !r.Empty() || r.Len() != 0 || r.Pushed() != 0 {
		t.Error("the zero Ring is not empty")
	}
}

func TestLimit(t *testing.T) {
	for _, limit := range []int{-1, 0, 1, 2, 3, 4, 5, 31, 32, 33, 1000, 4095, 4096, 4097, 10_000, 1 << 20} {
		t.Run(fmt.Sprintf("limit=%d", limit), func(t *testing.T) {
			r := newRing(limit)
			want := max(limit, 0)
			for lap := range 3 {
				for i := range want {
					if !r.Push(&item{n: uint32(i)}) {
						t.Fatalf("lap %d: Push %d refused", lap, i)
					}
				}
				if r.Push(new(item)) {
					t.Fatalf("lap %d: Push accepted beyond the limit", lap)
				}
				if r.Len() != want || r.Pushed() != uint32(want*(lap+1)) {
					t.Fatalf("lap %d: Len %d, Pushed %d", lap, r.Len(), r.Pushed())
				}
				for i := range want {
					if r.Empty() {
						t.Fatalf("lap %d: Empty before Pop %d", lap, i)
					}
					if v, ok := r.Pop(); !ok || v.n != uint32(i) {
						t.Fatalf("lap %d: Pop %d = %v, %v", lap, i, v, ok)
					}
				}
				if v, ok := r.Pop(); ok || v != nil || !r.Empty() {
					t.Fatalf("lap %d: Pop of an empty ring = %v, %v", lap, v, ok)
				}
			}
		})
	}
}

func TestSetLimit(t *testing.T) {
	r := newRing(2)
	push := func(want bool) {
		t.Helper()
		if r.Push(new(item)) != want {
			t.Fatalf("Push = %v with %d queued", !want, r.Len())
		}
	}
	push(true)
	push(true)
	push(false)
	r.SetLimit(3)
	push(true)
	push(false)
	r.SetLimit(1) // full now and until two have gone
	push(false)
	for range 3 {
		r.Pop()
	}
	push(true)
	push(false)
}

// TestOracle compares a ring with a slice over random operations.
func TestOracle(t *testing.T) {
	rounds := 300
	if testing.Short() {
		rounds = 30
	}
	for seed := range rounds {
		rnd := rand.New(rand.NewPCG(uint64(seed), 1))
		limit := 1 + rnd.IntN(1<<rnd.IntN(15))
		r := newRing(limit)
		var model []*item
		var pushed uint32
		for range 200 {
			n := 1 + rnd.IntN(1<<rnd.IntN(13))
			switch rnd.IntN(20) {
			case 0: // raise only: when a lower limit takes hold is left open
				limit += rnd.IntN(limit + 1)
				r.SetLimit(limit)
			case 1, 2, 3, 4, 5, 6, 7, 8, 9:
				for range n {
					v := &item{n: pushed}
					if ok := r.Push(v); ok != (len(model) < limit) {
						t.Fatalf("seed %d: Push = %v with %d of %d queued", seed, ok, len(model), limit)
					} else if ok {
						model = append(model, v)
						pushed++
					}
				}
			default:
				for range n {
					v, ok := r.Pop()
					if ok != (len(model) > 0) {
						t.Fatalf("seed %d: Pop = %v with %d queued", seed, ok, len(model))
					}
					if !ok {
						break
					}
					if v != model[0] {
						t.Fatalf("seed %d: Pop = %d, want %d", seed, v.n, model[0].n)
					}
					model = model[1:]
				}
			}
			if r.Len() != len(model) || r.Empty() != (len(model) == 0) || r.Pushed() != pushed {
				t.Fatalf("seed %d: Len %d, Empty %v, Pushed %d; want %d queued, %d pushed",
					seed, r.Len(), r.Empty(), r.Pushed(), len(model), pushed)
			}
		}
	}
}

// TestHammer runs both sides of several rings at once on all cores, with the
// garbage collector moving in between and a fourth party reading the counters.
func TestHammer(t *testing.T) {
	rounds, count := 27, uint32(20_000)
	if testing.Short() {
		rounds = 4
	}
	limits := []int{1, 2, 3, 4, 7, 32, 256, 5000, 1 << 20}
	var done atomic.Bool
	var gc sync.WaitGroup
	gc.Go(func() {
		for !done.Load() {
			runtime.GC()
		}
	})
	for round := range rounds {
		var wg sync.WaitGroup
		for pair := range max(1, runtime.GOMAXPROCS(0)/2) {
			limit := limits[(round+pair)%len(limits)]
			hammer(t, &wg, limit, count, uint64(round*100+pair))
		}
		wg.Wait()
	}
	done.Store(true)
	gc.Wait()
}

func hammer(t *testing.T, wg *sync.WaitGroup, limit int, count uint32, seed uint64) {
	r := newRing(limit)
	// Either side runs at full speed for a while, then lets the other catch up,
	// so that the ring is full, empty and in between.
	pause := func(rnd *rand.Rand) {
		if rnd.IntN(64) == 0 {
			for range rnd.IntN(64) {
				runtime.Gosched()
			}
		}
	}
	wg.Go(func() {
		rnd := rand.New(rand.NewPCG(seed, 2))
		for i := range count {
			v := &item{n: i}
			for !r.Push(v) {
				runtime.Gosched()
			}
			if n := r.Pushed(); n != i+1 {
				t.Errorf("limit %d: Pushed %d after %d", limit, n, i+1)
			}
			if i == count/2 && limit < 8 { // grow under way
				r.SetLimit(limit * 8)
			}
			pause(rnd)
		}
	})
	wg.Go(func() {
		rnd := rand.New(rand.NewPCG(seed, 3))
		for i := range count {
			v, ok := r.Pop()
			for !ok {
				runtime.Gosched()
				v, ok = r.Pop()
			}
			if v == nil || v.n != i {
				t.Errorf("limit %d: Pop %d = %v", limit, i, v)
			}
			pause(rnd)
		}
		if v, ok := r.Pop(); ok || !r.Empty() {
			t.Errorf("limit %d: one too many: %v", limit, v)
		}
	})
	wg.Go(func() {
		for last := uint32(0); last < count; runtime.Gosched() {
			if n := r.Len(); n < 0 || n > int(count) {
				t.Errorf("limit %d: Len %d", limit, n)
			}
			n := r.Pushed()
			if n < last || n > count {
				t.Errorf("limit %d: Pushed %d after %d", limit, n, last)
			}
			last = n
		}
	})
}

// TestHammerGrowth sends both sides through many young rings, so that the
// consumer meets segments being linked, over and over, at every distance.
func TestHammerGrowth(t *testing.T) {
	const count = 250 // of each ring: 4+8+16+32+64+128 slots, where the consumer is slow
	rings := make([]ring.Ring[*item], 5000)
	if testing.Short() {
		rings = rings[:500]
	}
	items := make([]item, count)
	for i := range rings {
		rings[i].Init(1 << 20)
	}
	for i := range items {
		items[i].n = uint32(i)
	}
	var turn atomic.Int64 // the ring the consumer is at; keeps the two together
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range rings {
			for turn.Load() < int64(i) {
				runtime.Gosched()
			}
			for j := range items {
				if !rings[i].Push(&items[j]) {
					t.Errorf("ring %d: Push %d refused", i, j)
				}
			}
		}
	})
	wg.Go(func() {
		for i := range rings {
			turn.Store(int64(i))
			for j := range items {
				v, ok := rings[i].Pop()
				for n := 0; !ok; n++ {
					if n > 100 {
						runtime.Gosched()
					}
					v, ok = rings[i].Pop()
				}
				if v != &items[j] {
					t.Errorf("ring %d: Pop %d = %v", i, j, v)
					return
				}
			}
		}
	})
	wg.Wait()
}

// TestParking runs the protocol of the package comment; a lost wake-up hangs it.
func TestParking(t *testing.T) {
	count := uint32(100_000)
	if testing.Short() {
		count /= 10
	}
	r := newRing(64)
	var p ring.Parker
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range count {
			for !r.Push(&item{n: i}) {
				runtime.Gosched()
			}
			p.Wake()
			if i%7 == 0 { // let the consumer run dry
				runtime.Gosched()
			}
		}
	})
	done := make(chan struct{})
	wg.Go(func() {
		defer close(done)
		for i := range count {
			v, ok := r.Pop()
			for !ok {
				p.Announce()
				if r.Empty() {
					p.Wait()
				} else {
					p.Retract()
				}
				v, ok = r.Pop()
			}
			if v.n != i {
				t.Errorf("Pop %d = %d", i, v.n)
				return
			}
		}
	})
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatalf("lost wake-up: parked with %d queued after %d", r.Len(), r.Pushed())
	}
	wg.Wait()
}

// TestPopReleases: the ring must not keep a popped element alive.
func TestPopReleases(t *testing.T) {
	r := newRing(1000)
	const n = 700 // several segments
	var refs [n]weak.Pointer[item]
	for i := range refs {
		v := &item{n: uint32(i)}
		refs[i] = weak.Make(v)
		r.Push(v)
	}
	for range n / 2 {
		r.Pop()
	}
	runtime.GC()
	for i, ref := range refs {
		if alive := ref.Value() != nil; alive != (i >= n/2) {
			t.Fatalf("element %d: alive %v with %d popped", i, alive, n/2)
		}
	}
	runtime.KeepAlive(r)
}

// TestNoAllocation: after one burst the same load allocates nothing, and an
// idle ring has never allocated.
func TestNoAllocation(t *testing.T) {
	v := new(item)
	var r ring.Ring[*item]
	if n := mallocs(func() { r.Init(256); r.Pop(); r.Empty(); r.Len() }); n > 0 {
		t.Errorf("an idle ring made %d allocations", n)
	}
	lap := func() {
		for r.Push(v) {
		}
		for !r.Empty() {
			r.Pop()
		}
	}
	lap()
	const laps = 2000
	n := mallocs(func() {
		for range laps {
			lap()
		}
	})
	if per := float64(n) / (laps * 256); per > 0.0001 {
		t.Errorf("%.5f allocations per element", per)
	}
}

// mallocs counts the allocations of the whole process while f runs, the least
// of three tries, for the runtime itself allocates now and then.
func mallocs(f func()) uint64 {
	least := ^uint64(0)
	for range 3 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		f()
		runtime.ReadMemStats(&after)
		least = min(least, after.Mallocs-before.Mallocs)
	}
	return least
}
