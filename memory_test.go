package stream

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
)

// memoryBus is a NATS server in memory, for tests in a synctest bubble: whatever waits in it waits durably, so that
// time passes. It knows subjects, a wildcard as their last token, queue groups and the 503 of a subject that nobody
// listens on. Messages take no time.
type memoryBus struct {
	mu     sync.Mutex
	subs   []*memorySub
	turn   int           // of queue groups' members
	delay  time.Duration // of every message, set before there is any
	filter memoryFilter
}

// memoryFilter says whether m, which from published, is delivered to to. What it holds back is lost on the way: the
// server has taken it, so nobody is told. from is nil for what the server itself says. It is called with the bus locked,
// for one message at a time.
type memoryFilter func(from, to *memoryConn, m *nats.Msg) bool

// memoryConn is one connection to the bus: a transport.
type memoryConn struct {
	bus  *memoryBus
	name string

	// Guarded by bus.mu.
	state   nats.Status
	changes []chan nats.Status
	onError map[int]func(error)
	next    int
	packets int // published, of any kind
	control int // those of them that carry no records
}

// memorySub is one subscription. Its goroutine ends with unsubscribe.
type memorySub struct {
	conn           *memoryConn
	subject, queue string
	f              nats.MsgHandler
	mu             sync.Mutex
	filled         sync.Cond
	pending        []*nats.Msg
	at             []time.Time // when they arrive
	closed         bool
	ended          chan struct{}
}

func newMemoryBus() *memoryBus { return new(memoryBus) }

func (b *memoryBus) connect(name string) *memoryConn {
	return &memoryConn{bus: b, name: name, state: nats.CONNECTED, onError: make(map[int]func(error))}
}

// setFilter has f look at every message from now on; nil lets all pass.
func (b *memoryBus) setFilter(f memoryFilter) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.filter = f
}

// blackHole loses everything from one connection to the other. Either may be nil, for any.
func blackHole(from, to *memoryConn) memoryFilter {
	return func(f, t *memoryConn, _ *nats.Msg) bool {
		return from != nil && f != from || to != nil && t != to
	}
}

// matches reports whether a message to subject goes to a subscription of pattern.
func matches(pattern, subject string) bool {
	prefix, ok := strings.CutSuffix(pattern, "*")
	if !ok {
		return pattern == subject
	}
	last, ok := strings.CutPrefix(subject, prefix)
	return ok && last != "" && !strings.Contains(last, ".")
}

func (c *memoryConn) publish(subject, reply string, data []byte) error {
	return c.publishMsg(&nats.Msg{Subject: subject, Reply: reply, Data: data})
}

func (c *memoryConn) publishMsg(m *nats.Msg) error {
	b := c.bus
	b.mu.Lock()
	defer b.mu.Unlock()
	if c.state == nats.CLOSED {
		return nats.ErrConnectionClosed
	}
	c.packets++
	if isControl(m.Data) {
		c.control++
	}
	if !isUp(c.state) {
		return nil // lost
	}
	heard := false
	groups := make(map[string][]*memorySub)
	for _, sub := range b.subs {
		if !matches(sub.subject, m.Subject) || !isUp(sub.conn.state) {
			continue
		}
		heard = true
		if sub.queue != "" {
			groups[sub.queue] = append(groups[sub.queue], sub)
			continue
		}
		b.deliverLocked(c, sub, m)
	}
	for _, name := range slices.Sorted(maps.Keys(groups)) {
		b.turn++
		b.deliverLocked(c, groups[name][b.turn%len(groups[name])], m)
	}
	if heard || m.Reply == "" {
		return nil
	}
	for _, sub := range b.subs { // nobody listens
		if sub.conn == c && matches(sub.subject, m.Reply) {
			b.deliverLocked(nil, sub, &nats.Msg{Subject: m.Reply, Header: nats.Header{"Status": {"503"}}})
		}
	}
	return nil
}

func (b *memoryBus) deliverLocked(from *memoryConn, sub *memorySub, m *nats.Msg) {
	if b.filter != nil && !b.filter(from, sub.conn, m) {
		return
	}
	header := maps.Clone(m.Header)
	for key, values := range header {
		header[key] = slices.Clone(values)
	}
	sub.mu.Lock()
	defer sub.mu.Unlock()
	sub.pending = append(sub.pending, &nats.Msg{Subject: m.Subject, Reply: m.Reply, Header: header, Data: bytes.Clone(m.Data)})
	sub.at = append(sub.at, time.Now().Add(b.delay))
	sub.filled.Signal()
}

