package main

import (
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/natsstream/stream/internal/load"
)

// idle is the memory of one idle stream at both ends together, with the NATS server's share, and the work that idle
// streams make.
type idle struct {
	Name        string
	Streams     int
	Bytes       float64 // heap and stacks
	Goroutines  float64
	ResidentMiB float64 // of the whole process, if the system tells
	Core        float64 // share of one core that the process uses while the streams are idle
	Opening     float64 // seconds to open the streams
	Ended       int     // streams that ended by themselves
	outcome
}

// idleStreams are open streams without records.
type idleStreams struct {
	closer func()
	// alive counts the streams that are still open at both of their ends. nil: the rival does not tell.
	alive func() int
}

// openTime is about the time that n idle streams take to open.
func openTime(n int) time.Duration { return time.Second + time.Duration(n)*100*time.Microsecond }

// planIdle returns about how long measureIdle takes.
func planIdle(n int, hold time.Duration) time.Duration { return openTime(n) + openTime(n)/2 + hold }

// measureIdle opens n streams, compares the process before and after, and watches it for the time hold.
func measureIdle(e *env, h holder, n int, hold time.Duration) idle {
	found := idle{Name: h.name, Streams: n}
	e = e.fresh()
	open := func(n int) (idleStreams, error) {
		return within(openLimit+10*openTime(n), "to open the streams", func() (idleStreams, error) { return h.open(e, n) },
			func(s idleStreams) { _ = closeWithin(closeLimit, s.closer) })
	}
	// A million streams may take longer to end than a few, and the next cell has to wait for that.
	end := func(s idleStreams) error { return errors.Join(closeWithin(closeLimit+openTime(n), s.closer), e.err()) }
	// The first streams cause allocations that are made once.
	warm, err := open(min(100, n))
	if err = errors.Join(err, end(warm)); err != nil {
		found.Reason = err.Error()
		return found
	}
	debug.FreeOSMemory() // memory of earlier cells is not resident because of these streams
	before, start := inUse(), time.Now()
	s, err := open(n)
	if err != nil {
		found.Reason = errors.Join(err, end(s)).Error()
		return found
	}
	found.Opening = time.Since(start).Seconds()
	// Both ends know a stream soon after it was opened.
	for known := time.Now(); s.alive != nil && s.alive() < n && time.Since(known) < patience; {
		time.Sleep(time.Millisecond)
	}
	after := inUse()
	found.Bytes = float64(after.bytes-before.bytes) / float64(n)
	found.Goroutines = float64(after.goroutines-before.goroutines) / float64(n)
	if hold > 0 {
		cpu, start := load.CPUTime(), time.Now()
		time.Sleep(hold)
		found.Core = (load.CPUTime() - cpu).Seconds() / time.Since(start).Seconds()
	}
	found.ResidentMiB = residentMiB()
	if s.alive != nil {
		if found.Ended = n - s.alive(); found.Ended > 0 {
			found.Notes = append(found.Notes, fmt.Sprintf("%d of %d streams ended by themselves", found.Ended, n))
		}
	}
	if err := end(s); err != nil {
		found.Notes = append(found.Notes, err.Error())
	}
	return found
}

type usage struct{ bytes, goroutines int64 }

func inUse() usage {
	runtime.GC()
	runtime.GC() // the first one empties the pools, this one frees their former contents
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return usage{int64(m.HeapInuse + m.StackInuse), int64(runtime.NumGoroutine())}
}
