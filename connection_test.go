package stream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"
	"weak"

	natsserver "github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// reload gives a running server another configuration. Its connections stay up.
func reload(t testing.TB, srv *streamtest.Server, config string) {
	t.Helper()
	o := new(natsserver.Options)
	if err := o.ProcessConfigString(config); err != nil {
		t.Fatal(err)
	}
	o.Host, o.Port, o.NoLog, o.NoSigs = "127.0.0.1", srv.Raw().Addr().(*net.TCPAddr).Port, true, true
	if err := srv.Raw().ReloadOptions(o); err != nil {
		t.Fatal(err)
	}
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

// The server's max_payload shrinks and grows by reloads, while connections stay up. Records of any size pass, also on streams that
// are open meanwhile, and requests are measured against what the server takes now.
func TestMaxPayloadReloaded(t *testing.T) {
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

// The limits of an account come in an INFO of their own, right after the connect. Records that were cut before pass all the same.
func TestMaxPayloadOfAnAccount(t *testing.T) {
	p := newRestricted(t, `accounts { A { users: [ { user: a, password: a } ], limits { max_payload: 32KB } } }
		no_auth_user: a`)
	for range 10 {
		srv := newService(t, p, stream.ServerParams{})
		srv.handle(t, "echo", echo)
		verifyEcho(t, p.newClient(t, stream.ClientParams{}), "echo", 2, 300_000)
		srv.Close()
	}
}

// A client that is made before the first connect refuses nothing, and its streams begin with the connection.
func TestOpenBeforeTheFirstConnect(t *testing.T) {
	checkLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	_ = l.Close()
	nc, err := nats.Connect(fmt.Sprintf("nats://127.0.0.1:%d", port), nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectWait(10*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	server, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if _, err := server.Handle("echo", func(w *stream.Writer, r *stream.Request) error {
		if _, err := w.Write(r.Data); err != nil {
			return err
		}
		_, err := io.Copy(w, r)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	c, err := stream.NewClient(stream.ClientParams{Conn: nc})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	data := testRecord(1, 100_000)
	s, err := c.Open(testContext(t), "echo", data)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	streamtest.Run(t, streamtest.WithOptions(func(o *natsserver.Options) { o.Port = port }))
	if rec, err := s.Recv(); err != nil || !bytes.Equal(rec, data) {
		t.Errorf("%d bytes, %v", len(rec), err)
	}
}

// JetStream acknowledges a request on a subject that one of its streams keeps. Nobody takes that for an answer, whichever comes
// first, nor its refusal.
func TestJetStreamKeepsRequests(t *testing.T) {
	p := newRestricted(t, fmt.Sprintf("jetstream { store_dir: %q }", t.TempDir()))
	srv := newService(t, p, stream.ServerParams{})
	js, err := srv.nc.JetStream()
	if err != nil {
		t.Fatal(err)
	}
	for _, config := range []*nats.StreamConfig{
		{Name: "AUDIT", Subjects: []string{"svc.>"}, Storage: nats.MemoryStorage},
		{Name: "FULL", Subjects: []string{"full.>"}, Storage: nats.MemoryStorage, MaxMsgs: 1, Discard: nats.DiscardNew},
	} {
		if _, err := js.AddStream(config); err != nil {
			t.Fatal(err)
		}
	}
	slow := func(h stream.Handler) stream.Handler { // its answer comes second
		return func(w *stream.Writer, r *stream.Request) error {
			time.Sleep(20 * time.Millisecond)
			return h(w, r)
		}
	}
	for _, subject := range []string{"svc", "full"} {
		srv.handle(t, subject+".echo", echo)
		srv.handle(t, subject+".slow", slow(echo))
		old, err := srv.nc.Subscribe(subject+".old", func(m *nats.Msg) { // a producer that knows only the fallback
			time.Sleep(5 * time.Millisecond)
			for _, answer := range []string{`{"type":1,"data":"YQ=="}`, `{"type":1,"data":"Yg=="}`, `{"type":2,"closeError":{"Code":1000,"Text":""}}`} {
				if err := srv.nc.Publish(m.Reply, []byte(answer)); err != nil {
					t.Error(err)
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = old.Unsubscribe() }()
	}
	if err := srv.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	c := p.newClient(t, stream.ClientParams{})
	for range scaled(100) {
		for _, subject := range []string{"svc", "full"} {
			verifyEcho(t, c, subject+".echo", 3, 10)
			records, err := readAll(open(t, c, subject+".old"))
			if len(records) != 2 || err != io.EOF {
				t.Fatalf("the fallback on %s: %q, %v", subject, records, err)
			}
		}
	}
	before := c.Stats().DroppedPubAck
	for _, subject := range []string{"svc", "full"} {
		verifyEcho(t, c, subject+".slow", 3, 10)
	}
	if n := c.Stats().DroppedPubAck - before; n != 2 {
		t.Errorf("%d acknowledgements were counted, want 2", n)
	}
}

// A peer on another node names a subject that this end's node takes for an attack: it closes the connection over it. That stream ends
// with an error, the others go on.
func TestPeerNamesALongSubject(t *testing.T) {
	cluster := func(name string, more string) *streamtest.Server {
		return streamtest.Run(t, streamtest.WithConfig(fmt.Sprintf("server_name: %s\ncluster { name: c, listen: \"127.0.0.1:-1\" }\n%s", name, more)))
	}
	checkLeaks(t)
	wide := cluster("wide", "")
	narrow := streamtest.Run(t, streamtest.WithConfig(fmt.Sprintf(
		"server_name: narrow\nmax_control_line: 512\ncluster { name: c, listen: \"127.0.0.1:-1\", routes: [ \"nats://%s\" ] }", wide.Raw().ClusterAddr())))
	eventually(t, "there is a route", func() bool { return wide.Raw().NumRoutes() > 0 && narrow.Raw().NumRoutes() > 0 })

	connect := func(srv *streamtest.Server, opts ...nats.Option) *nats.Conn { return srv.Connect(t, opts...) }
	client := func(nc *nats.Conn) *stream.Client {
		c, err := stream.NewClient(stream.ClientParams{Conn: nc})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	serve := func(nc *nats.Conn, subject string) {
		s, err := stream.NewServer(stream.ServerParams{Conn: nc, KeepAlive: 50 * time.Millisecond, AckTimeout: 20 * time.Millisecond, ResumeTimeout: 200 * time.Millisecond})
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
	producer := connect(narrow)
	serve(producer, "narrow")
	consumer := connect(narrow)
	local := client(consumer)
	goesOn := open(t, local, "narrow")
	exchange(t, goesOn, 0)
	for _, n := range []int{100, 300, 400, 430, 460, 490, 520, 600, 2000} {
		prefix := nats.CustomInboxPrefix("_SINBOX." + strings.Repeat("x", n))
		far := connect(wide, prefix)
		subject := fmt.Sprint("wide", n)
		serve(far, subject)
		// To a producer of the narrow node, and from one.
		for name, f := range map[string]func() error{
			"its consumer": func() error {
				ctx, cancel := context.WithTimeout(testContext(t), time.Second)
				defer cancel()
				s, err := client(far).Open(ctx, "narrow", nil)
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
	}
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

// An inbox prefix of 400 bytes works with any peer that has an ordinary one.
func TestOwnLongSubject(t *testing.T) {
	p := newPair(t)
	long := nats.CustomInboxPrefix("_SINBOX." + strings.Repeat("x", 400))
	srv := newService(t, p, stream.ServerParams{}, long)
	srv.handle(t, "long", echo)
	verifyEcho(t, p.consumer, "long", 3, 10)
	short := newService(t, p, stream.ServerParams{})
	short.handle(t, "short", echo)
	verifyEcho(t, p.newClient(t, stream.ClientParams{}, long), "short", 3, 10)
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
