package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// This file proves the gate. It compares a revision with itself, and with itself after a fault was planted into a
// function on the path of a record.

var errUnproved = errors.New("the gate raised false alarms, or did not find a planted fault")

// fault is the work that a planted function does.
type fault struct {
	name    string
	unit    string  // of the figure that has to raise the alarm
	slower  float64 // by this part of the time of a record, or 0
	certain bool    // the proof fails if the gate does not find it
	source  string  // of the planted function, without the package clause
}

// Half of the medians of a benchmark that is 5 % slower lie below 5 %, the bound of an alarm. So the gate cannot be sure
// to find these. The proof reports how often it does.
var faults = []fault{
	{"0.01 allocations more", unitMallocs, 0, true, allocating},
	{"5 % slower", unitTime, 0.05, false, slow},
	{"7 % slower", unitTime, 0.07, false, slow},
	{"10 % slower", unitTime, 0.10, true, slow},
}

// everyVariable is the variable of the environment that makes every so many calls of the planted function slow. The work
// of a slow call is a multiple of the time of a record, because a processor hides a little work in other waits.
const everyVariable = "GATE_PLANTED_EVERY"

const slow = `
import (
	"os"
	"strconv"
)

var (
	plantedEvery, _ = strconv.Atoi(os.Getenv("` + everyVariable + `"))
	plantedCalls    int // of the only goroutine
)

func planted() {
	if plantedCalls++; plantedCalls == plantedEvery {
		plantedCalls = 0
		for i := 1000; i > 0; i-- {
		}
	}
}
`

const allocating = `
import "sync/atomic"

var (
	plantedCalls atomic.Int64
	plantedValue atomic.Pointer[[16]byte]
)

func planted() {
	if plantedCalls.Add(1)%100 == 0 {
		plantedValue.Store(new([16]byte))
	}
}
`

// spot is a function that gets planted work, and a benchmark that calls it once per record.
type spot struct {
	pkg, bench string // path of the benchmark's package, and its name
	file, line string // the first line of the function
	scatters   bool   // the times of the benchmark differ by more than a fault adds, so only allocations are planted
}

const (
	writeLine   = "func (w *Writer) write(p []byte, flags FrameFlags) (int, error) {"
	receiveLine = "func (ep *endpoint) receive(m *nats.Msg, lent *slab.Slab) {"
	parseLine   = "func parseJSON(b []byte) (record []byte, end, broken *CloseError) {"
)

var spots = []spot{
	{".", "BenchmarkMux/size=128/streams=1", "mux.go", receiveLine, false},
	{".", "BenchmarkWriteAhead/size=128", "writer.go", writeLine, false},
	{".", "BenchmarkFallbackParse/size=128", "fallback.go", parseLine, false},
	{"./tests/streambench", "BenchmarkStream/Records/size=128/streams=1", "writer.go", writeLine, true},
}

// plant is a fault at a spot.
type plant struct {
	fault
	spot
}

func (p plant) String() string { return p.name + " in " + p.bench }

// plants returns all plants that selected matches by their description.
func plants(selected *regexp.Regexp) (all []plant) {
	for _, f := range faults {
		for _, s := range spots {
			if p := (plant{f, s}); !(f.slower > 0 && s.scatters) && selected.MatchString(p.String()) {
				all = append(all, p)
			}
		}
	}
	return all
}

// prove compares base with itself, and with each of the plants. It fails if more than one control of 20 raises a
// confirmed alarm, or if a fault that is certain is not found.
func (m *measurement) prove(out io.Writer, base side, controls int, plants []plant) error {
	wrong := 0
	for i := range controls {
		confirmed, err := m.confirmed(out, fmt.Sprintf("control-%d-", i+1), base, base)
		if err != nil {
			return err
		}
		if len(confirmed) > 0 {
			wrong++
		}
	}
	var names []string // of the faults, in the order of the plants
	found, missed := map[string]int{}, map[string]int{}
	failed := wrong*20 > controls
	for i, p := range plants {
		fmt.Fprintf(out, "%v:\n", p)
		names = append(names, p.name)
		ok, err := m.finds(out, fmt.Sprintf("planted-%d-", i+1), base, p)
		switch {
		case err != nil:
			return err
		case ok:
			found[p.name]++
		default:
			missed[p.name]++
			failed = failed || p.certain
		}
	}
	fmt.Fprintf(out, "%d of %d controls raised a false alarm\n", wrong, controls)
	for _, name := range slices.Compact(names) {
		fmt.Fprintf(out, "%s: %d of %d found\n", name, found[name], found[name]+missed[name])
	}
	if failed {
		return errUnproved
	}
	return nil
}

// finds reports whether the gate finds p.
func (m *measurement) finds(out io.Writer, name string, base side, p plant) (bool, error) {
	alone := *m
	alone.pkgs, alone.bench = []string{p.pkg}, "^"+strings.ReplaceAll(p.bench, "/", "$/^")+"$"
	planted, err := alone.plant(base, p)
	if err != nil {
		return false, err
	}
	if p.slower > 0 {
		every, err := alone.calibrate(name, planted, p.slower)
		if err != nil {
			return false, err
		}
		base, planted = planted.slowed(0), planted.slowed(every) // one binary: its layout is the same on both sides
	}
	confirmed, err := alone.confirmed(out, name, base, planted)
	return slices.ContainsFunc(confirmed, func(a alarm) bool { return a.unit == p.unit }), err
}

// plant compiles base with p in it. The tree of base stays as it is.
func (m *measurement) plant(base side, p plant) (side, error) {
	dir, err := os.MkdirTemp(m.dir, "plant")
	if err != nil {
		return side{}, err
	}
	file := filepath.Join(base.tree, p.file)
	text, err := os.ReadFile(file)
	if err != nil {
		return side{}, err
	}
	before, after, ok := strings.Cut(string(text), p.line+"\n")
	if !ok {
		return side{}, fmt.Errorf("%s has no line %q: correct the spots in bench/gate/proof.go", p.file, p.line)
	}
	replace := map[string]string{}
	for name, text := range map[string]string{
		file: before + p.line + "\n\tplanted()\n" + after,
		filepath.Join(filepath.Dir(file), "planted.go"): "package stream\n" + p.source,
	} {
		replace[name] = filepath.Join(dir, filepath.Base(name))
		if err := os.WriteFile(replace[name], []byte(text), 0o644); err != nil {
			return side{}, err
		}
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return side{}, err
	}
	s := side{name: "planted", revision: base.revision + " and planted: " + p.name, tree: base.tree, overlay: filepath.Join(dir, "overlay.json")}
	if err := os.WriteFile(s.overlay, overlay, 0o644); err != nil {
		return side{}, err
	}
	return s, m.compile(&s)
}

// calibrate returns how rare slow calls must be, at most, to add the given part to the benchmark's time. It measures
// how much they add if all calls are slow.
func (m *measurement) calibrate(name string, planted side, part float64) (every int, err error) {
	before, after, err := m.figures(name+"calibration", planted.slowed(0), planted.slowed(1))
	if err != nil {
		return 0, err
	}
	for at := range before {
		if at.unit == unitTime && len(after[at]) > 0 {
			every = int((median(after[at])/median(before[at]) - 1) / part)
		}
	}
	if every < 1 {
		return 0, fmt.Errorf("planted work does not slow down %s of %v: correct the spots in bench/gate/proof.go", m.bench, m.pkgs)
	}
	return every, nil
}

// slowed returns s with every so many calls of the planted function slow. 0 makes none slow.
func (s side) slowed(every int) side {
	s.env = []string{everyVariable + "=" + strconv.Itoa(every)}
	return s
}
