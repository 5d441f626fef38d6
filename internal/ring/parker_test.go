package ring

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestParkerLosesNoWakeUp: one goroutine sleeps whenever there is nothing to do, others give it work. A wake-up that is
// lost shows as a test that hangs.
func TestParkerLosesNoWakeUp(t *testing.T) {
	const wakers = 4
	rounds := 200_000
	if testing.Short() {
		rounds /= 10
	}
	var p Parker
	var work, stop atomic.Int64
	var wg sync.WaitGroup
	for i := range wakers {
		wg.Go(func() {
			for n := range rounds {
				work.Add(1)
				p.Wake()
				if n%(100+i) == 0 { // now and then the sleeper gets to sleep
					runtime.Gosched()
				}
			}
		})
	}
	done := make(chan int64)
	go func() {
		var got int64
		for {
			got += work.Swap(0)
			if stop.Load() != 0 && work.Load() == 0 {
				done <- got
				return
			}
			p.Announce()
			if work.Load() == 0 && stop.Load() == 0 {
				p.Wait()
			} else {
				p.Retract()
			}
			if len(p.signal) != 0 {
				t.Error("a signal is left behind: the next wait would return for nothing")
			}
		}
	}()
	wg.Wait()
	stop.Store(1)
	p.Wake()
	select {
	case got := <-done:
		if want := int64(wakers * rounds); got != want {
			t.Errorf("%d pieces of work, want %d", got, want)
		}
	case <-time.After(time.Minute):
		t.Fatal("the sleeper was not woken")
	}
}

// TestParkerWakeWithoutSleeper: a Wake that finds no announcement does nothing, and does not shorten a later Wait.
func TestParkerWakeWithoutSleeper(t *testing.T) {
	var p Parker
	p.Wake()
	p.Wake()
	if len(p.signal) != 0 {
		t.Fatal("Wake left a signal, and nobody had announced to sleep")
	}
	p.Announce()
	p.Retract()
	p.Wake()
	if len(p.signal) != 0 {
		t.Fatal("Wake left a signal after the announcement was retracted")
	}
	p.Announce()
	p.Wake()
	p.Wake() // the second finds the announcement taken
	if len(p.signal) != 1 {
		t.Fatal("Wake left no signal for a sleeper that had announced itself")
	}
	p.Retract() // takes the signal of the waker that was faster
	if len(p.signal) != 0 {
		t.Fatal("Retract left the signal of a waker that was faster")
	}
}

// TestParkerDoesNotAllocate: neither side allocates, whether there is a sleeper or not.
func TestParkerDoesNotAllocate(t *testing.T) {
	var p Parker
	if n := testing.AllocsPerRun(1000, func() {
		p.Wake()
		p.Announce()
		p.Wake()
		p.Wait()
		p.Announce()
		p.Retract()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// TestParkerIsReplaced: wakers either wake the sleeper or do its work. One goroutine at a time owns the fields of the
// sleeper, and the race detector reports a second one. No work is left.
func TestParkerIsReplaced(t *testing.T) {
	const wakers = 4
	rounds := 100_000
	if testing.Short() {
		rounds /= 10
	}
	var p Parker
	var work, stop atomic.Int64
	var owned, replaced int64 // by the sleeper, or who does its work
	var wg sync.WaitGroup
	for i := range wakers {
		wg.Go(func() {
			for n := range rounds {
				work.Add(1)
				switch {
				case !p.Take():
				case (n+i)%3 == 0:
					p.Signal()
				default:
					got := work.Swap(0)
					owned += got
					replaced += got
					p.Announce()
					if work.Load() != 0 || stop.Load() != 0 {
						p.Wake()
					}
				}
				if n%(10+i) == 0 {
					runtime.Gosched()
				}
			}
		})
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			owned += work.Swap(0)
			if stop.Load() != 0 && work.Load() == 0 {
				return
			}
			p.Announce()
			if work.Load() == 0 && stop.Load() == 0 {
				p.Wait()
			} else {
				p.Retract()
			}
		}
	}()
	wg.Wait()
	stop.Store(1)
	p.Wake()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("the sleeper was not woken")
	}
	if want := int64(wakers * rounds); owned != want || replaced == 0 {
		t.Errorf("%d pieces of work, want %d; %d by others than the sleeper", owned, want, replaced)
	}
}
