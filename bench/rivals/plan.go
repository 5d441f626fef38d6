package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"time"

	"github.com/schollz/progressbar/v3"
)

// A cell is one part of a run. Its results are stored when it has ended.
type cell struct {
	name    string
	planned time.Duration // about how long it takes if no rival stands still
	measure func(e *env, o options, found *results)
}

// plan returns the cells of a run.
func plan(o options) (cells []cell) {
	add := func(planned time.Duration, measure func(e *env, o options, found *results), name string, args ...any) {
		cells = append(cells, cell{fmt.Sprintf(name, args...), planned, measure})
	}
	for _, streams := range o.streams {
		for _, size := range o.sizes {
			if streams >= slowFrom && size != pacedSize {
				continue
			}
			add(planThroughput(o, streams), func(e *env, o options, found *results) {
				found.Throughput = append(found.Throughput, measureThroughput(e, o, size, streams)...)
			}, "throughput/streams=%d/size=%d", streams, size)
		}
	}
	for _, streams := range []int{1, 1000} {
		for _, rate := range o.rates {
			add(planPaced(o, streams), func(e *env, o options, found *results) {
				found.Paced = append(found.Paced, measurePaced(e, o, streams, rate)...)
			}, "paced/streams=%d/rate=%d", streams, rate)
		}
	}
	for _, concurrent := range []int{1, 16, 256} {
		add(planOpens(o), func(e *env, o options, found *results) {
			found.Opens = append(found.Opens, measureOpens(e, o, concurrent)...)
		}, "open/concurrent=%d", concurrent)
	}
	idle := func(h holder, n int) {
		add(planIdle(n, o.hold), func(e *env, o options, found *results) {
			o.progress(h.name, planIdle(n, o.hold))
			found.Idle = append(found.Idle, measureIdle(e, h, n, o.hold))
		}, "idle/streams=%d/%s", n, h.name)
	}
	for _, h := range holders() {
		idle(h, o.idle)
	}
	if o.million > 0 {
		idle(streamWriterHolder(), o.million)
		idle(streamHandlerHolder(), o.million)
	}
	return cells
}

func total(cells []cell) (all time.Duration) {
	for _, c := range cells {
		all += c.planned
	}
	return all.Round(time.Second)
}

// describe writes the cells and about how long they take.
func describe(w io.Writer, cells []cell) {
	for _, c := range cells {
		fmt.Fprintf(w, "%8v  %s\n", c.planned.Round(time.Second/10), c.name)
	}
	fmt.Fprintf(w, "%8v  together. A rival that stands still takes longer: it is given up after three times its time in a cell plus %v, or after %d failures.\n",
		total(cells), openLimit, maxFailures)
}

// measure measures the cells that found lacks. It calls keep after each. The NATS server has its files in dir.
func measure(dir string, o options, cells []cell, found *results, keep func() error) error {
	e, err := newEnv(dir)
	if err != nil {
		return err
	}
	defer e.close()
	todo := slices.DeleteFunc(slices.Clone(cells), func(c cell) bool { return slices.Contains(found.Cells, c.name) })
	fmt.Fprintf(os.Stderr, "%d cells to measure, in about %v. %d cells are finished.\n", len(todo), total(todo), len(found.Cells))
	bar := progressbar.NewOptions64(max(int64(total(todo)), 1), progressbar.OptionSetWriter(os.Stderr), progressbar.OptionSetWidth(20),
		progressbar.OptionSetElapsedTime(true), progressbar.OptionSetPredictTime(true))
	defer bar.Exit()
	for i, c := range todo {
		var step time.Duration // the step that is under way
		begin := time.Now()
		o.progress = func(what string, planned time.Duration) {
			_ = bar.Add64(int64(step))
			step = planned
			bar.Describe(fmt.Sprintf("%-72s", fmt.Sprintf("of %v: cell %d of %d, %s: %s", total(todo), i+1, len(todo), c.name, what)))
		}
		c.measure(e, o, found)
		o.progress("finished", 0)
		found.Cells = append(found.Cells, c.name)
		found.Seconds += time.Since(begin).Seconds()
		if err := keep(); err != nil {
			return err
		}
	}
	return nil
}

// resume returns the results of an interrupted run, for a run that would begin like fresh.
func resume(file string, fresh *results) (*results, error) {
	found, err := readResults(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, errors.New("no run was interrupted; run without -resume")
	case err != nil:
		return nil, err
	case found.Flags != fresh.Flags:
		return nil, fmt.Errorf("the interrupted run had the flags %q, this one has %q; give the same flags, or run without -resume", found.Flags, fresh.Flags)
	case found.Machine != fresh.Machine:
		return nil, fmt.Errorf("the interrupted run was on %q, this is %q; run without -resume", found.Machine, fresh.Machine)
	case found.Revision != fresh.Revision:
		return nil, fmt.Errorf("the interrupted run measured revision %q, this is %q; check the same revision out, or run without -resume", found.Revision, fresh.Revision)
	}
	return found, nil
}

// save stores the results, so that tables and charts can be made again without a run. An interrupted run leaves the
// file as it was.
func (r *results) save(file string) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	if err := os.WriteFile(file+".new", append(b, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

func readResults(file string) (*results, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	r := new(results)
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return r, nil
}

// only drops the cells with other names.
func only(cells []cell, names *regexp.Regexp) []cell {
	return slices.DeleteFunc(cells, func(c cell) bool { return !names.MatchString(c.name) })
}
