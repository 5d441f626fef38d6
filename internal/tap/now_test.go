//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package tap_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/slab"
	"github.com/natsstream/stream/internal/tap"
)

// takenConn connects over a loopback connection to a server that the test plays, and returns both ends: the tapped
// connection that inbox.* is subscribed on, and the server's. The user's own dialer may change the connection. set
// changes the options of nats.go.
func takenConn(t *testing.T, change func(*net.TCPConn) (net.Conn, error), set ...func(*nats.Options)) (*tap.Conn, *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	opts := nats.GetDefaultOptions()
	opts.Servers = []string{"nats://" + l.Addr().String()}
	opts.AllowReconnect = false
	opts.Timeout = patience
	opts.CustomDialer = dialerFunc(func() (net.Conn, error) {
		conn, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			return nil, err
		}
		return change(conn.(*net.TCPConn))
	})
	for _, s := range set {
		s(&opts)
	}
	if err := tap.Use(&opts); err != nil {
		t.Fatal(err)
	}
	accepted := make(chan net.Conn, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			close(accepted)
			return
		}
		_, _ = io.WriteString(conn, `INFO {"server_id":"x","version":"2.10.0","headers":true,"max_payload":1048576}`+"\r\n")
		for lines := bufio.NewReader(conn); ; {
			if line, err := lines.ReadString('\n'); err != nil || strings.HasPrefix(line, "PING") {
				break
			}
		}
		_, _ = io.WriteString(conn, "PONG\r\n")
		accepted <- conn
	}()
	nc, err := opts.Connect()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	server := (<-accepted).(*net.TCPConn)
	t.Cleanup(func() { server.Close() })
	sub := tap.Of(nc).Register(nc, "inbox.*", func(*nats.Msg, *slab.Slab) {})
	if _, err := nc.Subscribe("inbox.*", sub.Deliver); err != nil {
		t.Fatal(err)
	}
	if err := server.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReaderSize(server, 16).ReadString('\n'); err != nil || !strings.HasPrefix(line, "SUB inbox.*") {
		t.Fatalf("%q, %v", line, err)
	}
	return sub.Conn(), server
}

// asItIs changes nothing.
func asItIs(conn *net.TCPConn) (net.Conn, error) { return conn, nil }

// A connection that takes no bytes stops PublishNow, which does not wait. No command is torn, and none comes twice,
// whether the network took a part of it or nothing.
func TestPublishNowDoesNotWait(t *testing.T) {
	for name, change := range map[string]func(*net.TCPConn) (net.Conn, error){
		"as usual": asItIs,
		"blocking mode": func(conn *net.TCPConn) (net.Conn, error) { // Fd does that to the connection as well
			f, err := conn.File()
			if err == nil {
				f.Fd()
				err = f.Close()
			}
			return conn, err
		},
	} {
		t.Run(name, func(t *testing.T) { publishNowDoesNotWait(t, change) })
	}
}

func publishNowDoesNotWait(t *testing.T, change func(*net.TCPConn) (net.Conn, error)) {
	conn, server := takenConn(t, change)
	if !conn.TakesNow() {
		t.Fatal("a connection over TCP does not take a message at once")
	}
	if sent, _ := conn.PublishNow("x", make([]byte, tap.MostNow+1)); sent {
		t.Error("a message was sent that is too long")
	}
	if sent, _ := conn.PublishNow("x y", nil); sent {
		t.Error("a message was sent to a subject with a space")
	}
	var want bytes.Buffer
	message := func(i int) []byte { return bytes.Repeat([]byte{byte('a' + i%26)}, 1+i*37%tap.MostNow) }
	rests := 0
	for i := range 20_000 {
		data := message(i)
		sent, rest := conn.PublishNow("x", data)
		if sent {
			fmt.Fprintf(&want, "PUB x %d\r\n%s\r\n", len(data), data)
		}
		if rest {
			rests++
			if conn.TakesNow() {
				t.Error("a rest waits, and TakesNow reports that nothing does")
			}
			if again, _ := conn.PublishNow("x", data); again {
				t.Error("a message was sent before the rest of another")
			}
		}
		if !sent || rest {
			break
		}
	}
	if want.Len() >= 1<<26 {
		t.Fatal("the connection took all")
	}
	got := make([]byte, want.Len())
	pushed := make(chan struct{})
	go func() { conn.Push(); close(pushed) }()
	if _, err := io.ReadFull(server, got); err != nil {
		t.Fatal(err)
	}
	<-pushed
	if !bytes.Equal(got, want.Bytes()) {
		t.Errorf("%d bytes differ from those that were sent, %d rests", len(got), rests)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(time.Millisecond) { // the kernel learns a moment later that there is room
		if sent, _ := conn.PublishNow("x", []byte("more")); sent {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a connection that takes bytes again takes no message")
		}
	}
	end := make([]byte, len("PUB x 4\r\nmore\r\n"))
	if _, err := io.ReadFull(server, end); err != nil || string(end) != "PUB x 4\r\nmore\r\n" {
		t.Errorf("%q, %v", end, err)
	}
	if n := testing.AllocsPerRun(100, func() { conn.PublishNow("x", []byte("more")) }); n != 0 {
		t.Errorf("PublishNow allocates %v times", n)
	}
}

// Only a connection of the kernel itself is written to at once: any other may do more in its Write.
func TestPublishNowNeedsTheKernelsConnection(t *testing.T) {
	opts := nats.GetDefaultOptions()
	opts.Servers = []string{"nats://127.0.0.1:4222"}
	opts.AllowReconnect = false
	script := make(chan error, 1)
	opts.CustomDialer = dialerFunc(func() (net.Conn, error) {
		client, server := net.Pipe()
		go func() { script <- scripted(server, []byte("PONG\r\n"), nil) }()
		return struct{ net.Conn }{client}, nil
	})
	if err := tap.Use(&opts); err != nil {
		t.Fatal(err)
	}
	nc, err := opts.Connect()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	sub := tap.Of(nc).Register(nc, "inbox.*", func(*nats.Msg, *slab.Slab) {})
	if _, err := nc.Subscribe("inbox.*", sub.Deliver); err != nil {
		t.Fatal(err)
	}
	if _, err := nc.SubscribeSync("other"); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(patience); sub.Conn() == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain for the subscription")
		}
	}
	if sub.Conn().TakesNow() {
		t.Error("a connection of another type takes messages at once")
	}
	nc.Close()
	if err := <-script; err != nil {
		t.Errorf("server: %v", err)
	}
}

