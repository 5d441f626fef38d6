// Package streamslog logs the opening, the end, retransmissions and reconnects of streams, with log/slog. It never logs
// a record.
//
//	logs := streamslog.New(slog.Default())
//
//	client, err := stream.NewClient(stream.ClientParams{Conn: nc, Hooks: logs})
//	server, err := stream.NewServer(stream.ServerParams{Conn: nc, Hooks: logs})
//
// [stream.JoinHooks] joins them with other hooks, such as those of metrics.
//
// # Lines
//
//   - "stream opened", at the level Debug
//   - "stream closed": at the level Debug after the normal end, and if the consumer has left or its context was
//     canceled. At the level Info if one end shuts down. At the level Warn after any other end.
//   - "stream retransmitted packets", at the level Info
//   - "stream reconnected", at the level Info: the stream goes on after a reconnect of this end
//
// # Rates
//
// Lines at Info and Warn are bounded, because thousands of streams may share a fault. In ten seconds, the first ten
// streams that close with a warning get lines of their own, and so does the first stream of each other event. A last
// line counts the rest: "streams closed", "streams retransmitted packets" or "streams reconnected". It comes at the end
// of the ten seconds, so a program that exits before loses it. Lines at Debug are not bounded.
//
// # Attributes
//
//   - subject, of the request: empty for writers of [stream.NewWriter]
//   - side: consumer or producer
//   - stream: the number of the stream at its client or server
//   - duration: from open to close
//   - records_in, bytes_in, records_out, bytes_out: what this end has received and sent, when the stream is closed
//   - code: the close code, if there is one
//   - error: of a stream that did not end normally
//   - packets: how many packets were retransmitted
//   - events: how many events a line counts
//
// Errors of NATS may contain tokens of streams, and a user who knows a token may read and write the stream. So lines
// have "***" in place of tokens. Other texts of errors are those of peers and handlers.
package streamslog

import (
	"context"
	"errors"
	"log/slog"
	"regexp"
	"sync"
	"time"

	"github.com/natsstream/stream"
)

const (
	interval = 10 * time.Second // of the bounds
	warnings = 10               // lines of their own in an interval
	others   = 1
)

// Option configures [New].
type Option func(*logs)

// WithSubject sets a function that returns the subject to log. Let it hide parts that must not be in a log, such as
// names of persons.
func WithSubject(f func(subject string) string) Option { return func(l *logs) { l.subject = f } }

// New returns hooks that log to logger, or to [slog.Default] if logger is nil. Any number of clients and servers may
// share them. To tell these apart, give each hooks of its own, with a logger that has an attribute.
func New(logger *slog.Logger, opts ...Option) stream.Hooks {
	if logger == nil {
		logger = slog.Default()
	}
	l := &logs{log: logger, subject: func(s string) string { return s }}
	for _, set := range opts {
		set(l)
	}
	l.failed = l.bounded(warnings, slog.LevelWarn, "streams closed")
	l.shut = l.bounded(others, slog.LevelInfo, "streams closed")
	l.resent = l.bounded(others, slog.LevelInfo, "streams retransmitted packets")
	l.back = l.bounded(others, slog.LevelInfo, "streams reconnected")
	return stream.Hooks{Opened: l.opened, Closed: l.closed, Retransmitted: l.retransmitted, Reconnected: l.reconnected}
}

// logs has the hooks as methods. The goroutines of hooks, one for each client or server, call them. Its fields are set
// once.
type logs struct {
	log                        *slog.Logger
	subject                    func(string) string
	failed, shut, resent, back *bound
}

func (l *logs) enabled(level slog.Level) bool { return l.log.Enabled(context.Background(), level) }

// line logs an event of a stream.
func (l *logs) line(level slog.Level, message string, i stream.StreamInfo, more ...slog.Attr) {
	side := "consumer"
	if i.Producer {
		side = "producer"
	}
	attrs := append([]slog.Attr{slog.String("subject", l.subject(i.Subject)), slog.String("side", side), slog.Uint64("stream", i.ID)}, more...)
	l.log.LogAttrs(context.Background(), level, message, attrs...)
}

