package stream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/natsconn"
	"github.com/natsstream/stream/internal/natsconn/fake"
)

// TestMain fails the run if a goroutine is left after all tests, and stops it at a transition that the table of
// lifecycles lacks.
func TestMain(m *testing.M) {
	lifecycle.Strict = true
	goleak.VerifyTestMain(m)
}

func testPacketFlags(flags PacketFlags, sender uint64, seq uint32, frames ...Frame) []byte {
	return AppendPacket(nil, PacketHeader{Flags: flags, Sender: sender, Seq: seq}, frames...)
}

// testPacket returns a sequenced packet with the given frames.
func testPacket(sender uint64, seq uint32, frames ...Frame) []byte {
	return testPacketFlags(PacketSeq, sender, seq, frames...)
}

func testData(s string) Frame { return Frame{Type: FrameData, Payload: []byte(s)} }

func fakeClient(t *testing.T, conn natsconn.Conn, p ClientParams) *Client {
	t.Helper()
	p, err := p.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	ep, err := newEndpoint(conn, "", p)
	if err != nil {
		t.Fatal(err)
	}
	c := &Client{ep: ep, codec: MsgPack}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// unopenedStream makes a consumer's stream that has sent no request.
func unopenedStream(ep *endpoint) *session {
	st := new(Stream)
	s := &st.session
	s.init(ep, lifecycle.Consumer, initialPackets, initialWindow)
	s.recv.parent = context.Background()
	return s
}

// muxStream opens a stream on a fake connection and returns it with a function that puts a message for it into the mux.
func muxStream(t *testing.T, conn *fake.Conn, c *Client) (*Stream, func(data []byte)) {
	t.Helper()
	s, err := c.Open(t.Context(), "subject", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s, func(data []byte) { conn.Deliver(&nats.Msg{Subject: s.session.reply(), Data: data}) }
}

// drain reads until the end, and returns its error, nil for a normal end.
func drain(recv func() ([]byte, error)) error {
	for {
		if _, err := recv(); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// testClosed is the ending for an endpoint without a Client.
var testClosed = &ending{kind: endLocal, err: ErrClientClosed, reset: CloseError{CloseGoingAway, "client closed"}}

// traffic counts the messages that a connection publishes. Each packet in an envelope counts as one.
type traffic struct{ all, control atomic.Int64 }

// controlFrames returns the frames of a control packet, nil of any other message.
func controlFrames(data []byte) (frames []Frame) {
	h, b, err := ParsePacketHeader(data)
	if err != nil || h.Flags&PacketSeq != 0 {
		return nil
	}
	for len(b) > 0 {
		f, rest, err := ParseFrame(b)
		if err != nil {
			return nil
		}
		frames, b = append(frames, f), rest
	}
	return frames
}

// packetsOf returns the packets in an envelope, and any other message as it is.
func packetsOf(data []byte) (packets [][]byte) {
	body, n, err := openEnvelope(data)
	if err != nil {
		return [][]byte{data}
	}
	for range n {
		var p []byte
		_, p, body = nextEnveloped(body)
		packets = append(packets, p)
	}
	return packets
}

// isControl reports whether data is a packet of control frames.
func isControl(data []byte) bool { return len(controlFrames(data)) > 0 }

// of counts the messages that conn publishes from now on.
func (n *traffic) of(conn *fake.Conn) *fake.Conn {
	conn.Published = func(_, _ string, data []byte) error {
		for _, packet := range packetsOf(data) {
			n.all.Add(1)
			if isControl(packet) {
				n.control.Add(1)
			}
		}
		return nil
	}
	return conn
}

// take returns how many messages were published since the last call, and how many of them were control packets.
func (n *traffic) take() (all, control int64) { return n.all.Swap(0), n.control.Swap(0) }

// memoryPair is a client and a server, each on a connection of its own.
type memoryPair struct {
	bus            *fake.Bus
	client         *Client
	server         *Server
	conn, back     *fake.Conn // the client's and the server's
	sent, sentBack traffic    // of these
	times          ClientParams
}

func (m *memoryPair) close() {
	m.client.Close()
	m.server.Close()
}

// handle serves subject. Errors of a connection in memory are the test's mistakes.
func (m *memoryPair) handle(t *testing.T, subject string, h Handler) {
	t.Helper()
	if _, err := m.server.Handle(subject, h); err != nil {
		t.Fatal(err)
	}
}

func (m *memoryPair) open(t *testing.T, subject string) *Stream {
	t.Helper()
	st, err := m.client.Open(t.Context(), subject, nil)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// left returns an error that names everything left of streams at both ends, nil if nothing is.
func (m *memoryPair) left() error {
	var all []error
	for name, ep := range map[string]*endpoint{"client": m.client.ep, "server": m.server.ep} {
		if n := ep.sessions.Size(); n != 0 {
			all = append(all, fmt.Errorf("%s: %d sessions are left", name, n))
		}
		if n := ep.memory(); n != 0 {
			all = append(all, fmt.Errorf("%s: %d bytes are reserved", name, n))
		}
		if n := ep.kept.Load(); n != 0 {
			all = append(all, fmt.Errorf("%s: %d bytes are kept", name, n))
		}
	}
	m.server.mu.Lock()
	defer m.server.mu.Unlock()
	if m.server.handlers != 0 || m.server.sessions != 0 {
		all = append(all, fmt.Errorf("server: %d handlers and %d of their sessions are counted", m.server.handlers, m.server.sessions))
	}
	return errors.Join(all...)
}

// nothingLeft fails the test if something is left of streams that have ended. A tick is the longest time that the last
// acknowledgement may wait for.
func (m *memoryPair) nothingLeft(t *testing.T) {
	t.Helper()
	time.Sleep(2 * maxTick)
	synctest.Wait()
	if err := m.left(); err != nil {
		t.Error(err)
	}
}

// hold makes every publish of the server wait until the function it returns is called.
func (m *memoryPair) hold() (release func()) {
	hold, before := make(chan struct{}), m.back.Published
	m.back.Published = func(subject, reply string, data []byte) error {
		<-hold
		return before(subject, reply, data)
	}
	m.server.ep.outbox.doLater(outOfStream{subject: "held", refuse: &CloseError{Code: CloseTryAgainLater}})
	synctest.Wait()
	return func() {
		close(hold)
		synctest.Wait()
		m.back.Published = before
	}
}

// controlPacket returns a control packet from the consumer s to its handler.
func (s *Stream) controlPacket(frames ...Frame) []byte {
	return AppendPacket(nil, PacketHeader{Sender: s.session.senderNumber}, frames...)
}

// consumerSubject is the reply subject of a consumer that grants 2^logPackets packets and 2^30 bytes.
func consumerSubject(logPackets uint8) string {
	return "x." + string(AppendToken(nil, Token{Codec: MsgPack, LogPackets: logPackets, LogBytes: 30, ID: 1}))
}

// recorder is a connection that keeps all published messages. A publish waits or fails as the test says.
type recorder struct {
	*fake.Conn
	mu       sync.Mutex
	messages []nats.Msg
	fail     func(n int, data []byte) error // of the nth attempt
	attempts int
}

func (r *recorder) sent() []nats.Msg {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.messages[:len(r.messages):len(r.messages)]
}

// frames returns the frames in the messages, which are packets.
func (r *recorder) frames(t *testing.T) (frames []Frame) {
	t.Helper()
	for _, m := range r.sent() {
		_, body, err := ParsePacketHeader(m.Data)
		for len(body) > 0 && err == nil {
			var f Frame
			if f, body, err = ParseFrame(body); err == nil {
				frames = append(frames, f)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return frames
}

func newRecorder(fail func(n int, data []byte) error) *recorder {
	r := &recorder{Conn: fake.New(), fail: fail}
	r.Requested = func(*nats.Msg) error { return nil }
	r.Published = func(subject, reply string, data []byte) error {
		r.mu.Lock()
		n := r.attempts
		r.attempts++
		r.mu.Unlock()
		if r.fail != nil {
			if err := r.fail(n, data); err != nil {
				return err
			}
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.messages = append(r.messages, nats.Msg{Subject: subject, Reply: reply, Data: bytes.Clone(data)})
		return nil
	}
	return r
}

// stuckOutbox returns a client whose outbox waits in a publish until release is called.
func stuckOutbox(t *testing.T) (c *Client, conn *recorder, stick, release func()) {
	busy, idle := make(chan struct{}), make(chan struct{})
	conn = newRecorder(func(_ int, data []byte) error {
		if strings.Contains(string(data), "stuck") {
			close(busy)
			<-idle
		}
		return nil
	})
	c = fakeClient(t, conn.Conn, ClientParams{})
	stick = func() {
		if _, err := c.NewWriter("y" + consumerSubject(5)).Write([]byte("stuck")); err != nil {
			t.Fatal(err)
		}
		<-busy
	}
	return c, conn, stick, func() { close(idle) }
}

// silent opens streams on subject, each from a client of its own, and keeps their consumers from saying anything: tell
// says it for them.
func (m *memoryPair) silent(t *testing.T, subject string, n int) (streams []*Stream, tell func(s *Stream, f Frame)) {
	t.Helper()
	for range n {
		ep, err := newEndpoint(m.bus.Connect("silent"), "", m.times)
		if err != nil {
			t.Fatal(err)
		}
		c := &Client{ep: ep, codec: MsgPack}
		t.Cleanup(func() { c.Close() })
		s, err := c.Open(t.Context(), subject, nil)
		if err != nil {
			t.Fatal(err)
		}
		streams = append(streams, s)
	}
	synctest.Wait()
	m.bus.SetFilter(func(from, _ *fake.Conn, _ *nats.Msg) bool { return from == m.back })
	return streams, func(s *Stream, f Frame) {
		m.server.ep.receive(&nats.Msg{Subject: s.session.out.peer, Data: s.controlPacket(f)}, nil)
		synctest.Wait()
	}
}

// newCountedClient makes a client on a connection of which count returns how much was published to a subject. In the
// end no goroutine of the client may be left.
func newCountedClient(t *testing.T) (c *Client, conn *fake.Conn, count func(subject string) int64) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
	var published sync.Map // subject -> *atomic.Int64
	conn = fake.New()
	conn.Published = func(subject, _ string, _ []byte) error {
		n, _ := published.LoadOrStore(subject, new(atomic.Int64))
		n.(*atomic.Int64).Add(1)
		return nil
	}
	return fakeClient(t, conn, ClientParams{}), conn, func(subject string) int64 {
		if n, ok := published.Load(subject); ok {
			return n.(*atomic.Int64).Load()
		}
		return 0
	}
}

// waits is a handler that reads until the consumer is done or the stream ends, and reports why its context ended.
func waits(ended chan<- error) Handler {
	return func(_ *Writer, r *Request) error {
		for _, err := range r.All() {
			if err != nil {
				<-r.Context().Done()
				ended <- context.Cause(r.Context())
				return err
			}
		}
		return nil
	}
}

// isFrame reports whether data is a control packet with a frame of type t.
func isFrame(data []byte, t FrameType) bool {
	return slices.ContainsFunc(controlFrames(data), func(f Frame) bool { return f.Type == t })
}

// isSequenced reports whether data is a packet with a sequence number: records, headers, CLOSE.
func isSequenced(data []byte) bool {
	h, _, err := ParsePacketHeader(data)
	return err == nil && h.Flags&PacketSeq != 0
}

// hasClose reports whether data is a packet that ends a direction.
func hasClose(data []byte) bool {
	h, b, err := ParsePacketHeader(data)
	if err != nil || h.Flags&PacketSeq == 0 {
		return false
	}
	for len(b) > 0 {
		f, rest, err := ParseFrame(b)
		if err != nil {
			return false
		}
		if f.Type == FrameClose {
			return true
		}
		b = rest
	}
	return false
}

// mostlyNow returns a function for [fake.Conn.Now] that refuses every eighth message.
func mostlyNow() func(string, []byte) (sent, rest bool) {
	var n atomic.Int64
	return func(string, []byte) (sent, rest bool) { return n.Add(1)%8 != 0, false }
}

// newMemoryPair makes a pair. It must be called in a bubble, and closed before the bubble ends.
func newMemoryPair(p ClientParams) (*memoryPair, error) {
	p, err := p.withDefaults()
	if err != nil {
		return nil, err
	}
	m := &memoryPair{bus: new(fake.Bus), times: p}
	m.conn, m.back = m.sent.of(m.bus.Connect("client")), m.sentBack.of(m.bus.Connect("server"))
	if os.Getenv("STREAMTEST_CONNECTIONS") == "fast" {
		m.conn.Now, m.back.Now = mostlyNow(), mostlyNow()
	}
	ep, err := newEndpoint(m.conn, "", p)
	if err != nil {
		return nil, err
	}
	m.client = &Client{ep: ep, codec: MsgPack}
	m.server, err = newServer(m.back, "", ServerParams{
		Window: p.Window, MaxBuffered: p.MaxBuffered, MaxRecordSize: p.MaxRecordSize,
		KeepAlive: p.KeepAlive, PeerTimeout: p.PeerTimeout, AckTimeout: p.AckTimeout, ResumeTimeout: p.ResumeTimeout, DisconnectTimeout: p.DisconnectTimeout,
	})
	if err != nil {
		m.client.Close()
		return nil, err
	}
	return m, nil
}

// memoryTest makes a pair for a test in a bubble and sees to it that nothing is left of it.
func memoryTest(t *testing.T, p ClientParams) *memoryPair {
	t.Helper()
	m, err := newMemoryPair(p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.close)
	return m
}

// took fails the test unless d passed since start, and no more than slack beyond it.
func took(t *testing.T, what string, start time.Time, atLeast, atMost time.Duration) {
	t.Helper()
	if d := time.Since(start); d < atLeast || d > atMost {
		t.Errorf("%s took %v, should be %v to %v", what, d, atLeast, atMost)
	}
}

// until fails the test at once if ok does not become true in time, without a bubble.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// noticed is within which time a dead peer is noticed with default parameters, whatever the stream does.
const noticed = 4 * time.Second

// finish ends streams of openIdle normally.
func finish(t *testing.T, all []*Stream) {
	t.Helper()
	for i, s := range all {
		if err := errors.Join(s.CloseSend(), drain(s.Recv)); err != nil {
			t.Errorf("stream %d of %d: %v", i, len(all), err)
		}
	}
}

// timerSlack is the most that the clocks of two endpoints, which tick each on its own, add to a time.
const timerSlack = 250 * time.Millisecond

// lose returns a filter that loses the first n messages that match selects, all of them if n < 0.
func lose(n int, match func(from, to *fake.Conn, m *nats.Msg) bool) fake.Filter {
	return func(from, to *fake.Conn, m *nats.Msg) bool {
		if n == 0 || !match(from, to, m) {
			return true
		}
		n--
		return false
	}
}

// frameOf matches control packets with a frame of type typ that conn publishes.
func frameOf(conn *fake.Conn, typ FrameType) func(from, to *fake.Conn, m *nats.Msg) bool {
	return func(from, _ *fake.Conn, m *nats.Msg) bool { return from == conn && isFrame(m.Data, typ) }
}

// sequencedOf matches packets of records that conn publishes.
func sequencedOf(conn *fake.Conn) func(from, to *fake.Conn, m *nats.Msg) bool {
	return func(from, _ *fake.Conn, m *nats.Msg) bool { return from == conn && isSequenced(m.Data) }
}

// outcome is how something ended, and when.
type outcome struct {
	err error
	at  time.Time
}

// expect fails the test unless something ended with an error that target is in, after a time from atLeast to atMost.
func (o outcome) expect(t *testing.T, what string, target error, start time.Time, atLeast, atMost time.Duration) {
	t.Helper()
	if !errors.Is(o.err, target) {
		t.Errorf("%s: %v, want %v", what, o.err, target)
	}
	if d := o.at.Sub(start); d < atLeast || d > atMost {
		t.Errorf("%s after %v, should be %v to %v", what, d, atLeast, atMost)
	}
}

// openForAnHour is memoryPair.open for a test whose failure would be to wait for ever.
func openForAnHour(t *testing.T, m *memoryPair, subject string) *Stream {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	t.Cleanup(cancel)
	s, err := m.client.Open(ctx, subject, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var errFaulty = errors.New("publish failed")

// newFaulty returns a recorder, which takes requests as well, and a client on it. As many of the next publishes fail as
// the test tells fail. In the end nothing may be left of the client's streams.
func newFaulty(t *testing.T) (conn *recorder, c *Client, fail func(n int)) {
	t.Helper()
	var failures atomic.Int64
	conn = newRecorder(func(int, []byte) error {
		if failures.Add(-1) >= 0 {
			return errFaulty
		}
		return nil
	})
	conn.Requested = nil
	t.Cleanup(func() { // after it is closed
		if n := c.ep.sessions.Size(); n != 0 {
			t.Errorf("%d streams are left", n)
		}
	})
	c = fakeClient(t, conn, ClientParams{})
	return conn, c, func(n int) { failures.Store(int64(n)) }
}

// A whole stream on connections in memory, both ways, in no time, and a publish that NATS denies.
func TestMemoryPairCarriesStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "echo", func(w *Writer, r *Request) error {
			for rec, err := range r.All() {
				if err != nil {
					return err
				}
				if _, err := w.Write(rec); err != nil {
					return err
				}
			}
			return nil
		})
		st := m.open(t, "echo")
		for i := range 1000 {
			if _, err := fmt.Fprintf(st, "record %d", i); err != nil {
				t.Fatal(err)
			}
		}
		if err := st.CloseSend(); err != nil {
			t.Fatal(err)
		}
		i := 0
		for rec, err := range st.All() {
			if want := fmt.Sprintf("record %d", i); err != nil || string(rec) != want {
				t.Fatalf("got %q, %v, want %q", rec, err, want)
			}
			i++
		}
		if i != 1000 {
			t.Errorf("%d records", i)
		}
		m.nothingLeft(t)

		if _, err := m.open(t, "nobody").Recv(); !errors.Is(err, nats.ErrNoResponders) {
			t.Error(err)
		}
		m.bus.SetFilter(fake.BlackHole(nil, nil))
		st = m.open(t, "echo")
		synctest.Wait()
		m.conn.DenyPublish("echo")
		if _, err := st.Recv(); !errors.Is(err, nats.ErrPermissionViolation) {
			t.Error(err)
		}
		m.bus.SetFilter(nil)
		m.nothingLeft(t)
	})
}
