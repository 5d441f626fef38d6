package stream_test

import (
	"context"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// patience is how long a test waits for what must happen. It takes milliseconds; the limit is for a machine that is
// out of breath.
const patience = 30 * time.Second

// pairOptions change what newPair makes. The zero value is a default server, two connections and two default clients.
type pairOptions struct {
	server             []streamtest.Option
	producer, consumer stream.ClientParams // newPair sets Conn
	producerConn       []nats.Option
	consumerConn       []nats.Option
	shared             bool // one client on one connection is both ends
}

// hasty is for both ends of a test in which a peer goes without a word: the other does not wait long for it.
var hasty = pairOptions{
	producer: stream.ClientParams{KeepAlive: time.Second, ResumeTimeout: time.Second},
	consumer: stream.ClientParams{KeepAlive: time.Second, ResumeTimeout: time.Second},
}

// pair is the two ends of a test: a server in this process, and two clients of it on connections of their own.
type pair struct {
	server             *streamtest.Server
	producer, consumer *stream.Client

	handlers handlerGroup
	clients  []*stream.Client
}

// newPair starts a server and makes a producer's and a consumer's client. At the end of the test it waits for the
// handlers of serve, and fails the test where a stream, a reserved byte or a goroutine is left: a test ends the streams
// it opens.
func newPair(t testing.TB, opts ...pairOptions) *pair {
	t.Helper()
	var o pairOptions
	for _, o = range opts {
	}
	checkLeaks(t)
	p := &pair{server: streamtest.Run(t, o.server...)}
	t.Cleanup(func() { p.finish(t) })
	p.producer = p.newClient(t, o.producer, o.producerConn...)
	if p.consumer = p.producer; !o.shared {
		p.consumer = p.newClient(t, o.consumer, o.consumerConn...)
	}
	return p
}

// newClient makes another client, on a connection of its own unless params has one.
func (p *pair) newClient(t testing.TB, params stream.ClientParams, opts ...nats.Option) *stream.Client {
	t.Helper()
	if params.Conn == nil {
		nc, err := p.server.Dial(opts...) // closed by finish, after the client
		if err != nil {
			t.Fatal(err)
		}
		params.Conn = nc
	}
	c, err := stream.NewClient(params)
	if err != nil {
		params.Conn.Close()
		t.Fatal(err)
	}
	p.clients = append(p.clients, c)
	return c
}

// finish is the end of a test: nothing may be left open, neither before the clients are closed nor after.
func (p *pair) finish(t testing.TB) {
	p.settle(t)
	for _, c := range p.clients {
		waitFor(t, "Client.Close", func() {
			if err := c.Close(); err != nil {
				t.Errorf("Client.Close: %v", err)
			}
		})
		if s := c.Stats(); s.Streams != 0 || s.Reserved != 0 || s.Kept != 0 {
			t.Errorf("after Client.Close: %d streams, %d bytes reserved, %d kept", s.Streams, s.Reserved, s.Kept)
		}
	}
	for _, c := range p.clients {
		c.Conn.Close()
	}
	waitFor(t, "handlers to return after the end", p.handlers.Wait)
}

// settle waits until handlers have returned and no client holds anything.
func (p *pair) settle(t testing.TB) {
	if t.Failed() { // what is left is a consequence
		return
	}
	waitFor(t, "handlers to return", p.handlers.Wait)
	for _, c := range p.clients {
		verifyIdle(t, c)
	}
}

// verifyIdle waits until c holds no stream, no part of a window and no packet.
func verifyIdle(t testing.TB, c *stream.Client) {
	t.Helper()
	var s stream.Stats
	if !poll(func() bool { s = c.Stats(); return s.Streams == 0 && s.Reserved == 0 && s.Kept == 0 }) {
		t.Errorf("not given back: %d streams, %d bytes reserved, %d kept", s.Streams, s.Reserved, s.Kept)
	}
}

// checkLeaks fails the test if a goroutine that it started, or its server, outlives it and its cleanups. Call it first.
func checkLeaks(t testing.TB) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		var err error
		if !poll(func() bool { err = goleak.Find(before); return err == nil }) {
			t.Errorf("goroutines left: %v", err)
		}
	})
}

