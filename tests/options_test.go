package stream_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// An option with an invalid value is an error of Open that names it, and nothing is sent. The first error counts.
func TestOpenRefusesInvalidOptions(t *testing.T) {
	p := newPair(t)
	subject, requests := rawRequests(t, p)
	for name, bad := range map[string][]stream.OpenOption{
		"WithKeepAlive":   {stream.WithKeepAlive(time.Microsecond)},
		"WithWindow":      {stream.WithWindow(4095)},
		"WithOpenTimeout": {stream.WithOpenTimeout(-time.Second), stream.WithWindow(0)},
		"Retry":           {nil, stream.WithRetry(stream.Retry{Attempts: -1})},
	} {
		for _, open := range []func() (*stream.Stream, error){
			func() (*stream.Stream, error) { return p.consumer.Open(testContext(t), subject, nil, bad...) },
			func() (*stream.Stream, error) {
				return p.consumer.OpenMsg(testContext(t), &nats.Msg{Subject: subject}, bad...)
			},
		} {
			if s, err := open(); s != nil || err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "must be") {
				t.Errorf("%s: %v, %v", name, s, err)
			}
		}
	}
	if err := p.consumer.Conn.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := requests.Pending(); n != 0 {
		t.Errorf("%d requests were sent", n)
	}
}

// A producer is ahead of its reader by the window of WithWindow, and its packets beyond that wait.
func TestWithWindowBoundsWhatAProducerIsAhead(t *testing.T) {
	for _, window := range []int{4 << 10, 20 << 10, 1 << 20} {
		ahead := make(chan int, 1)
		p, _ := newServed(t, stream.ServerParams{}, func(w *stream.Writer, _ *stream.Request) error {
			sent := 0
			for idle := 0; idle < 20; { // credit may be on its way
				ok, err := w.TryWrite(make([]byte, 1<<10))
				if err != nil {
					return err
				}
				if idle++; ok {
					sent, idle = sent+1<<10, 0
				} else {
					time.Sleep(time.Millisecond)
				}
			}
			ahead <- sent
			return nil
		})
		s, err := p.consumer.Open(testContext(t), "svc", nil, stream.WithWindow(window))
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		waitFor(t, "the producer to wait", func() { n = <-ahead })
		rounded := 4 << 10
		for 2*rounded <= window {
			rounded *= 2
		}
		if rounded = min(rounded, 256<<10); n > rounded+64<<10 || n < rounded/2 {
			t.Errorf("the producer was ahead by %d bytes with a window of %d", n, window)
		}
		if err := errOf(s.WriteTo(io.Discard)); err != nil {
			t.Error(err)
		}
	}
}

// WithOpenTimeout ends a stream whose producer says nothing, and no other one.
func TestWithOpenTimeoutEndsTheWaitForAnAnswer(t *testing.T) {
	p := newPair(t)
	silent, requests := rawRequests(t, p)
	var request *nats.Msg
	var s *stream.Stream
	var err error
	for d := 20 * time.Millisecond; request == nil; d *= 2 { // on a busy machine, the time may be over before the request is sent
		if s, err = p.consumer.Open(testContext(t), silent, nil, stream.WithOpenTimeout(d)); err != nil {
			t.Fatal(err)
		}
		_, err = s.Recv()
		request, _ = requests.NextMsg(time.Second)
	}
	if ne, ok := errors.AsType[net.Error](err); !errors.Is(err, stream.ErrOpenTimeout) || !ok || !ne.Timeout() {
		t.Errorf("no answer: %v", err)
	}
	if stream.Retryable(err) || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v is retryable, or another timeout", err)
	}
	if _, err := s.Write(nil); !errors.Is(err, stream.ErrOpenTimeout) {
		t.Errorf("Write: %v", err)
	}
	if cause := context.Cause(s.Context()); cause != stream.ErrOpenTimeout {
		t.Errorf("cause %v", cause)
	}

	// An answer that comes too late is reset, so that its handler does not run on for nobody.
	late := p.producer.NewWriter(request.Reply)
	if _, err := late.Write([]byte("late")); err != nil {
		t.Error(err)
	}
	endedBy(t, late, &stream.CloseError{Code: stream.CloseCanceled})

	h := newHeld()
	service := newService(t, p, stream.ServerParams{})
	service.handle(t, "held", h.handle)
	s, err = p.consumer.Open(testContext(t), "held", nil, stream.WithOpenTimeout(10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Errorf("an answer in time: %v", err)
	}
	close(h.release)
	wantEOF(t, s)

	s, err = p.consumer.Open(testContext(t), "nobody", nil, stream.WithOpenTimeout(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("nobody serves: %v", err)
	}
}

// The earlier of the context's end and that of WithOpenTimeout counts, and each has its own error.
func TestWithOpenTimeoutAndTheContext(t *testing.T) {
	p := newPair(t)
	silent, _ := rawRequests(t, p)
	for _, retry := range []bool{false, true} {
		for _, c := range []struct {
			context, open time.Duration
			want          error
		}{
			{time.Minute, 20 * time.Millisecond, stream.ErrOpenTimeout},
			{20 * time.Millisecond, time.Minute, context.DeadlineExceeded},
		} {
			ctx, cancel := context.WithTimeout(t.Context(), c.context)
			defer cancel()
			opts := []stream.OpenOption{stream.WithOpenTimeout(c.open)}
			if retry {
				opts = append(opts, stream.WithRetry(stream.Retry{}))
			}
			s, err := p.consumer.Open(ctx, silent, []byte("data"), opts...)
			if !retry && err == nil {
				_, err = s.Recv()
			}
			if !errors.Is(err, c.want) || stream.Retryable(err) {
				t.Errorf("retry %v, context %v, open %v: %v, want %v", retry, c.context, c.open, err, c.want)
			}
		}
	}
	start := time.Now()
	s, err := p.consumer.Open(testContext(t), "nobody", nil, stream.WithOpenTimeout(50*time.Millisecond),
		stream.WithRetry(stream.Retry{Attempts: 1 << 30, Wait: time.Millisecond, MaxWait: time.Hour}))
	// The last request may be on its way when the time is over. Then it may reach a handler.
	if s != nil || !errors.Is(err, stream.ErrOpenTimeout) || stream.Retryable(err) != errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("refused until the time is over: %v, %v", s, err)
	}
	if d := time.Since(start); d < 50*time.Millisecond {
		t.Errorf("gave up after %v", d)
	}
}

// WithRetry sends the data of the request each time, as it was when Open was called.
func TestWithRetrySendsTheSameData(t *testing.T) {
	full := newHeld()
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{MaxStreams: 1})
	got := make(chan string, 1)
	s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
		if string(r.Data) == "first" {
			return full.handle(w, r)
		}
		got <- string(r.Data) + r.Header.Get("Name")
		return nil
	})
	first, err := p.consumer.Open(testContext(t), "svc", []byte("first"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := first.Recv(); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(20*time.Millisecond, func() { close(full.release) })
	msg := &nats.Msg{Subject: "svc", Data: []byte("data"), Header: nats.Header{"Name": {"value"}}}
	second, err := p.consumer.OpenMsg(testContext(t), msg, stream.WithRetry(stream.Retry{Attempts: 1 << 20, MaxWait: 10 * time.Millisecond}))
	if err != nil {
		t.Fatal(err)
	}
	wantEOF(t, second)
	wantEOF(t, first)
	if v := <-got; v != "datavalue" {
		t.Errorf("the handler got %q", v)
	}
}
