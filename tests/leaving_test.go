package stream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

func TestConsumersCloseReachesTheProducer(t *testing.T) {
	for _, tt := range []struct {
		name  string
		close func(*stream.Stream) error
		want  stream.CloseError
	}{
		{"Close", (*stream.Stream).Close, stream.CloseError{Code: stream.CloseCanceled}},
		{"CloseWithCode", func(s *stream.Stream) error { return s.CloseWithCode(4321, "had", "enough") }, stream.CloseError{Code: 4321, Text: "had enough"}},
		{"long reason", func(s *stream.Stream) error { return s.CloseWithCode(4321, strings.Repeat("ü", stream.MaxReason/2)) },
			stream.CloseError{Code: 4321, Text: strings.Repeat("ü", stream.MaxReason/2)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPair(t)
			w, s := newWriterStream(t, p)
			write(t, w, []byte("first"))
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
			failed := make(chan error, 1)
			go func() {
				_, err := s.Recv()
				failed <- err
			}()
			if err := tt.close(s); err != nil {
				t.Fatal(err)
			}
			waitFor(t, "Recv to return", func() {
				if err := <-failed; err != stream.ErrClosed {
					t.Errorf("Recv: %v", err)
				}
			})
			if _, err := s.Recv(); err != stream.ErrClosed {
				t.Errorf("Recv afterwards: %v", err)
			}
			if s.Context().Err() == nil || context.Cause(s.Context()) != stream.ErrClosed {
				t.Errorf("the stream's context: %v", context.Cause(s.Context()))
			}
			if err := s.Close(); err != nil {
				t.Errorf("second Close: %v", err)
			}
			waitFor(t, "the producer to notice", func() { <-w.Context().Done() })
			got, ok := errors.AsType[*stream.CloseError](context.Cause(w.Context()))
			if !ok || *got != tt.want {
				t.Errorf("the producer's cause: %v", context.Cause(w.Context()))
			}
			for _, err := range []error{
				errOf(w.Write(nil)), errOf(w.WriteObject(1)), w.Close(), w.CloseWithCode(4000), errOf(io.Copy(w, strings.NewReader("x"))),
			} {
				if !errors.Is(err, &tt.want) {
					t.Errorf("a call of the producer's: %v", err)
				}
			}
		})
	}
	t.Run("invalid code", func(t *testing.T) {
		p := newPair(t)
		w, s := newWriterStream(t, p)
		for _, code := range []int{-1, 0, 999, 6000, 1 << 20} {
			if err := s.CloseWithCode(code); !errors.Is(err, stream.ErrCloseCode) {
				t.Errorf("code %d: %v", code, err)
			}
		}
		write(t, w, []byte("goes on"))
		if rec, err := s.Recv(); err != nil || string(rec) != "goes on" {
			t.Errorf("%q, %v", rec, err)
		}
		closeWriter(t, w)
		wantEOF(t, s)
	})
}

