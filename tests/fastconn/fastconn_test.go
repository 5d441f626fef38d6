package fastconn_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/fastconn"
	"github.com/natsstream/stream/internal/slab"
	"github.com/natsstream/stream/streamtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds each wait of a test.
const patience = 20 * time.Second

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

func connect(t *testing.T, url string, opts ...nats.Option) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect(url, append([]nats.Option{nats.MaxReconnects(-1), nats.ReconnectWait(20 * time.Millisecond)}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

func newClient(t *testing.T, nc *nats.Conn) *stream.Client {
	t.Helper()
	c, err := stream.NewClient(stream.ClientParams{Conn: nc})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// newServer serves subject with an echo of all records.
func newServer(t *testing.T, nc *nats.Conn, subject string) *stream.Server {
	t.Helper()
	s, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	_, err = s.Handle(subject, func(w *stream.Writer, r *stream.Request) error {
		_, err := io.Copy(w, onlyReader{r}) // records become others
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	return s
}

// onlyReader hides WriteTo.
type onlyReader struct{ io.Reader }

// transfer sends size bytes through an echo and compares.
func transfer(t *testing.T, c *stream.Client, subject string, size int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := c.Open(ctx, subject, nil)
	if err != nil {
		t.Error(err)
		return
	}
	defer s.Close()
	data := make([]byte, size)
	r := mathrand.New(mathrand.NewPCG(uint64(size), 2))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	var sending sync.WaitGroup
	defer sending.Wait()
	sending.Go(func() {
		for rest := data; len(rest) > 0; {
			n := min(len(rest), 1+r.IntN(50_000))
			if _, err := s.Write(rest[:n]); err != nil {
				t.Errorf("Write: %v", err)
				return
			}
			rest = rest[n:]
		}
		if err := s.CloseSend(); err != nil {
			t.Errorf("CloseSend: %v", err)
		}
	})
	var got bytes.Buffer
	if _, err := s.WriteTo(&got); err != nil || !bytes.Equal(got.Bytes(), data) {
		t.Errorf("%s: %d bytes of %d, equal %v, %v", subject, got.Len(), size, bytes.Equal(got.Bytes(), data), err)
	}
}

// certificate returns a certificate for 127.0.0.1 and localhost, and the pool that trusts it.
func certificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, pool
}

// countingDialer is a user's dialer. It may make TLS itself.
type countingDialer struct {
	dials atomic.Int32
	tls   *tls.Config
	wrap  func(net.Conn) net.Conn
}

func (d *countingDialer) Dial(network, address string) (net.Conn, error) {
	d.dials.Add(1)
	conn, err := net.Dial(network, address)
	if err != nil {
		return nil, err
	}
	if d.wrap != nil {
		conn = d.wrap(conn)
	}
	if d.tls != nil {
		conn = tls.Client(conn, d.tls)
	}
	return conn, nil
}

func (d *countingDialer) SkipTLSHandshake() bool { return d.tls != nil }

// Every kind of connection carries streams, before and after a reconnect. Stats says whether packets take the fast way.
func TestEveryKindOfConnectionCarriesStreams(t *testing.T) {
	cert, pool := certificate(t)
	secure := func(o *server.Options) {
		o.TLSConfig = &tls.Config{Certificates: []tls.Certificate{cert}}
		o.TLSTimeout = 5
	}
	trust := nats.Secure(&tls.Config{RootCAs: pool})
	for _, c := range []struct {
		name    string
		server  func(*server.Options)
		opts    []nats.Option
		late    []nats.Option // after Enable
		url     func(s *streamtest.Server) string
		own     *countingDialer
		slow    bool
		wantTLS bool
	}{
		{name: "plain"},
		{name: "localhost", url: func(s *streamtest.Server) string { return strings.Replace(s.URL(), "127.0.0.1", "localhost", 1) }},
		{name: "TLS that the user wants", server: secure, opts: []nats.Option{trust}, wantTLS: true},
		{name: "TLS that is set later", server: secure, late: []nats.Option{trust}, wantTLS: true},
		{name: "TLS by URL", server: secure, wantTLS: true, opts: []nats.Option{nats.RootCAs(), func(o *nats.Options) error {
			o.RootCAsCB = func() (*x509.CertPool, error) { return pool, nil }
			return nil
		}}, url: func(s *streamtest.Server) string {
			return "tls://localhost:" + s.URL()[strings.LastIndexByte(s.URL(), ':')+1:]
		}},
		{name: "TLS that the server wants", server: secure, wantTLS: true, opts: []nats.Option{func(o *nats.Options) error {
			o.TLSConfig = &tls.Config{RootCAs: pool}
			return nil
		}}},
		{name: "TLS first", wantTLS: true, server: func(o *server.Options) {
			secure(o)
			o.TLSHandshakeFirst = true
		}, opts: []nats.Option{trust, nats.TLSHandshakeFirst()}},
		{name: "a dialer of the user", own: new(countingDialer)},
		{name: "a dialer of the user and TLS", own: new(countingDialer), server: secure, opts: []nats.Option{trust}, wantTLS: true},
		{name: "a dialer of the user that makes TLS", wantTLS: true, own: &countingDialer{tls: &tls.Config{RootCAs: pool, ServerName: "localhost"}}, server: func(o *server.Options) {
			secure(o)
			o.TLSHandshakeFirst = true
		}},
		{name: "WebSocket", slow: true, server: func(o *server.Options) {
			o.Websocket = server.WebsocketOpts{Host: "127.0.0.1", Port: -1, NoTLS: true}
		}, url: webSocket("ws")},
		{name: "WebSocket over TLS", slow: true, server: func(o *server.Options) {
			o.Websocket = server.WebsocketOpts{Host: "127.0.0.1", Port: -1, TLSConfig: &tls.Config{Certificates: []tls.Certificate{cert}}}
		}, url: webSocket("wss"), opts: []nats.Option{trust}},
		{name: "a dialer that comes later", slow: true, late: []nats.Option{nats.SetCustomDialer(&net.Dialer{})}},
		{name: "in the process", slow: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			var opts []streamtest.Option
			if c.server != nil {
				opts = append(opts, streamtest.WithOptions(c.server))
			}
			srv := streamtest.Run(t, opts...)
			url := srv.URL()
			if c.url != nil {
				url = c.url(srv)
			}
			all := c.opts
			if c.own != nil {
				all = append(all, nats.SetCustomDialer(c.own))
			}
			if c.name == "in the process" {
				all = append(all, nats.InProcessServer(srv.Raw()))
			}
			all = append(append(all, fastconn.Enable()), c.late...)
			a, b := connect(t, url, all...), connect(t, url, all...)
			svc, client := newServer(t, a, "echo"), newClient(t, b)
			transfer(t, client, "echo", 1_000_000)
			verifyFast(t, client, svc, !c.slow)
			dials := int32(0)
			if c.own != nil {
				if dials = c.own.dials.Load(); dials == 0 {
					t.Error("the user's dialer was not called")
				}
			}
			for _, nc := range []*nats.Conn{a, b} {
				before := nc.Stats().Reconnects
				if err := nc.ForceReconnect(); err != nil {
					t.Fatal(err)
				}
				eventually(t, "the connection is back", func() bool { return nc.Stats().Reconnects > before && nc.IsConnected() })
				if err := nc.Flush(); err != nil {
					t.Fatal(err)
				}
			}
			if c.own != nil && c.own.dials.Load() <= dials {
				t.Error("the user's dialer was not called again")
			}
			transfer(t, client, "echo", 1_000_000)
			verifyFast(t, client, svc, !c.slow)
			eventually(t, "nats.go counts the bytes", func() bool { return b.Stats().InBytes >= 2_000_000 })
			if c.wantTLS {
				if n := srv.Raw().NumClients(); n < 2 {
					t.Errorf("%d clients", n)
				}
				connz, err := srv.Raw().Connz(nil)
				if err != nil {
					t.Fatal(err)
				}
				for _, info := range connz.Conns {
					if info.TLSVersion == "" {
						t.Error("a connection without TLS")
					}
				}
			}
		})
	}
}

func verifyFast(t *testing.T, c *stream.Client, s *stream.Server, want bool) {
	t.Helper()
	if c.Stats().Fast != want || s.Stats().Fast != want {
		t.Errorf("fast: client %v, server %v, want %v", c.Stats().Fast, s.Stats().Fast, want)
	}
}

func webSocket(scheme string) func(*streamtest.Server) string {
	return func(s *streamtest.Server) string {
		u := s.Raw().WebsocketURL()
		return scheme + u[strings.Index(u, "://"):]
	}
}

// Errors of TLS and of the first line are those of nats.go.
func TestErrorsOfConnectingAreThoseOfNATS(t *testing.T) {
	cert, _ := certificate(t)
	secure := streamtest.Run(t, streamtest.WithOptions(func(o *server.Options) {
		o.TLSConfig = &tls.Config{Certificates: []tls.Certificate{cert}}
	}))
	plain := streamtest.Run(t)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var answering sync.WaitGroup
	defer answering.Wait()
	defer other.Close()
	answering.Go(func() {
		for {
			c, err := other.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "220 mail.example.org ready\r\n")
			_ = c.Close()
		}
	})
	for name, c := range map[string]struct {
		url  string
		opts []nats.Option
		want func(error) bool
	}{
		"certificate not trusted": {secure.URL(), nil, func(err error) bool { return errors.Is(err, nats.ErrTLS) }},
		"no TLS":                  {plain.URL(), []nats.Option{nats.Secure(&tls.Config{})}, func(err error) bool { return errors.Is(err, nats.ErrSecureConnWanted) }},
		"no answer": {"nats://" + silent.Addr().String(), []nats.Option{nats.Timeout(100 * time.Millisecond)}, func(err error) bool {
			var timeout net.Error
			return errors.As(err, &timeout) && timeout.Timeout()
		}},
		"not NATS": {"nats://" + other.Addr().String(), nil, func(err error) bool { return errors.Is(err, nats.ErrNoInfoReceived) }},
	} {
		for _, fast := range []bool{false, true} {
			opts := c.opts
			if fast {
				opts = append(opts, fastconn.Enable())
			}
			nc, err := nats.Connect(c.url, opts...)
			if err == nil {
				nc.Close()
			}
			if err == nil || !c.want(err) {
				t.Errorf("%s, fast %v: %v", name, fast, err)
			}
		}
	}
}

// cutting reads small pieces.
type cutting struct {
	net.Conn
	r *mathrand.Rand
}

func (c *cutting) Read(p []byte) (int, error) {
	n := 1
	if c.r.IntN(4) == 0 {
		n += c.r.IntN(100)
	}
	return c.Conn.Read(p[:min(n, len(p))])
}

// Several clients and servers share a connection with subscriptions of the program. Their messages have headers or
// none. Reads end anywhere.
func TestStreamsAndSubscriptionsShareAConnection(t *testing.T) {
	srv := streamtest.Run(t)
	for _, cut := range []bool{false, true} {
		t.Run(fmt.Sprintf("cut %v", cut), func(t *testing.T) {
			size, messages := 2_000_000, 2000
			own := new(countingDialer)
			if cut {
				size, messages = 60_000, 300
				own.wrap = func(c net.Conn) net.Conn { return &cutting{c, mathrand.New(mathrand.NewPCG(1, 2))} }
			}
			nc := connect(t, srv.URL(), nats.SetCustomDialer(own), fastconn.Enable())
			got := make(chan *nats.Msg, 2*messages)
			if _, err := nc.ChanSubscribe("plain.*", got); err != nil {
				t.Fatal(err)
			}
			var all sync.WaitGroup
			for i := range 2 {
				subject := fmt.Sprint("echo", i)
				newServer(t, nc, subject)
				client := newClient(t, nc)
				all.Go(func() { transfer(t, client, subject, size) })
				all.Go(func() { transfer(t, client, subject, size/2) })
			}
			for i := range messages {
				m := &nats.Msg{Subject: fmt.Sprint("plain.", i), Data: bytes.Repeat([]byte{byte(i)}, i*7)}
				if i%3 == 0 {
					m.Header = nats.Header{"Number": {fmt.Sprint(i)}}
				}
				if err := nc.PublishMsg(m); err != nil {
					t.Fatal(err)
				}
			}
			for i := range messages {
				select {
				case m := <-got:
					number := ""
					if i%3 == 0 {
						number = fmt.Sprint(i)
					}
					if m.Subject != fmt.Sprint("plain.", i) || len(m.Data) != i*7 || bytes.Count(m.Data, []byte{byte(i)}) != i*7 || m.Header.Get("Number") != number {
						t.Fatalf("message %d: %s, %d bytes, %v", i, m.Subject, len(m.Data), m.Header)
					}
				case <-time.After(patience):
					t.Fatalf("message %d did not arrive", i)
				}
			}
			all.Wait()
			if _, err := nc.Request("nobody", nil, patience); !errors.Is(err, nats.ErrNoResponders) {
				t.Errorf("a request: %v", err)
			}
			client := newClient(t, nc)
			s, err := client.Open(context.Background(), "nobody", nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Recv(); !errors.Is(err, nats.ErrNoResponders) {
				t.Errorf("a stream: %v", err)
			}
		})
	}
}

// A client that is closed and a connection that drains lose nothing of others.
func TestClientsComeAndGo(t *testing.T) {
	srv := streamtest.Run(t)
	nc := connect(t, srv.URL(), fastconn.Enable())
	newServer(t, nc, "echo")
	stays := newClient(t, nc)
	var all sync.WaitGroup
	all.Go(func() { transfer(t, stays, "echo", 10_000_000) })
	for range 10 {
		c := newClient(t, nc)
		transfer(t, c, "echo", 200_000)
		if !c.Stats().Fast {
			t.Error("not fast")
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if c.Stats().Fast {
			t.Error("fast after Close")
		}
	}
	all.Wait()
	if err := nc.Drain(); err != nil {
		t.Error(err)
	}
	eventually(t, "the connection has drained", nc.IsClosed)
}

// Readers that stand still hold receive buffers up to the bound. Other streams go on.
func TestReadersThatStandStillHoldBoundedMemory(t *testing.T) {
	srv := streamtest.Run(t)
	nc, other := connect(t, srv.URL(), fastconn.Enable()), connect(t, srv.URL(), fastconn.Enable())
	newServer(t, other, "echo")
	svc, err := stream.NewServer(stream.ServerParams{Conn: other})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { svc.Close() })
	if _, err := svc.Handle("stuck", func(w *stream.Writer, r *stream.Request) error {
		_, err := w.Write(bytes.Repeat([]byte("stuck"), 500))
		if err == nil {
			err = w.Flush()
		}
		<-r.Context().Done()
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if err := other.Flush(); err != nil {
		t.Fatal(err)
	}
	client := newClient(t, nc)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var stuck []*stream.Stream
	n := 400
	if testing.Short() {
		n = 100
	}
	for range n { // each between others, so that it has a buffer of its own
		s, err := client.Open(ctx, "stuck", nil)
		if err != nil {
			t.Fatal(err)
		}
		stuck = append(stuck, s)
		transfer(t, client, "echo", 150_000)
	}
	if n := slab.Live(); n > 32<<20 {
		t.Errorf("%d bytes of receive buffers", n)
	}
	transfer(t, client, "echo", 20_000_000)
	for i, s := range stuck {
		if rec, err := s.Next(); err != nil || !bytes.Equal(rec, bytes.Repeat([]byte("stuck"), 500)) {
			t.Fatalf("stream %d: %d bytes, %v", i, len(rec), err)
		}
		s.Close()
	}
}

// headerEcho serves subject and sends the headers of each request back as the headers of the stream.
func headerEcho(t *testing.T, nc *nats.Conn, subject string) {
	t.Helper()
	s, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	_, err = s.Handle(subject, func(w *stream.Writer, r *stream.Request) error {
		if r.Header != nil {
			if err := w.SetHeader(r.Header); err != nil {
				return err
			}
		}
		_, err := w.Write(r.Data)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
}

// exchange opens a stream with a request and returns the headers and the record of the answer.
func exchange(t *testing.T, c *stream.Client, m *nats.Msg) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := c.OpenMsg(ctx, m)
	if err != nil {
		return err.Error()
	}
	defer s.Close()
	rec, err := s.Recv()
	if err != nil {
		return err.Error()
	}
	h, err := s.Header()
	return fmt.Sprint(h, len(rec), rec[:min(len(rec), 20)], err)
}

func TestRequestsArriveAsOverOrdinaryConnections(t *testing.T) {
	srv := streamtest.Run(t)
	headerEcho(t, connect(t, srv.URL()), "ordinary.echo")
	headerEcho(t, connect(t, srv.URL(), fastconn.Enable()), "fast.*")
	fast := connect(t, srv.URL(), fastconn.Enable())
	over, ordinary := newClient(t, fast), newClient(t, connect(t, srv.URL()))
	for name, h := range map[string]nats.Header{
		"none": nil, "plain": {"A": {"1"}}, "values": {"A": {"1", "2", "1"}, "b": {"x y"}}, "no value": {"A": {}}, "empty": {"A": {""}},
		"spaces": {"A": {" x "}}, "tab": {"A": {"\tx\ty"}}, "line": {"A": {"x\r\ny"}}, "umlaut": {"A": {"ä"}}, "colon": {"A": {"a: b:"}},
		"name with space": {"A B": {"1"}}, "name with colon": {"A:B": {"1"}}, "long": {"A": {strings.Repeat("x", 20_000)}},
		"no name": {"": {"1"}}, "name with umlaut": {"Ä": {"1"}}, "name with delete": {"A\x7f": {"1"}}, "delete": {"A": {"\x7f"}}, "only a tab": {"A": {"\t"}},
		"name of all characters": {"aZ09!#$%&'*+-.^_`|~": {"1"}}, "one of two names": {"A": {"1"}, "A/B": {"1"}},
		"slash": {"A/B": {"1"}}, "opened": {"A(B": {"1"}}, "closed": {"A)B": {"1"}}, "quote": {"A\"": {"1"}}, "comma": {"A,B": {"1"}}, "semicolon": {";A": {"1"}},
		"less": {"A<": {"1"}}, "greater": {"A>": {"1"}}, "equal": {"A=B": {"1"}}, "question": {"A?": {"1"}}, "at": {"A@B": {"1"}}, "brackets": {"A[1]": {"1"}},
		"backslash": {`A\B`: {"1"}}, "braces": {"{A}": {"1"}},
	} {
		for _, size := range []int{0, 1, 128, 8 << 10, 8<<10 + 1, 100_000} {
			m := &nats.Msg{Subject: "ordinary.echo", Header: h, Data: bytes.Repeat([]byte{'d'}, size)}
			want := exchange(t, ordinary, m)
			if got := exchange(t, over, m); got != want {
				t.Errorf("%s, %d bytes, fast client: %.200s, over ordinary connections %.200s", name, size, got, want)
			}
			m.Subject = "fast.echo"
			if got := exchange(t, ordinary, m); got != want {
				t.Errorf("%s, %d bytes, fast server: %.200s, over ordinary connections %.200s", name, size, got, want)
			}
		}
	}
	before := fast.Stats().OutMsgs
	exchange(t, over, &nats.Msg{Subject: "fast.echo", Header: nats.Header{"A": {"1"}}})
	if n := fast.Stats().OutMsgs - before; n != 0 {
		t.Errorf("nats.go sent %d messages of a stream over a fast connection", n)
	}
}

// Subscriptions of different connections have the same numbers. Each connection gets its own messages and requests, also
// after it has connected again.
func TestConnectionsOfTheSameOptionsShareNoMessages(t *testing.T) {
	for _, c := range []struct {
		name                  string
		again, copied, closed bool // Enable is called again; the options are those of the first connection; it is closed before
		served                bool // the second connection has a server, too
	}{
		{name: "enabled once"},
		{name: "enabled again", again: true},
		{name: "options of the first connection", copied: true},
		{name: "options of the first connection, enabled again", copied: true, again: true, served: true},
		{name: "one after the other", closed: true},
		{name: "one after the other, enabled again", closed: true, again: true, served: true},
		{name: "both serve", served: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			url := streamtest.Run(t).URL()
			opts := nats.GetDefaultOptions()
			opts.Url, opts.MaxReconnect, opts.ReconnectWait = url, -1, 20*time.Millisecond
			dial := func(o *nats.Options, enable bool) *nats.Conn {
				t.Helper()
				if enable {
					if err := fastconn.Enable()(o); err != nil {
						t.Fatal(err)
					}
				}
				nc, err := o.Connect()
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(nc.Close)
				return nc
			}
			first := dial(&opts, true)
			server := newServer(t, first, "first")
			var strangers atomic.Int32 // requests that are not to the subject of their registration
			serve := func(s *stream.Server, subject string) {
				t.Helper()
				if _, err := s.Handle(subject, func(w *stream.Writer, r *stream.Request) error {
					if r.Subject != subject {
						strangers.Add(1)
					}
					_, err := w.Write([]byte(subject))
					return err
				}); err != nil {
					t.Fatal(err)
				}
			}
			for i := range 6 {
				serve(server, fmt.Sprint("first.", i))
			}
			if c.closed {
				first.Close()
			}
			from := &opts
			if c.copied {
				from = &first.Opts
			}
			second := dial(from, c.again)
			if c.served {
				server := newServer(t, second, "second")
				for i := range 3 {
					serve(server, fmt.Sprint("second.", i))
				}
			}
			own := make(chan string, 100)
			for i := range 12 {
				if _, err := second.Subscribe(fmt.Sprint("own.", i), func(m *nats.Msg) { own <- m.Subject }); err != nil {
					t.Fatal(err)
				}
			}
			if !c.closed { // with numbers that are of the program on the second connection
				for i := range 3 {
					serve(server, fmt.Sprint("later.", i))
				}
			}
			ordinary := connect(t, url)
			client := newClient(t, ordinary)
			verify := func() {
				t.Helper()
				for _, nc := range []*nats.Conn{first, second} {
					if err := nc.Flush(); err != nil && !c.closed {
						t.Fatal(err)
					}
				}
				for i := range 12 {
					subject := fmt.Sprint("own.", i)
					m := &nats.Msg{Subject: subject, Reply: "_INBOX.x.~1m5I00000000001", Header: nats.Header{"Stream-Open": {"~1m5I"}}}
					if err := ordinary.PublishMsg(m); err != nil {
						t.Fatal(err)
					}
					select {
					case got := <-own:
						if got != subject {
							t.Errorf("a message to %s, want %s", got, subject)
						}
					case <-time.After(patience):
						t.Fatalf("the message to %s is lost", subject)
					}
				}
				var subjects []string
				for i := range 3 {
					if !c.closed {
						subjects = append(subjects, fmt.Sprint("first.", 2*i), fmt.Sprint("later.", i))
					}
					if c.served {
						subjects = append(subjects, fmt.Sprint("second.", i))
					}
				}
				for _, subject := range subjects {
					want := fmt.Sprint("map[] ", len(subject), " ", []byte(subject), " <nil>")
					if got := exchange(t, client, &nats.Msg{Subject: subject}); got != want {
						t.Errorf("%s: %s, want %s", subject, got, want)
					}
				}
				if n := strangers.Load(); n != 0 {
					t.Errorf("%d requests came to another registration", n)
				}
			}
			verify()
			for _, nc := range []*nats.Conn{second, first} {
				if nc.IsClosed() {
					continue
				}
				before := nc.Stats().Reconnects
				if err := nc.ForceReconnect(); err != nil {
					t.Fatal(err)
				}
				eventually(t, "the connection is back", func() bool { return nc.Stats().Reconnects > before && nc.IsConnected() })
				verify()
			}
		})
	}
}

func TestRequestsDoNotOvertakeSubscriptionsOfTheirConnection(t *testing.T) {
	srv := streamtest.Run(t)
	nc := connect(t, srv.URL(), fastconn.Enable())
	c := newClient(t, nc)
	s := newServer(t, nc, "first")
	rounds := 500
	if testing.Short() {
		rounds = 100
	}
	for i := range rounds {
		subject := fmt.Sprint("later.", i)
		if _, err := s.Handle(subject, func(w *stream.Writer, r *stream.Request) error { _, err := w.Write(r.Data); return err }); err != nil {
			t.Fatal(err)
		}
		if got, want := exchange(t, c, &nats.Msg{Subject: subject, Data: []byte{7}}), "map[] 1 [7] <nil>"; got != want {
			t.Fatalf("request %d: %s, expected %s", i, got, want)
		}
	}
}

func TestRequestsAndSubscriptionsToTheirSubjectShareAConnection(t *testing.T) {
	srv := streamtest.Run(t)
	nc := connect(t, srv.URL(), fastconn.Enable())
	server, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	c := newClient(t, connect(t, srv.URL()))
	var mu sync.Mutex
	seen := make(map[string]int)
	note := func(name string) {
		mu.Lock()
		defer mu.Unlock()
		seen[name]++
	}
	// Each plain subscription has the subject of a registration, and some have its queue group.
	var registrations []*stream.Registration
	for _, queue := range []string{"", "q", "r"} {
		plain, err := nc.QueueSubscribe("ask.*", queue, func(m *nats.Msg) { note("plain " + queue) })
		if err != nil {
			t.Fatal(err)
		}
		defer plain.Unsubscribe()
		r, err := server.HandleQueue("ask.*", queue, func(w *stream.Writer, r *stream.Request) error {
			note("registration " + queue)
			_, err := w.Write([]byte(r.Subject))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		registrations = append(registrations, r)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	sum := func(names ...string) (n int) {
		mu.Lock()
		defer mu.Unlock()
		for _, name := range names {
			n += seen[name]
		}
		return n
	}
	const requests = 100
	ask := func(round int) {
		t.Helper()
		for i := range requests {
			subject := fmt.Sprint("ask.", i)
			if got, want := exchange(t, c, &nats.Msg{Subject: subject}), fmt.Sprint("map[] ", len(subject), " ", []byte(subject), " <nil>"); got != want {
				t.Fatalf("request %d: %s, expected %s", i, got, want)
			}
		}
		n := round * requests
		eventually(t, fmt.Sprintf("all subscriptions have their %d messages", n), func() bool {
			return sum("plain ") == n && sum("registration ") == n &&
				sum("plain q", "registration q") == n && sum("plain r", "registration r") == n
		})
	}
	ask(1)
	// After a reconnect nats.go sends the subscriptions in another order.
	reconnected := nc.StatusChanged(nats.CONNECTED)
	if err := nc.ForceReconnect(); err != nil {
		t.Fatal(err)
	}
	<-reconnected
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	ask(2)
	for _, r := range registrations[1:] {
		r.Stop()
	}
	before := sum("registration q", "registration r")
	for range requests {
		exchange(t, c, &nats.Msg{Subject: "ask.again"})
	}
	eventually(t, "the plain subscriptions have all messages of their groups", func() bool { return sum("plain q", "plain r") == 6*requests-before })
	if n := sum("registration q", "registration r"); n != before {
		t.Errorf("%d requests came to registrations that had stopped", n-before)
	}
}

// Goroutines that write with pauses publish their records themselves at times. They do so beside the commands of
// nats.go, the outbox and each other. Nothing is lost or torn.
func TestPausesOfManyWriters(t *testing.T) {
	const writers = 3
	records := 600
	if testing.Short() {
		records /= 3
	}
	srv := streamtest.Run(t)
	nc := connect(t, srv.URL(), fastconn.Enable())
	newServer(t, nc, "echo")
	client := newClient(t, nc)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var all sync.WaitGroup
	defer all.Wait()
	var plain atomic.Int64
	if _, err := nc.Subscribe("plain", func(m *nats.Msg) {
		if len(m.Data) == 100 {
			plain.Add(1)
		}
	}); err != nil {
		t.Fatal(err)
	}
	for i := range 6 {
		st, err := client.Open(ctx, "echo", nil)
		if err != nil {
			t.Fatal(err)
		}
		var writing sync.WaitGroup
		for writer := range writers {
			random := mathrand.New(mathrand.NewPCG(uint64(i), uint64(writer)))
			writing.Go(func() {
				for n := range records {
					record := make([]byte, 8+random.IntN(2000))
					binary.BigEndian.PutUint32(record, uint32(writer))
					binary.BigEndian.PutUint32(record[4:], uint32(n))
					if _, err := st.Write(record); err != nil {
						t.Errorf("Write: %v", err)
						return
					}
					if n%10 == 0 {
						if err := nc.Publish("plain", make([]byte, 100)); err != nil {
							t.Error(err)
						}
					}
					time.Sleep(time.Duration(random.IntN(300)) * time.Microsecond)
				}
			})
		}
		all.Go(func() {
			writing.Wait()
			if err := st.CloseSend(); err != nil {
				t.Errorf("CloseSend: %v", err)
			}
		})
		all.Go(func() {
			var next [writers]uint32
			for {
				p, err := st.Recv()
				if err == io.EOF {
					break
				}
				if err != nil || len(p) < 8 {
					t.Errorf("Recv: %d bytes, %v", len(p), err)
					return
				}
				writer, n := binary.BigEndian.Uint32(p), binary.BigEndian.Uint32(p[4:])
				if writer >= writers || n != next[writer] {
					t.Errorf("record %d of writer %d, want %d", n, writer, next)
					return
				}
				next[writer]++
			}
			if next != [writers]uint32{uint32(records), uint32(records), uint32(records)} {
				t.Errorf("records of the writers: %d, want %d of each", next, records)
			}
		})
	}
	all.Wait()
	eventually(t, "all other messages have arrived", func() bool { return plain.Load() == int64(6*writers*(records/10)) })
}
