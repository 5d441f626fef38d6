package main

import (
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/natsstream/stream/internal/load"
)

// options say how long and how often everything is measured.
type options struct {
	rounds   int           // slices of each rival per cell
	slice    time.Duration // length of a slice
	paced    time.Duration // length of a paced run
	idle     int           // idle streams
	million  int           // idle streams of the library in one process; 0: not measured
	sizes    []int
	streams  []int
	rates    []int
	progress func(what string)
}

// results is everything that a run has found. It is stored as JSON, and tables and charts are made from it.
type results struct {
	Machine    string
	Throughput []throughput
	Paced      []paced
	Opens      []opens
	Idle       []idle
}

// throughput is one rival in one cell, all streams as fast as they can.
type throughput struct {
	Rival         string
	Size, Streams int
	Nanoseconds   float64 // per record, median of the slices
	Ratio         float64 // how many times as fast the library is: median of the ratios of slices that ran one after the other
	CPU           float64 // seconds of processor time per million records, of the whole process
	Mallocs       float64 // per record
	Lost          float64 // share of the records
	Reason        string  `json:",omitempty"` // the reason for which there is no figure
}

// slowFrom is the number of streams from which on each stream sends now and then.
const slowFrom = 10_000

// measureThroughput runs all rivals of a cell in turn.
func measureThroughput(e *env, o options, size, streams int) []throughput {
	type contender struct {
		throughput
		rival   rival
		session *session
		n       int
		ns, cpu []float64
		mallocs uint64
		lost    int
	}
	slow := streams >= slowFrom
	var all []*contender
	for _, r := range rivals() {
		c := &contender{rival: r, throughput: throughput{Rival: r.name, Size: size, Streams: streams}}
		all = append(all, c)
		if r.maxStreams != 0 && streams > r.maxStreams {
			c.Reason = fmt.Sprintf("at most %d streams", r.maxStreams)
			continue
		}
		o.progress(fmt.Sprintf("open %d streams of %d B: %s", streams, size, r.name))
		s, err := newSession(e, r, size, streams, slow)
		if err != nil {
			c.Reason = err.Error()
			continue
		}
		c.session = s
		per, err := s.warmUp()
		if err != nil && !errors.Is(err, errTail) {
			c.Reason = err.Error()
			continue
		}
		c.n = max(int(o.slice/max(per, 1)), min(streams, slowWindow), 1)
	}
	defer func() {
		for _, c := range all {
			if c.session != nil {
				c.session.close()
			}
		}
	}()
	for range o.rounds {
		for _, c := range all {
			if c.Reason != "" {
				continue
			}
			o.progress(fmt.Sprintf("%d streams of %d B: %s", streams, size, c.Rival))
			runtime.GC() // no rival pays for the garbage of the one before
			mallocs, cpu, start := load.Mallocs(), load.CPUTime(), time.Now()
			lost, err := c.session.run(c.n)
			took := time.Since(start)
			c.lost += lost
			if errors.Is(err, errTail) {
				took -= lossyPatience
				c.session.close()
				c.session, err = newSession(e, c.rival, size, streams, slow)
			}
			if err != nil {
				c.Reason = err.Error()
				continue
			}
			c.ns = append(c.ns, float64(took)/float64(c.n))
			c.cpu = append(c.cpu, (load.CPUTime()-cpu).Seconds()*1e6/float64(c.n))
			c.mallocs += load.Mallocs() - mallocs
		}
	}
	found := make([]throughput, len(all))
	ours := all[0]
	for i, c := range all {
		if c.Reason == "" {
			c.Nanoseconds, c.CPU = median(c.ns), median(c.cpu)
			c.Ratio = ratio(c.ns, ours.ns)
			c.Mallocs = float64(c.mallocs) / float64(o.rounds*c.n)
			c.Lost = float64(c.lost) / float64(o.rounds*c.n)
		}
		found[i] = c.throughput
	}
	return found
}

