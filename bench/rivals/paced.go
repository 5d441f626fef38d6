package main

import (
	"errors"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"

	"github.com/natsstream/stream/internal/load"
)

// paced is the latency of one rival at a given load: the time from when a record was due until its reader had it. A
// record that waits because the one before it was late counts from when it was due (coordinated omission).
type paced struct {
	Rival              string
	Size               int
	Streams            int
	Rate               int     // records per second, of all streams together
	Sent               float64 // records per second that were sent
	P50, P90, P99, Max float64 // microseconds
	P50Ratio, P99Ratio float64 // to plain NATS: medians of the ratios of runs that followed each other
	CPU                float64 // seconds of processor time per million records, of the whole process
	outcome
}

const (
	pacedSize = 128
	// grain is the shortest period of a pace. At higher rates several records are due together. Each wake-up by a timer
	// may cost 6 µs of processor time on a virtual machine, which would be a core at 100,000 records/s.
	grain = 100 * time.Microsecond
	// pacedRounds is into how many runs the time of a paced cell is divided for each rival. Between them the others
	// run.
	pacedRounds = 3
)

func (o options) pacedRivals() []rival {
	var all []rival
	for _, r := range o.chosen() {
		if !r.lossy {
			all = append(all, r)
		}
	}
	return all
}

// planPaced returns about how long measurePaced takes.
func planPaced(o options, streams int) time.Duration {
	return time.Duration(len(o.pacedRivals())) * (warmUpTime(streams) + o.paced + o.paced/4)
}

// measurePaced sends records at a rate, every rival in turn.
func measurePaced(e *env, o options, streams, rate int) []paced {
	type contender struct {
		*seat
		histogram *hdrhistogram.Histogram
		p50, p99  []float64 // by round
		sent      int
		took, cpu time.Duration
	}
	var all []*contender
	for _, r := range o.pacedRivals() {
		c := &contender{histogram: hdrhistogram.New(1, int64(time.Minute), 3)}
		c.seat = newSeat(e, r, pacedSize, streams, atPace, boundsOf(o.paced, warmUpTime(streams)+2*o.paced), func(s *session) error {
			_, _, err := s.pace(rate, o.paced/4, paceLimits(o.paced/4))
			return err
		})
		defer c.close()
		all = append(all, c)
		o.progress("open "+r.name, warmUpTime(streams)+o.paced/4)
		c.prepare()
	}
	for range pacedRounds {
		for _, c := range all {
			o.progress(c.rival.name, o.paced/pacedRounds)
			p50, p99 := math.NaN(), math.NaN()
			c.run(func(s *session) error {
				runtime.GC()
				cpu := load.CPUTime()
				r, delays, err := s.pace(rate, o.paced/pacedRounds, paceLimits(o.paced/pacedRounds))
				if err == nil && r.arrived() == 0 {
					err = errNothing
				}
				if err != nil {
					return err
				}
				c.cpu += load.CPUTime() - cpu
				c.sent, c.took = c.sent+r.sent, c.took+r.took
				one := hdrhistogram.New(1, int64(time.Minute), 3)
				for _, d := range delays {
					if err := errors.Join(one.RecordValue(max(d, 1)), c.histogram.RecordValue(max(d, 1))); err != nil {
						return err
					}
				}
				p50, p99 = float64(one.ValueAtPercentile(50)), float64(one.ValueAtPercentile(99))
				return nil
			})
			c.p50, c.p99 = append(c.p50, p50), append(c.p99, p99)
		}
	}
	var floor *contender
	for _, c := range all {
		if c.rival.name == natsName {
			floor = c
		}
	}
	found := make([]paced, len(all))
	for i, c := range all {
		c.close()
		found[i] = paced{Rival: c.rival.name, Size: pacedSize, Streams: streams, Rate: rate, outcome: settle(c.done, c.notes)}
		if p := &found[i]; c.done > 0 {
			us := func(percent float64) float64 { return float64(c.histogram.ValueAtPercentile(percent)) / 1e3 }
			p.P50, p.P90, p.P99, p.Max = us(50), us(90), us(99), float64(c.histogram.Max())/1e3
			p.Sent = float64(c.sent) / c.took.Seconds()
			p.CPU = c.cpu.Seconds() * 1e6 / float64(c.sent)
			if floor != nil && floor.done > 0 {
				p.P50Ratio, p.P99Ratio = ratio(c.p50, floor.p50), ratio(c.p99, floor.p99)
			}
		}
	}
	return found
}

// paceLimits returns the limits of a paced run of d. A rival that is too slow for the pace has shown that after twice
// d.
func paceLimits(d time.Duration) limits {
	l := limitsOf(d)
	l.sending = 2*d + time.Second
	return l
}

// samples collects the delays of a paced run.
type samples struct {
	n      atomic.Int64
	delays []int64 // nanoseconds
}

// pace sends rate records per second for d, the streams in turn, and returns the delay of each. A rival that is too
// slow sends fewer.
func (s *session) pace(rate int, d time.Duration, l limits) (run, []int64, error) {
	n := int(d.Seconds() * float64(rate))
	together := max(1, int(grain.Seconds()*float64(rate)))
	every := time.Second * time.Duration(together) / time.Duration(rate)
	got := &samples{delays: make([]int64, n)}
	s.samples.Store(got)
	r, err := s.watch(l, func(producers *sync.WaitGroup) {
		producers.Go(func() {
			c, err := newClock(every)
			if err == nil {
				err = s.producePaced(c, n, together, every)
				c.close()
			}
			s.stopped(err)
		})
	})
	return r, got.delays[:min(int(got.n.Load()), n)], err
}

// producePaced sends n records, some of them together in each period.
func (s *session) producePaced(c *clock, n, together int, every time.Duration) error {
	start := time.Now()
	for i := range n {
		due := start.Add(time.Duration(i/together) * every)
		// Records that become due during a wait that lasts too long are sent at once, each with its own time.
		for wait := time.Until(due); wait > 0; wait = time.Until(due) {
			if err := c.wait(wait); err != nil {
				return err
			}
		}
		p := s.lanes[i%len(s.lanes)]
		p.due(due)
		err := p.produce()
		if err == nil {
			err = p.flush()
		}
		if err != nil {
			return err
		}
	}
	return nil
}
