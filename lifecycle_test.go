package stream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// handlerGroup counts running handlers. It is no sync.WaitGroup, because a request that is still on its way may start
// one while somebody waits for the others.
type handlerGroup struct{ running atomic.Int64 }

func (g *handlerGroup) Go(f func()) {
	g.running.Add(1)
	go func() {
		defer g.running.Add(-1)
		f()
	}()
}

// Wait returns when no handler runs.
func (g *handlerGroup) Wait() {
	for g.running.Load() != 0 {
		time.Sleep(100 * time.Microsecond)
	}
}

// soakRounds is how many streams a test opens one after another: 20,000, and a million with STREAM_SOAK set.
func soakRounds() int {
	switch {
	case os.Getenv("STREAM_SOAK") != "":
		return 1_000_000
	case testing.Short() || stream.RaceEnabled:
		return 2000
	}
	return 20_000
}

// verifyFootprint runs f, which opens n streams and ends them, and fails the test where anything of them is left:
// a goroutine, a stream, a reserved byte, or heap. f runs once before, so that pools and caches are warm.
func verifyFootprint(t *testing.T, p *pair, n int, f func(n int)) {
	t.Helper()
	f(min(n, 5000))
	idle := func() {
		for _, c := range p.clients {
			verifyIdle(t, c)
		}
	}
	idle()
	// A request may still be on its way to a handler, though its consumer has left.
	goroutines := 0
	for same := 0; same < 20; same++ {
		if now := runtime.NumGoroutine(); now != goroutines {
			goroutines, same = now, 0
		}
		time.Sleep(5 * time.Millisecond)
	}
	heap := liveHeap()
	start := time.Now()
	f(n)
	took := time.Since(start)
	idle()
	// The constant is noise of the server and the runtime; what every stream leaves behind adds up beyond it.
	heapAfter, limit := int64(0), heap+int64(1<<20+4*n)
	if !poll(func() bool {
		heapAfter = liveHeap()
		return runtime.NumGoroutine() <= goroutines && (stream.RaceEnabled || heapAfter <= limit)
	}) {
		buf := make([]byte, 1<<20)
		t.Errorf("left behind: heap %d bytes, want at most %d; %d goroutines where there were %d\n%s",
			heapAfter, limit, runtime.NumGoroutine(), goroutines, buf[:runtime.Stack(buf, true)])
	}
	t.Logf("%d streams in %v, %v each: heap %d, then %d bytes; %d goroutines", n, took.Round(time.Millisecond),
		(took / time.Duration(n)).Round(100*time.Nanosecond), heap, heapAfter, runtime.NumGoroutine())
}

// serveFew answers with as many small records as the request says.
func serveFew(t *testing.T, p *pair) {
	serve(t, p, "few", func(w *stream.Writer, req *nats.Msg) {
		n, err := strconv.Atoi(string(req.Data))
		if err != nil {
			t.Error(err)
		}
		for range n {
			if _, err := w.Write(req.Data); err != nil {
				return // the consumer left
			}
		}
		_ = w.Close() // fails where the consumer left
	})
}

// Streams that are opened, used and closed one after another leave nothing behind, however they end.
func TestSoakSequential(t *testing.T) {
	p := newPair(t)
	serveFew(t, p)
	verifyFootprint(t, p, soakRounds(), func(n int) {
		for i := range n {
			ctx, cancel := context.WithCancel(context.Background())
			records := 1 + i%3
			data := []byte(strconv.Itoa(records))
			if i%5 == 4 { // the original API
				results, err := p.consumer.OpenStream(ctx, "few", data)
				if err != nil {
					t.Fatal(err)
				}
				got := 0
				for r := range results {
					if r.Err != nil {
						t.Fatal(r.Err)
					}
					got++
				}
				if got != records {
					t.Fatalf("%d results of %d", got, records)
				}
				cancel()
				continue
			}
			s, err := p.consumer.Open(ctx, "few", data)
			if err != nil {
				t.Fatal(err)
			}
			for range records {
				if rec, err := s.Recv(); err != nil || !bytes.Equal(rec, data) {
					t.Fatalf("stream %d: %q, %v", i, rec, err)
				}
				if i%5 == 1 { // leaves early
					break
				}
			}
			switch i % 5 {
			case 1:
				s.Close()
			case 2: // ends its context instead
				cancel()
			default:
				if _, err := s.Recv(); err != io.EOF {
					t.Fatalf("stream %d: %v", i, err)
				}
				s.Close()
			}
			cancel()
		}
	})
}