// Buffered records are not delivered after Close.
func TestCloseDropsBufferedRecords(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	for range 100 {
		write(t, w, []byte("buffered"))
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if rec, err := s.Recv(); err != stream.ErrClosed {
		t.Errorf("%q, %v", rec, err)
	}
	waitFor(t, "the producer to notice", func() { <-w.Context().Done() })
}

// A consumer that leaves, in whichever way, ends its handler's context and calls, with the code as the cause.
func TestLeavingEndsTheHandlersContext(t *testing.T) {
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

// A consumer that has read everything and sent nothing may leave in any way: a handler that closed first and reads on
// sees the end of its records, not an error.
func TestLeavingAfterTheEndIsNoError(t *testing.T) {
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

// A consumer that leaves before the producer's first packet cannot say so: it does not know the way back yet.
func TestLeavingBeforeTheFirstRecordEndsTheProducer(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "Write to fail", func() {
		for {
			if _, err := w.Write(make([]byte, 10<<10)); err != nil {
				if w.Context().Err() == nil {
					t.Errorf("Write: %v", err)
				}
				return
			}
		}
	})
}

// A consumer that left before the first packet cannot tell the producer where to stop, since it does not know it yet:
// the first packet's fate must.
func TestLeavingBeforeTheFirstPacketEndsTheProducer(t *testing.T) {
	p := newPair(t)
	called, left := make(chan struct{}), make(chan struct{})
	ended := make(chan error, 1)
	serve(t, p, "records", func(w *stream.Writer, _ *nats.Msg) {
		close(called)
		<-left
		buf := make([]byte, 1024)
		for {
			if _, err := w.Write(buf); err != nil {
				ended <- err
				return
			}
		}
	})
	s := open(t, p.consumer, "records")
	waitFor(t, "the request to arrive", func() { <-called })
	s.Close()
	close(left)
	select {
	case err := <-ended:
		if !errors.Is(err, &stream.CloseError{Code: stream.CloseCanceled}) {
			t.Errorf("Write to a consumer that left: %v", err)
		}
	case <-time.After(patience / 3):
		t.Error("the producer of a stream that nobody reads is held back for ever")
	}
}

// The same where the consumer leaves just when the first packet arrives: whoever of mux, reader and outbox is first,
// the producer is told.
func TestLeavingDuringTheFirstPacketEndsTheProducer(t *testing.T) {
	p := newPair(t, pairOptions{consumer: stream.ClientParams{Window: 8 << 10}}) // soon used up
	serve(t, p, "records", func(w *stream.Writer, _ *nats.Msg) {
		buf := make([]byte, 4<<10)
		for {
			if _, err := w.Write(buf); err != nil {
				if !errors.Is(err, &stream.CloseError{Code: stream.CloseCanceled}) {
					t.Errorf("Write to a consumer that left: %v", err)
				}
				return
			}
		}
	})
	inParallel(t, scaled(10_000), func(i int, r *rand.Rand) {
		s, err := p.consumer.Open(t.Context(), "records", nil)
		if err != nil {
			t.Error(err)
			return
		}
		if r.IntN(2) == 0 {
			time.Sleep(time.Duration(r.IntN(300)) * time.Microsecond)
		}
		s.Close()
	})
	last := open(t, p.consumer, "records") // requests arrive one after the other: with its first record all have
	if _, err := last.Recv(); err != nil {
		t.Error(err)
	}
	last.Close()
	waitFor(t, "all producers to return", p.handlers.Wait)
	if !poll(func() bool { return p.producer.Stats().Streams == 0 }) {
		t.Errorf("%d producers are held back for ever, for consumers that left", p.producer.Stats().Streams)
	}
}

// A consumer that leaves while its connection is down tells the producer when it is up again.
func TestLeavingWhileDisconnectedEndsTheProducerLater(t *testing.T) {
	const streams = 50
	p := newPair(t, pairOptions{consumerConn: []nats.Option{nats.ReconnectWait(300 * time.Millisecond)}})
	var stuckBytes atomic.Int64
	serve(t, p, "records", func(w *stream.Writer, _ *nats.Msg) {
		buf := make([]byte, 16<<10)
		for {
			if _, err := w.Write(buf); err != nil {
				if !errors.Is(err, &stream.CloseError{Code: stream.CloseCanceled}) {
					t.Errorf("Write to a consumer that left: %v", err)
				}
				return
			}
			stuckBytes.Add(16 << 10)
		}
	})
	var all []*stream.Stream
	for range streams {
		s := open(t, p.consumer, "records")
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	waitStuck(t, &stuckBytes)
	id, err := p.consumer.Conn.GetClientID()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.server.Raw().DisconnectClientByID(id); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the connection is down", func() bool { return !p.consumer.Conn.IsConnected() })
	for _, s := range all {
		s.Close()
	}
	verifyIdle(t, p.consumer) // the consumer itself does not wait for it
	if !poll(func() bool { return p.producer.Stats().Streams == 0 }) {
		t.Errorf("%d producers are held back for ever, for consumers that left", p.producer.Stats().Streams)
	}
}

// A consumer that leaves with code 1000 has its records delivered first, however soon it leaves.
func TestLeavingNormallyDeliversWhatWasWritten(t *testing.T) {
	type result struct {
		records int
		err     error
		cause   error
	}
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	results := make(chan result, 1)
	read := func(r *stream.Request) (res result) {
		for _, err := range r.All() {
			if err != nil {
				res.err = err
				break
			}
			res.records++
		}
		return res
	}
	s.handle(t, "closed-first", func(w *stream.Writer, r *stream.Request) error {
		closeWriter(t, w)
		results <- read(r)
		return nil
	})
	s.handle(t, "reads", func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("hello"))
		results <- read(r)
		return nil
	})
	s.handle(t, "writes-for-ever", func(w *stream.Writer, r *stream.Request) error {
		var res result
		var group sync.WaitGroup
		group.Go(func() { res = read(r) })
		for {
			if _, err := w.Write(make([]byte, 1000)); err != nil {
				break
			}
		}
		group.Wait()
		<-r.Context().Done()
		res.cause = context.Cause(r.Context())
		results <- res
		return nil
	})
	for _, subject := range []string{"closed-first", "reads", "writes-for-ever"} {
		for _, c := range []struct {
			records, size int
			closeSend     bool
		}{{3, 1, false}, {0, 0, true}, {3, 1, true}, {1000, 100, false}, {1, 1 << 20, false}, {40, 20_000, false}} {
			t.Run(fmt.Sprintf("%s/%d records of %d, CloseSend %v", subject, c.records, c.size, c.closeSend), func(t *testing.T) {
				for range scaled(20) {
					st := open(t, p.consumer, subject)
					if subject == "closed-first" {
						wantEOF(t, st)
					} else if _, err := st.Recv(); err != nil {
						t.Fatal(err)
					}
					for i := range c.records {
						if _, err := st.Write(testRecord(i, c.size)); err != nil {
							t.Fatal(err)
						}
					}
					if c.closeSend {
						if err := st.CloseSend(); err != nil {
							t.Fatal(err)
						}
					}
					if err := st.CloseWithCode(stream.CloseNormalClosure, "done"); err != nil {
						t.Fatal(err)
					}
					if err := st.Close(); err != nil { // takes nothing back
						t.Fatal(err)
					}
					if _, err := st.Write(nil); err == nil {
						t.Error("Write after leaving succeeded")
					}
					if _, err := st.Recv(); err == nil || subject != "closed-first" && !errors.Is(err, stream.ErrClosed) {
						t.Errorf("Recv after leaving: %v", err)
					}
					if st.Context().Err() == nil {
						t.Error("the context of the stream goes on")
					}
					var got result
					waitFor(t, "the handler", func() { got = <-results })
					if got.err != nil || got.records != c.records {
						t.Fatalf("the handler read %d records, %v; %d were written", got.records, got.err, c.records)
					}
					if subject == "writes-for-ever" && !errors.Is(got.cause, &stream.CloseError{Code: stream.CloseNormalClosure, Text: "done"}) {
						t.Errorf("the handler's context ended with %v", got.cause)
					}
				}
			})
		}
	}
	verifyIdle(t, p.consumer)
}

// A consumer that leaves with code 1000 wakes its own reader, and a writer that waits for credit.
func TestLeavingNormallyEndsCallsThatWait(t *testing.T) {
	release := make(chan struct{})
	p, _ := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("hello"))
		<-release
		n := 0
		for _, err := range r.All() {
			if err != nil && !errors.Is(err, &stream.CloseError{Code: stream.CloseCanceled}) {
				t.Errorf("after %d records: %v", n, err)
			}
			n++
		}
		return nil
	})
	for _, size := range []int{1000, 1 << 20} { // of the latter a part is sent when the credit is used up
		st := open(t, p.consumer, "svc")
		if _, err := st.Recv(); err != nil {
			t.Fatal(err)
		}
		var wrote atomic.Int64
		var group sync.WaitGroup
		group.Go(func() {
			for {
				if _, err := st.Write(make([]byte, size)); err != nil {
					if !errors.Is(err, stream.ErrClosed) {
						t.Errorf("Write: %v", err)
					}
					return
				}
				wrote.Add(1)
			}
		})
		group.Go(func() {
			if _, err := st.Recv(); !errors.Is(err, stream.ErrClosed) {
				t.Errorf("Recv: %v", err)
			}
		})
		for before := int64(-1); before != wrote.Load(); { // until it waits
			before = wrote.Load()
			time.Sleep(20 * time.Millisecond)
		}
		if err := st.CloseWithCode(stream.CloseNormalClosure); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "calls to return", group.Wait)
		release <- struct{}{}
	}
}