// paced is the latency of one rival at a given load: the time from when a record was due until its reader had it. A record
// that waits because the one before it was late counts from when it was due (coordinated omission).
type paced struct {
	Rival              string
	Size               int
	Streams            int
	Rate               int     // records per second, of all streams together
	Sent               float64 // records per second that were sent
	P50, P90, P99, Max float64 // microseconds
	Reason             string  `json:",omitempty"`
}

const pacedSize = 128

// measurePaced sends at each rate in turn, every rival after the other.
func measurePaced(e *env, o options, streams int) []paced {
	var found []paced
	for _, rate := range o.rates {
		for _, r := range rivals() {
			if r.lossy || r.maxStreams != 0 && r.maxStreams < streams {
				continue
			}
			o.progress(fmt.Sprintf("%d streams, %d records/s: %s", streams, rate, r.name))
			p := paced{Rival: r.name, Size: pacedSize, Streams: streams, Rate: rate}
			if err := p.measure(e, r, o.paced); err != nil {
				p.Reason = err.Error()
			}
			found = append(found, p)
		}
	}
	return found
}

func (p *paced) measure(e *env, r rival, d time.Duration) error {
	s, err := newSession(e, r, p.Size, p.Streams, true)
	if err != nil {
		return err
	}
	defer s.close()
	s.window = nil // the pace bounds the records on their way
	if _, err := s.pace(p.Rate, d/4); err != nil {
		return err
	}
	runtime.GC()
	start := time.Now()
	delays, err := s.pace(p.Rate, d)
	if err != nil {
		return err
	}
	h := hdrhistogram.New(1, int64(time.Minute), 3)
	for _, d := range delays {
		if err := h.RecordValue(max(d, 1)); err != nil {
			return err
		}
	}
	us := func(percent float64) float64 { return float64(h.ValueAtPercentile(percent)) / 1e3 }
	p.Sent = float64(len(delays)) / time.Since(start).Seconds()
	p.P50, p.P90, p.P99, p.Max = us(50), us(90), us(99), float64(h.Max())/1e3
	return nil
}

// samples collects the delays of a paced run.
type samples struct {
	n      atomic.Int64
	delays []int64 // nanoseconds
}

// pace sends rate records per second for d, the streams in turn, and returns the delay of each.
func (s *session) pace(rate int, d time.Duration) ([]int64, error) {
	n := int(d.Seconds() * float64(rate))
	every := time.Second / time.Duration(rate)
	got := &samples{delays: make([]int64, n)}
	s.samples.Store(got)
	before := s.arrived.Load()
	var producer sync.WaitGroup
	producer.Go(func() {
		start := time.Now()
		for i := range n {
			due := start.Add(time.Duration(i) * every)
			// A sleep is late by its own grain. Records that become due meanwhile are sent at once, each with its own time.
			if wait := time.Until(due); wait > 0 {
				time.Sleep(wait)
			}
			p := s.lanes[i%len(s.lanes)]
			p.due(due)
			err := p.produce()
			if err == nil {
				err = p.flush()
			}
			if err != nil {
				s.fail(err)
				return
			}
		}
	})
	_, err := s.await(before+int64(n), s.lost.Load(), &producer)
	return got.delays, err
}

// opens is the rate of open, one record, close.
type opens struct {
	Name       string
	Concurrent int
	Rate       float64 // per second
	Ratio      float64 // to nats.Request, median of the ratios of slices that ran one after the other
	CPU        float64 // microseconds of processor time each
	Reason     string  `json:",omitempty"`
}

