package main

import (
	"fmt"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/natsstream/stream/internal/load"
)

// opens is the rate of open, one record, close.
type opens struct {
	Name       string
	Concurrent int
	Rate       float64 // per second
	Ratio      float64 // to nats.Request, median of the ratios of slices that ran one after the other
	CPU        float64 // microseconds of processor time each
	outcome
}

// planOpens returns about how long measureOpens takes.
func planOpens(o options) time.Duration {
	return time.Duration(len(askers())) * (o.slice/4 + time.Duration(o.rounds)*sliceTime(o.slice))
}

// measureOpens lets concurrent goroutines ask as fast as they can.
func measureOpens(e *env, o options, concurrent int) []opens {
	type contender struct {
		name       string
		ask        func([]byte) error
		env        *env
		rates, cpu []float64 // by round
		done       int
		failed     []string
	}
	var all []*contender
	for _, a := range askers() {
		c := &contender{name: a.name, env: e.fresh()}
		all = append(all, c)
		o.progress(a.name, o.slice/4)
		ask, closer, err := openAsker(a, c.env)
		if err == nil {
			c.ask = ask
			defer func() { _ = closeWithin(closeLimit, closer) }()
			_, err = askFor(ask, concurrent, o.slice/4, patience)
		}
		if err != nil {
			c.failed = append(c.failed, err.Error())
		}
	}
	for range o.rounds {
		for _, c := range all {
			o.progress(c.name, sliceTime(o.slice))
			rate, each := math.NaN(), math.NaN()
			if len(c.failed) == 0 {
				runtime.GC()
				cpu, start := load.CPUTime(), time.Now()
				n, err := askFor(c.ask, concurrent, o.slice, patience)
				if err == nil {
					err = c.env.err()
				}
				if err != nil {
					c.failed = append(c.failed, err.Error())
				} else {
					c.done++
					rate = float64(n) / time.Since(start).Seconds()
					each = float64((load.CPUTime() - cpu).Microseconds()) / float64(n)
				}
			}
			c.rates, c.cpu = append(c.rates, rate), append(c.cpu, each)
		}
	}
	var floor []float64
	for _, c := range all {
		if c.name == natsAskerName {
			floor = c.rates
		}
	}
	found := make([]opens, len(all))
	for i, c := range all {
		found[i] = opens{Name: c.name, Concurrent: concurrent, outcome: settle(c.done, c.failed)}
		if c.done > 0 {
			found[i].Rate, found[i].Ratio, found[i].CPU = median(c.rates), ratio(c.rates, floor), median(c.cpu)
		}
	}
	return found
}

func openAsker(a asker, e *env) (func([]byte) error, func(), error) {
	type opened struct {
		ask    func([]byte) error
		closer func()
	}
	x, err := within(openLimit, "to connect", func() (opened, error) {
		ask, closer, err := a.open(e)
		return opened{ask, closer}, err
	}, func(x opened) { _ = closeWithin(closeLimit, x.closer) })
	return x.ask, x.closer, err
}

// askFor lets concurrent goroutines ask for d, each at least once, and returns how many answers came. It waits for the
// last ones no longer than patience.
func askFor(ask func([]byte) error, concurrent int, d, patience time.Duration) (int, error) {
	question := make([]byte, 128)
	var n atomic.Int64
	var failed atomic.Pointer[error]
	var asking sync.WaitGroup
	end := time.Now().Add(d)
	for range concurrent {
		asking.Go(func() {
			for again := true; again; again = failed.Load() == nil && time.Now().Before(end) {
				if err := ask(question); err != nil {
					failed.CompareAndSwap(nil, &err)
					return
				}
				n.Add(1)
			}
		})
	}
	if _, err := within(d+patience, "an answer", func() (struct{}, error) { asking.Wait(); return struct{}{}, nil }, func(struct{}) {}); err != nil {
		return 0, fmt.Errorf("an answer is missing for more than %v", patience)
	}
	if err := failed.Load(); err != nil {
		return 0, *err
	}
	return int(n.Load()), nil
}
