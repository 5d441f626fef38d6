package stream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// A consumer that leaves, in whichever way, ends its handler's context and calls, with the code as the cause.
func TestCancelReachesHandler(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	type result struct{ cause, write, recv error }
	results := make(chan result, 1)
	s.handle(t, "endless", func(w *stream.Writer, r *stream.Request) error {
		var res result
		for res.write == nil { // ends where credit is used up and the consumer leaves
			_, res.write = w.Write(make([]byte, 1000))
		}
		<-r.Context().Done()
		res.cause = context.Cause(r.Context())
		for res.recv == nil {
			_, res.recv = r.Recv()
		}
		results <- res
		return nil
	})
	for name, c := range map[string]struct {
		code  int
		leave func(s *stream.Stream, cancel func())
	}{
		"context":  {stream.CloseCanceled, func(_ *stream.Stream, cancel func()) { cancel() }},
		"Close":    {stream.CloseCanceled, func(s *stream.Stream, _ func()) { _ = s.Close() }},
		"code":     {4321, func(s *stream.Stream, _ func()) { _ = s.CloseWithCode(4321, "enough") }},
		"deadline": {stream.CloseDeadlineExceeded, nil},
	} {
		ctx, cancel := context.WithCancel(testContext(t))
		if c.leave == nil {
			ctx, cancel = context.WithTimeout(ctx, 100*time.Millisecond)
		}
		st, err := p.consumer.Open(ctx, "endless", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := st.Recv(); err != nil {
			t.Fatal(err)
		}
		if c.leave != nil {
			c.leave(st, cancel)
		}
		var res result
		waitFor(t, name+" to reach the handler", func() { res = <-results })
		want := &stream.CloseError{Code: c.code}
		if !errors.Is(res.cause, want) || !errors.Is(res.write, want) || !errors.Is(res.recv, want) {
			t.Errorf("%s: %+v, want code %d", name, res, c.code)
		}
		cancel()
		_ = st.Close()
	}
	eventually(t, "the server holds nothing", func() bool { s := s.Stats(); return s.Streams == 0 && s.Reserved == 0 })
}

// Records go both ways, of any size, and each direction ends on its own.
func TestBothDirections(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	s.handle(t, "echo", func(w *stream.Writer, r *stream.Request) error {
		for rec, err := range r.All() {
			if err != nil {
				return err
			}
			if _, err := w.Write(rec); err != nil {
				return err
			}
		}
		return nil
	})
	sizes := []int{0, 1, 100, 32 << 10, 256 << 10, 1 << 20}
	var wg sync.WaitGroup
	for range 8 {
		st := open(t, p.consumer, "echo")
		wg.Go(func() {
			for i := range scaled(300) {
				n := sizes[i%3]
				if i%100 == 99 {
					n = sizes[3+i/100%3]
				}
				if _, err := st.Write(testRecord(i, n)); err != nil {
					t.Errorf("Write %d: %v", i, err)
					return
				}
			}
			if err := st.CloseSend(); err != nil {
				t.Error(err)
			}
			if err := st.Sync(testContext(t)); err != nil {
				t.Errorf("Sync: %v", err)
			}
			if _, err := st.Write(nil); !errors.Is(err, stream.ErrClosed) {
				t.Errorf("Write after CloseSend: %v", err)
			}
		})
		wg.Go(func() {
			for i := 0; ; i++ {
				rec, err := st.Recv()
				if err == io.EOF && i == scaled(300) {
					return
				}
				if err != nil || !bytes.Equal(rec, testRecord(i, len(rec))) {
					t.Errorf("record %d: %d bytes, %v", i, len(rec), err)
					return
				}
			}
		})
	}
	waitFor(t, "the echoes", wg.Wait)
	eventually(t, "the server holds nothing", func() bool { s := s.Stats(); return s.Streams == 0 && s.Reserved == 0 })
}

// A consumer that writes before its producer is known, or only closes, waits for it; a handler that returns without
// reading releases a consumer that writes, with its code.
func TestHalves(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	s.handle(t, "count", func(w *stream.Writer, r *stream.Request) error {
		n := 0
		for _, err := range r.All() {
			if err != nil {
				return err
			}
			n++
		}
		_, err := fmt.Fprint(w, n)
		return err
	})
	for _, n := range []int{0, 3} {
		st := open(t, p.consumer, "count")
		for range n {
			if _, err := st.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		if err := st.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if got, err := readAll(st); err != io.EOF || len(got) != 1 || string(got[0]) != fmt.Sprint(n) {
			t.Errorf("%d records: %q, %v", n, got, err)
		}
	}
	s.handle(t, "deaf", func(*stream.Writer, *stream.Request) error { return &stream.CloseError{Code: 4242, Text: "no"} })
	st := open(t, p.consumer, "deaf")
	var err error
	waitFor(t, "Write to a handler that returned", func() {
		for err == nil {
			_, err = st.Write(make([]byte, 1000))
		}
	})
	if ce, ok := errors.AsType[*stream.CloseError](err); !ok || ce.Code != 4242 && ce.Code != stream.CloseAbnormalClosure {
		t.Errorf("Write to a handler that returned: %v", err)
	}
	if _, err := st.Recv(); !errors.Is(err, &stream.CloseError{Code: 4242}) {
		t.Errorf("Recv: %v", err)
	}
	st = open(t, p.consumer, "nobody")
	if _, err := st.Write([]byte("x")); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("Write to nobody: %v", err)
	}
	eventually(t, "the server holds nothing", func() bool { s := s.Stats(); return s.Streams == 0 && s.Reserved == 0 })
}

// A handler may close its direction first and go on reading, whether its consumer wrote before it read io.EOF, writes its
// first record afterwards, or has nothing to say.
func TestHandlerClosesFirst(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	type result struct {
		records int
		err     error
	}
	results := make(chan result, 1)
	s.handle(t, "first", func(w *stream.Writer, r *stream.Request) error {
		var res result
		defer func() { results <- res }()
		write(t, w, []byte("all there is"))
		if err := w.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if _, err := w.Write(nil); !errors.Is(err, stream.ErrClosed) {
			t.Errorf("Write after Close: %v", err)
		}
		if string(r.Data) == "return" {
			return nil
		}
		for _, res.err = range r.All() {
			if res.err != nil {
				return nil
			}
			res.records++
		}
		return nil
	})
	send := func(n int) func(*stream.Stream) {
		return func(st *stream.Stream) {
			for i := range n {
				if _, err := st.Write(testRecord(i, 100)); err != nil {
					t.Fatalf("Write %d: %v", i, err)
				}
			}
		}
	}
	closeSend := func(st *stream.Stream) {
		if err := st.CloseSend(); err != nil {
			t.Errorf("CloseSend: %v", err)
		}
	}
	nothing := func(*stream.Stream) {}
	leave := func(st *stream.Stream) { _ = st.Close() }
	for _, c := range []struct {
		name          string
		data          string
		before, after func(*stream.Stream)
		end           func(*stream.Stream)
		want          result
	}{
		{"writes before", "", send(3), nothing, closeSend, result{records: 3}},
		{"writes before and after", "", send(3), send(1000), closeSend, result{records: 1003}},
		{"writes after", "", nothing, send(1000), closeSend, result{records: 1000}},
		{"only closes", "", nothing, nothing, closeSend, result{}},
		{"leaves without a word", "", nothing, nothing, leave, result{}},
		{"leaves within", "", send(3), nothing, leave, result{records: 3, err: &stream.CloseError{Code: stream.CloseCanceled}}},
		{"has a handler that returns", "return", nothing, nothing, nothing, result{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			st, err := p.consumer.Open(testContext(t), "first", []byte(c.data))
			if err != nil {
				t.Fatal(err)
			}
			c.before(st)
			if got, err := readAll(st); len(got) != 1 || err != io.EOF {
				t.Errorf("read %d records, %v", len(got), err)
			}
			c.after(st)
			if c.want.err != nil {
				if err := st.Sync(testContext(t)); err != nil {
					t.Errorf("Sync: %v", err)
				}
			}
			c.end(st)
			var got result
			waitFor(t, "the handler", func() { got = <-results })
			if c.want.err == nil && got.err != nil || !errors.Is(got.err, c.want.err) || got.records > c.want.records || got.err == nil && got.records != c.want.records {
				t.Errorf("the handler read %d records, %v; want %d, %v", got.records, got.err, c.want.records, c.want.err)
			}
			waitFor(t, "the stream's context to end", func() { <-st.Context().Done() })
			if _, err := st.Write([]byte("late")); err == nil {
				t.Error("Write after the end")
			}
			verifyIdle(t, p.consumer)
			eventually(t, "the server holds nothing", func() bool { s := s.Stats(); return s.Streams == 0 && s.Reserved == 0 })
		})
	}
}

// A handler that is still at work when both directions have ended normally is not stopped: its context ends when it returns.
func TestHandlerAtWorkAfterTheEnd(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{KeepAlive: 100 * time.Millisecond, ResumeTimeout: 100 * time.Millisecond})
	finished := make(chan struct{})
	result := make(chan error, 1)
	s.handle(t, "work", func(w *stream.Writer, r *stream.Request) error {
		if err := w.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		<-finished
		time.Sleep(time.Second) // long enough for the consumer to be asked, which has forgotten the stream
		result <- r.Context().Err()
		if rec, err := r.Recv(); string(rec) != "one" || err != nil {
			t.Errorf("Recv: %q, %v", rec, err)
		}
		if _, err := r.Recv(); err != io.EOF {
			t.Errorf("Recv: %v, want io.EOF", err)
		}
		result <- r.Context().Err()
		return nil
	})
	st := open(t, p.consumer, "work")
	if _, err := st.Write([]byte("one")); err != nil {
		t.Fatal(err)
	}
	if err := st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	wantEOF(t, st)
	waitFor(t, "the consumer's end", func() { <-st.Context().Done() })
	close(finished)
	for _, when := range []string{"before it read", "after it read"} {
		if err := <-result; err != nil {
			t.Errorf("the handler's context %s what came: %v", when, err)
		}
	}
	eventually(t, "the server holds nothing", func() bool { s := s.Stats(); return s.Streams == 0 && s.Reserved == 0 })
}