// leavingContext is a context that ends when its Err is called, and calls leave just before.
type leavingContext struct {
	context.Context
	cancel context.CancelFunc
	leave  atomic.Pointer[func()] // nil until it was set, and during the call
}

func (c *leavingContext) Err() error {
	if leave := c.leave.Swap(nil); leave != nil {
		(*leave)()
		c.cancel()
	}
	return c.Context.Err()
}

// A read may find the end of its context when the consumer has just left in another goroutine. The consumer has left
// then.
func TestReadsFailIfTheContextEndsAfterLeaving(t *testing.T) {
	reads := map[string]func(*stream.Stream) error{
		"Read":       func(s *stream.Stream) error { return errOf(s.Read(make([]byte, 1))) },
		"RecvObject": func(s *stream.Stream) error { return s.RecvObject(new(int)) },
		"RecvRecord": func(s *stream.Stream) error { _, _, err := s.RecvRecord(); return err },
		"Ready": func(s *stream.Stream) error {
			if !s.Ready() {
				t.Error("Ready reports that a read has to wait")
			}
			return errOf(s.Recv())
		},
	}
	leaves := map[string]func(*stream.Stream){
		"Close":         func(s *stream.Stream) { _ = s.Close() },
		"CloseWithCode": func(s *stream.Stream) { _ = s.CloseWithCode(stream.CloseNormalClosure) },
	}
	p, _ := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("hello"))
		for range r.All() {
		}
		return nil
	})
	for _, read := range slices.Sorted(maps.Keys(reads)) {
		for _, leave := range slices.Sorted(maps.Keys(leaves)) {
			t.Run(read+"/"+leave, func(t *testing.T) {
				whole, cancel := context.WithCancel(testContext(t))
				ctx := &leavingContext{Context: whole, cancel: cancel}
				s, err := p.consumer.Open(ctx, "svc", nil)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := s.Recv(); err != nil {
					t.Fatal(err)
				}
				if _, err := s.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				left := func() { leaves[leave](s) }
				ctx.leave.Store(&left)
				for range 2 {
					if err := reads[read](s); err != stream.ErrClosed {
						t.Errorf("%v, want ErrClosed", err)
					}
				}
			})
		}
	}
}

