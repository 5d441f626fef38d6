package main

import (
	"bytes"
	"errors"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// values returns n values about center that scatter by the part spread to either side.
func values(r *rand.Rand, center, spread float64, n int) []float64 {
	v := make([]float64, n)
	for i := range v {
		v[i] = center * (1 + spread*(2*r.Float64()-1))
	}
	return v
}

func TestAlarms(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	at := func(unit string) figure { return figure{"p.B", unit} }
	same := func(v float64) []float64 { return values(r, v, 0, 10) }
	for name, c := range map[string]struct {
		base, head figures
		alarms     int
		compared   int
	}{
		"same times":             {figures{at(unitTime): same(1e-7)}, figures{at(unitTime): same(1e-7)}, 0, 1},
		"8 % slower":             {figures{at(unitTime): values(r, 1e-7, 0.02, 10)}, figures{at(unitTime): values(r, 1.08e-7, 0.02, 10)}, 1, 1},
		"4 % slower":             {figures{at(unitTime): values(r, 1e-7, 0.001, 10)}, figures{at(unitTime): values(r, 1.04e-7, 0.001, 10)}, 0, 1},
		"8 % slower, few runs":   {figures{at(unitTime): values(r, 1e-7, 0.02, 5)}, figures{at(unitTime): values(r, 1.08e-7, 0.02, 5)}, 0, 1},
		"8 % slower, much noise": {figures{at(unitTime): values(r, 1e-7, 0.5, 10)}, figures{at(unitTime): values(r, 1.08e-7, 0.5, 10)}, 0, 1},
		"faster":                 {figures{at(unitTime): same(1e-7)}, figures{at(unitTime): same(5e-8)}, 0, 1},
		"0.01 allocations more":  {figures{at(unitMallocs): values(r, 0.005, 0.1, 10)}, figures{at(unitMallocs): values(r, 0.015, 0.1, 10)}, 1, 1},
		"0.0005 more":            {figures{at(unitMallocs): same(0.005)}, figures{at(unitMallocs): same(0.0055)}, 0, 1},
		"one per operation more": {figures{at(unitAllocs): same(0)}, figures{at(unitAllocs): same(1)}, 1, 1},
		"rounded allocations":    {figures{at(unitMallocs): same(0.4), at(unitAllocs): same(0)}, figures{at(unitMallocs): same(0.4), at(unitAllocs): same(1)}, 0, 1},
		"other units":            {figures{at("B/op"): same(1)}, figures{at("B/op"): same(100)}, 0, 0},
		"new benchmark":          {figures{}, figures{at(unitTime): same(1)}, 0, 0},
		"removed benchmark":      {figures{at(unitTime): same(1)}, figures{}, 0, 0},
	} {
		alarms, compared := judge(c.base, c.head)
		if len(alarms) != c.alarms || compared != c.compared {
			t.Errorf("%s: %v, %d compared; want %d alarms, %d compared", name, alarms, compared, c.alarms, c.compared)
		}
	}
}

func TestOnlyRepeatedAlarmsCount(t *testing.T) {
	a, b, c := alarm{figure: figure{"a", unitTime}}, alarm{figure: figure{"b", unitTime}}, alarm{figure: figure{"b", unitMallocs}}
	if got := both([]alarm{a, b}, []alarm{b, c}); len(got) != 1 || got[0] != b {
		t.Errorf("%v", got)
	}
}

// writeFiles writes files below dir.
func writeFiles(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// repository makes a git repository of a module with a benchmark in its root and in its folder part, and returns its
// folder. The benchmarks report a time, so that the test depends on no clock.
func repository(t *testing.T, file string) string {
	t.Helper()
	dir := t.TempDir()
	writeFiles(t, dir, map[string]string{"go.mod": "module example.org/m\n\ngo 1.26.0\n", "m_test.go": file, "part/m_test.go": file})
	git(t, dir, "init", "--quiet")
	commit(t, dir)
	return dir
}

func commit(t *testing.T, dir string) {
	t.Helper()
	git(t, dir, "add", ".")
	git(t, dir, "-c", "user.name=gate", "-c", "user.email=gate@example.org", "commit", "--quiet", "-m", "Change")
}

func git(t *testing.T, dir string, args ...string) {
	t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git %v: %v\n%s", args, err, out)
	}
}

const benchmark = `package m

import "testing"

func BenchmarkOne(b *testing.B) {
	for b.Loop() {
	}
	b.ReportMetric(TIME, "ns/op")
	b.ReportMetric(MALLOCS, "mallocs/rec")
}
`

func TestGate(t *testing.T) {
	source := func(time, mallocs string) string {
		return strings.NewReplacer("TIME", time, "MALLOCS", mallocs).Replace(benchmark)
	}
	for name, c := range map[string]struct {
		head string
		want error
		text string
	}{
		"nothing changed":                   {source("100", "0.005"), nil, "first: 2 figures compared, 0 alarms"},
		"slower":                            {source("106", "0.005"), errSlower, "106 ns/op, 100 before"},
		"more allocations":                  {source("100", "0.015"), errSlower, "0.015 mallocs/rec, 0.005 before"},
		"faster":                            {source("50", "0"), nil, "0 alarms"},
		"renamed":                           {strings.ReplaceAll(source("106", "0.005"), "BenchmarkOne", "BenchmarkTwo"), nil, ""},
		"a benchmark that ends the process": {strings.ReplaceAll(source("100", "0.005"), "for b.Loop", "b.Fatal(`broken`)\n\tfor b.Loop"), nil, ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := repository(t, source("100", "0.005"))
			if err := os.WriteFile(filepath.Join(dir, "m_test.go"), []byte(c.head), 0o644); err != nil {
				t.Fatal(err)
			}
			t.Chdir(dir)
			kept := filepath.Join(t.TempDir(), "kept")
			var out bytes.Buffer
			err := run(&out, []string{"-benchtime", "1us", "-count", "7", "-pkgs", ". ./missing", "-out", kept, "HEAD"})
			switch name {
			case "renamed", "a benchmark that ends the process":
				if err == nil || errors.Is(err, errSlower) {
					t.Errorf("%v, want an error that says why nothing was compared", err)
				}
			default:
				if !errors.Is(err, c.want) || !strings.Contains(out.String(), c.text) {
					t.Errorf("%v\n%s", err, &out)
				}
				if _, err := readFigures(filepath.Join(kept, "first-head.txt")); err != nil {
					t.Error(err)
				}
			}
			if left, err := filepath.Glob(filepath.Join(dir, ".git", "worktrees", "*")); err != nil || len(left) > 0 {
				t.Errorf("worktrees are left: %v %v", left, err)
			}
		})
	}
}

