package main

import (
	"math"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/natsstream/stream/internal/load"
)

// options say how long and how often everything is measured.
type options struct {
	rounds  int           // slices of each rival per cell
	slice   time.Duration // length of a slice
	paced   time.Duration // length of a paced run, of all rounds together
	idle    int           // idle streams
	hold    time.Duration // the time for which idle streams are watched
	million int           // idle streams of the library in one process; 0: not measured
	sizes   []int
	streams []int
	rates   []int
	rivals  *regexp.Regexp // names of the rivals that are measured; nil: all

	progress func(what string, planned time.Duration)
}

// chosen returns the rivals of a run. The library is always the first: the others are compared with it.
func (o options) chosen() []rival {
	return slices.DeleteFunc(rivals(), func(r rival) bool {
		return r.name != ourName && o.rivals != nil && !o.rivals.MatchString(r.name)
	})
}

// results is everything that a run has found. It is stored as JSON, and tables and charts are made from it.
type results struct {
	Machine    string
	Flags      string
	Revision   string   // of the library; empty if it is not known
	Cells      []string // names of the finished cells
	Seconds    float64  // that they took
	Throughput []throughput
	Paced      []paced
	Opens      []opens
	Idle       []idle
}

// throughput is one rival in one cell, all streams as fast as they can.
type throughput struct {
	Rival         string
	Size, Streams int
	Nanoseconds   float64 // per record that arrived, median of the slices
	Ratio         float64 // how many times as fast the library is: median of the ratios of slices that ran one after the other
	CPU           float64 // seconds of processor time per million records, of the whole process
	Mallocs       float64 // per record
	Lost          float64 // share of the records that were sent
	Slices        int
	outcome
}

// An outcome is the part of a result that is in words.
type outcome struct {
	Reason string   `json:",omitempty"` // the reason for which there is no figure
	Notes  []string `json:",omitempty"` // other events, if there is a figure
}

// settle returns the outcome of a measurement with n good runs.
func settle(n int, notes []string) outcome {
	if n == 0 {
		return outcome{Reason: strings.Join(notes, "; ")}
	}
	return outcome{Notes: notes}
}

// slowFrom is the number of streams from which on each stream sends now and then.
const slowFrom = 10_000

// warmUpTime is about the time that the opening and warming up of a session takes.
func warmUpTime(streams int) time.Duration {
	return 500*time.Millisecond + time.Duration(streams)*100*time.Microsecond
}

// sliceTime is about the time that a slice of the given length takes, with the garbage collection before it.
func sliceTime(slice time.Duration) time.Duration { return slice + slice/4 + 20*time.Millisecond }

// planThroughput returns about how long measureThroughput takes.
func planThroughput(o options, streams int) time.Duration {
	return time.Duration(len(o.chosen())) * (warmUpTime(streams) + time.Duration(o.rounds)*sliceTime(o.slice))
}

// measureThroughput runs all rivals of a cell in turn.
func measureThroughput(e *env, o options, size, streams int) []throughput {
	type contender struct {
		*seat
		n             int
		ns, cpu       []float64 // by round
		mallocs       uint64
		arrived, sent int
	}
	planned := warmUpTime(streams) + time.Duration(o.rounds)*sliceTime(o.slice)
	b, m := boundsOf(o.slice, planned), together
	if streams >= slowFrom {
		m = inTurn
	}
	var all []*contender
	for _, r := range o.chosen() {
		c := new(contender)
		c.seat = newSeat(e, r, size, streams, m, b, func(s *session) error {
			per, err := s.warmUp(b.run)
			c.n = max(int(o.slice/max(per, 1)), min(streams, slowWindow), 1)
			return err
		})
		defer c.close()
		all = append(all, c)
		o.progress("open "+r.name, warmUpTime(streams))
		c.prepare()
	}
	for range o.rounds {
		for _, c := range all {
			o.progress(c.rival.name, sliceTime(o.slice))
			ns, cpu := math.NaN(), math.NaN()
			c.run(func(s *session) error {
				runtime.GC() // no rival pays for the garbage of the one before
				mallocs, before := load.Mallocs(), load.CPUTime()
				r, err := s.run(c.n, b.run)
				if err == nil && r.arrived() == 0 {
					err = errNothing
				}
				if err != nil {
					return err
				}
				cpu = (load.CPUTime() - before).Seconds() * 1e6 / float64(r.arrived())
				ns = float64(r.took) / float64(r.arrived())
				c.mallocs += load.Mallocs() - mallocs
				c.arrived, c.sent = c.arrived+r.arrived(), c.sent+r.sent
				return nil
			})
			c.ns, c.cpu = append(c.ns, ns), append(c.cpu, cpu)
		}
	}
	found := make([]throughput, len(all))
	for i, c := range all {
		c.close()
		found[i] = throughput{Rival: c.rival.name, Size: size, Streams: streams, Slices: c.done, outcome: settle(c.done, c.notes)}
		if t := &found[i]; c.done > 0 {
			t.Nanoseconds, t.Ratio, t.CPU = median(c.ns), ratio(c.ns, all[0].ns), median(c.cpu)
			t.Mallocs = float64(c.mallocs) / float64(c.arrived)
			t.Lost = float64(c.sent-c.arrived) / float64(c.sent)
		}
	}
	return found
}

// median returns the median of the figures that exist, 0 if there is none.
func median(xs []float64) float64 {
	xs = slices.DeleteFunc(slices.Sorted(slices.Values(xs)), func(x float64) bool { return math.IsNaN(x) || math.IsInf(x, 0) })
	if len(xs) == 0 {
		return 0 // not NaN, which JSON lacks
	}
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