// A packet of a consumer that left with code 1000 is sent again if it is lost, and its handler never reads a normal end
// without it.
func TestLeavingNormallyRepairsWhatIsLost(t *testing.T) {
	checkLeaks(t)
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	type result struct {
		records int
		err     error
	}
	results := make(chan result, 1)
	s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
		closeWriter(t, w)
		var res result
		for _, err := range r.All() {
			if res.err = err; err != nil {
				break
			}
			res.records++
		}
		results <- res
		return nil
	})
	for lost := range 4 { // the packet that is lost, counted from the first
		n := 0
		proxy := streamtest.RunInterceptor(t, p.server.URL())
		nc, err := nats.Connect(proxy.URL(), nats.IgnoreDiscoveredServers())
		if err != nil {
			t.Fatal(err)
		}
		client := p.newClient(t, stream.ClientParams{Conn: nc})
		st := open(t, client, "svc")
		wantEOF(t, st)
		proxy.SetRules(streamtest.Only(streamtest.To(streamtest.ToServer), func(m *streamtest.Message) (v streamtest.Verdict) {
			if len(m.Data) > 1 && m.Data[0] == stream.PacketMagic && m.Data[1]&byte(stream.PacketSeq) != 0 {
				v.Drop = n == lost
				n++
			}
			return v
		}))
		for i := range 3 {
			if _, err := st.Write(testRecord(i, 30_000)); err != nil {
				t.Fatal(err)
			}
		}
		st.CloseWithCode(stream.CloseNormalClosure, "done")
		var got result
		waitFor(t, "the handler", func() { got = <-results })
		if got.err != nil || got.records != 3 {
			t.Errorf("packet %d was lost: the handler read %d records, %v", lost, got.records, got.err)
		}
		verifyIdle(t, client)
		client.Close() // while its way to the server is there
	}
}

