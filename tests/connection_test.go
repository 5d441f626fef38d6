package stream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// A loss with a connection is reported: streams yield what had arrived and end with 1006, at both ends.
func TestLostConnectionIsReportedAtBothEnds(t *testing.T) {
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

// A lost connection that comes back does not end a stream of which nothing was lost.
func TestIdleStreamSurvivesAReconnect(t *testing.T) {
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

// Requests and records that were written while the connection was down are sent when it is up again, and none of the
// streams that were opened, used and ended meanwhile stands in the way of another.
func TestStreamsUnderLoadSurviveAReconnect(t *testing.T) {
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

// A server that goes away and comes back may lose packets. A stream then either goes on and is complete, or ends with
// an error, at the latest when the reader's context ends; it never looks complete when it is not. Afterwards both
// clients work as before, and nothing is left.
func TestServerRestartNeverFeignsCompleteness(t *testing.T) {
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
	ctx, cancel := context.WithCancel(context.Background())
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
				case errors.Is(err, context.Canceled):
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
	eventually(t, "the streams flow", func() bool { return reads.Load() > int64(streams*records/50) })
	p.server.Shutdown()
	time.Sleep(50 * time.Millisecond)
	_ = restart(t, p, p.server)
	time.AfterFunc(5*time.Second, cancel)
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

// With default parameters, handlers of a consumer whose process is gone notice that soon, also those that only read:
// NATS says that nobody receives the question, and one question asks for all.
func TestKilledConsumerIsNoticedSoon(t *testing.T) {
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

// inform has the server send each connection an INFO, as each change of a cluster does.
func inform(t testing.TB, srv *streamtest.Server) {
	t.Helper()
	conns, err := srv.Raw().Connz(nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range conns.Conns {
		if err := srv.Raw().LDMClientByID(c.Cid); err != nil {
			t.Fatal(err)
		}
	}
}

// The server's max_payload shrinks and grows by reloads, while connections stay up. Records of any size pass, also on
// streams that are open meanwhile, and requests are measured against what the server takes now.
func TestMaxPayloadMayChangeByReload(t *testing.T) {
	p := newRestricted(t, "max_payload: 1MB")
	srv := newService(t, p, stream.ServerParams{})
	srv.handle(t, "echo", echo)
	srv.handle(t, "length", func(w *stream.Writer, r *stream.Request) error {
		_, err := fmt.Fprint(w, len(r.Data))
		return err
	})
	c := p.newClient(t, stream.ClientParams{})
	verifyEcho(t, c, "echo", 4, 500_000, 10)
	goesOn := open(t, c, "echo")
	exchange(t, goesOn, 0)
	for i, limit := range []int64{64 << 10, 8 << 10, 1 << 20, 32 << 10} {
		reload(t, p.server, fmt.Sprintf("max_payload: %d", limit))
		inform(t, p.server)
		eventually(t, "the connections know", func() bool { return srv.nc.MaxPayload() == limit && c.Conn.MaxPayload() == limit })

		rec := testRecord(i, 500_000)
		if _, err := goesOn.Write(rec); err != nil {
			t.Fatal(err)
		}
		if got, err := goesOn.Recv(); err != nil || !bytes.Equal(got, rec) {
			t.Errorf("max_payload %d: %d bytes on the stream that was open before, %v", limit, len(got), err)
			return
		}
		verifyEcho(t, c, "echo", 4, 500_000, 10)
		for _, size := range []int{1000, 100_000} {
			s, err := c.Open(testContext(t), "length", make([]byte, size))
			if err == nil {
				var rec []byte
				if rec, err = s.Recv(); err == nil && string(rec) != fmt.Sprint(size) {
					t.Errorf("%s bytes arrived of %d", rec, size)
				}
				s.Close()
			}
			if fits := int64(size) < limit; fits && err != nil || !fits && !errors.Is(err, nats.ErrMaxPayload) {
				t.Errorf("max_payload %d, request of %d bytes: %v", limit, size, err)
			}
		}
	}
	if err := goesOn.CloseSend(); err != nil {
		t.Error(err)
	}
	wantEOF(t, goesOn)
}

// The limits of an account come in an INFO of their own, right after the connect. Records that were cut before pass all
// the same.
func TestMaxPayloadOfAnAccountCounts(t *testing.T) {
	p := newRestricted(t, `accounts { A { users: [ { user: a, password: a } ], limits { max_payload: 32KB } } }
		no_auth_user: a`)
	for range 10 {
		srv := newService(t, p, stream.ServerParams{})
		srv.handle(t, "echo", echo)
		verifyEcho(t, p.newClient(t, stream.ClientParams{}), "echo", 2, 300_000)
		srv.Close()
	}
}

// A peer on another node names a subject that this end's node takes for an attack: it closes the connection over it.
// That stream ends with an error, the others go on.
func TestOverlongSubjectOfPeerEndsOneStream(t *testing.T) {
	cluster := func(name string, more string) *streamtest.Server {
		return streamtest.Run(t, streamtest.WithConfig(fmt.Sprintf("server_name: %s\ncluster { name: c, listen: \"127.0.0.1:-1\" }\n%s", name, more)))
	}
	group := newConcurrent(t)
	wide := cluster("wide", "")
	narrow := streamtest.Run(t, streamtest.WithConfig(fmt.Sprintf(
		"server_name: narrow\nmax_control_line: 512\ncluster { name: c, listen: \"127.0.0.1:-1\", routes: [ \"nats://%s\" ] }", wide.Raw().ClusterAddr())))
	eventually(t, "there is a route", func() bool { return wide.Raw().NumRoutes() > 0 && narrow.Raw().NumRoutes() > 0 })

	client := func(t *testing.T, nc *nats.Conn) *stream.Client {
		c, err := stream.NewClient(stream.ClientParams{Conn: nc})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	serve := func(t *testing.T, nc *nats.Conn, subject string) {
		s, err := stream.NewServer(stream.ServerParams{Conn: nc, KeepAlive: 500 * time.Millisecond, ResumeTimeout: 5 * time.Second})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		if _, err := s.Handle(subject, echo); err != nil {
			t.Fatal(err)
		}
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	producer := narrow.Connect(t)
	serve(t, producer, "narrow")
	consumer := narrow.Connect(t)
	local := client(t, consumer)
	known := func(t *testing.T, srv *streamtest.Server, subject string) {
		eventually(t, subject+" is known at the other node", func() bool { return srv.Raw().GlobalAccount().Interest(subject) > 0 })
	}
	known(t, wide, "narrow")
	goesOn := open(t, local, "narrow")
	exchange(t, goesOn, 0)
	for _, n := range []int{100, 300, 400, 430, 460, 490, 520, 600, 2000} {
		group.Run(fmt.Sprint(n), func(t *testing.T) {
			prefix := nats.CustomInboxPrefix("_SINBOX." + strings.Repeat("x", n))
			far := wide.Connect(t, prefix)
			subject := fmt.Sprint("wide", n)
			serve(t, far, subject)
			known(t, narrow, subject)
			timeout := patience
			if n > 300 {
				timeout = time.Second // the answer of the far end is dropped, or its connection ends
			}
			// To a producer of the narrow node, and from one.
			for name, f := range map[string]func() error{
				"its consumer": func() error {
					ctx, cancel := context.WithTimeout(testContext(t), timeout)
					defer cancel()
					s, err := client(t, far).Open(ctx, "narrow", nil)
					if err != nil {
						return err
					}
					defer s.Close()
					if _, err := s.Write([]byte("x")); err != nil {
						return err
					}
					_, err = s.Recv()
					return err
				},
				"its producer": func() error {
					s := open(t, local, subject)
					defer s.Close()
					if _, err := s.Write([]byte("x")); err != nil {
						return err
					}
					_, err := s.Recv()
					return err
				},
			} {
				err := f()
				if n <= 300 && err != nil || n >= 460 && err == nil {
					t.Errorf("%s has an inbox prefix of %d bytes: %v", name, n, err)
				}
			}
		})
	}
	group.Wait()
	exchange(t, goesOn, 1)
	if err := goesOn.CloseSend(); err != nil {
		t.Error(err)
	}
	wantEOF(t, goesOn)
	for name, nc := range map[string]*nats.Conn{"producer": producer, "consumer": consumer} {
		if s := nc.Stats(); nc.Status() != nats.CONNECTED || s.Reconnects != 0 {
			t.Errorf("the %s's connection is %v, %d reconnects: %v", name, nc.Status(), s.Reconnects, nc.LastError())
		}
	}
}
