package stream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

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

func newHeld() *held { return &held{release: make(chan struct{})} }

// handle writes a record, so that its consumer knows that it runs.
func (h *held) handle(w *stream.Writer, _ *stream.Request) error {
	h.calls.Add(1)
	if _, err := w.Write([]byte("a")); err != nil {
		return err
	}
	<-h.release
	return nil
}

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

func TestRegistrationStopEndsOneSubject(t *testing.T) {
	for _, queue := range []string{"", "q"} {
		t.Run("queue="+queue, func(t *testing.T) {
			h := newHeld()
			p := newPair(t)
			s := newService(t, p, stream.ServerParams{})
			r, other := s.register(t, "svc", queue, h.handle), s.register(t, "other", queue, h.handle)
			running := begin(t, p, "svc")
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(r.Stop)
			}
			waitFor(t, "Stop", wg.Wait)
			if err := refusedWith(t, p, "svc"); !errors.Is(err, nats.ErrNoResponders) {
				t.Errorf("after Stop: %v", err)
			}
			alive := begin(t, p, "other")
			close(h.release)
			wantEOF(t, running) // Stop does not disturb handlers
			wantEOF(t, alive)
			again := s.register(t, "svc", queue, h.handle)
			wantEOF(t, begin(t, p, "svc"))
			again.Stop()
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			other.Stop()
		})
	}
}

func TestRegistrationStopInItsHandler(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	registered := make(chan *stream.Registration, 1)
	registered <- s.register(t, "once", "", func(*stream.Writer, *stream.Request) error {
		(<-registered).Stop()
		return nil
	})
	var err error
	st := open(t, p.consumer, "once")
	waitFor(t, "the handler to stop itself", func() { _, err = st.Recv() })
	if err != io.EOF {
		t.Errorf("the handler ended with %v", err)
	}
	if err := refusedWith(t, p, "once"); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("after Stop: %v", err)
	}
}

// Every request that NATS delivered before Stop returned is served: none of them waits for an answer that never comes.
func TestRegistrationStopServesWhatWasDelivered(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	for range scaled(20) {
		r := s.register(t, "svc", "", func(*stream.Writer, *stream.Request) error { return nil })
		const n = 20
		results := make(chan error, n)
		for range n {
			st := open(t, p.consumer, "svc")
			go func() {
				_, err := st.Recv()
				results <- err
			}()
		}
		r.Stop()
		for range n {
			var err error
			waitFor(t, "the result of each open", func() { err = <-results })
			if err != io.EOF && !errors.Is(err, nats.ErrNoResponders) {
				t.Fatal(err)
			}
		}
	}
}

// A full member of a queue group leaves it, so that requests go to members with room, and returns when it has room.
func TestFullServerLeavesItsQueueGroups(t *testing.T) {
	const small, large = 2, 40
	p := newPair(t)
	var members [2]*held
	var servers [2]*service
	for i, size := range []int{small, large} {
		members[i] = newHeld()
		servers[i] = newService(t, p, stream.ServerParams{MaxStreams: size})
		servers[i].register(t, "svc", "q", members[i].handle)
		servers[i].register(t, "also", "q", members[i].handle)
	}
	var streams []*stream.Stream
	for i := range small + large { // opened one after the other: each finds all members that have room
		subject := []string{"svc", "also"}[i%2]
		var s *stream.Stream
		eventually(t, "a member with room takes the request", func() bool {
			s = open(t, p.consumer, subject)
			_, err := s.Recv()
			return err == nil
		})
		streams = append(streams, s)
	}
	if a, b := members[0].calls.Load(), members[1].calls.Load(); a != small || b != large {
		t.Errorf("%d and %d handlers ran, there is room for %d and %d", a, b, small, large)
	}
	for _, subject := range []string{"svc", "also"} {
		eventually(t, "all members have left "+subject, func() bool {
			return errors.Is(refusedWith(t, p, subject), nats.ErrNoResponders)
		})
	}
	close(members[0].release)
	for _, subject := range []string{"svc", "also"} {
		eventually(t, "the member with room is back at "+subject, func() bool {
			_, err := open(t, p.consumer, subject).Recv()
			return err == nil
		})
	}
	close(members[1].release)
	for _, s := range streams {
		wantEOF(t, s)
	}
}

