package stream

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn"
	"github.com/natsstream/stream/internal/natsconn/fake"
)

// Close waits for producers that have not answered yet, to tell them, but not for long, and not in vain.
func TestCloseWaitsForUnansweredRequests(t *testing.T) {
	ack := defaultAckTimeout
	for name, c := range map[string]struct {
		before        func(t *testing.T, m *memoryPair)
		atLeast, most time.Duration
		told          int // handlers
	}{
		"no stream": {func(*testing.T, *memoryPair) {}, 0, 0, 0},
		"a stream that was answered": {func(t *testing.T, m *memoryPair) {
			m.open(t, "silent")
			time.Sleep(time.Second)
		}, 0, 0, 1},
		"a stream that will be answered": {func(t *testing.T, m *memoryPair) {
			m.open(t, "silent")
			synctest.Wait() // the request is sent
		}, 1, ack, 1},
		"streams that were closed before": {func(t *testing.T, m *memoryPair) {
			for range 5 {
				s := m.open(t, "silent")
				synctest.Wait()
				s.Close()
			}
		}, 1, ack, 5},
		"requests that were not sent": {func(t *testing.T, m *memoryPair) {
			m.conn.Set(nats.RECONNECTING)
			synctest.Wait()
			m.open(t, "silent").Close()
		}, 0, natsconn.UnsubscribeTimeout, 0},
		"nobody listens": {func(t *testing.T, m *memoryPair) {
			m.open(t, "nobody").Close()
			synctest.Wait()
		}, 0, 0, 0},
		"a producer that never answers": {func(t *testing.T, m *memoryPair) {
			m.open(t, "dead")
			synctest.Wait()
		}, ack, ack, 0},
		"one that did not answer long ago": {func(t *testing.T, m *memoryPair) {
			m.open(t, "dead").Close()
			time.Sleep(time.Minute)
		}, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{KeepAlive: time.Hour, ResumeTimeout: time.Hour})
				told := make(chan error, 10)
				m.handle(t, "silent", func(w *Writer, r *Request) error {
					<-r.Context().Done()
					told <- context.Cause(r.Context())
					return nil
				})
				stop, err := m.back.Subscribe("dead", "", func(*nats.Msg) {})
				if err != nil {
					t.Fatal(err)
				}
				defer stop()
				c.before(t, m)
				start := time.Now()
				m.client.Close()
				took(t, "Close", start, c.atLeast, c.most)
				synctest.Wait()
				if len(told) != c.told {
					t.Errorf("%d handlers were told, want %d", len(told), c.told)
				}
				for range len(told) {
					if err := <-told; !errors.Is(err, &CloseError{Code: CloseGoingAway}) && !errors.Is(err, &CloseError{Code: CloseCanceled}) {
						t.Errorf("a handler was told %v", err)
					}
				}
			})
		})
	}
}

// flushed is a connection that counts how often it was flushed.
type flushed struct {
	*fake.Conn
	times int
	took  time.Duration
}

func (c *flushed) Flush(timeout time.Duration) error {
	c.times++
	time.Sleep(min(c.took, timeout))
	return nil
}

// Close flushes the connection, unless it is down, and does not wait for a server that does not answer.
func TestCloseFlushes(t *testing.T) {
	for name, c := range map[string]struct {
		status nats.Status
		takes  time.Duration
		times  int
		took   time.Duration
	}{
		"connected":     {nats.CONNECTED, time.Millisecond, 1, time.Millisecond},
		"no answer":     {nats.CONNECTED, time.Hour, 1, natsconn.UnsubscribeTimeout},
		"reconnecting":  {nats.RECONNECTING, time.Hour, 0, 0},
		"closed before": {nats.CLOSED, time.Hour, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				conn := &flushed{Conn: fake.New(), took: c.takes}
				s, err := newServer(conn, "", ServerParams{})
				if err != nil {
					t.Fatal(err)
				}
				conn.Set(c.status)
				synctest.Wait()
				start := time.Now()
				s.Close()
				took(t, "Close", start, c.took, c.took)
				if conn.times != c.times {
					t.Errorf("flushed %d times", conn.times)
				}
			})
		})
	}
}