// A folder may have become a module of its own since the base.
func TestGateComparesFoldersThatBecameModules(t *testing.T) {
	file := strings.NewReplacer("TIME", "100", "MALLOCS", "0").Replace(benchmark)
	dir := repository(t, file)
	writeFiles(t, dir, map[string]string{
		"part/go.mod":    "module example.org/m/part\n\ngo 1.26.0\n",
		"part/m_test.go": strings.Replace(file, "100", "106", 1),
		"go.work":        "go 1.26.0\n\nuse .\n", // is not heeded
	})
	t.Chdir(dir)
	var out bytes.Buffer
	if err := run(&out, []string{"-benchtime", "1us", "-count", "7", "-pkgs", "./part", "HEAD"}); !errors.Is(err, errSlower) ||
		!strings.Contains(out.String(), "example.org/m/part.One") || !strings.Contains(out.String(), "106 ns/op, 100 before") {
		t.Errorf("%v\n%s", err, &out)
	}
}

func TestInvalidArgumentsAreRefused(t *testing.T) {
	for _, args := range [][]string{{}, {"a", "b"}, {"-count", "6", "HEAD"}, {"-nonsense"}} {
		if err := run(&bytes.Buffer{}, args); err == nil {
			t.Errorf("%v: no error", args)
		}
	}
	t.Chdir(repository(t, benchmark))
	if err := run(&bytes.Buffer{}, []string{"nowhere"}); err == nil || !strings.Contains(err.Error(), "no revision nowhere") {
		t.Errorf("%v", err)
	}
}