func (l *logs) opened(i stream.StreamInfo) {
	if l.enabled(slog.LevelDebug) {
		l.line(slog.LevelDebug, "stream opened", i)
	}
}

func (l *logs) closed(i stream.StreamInfo, t stream.Totals, err error) {
	level := levelOf(err)
	if !l.enabled(level) || level == slog.LevelInfo && !l.shut.take(0) || level == slog.LevelWarn && !l.failed.take(0) {
		return
	}
	attrs := []slog.Attr{
		slog.Duration("duration", i.Elapsed),
		slog.Uint64("records_in", t.RecordsIn), slog.Uint64("bytes_in", t.BytesIn),
		slog.Uint64("records_out", t.RecordsOut), slog.Uint64("bytes_out", t.BytesOut),
	}
	if err == nil {
		attrs = append(attrs, slog.Int("code", stream.CloseNormalClosure))
	} else {
		if end, ok := errors.AsType[*stream.CloseError](err); ok {
			attrs = append(attrs, slog.Int("code", end.Code))
		}
		attrs = append(attrs, slog.String("error", withoutTokens(err.Error())))
	}
	l.line(level, "stream closed", i, attrs...)
}

func (l *logs) retransmitted(i stream.StreamInfo, packets int) {
	if l.enabled(slog.LevelInfo) && l.resent.take(packets) {
		l.line(slog.LevelInfo, "stream retransmitted packets", i, slog.Int("packets", packets))
	}
}

func (l *logs) reconnected(i stream.StreamInfo) {
	if l.enabled(slog.LevelInfo) && l.back.take(0) {
		l.line(slog.LevelInfo, "stream reconnected", i)
	}
}

// levelOf returns the level of the end of a stream.
func levelOf(err error) slog.Level {
	end, coded := errors.AsType[*stream.CloseError](err)
	switch {
	case err == nil, errors.Is(err, stream.ErrClosed), errors.Is(err, context.Canceled), coded && end.Code == stream.CloseCanceled:
		return slog.LevelDebug
	case errors.Is(err, stream.ErrClientClosed), errors.Is(err, stream.ErrServerClosed), coded && end.Code == stream.CloseGoingAway:
		return slog.LevelInfo
	}
	return slog.LevelWarn
}

// tokenLike finds texts that may be tokens.
var tokenLike = regexp.MustCompile(`~[0-9A-Za-z]+`)

// withoutTokens returns text with its tokens replaced, also those of other versions of the protocol.
func withoutTokens(text string) string {
	return tokenLike.ReplaceAllStringFunc(text, func(s string) string {
		if _, err := stream.ParseToken(s); err != nil && !errors.Is(err, stream.ErrVersion) {
			return s
		}
		return "***"
	})
}

// bound bounds the lines of a kind of event, and counts the others. It has a timer only while an interval runs. The
// goroutines of hooks call take, and a goroutine of package time calls end.
type bound struct {
	own     int // lines of their own in an interval
	summary func(events, packets int)

	mu      sync.Mutex // guards the fields below
	running bool       // an interval runs
	taken   int        // lines of their own in it
	events  int        // in it, without such a line
	packets int        // of these events
}

// bounded returns a bound whose last line has a level and a message.
func (l *logs) bounded(own int, level slog.Level, message string) *bound {
	return &bound{own: own, summary: func(events, packets int) {
		attrs := []slog.Attr{slog.Int("events", events)}
		if packets > 0 {
			attrs = append(attrs, slog.Int("packets", packets))
		}
		l.log.LogAttrs(context.Background(), level, message, attrs...)
	}}
}

// take reports whether an event has a line of its own. Otherwise it counts the event.
func (b *bound) take(packets int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.running {
		b.running, b.taken = true, 0
		time.AfterFunc(interval, b.end)
	}
	if b.taken < b.own {
		b.taken++
		return true
	}
	b.events++
	b.packets += packets
	return false
}

// end ends the interval. The next event begins another one.
func (b *bound) end() {
	b.mu.Lock()
	events, packets := b.events, b.packets
	b.running, b.events, b.packets = false, 0, 0
	b.mu.Unlock()
	if events > 0 {
		b.summary(events, packets)
	}
}