func (c *memoryConn) subscribe(subject, queue string, f nats.MsgHandler) (func(), error) {
	sub := &memorySub{conn: c, subject: subject, queue: queue, f: f, ended: make(chan struct{})}
	sub.filled.L = &sub.mu
	b := c.bus
	b.mu.Lock()
	defer b.mu.Unlock()
	if c.state == nats.CLOSED {
		return nil, nats.ErrConnectionClosed
	}
	b.subs = append(b.subs, sub)
	go sub.run()
	return func() {
		b.mu.Lock()
		b.subs = slices.DeleteFunc(b.subs, func(s *memorySub) bool { return s == sub })
		b.mu.Unlock()
		sub.mu.Lock()
		sub.closed = true
		sub.filled.Signal()
		sub.mu.Unlock()
		<-sub.ended
	}, nil
}

func (sub *memorySub) run() {
	defer close(sub.ended)
	for {
		sub.mu.Lock()
		for len(sub.pending) == 0 && !sub.closed {
			sub.filled.Wait()
		}
		list, at := sub.pending, sub.at
		sub.pending, sub.at = nil, nil
		sub.mu.Unlock()
		if len(list) == 0 {
			return
		}
		for i, m := range list {
			time.Sleep(time.Until(at[i]))
			sub.f(m)
		}
	}
}

func (c *memoryConn) errors(f func(error)) func() {
	c.bus.mu.Lock()
	defer c.bus.mu.Unlock()
	id := c.next
	c.next++
	c.onError[id] = f
	return func() {
		c.bus.mu.Lock()
		defer c.bus.mu.Unlock()
		delete(c.onError, id)
	}
}

// deny reports that the connection may not publish to subject, as NATS does some time after the publish.
func (c *memoryConn) deny(subject string) {
	c.bus.mu.Lock()
	calls := slices.Collect(maps.Values(c.onError))
	c.bus.mu.Unlock()
	for _, f := range calls {
		f(fmt.Errorf("%w: Permissions Violation for Publish to %q", nats.ErrPermissionViolation, subject))
	}
}

func (c *memoryConn) statusChanges() (<-chan nats.Status, func()) {
	ch := make(chan nats.Status, 10)
	c.bus.mu.Lock()
	defer c.bus.mu.Unlock()
	c.changes = append(c.changes, ch)
	return ch, func() {
		c.bus.mu.Lock()
		defer c.bus.mu.Unlock()
		c.changes = slices.DeleteFunc(c.changes, func(other chan nats.Status) bool { return other == ch })
		close(ch)
	}
}

// set changes the connection's status. While it is not connected nothing reaches it, and what it publishes is lost.
func (c *memoryConn) set(s nats.Status) {
	c.bus.mu.Lock()
	defer c.bus.mu.Unlock()
	c.state = s
	for _, ch := range c.changes {
		select {
		case ch <- s:
		default: // as nats.go does
		}
	}
}

func (c *memoryConn) status() nats.Status {
	c.bus.mu.Lock()
	defer c.bus.mu.Unlock()
	return c.state
}

func (c *memoryConn) maxPayload() int64 { return 1 << 20 }

// published returns how many messages the connection published since the last call, and how many of them were control
// packets.
func (c *memoryConn) published() (all, control int) {
	c.bus.mu.Lock()
	defer c.bus.mu.Unlock()
	all, control = c.packets, c.control
	c.packets, c.control = 0, 0
	return all, control
}

// isControl reports whether data is a packet of control frames.
func isControl(data []byte) bool { return len(controlFrames(data)) > 0 }

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

// memoryPair is a client and a server, each on a connection of its own.
type memoryPair struct {
	bus        *memoryBus
	client     *Client
	server     *Server
	conn, back *memoryConn // the client's and the server's
	times      ClientParams
}

