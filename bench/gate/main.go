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
// A run has rounds. In each, both sides run all benchmarks, a benchmark in slices of 10 ms. Its time in the round is that
// of the fastest slice, because other load only adds time. Its allocations are the mean of the slices.
//
// With -prove the gate proves itself on one revision:
//
//	go run . -prove BASE
//
// It compares BASE with itself 20 times. Then it plants faults into functions on the path of a record, by go build
// -overlay, and compares BASE with each: an allocation per 100 records, and work that adds 5, 7 or 10 % to the time of a
// benchmark, as it measured before. It prints how many it found.
//
// With -out the figures are kept in the format of Go benchmarks, a file for each side of each run. The exit code is 1
// if the gate or its proof fails, and 2 if it could not measure.
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
	"regexp"
	"strings"
	"syscall"
	"time"
)

// minCount is how many runs the gate needs of each side. With fewer, the test finds no difference significant with p <
// 0.001.
const minCount = 7

// sliceTime is how long a benchmark runs at a time. The gate divides its time of a round into slices of this length: the
// shorter they are, the likelier one of them is undisturbed. But each has a warm-up.
const sliceTime = 10 * time.Millisecond

var errSlower = errors.New("the working tree is slower than the base, or allocates more")

func main() {
	err := run(os.Stdout, os.Args[1:])
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return
	}
	fmt.Fprintln(os.Stderr, "gate:", err)
	if errors.Is(err, errSlower) || errors.Is(err, errUnproved) {
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
	proof := flags.Bool("prove", false, "prove that the gate works: BASE against itself, and against itself with planted faults")
	controls := flags.Int("controls", 20, "comparisons of BASE with itself in a proof")
	planted := flags.String("plants", "", "plant only faults whose description matches this `regexp` in a proof")
	flags.IntVar(&m.count, "count", 20, "rounds")
	flags.StringVar(&m.bench, "bench", ".", "run only benchmarks that match this `regexp`, as go test -bench does")
	flags.DurationVar(&m.time, "benchtime", 30*time.Millisecond, "duration of a benchmark in a round")
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
	selected, err := regexp.Compile(*planted)
	if err != nil {
		return fmt.Errorf("-plants: %w", err)
	}
	m.log, m.pkgs, m.slices = os.Stderr, strings.Fields(*pkgs), max(1, int(m.time/sliceTime))
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

	base, head, err := m.checkOut(flags.Arg(0))
	defer m.clean()
	if err != nil {
		return err
	}
	sides := []*side{&base, &head}
	if *proof {
		sides = sides[:1]
	}
	for _, s := range sides {
		if err := m.compile(s); err != nil {
			return err
		}
	}
	switch {
	case *compare:
		m.slices = 1 // benchstat knows no slices
		a, b, err := m.run("compare", base, head)
		if err != nil {
			return err
		}
		stat := exec.Command("go", "tool", "benchstat", "-ignore", "run,revision,round", "base="+a, "head="+b)
		stat.Stdout, stat.Stderr = out, os.Stderr
		return stat.Run()
	case *proof:
		return m.prove(out, base, *controls, plants(selected))
	}
	return m.gate(out, base, head)
}

// gate prints the alarms of a control, and fails on those of the comparison.
func (m *measurement) gate(out io.Writer, base, head side) error {
	if _, err := m.alarms(out, "control", base, base); err != nil {
		return err
	}
	confirmed, err := m.confirmed(out, "", base, head)
	if err == nil && len(confirmed) > 0 {
		err = errSlower
	}
	return err
}

// confirmed compares two sides, repeats a comparison that raises alarms, and returns the alarms that both raise.
func (m *measurement) confirmed(out io.Writer, name string, a, b side) ([]alarm, error) {
	first, err := m.alarms(out, name+"first", a, b)
	if err != nil || len(first) == 0 {
		return nil, err
	}
	second, err := m.alarms(out, name+"second", a, b)
	if err != nil {
		return nil, err
	}
	confirmed := both(first, second)
	if len(confirmed) == 0 {
		fmt.Fprintln(out, "no alarm was confirmed")
		return nil, nil
	}
	fmt.Fprintf(out, "%d alarms were confirmed:\n", len(confirmed))
	for _, a := range confirmed {
		fmt.Fprintln(out, "   ", a)
	}
	return confirmed, nil
}

// alarms compares two sides once, and prints the alarms.
func (m *measurement) alarms(out io.Writer, name string, a, b side) ([]alarm, error) {
	before, after, err := m.figures(name, a, b)
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

// figures measures two sides and returns their figures.
func (m *measurement) figures(name string, a, b side) (_, _ figures, err error) {
	fileA, fileB, err := m.run(name, a, b)
	if err != nil {
		return nil, nil, err
	}
	before, err := readFigures(fileA)
	if err != nil {
		return nil, nil, err
	}
	after, err := readFigures(fileB)
	return before, after, err
}
