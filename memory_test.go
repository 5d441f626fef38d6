package stream

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn/fake"
)

// traffic counts what a connection publishes.
type traffic struct{ all, control atomic.Int64 }

// of counts what conn publishes from now on.
func (n *traffic) of(conn *fake.Conn) *fake.Conn {
	conn.Published = func(_, _ string, data []byte) error {
		n.all.Add(1)
		if isControl(data) {
			n.control.Add(1)
		}
		return nil
	}
	return conn
}

// take returns how many messages were published since the last call, and how many of them were control packets.
func (n *traffic) take() (all, control int64) { return n.all.Swap(0), n.control.Swap(0) }

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
	bus            *fake.Bus
	client         *Client
	server         *Server
	conn, back     *fake.Conn // the client's and the server's
	sent, sentBack traffic    // of these
	times          ClientParams
}

// newMemoryPair makes a pair. It must be called in a bubble, and closed before the bubble ends.
func newMemoryPair(p ClientParams) (*memoryPair, error) {
	p, err := p.withDefaults()
	if err != nil {
		return nil, err
	}
	m := &memoryPair{bus: new(fake.Bus), times: p}
	m.conn, m.back = m.sent.of(m.bus.Connect("client")), m.sentBack.of(m.bus.Connect("server"))
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

// A whole stream on connections in memory, both ways, in no time, and a publish that NATS denies.
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
