// Command rivals measures the library beside other ways to stream records: plain NATS, a loop of nats.Request,
// RequestMany of orbit.go, psrpc, a JetStream ordered consumer, grpc-go, connect-go, yamux, quic-go, the original
// design, and a bare TCP relay as the ceiling.
//
//	go run .            # everything, about half an hour; writes tables and charts into ../../docs
//	go run . -plan      # prints the cells, and how long they take
//	go run . -resume    # goes on with a run that was interrupted
//	go run . -short     # does it work at all; writes nothing
//	go run . -draw      # tables and charts again, from the results that are stored
//	go run . -cells 'paced/streams=1000' -rivals nats   # a part of it; writes nothing
//
// All rivals run in this one process and take turns in short slices. Each record carries its number and that of its
// stream, and its reader checks both. A rival that loses a record without saying so, or stands still, is shown with
// that. If the library does, the exit status is 1.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// defaults are the options of a run without flags. It takes about half an hour on two cores.
func defaults() options {
	return options{
		rounds: 7, slice: 200 * time.Millisecond, paced: 3 * time.Second, idle: 100_000, hold: 20 * time.Second, million: 1_000_000,
		sizes: []int{16, 128, 1024, 16384, 262144}, streams: []int{1, 100, 10_000}, rates: []int{1000, 10_000, 50_000, 100_000},
	}
}

func main() {
	o := defaults()
	var c command
	flag.StringVar(&c.docs, "docs", filepath.Join("..", "..", "docs"), "`directory` of BENCHMARKS.md, for tables and charts")
	flag.BoolVar(&c.short, "short", false, "few and short slices: to see that it works; writes nothing")
	flag.BoolVar(&c.draw, "draw", false, "make tables and charts from the stored results, without a run; with -resume from those of an interrupted run")
	flag.BoolVar(&c.plan, "plan", false, "print the cells and about how long they take, without a run")
	flag.BoolVar(&c.resume, "resume", false, "go on with a run that was interrupted, with its finished cells")
	flag.Func("cells", "measure only the cells whose names match this `regexp`; writes nothing", pattern(&c.cells))
	flag.Func("rivals", "measure only the rivals whose names match this `regexp`, and the library; writes nothing", pattern(&o.rivals))
	flag.IntVar(&o.rounds, "rounds", o.rounds, "slices of each rival per cell")
	flag.DurationVar(&o.slice, "time", o.slice, "`duration` of a slice")
	flag.DurationVar(&o.paced, "paced", o.paced, "`duration` of the paced runs of a rival in a cell")
	flag.IntVar(&o.idle, "idle", o.idle, "idle streams to open")
	flag.DurationVar(&o.hold, "hold", o.hold, "`duration` for which idle streams are watched")
	flag.IntVar(&o.million, "million", o.million, "idle streams of the library alone, 0: none")
	flag.Parse()
	if c.short {
		o.rounds, o.slice, o.paced, o.idle, o.hold, o.million = 1, 5*time.Millisecond, 50*time.Millisecond, 500, 0, 0
		o.sizes, o.streams, o.rates = []int{16, 16384}, []int{1, 20}, []int{1000}
	}
	if err := c.run(o); err != nil {
		fmt.Fprintln(os.Stderr, "rivals:", err)
		os.Exit(1)
	}
}

func pattern(to **regexp.Regexp) func(string) error {
	return func(text string) (err error) { *to, err = regexp.Compile(text); return err }
}

// A command is one call of this program.
type command struct {
	docs                      string
	short, draw, plan, resume bool
	cells                     *regexp.Regexp
}

func (c command) run(o options) error {
	cells := plan(o)
	if c.cells != nil {
		if cells = only(cells, c.cells); len(cells) == 0 {
			return errors.New("no cell has such a name; -plan prints the names")
		}
	}
	if c.plan {
		describe(os.Stdout, cells)
		return nil
	}
	temp, err := os.MkdirTemp("", "rivals")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temp)
	if c.short || c.cells != nil || o.rivals != nil {
		found := newResults(o)
		if err := measure(temp, o, cells, found, func() error { return nil }); err != nil {
			return err
		}
		_, err := os.Stdout.Write(found.markdown())
		return errors.Join(err, found.faults())
	}
	dir := filepath.Join(c.docs, "rivals")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	stored, unfinished := filepath.Join(dir, "results.json"), filepath.Join(dir, "unfinished.json")
	found := newResults(o)
	switch {
	case c.draw && c.resume:
		found, err = readResults(unfinished)
	case c.draw:
		found, err = readResults(stored)
	case c.resume:
		found, err = resume(unfinished, found)
	}
	if err != nil {
		return err
	}
	if !c.draw {
		if err := measureAll(temp, o, cells, found, unfinished); err != nil {
			return err
		}
		if err := errors.Join(found.save(stored), os.Remove(unfinished)); err != nil {
			return err
		}
	}
	return errors.Join(found.charts(dir), found.write(filepath.Join(c.docs, "BENCHMARKS.md")), found.faults())
}

// measureAll measures the cells that found lacks, and stores the finished ones in a file. An interrupt ends the
// process.
func measureAll(temp string, o options, cells []cell, found *results, unfinished string) error {
	if kept, err := readResults(unfinished); err == nil && len(found.Cells) == 0 {
		fmt.Fprintf(os.Stderr, "%s has %d cells of an interrupted run. -resume would go on with it; this run replaces it.\n", unfinished, len(kept.Cells))
	}
	interrupts := make(chan os.Signal, 1)
	signal.Notify(interrupts, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(interrupts)
	over := make(chan error, 1)
	go func() { over <- measure(temp, o, cells, found, func() error { return found.save(unfinished) }) }()
	select {
	case err := <-over:
		return err
	case <-interrupts:
		if _, err := os.Stat(unfinished); errors.Is(err, fs.ErrNotExist) {
			return errors.New("interrupted before the first cell was finished")
		}
		return fmt.Errorf("interrupted; the finished cells are kept in %s, and -resume goes on with them", unfinished)
	}
}

// newResults returns results of a run that begins.
func newResults(o options) *results {
	return &results{Machine: machine(), Flags: o.flags(), Revision: revision()}
}

// revision returns the commit of the library that is measured, with a mark if files differ from it. It is empty outside
// a git repository.
func revision() string {
	out, err := exec.Command("git", "describe", "--always", "--dirty", "--exclude=*").Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

// flags returns the options that decide about the figures, as flags.
func (o options) flags() string {
	return strings.Join([]string{
		fmt.Sprintf("-rounds %d", o.rounds), fmt.Sprintf("-time %v", o.slice), fmt.Sprintf("-paced %v", o.paced),
		fmt.Sprintf("-idle %d", o.idle), fmt.Sprintf("-hold %v", o.hold), fmt.Sprintf("-million %d", o.million),
	}, " ")
}
