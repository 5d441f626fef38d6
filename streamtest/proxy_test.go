package streamtest_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/streamtest"
)

// pipe returns both ends of a connection through a new proxy.
func pipe(t *testing.T) (p *streamtest.Proxy, client, server *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	p = streamtest.RunProxy(t, ln.Addr().String())
	c, err := net.Dial("tcp", p.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	for _, conn := range []net.Conn{c, s} {
		_ = conn.SetDeadline(time.Now().Add(limit))
	}
	send(t, c, "x") // or the proxy may not know yet that it has a connection
	expect(t, s, "x")
	return p, c.(*net.TCPConn), s.(*net.TCPConn)
}

func send(t *testing.T, c net.Conn, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

func expect(t *testing.T, c net.Conn, text string) {
	t.Helper()
	b := make([]byte, len(text))
	if n, err := io.ReadFull(c, b); err != nil || string(b) != text {
		t.Fatalf("read %q, %v; want %q", b[:n], err, text)
	}
}

// expectNothing sees that nothing arrives for d.
func expectNothing(t *testing.T, c net.Conn, d time.Duration) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(d))
	n, err := c.Read(make([]byte, 10))
	if err, ok := errors.AsType[net.Error](err); !ok || !err.Timeout() {
		t.Fatalf("read %d bytes, %v; want nothing", n, err)
	}
	_ = c.SetReadDeadline(time.Now().Add(limit))
}

func TestProxyPasses(t *testing.T) {
	_, client, server := pipe(t)
	send(t, client, "ping")
	expect(t, server, "ping")
	send(t, server, "pong")
	expect(t, client, "pong")
	_ = client.CloseWrite()
	if n, err := server.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("read %d, %v; want EOF", n, err)
	}
	send(t, server, "half open")
	expect(t, client, "half open")
	_ = server.SetLinger(0)
	_ = server.Close()
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %v, want a reset like the server's", err)
	}
}

func TestProxyCutAndReset(t *testing.T) {
	p, client, server := pipe(t)
	p.Cut()
	p.Cut()
	send(t, client, "unread") // makes an end that is not orderly a reset
	for _, c := range []net.Conn{client, server} {
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("read %v after Cut, want EOF", err)
		}
	}
	p, client, server = pipe(t)
	p.Reset()
	for _, c := range []net.Conn{client, server} {
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("read %v after Reset, want ECONNRESET", err)
		}
	}
}

func TestProxyBlackHole(t *testing.T) {
	p, client, server := pipe(t)
	p.BlackHole(streamtest.ToServer)
	send(t, client, "held")
	send(t, server, "free")
	expect(t, client, "free")
	expectNothing(t, server, 30*time.Millisecond)
	p.BlackHole(streamtest.Both)
	send(t, server, "held too")
	expectNothing(t, client, 30*time.Millisecond)
	// The buffers end somewhere.
	_ = client.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
	sent, err := client.Write(make([]byte, 64<<20))
	if err == nil {
		t.Error("64 MiB fit into a black hole")
	}
	_ = client.CloseWrite()
	p.Heal()
	expect(t, client, "held too")
	expect(t, server, "held")
	if n, err := io.Copy(io.Discard, server); n != int64(sent) || err != nil {
		t.Errorf("%d bytes came out of %d, %v", n, sent, err)
	}
	p, client, _ = pipe(t)
	p.BlackHole(streamtest.Both)
	p.Cut()
	if _, err := client.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("read %v after Cut in a black hole, want EOF", err)
	}
}

func TestProxyDelay(t *testing.T) {
	p, client, server := pipe(t)
	const d = 50 * time.Millisecond
	p.Delay(streamtest.Both, d)
	start := time.Now()
	send(t, client, "ping")
	expect(t, server, "ping")
	send(t, server, "pong")
	expect(t, client, "pong")
	if took := time.Since(start); took < 2*d {
		t.Errorf("the round trip took %v, want %v", took, 2*d)
	}
	// A delay of each chunk of at most 64 KiB in turn would take 12.8 s.
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<20)
	start = time.Now()
	go func() { _, _ = client.Write(data); _ = client.CloseWrite() }()
	got, err := io.ReadAll(server)
	took := time.Since(start)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("got %d of %d bytes, %v, or others", len(got), len(data), err)
	}
	if took < d || took > 10*time.Second {
		t.Errorf("16 MiB took %v", took)
	}
	p.Delay(streamtest.ToClient, time.Hour)
	send(t, server, "soon")
	expectNothing(t, client, 20*time.Millisecond)
	p.Delay(streamtest.ToClient, 0)
	expect(t, client, "soon")
}

func TestProxyThrottle(t *testing.T) {
	p, client, server := pipe(t)
	const rate = 1 << 20
	p.Throttle(streamtest.ToServer, rate)
	text := strings.Repeat("x", rate/2)
	start := time.Now()
	go func() { _, _ = io.WriteString(client, text) }()
	expect(t, server, text)
	if took := time.Since(start); took < 350*time.Millisecond {
		t.Errorf("half of a second's bytes took %v", took)
	}
	p.Throttle(streamtest.ToServer, 1)
	send(t, client, text)
	expectNothing(t, server, 20*time.Millisecond)
	p.Throttle(streamtest.ToServer, 0)
	expect(t, server, text)
}

func TestProxyRefuse(t *testing.T) {
	srv := streamtest.Run(t)
	p := streamtest.RunProxy(t, srv.URL())
	lost, back := make(chan struct{}, 8), make(chan struct{}, 8)
	nc, err := nats.Connect(p.URL(), nats.IgnoreDiscoveredServers(), nats.MaxReconnects(-1),
		nats.ReconnectWait(10*time.Millisecond),
		nats.DisconnectErrHandler(func(*nats.Conn, error) { lost <- struct{}{} }),
		nats.ReconnectHandler(func(*nats.Conn) { back <- struct{}{} }))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	p.Refuse(true)
	if err := nc.FlushTimeout(limit); err != nil {
		t.Fatalf("a connection from before: %v", err)
	}
	p.Reset()
	receive(t, "the disconnect", lost)
	if c, err := nats.Connect(p.URL()); err == nil {
		c.Close()
		t.Error("connected to a proxy that refuses")
	}
	p.Refuse(false)
	receive(t, "the reconnect", back)
	if err := nc.FlushTimeout(limit); err != nil {
		t.Fatal(err)
	}
}

func TestProxyTargets(t *testing.T) {
	if p, err := streamtest.StartProxy("no port"); err == nil {
		p.Close()
		t.Error("StartProxy accepted a target without a port")
	}
	p := streamtest.RunProxy(t, "127.0.0.1:1")
	if nc, err := nats.Connect(p.URL()); err == nil {
		nc.Close()
		t.Error("connected to nobody")
	}
	p.Close()
	p.Close()
	for dir, want := range map[streamtest.Direction]string{streamtest.Both: "Both", 7: "Direction(7)"} {
		if got := dir.String(); got != want {
			t.Errorf("String() = %s, want %s", got, want)
		}
	}
}