// Streams that come and go at the same time leave nothing behind either, not even through one that stays.
func TestSoakConcurrent(t *testing.T) {
	const workers = 64
	p := newPair(t)
	serveFew(t, p)
	serve(t, p, "quiet", func(w *stream.Writer, req *nats.Msg) {
		if _, err := w.Write(req.Data); err != nil {
			t.Errorf("Write: %v", err)
		}
		<-w.Context().Done()
	})
	churn := func(n int) {
		var group sync.WaitGroup
		for k := range workers {
			group.Go(func() {
				for range n / workers {
					s, err := p.consumer.Open(t.Context(), "few", []byte("2"))
					if err != nil {
						t.Error(err)
						return
					}
					if got, err := readAll(s); len(got) != 2 || err != io.EOF {
						t.Errorf("worker %d: %d records, %v", k, len(got), err)
					}
				}
			})
		}
		group.Wait()
	}
	n := soakRounds()
	// The ones that stay are opened while others come and go, each of them with whatever the outbox had to do then.
	var stay []*stream.Stream
	var opened sync.WaitGroup
	opened.Go(func() { churn(2000) })
	for range 32 {
		s, err := p.consumer.Open(context.Background(), "quiet", nil) // for as long as it takes
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		stay = append(stay, s)
		time.Sleep(time.Millisecond)
	}
	opened.Wait()
	heap := liveHeap()
	start := time.Now()
	churn(n)
	took := time.Since(start)
	eventually(t, "only the streams that stay are left", func() bool { return p.consumer.Stats().Streams == len(stay) })
	after := liveHeap()
	t.Logf("%d streams in %v: heap %d, then %d bytes", n, took.Round(time.Millisecond), heap, after)
	if limit := int64(1<<20 + 4*n); !stream.RaceEnabled && after-heap > limit {
		t.Errorf("the heap grew from %d to %d bytes over %d streams", heap, after, n)
	}
	for _, s := range stay {
		s.Close()
	}
}

// inParallel calls f for 0 … n-1 from a few goroutines.
func inParallel(t testing.TB, n int, f func(i int, r *rand.Rand)) {
	t.Helper()
	var next atomic.Int64
	var group sync.WaitGroup
	for k := range 16 {
		group.Go(func() {
			r := rand.New(rand.NewPCG(uint64(k), 7))
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				f(int(i), r)
			}
		})
	}
	waitFor(t, "all streams to end", group.Wait)
}

