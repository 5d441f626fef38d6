package stream_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// endedBy checks that w was ended by want, and that nothing can be written any more.
func endedBy(t *testing.T, w *stream.Writer, want error) {
	t.Helper()
	waitFor(t, "the writer's context to end", func() { <-w.Context().Done() })
	if err := context.Cause(w.Context()); !errors.Is(err, want) {
		t.Errorf("the writer's cause: %v; want %v", err, want)
	}
	waitFor(t, "the writer's calls to fail", func() {
		for i, err := range []error{errOf(w.Write([]byte("late"))), errOf(w.WriteObject(1)), w.Close(), w.CloseWithCode(4000)} {
			if !errors.Is(err, want) {
				t.Errorf("call %d of the writer: %v; want %v", i, err, want)
			}
		}
	})
}

func TestClientClose(t *testing.T) {
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

func TestConnectionCloses(t *testing.T) {
	abnormal := &stream.CloseError{Code: stream.CloseAbnormalClosure}
	t.Run("consumer's", func(t *testing.T) {
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
	t.Run("producer's", func(t *testing.T) {
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
	t.Run("producer's before a first record", func(t *testing.T) {
		p := newPair(t, hasty)
		w, s := newWriterStream(t, p)
		p.producer.Conn.Close()
		endedBy(t, w, abnormal)
		s.Close()
	})
	t.Run("server's end while a call waits", func(t *testing.T) {
		for _, fallback := range []bool{false, true} {
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
		}
	})
	t.Run("server's end", func(t *testing.T) {
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
	t.Run("drained", func(t *testing.T) {
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
	t.Run("before Client.Close", func(t *testing.T) {
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

// A lost connection that comes back does not end a stream of which nothing was lost.
func TestReconnectWhileIdle(t *testing.T) {
	reconnected := make(chan struct{}, 1)
	p := newPair(t, pairOptions{producerConn: []nats.Option{nats.ReconnectHandler(func(*nats.Conn) { reconnected <- struct{}{} })}})
	w, s := newWriterStream(t, p)
	write(t, w, []byte("before"))
	if rec, err := s.Recv(); err != nil || string(rec) != "before" {
		t.Fatalf("%q, %v", rec, err)
	}
	if err := p.producer.Conn.ForceReconnect(); err != nil {
		t.Fatal(err)
	}
	write(t, w, []byte("meanwhile"))
	waitFor(t, "the connection", func() { <-reconnected })
	write(t, w, []byte("after"))
	closeWriter(t, w)
	got, err := readAll(s)
	if err != io.EOF || fmt.Sprintf("%s", got) != "[meanwhile after]" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestOpenErrors(t *testing.T) {
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	cause := errors.New("because")
	caused, cancelCause := context.WithCancelCause(context.Background())
	cancelCause(cause)
	late, cancelLate := context.WithDeadline(context.Background(), time.Unix(0, 0))
	defer cancelLate()
	fine := context.Background()

	p := newPair(t, pairOptions{server: []streamtest.Option{streamtest.WithMaxPayload(8 << 10)}})
	closed := p.newClient(t, stream.ClientParams{})
	closed.Conn.Close()
	draining := p.newClient(t, stream.ClientParams{})
	drain(t, p, draining.Conn)
	for c, want := range map[*stream.Client]error{closed: nats.ErrConnectionClosed, draining: nats.ErrConnectionDraining} {
		eventually(t, "the client notices", func() bool { // an Open just after Close or Drain may succeed
			s, err := c.Open(fine, "_.early", nil)
			if s != nil {
				s.Close()
			}
			return errors.Is(err, want) && c.Stats().Streams == 0
		})
	}
	done := p.newClient(t, stream.ClientParams{})
	if err := done.Close(); err != nil {
		t.Fatal(err)
	}
	large := nats.Header{"Large": {strings.Repeat("x", 9<<10)}}

	serve(t, p, ">", func(w *stream.Writer, req *nats.Msg) {
		if !strings.HasPrefix(req.Subject, "_") {
			t.Errorf("a request was sent to %s", req.Subject)
		}
	})
	for _, tt := range []struct {
		name   string
		client *stream.Client
		ctx    context.Context
		msg    nats.Msg
		want   error
	}{
		{"nil context", p.consumer, nil, nats.Msg{Subject: "a"}, nats.ErrInvalidContext},
		{"ended context", p.consumer, ended, nats.Msg{Subject: "a"}, context.Canceled},
		{"ended context, canceled", p.consumer, caused, nats.Msg{Subject: "a"}, context.Canceled},
		{"ended context, its cause", p.consumer, caused, nats.Msg{Subject: "a"}, cause},
		{"passed deadline", p.consumer, late, nats.Msg{Subject: "a"}, context.DeadlineExceeded},
		{"no subject", p.consumer, fine, nats.Msg{}, nats.ErrBadSubject},
		{"space", p.consumer, fine, nats.Msg{Subject: "a b"}, nats.ErrBadSubject},
		{"line break", p.consumer, fine, nats.Msg{Subject: "a\r\nPUB b 0\r\n"}, nats.ErrBadSubject},
		{"empty token", p.consumer, fine, nats.Msg{Subject: "a..b"}, nats.ErrBadSubject},
		{"leading dot", p.consumer, fine, nats.Msg{Subject: ".a"}, nats.ErrBadSubject},
		{"trailing dot", p.consumer, fine, nats.Msg{Subject: "a."}, nats.ErrBadSubject},
		{"star", p.consumer, fine, nats.Msg{Subject: "a.*"}, nats.ErrBadSubject},
		{"all", p.consumer, fine, nats.Msg{Subject: ">"}, nats.ErrBadSubject},
		{"large request", p.consumer, fine, nats.Msg{Subject: "a", Data: make([]byte, 8<<10+1)}, nats.ErrMaxPayload},
		{"large with its header", p.consumer, fine, nats.Msg{Subject: "a", Data: make([]byte, 8<<10)}, nats.ErrMaxPayload},
		{"large header", p.consumer, fine, nats.Msg{Subject: "a", Header: large}, nats.ErrMaxPayload},
		{"closed connection", closed, fine, nats.Msg{Subject: "a"}, nats.ErrConnectionClosed},
		{"draining connection", draining, fine, nats.Msg{Subject: "a"}, nats.ErrConnectionDraining},
		{"closed client", done, fine, nats.Msg{Subject: "a"}, stream.ErrClientClosed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if s, err := tt.client.OpenMsg(tt.ctx, &tt.msg); s != nil || !errors.Is(err, tt.want) {
				t.Errorf("OpenMsg: %v; want %v", err, tt.want)
				if s != nil {
					s.Close()
				}
			}
			if tt.msg.Header == nil {
				if s, err := tt.client.Open(tt.ctx, tt.msg.Subject, tt.msg.Data); s != nil || !errors.Is(err, tt.want) {
					t.Errorf("Open: %v; want %v", err, tt.want)
					if s != nil {
						s.Close()
					}
				}
				if ch, err := tt.client.OpenStream(tt.ctx, tt.msg.Subject, tt.msg.Data); ch != nil || !errors.Is(err, tt.want) {
					t.Errorf("OpenStream: %v; want %v", err, tt.want)
				}
			}
			if s := tt.client.Stats(); s.Streams != 0 || s.Reserved != 0 {
				t.Errorf("kept: %+v", s)
			}
		})
	}
	if s, err := p.consumer.OpenMsg(fine, nil); s != nil || !errors.Is(err, nats.ErrInvalidMsg) {
		t.Errorf("OpenMsg(nil): %v, %v", s, err)
	}
	if err := p.consumer.Conn.Flush(); err != nil { // nothing was published behind the errors
		t.Fatal(err)
	}
}

// drain makes a connection drain until the test ends.
func drain(t *testing.T, p *pair, nc *nats.Conn) {
	t.Helper()
	entered, leave := make(chan struct{}), make(chan struct{})
	if _, err := nc.Subscribe("drain", func(*nats.Msg) {
		close(entered)
		<-leave
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(leave) })
	if err := nc.Publish("drain", nil); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the message", func() { <-entered })
	if err := nc.Drain(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the connection drains", nc.IsDraining)
}

func TestNewClientErrors(t *testing.T) {
	p := newPair(t)
	if c, err := stream.NewClient(stream.ClientParams{}); c != nil || !errors.Is(err, nats.ErrInvalidConnection) {
		t.Errorf("no connection: %v, %v", c, err)
	}
	for _, params := range []stream.ClientParams{
		{Codec: stream.MsgPack + 1}, {Window: -1}, {Window: smallestWindow - 1}, {MaxBuffered: -1}, {MaxBuffered: 1}, {MaxRecordSize: -1}, {FallbackBuffer: -1},
	} {
		params.Conn = p.consumer.Conn
		if c, err := stream.NewClient(params); c != nil || err == nil {
			t.Errorf("%+v: %v, %v", params, c, err)
		}
	}
	nc, err := p.server.Dial()
	if err != nil {
		t.Fatal(err)
	}
	nc.Close()
	if c, err := stream.NewClient(stream.ClientParams{Conn: nc}); c != nil || !errors.Is(err, nats.ErrConnectionClosed) {
		t.Errorf("closed connection: %v, %v", c, err)
	}
}

// A record that MaxBuffered has no room for never arrives, so such parameters are refused. The default of MaxRecordSize
// follows MaxBuffered down.
func TestMaxRecordSizeFitsIntoMaxBuffered(t *testing.T) {
	const packet = 256 << 10
	p := newPair(t)
	for _, c := range []struct {
		buffered, record int
		largest          int // 0 if refused
	}{
		{0, 0, 16 << 20},
		{0, 64 << 20, 64 << 20},
		{0, 64<<20 + 1, 0},
		{0, 100 << 20, 0},
		{1 << 20, 1 << 20, 1 << 20},
		{1 << 20, 1<<20 + 1, 0},
		{1 << 20, 16 << 20, 0},
		{1 << 20, 0, 1 << 20},
		{200 << 20, 100 << 20, 100 << 20},
		{200 << 20, 0, 16 << 20},
		{smallestWindow, 0, packet},
		{smallestWindow, packet, packet},
		{smallestWindow, packet + 1, 0},
	} {
		client, err := stream.NewClient(stream.ClientParams{Conn: p.consumer.Conn, MaxBuffered: c.buffered, MaxRecordSize: c.record})
		server, serverErr := stream.NewServer(stream.ServerParams{Conn: p.producer.Conn, MaxBuffered: c.buffered, MaxRecordSize: c.record})
		for _, err := range []error{err, serverErr} {
			if (err == nil) != (c.largest > 0) {
				t.Errorf("MaxBuffered %d, MaxRecordSize %d: %v", c.buffered, c.record, err)
			}
			if err != nil && (!strings.Contains(err.Error(), "MaxRecordSize") || !strings.Contains(err.Error(), "raise MaxBuffered")) {
				t.Errorf("%v: it does not say what to do", err)
			}
		}
		if err == nil {
			w := client.NewWriter(nats.NewInbox())
			if _, err := w.Write(make([]byte, c.largest+1)); !errors.Is(err, stream.ErrRecordTooLarge) ||
				!strings.HasSuffix(err.Error(), fmt.Sprintf("MaxRecordSize is %d", c.largest)) {
				t.Errorf("MaxBuffered %d, MaxRecordSize %d: %v; want %d", c.buffered, c.record, err, c.largest)
			}
			client.Close()
		}
		if serverErr == nil {
			server.Close()
		}
	}
}

func TestOpenNoResponders(t *testing.T) {
	p := newPair(t)
	s := open(t, p.consumer, "nobody")
	for range 2 {
		if _, err := s.Recv(); !errors.Is(err, nats.ErrNoResponders) {
			t.Errorf("Recv: %v", err)
		}
	}
	if err := context.Cause(s.Context()); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("the context's cause: %v", err)
	}
}

func TestOpenMsg(t *testing.T) {
	p := newPair(t)
	serve(t, p, "headers", func(w *stream.Writer, req *nats.Msg) {
		write(t, w, []byte(strings.Join(req.Header["X-Two"], ",")), req.Data, []byte(req.Reply))
		closeWriter(t, w)
	})
	msg := &nats.Msg{Subject: "headers", Reply: "unused", Data: []byte("data"), Header: nats.Header{"X-Two": {"a", "b"}}}
	s, err := p.consumer.OpenMsg(testContext(t), msg)
	if err != nil {
		t.Fatal(err)
	}
	if len(msg.Header) != 1 || len(msg.Header["X-Two"]) != 2 || msg.Reply != "unused" || string(msg.Data) != "data" {
		t.Errorf("the message was changed: %+v", msg)
	}
	got, err := readAll(s)
	if err != io.EOF || len(got) != 3 {
		t.Fatalf("%q, %v", got, err)
	}
	if string(got[0]) != "a,b" || string(got[1]) != "data" || !strings.HasPrefix(string(got[2]), "_SINBOX.") {
		t.Errorf("the producer got %q", got)
	}
}

// The request is the caller's again as soon as Open returns.
func TestOpenCopiesRequest(t *testing.T) {
	p := newPair(t)
	serve(t, p, "echo", func(w *stream.Writer, req *nats.Msg) {
		write(t, w, req.Data)
		closeWriter(t, w)
	})
	data := make([]byte, 8)
	for i := range scaled(1000) {
		binary.BigEndian.PutUint64(data, uint64(i))
		s, err := p.consumer.Open(testContext(t), "echo", data)
		if err != nil {
			t.Fatal(err)
		}
		clear(data)
		rec, err := s.Recv()
		if err != nil || binary.BigEndian.Uint64(rec) != uint64(i) {
			t.Fatalf("%x, %v; want %x", rec, err, i)
		}
		wantEOF(t, s)
	}
}

func TestCustomInboxPrefix(t *testing.T) {
	p := newPair(t, pairOptions{
		consumerConn: []nats.Option{nats.CustomInboxPrefix("_mine.consumer")},
		producerConn: []nats.Option{nats.CustomInboxPrefix("_mine.producer")},
	})
	replies := make(chan string, 100)
	watch := p.server.Connect(t)
	if _, err := watch.Subscribe("_mine.>", func(m *nats.Msg) {
		if m.Reply != "" {
			replies <- m.Reply
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := watch.Flush(); err != nil {
		t.Fatal(err)
	}
	serve(t, p, "prefix", func(w *stream.Writer, req *nats.Msg) {
		if !strings.HasPrefix(req.Reply, "_mine.consumer.") {
			t.Errorf("the reply subject is %s", req.Reply)
		}
		write(t, w, []byte("x"))
		closeWriter(t, w)
	})
	if got, err := readAll(open(t, p.consumer, "prefix")); err != io.EOF || len(got) != 1 {
		t.Errorf("%q, %v", got, err)
	}
	waitFor(t, "the producer's own reply subject", func() {
		if reply := <-replies; !strings.HasPrefix(reply, "_mine.producer.") {
			t.Errorf("the producer's reply subject is %s", reply)
		}
	})
}

// Two responders answer one request: the records of one of them arrive, whole, and none of the other's.
func TestTwoResponders(t *testing.T) {
	p := newPair(t)
	other := p.newClient(t, stream.ClientParams{})
	for _, c := range []*stream.Client{p.producer, other} {
		serveClient(t, p, c, "both", func(w *stream.Writer, _ *nats.Msg) {
			for i := range 100 {
				if _, err := fmt.Fprintf(w, "%p %d", c, i); err != nil {
					return
				}
			}
			_ = w.Close()
		})
	}
	for range scaled(100) {
		s := open(t, p.consumer, "both")
		got, err := readAll(s)
		if err != io.EOF || len(got) != 100 {
			t.Fatalf("%d records, %v", len(got), err)
		}
		who, _, _ := strings.Cut(string(got[0]), " ")
		for i, rec := range got {
			if want := fmt.Sprint(who, " ", i); string(rec) != want {
				t.Fatalf("%q, want %q", rec, want)
			}
		}
	}
}