func TestContextEndsCallsThatWait(t *testing.T) {
	cause := errors.New("lost interest")
	wrapped := fmt.Errorf("lost interest: %w", context.Canceled)
	for _, tt := range []struct {
		name   string
		make   func() (context.Context, func())
		want   []error
		closes int
	}{
		{"cancel", func() (context.Context, func()) {
			return context.WithCancel(context.Background())
		}, []error{context.Canceled}, stream.CloseCanceled},
		{"cause", func() (context.Context, func()) {
			ctx, cancel := context.WithCancelCause(context.Background())
			return ctx, func() { cancel(cause) }
		}, []error{context.Canceled, cause}, stream.CloseCanceled},
		{"cause that wraps Canceled", func() (context.Context, func()) {
			ctx, cancel := context.WithCancelCause(context.Background())
			return ctx, func() { cancel(wrapped) }
		}, []error{context.Canceled, wrapped}, stream.CloseCanceled},
		{"parent", func() (context.Context, func()) {
			parent, cancel := context.WithCancel(context.Background())
			ctx, cancelChild := context.WithCancel(context.WithValue(parent, t, 1))
			t.Cleanup(cancelChild)
			return ctx, cancel
		}, []error{context.Canceled}, stream.CloseCanceled},
		{"deadline", func() (context.Context, func()) {
			ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
			t.Cleanup(cancel)
			return ctx, func() { <-ctx.Done() }
		}, []error{context.DeadlineExceeded}, stream.CloseDeadlineExceeded},
	} {
		check := func(t *testing.T, s *stream.Stream, w *stream.Writer, err error) {
			t.Helper()
			for _, want := range tt.want {
				if !errors.Is(err, want) {
					t.Errorf("Recv: %v; want %v", err, want)
				}
			}
			if len(tt.want) == 1 && err != tt.want[0] {
				t.Errorf("Recv: %v; want exactly %v", err, tt.want[0])
			}
			if _, again := s.Recv(); again == nil || again.Error() != err.Error() {
				t.Errorf("the next Recv: %v", again)
			}
			if s.Context().Err() == nil {
				t.Error("the stream's context goes on")
			}
			waitFor(t, "the producer to notice", func() { <-w.Context().Done() })
			if err := context.Cause(w.Context()); !errors.Is(err, &stream.CloseError{Code: tt.closes}) {
				t.Errorf("the producer's cause: %v, want code %d", err, tt.closes)
			}
			if _, err := w.Write(nil); !errors.Is(err, &stream.CloseError{Code: tt.closes}) {
				t.Errorf("the producer's Write: %v", err)
			}
			if err := w.Close(); !errors.Is(err, &stream.CloseError{Code: tt.closes}) {
				t.Errorf("the producer's Close: %v", err)
			}
		}
		t.Run(tt.name+"/while waiting", func(t *testing.T) {
			p := newPair(t)
			ctx, end := tt.make()
			defer end()
			w, s := newWriterStreamContext(t, p, ctx)
			write(t, w, []byte("first"))
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
			failed := make(chan error, 1)
			go func() {
				_, err := s.Recv()
				failed <- err
			}()
			end()
			waitFor(t, "Recv to return", func() { check(t, s, w, <-failed) })
		})
		t.Run(tt.name+"/before buffered records", func(t *testing.T) {
			p := newPair(t)
			ctx, end := tt.make()
			defer end()
			w, s := newWriterStreamContext(t, p, ctx)
			for i := range 100 {
				write(t, w, testRecord(i, 10))
			}
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			waitBehind(t, p)
			end()
			rec, err := s.Recv()
			if err == nil {
				t.Fatalf("%d bytes that were buffered", len(rec))
			}
			check(t, s, w, err)
		})
	}
}

// The context may end at any moment of a stream; nothing may be left.
func TestContextMayEndAtAnyMoment(t *testing.T) {
	p := newPair(t)
	serve(t, p, "endless", func(w *stream.Writer, _ *nats.Msg) {
		for i := 0; ; i++ {
			if _, err := w.Write(testRecord(i, i%1000)); err != nil {
				if w.Context().Err() == nil {
					t.Errorf("Write: %v", err)
				}
				return
			}
		}
	})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range scaled(300) {
				ctx, cancel := context.WithCancel(context.Background())
				s, err := p.consumer.Open(ctx, "endless", nil)
				if err != nil {
					t.Error(err)
					cancel()
					return
				}
				if n := rand.IntN(200); n > 100 {
					wg.Go(cancel)
				} else {
					for range n {
						if _, err := s.Recv(); err != nil {
							t.Error(err)
							break
						}
					}
				}
				cancel()
				if _, err := s.Recv(); err != context.Canceled {
					t.Error(err)
				}
			}
		})
	}
	waitFor(t, "the consumers", wg.Wait)
	verifyIdle(t, p.consumer)
	waitFor(t, "the producers to notice", p.handlers.Wait)
}

// userContext is a context of the user's own, with a lock of its own.
type userContext struct {
	context.Context
	mu    sync.Mutex
	done  chan struct{}
	err   error
	after []func() // called one after the other
}

func (c *userContext) Done() <-chan struct{} { return c.done }

