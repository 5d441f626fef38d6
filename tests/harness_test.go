package stream_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	natsserver "github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/vmihailenco/msgpack/v5"
	"go.uber.org/goleak"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/race"
	"github.com/natsstream/stream/internal/slab"
	"github.com/natsstream/stream/streamtest"
)

// patience is how long a test waits for something that must happen. It takes milliseconds; the limit is for a machine
// that is out of breath.
const patience = 30 * time.Second

// pairOptions change the pair that newPair makes. The zero value is a default server, two connections and two default
// clients.
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
	waitFor(t, "Client.Close", func() { // at once, because without its connection each takes a while
		var closing sync.WaitGroup
		for _, c := range p.clients {
			closing.Go(func() {
				if err := c.Close(); err != nil {
					t.Errorf("Client.Close: %v", err)
				}
			})
		}
		closing.Wait()
	})
	for _, c := range p.clients {
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
// Goroutines of subtests that run at the same time are not told apart: the test above them waits for all.
func checkLeaks(t testing.TB) {
	t.Helper()
	for i, char := range t.Name() {
		if _, ok := atOnce.Load(t.Name()[:i]); ok && char == '/' {
			return
		}
	}
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() {
		var err error
		if !poll(func() bool { err = goleak.Find(before); return err == nil }) {
			t.Errorf("goroutines left: %v", err)
		}
	})
}

// atOnce has the names of the tests with a concurrent group of subtests.
var atOnce sync.Map

// concurrent is a group of subtests that run at the same time, four at most: NATS gives a connection two seconds to
// begin. It is for subtests that wait longer than they compute.
type concurrent struct {
	t     *testing.T
	tests sync.WaitGroup
	slots chan struct{}
}

// newConcurrent makes the group of a test, which must call Wait before it returns.
func newConcurrent(t *testing.T) *concurrent {
	t.Helper()
	checkLeaks(t)
	atOnce.Store(t.Name(), nil)
	t.Cleanup(func() { atOnce.Delete(t.Name()) })
	return &concurrent{t: t, slots: make(chan struct{}, 4)}
}

// Run begins a subtest when there is a slot for it. It does not wait for the end of the subtest.
func (c *concurrent) Run(name string, f func(t *testing.T)) {
	c.slots <- struct{}{}
	c.tests.Go(func() {
		defer func() { <-c.slots }()
		c.t.Run(name, f)
	})
}

// Wait returns when all subtests have ended.
func (c *concurrent) Wait() { c.tests.Wait() }

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

// testContext returns a context that bounds the waits of a test.
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
	if testing.Short() || race.Enabled {
		return max(1, n/10)
	}
	return n
}

func errOf[T any](_ T, err error) error { return err }

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

// frames returns the frames of a packet.
func frames(t *testing.T, m *nats.Msg) (all []stream.Frame) {
	t.Helper()
	_, body, err := stream.ParsePacketHeader(m.Data)
	for err == nil && len(body) > 0 {
		var f stream.Frame
		f, body, err = stream.ParseFrame(body)
		all = append(all, f)
	}
	if err != nil {
		t.Fatalf("%v in %x", err, m.Data)
	}
	return all
}