// Of a full member nothing is lost when it leaves its group: each of many requests at once is served or refused.
func TestLeavingAQueueGroupLosesNoRequest(t *testing.T) {
	p := newPair(t)
	for range 2 {
		newService(t, p, stream.ServerParams{MaxStreams: 3}).register(t, "svc", "q", func(w *stream.Writer, r *stream.Request) error { return nil })
	}
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range scaled(200) {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				s, err := p.consumer.Open(ctx, "svc", nil)
				if err != nil {
					t.Error(err)
				} else if _, err := s.Recv(); err != io.EOF && !stream.Retryable(err) {
					t.Error(err)
				}
				cancel()
			}
		})
	}
	waitFor(t, "all requests to be answered", wg.Wait)
}

func TestFullServerStaysIfToldTo(t *testing.T) {
	for name, c := range map[string]struct {
		queue string
		stays bool
	}{"in its queue group": {"q", true}, "without a queue group": {"", false}} {
		t.Run(name, func(t *testing.T) {
			h := newHeld()
			p := newPair(t)
			s := newService(t, p, stream.ServerParams{MaxStreams: 1, StayWhenFull: c.stays})
			s.register(t, "svc", c.queue, h.handle)
			running := begin(t, p, "svc")
			for range 20 {
				wantCode(t, refusedWith(t, p, "svc"), stream.CloseTryAgainLater, "")
			}
			close(h.release)
			wantEOF(t, running)
		})
	}
}

// The end of a server that is full, and so in none of its groups, is as that of any other.
func TestEndOfAFullServer(t *testing.T) {
	h := newHeld()
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{MaxStreams: 1})
	s.register(t, "svc", "q", h.handle)
	running := begin(t, p, "svc")
	eventually(t, "it has left", func() bool { return errors.Is(refusedWith(t, p, "svc"), nats.ErrNoResponders) })
	s.register(t, "later", "q", h.handle)
	eventually(t, "it takes no request for what it handles since", func() bool {
		return errors.Is(refusedWith(t, p, "later"), nats.ErrNoResponders)
	})
	if _, err := s.HandleQueue("a b", "q", h.handle); !errors.Is(err, nats.ErrBadSubject) {
		t.Errorf("a bad subject: %v", err)
	}
	drained := make(chan error, 1)
	go func() { drained <- s.Drain(testContext(t)) }()
	close(h.release)
	wantEOF(t, running)
	var err error
	waitFor(t, "Drain", func() { err = <-drained })
	if err != nil {
		t.Errorf("Drain: %v", err)
	}
	if err := refusedWith(t, p, "svc"); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("after Drain: %v", err)
	}
	if n := h.calls.Load(); n != 1 {
		t.Errorf("%d handlers ran", n)
	}
}

// NATS refuses a subject that a server handles, at first or by a reload. The registration says so, and serves it when NATS lets it.
func TestRegistrationRefused(t *testing.T) {
	config := func(subjects string) string {
		return fmt.Sprintf(`authorization { users: [
			{ user: producer, password: secret-of-producer, permissions: { subscribe: [ "_SINBOX.producer.>", %s ], publish: ">" } }
			{ user: alice, password: secret-of-alice } ] }`, subjects)
	}
	for _, queue := range []string{"", "q"} {
		p := newRestricted(t, config(`"svc.always"`))
		s := newService(t, p, stream.ServerParams{Logger: slog.New(slog.DiscardHandler)}, user("producer")...)
		always := s.register(t, "svc.always", queue, echo)
		r := s.register(t, "svc.x", queue, echo)
		alice := p.newClient(t, stream.ClientParams{}, user("alice")...)
		verifyEcho(t, alice, "svc.always", 3, 10)
		for range 2 {
			eventually(t, "the registration tells", func() bool { return r.Err() != nil })
			wantRefused(t, r.Err(), "svc.x")
			if _, err := readAll(open(t, alice, "svc.x")); !errors.Is(err, nats.ErrNoResponders) {
				t.Errorf("a stream on the refused subject: %v", err)
			}
			if err := always.Err(); err != nil {
				t.Errorf("the other registration: %v", err)
			}
			wantNotDone(t, s.Done(), s.Err())
			reload(t, p.server, config(`"svc.always", "svc.x"`))
			eventually(t, "the registration is accepted", func() bool { return r.Err() == nil })
			verifyEcho(t, alice, "svc.x", 3, 10)
			verifyEcho(t, alice, "svc.always", 3, 10)
			reload(t, p.server, config(`"svc.always"`))
		}
		eventually(t, "the registration tells", func() bool { return r.Err() != nil })
		r.Stop()
		if _, err := readAll(open(t, alice, "svc.x")); !errors.Is(err, nats.ErrNoResponders) {
			t.Errorf("after Stop: %v", err)
		}
	}
}
