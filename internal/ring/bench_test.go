package ring_test

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/natsstream/stream/internal/ring"
)

// BenchmarkPushPop measures a Push and a Pop by one goroutine, depth elements
// at a time.
func BenchmarkPushPop(b *testing.B) {
	for _, depth := range []int{1, 32, 256} {
		b.Run(fmt.Sprintf("goroutines=1/depth=%d", depth), func(b *testing.B) {
			var r ring.Ring[*item]
			r.Init(256)
			v := new(item)
			b.ReportAllocs()
			for n := 0; n < b.N; n += depth {
				for range depth {
					r.Push(v)
				}
				for range depth {
					r.Pop()
				}
			}
		})
	}
	// Both sides at once; the figure is the time from one element to the next.
	// A consumer that polls an empty ring takes the line of every element out of
	// the producer's hands, so what it measures is the way between two cores.
	// One that lets a few elements gather, as a woken one does, measures the ring.
	for _, limit := range []int{32, 256, 4096} {
		for _, mode := range []string{"poll", "gather"} {
			b.Run(fmt.Sprintf("goroutines=2/limit=%d/mode=%s", limit, mode), func(b *testing.B) {
				twoSides(b, limit, mode == "gather")
			})
		}
	}
}

func twoSides(b *testing.B, limit int, gather bool) {
	var r ring.Ring[*item]
	r.Init(limit)
	v := new(item)
	var done atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for !done.Load() {
			for r.Push(v) {
			}
			runtime.Gosched()
		}
	})
	b.ReportAllocs()
	for b.Loop() {
		_, ok := r.Pop()
		for !ok {
			runtime.Gosched()
			if gather {
				for range 8 {
					runtime.Gosched()
				}
			}
			_, ok = r.Pop()
		}
	}
	done.Store(true)
	wg.Wait()
}

// BenchmarkPush and BenchmarkPop measure one side alone, the other being
// outside the timer; a backlog that large needs a new segment every 4096.
func BenchmarkPush(b *testing.B) { oneSide(b, true) }
func BenchmarkPop(b *testing.B)  { oneSide(b, false) }

func oneSide(b *testing.B, push bool) {
	const depth = 1 << 14
	var r ring.Ring[*item]
	r.Init(depth)
	v := new(item)
	b.ReportAllocs()
	b.StopTimer()
	for n := 0; n < b.N; n += depth {
		if push {
			b.StartTimer()
		}
		for range depth {
			r.Push(v)
		}
		if push {
			b.StopTimer()
		} else {
			b.StartTimer()
		}
		for range depth {
			r.Pop()
		}
		if !push {
			b.StopTimer()
		}
	}
}

// BenchmarkChannel is the ordinary means, for comparison.
func BenchmarkChannel(b *testing.B) {
	c := make(chan *item, 256)
	v := new(item)
	for n := 0; n < b.N; n += 32 {
		for range 32 {
			c <- v
		}
		for range 32 {
			<-c
		}
	}
}
