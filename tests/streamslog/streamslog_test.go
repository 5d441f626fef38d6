package streamslog_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamslog"
	"github.com/natsstream/stream/streamtest"
)

const patience = time.Minute

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

// text returns a line without its time and duration, which differ from run to run.
func text(m map[string]any) string {
	delete(m, "time")
	delete(m, "duration")
	b, _ := json.Marshal(m)
	return string(b)
}

// ends are a client and a server with hooks, whose handler fails or sends the consumer's records back.
type ends struct {
	client *stream.Client
	close  func() // ends both, and waits for their hooks
}

func newEnds(t *testing.T, client, server *nats.Conn, hooks stream.Hooks) ends {
	t.Helper()
	c, err := stream.NewClient(stream.ClientParams{Conn: client, Hooks: hooks})
	if err != nil {
		t.Fatal(err)
	}
	s, err := stream.NewServer(stream.ServerParams{Conn: server, Hooks: hooks})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Handle("svc", func(w *stream.Writer, r *stream.Request) error {
		if string(r.Data) == "fail" {
			return &stream.CloseError{Code: 4242, Text: "no such job"}
		}
		for rec, err := range r.All() {
			if err != nil {
				return err
			}
			if _, err := w.Write(rec); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if err := server.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	e := ends{c, func() {
		for limit := time.Now().Add(patience); s.Stats().Streams+c.Stats().Streams > 0 && time.Now().Before(limit); time.Sleep(time.Millisecond) {
		}
		_ = c.Close()
		_ = s.Close()
	}}
	t.Cleanup(e.close)
	return e
}

func (e ends) open(t *testing.T, data string) *stream.Stream {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	s, err := e.client.Open(ctx, "svc", []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// exchange sends records, reads them back, and ends the stream.
func exchange(t *testing.T, s *stream.Stream, records int, meanwhile func()) {
	t.Helper()
	sent := make(chan error, 1)
	go func() {
		for i := range records {
			if i == records/2 {
				meanwhile()
			}
			if _, err := s.Write([]byte("record")); err != nil {
				sent <- err
				return
			}
		}
		sent <- s.CloseSend()
	}()
	n := 0
	for _, err := range s.All() {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if err := <-sent; err != nil || n != records {
		t.Fatalf("%d records, %v", n, err)
	}
}

func TestStreamsAreLogged(t *testing.T) {
	l, logger := newLines(slog.LevelDebug)
	srv := streamtest.Run(t)
	e := newEnds(t, srv.Connect(t), srv.Connect(t), streamslog.New(logger))
	exchange(t, e.open(t, ""), 3, func() {})
	if _, err := e.open(t, "fail").Recv(); !errors.Is(err, &stream.CloseError{Code: 4242}) {
		t.Fatal(err)
	}
	e.close()
	if n := len(l.with("stream opened")); n != 4 {
		t.Errorf("%d lines of opened streams, want 4", n)
	}
	got := map[string]bool{}
	for _, m := range l.with("stream closed") {
		if d, ok := m["duration"].(float64); !ok || d <= 0 {
			t.Errorf("duration %v", m["duration"])
		}
		got[text(m)] = true
	}
	for _, want := range []string{
		`{"bytes_in":18,"bytes_out":18,"code":1000,"level":"DEBUG","msg":"stream closed","records_in":3,"records_out":3,"side":"consumer","stream":1,"subject":"svc"}`,
		`{"bytes_in":18,"bytes_out":18,"code":1000,"level":"DEBUG","msg":"stream closed","records_in":3,"records_out":3,"side":"producer","stream":1,"subject":"svc"}`,
		`{"bytes_in":0,"bytes_out":0,"code":4242,"error":"nats stream: close 4242: no such job","level":"WARN","msg":"stream closed","records_in":0,"records_out":0,"side":"consumer","stream":2,"subject":"svc"}`,
		`{"bytes_in":0,"bytes_out":0,"code":4242,"error":"nats stream: close 4242: no such job","level":"WARN","msg":"stream closed","records_in":0,"records_out":0,"side":"producer","stream":2,"subject":"svc"}`,
	} {
		if !got[want] {
			t.Errorf("no line %s, in %v", want, got)
		}
	}
}

func TestRepairsAreLogged(t *testing.T) {
	l, logger := newLines(slog.LevelInfo)
	rng := rand.New(rand.NewPCG(1, 2))
	i := streamtest.RunInterceptor(t, streamtest.Run(t).URL(), streamtest.Only(streamtest.HasPrefix(0xF5), streamtest.Drop(0.05, rng)))
	network := streamtest.RunProxy(t, i.URL())
	dial := func() *nats.Conn {
		nc, err := nats.Connect(network.URL(), nats.IgnoreDiscoveredServers(), nats.ReconnectWait(10*time.Millisecond), nats.MaxReconnects(-1))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	e := newEnds(t, dial(), dial(), streamslog.New(logger))
	logged := func(message string) bool { return len(l.with(message)) > 0 }
	for range 100 {
		exchange(t, e.open(t, ""), 20_000, network.Cut)
		if logged("stream retransmitted packets") && logged("stream reconnected") {
			break
		}
	}
	e.close()
	for _, message := range []string{"stream retransmitted packets", "stream reconnected"} {
		found := l.with(message)
		if len(found) == 0 {
			t.Errorf("no line %q", message)
			continue
		}
		if m := found[0]; m["level"] != "INFO" || m["subject"] != "svc" || m["stream"] == nil || m["side"] == nil {
			t.Errorf("%v", m)
		}
	}
	if m := l.with("stream retransmitted packets"); len(m) > 0 && m[0]["packets"].(float64) < 1 {
		t.Errorf("%v", m[0])
	}
	if n := len(l.with("stream opened")); n > 0 {
		t.Errorf("%d lines at the level Debug", n)
	}
}

// An error of NATS names the subject of a peer, which ends with the token of the stream.
func TestNoTokenIsLogged(t *testing.T) {
	var out bytes.Buffer
	var mu sync.Mutex
	logger := slog.New(slog.NewTextHandler(writer(func(p []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return out.Write(p)
	}), &slog.HandlerOptions{Level: slog.LevelDebug}))
	srv := streamtest.Run(t, streamtest.WithConfig(`authorization { users: [
		{ user: client, password: x }
		{ user: server, password: x, permissions: { publish: { deny: "_SINBOX.>" } } }
	] }`))
	quiet := nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})
	e := newEnds(t, srv.Connect(t, nats.UserInfo("client", "x"), quiet), srv.Connect(t, nats.UserInfo("server", "x"), quiet), streamslog.New(logger))
	s := e.open(t, "fail")
	refused := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return strings.Contains(out.String(), "level=WARN")
	}
	for limit := time.Now().Add(patience); !refused() && time.Now().Before(limit); time.Sleep(time.Millisecond) {
	}
	_ = s.Close()
	e.close()
	if text := out.String(); strings.Contains(text, "~") || !strings.Contains(text, "***") {
		t.Error(text)
	}
}

type writer func([]byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }
