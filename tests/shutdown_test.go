package stream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"testing"
	"time"
	"weak"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

func TestClientCloseEndsItsStreams(t *testing.T) {
	t.Run("consumer's", func(t *testing.T) {
		p := newPair(t, hasty)
		w, waits := newWriterStream(t, p)
		unused, silent := newWriterStream(t, p)
		defer unused.CloseWithCode(4000)
		w2, buffered := newWriterStream(t, p)
		write(t, w, []byte("x"))
		if _, err := waits.Recv(); err != nil {
			t.Fatal(err)
		}
		write(t, w2, []byte("1"), []byte("2"))
		if _, err := buffered.Recv(); err != nil {
			t.Fatal(err)
		}
		failed := make(chan error, 1)
		go func() {
			_, err := waits.Recv()
			failed <- err
		}()
		waitFor(t, "Close", func() { p.consumer.Close() })
		waitFor(t, "Recv to return", func() {
			if err := <-failed; err != stream.ErrClientClosed {
				t.Errorf("Recv: %v", err)
			}
		})
		for _, s := range []*stream.Stream{waits, silent, buffered} {
			if rec, err := s.Recv(); err != stream.ErrClientClosed {
				t.Errorf("Recv afterwards: %q, %v", rec, err)
			}
			if err := context.Cause(s.Context()); err != stream.ErrClientClosed {
				t.Errorf("the context's cause: %v", err)
			}
		}
		endedBy(t, w, &stream.CloseError{Code: stream.CloseGoingAway})
		endedBy(t, w2, &stream.CloseError{Code: stream.CloseGoingAway})
		for range 2 {
			if s, err := p.consumer.Open(t.Context(), "any", nil); s != nil || err != stream.ErrClientClosed {
				t.Errorf("Open: %p, %v", s, err)
			}
			if ch, err := p.consumer.OpenStream(t.Context(), "any", nil); ch != nil || err != stream.ErrClientClosed {
				t.Errorf("OpenStream: %v, %v", ch, err)
			}
			if err := p.consumer.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		}
	})
	t.Run("nobody reads", func(t *testing.T) {
		p := newPair(t, hasty)
		w, s := newWriterStream(t, p)
		write(t, w, []byte("x"))
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		waitBehind(t, p)
		waitFor(t, "Close", func() { p.consumer.Close() })
		waitFor(t, "the stream's context to end", func() { <-s.Context().Done() })
		if err := context.Cause(s.Context()); err != stream.ErrClientClosed {
			t.Errorf("the context's cause: %v", err)
		}
		verifyIdle(t, p.consumer)
		endedBy(t, w, &stream.CloseError{Code: stream.CloseGoingAway})
	})
	t.Run("producer's", func(t *testing.T) {
		p := newPair(t, hasty)
		w, s := newWriterStream(t, p)
		write(t, w, []byte("x"))
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "Close", func() { p.producer.Close() })
		endedBy(t, w, stream.ErrClientClosed)
		if _, err := s.Recv(); !errors.Is(err, &stream.CloseError{Code: stream.CloseGoingAway}) {
			t.Errorf("Recv: %v", err)
		}
	})
	t.Run("producer's before a first record", func(t *testing.T) {
		p := newPair(t, hasty)
		w, s := newWriterStream(t, p)
		waitFor(t, "Close", func() { p.producer.Close() })
		endedBy(t, w, stream.ErrClientClosed)
		s.Close() // nobody told it
	})
	t.Run("before NewWriter", func(t *testing.T) {
		p := newPair(t, hasty)
		w, s := newWriterStream(t, p)
		waitFor(t, "Close", func() { p.producer.Close() })
		w = p.producer.NewWriter("late." + nats.NewInbox())
		waitFor(t, "Flush", func() { w.Flush() })
		endedBy(t, w, stream.ErrClientClosed)
		s.Close()
	})
	t.Run("shared", func(t *testing.T) {
		p := newPair(t, pairOptions{shared: true})
		w, s := newWriterStream(t, p)
		write(t, w, []byte("x"))
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "Close", func() { p.consumer.Close() })
		if _, err := s.Recv(); err != stream.ErrClientClosed {
			t.Errorf("Recv: %v", err)
		}
		endedBy(t, w, stream.ErrClientClosed)
	})
	t.Run("concurrently", func(t *testing.T) {
		for range scaled(50) {
			p := newPair(t, hasty)
			serve(t, p, "endless", func(w *stream.Writer, _ *nats.Msg) {
				for {
					if _, err := w.Write([]byte("x")); err != nil {
						return
					}
				}
			})
			var readers, closers sync.WaitGroup
			var streams []*stream.Stream
			for range 4 {
				s := open(t, p.consumer, "endless")
				if _, err := s.Recv(); err != nil { // from here on both ends know each other
					t.Fatal(err)
				}
				streams = append(streams, s)
			}
			for _, s := range streams {
				readers.Go(func() {
					if _, err := readAll(s); err != stream.ErrClientClosed {
						t.Errorf("Recv: %v", err)
					}
				})
				closers.Go(func() {
					if err := p.consumer.Close(); err != nil {
						t.Errorf("Close: %v", err)
					}
				})
			}
			waitFor(t, "Close", closers.Wait)
			waitFor(t, "the readers", readers.Wait)
		}
	})
}

