package main

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The tables stand between these lines of the document.
const (
	beginMark = "<!-- rivals:begin -->"
	endMark   = "<!-- rivals:end -->"
)

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
	at := ""
	if r.Revision != "" {
		at = " at revision " + r.Revision
	}
	fmt.Fprintf(&b, "Measured%s on %s, with `%s`, in %v.\n\n", at, r.Machine, r.Flags, time.Duration(r.Seconds*1e9).Round(time.Second))
	r.throughputTables(&b)
	r.latencyTables(&b)
	r.openTable(&b)
	r.idleTable(&b)
	r.settings(&b)
	return b.Bytes()
}

// notes are the remarks below a table. Its cells have their numbers.
type notes []string

// mark returns the number of a remark, or nothing for an empty one.
func (n *notes) mark(text string) string {
	if text == "" {
		return ""
	}
	i := slices.Index(*n, text)
	if i < 0 {
		i = len(*n)
		*n = append(*n, text)
	}
	return fmt.Sprintf("<sup>%d</sup>", i+1)
}

// cell returns a figure with the mark of its remarks, or a dash with the reason why there is none.
func (n *notes) cell(figure string, o outcome) string {
	if o.Reason != "" {
		return "–" + n.mark(o.Reason)
	}
	return figure + n.mark(strings.Join(o.Notes, "; "))
}

// write ends a table with its remarks.
func (n *notes) write(b *bytes.Buffer) {
	b.WriteString("\n")
	for i, text := range *n {
		// A message of a rival must not become markup.
		fmt.Fprintf(b, "%d. %s\n", i+1, strings.NewReplacer("\n", " ", "<", "&lt;", "|", "/").Replace(text))
	}
	if len(*n) > 0 {
		b.WriteString("\n")
	}
	*n = nil
}

// faults returns an error if the library did not do all that was asked of it.
func (r *results) faults() error {
	var all []error
	add := func(name, where string, o outcome) {
		if text := strings.Join(append(o.Notes, o.Reason), "; "); strings.HasPrefix(name, ourName) && strings.Trim(text, "; ") != "" {
			all = append(all, fmt.Errorf("%s, %s: %s", name, where, text))
		}
	}
	for _, t := range r.Throughput {
		add(t.Rival, fmt.Sprintf("%d streams of %d B", t.Streams, t.Size), t.outcome)
	}
	for _, p := range r.Paced {
		add(p.Rival, fmt.Sprintf("%d streams, %d records/s", p.Streams, p.Rate), p.outcome)
	}
	for _, o := range r.Opens {
		add(o.Name, fmt.Sprintf("%d at once", o.Concurrent), o.outcome)
	}
	for _, i := range r.Idle {
		add(i.Name, fmt.Sprintf("%d idle", i.Streams), i.outcome)
	}
	return errors.Join(all...)
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
			title = fmt.Sprintf("%s that send in turn, at most %d records on their way", countStreams(streams), slowWindow)
		}
		var n notes
		fmt.Fprintf(b, "#### %s\n\nNanoseconds per record that arrived; in brackets how many times as fast `stream` is. "+
			"Medians of %d slices.\n\n", title, slices.MaxFunc(all, func(a, b throughput) int { return a.Slices - b.Slices }).Slices)
		head := []string{""}
		for _, size := range sizes {
			head = append(head, bytesName(size))
		}
		header(b, head...)
		for _, rival := range cells(all, func(t throughput) string { return t.Rival }) {
			line := []string{rival}
			for _, t := range all {
				if t.Rival == rival {
					line = append(line, n.cell(t.figure(), t.outcome))
				}
			}
			row(b, line...)
		}
		n.write(b)
		fmt.Fprintf(b, "Processor seconds per million records, both ends and everything between them.\n\n")
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