func (c *userContext) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// AfterFunc is the method that context.AfterFunc calls if a context has it.
func (c *userContext) AfterFunc(f func()) (stop func() bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.after = append(c.after, f)
	return func() bool { return false }
}

func (c *userContext) cancel() {
	c.mu.Lock()
	c.err = context.Canceled
	close(c.done)
	after := c.after
	c.mu.Unlock()
	for _, f := range after {
		f()
	}
}

// No call waits for the functions that the user's context runs when it ends, or for the lock that its Err takes.
func TestNoCallWaitsForTheUsersContext(t *testing.T) {
	p := newPair(t)
	serve(t, p, "records", func(*stream.Writer, *nats.Msg) {})
	open := func(ctx context.Context) *stream.Stream {
		s, err := p.consumer.Open(ctx, "records", nil)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	newContext := func() *userContext {
		return &userContext{Context: context.Background(), done: make(chan struct{})}
	}
	wantCanceled := func(s *stream.Stream) {
		if _, err := s.Recv(); !errors.Is(err, context.Canceled) {
			t.Errorf("Recv: %v", err)
		}
	}

	t.Run("err before done", func(t *testing.T) {
		c := newContext()
		s := open(struct{ context.Context }{c})
		c.mu.Lock()
		c.err = context.Canceled
		c.mu.Unlock()
		waitFor(t, "Recv", func() { wantCanceled(s) })
		c.cancel()
	})
	t.Run("callbacks in turn", func(t *testing.T) {
		c, read := newContext(), make(chan struct{})
		c.AfterFunc(func() { <-read })
		s := open(c)
		canceled := make(chan struct{})
		go func() { c.cancel(); close(canceled) }()
		<-c.Done()
		waitFor(t, "Recv", func() { wantCanceled(s); close(read) })
		<-canceled
	})
	for _, own := range []bool{true, false} {
		t.Run(fmt.Sprintf("lock held, its own AfterFunc %v", own), func(t *testing.T) {
			for i := range 300 {
				c := newContext()
				ctx := context.Context(c)
				if !own {
					ctx = struct{ context.Context }{c}
				}
				s := open(ctx)
				c.cancel()
				time.Sleep(time.Duration(i%40) * time.Microsecond)
				c.mu.Lock()
				waitFor(t, "Close", func() { _ = s.Close() })
				c.mu.Unlock()
			}
		})
	}
	t.Run("bubbles", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		s := open(ctx)
		synctest.Test(t, func(*testing.T) { _ = s.Close() })
		synctest.Test(t, func(*testing.T) { s = open(ctx) })
		cancel()
		wantCanceled(s)
	})
}

