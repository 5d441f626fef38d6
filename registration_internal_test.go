package stream

import (
	"errors"
	"io"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn/fake"
)

// countedConn counts the subscriptions there are, and what it was asked for.
type countedConn struct {
	*fake.Conn
	now, asked atomic.Int32
	fails      atomic.Bool
	takes      time.Duration // a subscription or its end
}

func (c *countedConn) Subscribe(subject, queue string, f nats.MsgHandler) (func(), error) {
	if queue == "" { // the inbox
		return c.Conn.Subscribe(subject, queue, f)
	}
	c.asked.Add(1)
	time.Sleep(c.takes)
	if c.fails.Load() {
		return nil, nats.ErrConnectionDraining
	}
	c.now.Add(1)
	return sync.OnceFunc(func() {
		c.asked.Add(1)
		time.Sleep(c.takes)
		c.now.Add(-1)
	}), nil
}

func countedServer(t *testing.T, takes time.Duration) (*Server, *countedConn) {
	t.Helper()
	conn := &countedConn{Conn: fake.New(), takes: takes}
	s, err := newServer(conn, "", ServerParams{Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, conn
}

func (s *Server) suspend(why suspension) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.suspendLocked(why)
}

func (s *Server) resume(why suspension) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.resumeLocked(why)
}

func nothing(*Writer, *Request) error { return nil }

// There is a subscription exactly while there is no reason against it, in whatever order reasons come and go.
func TestRegistrationFollowsItsReasons(t *testing.T) {
	const other = suspendedStopped << 1
	synctest.Test(t, func(t *testing.T) {
		s, conn := countedServer(t, time.Second)
		if _, err := s.HandleQueue("x", "q", nothing); err != nil {
			t.Fatal(err)
		}
		want := func(what string, n, asked int32) { // after at most so many subscriptions and their ends
			t.Helper()
			time.Sleep(time.Minute)
			if conn.now.Load() != n || conn.asked.Load() > asked {
				t.Fatalf("%s: %d subscriptions after %d changes, want %d and at most %d", what, conn.now.Load(), conn.asked.Load(), n, asked)
			}
		}
		want("at first", 1, 1)
		s.suspend(suspendedFull)
		s.suspend(suspendedFull)
		s.suspend(other)
		want("two reasons", 0, 2)
		s.resume(suspendedFull)
		want("one reason", 0, 2)
		if _, err := s.HandleQueue("y", "q", nothing); err != nil {
			t.Fatal(err)
		}
		want("another subject", 0, 4)
		s.resume(other)
		s.resume(other)
		want("no reason", 2, 6)
		for range 100 {
			s.suspend(suspendedFull)
			time.Sleep(minStay / 100)
			s.resume(suspendedFull)
		}
		want("after a hundred changes", 2, 10) // a full server stays for a while before it leaves again
		s.suspend(other)
		s.resume(other)
		s.Close() // waits for what is under way
		if n := conn.now.Load(); n != 0 {
			t.Errorf("after Close: %d subscriptions", n)
		}
		s.resume(other)
		want("after Close", 0, conn.asked.Load())
	})
}

func TestRegistrationsChangeAtOnce(t *testing.T) {
	s, conn := countedServer(t, 0)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 100 {
				switch i % 4 {
				case 0:
					r, err := s.HandleQueue("x", "q", nothing)
					if err != nil {
						t.Error(err)
						return
					}
					r.Stop()
				case 1:
					s.suspend(suspendedFull)
				case 2:
					s.resume(suspendedFull)
				case 3:
					if _, err := s.HandleQueue("y", "q", nothing); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	s.resume(suspendedFull)
	for end := time.Now().Add(10 * time.Second); conn.now.Load() != 200 && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
	if n := conn.now.Load(); n != 200 {
		t.Errorf("%d subscriptions of 200", n)
	}
	s.Close()
	if n := conn.now.Load(); n != 0 {
		t.Errorf("%d subscriptions after Close", n)
	}
}

// A connection that takes no subscription any more is asked once.
func TestRegistrationThatCannotReturn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, conn := countedServer(t, time.Second)
		r, err := s.HandleQueue("x", "q", nothing)
		if err != nil {
			t.Fatal(err)
		}
		s.suspend(suspendedFull)
		time.Sleep(time.Minute)
		conn.fails.Store(true)
		s.resume(suspendedFull)
		time.Sleep(time.Minute)
		s.suspend(suspendedFull)
		time.Sleep(time.Minute)
		s.resume(suspendedFull)
		time.Sleep(time.Minute)
		if n := conn.asked.Load(); n != 3 {
			t.Errorf("asked %d times", n)
		}
		r.Stop()
		if _, err := s.HandleQueue("x", "q", nothing); !errors.Is(err, nats.ErrConnectionDraining) {
			t.Errorf("HandleQueue: %v", err)
		}
		s.Close()
		if n := len(s.registrations); n != 0 {
			t.Errorf("%d registrations are kept", n)
		}
	})
}

func TestRoom(t *testing.T) {
	for _, c := range []struct {
		max, handlers, sessions int
		was, full               bool
	}{
		{1, 0, 0, false, false},
		{1, 1, 1, false, true},
		{1, 1, 1, true, true},
		{1, 0, 1, true, false},
		{8, 7, 7, false, false},
		{8, 8, 8, false, true},
		{8, 7, 7, true, false},
		{100, 99, 99, false, false},
		{100, 99, 99, true, true},
		{100, 89, 89, true, true},
		{100, 88, 88, true, false},
		{1, 0, lingering + 1, false, false},
		{1, 0, lingering + 2, false, true},
		{1, 0, lingering + 1, true, true},
		{1, 0, lingering / 8 * 7, true, false},
		{math.MaxInt, 1 << 30, 1 << 30, false, false},
		{math.MaxInt, 0, 0, true, false},
	} {
		if got := roomFor(c.max).full(c.handlers, c.sessions, c.was); got != c.full {
			t.Errorf("MaxStreams %d, %d handlers, %d sessions, full before %v: full %v", c.max, c.handlers, c.sessions, c.was, got)
		}
	}
}
