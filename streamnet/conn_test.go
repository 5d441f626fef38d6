package streamnet_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
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
		t.Run(fmt.Sprintf("lossy=%v", lossy), func(t *testing.T) {
			url := streamtest.Run(t).URL()
			if lossy {
				rng := rand.New(rand.NewPCG(1, 2))
				url = streamtest.RunInterceptor(t, url, streamtest.Only(streamtest.HasPrefix(0xF5), streamtest.Drop(0.01, rng), streamtest.Reorder(0.01, 3, rng))).URL()
			}
			e := newEnds(t, url)
			l := e.listen(t, "conn")
			for _, turned := range []bool{false, true} {
				t.Run(fmt.Sprintf("turned=%v", turned), func(t *testing.T) { nettest.TestConn(t, e.pipe(l, turned)) })
			}
		})
	}
}

// All bytes arrive before the end, also those that were written just before Close, in either direction, at once and with half-close.
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

// Close of a listener ends Accept and the connections that wait, and no other one. An end that goes away is an error, not io.EOF.
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

// HTTP runs over connections of streams, with many requests at once on connections that are used again.
func TestHTTPOverStreams(t *testing.T) {
	e := newEnds(t, streamtest.Run(t).URL())
	l := e.listen(t, "web")
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		fmt.Fprintf(w, "%s %s", r.URL.Path, bytes.ToUpper(body))
	})}
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return streamnet.Dial(ctx, e.client, "web", stream.WithRetry(stream.Retry{}))
	}}
	client := &http.Client{Transport: transport, Timeout: 30 * time.Second}
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for k := range 10 {
				text := strings.Repeat(fmt.Sprint("text", i, k), 1000*k)
				resp, err := client.Post(fmt.Sprintf("http://web/%d", i), "text/plain", strings.NewReader(text))
				if err != nil {
					t.Error(err)
					return
				}
				body, err := io.ReadAll(bufio.NewReader(resp.Body))
				_ = resp.Body.Close()
				if want := fmt.Sprintf("/%d %s", i, strings.ToUpper(text)); err != nil || string(body) != want {
					t.Errorf("%d bytes, %v, want %d", len(body), err, len(want))
				}
			}
		})
	}
	all.Wait()
	transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	if err := <-served; err != http.ErrServerClosed {
		t.Error(err)
	}
}