// A context that ends at any moment ends the stream for both ends, and leaves nothing behind.
func TestSoakCancel(t *testing.T) {
	n := soakRounds() / 10
	p := newPair(t)
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

// Who opens and cancels in a loop never waits for anything but what the context's end makes run, in goroutines: they do not
// pile up.
func TestCanceledOpens(t *testing.T) {
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
			// While the collector frees the stacks of goroutines that have ended, NumGoroutine counts these as well: 100,000
			// after a test that had so many.
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

// AfterFunc is what context.AfterFunc calls where a context has it.
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

// No call waits for what the user's context runs when it ends, or for who holds the lock that its Err takes.
func TestUserContext(t *testing.T) {
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

// A consumer that left before the first packet cannot tell the producer where to stop, since it does not know it yet:
// the first packet's fate must.
func TestConsumerLeavesBeforeFirstPacket(t *testing.T) {
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
func TestConsumerLeavesDuringFirstPacket(t *testing.T) {
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

// A request that cannot be published leaves nothing behind.
func TestSoakUnpublishable(t *testing.T) {
	const maxPayload = 4096
	p := newPair(t, pairOptions{server: []streamtest.Option{streamtest.WithMaxPayload(maxPayload)}})
	closedConn, err := p.server.Dial()
	if err != nil {
		t.Fatal(err)
	}
	closed := p.newClient(t, stream.ClientParams{Conn: closedConn})
	closedConn.Close()
	done := p.newClient(t, stream.ClientParams{})
	if err := done.Close(); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name    string
		client  *stream.Client
		subject string
		bytes   int
		want    error
	}{
		{"tooLarge", p.consumer, "records", maxPayload + 1, nats.ErrMaxPayload},
		{"tooLargeWithItsHeader", p.consumer, "records", maxPayload, nats.ErrMaxPayload},
		{"badSubject", p.consumer, "two words", 0, nats.ErrBadSubject},
		{"wildcard", p.consumer, "records.*", 0, nats.ErrBadSubject},
		{"noSubject", p.consumer, "", 0, nats.ErrBadSubject},
		{"connectionClosed", closed, "records", 0, nats.ErrConnectionClosed},
		{"clientClosed", done, "records", 0, stream.ErrClientClosed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			data := make([]byte, tc.bytes)
			verifyFootprint(t, p, soakRounds()/10, func(n int) {
				for range n {
					s, err := tc.client.Open(t.Context(), tc.subject, data)
					if err == nil {
						_, err = s.Recv()
					}
					if !errors.Is(err, tc.want) {
						t.Fatalf("%v, want %v", err, tc.want)
					}
				}
			})
		})
	}
}

func TestSoakNoResponders(t *testing.T) {
	p := newPair(t)
	verifyFootprint(t, p, soakRounds()/10, func(n int) {
		inParallel(t, n, func(i int, _ *rand.Rand) {
			if i%2 == 0 {
				s, err := p.consumer.Open(t.Context(), "nobody", nil)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := s.Recv(); !errors.Is(err, nats.ErrNoResponders) {
					t.Errorf("Recv: %v", err)
				}
				return
			}
			results, err := p.consumer.OpenStream(t.Context(), "nobody", nil)
			if err != nil {
				t.Error(err)
				return
			}
			n := 0
			for res := range results {
				n++
				if !errors.Is(res.Err, nats.ErrNoResponders) {
					t.Errorf("the channel yields %v", res.Err)
				}
			}
			if n != 1 {
				t.Errorf("the channel yields %d results, want 1", n)
			}
		})
	})
}

// verifyPromptly fails the test if f does not return soon.
func verifyPromptly(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(patience / 3):
		t.Errorf("%s hangs", what)
	}
}

// A client that is closed in mid-stream ends its streams and tells the producers, again and again.
func TestSoakClientClose(t *testing.T) {
	const streams = 20
	p := newPair(t, pairOptions{producer: stream.ClientParams{ResumeTimeout: 100 * time.Millisecond}})
	serve(t, p, "records", func(w *stream.Writer, _ *nats.Msg) {
		buf := make([]byte, 500)
		for {
			if _, err := w.Write(buf); err != nil {
				if !errors.Is(err, &stream.CloseError{Code: stream.CloseGoingAway}) && !errors.Is(err, nats.ErrNoResponders) {
					t.Errorf("Write to a client that was closed: %v", err)
				}
				return
			}
		}
	})
	verifyFootprint(t, p, soakRounds()/10, func(n int) {
		for i := range max(4, n/streams) {
			c, err := stream.NewClient(stream.ClientParams{Conn: p.consumer.Conn})
			if err != nil {
				t.Fatal(err)
			}
			var open []*stream.Stream
			for range streams {
				s, err := c.Open(context.Background(), "records", nil)
				if err != nil {
					t.Fatal(err)
				}
				open = append(open, s)
			}
			var readers sync.WaitGroup
			for _, s := range open[:streams/2] {
				readers.Go(func() {
					if _, err := readAll(s); !errors.Is(err, stream.ErrClientClosed) {
						t.Errorf("Recv after Client.Close: %v", err)
					}
				})
			}
			unread := open[streams/2:]
			if i%2 == 0 { // else some requests are not even published
				if _, err := unread[0].Recv(); err != nil {
					t.Fatal(err)
				}
			}
			waitFor(t, "Client.Close", func() {
				if err := c.Close(); err != nil {
					t.Errorf("Client.Close: %v", err)
				}
			})
			waitFor(t, "reads to end", readers.Wait)
			if st := c.Stats(); st.Streams != 0 || st.Reserved != 0 {
				t.Fatalf("after Client.Close, with streams that nobody reads: %+v", st)
			}
			for _, s := range unread {
				if s.Context().Err() == nil {
					t.Fatal("the context of a stream goes on after Client.Close")
				}
				if _, err := s.Recv(); !errors.Is(err, stream.ErrClientClosed) {
					t.Errorf("Recv after Client.Close: %v", err)
				}
			}
		}
	})
}

// What is lost with a connection is said to be lost: streams yield what had arrived and end with 1006, at both ends.
func TestConnectionLost(t *testing.T) {
	const records = 3
	streams := scaled(1000)
	for _, tc := range []struct {
		name string
		lose func(p *pair)
		both bool // the producer's connection, too
	}{
		{"closed", func(p *pair) { p.consumer.Conn.Close() }, false},
		{"serverShutDown", func(p *pair) { p.server.Shutdown() }, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			once := []nats.Option{nats.MaxReconnects(0)}
			o := hasty
			o.producerConn, o.consumerConn = once, once
			p := newPair(t, o)
			release := make(chan struct{})
			var flushed sync.WaitGroup
			flushed.Add(streams)
			lost := &stream.CloseError{Code: stream.CloseAbnormalClosure}
			serve(t, p, "records", func(w *stream.Writer, req *nats.Msg) {
				for i := range records {
					write(t, w, testRecord(i, 100))
				}
				if err := w.Flush(); err != nil {
					t.Errorf("Flush: %v", err)
				}
				flushed.Done()
				if !tc.both {
					<-release
					_ = w.Close()
					return
				}
				<-w.Context().Done()
				if err := context.Cause(w.Context()); !errors.Is(err, lost) {
					t.Errorf("the writer's context ended with %v", err)
				}
				if _, err := w.Write([]byte("x")); !errors.Is(err, lost) || !errors.Is(err, nats.ErrConnectionClosed) {
					t.Errorf("Write after the connection was lost: %v", err)
				}
				if err := w.Close(); !errors.Is(err, lost) {
					t.Errorf("Close after the connection was lost: %v", err)
				}
			})
			serve(t, p, "fence", func(w *stream.Writer, req *nats.Msg) { closeWriter(t, w) })
			var all []*stream.Stream
			for range streams {
				all = append(all, open(t, p.consumer, "records"))
			}
			waitFor(t, "all producers to flush", flushed.Wait)
			wantEOF(t, open(t, p.consumer, "fence")) // came after all of that through the same subscription
			waiting := make(chan error)
			go func() { _, err := readAll(all[0]); waiting <- err }()

			tc.lose(p)
			waitFor(t, "a read that waits to end", func() {
				if err := <-waiting; !errors.Is(err, lost) {
					t.Errorf("Recv that waited: %v", err)
				}
			})
			eventually(t, "the streams have ended", func() bool { return p.consumer.Stats().Streams == 0 })
			for i, s := range all[1:] {
				got, err := readAll(s)
				if len(got) != records || !errors.Is(err, lost) || !errors.Is(err, nats.ErrConnectionClosed) {
					t.Fatalf("stream %d: %d records, %v", i, len(got), err)
				}
			}
			if _, err := p.consumer.Open(t.Context(), "records", nil); !errors.Is(err, nats.ErrConnectionClosed) {
				t.Errorf("Open after the connection was lost: %v", err)
			}
			close(release)
		})
	}
}

// A producer whose connection is closed cannot say so. The consumer has what it sent, and its own context.
func TestProducerConnectionClosed(t *testing.T) {
	p := newPair(t)
	serve(t, p, "records", func(w *stream.Writer, _ *nats.Msg) {
		write(t, w, []byte("one"), []byte("two"))
		if err := w.Flush(); err != nil {
			t.Errorf("Flush: %v", err)
		}
		<-w.Context().Done()
		if err := context.Cause(w.Context()); !errors.Is(err, &stream.CloseError{Code: stream.CloseAbnormalClosure}) {
			t.Errorf("the writer's context ended with %v", err)
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	s, err := p.consumer.Open(ctx, "records", nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"one", "two"} {
		rec, err := s.Recv()
		if string(rec) != want || err != nil {
			t.Fatalf("Recv: %q, %v", rec, err)
		}
	}
	p.producer.Conn.Close()
	if _, err := s.Recv(); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Recv: %v", err)
	}
}

// A writer whose client or connection is gone says so, whatever it did before. None of its calls hangs.
func TestWriterOutlivesClient(t *testing.T) {
	for _, gone := range []struct {
		name  string
		close func(c *stream.Client)
		want  error
	}{
		{"clientClosed", func(c *stream.Client) { _ = c.Close() }, stream.ErrClientClosed},
		{"connectionClosed", func(c *stream.Client) { c.Conn.Close() }, nats.ErrConnectionClosed},
	} {
		for _, peer := range []string{"binary", "fallback"} {
			for _, before := range []string{"nothing", "write", "flush", "made after"} {
				t.Run(fmt.Sprintf("%s/%s/%s", gone.name, peer, strings.ReplaceAll(before, " ", "")), func(t *testing.T) {
					p := newPair(t)
					c := p.newClient(t, stream.ClientParams{})
					subject := "old.abcdefgh"
					if peer == "binary" {
						sub, err := p.producer.Conn.SubscribeSync("request")
						if err != nil {
							t.Fatal(err)
						}
						open(t, p.producer, "request")
						req, err := sub.NextMsg(patience)
						if err != nil {
							t.Fatal(err)
						}
						subject = req.Reply
					}
					var w *stream.Writer
					if before != "made after" {
						w = c.NewWriter(subject)
					}
					if before == "write" || before == "flush" {
						write(t, w, []byte("record"))
					}
					if before == "flush" {
						if err := w.Flush(); err != nil {
							t.Fatal(err)
						}
					}
					gone.close(c)
					if before == "made after" {
						w = c.NewWriter(subject)
					}
					verifyPromptly(t, "the writer's context", func() { <-w.Context().Done() })
					if t.Failed() {
						return
					}
					verifyPromptly(t, "Flush or Close", func() {
						// A packet that is open takes records until the outbox has thrown it away.
						var err error
						poll(func() bool { _, err = w.Write([]byte("more")); return err != nil })
						if !errors.Is(err, gone.want) {
							t.Errorf("Write: %v, want %v", err, gone.want)
						}
						_ = w.Flush()
						if err := w.Close(); !errors.Is(err, gone.want) {
							t.Errorf("Close: %v, want %v", err, gone.want)
						}
					})
				})
			}
		}
	}
}

// A writer that is never closed ends with its client, and so does its consumer's stream.
func TestWriterNeverClosed(t *testing.T) {
	p := newPair(t)
	c := p.newClient(t, stream.ClientParams{})
	serveClient(t, p, c, "records", func(w *stream.Writer, _ *nats.Msg) { write(t, w, []byte("only")) })
	s := open(t, p.consumer, "records")
	if rec, err := s.Recv(); string(rec) != "only" || err != nil {
		t.Fatalf("Recv: %q, %v", rec, err)
	}
	waitFor(t, "Client.Close", func() { _ = c.Close() })
	if _, err := s.Recv(); !errors.Is(err, &stream.CloseError{Code: stream.CloseGoingAway}) {
		t.Errorf("Recv: %v", err)
	}
}

// An open stream on which nothing happens costs the consumer at most 2 KiB.
func TestIdleStreams(t *testing.T) {
	const limit = 2048
	n := scaled(100_000)
	if stream.RaceEnabled {
		n = min(n, 5000)
	}
	// The producer is a bare connection, so that what is measured belongs to the consumer. It answers no questions, so none is asked.
	p := newPair(t, pairOptions{consumer: stream.ClientParams{KeepAlive: time.Hour}})
	producer := p.producer.Conn
	_, err := producer.Subscribe("silent", func(*nats.Msg) {})
	if err != nil {
		t.Fatal(err)
	}
	first := rawPacket(stream.PacketSeq, 1, 0, rawData("record"))
	if _, err := producer.Subscribe("greeting", func(req *nats.Msg) {
		if err := producer.PublishRequest(req.Reply, "nowhere.to.be.found", first); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := producer.Flush(); err != nil {
		t.Fatal(err)
	}
	for _, subject := range []string{"silent", "greeting"} {
		t.Run(subject, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			streams := make([]*stream.Stream, 0, n)
			heap, goroutines := heapInUse(), runtime.NumGoroutine()
			// What the producer and the NATS server in this process allocate for each request lies between what stays. How
			// much of that is free at the end depends on when the collector ran, so it runs often.
			defer debug.SetGCPercent(debug.SetGCPercent(10))
			for range n {
				s, err := p.consumer.Open(ctx, subject, nil)
				if err != nil {
					t.Fatal(err)
				}
				if subject == "greeting" {
					if rec, err := s.Recv(); string(rec) != "record" || err != nil {
						t.Fatalf("Recv: %q, %v", rec, err)
					}
				}
				streams = append(streams, s)
			}
			eventually(t, "all requests were published", func() bool { // they hold their headers until then
				st, err := p.server.Raw().Varz(nil)
				return err == nil && st.InMsgs >= int64(n)
			})
			each := (heapInUse() - heap) / int64(n)
			if open := p.consumer.Stats().Streams; open != n {
				t.Errorf("%d streams are open, want %d", open, n)
			}
			t.Logf("%d idle streams, %d bytes each, %d goroutines more", n, each, runtime.NumGoroutine()-goroutines)
			if !stream.RaceEnabled && each > limit {
				t.Errorf("an idle stream costs %d bytes, want at most %d", each, limit)
			}
			if grown := runtime.NumGoroutine() - goroutines; grown > 2 {
				t.Errorf("%d goroutines for %d idle streams", grown, n)
			}
			cancel()
			runtime.KeepAlive(streams)
			verifyIdle(t, p.consumer)
		})
	}
}

// heapInUse returns the bytes that heap and stacks have taken, with what cannot be used for fragmentation.
func heapInUse() int64 {
	for range 3 {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// Write copies: a caller may use its buffer for something else at once, also where a record is cut into pieces. The
// buffers of packets go back to their pools only when nobody needs them any more, and the records a reader got are
// never overwritten. While the test runs, all buffers in the pools are overwritten again and again.
func TestBufferOwnership(t *testing.T) {
	sizes := []int{0, 1, 16, 100, 1000, 5000, 32 << 10, 40 << 10, 256 << 10, 300 << 10, 700 << 10}
	rounds := scaled(400)
	if stream.RaceEnabled {
		rounds = min(rounds, 40)
	}
	p, slow := newWatchedPair(t, pairOptions{consumer: stream.ClientParams{Window: 1 << 20}})
	serve(t, p, "records", func(w *stream.Writer, req *nats.Msg) {
		r := rand.New(rand.NewPCG(1, 2))
		buf := make([]byte, sizes[len(sizes)-1])
		for i := range rounds {
			rec := buf[:sizes[r.IntN(len(sizes))]]
			if strings.HasSuffix(string(req.Data), "small") {
				rec = buf[:r.IntN(600)]
			}
			copy(rec, testRecord(i, len(rec)))
			if _, err := w.Write(rec); err != nil {
				t.Errorf("Write of record %d: %v", i, err)
				return
			}
			for k := range rec {
				rec[k] = 0xEE
			}
		}
		closeWriter(t, w)
	})
	stop := stream.PoisonFreePackets()
	var readers sync.WaitGroup
	for k := range 8 {
		kind := []string{"large", "small"}[k%2]
		s, err := p.consumer.Open(testContext(t), "records", []byte(kind))
		if err != nil {
			t.Fatal(err)
		}
		readers.Go(func() {
			defer s.Close()
			got, err := readAll(s)
			if err != io.EOF || len(got) != rounds {
				t.Errorf("stream %d: %d records of %d, %v", k, len(got), rounds, err)
				return
			}
			for i, rec := range got {
				if !bytes.Equal(rec, testRecord(i, len(rec))) {
					t.Errorf("stream %d: record %d of %d bytes was overwritten", k, i, len(rec))
					return
				}
			}
		})
	}
	waitFor(t, "all streams to end", readers.Wait)
	if n := stop(); n == 0 {
		t.Error("no buffer was overwritten: the test tests nothing")
	}
	slow.verify(t, p)
}

// Everything at once: reads, writes, and all that ends a stream, from goroutines of their own. Nothing hangs, nothing
// races, nothing is left.
func TestHammer(t *testing.T) {
	const streams = 60
	rounds := scaled(40)
	p := newPair(t)
	for round := range rounds {
		producer, err := stream.NewClient(stream.ClientParams{Conn: p.producer.Conn})
		if err != nil {
			t.Fatal(err)
		}
		consumer, err := stream.NewClient(stream.ClientParams{Conn: p.consumer.Conn, MaxBuffered: 4 << 20})
		if err != nil {
			t.Fatal(err)
		}
		subject := fmt.Sprintf("hammer.%d", round)
		var group sync.WaitGroup
		sub, err := p.producer.Conn.Subscribe(subject, func(req *nats.Msg) {
			w := producer.NewWriter(req.Reply)
			r := rand.New(rand.NewPCG(rand.Uint64(), 1))
			for range 2 {
				size, pause := r.IntN(40<<10), r.IntN(3)
				group.Go(func() {
					buf := make([]byte, size)
					for {
						if _, err := w.Write(buf); err != nil {
							return
						}
						if pause == 0 {
							time.Sleep(20 * time.Microsecond)
						}
					}
				})
			}
			group.Go(func() { // an encoder that writes into the open packet
				for w.Context().Err() == nil {
					if _, err := w.WriteObject(map[string]int{"round": round}); err != nil {
						return
					}
				}
			})
			wait := time.Duration(r.IntN(6000)) * time.Microsecond
			code := stream.CloseNormalClosure + r.IntN(2)*3000
			group.Go(func() {
				select {
				case <-w.Context().Done():
				case <-time.After(wait):
				}
				_ = w.Flush()
				_ = w.CloseWithCode(code, "done")
			})
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.producer.Conn.Flush(); err != nil {
			t.Fatal(err)
		}
		var open sync.WaitGroup
		for i := range streams {
			open.Go(func() {
				r := rand.New(rand.NewPCG(uint64(round), uint64(i)))
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				var others sync.WaitGroup
				defer others.Wait()
				after := func(f func()) {
					d := time.Duration(r.IntN(5000)) * time.Microsecond
					others.Go(func() { time.Sleep(d); f() })
				}
				if r.IntN(3) == 0 {
					after(cancel)
				}
				s, err := consumer.Open(ctx, subject, nil)
				if err != nil {
					if !errors.Is(err, context.Canceled) && !errors.Is(err, stream.ErrClientClosed) {
						t.Errorf("Open: %v", err)
					}
					return
				}
				switch r.IntN(4) {
				case 0:
					after(func() { s.Close() })
					after(func() { s.Close() })
				case 1:
					after(func() { _ = s.CloseWithCode(4999, "enough") })
				}
				after(func() { _ = s.Context().Err(); _ = consumer.Stats() })
				for _, err := range s.All() {
					if err != nil {
						break
					}
				}
			})
		}
		time.Sleep(time.Duration(rand.IntN(6000)) * time.Microsecond)
		first, second := consumer, producer
		if round%2 == 0 {
			first, second = producer, consumer
		}
		waitFor(t, "both clients to close under load", func() {
			_ = first.Close()
			_ = second.Close()
		})
		// A handler may be called until the subscription has ended, and then no more.
		if err := sub.Drain(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the subscription has ended", func() bool { return !sub.IsValid() })
		if round%4 == 3 { // requests that nobody got: their streams ended with the client
			if err := p.producer.Conn.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		waitFor(t, "all streams to end", open.Wait)
		waitFor(t, "all writers to end", group.Wait)
		for _, c := range []*stream.Client{producer, consumer} {
			if st := c.Stats(); st.Streams != 0 || st.Reserved != 0 {
				t.Errorf("round %d: left after the end: %+v", round, st)
			}
		}
	}
}

// restart starts a server on the address of one that has been shut down.
func restart(t testing.TB, p *pair, old *streamtest.Server) *streamtest.Server {
	t.Helper()
	u, err := url.Parse(old.URL())
	if err != nil {
		t.Fatal(err)
	}
	port, err := strconv.Atoi(u.Port())
	if err != nil {
		t.Fatal(err)
	}
	srv := streamtest.Run(t, streamtest.WithOptions(func(o *server.Options) { o.Port = port }))
	t.Cleanup(func() { p.settle(t) }) // before this server stops, without which the last acknowledgements do not come
	return srv
}

// A server that goes away and comes back may lose packets. A stream then either goes on and is complete, or ends with
// an error, at the latest when the reader's context ends; it never looks complete when it is not. Afterwards both
// clients work as before, and nothing is left.
func TestServerRestart(t *testing.T) {
	const size = 200
	streams, records := scaled(200), 20_000
	p := newPair(t)
	serve(t, p, "records", func(w *stream.Writer, _ *nats.Msg) {
		buf := make([]byte, size)
		for i := range records {
			copy(buf, testRecord(i, size))
			if _, err := w.Write(buf); err != nil {
				return
			}
		}
		_ = w.Close()
	})
	serveFew(t, p)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var complete, broken, expired, reads atomic.Int64
	var readers sync.WaitGroup
	for k := range streams {
		s, err := p.consumer.Open(ctx, "records", nil)
		if err != nil {
			t.Fatal(err)
		}
		readers.Go(func() {
			defer s.Close()
			for i := 0; ; i++ {
				rec, err := s.Recv()
				switch {
				case err == io.EOF && i == records:
					complete.Add(1)
				case err == io.EOF:
					t.Errorf("stream %d looks complete after %d records of %d", k, i, records)
				case errors.Is(err, context.DeadlineExceeded):
					expired.Add(1)
				case err != nil:
					if !errors.Is(err, &stream.CloseError{Code: stream.CloseProtocolError}) && !errors.Is(err, nats.ErrNoResponders) {
						t.Errorf("stream %d after %d records: %v", k, i, err)
					}
					broken.Add(1)
				case !bytes.Equal(rec, testRecord(i, size)):
					t.Errorf("stream %d: record %d differs", k, i)
				default:
					reads.Add(1)
					continue
				}
				return
			}
		})
	}
	eventually(t, "the streams flow", func() bool { return reads.Load() > int64(streams*records/20) })
	p.server.Shutdown()
	time.Sleep(50 * time.Millisecond)
	_ = restart(t, p, p.server)
	waitFor(t, "all streams to end", readers.Wait)
	t.Logf("%d streams complete, %d ended by a gap, %d by their context", complete.Load(), broken.Load(), expired.Load())

	eventually(t, "both are connected again", func() bool {
		return p.producer.Conn.IsConnected() && p.consumer.Conn.IsConnected()
	})
	if err := p.producer.Conn.Flush(); err != nil {
		t.Fatal(err)
	}
	inParallel(t, 1000, func(int, *rand.Rand) {
		s, err := p.consumer.Open(testContext(t), "few", []byte("3"))
		if err != nil {
			t.Error(err)
			return
		}
		if got, err := readAll(s); len(got) != 3 || err != io.EOF {
			t.Errorf("after the restart: %d records, %v", len(got), err)
		}
	})
	for _, c := range p.clients { // before the second server ends
		verifyIdle(t, c)
	}
}

// A consumer that leaves while its connection is down tells the producer when it is up again.
func TestConsumerLeavesWhileDisconnected(t *testing.T) {
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

// Requests and records that were written while the connection was down are sent when it is up again, and none of the
// streams that were opened, used and ended meanwhile stands in the way of another.
func TestReconnectUnderLoad(t *testing.T) {
	streams := scaled(2000)
	p := newPair(t)
	serveFew(t, p)
	srv := p.server
	for round := range 3 {
		srv.Shutdown()
		eventually(t, "the connections are down", func() bool {
			return !p.producer.Conn.IsConnected() && !p.consumer.Conn.IsConnected()
		})
		ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
		leave, left := context.WithCancel(ctx)
		var readers sync.WaitGroup
		for i := range streams {
			parent := ctx
			if i%3 == 0 {
				parent = leave
			}
			s, err := p.consumer.Open(parent, "few", []byte("3"))
			if err != nil {
				t.Fatal(err)
			}
			readers.Go(func() {
				defer s.Close()
				got, err := readAll(s)
				switch {
				case i%3 == 0 && errors.Is(err, context.Canceled):
				case errors.Is(err, nats.ErrNoResponders): // the producer was not back yet
				case len(got) != 3 || err != io.EOF:
					t.Errorf("round %d, stream %d: %d records, %v", round, i, len(got), err)
				}
			})
		}
		srv = restart(t, p, srv)
		eventually(t, "the consumer is connected again", p.consumer.Conn.IsConnected)
		left()
		waitFor(t, "all streams to end", readers.Wait)
		cancel()
		eventually(t, "the producer is connected again", p.producer.Conn.IsConnected)
		if err := p.producer.Conn.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	verifyIdle(t, p.producer) // before the last server ends, or what is on its way waits for DisconnectTimeout
}
