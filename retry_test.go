package stream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

func openRetry(t testing.TB, p *pair, subject string, retry stream.Retry) (s *stream.Stream, err error) {
	t.Helper()
	waitFor(t, "OpenRetry", func() { s, err = p.consumer.OpenRetry(testContext(t), &nats.Msg{Subject: subject}, retry) })
	if err == nil {
		t.Cleanup(func() { s.Close() })
	}
	return s, err
}

// Only an error that says that no handler saw the request is retryable.
func TestRetryable(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		want bool
	}{
		"nil":                      {nil, false},
		"no responders":            {nats.ErrNoResponders, true},
		"no responders, wrapped":   {fmt.Errorf("open: %w", nats.ErrNoResponders), true},
		"a peer that was lost":     {fmt.Errorf("%w: %w", &stream.CloseError{Code: stream.CloseAbnormalClosure}, nats.ErrNoResponders), false},
		"an error of that code":    {&stream.CloseError{Code: stream.CloseTryAgainLater}, false},
		"the connection is closed": {nats.ErrConnectionClosed, false},
		"the context ended":        {context.DeadlineExceeded, false},
		"the end":                  {io.EOF, false},
	} {
		if got := stream.Retryable(c.err); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}

	var result error
	var writes bool
	h := func(w *stream.Writer, _ *stream.Request) error {
		if writes {
			if _, err := w.Write([]byte("a")); err != nil {
				return err
			}
		}
		return result
	}
	p, _ := newServed(t, stream.ServerParams{}, h)
	for _, code := range []int{stream.CloseTryAgainLater, stream.CloseGoingAway, stream.CloseInternalServerErr} {
		for _, writes = range []bool{false, true} {
			result = &stream.CloseError{Code: code}
			_, err := readAll(open(t, p.consumer, "svc"))
			wantCode(t, err, code, "")
			if stream.Retryable(err) {
				t.Errorf("a handler returned code %d, which is retryable", code)
			}
		}
	}
	full := newHeld()
	s := newService(t, p, stream.ServerParams{MaxStreams: 1})
	s.handle(t, "full", full.handle)
	running := begin(t, p, "full")
	err := refusedWith(t, p, "full")
	wantCode(t, err, stream.CloseTryAgainLater, "")
	if !stream.Retryable(fmt.Errorf("open: %w", err)) {
		t.Errorf("a refusal is not retryable: %v", err)
	}
	close(full.release)
	wantEOF(t, running)
}

// As many streams as there is room for, opened at once, all find a member of the group that takes them, and no handler runs twice.
func TestOpenRetryFindsRoom(t *testing.T) {
	const members, size = 3, 10
	p := newPair(t)
	h := newHeld()
	for range members {
		newService(t, p, stream.ServerParams{MaxStreams: size}).register(t, "svc", "q", h.handle)
	}
	var wg sync.WaitGroup
	for range members * size {
		wg.Go(func() {
			s, err := p.consumer.OpenRetry(testContext(t), &nats.Msg{Subject: "svc"}, stream.Retry{Attempts: 1000, Wait: time.Millisecond, MaxWait: 50 * time.Millisecond})
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := s.Recv(); err != nil {
				t.Error(err)
			}
			if _, err := s.Recv(); err != io.EOF {
				t.Error(err)
			}
		})
	}
	eventually(t, "all handlers run", func() bool { return h.calls.Load() == members*size })
	close(h.release)
	waitFor(t, "all streams", wg.Wait)
	if n := h.calls.Load(); n != members*size {
		t.Errorf("%d handlers ran for %d streams", n, members*size)
	}
}

