package stream

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/natsstream/stream/internal/race"
)

// flakyTransport is a connection that is lost and found as often as a test likes. It counts what is published to each
// subject.
type flakyTransport struct {
	state     atomic.Int32 // a nats.Status
	changes   chan nats.Status
	published sync.Map // subject -> *atomic.Int64
}

func newFlakyTransport() *flakyTransport {
	t := &flakyTransport{changes: make(chan nats.Status, 1)}
	t.state.Store(int32(nats.CONNECTED))
	return t
}

func (t *flakyTransport) set(s nats.Status) {
	t.state.Store(int32(s))
	t.changes <- s
}

func (t *flakyTransport) publish(subject, _ string, _ []byte) error {
	n, _ := t.published.LoadOrStore(subject, new(atomic.Int64))
	n.(*atomic.Int64).Add(1)
	return nil
}

func (t *flakyTransport) count(subject string) int64 {
	n, ok := t.published.Load(subject)
	if !ok {
		return 0
	}
	return n.(*atomic.Int64).Load()
}

func (t *flakyTransport) publishMsg(m *nats.Msg) error { return t.publish(m.Subject, m.Reply, m.Data) }
func (t *flakyTransport) status() nats.Status          { return nats.Status(t.state.Load()) }
func (t *flakyTransport) maxPayload() int64            { return 1 << 20 }

func (t *flakyTransport) subscribe(_, _ string, _ nats.MsgHandler) (func(), error) {
	return func() {}, nil
}

func (t *flakyTransport) statusChanges() (<-chan nats.Status, func()) {
	return t.changes, func() { close(t.changes) }
}

func newFlakyEndpoint(t *testing.T) (*endpoint, *flakyTransport) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	params, err := ClientParams{}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	conn := newFlakyTransport()
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
		s := &session{ep: ep, sender: newSender(false)}
		s.bucket.init(initialPackets, initialWindow)
		if err := ep.register(s, s.controlToken()); err != nil {
			t.Fatal(err)
		}
		s.peer = s.reply // before the first mark, so the outbox does not own it yet
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
		conn.set(nats.RECONNECTING)
		runtime.Gosched()
		conn.set(nats.CONNECTED)
		group.Wait()
		before := make([]int64, sessions)
		for i, s := range all {
			before[i] = conn.count(s.peer)
			s.mark(workCredit)
		}
		end := time.Now().Add(5 * time.Second)
		for i, s := range all {
			for conn.count(s.peer) == before[i] {
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
			sum += conn.count(s.peer)
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
	conn.set(nats.RECONNECTING)
	var all []*session
	for range 20 {
		s := &session{ep: ep, sender: newSender(false)}
		s.bucket.init(initialPackets, initialWindow)
		if err := ep.register(s, s.controlToken()); err != nil {
			t.Fatal(err)
		}
		s.peer = s.reply
		all = append(all, s)
	}
	// The outbox is busy with none of them while they are queued, so they are taken together.
	ep.outbox.queue.Store(nil)
	for _, s := range all {
		s.pending.Store(workCredit)
		ep.outbox.push(s)
	}
	conn.set(nats.CONNECTED)
	ep.outbox.park.Wake()
	end := time.Now().Add(5 * time.Second)
	for _, s := range all {
		for conn.count(s.peer) == 0 {
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

func (t *flakyTransport) errors(func(error)) func() { return func() {} }
