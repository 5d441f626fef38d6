// Command gate compares the benchmarks of a revision with those of the working tree. Run it in its own folder:
//
//	go run . BASE             # fails if the working tree is slower than revision BASE, or allocates more
//	go run . -compare BASE    # prints the tables of benchstat, and judges nothing
//
// It builds the test binaries of both once and runs them in turn, so that a change of the machine's mood falls on both
// alike.
//
// The gate measures three times. The first is a control: the base against itself. Any alarm there is false, and the
// gate prints it, so that you know how far to trust the others. The second compares the base with the working tree. If
// that raises alarms, a third run repeats it. The gate fails on an alarm that both runs raise. An alarm is a benchmark
// with
//
//   - more than 0.001 allocations per record above the base, or more allocations per operation, or
//   - more than 5 % more time per operation,
//
// of the medians, if a Mann-Whitney U test finds the difference significant with p < 0.001.
//
// With -out the figures are kept in the format of Go benchmarks, a file for each side of each run. The exit code is 1
// if the gate fails, and 2 if it could not measure.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// minCount is how many runs the gate needs of each side. With fewer, the test finds no difference significant with p <
// 0.001.
const minCount = 7

var errSlower = errors.New("the working tree is slower than the base, or allocates more")

func main() {
	err := run(os.Stdout, os.Args[1:])
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return
	}
	fmt.Fprintln(os.Stderr, "gate:", err)
	if errors.Is(err, errSlower) {
		os.Exit(1)
	}
	os.Exit(2)
}

func run(out io.Writer, args []string) error {
	var m measurement
	flags := flag.NewFlagSet("gate", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "usage: go run . [flags] BASE")
		flags.PrintDefaults()
	}
	compare := flags.Bool("compare", false, "print the tables of benchstat, and judge nothing")
	flags.IntVar(&m.count, "count", 10, "runs of each side")
	flags.StringVar(&m.bench, "bench", ".", "run only benchmarks that match this `regexp`, as go test -bench does")
	flags.DurationVar(&m.time, "benchtime", 100*time.Millisecond, "duration of a benchmark in a run")
	pkgs := flags.String("pkgs", ". ./tests ./tests/streambench ./internal/ring", "packages that have the benchmarks, `paths` from the root of the repository")
	flags.StringVar(&m.out, "out", "", "`directory` to keep the figures in")
	flags.BoolVar(&m.short, "short", false, "pass -test.short to the benchmarks")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 {
		return errors.New("name one revision to compare with, for example main")
	}
	if !*compare && m.count < minCount {
		return fmt.Errorf("-count is %d: the gate needs at least %d runs, because no difference of fewer has p < 0.001", m.count, minCount)
	}
	m.log, m.pkgs = os.Stderr, strings.Fields(*pkgs)
	dir, err := os.MkdirTemp("", "gate")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	m.dir = dir
	if m.out == "" {
		m.out = filepath.Join(dir, "figures")
	}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(interrupted)
	m.interrupted = interrupted

	base, head, err := m.build(flags.Arg(0))
	defer m.clean()
	if err != nil {
		return err
	}
	if *compare {
		a, b, err := m.run("compare", base, head)
		if err != nil {
			return err
		}
		stat := exec.Command("go", "tool", "benchstat", "-ignore", "run,revision", "base="+a, "head="+b)
		stat.Stdout, stat.Stderr = out, os.Stderr
		return stat.Run()
	}
	return gate(out, &m, base, head)
}

// gate judges the control and the comparison, and repeats a comparison that raises alarms.
func gate(out io.Writer, m *measurement, base, head side) error {
	alarms := func(name string, a, b side) ([]alarm, error) {
		fileA, fileB, err := m.run(name, a, b)
		if err != nil {
			return nil, err
		}
		before, err := readFigures(fileA)
		if err != nil {
			return nil, err
		}
		after, err := readFigures(fileB)
		if err != nil {
			return nil, err
		}
		found, compared := judge(before, after)
		if compared == 0 {
			return nil, fmt.Errorf("no benchmark matches %q on both sides: choose others by -bench and -pkgs", m.bench)
		}
		fmt.Fprintf(out, "%s: %d figures compared, %d alarms\n", name, compared, len(found))
		for _, a := range found {
			fmt.Fprintln(out, "   ", a)
		}
		return found, nil
	}
	if _, err := alarms("control", base, base); err != nil {
		return err
	}
	first, err := alarms("first", base, head)
	if err != nil || len(first) == 0 {
		return err
	}
	second, err := alarms("second", base, head)
	if err != nil {
		return err
	}
	confirmed := both(first, second)
	if len(confirmed) == 0 {
		fmt.Fprintln(out, "no alarm was confirmed")
		return nil
	}
	fmt.Fprintf(out, "%d alarms were confirmed:\n", len(confirmed))
	for _, a := range confirmed {
		fmt.Fprintln(out, "   ", a)
	}
	return errSlower
}