// A client that is closed in mid-stream ends its streams and tells the producers, again and again.
func TestSoakOfClosedClientsLeavesNothing(t *testing.T) {
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

func TestClosedConnectionEndsItsStreams(t *testing.T) {
	abnormal := &stream.CloseError{Code: stream.CloseAbnormalClosure}
	c := newConcurrent(t)
	defer c.Wait()
	c.Run("consumer's", func(t *testing.T) {
		p := newPair(t, hasty)
		const streams = 20
		var open []*stream.Stream
		for k := range streams {
			w, s := newWriterStream(t, p)
			open = append(open, s)
			for i := range 100 {
				write(t, w, testRecord(k*100+i, 50))
			}
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			defer w.CloseWithCode(4000)
		}
		waitBehind(t, p)
		failed := make(chan error, 1)
		unused, waits := newWriterStream(t, p)
		defer unused.CloseWithCode(4000)
		go func() {
			_, err := waits.Recv()
			failed <- err
		}()
		p.consumer.Conn.Close()
		waitFor(t, "Recv to return", func() {
			if err := <-failed; !errors.Is(err, abnormal) {
				t.Errorf("Recv: %v", err)
			}
		})
		for k, s := range open {
			got, err := readAll(s)
			if closed, ok := errors.AsType[*stream.CloseError](err); !ok || closed.Code != stream.CloseAbnormalClosure {
				t.Errorf("Recv: %v", err)
			}
			if !errors.Is(err, nats.ErrConnectionClosed) {
				t.Errorf("Recv: %v, which is no nats.ErrConnectionClosed", err)
			}
			if len(got) != 100 {
				t.Fatalf("%d records were delivered", len(got))
			}
			for i, rec := range got {
				if !bytes.Equal(rec, testRecord(k*100+i, 50)) {
					t.Fatalf("record %d differs", i)
				}
			}
			if !errors.Is(context.Cause(s.Context()), abnormal) {
				t.Errorf("the context's cause: %v", context.Cause(s.Context()))
			}
		}
		if s, err := p.consumer.Open(t.Context(), "any", nil); s != nil || !errors.Is(err, nats.ErrConnectionClosed) {
			t.Errorf("Open: %p, %v", s, err)
		}
	})
	c.Run("producer's", func(t *testing.T) {
		p := newPair(t, hasty)
		w, s := newWriterStream(t, p)
		write(t, w, []byte("x"))
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		p.producer.Conn.Close()
		endedBy(t, w, abnormal)
		s.Close() // nobody told it
	})
	c.Run("producer's before a first record", func(t *testing.T) {
		p := newPair(t, hasty)
		w, s := newWriterStream(t, p)
		p.producer.Conn.Close()
		endedBy(t, w, abnormal)
		s.Close()
	})
	for _, fallback := range []bool{false, true} {
		c.Run(fmt.Sprintf("server's end while a call waits, fallback %v", fallback), func(t *testing.T) {
			p := newPair(t, hasty)
			w, s := newWriterStream(t, p)
			if fallback {
				w = p.producer.NewWriter("an.old.consumer")
			}
			p.server.Shutdown()
			eventually(t, "the connection is lost", func() bool { return !p.producer.Conn.IsConnected() })
			flushed := make(chan error, 1)
			go func() {
				for { // what is written before the client notices may pass
					if _, err := w.Write([]byte("x")); err != nil {
						flushed <- err
						return
					}
					if err := w.Flush(); err != nil {
						flushed <- err
						return
					}
				}
			}()
			select {
			case err := <-flushed:
				t.Fatalf("Write or Flush while there is no connection: %v", err)
			case <-time.After(20 * time.Millisecond): // most likely one of them waits by now
			}
			waitFor(t, "Close", func() { p.producer.Close() })
			waitFor(t, "Flush to return", func() {
				if err := <-flushed; !errors.Is(err, stream.ErrClientClosed) {
					t.Errorf("Flush: %v", err)
				}
			})
			endedBy(t, w, stream.ErrClientClosed)
			s.Close()
		})
	}
	c.Run("server's end", func(t *testing.T) {
		p := newPair(t, pairOptions{consumerConn: []nats.Option{nats.NoReconnect()}, producerConn: []nats.Option{nats.NoReconnect()}})
		w, s := newWriterStream(t, p)
		write(t, w, []byte("x"))
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		p.server.Shutdown()
		if _, err := s.Recv(); !errors.Is(err, abnormal) {
			t.Errorf("Recv: %v", err)
		}
		endedBy(t, w, abnormal)
	})
	c.Run("drained", func(t *testing.T) {
		p := newPair(t, hasty)
		w, s := newWriterStream(t, p)
		write(t, w, []byte("x"))
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		if err := p.consumer.Conn.Drain(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); !errors.Is(err, abnormal) {
			t.Errorf("Recv: %v", err)
		}
		w.CloseWithCode(4000)
	})
	c.Run("before Client.Close", func(t *testing.T) {
		p := newPair(t, hasty)
		unused, s := newWriterStream(t, p)
		defer unused.CloseWithCode(4000)
		p.consumer.Conn.Close()
		waitFor(t, "Close", func() {
			if err := p.consumer.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
		if _, err := s.Recv(); !errors.Is(err, abnormal) && err != stream.ErrClientClosed {
			t.Errorf("Recv: %v", err)
		}
	})
}

// A producer whose connection is closed cannot say so. The consumer has the records that were sent, and its own
// context.
func TestClosedConnectionOfProducerLosesNothingSent(t *testing.T) {
	p := newPair(t)
	flushed := make(chan struct{})
	serve(t, p, "records", func(w *stream.Writer, _ *nats.Msg) {
		write(t, w, []byte("one"), []byte("two"))
		if err := w.Flush(); err != nil {
			t.Errorf("Flush: %v", err)
		}
		close(flushed)
		<-w.Context().Done()
		if err := context.Cause(w.Context()); !errors.Is(err, &stream.CloseError{Code: stream.CloseAbnormalClosure}) {
			t.Errorf("the writer's context ended with %v", err)
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
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
	waitFor(t, "Flush", func() { <-flushed })
	p.producer.Conn.Close()
	time.AfterFunc(20*time.Millisecond, cancel) // most likely Recv waits by then
	if _, err := s.Recv(); !errors.Is(err, context.Canceled) {
		t.Errorf("Recv: %v", err)
	}
}

// Nothing is left of a client and a server that nobody closed, once their connection was closed for good.
func TestNothingIsKeptOfAClosedConnection(t *testing.T) {
	p := newPair(t)
	var kept weak.Pointer[nats.Conn]
	func() {
		nc, err := p.server.Dial()
		if err != nil {
			t.Fatal(err)
		}
		kept = weak.Make(nc)
		server, err := stream.NewServer(stream.ServerParams{Conn: nc})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := server.Handle("left", echo); err != nil {
			t.Fatal(err)
		}
		c, err := stream.NewClient(stream.ClientParams{Conn: nc})
		if err != nil {
			t.Fatal(err)
		}
		s, err := c.Open(t.Context(), "left", nil)
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, s, 1)
		nc.Close()
		if _, err := s.Recv(); !errors.Is(err, nats.ErrConnectionClosed) {
			t.Errorf("%v", err)
		}
	}()
	eventually(t, "the connection is let go", func() bool { runtime.GC(); return kept.Value() == nil })
	// The end of the test sees to it that no goroutine is left.
}

func TestServerCloseMayBeCalledInAHandler(t *testing.T) {
	result := make(chan error, 1)
	var s *service
	p, s := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("a"))
		if _, err := r.Recv(); err != nil {
			t.Error(err)
		}
		_ = s.Close()
		if r.Context().Err() == nil {
			t.Error("the context goes on after Close")
		}
		_, err := w.Write([]byte("b"))
		result <- err
		return nil
	})
	st := open(t, p.consumer, "svc")
	if _, err := st.Recv(); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Write([]byte("go")); err != nil {
		t.Fatal(err)
	}
	var err error
	waitFor(t, "the end", func() { _, err = st.Recv() })
	wantCode(t, err, stream.CloseGoingAway, "")
	if err := <-result; !errors.Is(err, stream.ErrServerClosed) {
		t.Errorf("Write after Close: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("Close again: %v", err)
	}
	if _, err := s.Handle("more", func(*stream.Writer, *stream.Request) error { return nil }); !errors.Is(err, stream.ErrServerClosed) {
		t.Errorf("Handle after Close: %v", err)
	}
	if err := s.Drain(testContext(t)); err != nil {
		t.Errorf("Drain after Close: %v", err)
	}
}

// Drain waits for handlers and for their records, and takes no new streams meanwhile.
func TestDrainWaitsForHandlersAndTheirRecords(t *testing.T) {
	release, began := make(chan struct{}), make(chan struct{})
	p, s := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		if string(r.Data) != "stay" {
			return nil
		}
		close(began)
		<-release
		if err := r.Context().Err(); err != nil {
			t.Errorf("the context ended while Drain waited: %v", err)
		}
		for i := range 500 {
			write(t, w, testRecord(i, 1000))
		}
		return nil
	})
	ctx := testContext(t)
	st, err := p.consumer.Open(ctx, "svc", []byte("stay"))
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	<-began
	drained := make(chan error, 2)
	for range 2 {
		go func() { drained <- s.Drain(ctx) }()
	}
	eventually(t, "nobody responds", func() bool {
		_, err := open(t, p.consumer, "svc").Recv()
		return errors.Is(err, nats.ErrNoResponders)
	})
	select {
	case err := <-drained:
		t.Fatalf("Drain returned %v before the handler did", err)
	default:
	}
	close(release)
	records, err := readAll(st)
	if len(records) != 500 || err != io.EOF {
		t.Errorf("%d records, %v; want 500 and io.EOF", len(records), err)
	}
	for range 2 {
		waitFor(t, "Drain", func() { err = <-drained })
		if err != nil {
			t.Errorf("Drain: %v", err)
		}
	}
	waitFor(t, "Drain once more", func() { err = s.Drain(ctx) })
	if err != nil {
		t.Errorf("Drain once more: %v", err)
	}
	if _, err := s.Handle("more", func(*stream.Writer, *stream.Request) error { return nil }); !errors.Is(err, stream.ErrServerClosed) {
		t.Errorf("Handle after Drain: %v", err)
	}
	var none context.Context
	if err := s.Drain(none); !errors.Is(err, nats.ErrInvalidContext) {
		t.Errorf("Drain(nil): %v", err)
	}
}

// slack is the most that a loaded machine may add to a bound on time.
const slack = 250 * time.Millisecond

// When its context ends, Drain ends the streams that are left, whether or not handlers heed that.
func TestDrainEndsTheRestWithItsContext(t *testing.T) {
	release, began, causes := make(chan struct{}), make(chan struct{}, 1), make(chan error, 1)
	p, s := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("a"))
		began <- struct{}{}
		<-release // deaf to its context
		causes <- context.Cause(r.Context())
		return nil
	})
	st := open(t, p.consumer, "svc")
	if _, err := st.Recv(); err != nil {
		t.Fatal(err)
	}
	<-began
	ctx, cancel := context.WithCancelCause(testContext(t))
	drained := make(chan error, 1)
	go func() { drained <- s.Drain(ctx) }()
	eventually(t, "nobody responds", func() bool {
		_, err := open(t, p.consumer, "svc").Recv()
		return errors.Is(err, nats.ErrNoResponders)
	})
	why := errors.New("out of patience")
	start := time.Now()
	cancel(why)
	var err error
	waitFor(t, "Drain", func() { err = <-drained })
	took := time.Since(start)
	t.Logf("Drain returned %v after its context ended", took)
	if took > 50*time.Millisecond+slack {
		t.Errorf("Drain returned %v after its context ended", took)
	}
	if !errors.Is(err, context.Canceled) || !errors.Is(err, why) {
		t.Errorf("Drain: %v", err)
	}
	waitFor(t, "the end", func() { _, err = st.Recv() })
	wantCode(t, err, stream.CloseGoingAway, "")
	close(release)
	if cause := <-causes; !errors.Is(cause, stream.ErrServerClosed) {
		t.Errorf("cause of the handler's context: %v", cause)
	}
}

