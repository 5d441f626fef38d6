package streamslog

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// lines collects the lines of a logger.
type lines struct {
	mu  sync.Mutex
	all []map[string]any
}

func (l *lines) Write(line []byte) (int, error) {
	var m map[string]any
	if err := json.Unmarshal(line, &m); err != nil {
		return 0, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, m)
	return len(line), nil
}

// with returns the lines with a message.
func (l *lines) with(message string) (found []map[string]any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, m := range l.all {
		if m["msg"] == message {
			found = append(found, m)
		}
	}
	return found
}

func newLines(level slog.Level) (*lines, *slog.Logger) {
	l := new(lines)
	return l, slog.New(slog.NewJSONHandler(l, &slog.HandlerOptions{Level: level}))
}

// Thousands of streams that fail at once make a few lines, and the last one counts the rest.
func TestRatesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, logger := newLines(slog.LevelInfo)
		h := New(logger)
		all := func() {
			for i := range uint64(1000) {
				info := stream.StreamInfo{ID: i, Subject: "svc"}
				h.Opened(info)
				h.Retransmitted(info, 2)
				h.Reconnected(info)
				h.Closed(info, stream.Totals{}, nats.ErrNoResponders)
				h.Closed(info, stream.Totals{}, &stream.CloseError{Code: stream.CloseGoingAway})
				h.Closed(info, stream.Totals{}, nil)
			}
		}
		for range 3 { // the bound begins again
			l.all = nil
			all()
			time.Sleep(interval)
			synctest.Wait()
			for message, want := range map[string]int{
				"stream opened": 0, "stream closed": 11, "stream retransmitted packets": 1, "stream reconnected": 1,
				"streams closed": 2, "streams retransmitted packets": 1, "streams reconnected": 1,
			} {
				if n := len(l.with(message)); n != want {
					t.Errorf("%d lines %q, want %d", n, message, want)
				}
			}
			for _, m := range l.with("streams closed") {
				if want := map[any]float64{"WARN": 990, "INFO": 999}[m["level"]]; m["events"] != want {
					t.Errorf("%v, want %v events", m, want)
				}
			}
			if m := l.with("streams retransmitted packets")[0]; m["events"] != 999. || m["packets"] != 1998. {
				t.Errorf("%v", m)
			}
		}
		l.all = nil
		h.Reconnected(stream.StreamInfo{ID: 1})
		time.Sleep(2 * interval)
		synctest.Wait()
		if len(l.all) != 1 {
			t.Errorf("%v, want a line for the stream and none that counts", l.all)
		}
	})
}

func TestEndsHaveLevels(t *testing.T) {
	for _, tt := range []struct {
		err  error
		want slog.Level
	}{
		{nil, slog.LevelDebug},
		{stream.ErrClosed, slog.LevelDebug},
		{context.Canceled, slog.LevelDebug},
		{fmt.Errorf("handler: %w", context.Canceled), slog.LevelDebug},
		{&stream.CloseError{Code: stream.CloseCanceled}, slog.LevelDebug},
		{stream.ErrClientClosed, slog.LevelInfo},
		{stream.ErrServerClosed, slog.LevelInfo},
		{&stream.CloseError{Code: stream.CloseGoingAway, Text: "shutting down"}, slog.LevelInfo},
		{context.DeadlineExceeded, slog.LevelWarn},
		{nats.ErrNoResponders, slog.LevelWarn},
		{&stream.CloseError{Code: stream.CloseAbnormalClosure}, slog.LevelWarn},
		{&stream.CloseError{Code: stream.CloseInternalServerErr}, slog.LevelWarn},
		{errors.New("other"), slog.LevelWarn},
	} {
		if got := levelOf(tt.err); got != tt.want {
			t.Errorf("%v: %v, want %v", tt.err, got, tt.want)
		}
	}
}

// An error of NATS names the subject of a peer, which ends with the token of the stream.
func TestTokensAreTakenOutOfTexts(t *testing.T) {
	for text, want := range map[string]string{
		`publish to _SINBOX.abc.` + string(stream.AppendToken(nil, stream.Token{LogPackets: 5, LogBytes: 16, ID: 1<<60 + 3})) + `"`: `publish to _SINBOX.abc.***"`,
		`a token of another version ~9abc, too`: `a token of another version ***, too`,
		`about ~ 5`:                             `about ~ 5`,
		`nothing`:                               `nothing`,
	} {
		if got := withoutTokens(text); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestSubjectsCanBeHidden(t *testing.T) {
	l, logger := newLines(slog.LevelDebug)
	h := New(logger, WithSubject(func(string) string { return "users.*" }))
	h.Opened(stream.StreamInfo{Subject: "users.smith"})
	if found := l.with("stream opened"); len(found) != 1 || found[0]["subject"] != "users.*" {
		t.Errorf("%v", found)
	}
}

// A log that does not take a level costs nothing but the question.
func TestDisabledLinesAllocateNothing(t *testing.T) {
	h := New(slog.New(slog.DiscardHandler))
	i := stream.StreamInfo{Subject: "svc"}
	if n := testing.AllocsPerRun(100, func() {
		h.Opened(i)
		h.Retransmitted(i, 1)
		h.Closed(i, stream.Totals{}, nil)
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