func (t throughput) figure() string {
	s := three(t.Nanoseconds)
	if t.Rival != ourName {
		s += " (" + three(t.Ratio) + ")"
	}
	if t.Lost > 0 {
		s += fmt.Sprintf(", **%.2g %% lost**", 100*t.Lost)
	}
	return s
}

func (r *results) latencyTables(b *bytes.Buffer) {
	for _, streams := range cells(r.Paced, func(p paced) int { return p.Streams }) {
		var n notes
		fmt.Fprintf(b, "#### Latency of %d-byte records at a given load, %s\n\n", pacedSize, countStreams(streams))
		fmt.Fprintf(b, "Microseconds from when a record was due until its reader had it, in %d runs. A late record does not hide those behind it. "+
			"In brackets the ratio to plain NATS, the median of the runs. The last column has processor seconds per million records.\n\n", pacedRounds)
		header(b, "records/s", "", "p50", "p90", "p99", "largest", "processor")
		for _, p := range r.Paced {
			switch {
			case p.Streams != streams:
			case p.Reason != "":
				row(b, strconv.Itoa(p.Rate), p.Rival, n.cell("", p.outcome), "", "", "", "")
			default:
				rate := strconv.Itoa(p.Rate)
				if p.Sent < 0.95*float64(p.Rate) {
					rate += fmt.Sprintf(" (%.0f reached)", p.Sent)
				}
				row(b, rate, p.Rival, n.cell(compared(p.P50, p.P50Ratio), p.outcome), three(p.P90), compared(p.P99, p.P99Ratio), three(p.Max), three(p.CPU))
			}
		}
		n.write(b)
	}
}

// compared returns a figure and, in brackets, its ratio to another.
func compared(figure, ratio float64) string {
	if ratio == 0 {
		return three(figure)
	}
	return three(figure) + " (" + three(ratio) + ")"
}

func (r *results) openTable(b *bytes.Buffer) {
	if len(r.Opens) == 0 {
		return
	}
	b.WriteString("#### A question and its answer: open, one record, close\n\nPer second; in brackets the share of nats.Request's rate.\n\n")
	var n notes
	concurrent := cells(r.Opens, func(o opens) int { return o.Concurrent })
	head := []string{"at once"}
	for _, c := range concurrent {
		head = append(head, strconv.Itoa(c))
	}
	header(b, head...)
	for _, name := range cells(r.Opens, func(o opens) string { return o.Name }) {
		line := []string{name}
		for _, o := range r.Opens {
			if o.Name == name {
				line = append(line, n.cell(fmt.Sprintf("%.0f (%s)", o.Rate, three(o.Ratio)), o.outcome))
			}
		}
		row(b, line...)
	}
	n.write(b)
}

func (r *results) idleTable(b *bytes.Buffer) {
	if len(r.Idle) == 0 {
		return
	}
	b.WriteString("#### Idle streams\n\nWhat one idle stream holds, both ends together, after a garbage collection. " +
		"Then the memory of the whole process that is resident, and its share of one core while nothing happens on the streams.\n\n")
	var n notes
	header(b, "", "streams", "bytes", "goroutines", "process, MiB", "core, %", "seconds to open")
	for _, i := range r.Idle {
		if i.Reason != "" {
			row(b, i.Name, strconv.Itoa(i.Streams), n.cell("", i.outcome), "", "", "", "")
			continue
		}
		row(b, i.Name, strconv.Itoa(i.Streams), n.cell(fmt.Sprintf("%.0f", i.Bytes), i.outcome), fmt.Sprintf("%.2g", i.Goroutines),
			fmt.Sprintf("%.0f", i.ResidentMiB), three(100*i.Core), three(i.Opening))
	}
	n.write(b)
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

// countStreams writes a number of streams as text.
func countStreams(n int) string {
	switch {
	case n == 1:
		return "one stream"
	case n >= 10_000:
		return fmt.Sprintf("%d,%03d streams", n/1000, n%1000)
	}
	return fmt.Sprintf("%d streams", n)
}
