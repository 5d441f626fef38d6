package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// The intervals of the progress line: redrawn on a terminal, printed again in other output.
const (
	redrawEvery = 100 * time.Millisecond
	printEvery  = time.Second
)

// progress shows how far the streams are until it is stopped.
type progress struct {
	out     io.Writer
	redraw  bool
	streams int
	total   *totals
	started time.Time
	done    chan struct{}
	drawing sync.WaitGroup
}

func startProgress(out io.Writer, redraw bool, streams int, total *totals) *progress {
	p := &progress{out: out, redraw: redraw, streams: streams, total: total, started: time.Now(), done: make(chan struct{})}
	p.drawing.Go(p.loop)
	return p
}

// stop ends the progress line and returns for how long it ran.
func (p *progress) stop() time.Duration {
	elapsed := time.Since(p.started)
	close(p.done)
	p.drawing.Wait()
	return elapsed
}

func (p *progress) loop() {
	every := printEvery
	if p.redraw {
		every = redrawEvery
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-p.done:
			if p.redraw {
				fmt.Fprintf(p.out, "\r%s\n", p.line())
			}
			return
		case <-tick.C:
			if p.redraw {
				fmt.Fprintf(p.out, "\r%s", p.line())
			} else {
				fmt.Fprintln(p.out, p.line())
			}
		}
	}
}

func (p *progress) line() string {
	elapsed := time.Since(p.started)
	records, bytes := p.total.records.Load(), p.total.bytes.Load()
	return fmt.Sprintf("%5.1f s  %d/%d streams  %s records  %.1f MB  %s records/s  %.1f MB/s   ",
		elapsed.Seconds(), p.total.streams.Load(), p.streams, grouped(records), float64(bytes)/1e6,
		grouped(rate(records, elapsed)), float64(rate(bytes, elapsed))/1e6)
}

// printTable prints a line for each file and one for all files. It returns how many files did not arrive complete.
func printTable(out io.Writer, results []result, elapsed time.Duration) (failed int) {
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	// Text after the last tab belongs to no column, so names are aligned to the left.
	row := func(name string, cells ...string) { fmt.Fprintf(t, "%s\t  %s\n", strings.Join(cells, "\t"), name) }
	row("file", "streams", "records", "bytes", "records/s", "MB/s", "SHA-256", "both ends")
	all := result{name: "all", elapsed: elapsed}
	for _, r := range results {
		verdict := "equal"
		switch {
		case errors.Is(r.err, errDiffer):
			verdict = "DIFFER"
			failed++
		case r.err != nil:
			verdict = "BROKEN OFF"
			failed++
		}
		row(r.name, append(figures(r), short(r.sha256), verdict)...)
		all.streams += r.streams
		all.records += r.records
		all.bytes += r.bytes
	}
	verdict := "equal"
	if failed > 0 {
		verdict = "NOT EQUAL"
	}
	row("all", append(figures(all), "", verdict)...)
	t.Flush()
	for _, r := range results {
		if r.err != nil {
			fmt.Fprintf(out, "%s: %v\n", r.name, r.err)
		}
	}
	fmt.Fprintln(out, "rates include reading the files, hashing both ends and the server, all on this machine's cores")
	return failed
}

func figures(r result) []string {
	return []string{
		strconv.Itoa(r.streams), grouped(r.records), grouped(r.bytes),
		grouped(rate(r.records, r.elapsed)), fmt.Sprintf("%.1f", float64(rate(r.bytes, r.elapsed))/1e6),
	}
}

// rate returns n per second.
func rate(n int64, elapsed time.Duration) int64 {
	if elapsed <= 0 {
		return 0
	}
	return int64(float64(n) / elapsed.Seconds())
}

// short returns the beginning of a digest, enough to recognise it.
func short(digest string) string {
	return digest[:min(12, len(digest))]
}

// grouped writes 1234567 as 1,234,567.
func grouped(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