// Headers come before the first record, trailers with the end.
func TestHeaderAndTrailer(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	for _, records := range []int{0, 1, 1000} {
		subject := fmt.Sprint("meta", records)
		s.handle(t, subject, func(w *stream.Writer, _ *stream.Request) error {
			for _, bad := range []nats.Header{{"": {"x"}}, {"a b": {"x"}}, {"K": {"line\nbreak"}}, {"K": {strings.Repeat("x", 20_000)}}} {
				if err := w.SetHeader(bad); !errors.Is(err, stream.ErrHeader) {
					t.Errorf("SetHeader(%.40v): %v", bad, err)
				}
			}
			if err := w.SetHeader(nats.Header{"H": {"1", "2"}}); err != nil {
				t.Error(err)
			}
			if err := w.SetHeader(nats.Header{"H": {"3"}}); !errors.Is(err, stream.ErrHeader) {
				t.Errorf("a second SetHeader: %v", err)
			}
			for i := range records {
				write(t, w, testRecord(i, 100))
			}
			if err := w.SetTrailer(nats.Header{"T": {"end"}}); err != nil {
				t.Error(err)
			}
			return &stream.CloseError{Code: 4001 + records}
		})
		st := open(t, p.consumer, subject)
		h, err := st.Header()
		if err != nil || len(h.Values("H")) != 2 {
			t.Errorf("%d records: headers %v, %v", records, h, err)
		}
		if h := st.Trailer(); h != nil {
			t.Errorf("trailers before the end: %v", h)
		}
		got, err := readAll(st)
		if len(got) != records || !errors.Is(err, &stream.CloseError{Code: 4001 + records}) {
			t.Errorf("%d records, %v; want %d", len(got), err, records)
		}
		if h := st.Trailer(); h.Get("T") != "end" {
			t.Errorf("trailers %v", h)
		}
	}
	eventually(t, "the server holds nothing", func() bool { s := s.Stats(); return s.Streams == 0 && s.Reserved == 0 })
}

