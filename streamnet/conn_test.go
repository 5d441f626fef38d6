package streamnet_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"
	"golang.org/x/net/nettest"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamnet"
	"github.com/natsstream/stream/streamtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ends are a client and a server of streams on connections of their own.
type ends struct {
	client *stream.Client
	server *stream.Server
}

// newEnds makes both ends on connections to url. They are closed at the end of the test.
func newEnds(t testing.TB, url string) ends {
	t.Helper()
	dial := func() *nats.Conn {
		nc, err := nats.Connect(url, nats.IgnoreDiscoveredServers(), nats.ReconnectWait(10*time.Millisecond), nats.MaxReconnects(-1))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	server, err := stream.NewServer(stream.ServerParams{Conn: dial()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	client, err := stream.NewClient(stream.ClientParams{Conn: dial()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return ends{client, server}
}

// listen listens on subject and returns when NATS knows.
func (e ends) listen(t testing.TB, subject string) *streamnet.Listener {
	t.Helper()
	l, err := streamnet.Listen(e.server, subject)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func (e ends) dial(t testing.TB, subject string) *streamnet.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	c, err := streamnet.Dial(ctx, e.client, subject, stream.WithRetry(stream.Retry{})) // the subscription may be on its way
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// pipe returns a connection's ends: c1 has dialed unless turned.
func (e ends) pipe(l *streamnet.Listener, turned bool) nettest.MakePipe {
	return func() (c1, c2 net.Conn, stop func(), err error) {
		accepted := make(chan net.Conn, 1)
		go func() {
			c, err := l.Accept()
			if err != nil {
				c = nil
			}
			accepted <- c
		}()
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		c1, err = streamnet.Dial(ctx, e.client, l.Addr().String(), stream.WithRetry(stream.Retry{}))
		if err != nil {
			return nil, nil, nil, err
		}
		c2 = <-accepted
		if turned {
			c1, c2 = c2, c1
		}
		return c1, c2, func() { _ = c1.Close(); _ = c2.Close() }, nil
	}
}

// Both ends are connections as package net has them.
func TestConnIsANetConn(t *testing.T) {
	for _, lossy := range []bool{false, true} {
		for _, turned := range []bool{false, true} {
			t.Run(fmt.Sprintf("lossy=%v/turned=%v", lossy, turned), func(t *testing.T) {
				t.Parallel() // with losses it mostly waits
				url := streamtest.Run(t).URL()
				if lossy {
					rng := rand.New(rand.NewPCG(1, 2))
					url = streamtest.RunInterceptor(t, url, streamtest.Only(streamtest.HasPrefix(0xF5), streamtest.Drop(0.01, rng), streamtest.Reorder(0.01, 3, rng))).URL()
				}
				e := newEnds(t, url)
				nettest.TestConn(t, e.pipe(e.listen(t, "conn"), turned))
			})
		}
	}
}

// A connection has one goroutine, in which the accepting server waits for its Close. No goroutine copies bytes.
func TestConnectionsHaveOneGoroutine(t *testing.T) {
	const n = 50
	e := newEnds(t, streamtest.Run(t).URL())
	connect := e.pipe(e.listen(t, "quiet"), false)
	var before int
	for i := range n + 1 {
		c1, c2, stop, err := connect()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(stop)
		for _, pair := range [][2]net.Conn{{c1, c2}, {c2, c1}} {
			if _, err := pair[0].Write([]byte("hello")); err != nil {
				t.Fatal(err)
			}
			if n, err := io.ReadFull(pair[1], make([]byte, 4)); err != nil { // a part of the record stays
				t.Fatal(n, err)
			}
		}
		if i == 0 { // with this one, the ends have all goroutines that they share
			before = runtime.NumGoroutine()
		}
	}
	more := func() int { return runtime.NumGoroutine() - before }
	for limit := time.Now().Add(30 * time.Second); more() > n && time.Now().Before(limit); time.Sleep(time.Millisecond) {
	}
	if got := more(); got > n {
		stacks := make([]byte, 1<<20)
		t.Errorf("%d connections have %d goroutines:\n%s", n, got, stacks[:runtime.Stack(stacks, true)])
	}
}

// All bytes arrive before the end, also those that were written just before Close, in either direction, at once and
// with half-close.
func TestCloseSendsWhatWasWritten(t *testing.T) {
	e := newEnds(t, streamtest.Run(t).URL())
	l := e.listen(t, "bytes")
	data := make([]byte, 3<<20+17)
	for i := range data {
		data[i] = byte(i * i >> 8)
	}
	want := sha256.Sum256(data)
	for _, turned := range []bool{false, true} {
		for _, half := range []bool{false, true} {
			from, to, stop, err := e.pipe(l, turned)()
			if err != nil {
				t.Fatal(err)
			}
			sent := make(chan error, 1)
			go func() {
				_, err := io.Copy(from, bytes.NewReader(data))
				if half {
					err = errors.Join(err, from.(*streamnet.Conn).CloseWrite())
				} else {
					err = errors.Join(err, from.Close())
				}
				sent <- err
			}()
			hash := sha256.New()
			if n, err := io.Copy(hash, to); err != nil || n != int64(len(data)) || [sha256.Size]byte(hash.Sum(nil)) != want {
				t.Errorf("turned %v, half %v: %d bytes, %v", turned, half, n, err)
			}
			if err := <-sent; err != nil {
				t.Errorf("turned %v, half %v: %v", turned, half, err)
			}
			if half { // the other direction is still open
				if _, err := to.Write([]byte("answer")); err != nil {
					t.Error(err)
				}
				buf := make([]byte, 6)
				if _, err := io.ReadFull(from, buf); err != nil || string(buf) != "answer" {
					t.Errorf("%q, %v", buf, err)
				}
			}
			stop()
		}
	}
}

// Dial reports why there is no connection, and its context does not bound the connection.
func TestDialReportsRefusals(t *testing.T) {
	e := newEnds(t, streamtest.Run(t).URL())
	_, err := streamnet.Dial(t.Context(), e.client, "nobody")
	if oe, ok := errors.AsType[*net.OpError](err); !ok || oe.Op != "dial" || !errors.Is(err, nats.ErrNoResponders) || !stream.Retryable(err) {
		t.Errorf("nobody listens: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := streamnet.Dial(ctx, e.client, "nobody"); !errors.Is(err, context.Canceled) {
		t.Errorf("the context has ended: %v", err)
	}
	l := e.listen(t, "web")
	ctx, cancel = context.WithCancel(t.Context())
	c, err := streamnet.Dial(ctx, e.client, "web", stream.WithRetry(stream.Retry{}))
	if err != nil {
		t.Fatal(err)
	}
	other, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := c.Write([]byte("x")); err != nil {
		t.Errorf("after the end of Dial's context: %v", err)
	}
	if n, err := other.Read(make([]byte, 9)); n != 1 || err != nil {
		t.Error(n, err)
	}
	if c.RemoteAddr().String() != "web" || other.LocalAddr().String() != "web" || other.RemoteAddr().String() != "consumer" || c.LocalAddr().Network() != "nats" {
		t.Error(c.LocalAddr(), c.RemoteAddr(), other.LocalAddr(), other.RemoteAddr())
	}
	if err := other.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the other end was closed: %v", err)
	}
	for _, c := range []net.Conn{c, other} {
		_ = c.Close()
		if _, err := c.Read(nil); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		if err := errors.Join(c.SetDeadline(time.Now())); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		if err := c.Close(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("a second Close: %v", err)
		}
	}
}

// Close of a listener ends Accept and the connections that wait, and no other one. An end that goes away is an error,
// not io.EOF.
func TestListenerEnds(t *testing.T) {
	e := newEnds(t, streamtest.Run(t).URL())
	l := e.listen(t, "svc")
	made := e.pipe(l, false)
	c1, c2, stop, err := made()
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	waits := e.dial(t, "svc")
	defer waits.Close()
	accepting := make(chan error, 1)
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	go func() { _, err := l.Accept(); accepting <- err }()
	if err := <-accepting; !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if err := l.Close(); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if _, err := waits.Read(make([]byte, 1)); !errors.Is(err, &stream.CloseError{Code: stream.CloseGoingAway}) {
		t.Errorf("a connection that was not accepted: %v", err)
	}
	if _, err := c1.Write([]byte("x")); err != nil {
		t.Error(err)
	}
	if n, err := c2.Read(make([]byte, 9)); n != 1 || err != nil {
		t.Error(n, err)
	}
	_ = e.server.Close()
	if _, err := c1.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("the server has gone: %v", err)
	}
	if _, err := c2.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("the server of this end has gone: %v", err)
	}
}
