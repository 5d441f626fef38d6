package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// contents are the files of the test folder, with what makes cutting lines hard.
var contents = map[string]string{
	"many.txt":       strings.Repeat("a line\n", 20_000),
	"sub/long.txt":   "short\n" + strings.Repeat("x", 700<<10) + "\nend\n",
	"empty-lines":    "\n\n\n",
	"no-last-feed":   "one\ntwo",
	"crlf.txt":       "one\r\ntwo\r\n",
	"utf8.txt":       strings.Repeat("aé€😀", 2000) + "\n",
	"binary":         "a\x00b\n",
	"invalid":        "a\xffb\n",
	"nothing":        "",
	".git/hidden.go": "package hidden\n",
}

func writeFiles(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range contents {
		path := filepath.Join(dir, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestTextFiles(t *testing.T) {
	dir := writeFiles(t)
	names := func(limit int) (names []string) {
		files, err := textFiles(dir, limit)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			names = append(names, f.name)
			if f.size != int64(len(contents[f.name])) {
				t.Errorf("%s: size %d, want %d", f.name, f.size, len(contents[f.name]))
			}
		}
		return names
	}
	all := []string{"sub/long.txt", "many.txt", "utf8.txt", "crlf.txt", "no-last-feed", "empty-lines"}
	if got := names(0); !slices.Equal(got, all) {
		t.Errorf("all files: %q, want %q", got, all)
	}
	if got := names(2); !slices.Equal(got, all[:2]) {
		t.Errorf("the two largest: %q, want %q", got, all[:2])
	}
	if _, err := textFiles(t.TempDir(), 0); err == nil {
		t.Error("an empty folder gave no error")
	}
	if _, err := textFiles(filepath.Join(dir, "missing"), 0); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing folder: %v", err)
	}
}

func TestRun(t *testing.T) {
	dir := writeFiles(t)
	external := streamtest.Run(t)
	for _, tc := range []struct {
		name   string
		cfg    config
		redraw bool
	}{
		{"embedded server", config{n: 4, repeat: 3}, false},
		{"external server", config{n: 2, repeat: 2, url: external.URL()}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.cfg.dir = dir
			var out bytes.Buffer
			if err := run(t.Context(), tc.cfg, &out, tc.redraw); err != nil {
				t.Fatalf("%v\n%s", err, &out)
			}
			text := out.String()
			if n := strings.Count(text, " equal "); n != 7 || strings.Contains(text, "DIFFER") {
				t.Errorf("%d files and totals equal, want 7:\n%s", n, text)
			}
			if strings.Contains(text, "\r") != tc.redraw {
				t.Errorf("redrawn %v, want %v:\n%s", !tc.redraw, tc.redraw, text)
			}
			want := grouped(int64(tc.cfg.repeat) * 20_000)
			if !slices.ContainsFunc(strings.Split(text, "\n"), func(line string) bool {
				return strings.Contains(line, "many.txt") && slices.Contains(strings.Fields(line), want)
			}) {
				t.Errorf("no line says that many.txt had %s records:\n%s", want, text)
			}
		})
	}
}

func TestRunFails(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), config{dir: t.TempDir(), n: 1, repeat: 1}, &out, false); err == nil {
		t.Error("a folder without files: no error")
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := run(ended, config{dir: writeFiles(t), n: 2, repeat: 5}, &out, false); err == nil {
		t.Error("interrupted: no error")
	}
	if err := run(t.Context(), config{dir: writeFiles(t), n: 1, repeat: 1, url: "nats://127.0.0.1:1"}, &out, false); err == nil {
		t.Error("no server: no error")
	}
}

// startPair starts both ends over one server.
func startPair(t *testing.T) (*producer, *consumer) {
	t.Helper()
	srv := streamtest.Run(t)
	dir := writeFiles(t)
	files, err := textFiles(dir, 0)
	if err != nil {
		t.Fatal(err)
	}
	p, err := startProducer(srv.URL(), "demo", dir, files)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.stop)
	c, err := newConsumer(srv.URL(), "demo")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.stop)
	return p, c
}

func TestUnknownFile(t *testing.T) {
	_, c := startPair(t)
	for _, name := range []string{"", "missing", "binary", "../etc/passwd", ".git/hidden.go", "\xff", strings.Repeat("long", 1000)} {
		_, err := c.receive(t.Context(), name)
		closed, ok := errors.AsType[*stream.CloseError](err)
		if !ok || closed.Code != stream.CloseBadRequest {
			t.Errorf("%q: %v, want a close with %d", name, err, stream.CloseBadRequest)
		}
	}
}

func TestDifferenceIsNoticed(t *testing.T) {
	_, c := startPair(t)
	got, err := c.receive(t.Context(), "many.txt")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.compare(t.Context(), "many.txt", got); err != nil {
		t.Fatalf("the same: %v", err)
	}
	for _, change := range []func(*sum){
		func(s *sum) { s.Records-- },
		func(s *sum) { s.Bytes++ },
		func(s *sum) { s.SHA256 = strings.Repeat("0", 64) },
	} {
		changed := got
		change(&changed)
		err := c.compare(t.Context(), "many.txt", changed)
		if !errors.Is(err, errDiffer) {
			t.Fatalf("%+v was taken for %+v: %v", changed, got, err)
		}
		var out bytes.Buffer
		results := []result{{name: "good"}, {name: "bad", err: err}, {name: "late", err: context.Canceled}}
		if failed := printTable(&out, results, time.Second); failed != 2 {
			t.Errorf("%d failed, want 2", failed)
		}
		text := out.String()
		if strings.Count(text, "DIFFER") != 1 || strings.Count(text, "BROKEN OFF") != 1 || strings.Count(text, "NOT EQUAL") != 1 ||
			!strings.Contains(text, "bad: both ends differ: sent 20000 records") || !strings.Contains(text, "late: context canceled") {
			t.Errorf("the table hides the difference:\n%s", text)
		}
	}
}

// TestStopUnderOpenStream ends a producer that waits for a consumer who does not read.
func TestStopUnderOpenStream(t *testing.T) {
	p, c := startPair(t)
	s, err := c.client.Open(t.Context(), "demo.lines", []byte("sub/long.txt"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	stopped := make(chan struct{})
	go func() { defer close(stopped); p.stop() }()
	select {
	case <-stopped:
	case <-time.After(10 * time.Second):
		t.Fatal("the producer does not stop")
	}
}

func TestGrouped(t *testing.T) {
	for n, want := range map[int64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567", -1: "-1", -123: "-123", -1234: "-1,234"} {
		if got := grouped(n); got != want {
			t.Errorf("grouped(%d) = %s, want %s", n, got, want)
		}
	}
}