func nextRequest(t testing.TB, sub *nats.Subscription) *nats.Msg {
	t.Helper()
	m, err := sub.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// message returns the next message at sub whose packet begins with a frame of type typ.
func message(t *testing.T, sub *nats.Subscription, typ stream.FrameType) *nats.Msg {
	t.Helper()
	for {
		if m := nextRequest(t, sub); frames(t, m)[0].Type == typ {
			return m
		}
	}
}

func wantNotDone(t *testing.T, done <-chan struct{}, err error) {
	t.Helper()
	select {
	case <-done:
		t.Error("Done is closed too early")
	default:
	}
	if err != nil {
		t.Errorf("Err too early: %v", err)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// rawRequests subscribes to a new subject and returns it. The requests that come are answered by the test.
func rawRequests(t testing.TB, p *pair) (string, *nats.Subscription) {
	t.Helper()
	subject := nats.NewInbox()
	sub, err := p.producer.Conn.SubscribeSync(subject)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.producer.Conn.Flush(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	return subject, sub
}

// rawStream opens a stream whose producer is the test, and returns its reply subject and the connection to answer on.
func rawStream(t testing.TB, p *pair) (*stream.Stream, string, *nats.Conn) {
	t.Helper()
	subject, requests := rawRequests(t, p)
	s := open(t, p.consumer, subject)
	return s, nextRequest(t, requests).Reply, p.producer.Conn
}

// rawPublish publishes messages, byte for byte, and returns when the server has them.
func rawPublish(t testing.TB, nc *nats.Conn, subject string, messages ...[]byte) {
	t.Helper()
	for _, m := range messages {
		if err := nc.Publish(subject, m); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
}

// oldProducer opens a stream whose producer is the test: the function returned publishes messages to its reply subject,
// byte for byte, and returns when the server has them.
func oldProducer(t testing.TB, p *pair) (*stream.Stream, func(messages ...[]byte)) {
	t.Helper()
	s, reply, nc := rawStream(t, p)
	return s, func(messages ...[]byte) {
		t.Helper()
		rawPublish(t, nc, reply, messages...)
	}
}

func equalClose(err error, want *stream.CloseError) bool {
	ce, ok := errors.AsType[*stream.CloseError](err)
	return ok && *ce == *want
}

// handlerGroup counts running handlers. It is no sync.WaitGroup, because a request that is still on its way may start
// one while somebody waits for the others.
type handlerGroup struct{ running atomic.Int64 }

func (g *handlerGroup) Go(f func()) {
	g.running.Add(1)
	go func() {
		defer g.running.Add(-1)
		f()
	}()
}

// Wait returns when no handler runs.
func (g *handlerGroup) Wait() {
	for g.running.Load() != 0 {
		time.Sleep(100 * time.Microsecond)
	}
}

// soakRounds is how many streams a test opens one after another: 20,000, and a million with STREAM_SOAK set.
func soakRounds() int {
	switch {
	case os.Getenv("STREAM_SOAK") != "":
		return 1_000_000
	case testing.Short() || race.Enabled:
		return 2000
	}
	return 20_000
}

// liveHeap returns the bytes of all live objects, except receive buffers, which have a bound of their own. A pool keeps
// what it has over one collection.
func liveHeap() int64 {
	for range 3 {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc) - slab.Live()
}

// verifyFootprint runs f, which opens n streams and ends them, and fails the test where anything of them is left:
// a goroutine, a stream, a reserved byte, or heap. f runs once before, so that pools and caches are warm.
func verifyFootprint(t *testing.T, p *pair, n int, f func(n int)) {
	t.Helper()
	f(min(n, 5000))
	idle := func() {
		for _, c := range p.clients {
			verifyIdle(t, c)
		}
	}
	idle()
	// A request may still be on its way to a handler, though its consumer has left.
	goroutines := 0
	for same := 0; same < 20; same++ {
		if now := runtime.NumGoroutine(); now != goroutines {
			goroutines, same = now, 0
		}
		time.Sleep(5 * time.Millisecond)
	}
	heap := liveHeap()
	start := time.Now()
	f(n)
	took := time.Since(start)
	idle()
	// The constant is noise of the server and the runtime; a leak in every stream adds up beyond it.
	heapAfter, limit := int64(0), heap+int64(1<<20+4*n)
	if !poll(func() bool {
		heapAfter = liveHeap()
		return runtime.NumGoroutine() <= goroutines && (race.Enabled || heapAfter <= limit)
	}) {
		buf := make([]byte, 1<<20)
		t.Errorf("left behind: heap %d bytes, want at most %d; %d goroutines where there were %d\n%s",
			heapAfter, limit, runtime.NumGoroutine(), goroutines, buf[:runtime.Stack(buf, true)])
	}
	t.Logf("%d streams in %v, %v each: heap %d, then %d bytes; %d goroutines", n, took.Round(time.Millisecond),
		(took / time.Duration(n)).Round(100*time.Nanosecond), heap, heapAfter, runtime.NumGoroutine())
}

// fillEnded makes p's ends remember as many ended streams as they have room for. The memory for these grows while
// streams end, and a test that compares heaps would take that growth for a leak.
func fillEnded(t *testing.T, p *pair) {
	t.Helper()
	serve(t, p, "ended", func(w *stream.Writer, _ *nats.Msg) { closeWriter(t, w) })
	endMany(t, p.consumer, "ended")
}

// endMany opens streams on subject, reads them to their normal end, and so fills the memory for ended streams at both
// ends. That memory doubles when it is full, up to 16,384 streams. Under the race detector heaps are not compared, and
// endMany does nothing.
func endMany(t *testing.T, c *stream.Client, subject string) {
	t.Helper()
	if race.Enabled {
		return
	}
	inParallel(t, 10_000, func(int, *rand.Rand) {
		s, err := c.Open(t.Context(), subject, nil)
		if err != nil {
			t.Error(err)
			return
		}
		defer s.Close()
		if rec, err := s.Recv(); err != io.EOF {
			t.Errorf("%q, %v", rec, err)
		}
	})
}

// serveFew answers with as many small records as the request says.
func serveFew(t *testing.T, p *pair) {
	serve(t, p, "few", func(w *stream.Writer, req *nats.Msg) {
		n, err := strconv.Atoi(string(req.Data))
		if err != nil {
			t.Error(err)
		}
		for range n {
			if _, err := w.Write(req.Data); err != nil {
				return // the consumer left
			}
		}
		_ = w.Close() // fails where the consumer left
	})
}

// inParallel calls f for 0 … n-1 from a few goroutines.
func inParallel(t testing.TB, n int, f func(i int, r *rand.Rand)) {
	t.Helper()
	var next atomic.Int64
	var group sync.WaitGroup
	for k := range 16 {
		group.Go(func() {
			r := rand.New(rand.NewPCG(uint64(k), 7))
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				f(int(i), r)
			}
		})
	}
	waitFor(t, "all streams to end", group.Wait)
}

// verifyPromptly fails the test if f does not return soon.
func verifyPromptly(t testing.TB, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(patience / 3):
		t.Errorf("%s hangs", what)
	}
}

// The bounds of a producer's lead; docs/PROTOCOL.md sections 6 and 8.
const (
	firstWindow = 256 << 10 // bytes offered to a new stream
	fullWindow  = 4 << 20   // bytes a window may grow to
	fullPacket  = 32 << 10  // bytes of a packet of many records
)

// slowConsumers counts the messages that NATS drops because a subscription or a connection does not keep up.
type slowConsumers struct{ n atomic.Int64 }

func (c *slowConsumers) option() nats.Option {
	return nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		if errors.Is(err, nats.ErrSlowConsumer) {
			c.n.Add(1)
		}
	})
}

func (c *slowConsumers) verify(t testing.TB, p *pair) {
	t.Helper()
	if n := c.n.Load(); n != 0 {
		t.Errorf("NATS dropped messages of a subscription %d times", n)
	}
	if n := p.server.SlowConsumers(); n != 0 {
		t.Errorf("the server cut off %d slow consumers", n)
	}
	for _, s := range []stream.Stats{p.producer.Stats(), p.consumer.Stats()} {
		if n := s.DroppedMalformed + s.DroppedForeign + s.DroppedDuplicate + s.DroppedControl; n != 0 {
			t.Errorf("packets dropped: %+v", s)
		}
	}
}

// newWatchedPair is newPair with both connections' slow consumers counted.
func newWatchedPair(t testing.TB, o pairOptions) (*pair, *slowConsumers) {
	slow := new(slowConsumers)
	o.producerConn = append(o.producerConn, slow.option())
	o.consumerConn = append(o.consumerConn, slow.option())
	return newPair(t, o), slow
}

// waitStuck waits until the counter has stopped, and returns it.
func waitStuck(t testing.TB, bytes *atomic.Int64) int64 {
	t.Helper()
	last := int64(-1)
	eventually(t, "the producer is held back", func() bool {
		time.Sleep(20 * time.Millisecond)
		now := bytes.Load()
		stopped := now == last && now > firstWindow/2
		last = now
		return stopped
	})
	return last
}

// newRestricted is a pair on a server with the given configuration, without clients.
func newRestricted(t testing.TB, config string) *pair {
	t.Helper()
	for _, user := range []string{"producer", "alice", "bob", "monitor"} {
		t.Setenv(strings.ToUpper(user)+"_PASSWORD", "secret-of-"+user)
	}
	checkLeaks(t)
	p := &pair{server: streamtest.Run(t, streamtest.WithConfig(config))}
	t.Cleanup(func() { p.finish(t) })
	return p
}

// user is how the users of the recipes connect.
func user(name string, more ...nats.Option) []nats.Option {
	return append([]nats.Option{nats.UserInfo(name, "secret-of-"+name), nats.CustomInboxPrefix("_SINBOX." + name)}, more...)
}

// refusal is a permissions error as the connection's own error handler heard it.
type refusal struct {
	at  time.Time
	err error
}

// refusals collects the refusals of NATS.
type refusals chan refusal

func (r refusals) option() nats.Option {
	return nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		select {
		case r <- refusal{time.Now(), err}:
		default:
		}
	})
}

