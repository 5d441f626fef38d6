// Command rivals measures the library beside other ways to stream records: plain NATS, a loop of nats.Request, RequestMany of
// orbit.go, psrpc, a JetStream ordered consumer, grpc-go, connect-go, yamux, quic-go, the original design, and a bare TCP relay
// as the ceiling.
//
//	go run .            # everything, about half an hour; writes tables and charts into ../../docs
//	go run . -short     # does it work at all; writes nothing
//	go run . -draw      # tables and charts again, from the results that are stored
//
// All rivals run in this one process and take turns in short slices. Each record carries its number and that of its stream,
// and its reader checks both. A rival that loses a record without saying so fails the run, or is shown with its losses if it
// makes no such promise.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/schollz/progressbar/v3"
)

func main() {
	o := options{sizes: []int{16, 128, 1024, 16384, 262144}, streams: []int{1, 100, 10_000}, rates: []int{1000, 10_000, 50_000, 100_000}}
	var (
		docs  = flag.String("docs", filepath.Join("..", "..", "docs"), "`directory` of BENCHMARKS.md, for tables and charts")
		short = flag.Bool("short", false, "few and short slices: to see that it works; writes nothing")
		draw  = flag.Bool("draw", false, "make tables and charts from the stored results, without a run")
	)
	flag.IntVar(&o.rounds, "rounds", 7, "slices of each rival per cell")
	flag.DurationVar(&o.slice, "time", 200*time.Millisecond, "`duration` of a slice")
	flag.DurationVar(&o.paced, "paced", 3*time.Second, "`duration` of a paced run")
	flag.IntVar(&o.idle, "idle", 100_000, "idle streams to open")
	flag.IntVar(&o.million, "million", 1_000_000, "idle streams of the library alone, 0: none")
	flag.Parse()
	if *short {
		o.rounds, o.slice, o.paced, o.idle, o.million = 1, 5*time.Millisecond, 50*time.Millisecond, 500, 0
		o.sizes, o.streams, o.rates = []int{16, 16384}, []int{1, 20}, []int{1000}
	}
	if err := run(o, *docs, *short, *draw); err != nil {
		fmt.Fprintln(os.Stderr, "rivals:", err)
		os.Exit(1)
	}
}

func run(o options, docs string, short, draw bool) error {
	stored := filepath.Join(docs, "rivals", "results.json")
	found := new(results)
	var err error
	if draw {
		found, err = readResults(stored)
	} else {
		found, err = measure(o)
	}
	if err != nil {
		return err
	}
	if short {
		_, err = os.Stdout.Write(found.markdown())
		return err
	}
	if err := os.MkdirAll(filepath.Dir(stored), 0o755); err != nil {
		return err
	}
	if !draw {
		if err := found.save(stored); err != nil {
			return err
		}
	}
	if err := found.charts(filepath.Dir(stored)); err != nil {
		return err
	}
	return found.write(filepath.Join(docs, "BENCHMARKS.md"))
}

func measure(o options) (*results, error) {
	dir, err := os.MkdirTemp("", "rivals")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	e, err := newEnv(dir)
	if err != nil {
		return nil, err
	}
	defer e.close()
	bar := progressbar.NewOptions(steps(o), progressbar.OptionSetWriter(os.Stderr), progressbar.OptionSetWidth(30),
		progressbar.OptionShowCount(), progressbar.OptionSetElapsedTime(true), progressbar.OptionSetPredictTime(true))
	o.progress = func(what string) {
		bar.Describe(fmt.Sprintf("%-48s", what))
		_ = bar.Add(1)
	}
	defer bar.Exit()
	return measureAll(e, o)
}

// steps counts the calls of progress that a run makes at most.
func steps(o options) int {
	n := len(holders()) + min(o.million, 1)
	for _, streams := range o.streams {
		for _, size := range o.sizes {
			if streams < slowFrom || size == pacedSize {
				n += len(rivals()) * (o.rounds + 1)
			}
		}
	}
	return n + 2*len(o.rates)*len(rivals()) + 3*len(askers())*o.rounds
}
