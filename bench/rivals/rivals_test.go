package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func testEnv(t *testing.T) *env {
	t.Helper()
	e, err := newEnv(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.close)
	return e
}

// Each rival delivers every record of several runs over the same streams, also records that are larger than its
// buffers.
func TestRivalsDeliverEveryRecord(t *testing.T) {
	e := testEnv(t)
	for _, r := range rivals() {
		for _, c := range []struct {
			size, streams, n int
			mode             mode
		}{{16, 1, 500, together}, {128, 3, 301, together}, {262144, 1, 8, together}, {128, 20, 100, inTurn}} {
			if r.maxStreams != 0 {
				c.streams = min(c.streams, r.maxStreams)
			}
			t.Run(fmt.Sprintf("%s/size=%d/streams=%d/mode=%d", r.name, c.size, c.streams, c.mode), func(t *testing.T) {
				err := deliver(e, r, c.size, c.streams, c.n, c.mode)
				for try := 1; err != nil && r.stalls && try < 5; try++ {
					t.Logf("again, after: %v", err)
					err = deliver(e, r, c.size, c.streams, c.n, c.mode)
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
	}
	if err := e.err(); err != nil {
		t.Error(err)
	}
}

// deliver makes three runs of n records over the same streams, and counts the records.
func deliver(e *env, r rival, size, streams, n int, m mode) error {
	s, err := newSession(e, r, size, streams, m)
	if err != nil {
		return err
	}
	defer s.close()
	for range 3 {
		if r, err := s.run(n, limitsOf(time.Second)); err != nil || r.lost != 0 || r.sent != n {
			return errors.Join(fmt.Errorf("%d sent, %d lost, want %d sent", r.sent, r.lost, n), err)
		}
	}
	if got := s.arrived.Load(); got != 3*int64(n) {
		return fmt.Errorf("%d records arrived, want %d", got, 3*n)
	}
	return nil
}

// Each way to ask gets its answer, from several goroutines at once.
func TestAskersGetTheirAnswers(t *testing.T) {
	e := testEnv(t)
	for _, a := range askers() {
		ask, closer, err := a.open(e)
		if err != nil {
			t.Fatalf("%s: %v", a.name, err)
		}
		n, err := askFor(ask, 4, 20*time.Millisecond, patience)
		closer()
		if err != nil || n == 0 {
			t.Errorf("%s: %d answers, %v", a.name, n, err)
		}
	}
}

// Tables and charts show every figure, a loss, and a missing figure. The document keeps the text around them.
func TestReportShowsEveryFigure(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "doc.md")
	if err := os.WriteFile(file, []byte("above\n"+beginMark+"\nold\n"+endMark+"\nbelow\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	found := &results{
		Machine: "2 cores", Flags: "-rounds 7", Seconds: 90,
		Throughput: []throughput{
			{Rival: "stream", Size: 16, Streams: 1, Nanoseconds: 60, Ratio: 1, CPU: 0.1},
			{Rival: "request-many", Size: 16, Streams: 1, Nanoseconds: 600, Ratio: 10, CPU: 1, Lost: 0.25},
			{Rival: "psrpc", Size: 16, Streams: 1, outcome: outcome{Reason: "not run"}},
			{Rival: "grpc-go", Size: 16, Streams: 1, Nanoseconds: 80, Ratio: 1.5, outcome: outcome{Notes: []string{"stood <still>"}}},
		},
		Paced: []paced{{Rival: "stream", Streams: 1, Rate: 1000, Sent: 500, P50: 20, P90: 30, P99: 40, Max: 50}},
		Opens: []opens{{Name: "stream", Concurrent: 1, Rate: 20000, Ratio: 0.75}},
		Idle:  []idle{{Name: "grpc-go", Streams: 100, Bytes: 17000, Goroutines: 2}},
	}
	if err := found.write(file); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for _, want := range []string{"above\n", "\nbelow", "| stream | 60 |", "600 (10), **25 % lost**", "with `-rounds 7`, in 1m30s", "| psrpc | –<sup>1</sup> |", "\n1. not run\n", "80 (1.5)<sup>2</sup>", "\n2. stood &lt;still>\n", "1000 (500 reached)", "20000 (0.75)", "17000"} {
		if !strings.Contains(text, want) {
			t.Errorf("the document lacks %q", want)
		}
	}
	if strings.Contains(text, "\nold\n") {
		t.Error("the document keeps the old tables")
	}
	if err := found.charts(dir); err != nil {
		t.Fatal(err)
	}
	for _, chart := range []string{"throughput-1.svg", "latency-1.svg", "idle.svg"} {
		b, err := os.ReadFile(filepath.Join(dir, chart))
		if err != nil || !bytes.Contains(b, []byte("<svg")) {
			t.Errorf("%s: %d bytes, %v", chart, len(b), err)
		}
	}
	if err := found.save(filepath.Join(dir, "results.json")); err != nil {
		t.Fatal(err)
	}
	again, err := readResults(filepath.Join(dir, "results.json"))
	if err != nil || !reflect.DeepEqual(again, found) {
		t.Errorf("stored and loaded: %+v, %v", again, err)
	}
}