// serve answers each request on subject by calling handle in a goroutine of its own. handle closes w.
func serve(t testing.TB, p *pair, subject string, handle func(w *stream.Writer, req *nats.Msg)) {
	t.Helper()
	serveClient(t, p, p.producer, subject, handle)
}

// serveClient is serve on another client.
func serveClient(t testing.TB, p *pair, c *stream.Client, subject string, handle func(w *stream.Writer, req *nats.Msg)) {
	t.Helper()
	_, err := c.Conn.Subscribe(subject, func(req *nats.Msg) {
		w := stream.NewWriter(c, req.Reply)
		p.handlers.Go(func() { handle(w, req) })
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Conn.Flush(); err != nil { // the server knows the subscription before a request comes
		t.Fatal(err)
	}
}

// open opens a stream that patience, or the end of the test, ends.
func open(t testing.TB, c *stream.Client, subject string) *stream.Stream {
	t.Helper()
	s, err := c.Open(testContext(t), subject, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// testContext returns a context that bounds what a test waits for.
func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	t.Cleanup(cancel)
	return ctx
}

// newWriterStream opens a stream and returns both ends of it, for a test that plays both in one goroutine.
func newWriterStream(t testing.TB, p *pair) (*stream.Writer, *stream.Stream) {
	t.Helper()
	return newWriterStreamContext(t, p, testContext(t))
}

func newWriterStreamContext(t testing.TB, p *pair, ctx context.Context) (*stream.Writer, *stream.Stream) {
	t.Helper()
	subject := nats.NewInbox()
	sub, err := p.producer.Conn.SubscribeSync(subject)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.producer.Conn.Flush(); err != nil {
		t.Fatal(err)
	}
	s, err := p.consumer.Open(ctx, subject, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	req, err := sub.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	if err := sub.Unsubscribe(); err != nil {
		t.Fatal(err)
	}
	return p.producer.NewWriter(req.Reply), s
}

// waitFor fails the test at once if f does not return in time.
func waitFor(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(patience):
		buf := make([]byte, 1<<20)
		t.Fatalf("waited in vain for %s\n%s", what, buf[:runtime.Stack(buf, true)])
	}
}

// eventually fails the test at once if ok does not become true in time.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	if !poll(ok) {
		t.Fatalf("waited in vain until %s", what)
	}
}

func poll(ok func() bool) bool {
	for wait, end := 50*time.Microsecond, time.Now().Add(patience); ; wait = min(2*wait, 20*time.Millisecond) {
		if ok() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
		time.Sleep(wait)
	}
}

// write sends the records, and fails the test if one is not taken.
func write(t testing.TB, w *stream.Writer, records ...[]byte) {
	t.Helper()
	for i, rec := range records {
		if n, err := w.Write(rec); n != len(rec) || err != nil {
			t.Errorf("Write of record %d, %d bytes: %d, %v", i, len(rec), n, err)
			return
		}
	}
}

// closeWriter closes w, and fails the test if that fails.
func closeWriter(t testing.TB, w *stream.Writer) {
	t.Helper()
	if err := w.Close(); err != nil {
		t.Errorf("Writer.Close: %v", err)
	}
}

// readAll returns the records up to the end of s and the error that ended it, io.EOF for a normal end.
func readAll(s *stream.Stream) (records [][]byte, err error) {
	for {
		rec, err := s.Recv()
		if err != nil {
			return records, err
		}
		records = append(records, rec)
	}
}

// wantEOF fails the test unless s has reached its normal end.
func wantEOF(t testing.TB, s *stream.Stream) {
	t.Helper()
	if rec, err := s.Recv(); err != io.EOF {
		t.Fatalf("Recv: %d bytes, %v; want io.EOF", len(rec), err)
	}
}

// testRecord returns n bytes that only record i has: its number, as far as there is room, and then noise.
func testRecord(i, n int) []byte {
	b := make([]byte, n+8)
	binary.LittleEndian.PutUint64(b, uint64(i))
	r := rand.New(rand.NewPCG(uint64(i), uint64(n)))
	for k := 8; k < n; k += 8 {
		binary.LittleEndian.PutUint64(b[k:], r.Uint64())
	}
	return b[:n:n]
}

// scaled is n, or a tenth of it with -short and under the race detector.
func scaled(n int) int {
	if testing.Short() || stream.RaceEnabled {
		return max(1, n/10)
	}
	return n
}
