package stream

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/natsconn/fake"
	"github.com/natsstream/stream/internal/race"
)

// flaky is a connection that counts what is published to each subject.
type flaky struct {
	*fake.Conn
	published sync.Map // subject -> *atomic.Int64
}

func newFlaky() *flaky {
	f := &flaky{Conn: fake.New()}
	f.Published = func(subject, _ string, _ []byte) error {
		n, _ := f.published.LoadOrStore(subject, new(atomic.Int64))
		n.(*atomic.Int64).Add(1)
		return nil
	}
	return f
}

func (f *flaky) count(subject string) int64 {
	n, ok := f.published.Load(subject)
	if !ok {
		return 0
	}
	return n.(*atomic.Int64).Load()
}

func newFlakyEndpoint(t *testing.T) (*endpoint, *flaky) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	params, err := ClientParams{}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	conn := newFlaky()
	ep, err := newEndpoint(conn, "", params)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		closed := make(chan struct{})
		go func() { defer close(closed); ep.close(testClosed) }()
		select {
		case <-closed:
			goleak.VerifyNone(t, before)
		case <-time.After(10 * time.Second):
			t.Error("close hangs")
		}
	})
	return ep, conn
}

// Work that is marked while the connection is lost and found again is done, each time: a session waits for the
// connection and is queued at the same time, and neither must throw the queue into disorder.
func TestOutboxServesAllAfterReconnects(t *testing.T) {
	const sessions = 50
	rounds := 3000
	if testing.Short() || race.Enabled {
		rounds = 300
	}
	ep, conn := newFlakyEndpoint(t)
	all := make([]*session, sessions)
	for i := range all {
		s := &session{ep: ep, role: lifecycle.Consumer, sender: newSender(true)}
		s.bucket.init(initialPackets, initialWindow)
		if err := ep.register(s, s.controlToken()); err != nil {
			t.Fatal(err)
		}
		s.out.peer = s.reply // before the first mark, so the outbox does not own it yet
		all[i] = s
	}
	for round := range rounds {
		var group sync.WaitGroup
		for k := range 2 {
			group.Go(func() {
				for i := range 10 * sessions {
					all[(i*7+k)%sessions].mark(workCredit)
					if i%16 == 0 {
						runtime.Gosched()
					}
				}
			})
		}
		conn.Set(nats.RECONNECTING)
		runtime.Gosched()
		conn.Set(nats.CONNECTED)
		group.Wait()
		before := make([]int64, sessions)
		for i, s := range all {
			before[i] = conn.count(s.out.peer)
			s.mark(workCredit)
		}
		end := time.Now().Add(5 * time.Second)
		for i, s := range all {
			for conn.count(s.out.peer) == before[i] {
				if time.Now().After(end) {
					t.Fatalf("round %d: the outbox has forgotten session %d", round, i)
				}
				time.Sleep(10 * time.Microsecond)
			}
		}
	}
	// Once all is done nothing is published.
	var last int64
	for quiet := 0; quiet < 3; {
		time.Sleep(time.Millisecond)
		var sum int64
		for _, s := range all {
			sum += conn.count(s.out.peer)
		}
		if quiet++; sum != last {
			last, quiet = sum, 0
		}
	}
}

// A session that the outbox has served refers to no other: through one idle stream all that were ever queued behind
// it would stay in memory.
func TestOutboxForgetsWhatItServed(t *testing.T) {
	ep, conn := newFlakyEndpoint(t)
	conn.Set(nats.RECONNECTING)
	var all []*session
	for range 20 {
		s := &session{ep: ep, role: lifecycle.Consumer, sender: newSender(true)}
		s.bucket.init(initialPackets, initialWindow)
		if err := ep.register(s, s.controlToken()); err != nil {
			t.Fatal(err)
		}
		s.out.peer = s.reply
		all = append(all, s)
	}
	// The outbox is busy with none of them while they are queued, so they are taken together.
	ep.outbox.queue.Store(nil)
	for _, s := range all {
		s.pending.Store(workCredit)
		ep.outbox.push(s)
	}
	conn.Set(nats.CONNECTED)
	ep.outbox.park.Wake()
	end := time.Now().Add(5 * time.Second)
	for _, s := range all {
		for conn.count(s.out.peer) == 0 {
			if time.Now().After(end) {
				t.Fatal("not served")
			}
			time.Sleep(time.Millisecond)
		}
	}
	ep.close(testClosed) // the outbox has ended: what follows is no race
	for i, s := range all {
		if s.next != nil {
			t.Errorf("session %d still refers to the one that was queued behind it", i)
			return
		}
	}
}
