package journal

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// recorder is a logger that waits for its gate at each line.
type recorder struct {
	slog.Handler
	gate chan struct{} // closed to let lines pass
	mu   sync.Mutex
	got  []slog.Record
}

func newRecorder() *recorder { return &recorder{gate: make(chan struct{})} }

func (r *recorder) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelInfo }

func (r *recorder) Handle(_ context.Context, line slog.Record) error {
	<-r.gate
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got = append(r.got, line)
	return nil
}

func (r *recorder) texts() (all []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, line := range r.got {
		text := line.Level.String() + " " + line.Message
		line.Attrs(func(a slog.Attr) bool {
			text += " " + a.String()
			return true
		})
		all = append(all, text)
	}
	return all
}

func TestLinesKeepTheirOrder(t *testing.T) {
	r := newRecorder()
	close(r.gate)
	j := New(slog.New(r))
	var want []string
	for i := range 500 {
		switch i % 3 {
		case 0:
			j.Info("line", "n", i)
			want = append(want, fmt.Sprintf("INFO line n=%d", i))
		case 1:
			j.Warn("line", "n", i)
			want = append(want, fmt.Sprintf("WARN line n=%d", i))
		default:
			j.Error("line", "n", i)
			want = append(want, fmt.Sprintf("ERROR line n=%d", i))
		}
	}
	j.Wait(time.Minute)
	if got := r.texts(); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

// A line states when and by which function it was added, however late the logger gets it.
func TestLinesStateTheirOrigin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRecorder()
		j := New(slog.New(r))
		began := time.Now()
		j.Info("line")
		time.Sleep(time.Hour)
		close(r.gate)
		j.Wait(time.Minute)
		if line := r.got[0]; !line.Time.Equal(began) || !strings.HasSuffix(line.Source().Function, t.Name()+".func1") {
			t.Errorf("%v after the start, from %s", line.Time.Sub(began), line.Source().Function)
		}
	})
}

func TestWaitEndsWithoutTheLogger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRecorder()
		j := New(slog.New(r))
		j.Wait(time.Minute) // nothing waits
		began := time.Now()
		j.Info("line")
		j.Wait(time.Minute)
		if d := time.Since(began); d != time.Minute {
			t.Errorf("Wait took %v", d)
		}
		close(r.gate)
	})
}

// A logger that takes no lines costs a bounded number of them, and learns how many it missed.
func TestLinesForAStuckLoggerAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRecorder()
		j := New(slog.New(r))
		j.Info("first")
		synctest.Wait() // the logger has it, and waits
		for range most + 7 {
			j.Info("line")
		}
		close(r.gate)
		j.Wait(time.Minute)
		got := r.texts()
		if n := len(got); n != most+2 || !strings.HasSuffix(got[n-1], "lines=7") {
			t.Errorf("%d lines, the last is %q", n, got[n-1])
		}
		j.Info("next")
		j.Wait(time.Minute)
		if got = r.texts(); got[len(got)-1] != "INFO next" {
			t.Errorf("the last line is %q", got[len(got)-1])
		}
	})
}