// wantRefused fails the test unless err says that NATS does not permit subject.
func wantRefused(t testing.TB, err error, subject string) {
	t.Helper()
	if !errors.Is(err, nats.ErrPermissionViolation) || !strings.Contains(err.Error(), subject) || !strings.Contains(err.Error(), "docs/PROTOCOL.md section 15") {
		t.Errorf("error %v; want a permissions violation that names %s and the section that helps", err, subject)
	}
}

// within fails the test unless ended, when err was reported, is at most half a second after the first refusal, and err
// names subject.
func (r refusals) within(t testing.TB, ended time.Time, err error, subject string) {
	t.Helper()
	var first refusal
	waitFor(t, "the refusal", func() { first = <-r })
	if d := ended.Sub(first.at); d > 500*time.Millisecond {
		t.Errorf("reported %v after the refusal", d)
	}
	wantRefused(t, err, subject)
}

// echo is a handler that sends all records back, with headers and trailers around them.
func echo(w *stream.Writer, r *stream.Request) error {
	if err := w.SetHeader(nats.Header{"Answer-To": {r.Subject}}); err != nil {
		return err
	}
	for rec, err := range r.All() {
		if err != nil {
			return err
		}
		if _, err := w.Write(rec); err != nil {
			return err
		}
	}
	return w.SetTrailer(nats.Header{"Complete": {"yes"}})
}