func TestRoundsGiveTheFastestTimeAndTheMeanOfAllocations(t *testing.T) {
	file := filepath.Join(t.TempDir(), "figures.txt")
	text := `pkg: p
round: 1
BenchmarkB 1 30 ns/op 0.1 mallocs/rec
BenchmarkB 1 10 ns/op 0.3 mallocs/rec
round: 2
BenchmarkB 1 20 ns/op 0.5 mallocs/rec
`
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err := readFigures(file)
	if err != nil {
		t.Fatal(err)
	}
	for at, want := range map[figure][]float64{{"p.B", unitTime}: {10e-9, 20e-9}, {"p.B", unitMallocs}: {0.2, 0.5}} {
		values := slices.Sorted(slices.Values(got[at]))
		if !slices.EqualFunc(values, want, func(a, b float64) bool { return math.Abs(a/b-1) < 1e-9 }) {
			t.Errorf("%v: %v, want %v", at, values, want)
		}
	}
}

// A function that the proof plants work into may have moved to another file.
func TestPlantsHaveTheirFunctions(t *testing.T) {
	for _, s := range spots {
		text, err := os.ReadFile(filepath.Join("..", "..", s.file))
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(string(text), s.line+"\n"); n != 1 {
			t.Errorf("%s has the line %q %d times, want once", s.file, s.line, n)
		}
	}
}

const worker = `package stream

var clock int // in nanoseconds

func work() {
	clock += 100
}

func idle() {
}
`

const workBenchmark = `package stream

import (
	"runtime"
	"testing"
)

func BenchmarkWork(b *testing.B) {
	const records = 100_000 // the runtime allocates now and then
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	clock = 0
	for range b.N * records {
		work()
	}
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(clock)/float64(b.N*records), "ns/op")
	b.ReportMetric(float64(after.Mallocs-before.Mallocs)/float64(b.N*records), "mallocs/rec")
}
`

// A benchmark that calls the function with the planted work shows it, and one that does not call it shows nothing. The
// benchmark counts its time, so that the test depends on no clock.
func TestProofFindsPlantedFaults(t *testing.T) {
	t.Chdir(repository(t, benchmark))
	writeFiles(t, ".", map[string]string{"m_test.go": workBenchmark, "work.go": worker})
	commit(t, ".")
	slower := func(part float64) fault {
		f := fault{"slower", unitTime, part, true, strings.Replace(slow, "for i := 1000; i > 0; i-- {\n\t\t}", "clock += 1000", 1)}
		if f.source == slow {
			t.Fatal("the planted work has no loop to replace")
		}
		return f
	}
	at := func(line string) spot { return spot{".", "BenchmarkWork", "work.go", line, false} }
	for name, c := range map[string]struct {
		plant plant
		want  error
		text  string
	}{
		"allocations":                   {plant{faults[0], at("func work() {")}, nil, "0.01 allocations more: 1 of 1 found"},
		"allocations that nobody makes": {plant{faults[0], at("func idle() {")}, errUnproved, "0.01 allocations more: 0 of 1 found"},
		"10 % slower":                   {plant{slower(0.10), at("func work() {")}, nil, "slower: 1 of 1 found"},
		"4 % slower":                    {plant{slower(0.04), at("func work() {")}, errUnproved, "slower: 0 of 1 found"},
	} {
		t.Run(name, func(t *testing.T) {
			m := measurement{count: minCount, slices: 1, bench: ".", time: time.Microsecond, pkgs: []string{"."}, dir: t.TempDir(), log: io.Discard}
			m.out = m.dir
			base, _, err := m.checkOut("HEAD")
			defer m.clean()
			if err == nil {
				err = m.compile(&base)
			}
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			if err := m.prove(&out, base, 0, []plant{c.plant}); !errors.Is(err, c.want) || !strings.Contains(out.String(), c.text) {
				t.Errorf("%v, want %v and %q in\n%s", err, c.want, c.text, &out)
			}
		})
	}
}