// A write to a network that takes no bytes ends with the timeout of nats.go's flusher, and closes the connection. A
// pause that is longer than the timeout ends no later write.
func TestWritesEndWithTheTimeoutOfTheFlusher(t *testing.T) {
	for name, change := range map[string]func(*net.TCPConn) (net.Conn, error){
		"of the kernel":   asItIs,
		"of another type": func(conn *net.TCPConn) (net.Conn, error) { return struct{ net.Conn }{conn}, nil },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const timeout = 500 * time.Millisecond // longer than a goroutine waits for a processor
			conn, server := takenConn(t, change, func(opts *nats.Options) { opts.FlusherTimeout = timeout })
			expect := func() {
				t.Helper()
				const command = "PUB x 1\r\na\r\n"
				got := make([]byte, len(command))
				if _, err := io.ReadFull(server, got); err != nil || string(got) != command {
					t.Fatalf("%q, %v", got, err)
				}
			}
			for range 2 {
				if !conn.Publish("x", "", nil, []byte("a")) {
					t.Fatal("the connection has failed after a pause")
				}
				conn.Push()
				expect()
				if conn.TakesNow() { // of the kernel
					if sent, rest := conn.PublishNow("x", []byte("a")); !sent || rest {
						t.Fatal("a write that has moved the deadline lets no message follow at once")
					}
					expect()
				}
				time.Sleep(2 * timeout)
			}
			for start := time.Now(); conn.Publish("x", "", nil, make([]byte, 1<<16)); {
				if time.Since(start) > patience {
					t.Fatal("writes to a network that takes no bytes go on")
				}
			}
			if _, err := io.Copy(io.Discard, server); err != nil && !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the connection is not closed: %v", err)
			}
		})
	}
}

// A timeout that never ends limits no write, and neither does none. Without one, the deadline that nats.go sets while it
// connects concerns writes as well, and so does its end: the user's own dialer may have left a deadline behind.
func TestWritesMayTakeForEver(t *testing.T) {
	const left = 200 * time.Millisecond
	for name, timeout := range map[string]time.Duration{"none": 0, "never ends": math.MaxInt64} {
		t.Run(name, func(t *testing.T) {
			conn, server := takenConn(t, func(conn *net.TCPConn) (net.Conn, error) {
				return conn, conn.SetDeadline(time.Now().Add(left))
			}, func(opts *nats.Options) {
				opts.FlusherTimeout = timeout
				opts.CustomDialer = madeTLS{opts.CustomDialer}
			})
			time.Sleep(2 * left)
			if !conn.Publish("x", "", nil, []byte("a")) {
				t.Fatal("the connection has failed")
			}
			conn.Push()
			const command = "PUB x 1\r\na\r\n"
			got := make([]byte, len(command))
			if _, err := io.ReadFull(server, got); err != nil || string(got) != command {
				t.Fatalf("%q, %v", got, err)
			}
		})
	}
}

// madeTLS is a dialer that says that it has made TLS.
type madeTLS struct{ nats.CustomDialer }

func (madeTLS) SkipTLSHandshake() bool { return true }