// verifyEcho sends n records of the sizes, in turn, through an echo handler and compares the answers.
func verifyEcho(t testing.TB, c *stream.Client, subject string, n int, sizes ...int) {
	t.Helper()
	s := open(t, c, subject)
	var sending sync.WaitGroup
	sending.Go(func() {
		for i := range n {
			if _, err := s.Write(testRecord(i, sizes[i%len(sizes)])); err != nil {
				t.Errorf("Write of record %d: %v", i, err)
				return
			}
		}
		if err := s.CloseSend(); err != nil {
			t.Errorf("CloseSend: %v", err)
		}
	})
	defer sending.Wait()
	for i := range n {
		rec, err := s.Recv()
		if err != nil || !bytes.Equal(rec, testRecord(i, sizes[i%len(sizes)])) {
			t.Errorf("record %d of %d: %d bytes, %v", i, n, len(rec), err)
			s.Close()
			return
		}
	}
	wantEOF(t, s)
	if h, err := s.Header(); h.Get("Answer-To") != subject || err != nil {
		t.Errorf("headers %v, %v", h, err)
	}
	if h := s.Trailer(); h.Get("Complete") != "yes" {
		t.Errorf("trailers %v", h)
	}
}

// exchange sends record i through an echo handler.
func exchange(t testing.TB, s *stream.Stream, i int) {
	t.Helper()
	if _, err := s.Write(testRecord(i, 100)); err != nil {
		t.Fatal(err)
	}
	if rec, err := s.Recv(); err != nil || !bytes.Equal(rec, testRecord(i, 100)) {
		t.Fatalf("%d bytes, %v", len(rec), err)
	}
}