// A handler without an end of its own returns when its server drains, and Drain goes through.
func TestDrainingTellsHandlers(t *testing.T) {
	const followers = 20
	var following sync.WaitGroup
	following.Add(followers)
	p, s := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("a"))
		select {
		case <-r.Draining():
			t.Error("Draining is closed before Drain")
		default:
			following.Done()
		}
		select {
		case <-r.Draining():
		case <-r.Context().Done():
			t.Errorf("the context ended first: %v", context.Cause(r.Context()))
		}
		write(t, w, []byte("b"))
		return nil
	})
	var streams []*stream.Stream
	for range followers {
		streams = append(streams, open(t, p.consumer, "svc"))
	}
	waitFor(t, "all handlers to run", following.Wait)
	drained := make(chan error, 1)
	go func() { drained <- s.Drain(testContext(t)) }()
	for _, st := range streams {
		if records, err := readAll(st); len(records) != 2 || err != io.EOF {
			t.Errorf("%d records, %v", len(records), err)
		}
	}
	var err error
	waitFor(t, "Drain", func() { err = <-drained })
	if err != nil {
		t.Error(err)
	}
}

// Close ends the streams that Drain would have waited for, and a handler that looks only at Draining returns too.
func TestDrainingIsClosedByClose(t *testing.T) {
	returned := make(chan struct{})
	p, s := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("a"))
		<-r.Draining()
		close(returned)
		return nil
	})
	st := begin(t, p, "svc")
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	waitFor(t, "the handler", func() { <-returned })
	if _, err := st.Recv(); !errors.Is(err, &stream.CloseError{Code: stream.CloseGoingAway}) {
		t.Errorf("the consumer reads %v", err)
	}
}

