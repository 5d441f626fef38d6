package main

import (
	"bytes"
	"fmt"
	"maps"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
)

// The micro benchmarks reach into the library's unexported parts, so they are
// tests of its package and run by the go tool.

// microTarget is the most a micro benchmark may take, in ns per operation, with
// no allocation.
var microTarget = map[string]float64{
	"Mux/size=128/streams=1": 30,
	"Recv/size=128":          10,
	"Write/size=128":         30,
}

// microBenchmarks are those of micro_bench_test.go.
const microBenchmarks = "^Benchmark(Mux|Ring|Recv|Write|WriteObject|AppendFrame|ParseFrame|FallbackAppend|FallbackParse|Open)$"

const module = "github.com/natsstream/stream"

func (t *table) micro() error {
	if !t.wants("micro") {
		return nil
	}
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", module).Output()
	if err != nil {
		return fmt.Errorf("looking for module %s: %w: run the table in a folder of this repository", module, err)
	}
	cmd := exec.Command("go", "test", "-run=^$", "-bench="+microBenchmarks, "-count="+strconv.Itoa(t.rounds),
		"-benchtime="+(t.slice/2).String(), ".")
	cmd.Dir = strings.TrimSpace(string(dir)) // only there the tests of the library have the modules that they require
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%v: %w\n%s%s", cmd, err, out, stderr.Bytes())
	}
	type figures struct{ ns, mallocs []float64 }
	byName := make(map[string]*figures)
	var names []string
	for line := range strings.Lines(string(out)) {
		name, ns, mallocs, ok := parseBench(line)
		if !ok {
			continue
		}
		f := byName[name]
		if f == nil {
			f = new(figures)
			byName[name] = f
			names = append(names, name)
		}
		f.ns = append(f.ns, ns)
		f.mallocs = append(f.mallocs, mallocs)
	}
	fmt.Fprint(t.out, "\nParts of the path alone\n\n")
	w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\tns/op\tmallocs/rec")
	for _, name := range names {
		f := byName[name]
		mallocs := fmt.Sprintf("%.4f", median(f.mallocs))
		if microTarget[name] > 0 {
			// A run of the benchmark itself allocates a few times; a record
			// that allocated would show as 1.
			mallocs += " = 0 " + t.verdict(median(f.mallocs) < 0.01)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\n", name, t.atMost(median(f.ns), microTarget[name], "%.1f"), mallocs)
	}
	for _, name := range slices.Sorted(maps.Keys(microTarget)) {
		if byName[name] == nil {
			return fmt.Errorf("micro: no benchmark %s", name)
		}
	}
	return w.Flush()
}

// parseBench cuts a line of the testing package's benchmark output apart.
func parseBench(line string) (name string, ns, mallocs float64, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 4 || !strings.HasPrefix(fields[0], "Benchmark") {
		return "", 0, 0, false
	}
	name = strings.TrimPrefix(fields[0], "Benchmark")
	if i := strings.LastIndexByte(name, '-'); i >= 0 {
		if _, err := strconv.Atoi(name[i+1:]); err == nil {
			name = name[:i]
		}
	}
	for i := 2; i+1 < len(fields); i += 2 {
		v, err := strconv.ParseFloat(fields[i], 64)
		if err != nil {
			return "", 0, 0, false
		}
		switch fields[i+1] {
		case "ns/op":
			ns, ok = v, true
		case "mallocs/rec":
			mallocs = v
		}
	}
	return name, ns, mallocs, ok
}
