package stream

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn/fake"
)

// faulty is a connection whose publish fails as often as a test wants.
type faulty struct {
	*fake.Conn
	mu        sync.Mutex
	failures  int
	published [][]byte
}

var errFaulty = errors.New("publish failed")

func (f *faulty) publish(_, _ string, data []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failures > 0 {
		f.failures--
		return errFaulty
	}
	f.published = append(f.published, append([]byte(nil), data...))
	return nil
}

func (f *faulty) fail(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failures = n
}

func newFaulty(t *testing.T) (*faulty, *Client) {
	t.Helper()
	f := &faulty{Conn: fake.New()}
	f.Published = f.publish
	var c *Client
	t.Cleanup(func() { // after it is closed
		if n := c.ep.sessions.Size(); n != 0 {
			t.Errorf("%d streams are left", n)
		}
	})
	c = fakeClient(t, f, ClientParams{})
	return f, c
}

// The server may refuse a client's subscription before anything else is done.
func TestSubscriptionRefusedAtOnce(t *testing.T) {
	conn := fake.New()
	conn.Refuse = func(subject, _ string) error { return fake.SubscriptionDenied(subject) }
	c := fakeClient(t, conn, ClientParams{})
	if _, err := c.Open(t.Context(), "x", nil); !errors.Is(err, nats.ErrPermissionViolation) {
		t.Errorf("Open: %v", err)
	}
}

// A publish that fails is reported once, by the call that waits for it or the next one, and tried again by the call
// after that: no record is lost, repeated or out of order.
func TestFailedPublish(t *testing.T) {
	subject := "x." + string(AppendToken(nil, Token{Codec: MsgPack, LogPackets: 8, LogBytes: 20, ID: 1}))
	for _, fallback := range []bool{false, true} {
		for failures := range 4 {
			f, c := newFaulty(t)
			to := subject
			if fallback {
				to = "x.oldtoken"
			}
			w := c.NewWriter(to)
			if _, err := w.Write([]byte("first")); err != nil {
				t.Fatal(err)
			}
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			f.fail(failures)
			failed := 0
			for {
				err := w.CloseWithCode(4000, "end")
				if err == nil {
					break
				}
				if failed++; !errors.Is(err, errFaulty) || failed > failures {
					t.Fatalf("CloseWithCode, %d. time: %v", failed, err)
				}
			}
			if failed != failures {
				t.Errorf("%d publishes failed and %d closes", failures, failed)
			}
			if _, err := w.Write(nil); !errors.Is(err, ErrClosed) {
				t.Errorf("Write after Close: %v", err)
			}
			if len(f.published) != 2 {
				t.Fatalf("%d messages were published: %q", len(f.published), f.published)
			}
			if fallback {
				if got := string(f.published[1]); got != `{"type":2,"closeError":{"Code":4000,"Text":"end"}}` {
					t.Errorf("the second is %s", got)
				}
				continue
			}
			h, body, err := ParsePacketHeader(f.published[1])
			if err != nil || h.Seq != 1 {
				t.Fatalf("the second packet's header is %+v, %v", h, err)
			}
			if fr, rest, err := ParseFrame(body); err != nil || fr.Type != FrameClose || fr.Code != 4000 || len(rest) != 0 {
				t.Errorf("the second packet holds %+v, %v", fr, err)
			}
		}
	}
}

// A fault between records: the writer goes on where it stood.
func TestFailedPublishOfRecords(t *testing.T) {
	f, c := newFaulty(t)
	w := c.NewWriter("x." + string(AppendToken(nil, Token{Codec: MsgPack, LogPackets: 30, LogBytes: 60, ID: 1})))
	const records = 1000 // fewer packets than may wait for their acknowledgement
	for i := range records {
		if i%7 == 0 {
			f.fail(i % 3)
		}
		for {
			_, err := w.Write([]byte{byte(i >> 8), byte(i)})
			if err == nil {
				break
			}
			if !errors.Is(err, errFaulty) {
				t.Fatal(err)
			}
		}
	}
	f.fail(0)
	for {
		err := w.Close()
		if err == nil {
			break
		}
		if !errors.Is(err, errFaulty) {
			t.Fatal(err)
		}
	}
	next, seq := 0, uint32(0)
	for _, packet := range f.published {
		h, body, err := ParsePacketHeader(packet)
		if err != nil || h.Seq != seq {
			t.Fatalf("packet %d: %+v, %v", seq, h, err)
		}
		seq++
		for len(body) > 0 {
			var fr Frame
			if fr, body, err = ParseFrame(body); err != nil {
				t.Fatal(err)
			}
			if fr.Type == FrameClose {
				break
			}
			if got := int(fr.Payload[0])<<8 | int(fr.Payload[1]); got != next {
				t.Fatalf("record %d, want %d", got, next)
			}
			next++
		}
	}
	if next != records {
		t.Errorf("%d records were published", next)
	}
	if err := context.Cause(w.Context()); err == nil {
		t.Error("the writer's context goes on")
	}
}

// Once Close has returned, the writer's context is over.
func TestCloseEndsContext(t *testing.T) {
	_, c := newFaulty(t)
	for i := range 2000 {
		for _, token := range []string{string(AppendToken(nil, Token{Codec: MsgPack, LogPackets: 5, LogBytes: 16, ID: uint64(i)})), "old"} {
			w := c.NewWriter(fmt.Sprintf("x%d.%s", i, token)) // peers of their own: none of them acknowledges anything
			if _, err := w.Write([]byte("a")); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			if cause := context.Cause(w.Context()); cause != ErrClosed {
				t.Fatalf("close %d: the cause is %v", i, cause)
			}
		}
	}
}

// A request that cannot be published ends its stream, and nothing is kept of it.
func TestFailedRequest(t *testing.T) {
	f, c := newFaulty(t)
	f.fail(1)
	s, err := c.Open(t.Context(), "x", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); !errors.Is(err, errFaulty) {
		t.Errorf("Recv: %v", err)
	}
	if n := c.Stats(); n.Streams != 0 || n.Reserved != 0 {
		t.Errorf("%+v", n)
	}
}