// service is a Server on a connection of its own.
type service struct {
	*stream.Server
	nc *nats.Conn
}

// handle serves subject and returns when NATS knows.
func (s *service) handle(t testing.TB, subject string, h stream.Handler) {
	t.Helper()
	if _, err := s.Handle(subject, h); err != nil {
		t.Fatal(err)
	}
	if err := s.nc.Flush(); err != nil {
		t.Fatal(err)
	}
}

// register serves subject in a queue group, unless that is empty, and returns when NATS knows.
func (s *service) register(t testing.TB, subject, queue string, h stream.Handler) *stream.Registration {
	t.Helper()
	r, err := s.HandleQueue(subject, queue, h)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	return r
}

// held is a handler that runs until the test lets it return. It counts its calls.
type held struct {
	calls   atomic.Int32
	release chan struct{}
}

// handle writes a record, so that its consumer knows that it runs.
func (h *held) handle(w *stream.Writer, _ *stream.Request) error {
	h.calls.Add(1)
	if _, err := w.Write([]byte("a")); err != nil {
		return err
	}
	<-h.release
	return nil
}

func newHeld() *held { return &held{release: make(chan struct{})} }

// begin opens a stream and waits until its handler runs.
func begin(t testing.TB, p *pair, subject string) *stream.Stream {
	t.Helper()
	s := open(t, p.consumer, subject)
	var err error
	waitFor(t, "the handler to run", func() { _, err = s.Recv() })
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// refusedWith returns the error of an open that no handler sees.
func refusedWith(t testing.TB, p *pair, subject string) (err error) {
	t.Helper()
	s := open(t, p.consumer, subject)
	defer s.Close()
	waitFor(t, "the refusal", func() { _, err = s.Recv() })
	return err
}

func nothing(*stream.Writer, *stream.Request) error { return nil }

// newService makes a server for a test. At the end of the test, where it passed, no stream and no reserved byte may be
// left.
func newService(t testing.TB, p *pair, params stream.ServerParams, opts ...nats.Option) *service {
	t.Helper()
	nc, err := p.server.Dial(opts...)
	if err != nil {
		t.Fatal(err)
	}
	params.Conn = nc
	s, err := stream.NewServer(params)
	if err != nil {
		nc.Close()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var left stream.Stats
		if !t.Failed() && !poll(func() bool { left = s.Stats(); return left.Streams == 0 && left.Reserved == 0 && left.Kept == 0 }) {
			t.Errorf("server has not given back: %d streams, %d bytes reserved, %d kept", left.Streams, left.Reserved, left.Kept)
		}
		verifyPromptly(t, "Server.Close", func() { _ = s.Close() })
		nc.Close()
	})
	return &service{s, nc}
}

// newServed is a pair and a server that serves "svc" with h.
func newServed(t testing.TB, params stream.ServerParams, h stream.Handler) (*pair, *service) {
	t.Helper()
	p := newPair(t)
	s := newService(t, p, params)
	s.handle(t, "svc", h)
	return p, s
}

