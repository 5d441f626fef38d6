package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
)

// The tables stand between these lines of the document.
const (
	beginMark = "<!-- rivals:begin -->"
	endMark   = "<!-- rivals:end -->"
)

// save stores the results, so that tables and charts can be made again without a run.
func (r *results) save(file string) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
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

// write replaces the text between the marks of the document.
func (r *results) write(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	before, rest, ok := bytes.Cut(b, []byte(beginMark))
	_, after, ok2 := bytes.Cut(rest, []byte(endMark))
	if !ok || !ok2 {
		return errors.New(file + " has no lines " + beginMark + " and " + endMark + "; add them")
	}
	return os.WriteFile(file, slices.Concat(before, []byte(beginMark+"\n"), r.markdown(), []byte(endMark), after), 0o644)
}

// markdown returns all tables.
func (r *results) markdown() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "Measured on %s.\n\n", r.Machine)
	r.throughputTables(&b)
	r.latencyTables(&b)
	r.openTable(&b)
	r.idleTable(&b)
	r.settings(&b)
	return b.Bytes()
}

func row(b *bytes.Buffer, cells ...string) {
	b.WriteString("| " + strings.Join(cells, " | ") + " |\n")
}

func header(b *bytes.Buffer, cells ...string) {
	row(b, cells...)
	rule := make([]string, len(cells))
	for i := range rule {
		rule[i] = "---:"
	}
	rule[0] = "---"
	row(b, rule...)
}

func bytesName(n int) string {
	if n >= 1024 {
		return strconv.Itoa(n/1024) + " KiB"
	}
	return strconv.Itoa(n) + " B"
}

// three formats a figure with three digits.
func three(x float64) string {
	if math.IsNaN(x) || x == 0 {
		return "–"
	}
	if x >= 100 {
		return strconv.FormatFloat(x, 'f', 0, 64)
	}
	return strconv.FormatFloat(x, 'g', 3, 64)
}

// cells returns the distinct values of key, in the order in which they first occur.
func cells[T any, K comparable](all []T, key func(T) K) (keys []K) {
	for _, x := range all {
		if k := key(x); !slices.Contains(keys, k) {
			keys = append(keys, k)
		}
	}
	return keys
}

func (r *results) throughputTables(b *bytes.Buffer) {
	for _, streams := range cells(r.Throughput, func(t throughput) int { return t.Streams }) {
		var all []throughput
		for _, t := range r.Throughput {
			if t.Streams == streams {
				all = append(all, t)
			}
		}
		sizes := cells(all, func(t throughput) int { return t.Size })
		title := fmt.Sprintf("%d streams, as fast as they can", streams)
		if streams == 1 {
			title = "One stream, as fast as it can"
		} else if streams >= slowFrom {
			title = fmt.Sprintf("%d streams that send in turn, at most %d records on their way", streams, slowWindow)
		}
		fmt.Fprintf(b, "#### %s\n\nNanoseconds per record; in brackets how many times as fast `stream` is.\n\n", title)
		head := []string{""}
		for _, size := range sizes {
			head = append(head, bytesName(size))
		}
		header(b, head...)
		for _, rival := range cells(all, func(t throughput) string { return t.Rival }) {
			line := []string{rival}
			for _, t := range all {
				if t.Rival == rival {
					line = append(line, t.cell())
				}
			}
			row(b, line...)
		}
		fmt.Fprintf(b, "\nProcessor seconds per million records, both ends and everything between them.\n\n")
		header(b, head...)
		for _, rival := range cells(all, func(t throughput) string { return t.Rival }) {
			line := []string{rival}
			for _, t := range all {
				if t.Rival == rival {
					line = append(line, three(t.CPU))
				}
			}
			row(b, line...)
		}
		b.WriteString("\n")
	}
}

func (t throughput) cell() string {
	if t.Reason != "" {
		return "–"
	}
	s := three(t.Nanoseconds)
	if t.Rival != "stream" {
		s += " (" + three(t.Ratio) + ")"
	}
	if t.Lost > 0 {
		s += fmt.Sprintf(", **%.2g %% lost**", 100*t.Lost)
	}
	return s
}

func (r *results) latencyTables(b *bytes.Buffer) {
	for _, streams := range cells(r.Paced, func(p paced) int { return p.Streams }) {
		fmt.Fprintf(b, "#### Latency of %d-byte records at a given load, %d streams\n\n", pacedSize, streams)
		b.WriteString("Microseconds from when a record was due until its reader had it. A late record does not hide those behind it.\n\n")
		header(b, "records/s", "", "p50", "p90", "p99", "largest")
		for _, p := range r.Paced {
			switch {
			case p.Streams != streams:
			case p.Reason != "":
				row(b, strconv.Itoa(p.Rate), p.Rival, p.Reason, "", "", "")
			default:
				rate := strconv.Itoa(p.Rate)
				if p.Sent < 0.95*float64(p.Rate) {
					rate += fmt.Sprintf(" (%.0f reached)", p.Sent)
				}
				row(b, rate, p.Rival, three(p.P50), three(p.P90), three(p.P99), three(p.Max))
			}
		}
		b.WriteString("\n")
	}
}

func (r *results) openTable(b *bytes.Buffer) {
	b.WriteString("#### A question and its answer: open, one record, close\n\nPer second; in brackets the share of nats.Request's rate.\n\n")
	concurrent := cells(r.Opens, func(o opens) int { return o.Concurrent })
	head := []string{"at once"}
	for _, c := range concurrent {
		head = append(head, strconv.Itoa(c))
	}
	header(b, head...)
	for _, name := range cells(r.Opens, func(o opens) string { return o.Name }) {
		line := []string{name}
		for _, o := range r.Opens {
			switch {
			case o.Name != name:
			case o.Reason != "":
				line = append(line, o.Reason)
			default:
				line = append(line, fmt.Sprintf("%.0f (%s)", o.Rate, three(o.Ratio)))
			}
		}
		row(b, line...)
	}
	b.WriteString("\n")
}

func (r *results) idleTable(b *bytes.Buffer) {
	b.WriteString("#### Idle streams\n\nWhat one idle stream holds, both ends together, after a garbage collection.\n\n")
	header(b, "", "streams", "bytes", "goroutines", "process, MiB")
	for _, i := range r.Idle {
		if i.Reason != "" {
			row(b, i.Name, strconv.Itoa(i.Streams), i.Reason, "", "")
			continue
		}
		row(b, i.Name, strconv.Itoa(i.Streams), fmt.Sprintf("%.0f", i.Bytes), fmt.Sprintf("%.2g", i.Goroutines), fmt.Sprintf("%.0f", i.ResidentMiB))
	}
	b.WriteString("\n")
}

func (r *results) settings(b *bytes.Buffer) {
	b.WriteString("#### Settings\n\n")
	header(b, "", "settings", "on its way")
	for _, x := range rivals() {
		bound := "its own flow control"
		switch {
		case x.lossy:
			bound = "no bound, records may be lost"
		case x.unbounded:
			bound = fmt.Sprintf("bounded by the measurement: %d records and %d MiB", windowRecords, windowBytes>>20)
		}
		row(b, x.name, x.settings, bound)
	}
	b.WriteString("\n")
}
