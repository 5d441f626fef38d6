// Package journal passes lines to a logger of the user. A logger may wait, for example for an answer over the NATS
// connection that the line is about, and it may take locks of the user. So a goroutine of the journal calls it, without
// any lock. The goroutine exists only while lines wait.
package journal

import (
	"context"
	"log/slog"
	"runtime"
	"sync"
	"time"
)

// most is how many lines wait for a slow logger. Further lines are dropped.
const most = 1 << 10

// Journal passes lines to one logger, in the order in which they were added. Its methods may be called concurrently.
type Journal struct {
	log *slog.Logger

	mu      sync.Mutex
	lines   []slog.Record
	dropped int           // since the last line was passed on
	idle    chan struct{} // closed when no line waits; nil while there is no goroutine
}

// New returns a journal for log.
func New(log *slog.Logger) *Journal { return &Journal{log: log} }

// Info, Warn and Error add a line. They do not wait for the logger, so the caller may hold locks.
func (j *Journal) Info(text string, args ...any)  { j.add(slog.LevelInfo, text, args) }
func (j *Journal) Warn(text string, args ...any)  { j.add(slog.LevelWarn, text, args) }
func (j *Journal) Error(text string, args ...any) { j.add(slog.LevelError, text, args) }

func (j *Journal) add(level slog.Level, text string, args []any) {
	var caller [1]uintptr
	runtime.Callers(3, caller[:]) // of Info, Warn or Error
	line := slog.NewRecord(time.Now(), level, text, caller[0])
	line.Add(args...)
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(j.lines) >= most {
		j.dropped++
		return
	}
	j.lines = append(j.lines, line)
	if j.idle == nil {
		j.idle = make(chan struct{})
		go j.run()
	}
}

// run passes lines on until none waits.
func (j *Journal) run() {
	for {
		j.mu.Lock()
		lines, dropped := j.lines, j.dropped
		j.lines, j.dropped = nil, 0
		if len(lines) == 0 {
			close(j.idle)
			j.idle = nil
			j.mu.Unlock()
			return
		}
		j.mu.Unlock()
		if dropped > 0 { // they came after these lines
			line := slog.NewRecord(time.Now(), slog.LevelWarn, "stream: lines are missing here, because the logger took too long; make it faster", 0)
			line.Add("lines", dropped)
			lines = append(lines, line)
		}
		for _, line := range lines {
			j.pass(line)
		}
	}
}

// pass passes a line to the logger. An error of the logger cannot be logged.
func (j *Journal) pass(line slog.Record) {
	if ctx := context.Background(); j.log.Enabled(ctx, line.Level) {
		_ = j.log.Handler().Handle(ctx, line)
	}
}

// Wait returns when the logger has all lines that were added, or after the timeout.
func (j *Journal) Wait(timeout time.Duration) {
	j.mu.Lock()
	idle := j.idle
	j.mu.Unlock()
	if idle == nil {
		return
	}
	late := time.NewTimer(timeout)
	defer late.Stop()
	select {
	case <-idle:
	case <-late.C:
	}
}
