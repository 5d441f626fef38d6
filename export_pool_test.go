package stream

import (
	"runtime"
	"sync/atomic"
	"time"
)

// PoisonFreePackets overwrites the packets that lie in the pools, again and again, until the function it returns is
// called, which reports how many it overwrote. A packet in a pool is nobody's: who reads one there, or still has it
// published, finds poison, and under the race detector is reported.
func PoisonFreePackets() (stop func() int64) {
	var (
		count int64
		quit  atomic.Bool
		done  = make(chan struct{})
	)
	go func() {
		defer close(done)
		for !quit.Load() {
			for c := range packetPools {
				var taken [8]*packet
				for i := range taken {
					p, _ := packetPools[c].Get().(*packet)
					if p == nil {
						break
					}
					for k := range p.buf {
						p.buf[k] = 0xDD
					}
					taken[i] = p
					count++
				}
				for _, p := range taken {
					if p != nil {
						packetPools[c].Put(p) // still marked as free
					}
				}
			}
			runtime.Gosched()
			time.Sleep(20 * time.Microsecond)
		}
	}()
	return func() int64 {
		quit.Store(true)
		<-done
		return count
	}
}