// wantClose fails the test unless err is, or wraps, a *CloseError with that code and text; an empty text is any.
func wantCode(t testing.TB, err error, code int, text string) {
	t.Helper()
	ce, ok := errors.AsType[*stream.CloseError](err)
	if !ok || ce.Code != code || text != "" && ce.Text != text {
		t.Errorf("error %v; want close code %d %q", err, code, text)
	}
}

// lockedBuffer is a buffer that a logger may write to while a test reads.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// jsonInbox subscribes to a reply subject as the original library made it.
func jsonInbox(t testing.TB, p *pair) (string, *nats.Subscription) {
	t.Helper()
	inbox := nats.NewInbox() + ".Ab3dEf7h"
	sub, err := p.consumer.Conn.SubscribeSync(inbox)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	return inbox, sub
}

func nextJSON(t testing.TB, sub *nats.Subscription) stream.StreamingMsg {
	t.Helper()
	raw := nextRequest(t, sub)
	var m stream.StreamingMsg
	if err := json.Unmarshal(raw.Data, &m); err != nil {
		t.Fatalf("message %q: %v", raw.Data, err)
	}
	return m
}

// rawPacket returns a packet with the given frames.
func rawPacket(flags stream.PacketFlags, sender uint64, seq uint32, frames ...stream.Frame) []byte {
	return stream.AppendPacket(nil, stream.PacketHeader{Flags: flags, Sender: sender, Seq: seq}, frames...)
}

func rawData(s string) stream.Frame {
	return stream.Frame{Type: stream.FrameData, Payload: []byte(s)}
}

func rawClose(code uint16) stream.Frame { return stream.Frame{Type: stream.FrameClose, Code: code} }
func rawReset(code uint16) stream.Frame { return stream.Frame{Type: stream.FrameReset, Code: code} }
func rawPing() stream.Frame             { return stream.Frame{Type: stream.FramePing} }

func rawCredit(c stream.Credit) stream.Frame {
	return stream.Frame{Type: stream.FrameCredit, Payload: stream.AppendCredit(nil, c)}
}

// rawInbox returns a reply subject as a consumer makes it, with a window of 32 packets and 256 KiB.
func rawInbox() string {
	token := stream.Token{Codec: stream.MsgPack, LogPackets: 5, LogBytes: 18, ID: rand.Uint64()}
	return string(stream.AppendToken([]byte("_SINBOX.WzMBDEFgQTDaRKtrDRD6kp."), token))
}

// Payload sizes at which the way of a record changes: it shares a packet, fills one, or is cut.
const (
	frameOverhead  = stream.PacketHeaderSize + stream.FrameHeaderSize
	coalesceLimit  = 32<<10 - frameOverhead
	singleLimit    = 256 << 10
	defaultRecord  = 16 << 20
	smallestWindow = 4 << 10
)

// waitBehind returns when everything that the producer's client published to the consumer's has been handed to its
// streams: one connection's messages stay in order, and so do those of one subscription.
func waitBehind(t *testing.T, p *pair) {
	t.Helper()
	w, s := newWriterStream(t, p)
	write(t, w, []byte("behind"))
	if rec, err := s.Recv(); err != nil || string(rec) != "behind" {
		t.Fatalf("%q, %v", rec, err)
	}
	closeWriter(t, w)
	wantEOF(t, s)
}

// mallocs returns how often f's process allocates.
func mallocs(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.Mallocs - before.Mallocs
}

func encoded(codec stream.Codec, v any) []byte {
	var b []byte
	var err error
	if codec == stream.JSON {
		b, err = json.Marshal(v)
	} else {
		b, err = msgpack.Marshal(v)
	}
	if err != nil {
		panic(err)
	}
	return b
}

// TestMain fails the run if a goroutine is left after all tests, and stops it at a transition that the table of
// lifecycles lacks. checkLeaks looks for goroutines after each test.
func TestMain(m *testing.M) {
	lifecycle.Strict = true
	goleak.VerifyTestMain(m)
}