// A producer that answers, in whatever way, is not asked again.
func TestOpenRetryAsksOnceIfAnswered(t *testing.T) {
	var calls atomic.Int32
	count := func(h stream.Handler) stream.Handler {
		return func(w *stream.Writer, r *stream.Request) error { calls.Add(1); return h(w, r) }
	}
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	s.handle(t, "reads", count(func(w *stream.Writer, r *stream.Request) error {
		_, err := r.WriteTo(w) // to the end: CloseSend fails once the handler has returned
		return err
	}))
	s.handle(t, "waits", count(func(w *stream.Writer, r *stream.Request) error {
		<-r.Context().Done()
		return nil
	}))
	s.handle(t, "busy", count(func(*stream.Writer, *stream.Request) error {
		return &stream.CloseError{Code: stream.CloseTryAgainLater, Text: "its own"}
	}))
	s.handle(t, "done", count(nothing))
	sub, err := p.producer.Conn.Subscribe("old", func(m *nats.Msg) {
		calls.Add(1)
		_ = p.producer.Conn.Publish(m.Reply, []byte(`{"type":2,"closeError":{"Code":1013,"Text":"old"}}`))
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := p.producer.Conn.Flush(); err != nil {
		t.Fatal(err)
	}

	for subject, use := range map[string]func(s *stream.Stream) error{
		"reads": func(s *stream.Stream) error {
			if _, err := s.Write([]byte("a")); err != nil {
				return err
			}
			_, err := s.Recv()
			return errors.Join(err, s.CloseSend())
		},
		"waits": func(s *stream.Stream) error { return s.Close() },
		"busy": func(s *stream.Stream) error {
			_, err := s.Recv()
			wantCode(t, err, stream.CloseTryAgainLater, "its own")
			return nil
		},
		"done": func(s *stream.Stream) error { wantEOF(t, s); return nil },
		"old": func(s *stream.Stream) error {
			_, err := s.Recv()
			wantCode(t, err, stream.CloseTryAgainLater, "old")
			return nil
		},
	} {
		t.Run(subject, func(t *testing.T) {
			calls.Store(0)
			s, err := openRetry(t, p, subject, stream.Retry{})
			if err != nil {
				t.Fatal(err)
			}
			waitFor(t, "its use", func() { err = use(s) })
			if err != nil {
				t.Error(err)
			}
			if n := calls.Load(); n != 1 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

func nothing(*stream.Writer, *stream.Request) error { return nil }

func TestOpenRetryGivesUp(t *testing.T) {
	full := newHeld()
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{MaxStreams: 1})
	s.handle(t, "full", full.handle)
	running := begin(t, p, "full")
	quick := stream.Retry{Attempts: 3, Wait: time.Millisecond}
	_, err := openRetry(t, p, "full", quick)
	wantCode(t, err, stream.CloseTryAgainLater, "")
	if _, err := openRetry(t, p, "nobody", quick); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("nobody serves: %v", err)
	}
	if n := full.calls.Load(); n != 1 {
		t.Errorf("%d handlers ran", n)
	}
	close(full.release)
	wantEOF(t, running)

	ctx, cancel := context.WithCancel(testContext(t))
	result := make(chan error, 1)
	go func() {
		_, err := p.consumer.OpenRetry(ctx, &nats.Msg{Subject: "nobody"}, stream.Retry{Wait: time.Hour, MaxWait: time.Hour})
		result <- err
	}()
	cancel()
	waitFor(t, "the context's end", func() { err = <-result })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the context ended: %v", err)
	}

	for _, bad := range []stream.Retry{{Attempts: -1}, {Wait: -1}, {MaxWait: -1}} {
		if _, err := openRetry(t, p, "nobody", bad); err == nil || !strings.Contains(err.Error(), "Retry") {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if _, err := p.consumer.OpenRetry(testContext(t), nil, stream.Retry{}); !errors.Is(err, nats.ErrInvalidMsg) {
		t.Errorf("no message: %v", err)
	}
	if _, err := openRetry(t, p, "a b", stream.Retry{}); !errors.Is(err, nats.ErrBadSubject) {
		t.Errorf("a bad subject: %v", err)
	}
}
