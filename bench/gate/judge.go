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

// figures are the values of all runs of one side.
type figures map[figure][]float64

// readFigures reads a file in the format of Go benchmarks.
func readFigures(file string) (_ figures, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	found := figures{}
	r := benchfmt.NewReader(f, file)
	for r.Scan() {
		switch rec := r.Result().(type) {
		case *benchfmt.SyntaxError:
			return nil, rec
		case *benchfmt.Result:
			name := rec.GetConfig("pkg") + "." + rec.Name.String()
			for _, v := range rec.Values {
				at := figure{name, v.Unit}
				found[at] = append(found[at], v.Value)
			}
		}
	}
	return found, r.Err()
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
		a, b := benchmath.NewSample(slices.Clone(before), &benchmath.DefaultThresholds), benchmath.NewSample(slices.Clone(after), &benchmath.DefaultThresholds)
		found := alarm{
			figure: at,
			base:   benchmath.AssumeNothing.Summary(a, 0.95).Center,
			head:   benchmath.AssumeNothing.Summary(b, 0.95).Center,
			p:      benchmath.AssumeNothing.Compare(a, b).P,
		}
		if found.p < alpha && worse(at.unit, found.base, found.head) {
			alarms = append(alarms, found)
		}
	}
	return alarms, compared
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