// A consumer that has read everything and sent nothing may leave in any way: a handler that closed first and reads on sees
// the end of its records, not an error.
func TestLeaveAfterEnd(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	results := make(chan error, 1)
	s.handle(t, "closes", func(w *stream.Writer, r *stream.Request) error {
		closeWriter(t, w)
		_, err := r.Recv()
		results <- err
		return nil
	})
	for name, leave := range map[string]func(s *stream.Stream, cancel func()){
		"Close":   func(s *stream.Stream, _ func()) { _ = s.Close() },
		"context": func(_ *stream.Stream, cancel func()) { cancel() },
	} {
		ctx, cancel := context.WithCancel(testContext(t))
		st, err := p.consumer.Open(ctx, "closes", nil)
		if err != nil {
			t.Fatal(err)
		}
		wantEOF(t, st)
		leave(st, cancel)
		waitFor(t, name+" to reach the handler", func() {
			if err := <-results; err != io.EOF {
				t.Errorf("%s: %v", name, err)
			}
		})
		cancel()
	}
}

// With default parameters, handlers of a consumer whose process is gone notice that soon, also those that only read: NATS
// says that nobody receives the question, and one question asks for all.
func TestConsumerIsKilled(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	streams := scaled(1000)
	ended := make(chan error, streams)
	s.handle(t, "read", func(_ *stream.Writer, r *stream.Request) error {
		_, err := r.Recv()
		ended <- err
		return err
	})
	nc, err := p.server.Dial()
	if err != nil {
		t.Fatal(err)
	}
	other, err := stream.NewClient(stream.ClientParams{Conn: nc})
	if err != nil {
		t.Fatal(err)
	}
	for range streams {
		if _, err := other.Open(testContext(t), "read", nil); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all handlers run", func() bool { return s.Stats().Streams == streams })
	nc.Close() // nobody says goodbye
	start := time.Now()
	for range streams {
		waitFor(t, "a handler", func() {
			if err := <-ended; !errors.Is(err, &stream.CloseError{Code: stream.CloseAbnormalClosure}) || !errors.Is(err, nats.ErrNoResponders) {
				t.Errorf("Recv: %v", err)
			}
		})
	}
	if took := time.Since(start); took > 4*4*time.Second { // four on a machine that has nothing else to do
		t.Errorf("noticed after %v", took)
	}
	_ = other.Close()
	eventually(t, "the server holds nothing", func() bool { s := s.Stats(); return s.Streams == 0 && s.Reserved == 0 })
}
