package main

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"

	"golang.org/x/perf/benchfmt"
	"golang.org/x/perf/benchmath"
)

// This file reads the figures of both sides of a run and finds the alarms. The goroutine of main runs it.

// The bounds of an alarm.
const (
	moreMallocs = 0.001 // per record or operation
	moreTime    = 1.05  // ratio
	alpha       = 0.001 // of the U test
)

// Units of the figures that are judged.
const (
	unitTime    = "sec/op" // as package benchfmt calls ns/op
	unitMallocs = "mallocs/rec"
	unitAllocs  = "allocs/op"
)

// figure is the name of a series of values: a unit of a benchmark.
type figure struct{ benchmark, unit string }

// figures are the values of one side, one of each round.
type figures map[figure][]float64

// readFigures reads a file in the format of Go benchmarks. Each round gives one value of a figure: the fastest time of
// its slices, or the mean of their allocations. Other load only adds time, so the fastest slice is the least disturbed.
func readFigures(file string) (_ figures, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	rounds := map[figure]map[string][]float64{}
	r := benchfmt.NewReader(f, file)
	for r.Scan() {
		switch rec := r.Result().(type) {
		case *benchfmt.SyntaxError:
			return nil, rec
		case *benchfmt.Result:
			name := rec.GetConfig("pkg") + "." + rec.Name.String()
			for _, v := range rec.Values {
				at, round := figure{name, v.Unit}, rec.GetConfig("round")
				if rounds[at] == nil {
					rounds[at] = map[string][]float64{}
				}
				rounds[at][round] = append(rounds[at][round], v.Value)
			}
		}
	}
	found := figures{}
	for at, round := range rounds {
		for _, values := range round {
			found[at] = append(found[at], ofRound(at.unit, values))
		}
	}
	return found, r.Err()
}

// ofRound returns the value of a round with the values of its slices.
func ofRound(unit string, values []float64) float64 {
	if unit == unitTime {
		return slices.Min(values)
	}
	sum := 0.0
	for _, v := range values {
		sum += v
	}
	return sum / float64(len(values))
}

// alarm is a figure that is worse than that of the base.
type alarm struct {
	figure
	base, head float64 // medians
	p          float64
}

func (a alarm) String() string {
	if a.unit == unitTime {
		return fmt.Sprintf("%s: %.4g ns/op, %.4g before (%+.1f %%, p %.2g)", a.benchmark, a.head*1e9, a.base*1e9, 100*(a.head/a.base-1), a.p)
	}
	return fmt.Sprintf("%s: %.4g %s, %.4g before (p %.2g)", a.benchmark, a.head, a.unit, a.base, a.p)
}

// judge compares the figures that both sides have. It returns those that are worse in head, and how many it compared.
func judge(base, head figures) (alarms []alarm, compared int) {
	sorted := slices.SortedFunc(maps.Keys(base), func(a, b figure) int {
		if a.benchmark != b.benchmark {
			return cmp.Compare(a.benchmark, b.benchmark)
		}
		return cmp.Compare(a.unit, b.unit)
	})
	for _, at := range sorted {
		before, after := base[at], head[at]
		if len(after) == 0 || !judged(base, at) {
			continue
		}
		compared++
		found := alarm{
			figure: at,
			base:   median(before),
			head:   median(after),
			p:      benchmath.AssumeNothing.Compare(sample(before), sample(after)).P,
		}
		if found.p < alpha && worse(at.unit, found.base, found.head) {
			alarms = append(alarms, found)
		}
	}
	return alarms, compared
}

func sample(values []float64) *benchmath.Sample {
	return benchmath.NewSample(slices.Clone(values), &benchmath.DefaultThresholds)
}

func median(values []float64) float64 {
	return benchmath.AssumeNothing.Summary(sample(values), 0.95).Center
}

// judged reports whether a figure is judged. Allocations per operation are whole numbers. They are judged only if the
// benchmark does not report the exact number.
func judged(side figures, at figure) bool {
	switch at.unit {
	case unitTime, unitMallocs:
		return true
	case unitAllocs:
		return len(side[figure{at.benchmark, unitMallocs}]) == 0
	}
	return false
}

// worse reports whether the median head is worse than the median base by more than the bound.
func worse(unit string, base, head float64) bool {
	if unit == unitTime {
		return head > base*moreTime
	}
	return head > base+moreMallocs
}

// both returns the alarms of second that first raised as well.
func both(first, second []alarm) []alarm {
	return slices.DeleteFunc(slices.Clone(second), func(a alarm) bool {
		return !slices.ContainsFunc(first, func(b alarm) bool { return a.figure == b.figure })
	})
}