// measureOpens lets concurrent goroutines ask as fast as they can.
func measureOpens(e *env, o options, concurrent int) []opens {
	type contender struct {
		opens
		ask    func([]byte) error
		closer func()
		rates  []float64
		cpu    []float64
	}
	var all []*contender
	for _, a := range askers() {
		c := &contender{opens: opens{Name: a.name, Concurrent: concurrent}}
		var err error
		if c.ask, c.closer, err = a.open(e); err != nil {
			c.Reason = err.Error()
		} else {
			defer c.closer()
			if _, err := askFor(c.ask, concurrent, o.slice/4); err != nil {
				c.Reason = err.Error()
			}
		}
		all = append(all, c)
	}
	for range o.rounds {
		for _, c := range all {
			if c.Reason != "" {
				continue
			}
			o.progress(fmt.Sprintf("%d at once: %s", concurrent, c.Name))
			runtime.GC()
			cpu, start := load.CPUTime(), time.Now()
			n, err := askFor(c.ask, concurrent, o.slice)
			if err != nil {
				c.Reason = err.Error()
				continue
			}
			c.rates = append(c.rates, float64(n)/time.Since(start).Seconds())
			c.cpu = append(c.cpu, float64((load.CPUTime()-cpu).Microseconds())/float64(n))
		}
	}
	var floor []float64
	for _, c := range all {
		if c.Name == natsAskerName {
			floor = c.rates
		}
	}
	found := make([]opens, len(all))
	for i, c := range all {
		if c.Reason == "" {
			c.Rate, c.Ratio, c.CPU = median(c.rates), ratio(c.rates, floor), median(c.cpu)
		}
		found[i] = c.opens
	}
	return found
}

// askFor lets concurrent goroutines ask for d, and returns how many answers came.
func askFor(ask func([]byte) error, concurrent int, d time.Duration) (int, error) {
	question := make([]byte, 128)
	var n atomic.Int64
	var failed atomic.Pointer[error]
	var asking sync.WaitGroup
	end := time.Now().Add(d)
	for range concurrent {
		asking.Go(func() {
			for failed.Load() == nil && time.Now().Before(end) {
				if err := ask(question); err != nil {
					failed.Store(&err)
					return
				}
				n.Add(1)
			}
		})
	}
	asking.Wait()
	if err := failed.Load(); err != nil {
		return 0, *err
	}
	return int(n.Load()), nil
}

// idle is the memory of one idle stream at both ends together, with the NATS server's share.
type idle struct {
	Name        string
	Streams     int
	Bytes       float64 // heap and stacks
	Goroutines  float64
	ResidentMiB float64 // of the whole process, where the system tells
	Reason      string  `json:",omitempty"`
}

// measureIdle opens n streams and compares the process before and after.
func measureIdle(e *env, o options, h holder, n int) idle {
	found := idle{Name: h.name, Streams: n}
	o.progress(fmt.Sprintf("%d idle: %s", n, h.name))
	// The first streams cause allocations that are made once.
	warm, err := h.open(e, min(100, n))
	if err != nil {
		found.Reason = err.Error()
		return found
	}
	warm()
	before := inUse()
	closer, err := h.open(e, n)
	if err != nil {
		found.Reason = err.Error()
		return found
	}
	after := inUse()
	found.Bytes = float64(after.bytes-before.bytes) / float64(n)
	found.Goroutines = float64(after.goroutines-before.goroutines) / float64(n)
	found.ResidentMiB = residentMiB()
	closer()
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

// measureAll measures everything in turn.
func measureAll(e *env, o options) (*results, error) {
	found := &results{Machine: machine()}
	for _, streams := range o.streams {
		for _, size := range o.sizes {
			if streams >= slowFrom && size != pacedSize {
				continue
			}
			found.Throughput = append(found.Throughput, measureThroughput(e, o, size, streams)...)
		}
	}
	for _, streams := range []int{1, 1000} {
		found.Paced = append(found.Paced, measurePaced(e, o, streams)...)
	}
	for _, concurrent := range []int{1, 16, 256} {
		found.Opens = append(found.Opens, measureOpens(e, o, concurrent)...)
	}
	for _, h := range holders() {
		found.Idle = append(found.Idle, measureIdle(e, o, h, o.idle))
	}
	if o.million > 0 {
		found.Idle = append(found.Idle, measureIdle(e, o, streamHandlerHolder(), o.million))
	}
	return found, e.err()
}

func median(xs []float64) float64 {
	if len(xs) == 0 {
		return math.NaN()
	}
	xs = slices.Sorted(slices.Values(xs))
	return xs[len(xs)/2]
}

// ratio is the median of the ratios of slices that ran one after the other.
func ratio(xs, ys []float64) float64 {
	ratios := make([]float64, min(len(xs), len(ys)))
	for i := range ratios {
		ratios[i] = xs[i] / ys[i]
	}
	return median(ratios)
}