// wantDone fails the test unless done is closed in time and err is want.
func wantDone(t *testing.T, done <-chan struct{}, err func() error, want error) {
	t.Helper()
	waitFor(t, "Done", func() { <-done })
	if err := err(); !errors.Is(err, want) {
		t.Errorf("Err: %v, want %v", err, want)
	}
}

func TestDoneTellsWhy(t *testing.T) {
	t.Run("closed", func(t *testing.T) {
		p := newPair(t)
		s := newService(t, p, stream.ServerParams{})
		wantNotDone(t, s.Done(), s.Err())
		wantNotDone(t, p.consumer.Done(), p.consumer.Err())
		if err := errors.Join(s.Close(), p.consumer.Close()); err != nil {
			t.Fatal(err)
		}
		wantDone(t, s.Done(), s.Err, stream.ErrServerClosed)
		wantDone(t, p.consumer.Done(), p.consumer.Err, stream.ErrClientClosed)
	})
	t.Run("drained", func(t *testing.T) {
		h := newHeld()
		p, s := newServed(t, stream.ServerParams{}, h.handle)
		st := begin(t, p, "svc")
		drained := make(chan error, 1)
		go func() { drained <- s.Drain(testContext(t)) }()
		eventually(t, "it takes no requests", func() bool { return errors.Is(refusedWith(t, p, "svc"), nats.ErrNoResponders) })
		wantNotDone(t, s.Done(), s.Err())
		close(h.release)
		wantEOF(t, st)
		wantDone(t, s.Done(), s.Err, stream.ErrServerClosed)
		if err := <-drained; err != nil {
			t.Error(err)
		}
	})
	t.Run("connection closed", func(t *testing.T) {
		p := newPair(t)
		s := newService(t, p, stream.ServerParams{})
		s.nc.Close()
		p.consumer.Conn.Close()
		wantDone(t, s.Done(), s.Err, nats.ErrConnectionClosed)
		wantDone(t, p.consumer.Done(), p.consumer.Err, nats.ErrConnectionClosed)
		if err := errors.Join(s.Close(), p.consumer.Close()); err != nil {
			t.Error(err)
		}
		wantDone(t, s.Done(), s.Err, nats.ErrConnectionClosed) // what came first
	})
	t.Run("connection down", func(t *testing.T) {
		p := newPair(t)
		s := newService(t, p, stream.ServerParams{}, nats.ReconnectWait(0))
		if err := s.nc.ForceReconnect(); err != nil {
			t.Fatal(err)
		}
		s.handle(t, "svc", nothing)
		wantEOF(t, open(t, p.consumer, "svc"))
		wantNotDone(t, s.Done(), s.Err())
	})
}