// newMemoryPair makes a pair. It must be called in a bubble, and closed before the bubble ends.
func newMemoryPair(p ClientParams) (*memoryPair, error) {
	p, err := p.withDefaults()
	if err != nil {
		return nil, err
	}
	m := &memoryPair{bus: newMemoryBus(), times: p}
	m.conn, m.back = m.bus.connect("client"), m.bus.connect("server")
	ep, err := newEndpoint(m.conn, "", p)
	if err != nil {
		return nil, err
	}
	m.client = &Client{ep: ep, codec: MsgPack}
	m.server, err = newServer(m.back, "", ServerParams{
		Window: p.Window, MaxBuffered: p.MaxBuffered, MaxRecordSize: p.MaxRecordSize,
		KeepAlive: p.KeepAlive, AckTimeout: p.AckTimeout, ResumeTimeout: p.ResumeTimeout, DisconnectTimeout: p.DisconnectTimeout,
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

func (m *memoryPair) close() {
	m.client.Close()
	m.server.Close()
}

// handle serves subject. Errors of the memory transport are the test's mistakes.
func (m *memoryPair) handle(t *testing.T, subject string, h Handler) {
	t.Helper()
	if err := m.server.Handle(subject, h); err != nil {
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

// left returns what is left of streams at both ends, nil if there is nothing.
func (m *memoryPair) left() error {
	var all []error
	for name, ep := range map[string]*endpoint{"client": m.client.ep, "server": m.server.ep} {
		if n := ep.sessions.Size(); n != 0 {
			all = append(all, fmt.Errorf("%s: %d sessions are left", name, n))
		}
		if n := ep.reserved.Load(); n != 0 {
			all = append(all, fmt.Errorf("%s: %d bytes are reserved", name, n))
		}
	}
	m.server.mu.Lock()
	defer m.server.mu.Unlock()
	if m.server.handlers != 0 || m.server.sessions != 0 {
		all = append(all, fmt.Errorf("server: %d handlers and %d of their sessions are counted", m.server.handlers, m.server.sessions))
	}
	return errors.Join(all...)
}

// nothingLeft fails the test where something is left of streams that have ended. A tick is what the last acknowledgement may
// wait for.
func (m *memoryPair) nothingLeft(t *testing.T) {
	t.Helper()
	time.Sleep(2 * maxTick)
	synctest.Wait()
	if err := m.left(); err != nil {
		t.Error(err)
	}
}

// took fails the test unless d passed since start, and no more than slack beyond it.
func took(t *testing.T, what string, start time.Time, atLeast, atMost time.Duration) {
	t.Helper()
	if d := time.Since(start); d < atLeast || d > atMost {
		t.Errorf("%s took %v, should be %v to %v", what, d, atLeast, atMost)
	}
}

func TestMemoryBus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bus := newMemoryBus()
		a, b := bus.connect("a"), bus.connect("b")
		var (
			mu  sync.Mutex
			got []string
		)
		listen := func(c *memoryConn, subject, queue string) func() {
			stop, err := c.subscribe(subject, queue, func(m *nats.Msg) {
				mu.Lock()
				defer mu.Unlock()
				got = append(got, c.name+" "+m.Subject+" "+m.Header.Get("Status")+string(m.Data))
			})
			if err != nil {
				t.Fatal(err)
			}
			return stop
		}
		expect := func(want ...string) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
			got = nil
		}
		defer listen(a, "in.*", "")()
		defer listen(b, "x", "")()
		stopA, stopB := listen(a, "q", "group"), listen(b, "q", "group")

		data := []byte("1")
		a.publish("x", "", data)
		data[0] = '2' // published is copied
		expect("b x 1")
		b.publish("in.1", "", []byte("1"))
		b.publish("in.1.2", "", []byte("1"))
		b.publish("in.", "", []byte("1"))
		expect("a in.1 1")
		a.publish("q", "", []byte("1"))
		a.publish("q", "", []byte("2"))
		synctest.Wait()
		if len(got) != 2 || got[0][0] == got[1][0] {
			t.Errorf("queue group got %q", got)
		}
		got = nil
		stopA()
		a.publish("q", "in.7", nil)
		expect("b q ")
		stopB()
		a.publish("q", "in.7", nil)
		b.publish("q", "in.7", nil) // not b's to hear
		expect("a in.7 503")
		b.set(nats.RECONNECTING)
		a.publish("x", "in.8", nil)
		b.publish("in.1", "", nil)
		expect("a in.8 503")
		b.set(nats.CONNECTED)
		bus.setFilter(blackHole(a, b))
		a.publish("x", "in.9", nil)
		b.publish("x", "", []byte("own"))
		expect("b x own")
		b.set(nats.CLOSED)
		if err := b.publish("x", "", nil); !errors.Is(err, nats.ErrConnectionClosed) {
			t.Error(err)
		}
	})
}

// A whole stream on the memory transport, both ways, in no time, and a publish that NATS denies.
func TestMemoryPair(t *testing.T) {
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
		m.bus.setFilter(blackHole(nil, nil))
		st = m.open(t, "echo")
		synctest.Wait()
		m.conn.deny("echo")
		if _, err := st.Recv(); !errors.Is(err, nats.ErrPermissionViolation) {
			t.Error(err)
		}
		m.bus.setFilter(nil)
		m.nothingLeft(t)
	})
}
