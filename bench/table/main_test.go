package main

import (
	"bytes"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestParseBench(t *testing.T) {
	name, ns, mallocs, ok := parseBench("BenchmarkMux/size=128/streams=1-2  \t 5182047\t        32.02 ns/op\t         0.25 mallocs/rec\n")
	if !ok || name != "Mux/size=128/streams=1" || ns != 32.02 || mallocs != 0.25 {
		t.Errorf("got %q, %v ns, %v mallocs, %v", name, ns, mallocs, ok)
	}
	for _, line := range []string{"", "PASS", "goos: linux", "BenchmarkMux", "ok  	example.com/x	1.8s"} {
		if _, _, _, ok := parseBench(line); ok {
			t.Errorf("%q is not a result", line)
		}
	}
}

func TestRatio(t *testing.T) {
	if got := ratio([]float64{2, 30, 4}, []float64{1, 10, 1}); got != 3 {
		t.Errorf("the median of 2, 3 and 4 is %v", got)
	}
}

// TestTable runs a line of the table, and checks that a missed target is noticed.
func TestTable(t *testing.T) {
	var out bytes.Buffer
	tab := table{out: &out, rounds: 1, slice: 5 * time.Millisecond, idle: 200, filter: regexp.MustCompile(`^size=16/streams=1$|^idle`)}
	if err := tab.run(); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"size=16/streams=1 ", "× plain NATS", "idle/streams=200"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, &out)
		}
	}
	if before := tab.missed; !strings.HasSuffix(tab.atLeast(1, 2, "%.0f"), "MISS") || tab.missed != before+1 {
		t.Error("a missed target was not counted")
	}
}