// A connection that drains receives nothing any longer, so its streams cannot go on. Both peers hear so at once, and
// not after PeerTimeout as of a process that died.
func TestDrainedConnectionTellsPeers(t *testing.T) {
	goingAway := &stream.CloseError{Code: stream.CloseGoingAway}
	const streams = 20
	t.Run("server's", func(t *testing.T) {
		p := newPair(t)
		s := newService(t, p, stream.ServerParams{})
		causes := make(chan error, streams)
		s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
			if _, err := w.Write([]byte("x")); err != nil {
				return err
			}
			<-r.Context().Done()
			causes <- context.Cause(r.Context())
			return nil
		})
		var open []*stream.Stream
		for range streams {
			st, err := p.consumer.Open(t.Context(), "svc", nil)
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, st)
			if _, err := st.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		drain(t, p, s.nc)
		for _, st := range open {
			if _, err := st.Recv(); !errors.Is(err, goingAway) {
				t.Errorf("a consumer read %v", err)
			}
			if err := <-causes; !errors.Is(err, nats.ErrConnectionDraining) {
				t.Errorf("a handler's context ended with %v", err)
			}
		}
	})
	t.Run("writer's", func(t *testing.T) {
		p := newPair(t)
		w, st := newWriterStream(t, p)
		write(t, w, []byte("x"))
		if _, err := st.Recv(); err != nil {
			t.Fatal(err)
		}
		drain(t, p, p.producer.Conn)
		if _, err := st.Recv(); !errors.Is(err, goingAway) {
			t.Errorf("the consumer read %v", err)
		}
		endedBy(t, w, nats.ErrConnectionDraining)
	})
	for name, says := range map[string]func(t *testing.T, st *stream.Stream){
		"consumer's": func(*testing.T, *stream.Stream) {},
		"consumer's, which has written": func(t *testing.T, st *stream.Stream) {
			if _, err := st.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		},
		"consumer's, which has closed its direction": func(t *testing.T, st *stream.Stream) {
			if err := st.CloseSend(); err != nil {
				t.Fatal(err)
			}
			if err := st.Sync(t.Context()); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			s := newService(t, p, stream.ServerParams{})
			causes := make(chan error, 1)
			s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
				if _, err := w.Write([]byte("x")); err != nil {
					return err
				}
				<-r.Context().Done()
				causes <- context.Cause(r.Context())
				return nil
			})
			st, err := p.consumer.Open(t.Context(), "svc", nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := st.Recv(); err != nil {
				t.Fatal(err)
			}
			says(t, st)
			drain(t, p, p.consumer.Conn)
			if err := <-causes; !errors.Is(err, goingAway) {
				t.Errorf("the handler's context ended with %v", err)
			}
		})
	}
	t.Run("what was said and closed stays whole", func(t *testing.T) {
		p := newPair(t)
		s := newService(t, p, stream.ServerParams{})
		published := make(chan error)
		s.handle(t, "svc", func(w *stream.Writer, _ *stream.Request) error {
			_, err := w.Write([]byte("x"))
			published <- errors.Join(err, w.Close(), w.Flush())
			return err
		})
		var closed []*stream.Stream
		for range streams {
			st, err := p.consumer.Open(t.Context(), "svc", nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := <-published; err != nil {
				t.Fatal(err)
			}
			closed = append(closed, st)
		}
		drain(t, p, s.nc)
		for _, st := range closed {
			if rec, err := st.Recv(); err != nil || string(rec) != "x" {
				t.Errorf("a consumer read %q, %v", rec, err)
			}
			wantEOF(t, st)
		}
	})
}