// A context that ends at any moment ends the stream for both ends, and leaves nothing behind.
func TestSoakOfCanceledContextsLeavesNothing(t *testing.T) {
	n := soakRounds() / 10
	p := newPair(t)
	fillEnded(t, p)
	serve(t, p, "records", func(w *stream.Writer, req *nats.Msg) {
		if string(req.Data) == "late" {
			time.Sleep(time.Millisecond)
		}
		buf := make([]byte, 500)
		for range 200 { // less than the first window, so it fits also where nobody reads
			if _, err := w.Write(buf); err != nil {
				if w.Context().Err() == nil {
					t.Errorf("Write fails while its context goes on: %v", err)
				}
				return
			}
		}
		_ = w.Close()
	})
	// wantCanceled reads to the end, which is that of the context unless the stream was faster.
	wantCanceled := func(s *stream.Stream, ended bool) {
		_, err := readAll(s)
		if !errors.Is(err, context.Canceled) && (!ended || err != io.EOF) {
			t.Errorf("after its context ended: %v", err)
		}
		if _, again := s.Recv(); again != err {
			t.Errorf("%v, and then %v", err, again)
		}
		if s.Context().Err() == nil {
			t.Error("the stream has ended and its context has not")
		}
	}
	for _, tc := range []struct {
		name string
		run  func(ctx context.Context, cancel func(), r *rand.Rand)
	}{
		{"beforeOpen", func(ctx context.Context, cancel func(), r *rand.Rand) {
			cancel()
			if _, err := p.consumer.Open(ctx, "records", nil); !errors.Is(err, context.Canceled) {
				t.Errorf("Open with an ended context: %v", err)
			}
			if _, err := p.consumer.OpenStream(ctx, "records", nil); !errors.Is(err, context.Canceled) {
				t.Errorf("OpenStream with an ended context: %v", err)
			}
		}},
		{"duringOpen", func(ctx context.Context, cancel func(), r *rand.Rand) {
			var group sync.WaitGroup
			group.Go(cancel)
			s, err := p.consumer.Open(ctx, "records", nil)
			group.Wait()
			if err == nil {
				wantCanceled(s, false)
			} else if !errors.Is(err, context.Canceled) {
				t.Errorf("Open: %v", err)
			}
		}},
		{"beforeFirstPacket", func(ctx context.Context, cancel func(), r *rand.Rand) {
			s, err := p.consumer.Open(ctx, "records", []byte("late"))
			if err != nil {
				t.Error(err)
				return
			}
			if r.IntN(2) == 0 {
				time.Sleep(time.Duration(r.IntN(200)) * time.Microsecond)
			}
			cancel()
			wantCanceled(s, false)
		}},
		{"midStream", func(ctx context.Context, cancel func(), r *rand.Rand) {
			s, err := p.consumer.Open(ctx, "records", nil)
			if err != nil {
				t.Error(err)
				return
			}
			for range 1 + r.IntN(150) {
				if _, err := s.Recv(); err != nil {
					t.Error(err)
				}
			}
			cancel()
			wantCanceled(s, false)
		}},
		{"duringRecv", func(ctx context.Context, cancel func(), r *rand.Rand) {
			s, err := p.consumer.Open(ctx, "records", nil)
			if err != nil {
				t.Error(err)
				return
			}
			timer := time.AfterFunc(time.Duration(r.IntN(1000))*time.Microsecond, cancel)
			defer timer.Stop()
			_, err = readAll(s)
			if err != io.EOF && !errors.Is(err, context.Canceled) {
				t.Errorf("Recv: %v", err)
			}
		}},
		{"afterTheEnd", func(ctx context.Context, cancel func(), r *rand.Rand) {
			s, err := p.consumer.Open(ctx, "records", nil)
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := readAll(s); err != io.EOF {
				t.Error(err)
			}
			cancel()
			wantCanceled(s, true)
		}},
		{"channel", func(ctx context.Context, cancel func(), r *rand.Rand) {
			results, err := p.consumer.OpenStream(ctx, "records", nil)
			if err != nil {
				t.Error(err)
				return
			}
			for range r.IntN(150) {
				<-results
			}
			cancel()
			for res := range results {
				if res.Err != nil && !errors.Is(res.Err, context.Canceled) {
					t.Errorf("after its context ended, the channel yields %v", res.Err)
				}
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			verifyFootprint(t, p, n, func(n int) {
				inParallel(t, n, func(_ int, r *rand.Rand) {
					ctx, cancel := context.WithCancel(context.Background())
					defer cancel()
					tc.run(ctx, cancel, r)
				})
			})
		})
	}
}

// Who opens and cancels in a loop never waits for anything but what the context's end makes run, in goroutines: they do
// not pile up.
func TestCanceledOpensDoNotPileUp(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(s *stream.Stream) error
	}{
		{"read", func(s *stream.Stream) error {
			if _, err := s.Recv(); !errors.Is(err, context.Canceled) {
				return fmt.Errorf("Recv after cancel: %w", err)
			}
			return nil
		}},
		{"close", (*stream.Stream).Close},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPair(t)
			if _, err := p.producer.Conn.Subscribe("records", func(*nats.Msg) {}); err != nil {
				t.Fatal(err)
			}
			if err := p.producer.Conn.Flush(); err != nil {
				t.Fatal(err)
			}
			// While the collector frees the stacks of goroutines that have ended, NumGoroutine counts these as well:
			// 100,000 after a test that had so many.
			runtime.GC()
			defer debug.SetGCPercent(debug.SetGCPercent(-1))
			before, most := runtime.NumGoroutine(), atomic.Int64{}
			inParallel(t, scaled(20_000), func(int, *rand.Rand) {
				ctx, cancel := context.WithCancel(context.Background())
				s, err := p.consumer.Open(ctx, "records", nil)
				cancel()
				if err == nil {
					err = tc.end(s)
				}
				if err != nil {
					t.Error(err)
				}
				n := int64(runtime.NumGoroutine() - before)
				for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
				}
			})
			if n := most.Load(); n > 100 {
				t.Errorf("%d goroutines more at once, 16 opened and canceled", n)
			}
		})
	}
}
