package stream

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/race"
)

// Sessions are found by the subject that they write to, however they came, moved and went. A slow list is the oracle.
func TestPeersFindSessions(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var p peers
	p.init()
	var all []*session
	subject := func() string { return fmt.Sprint("peer.", r.IntN(20)) }
	for range 20_000 {
		switch {
		case len(all) < 10 || len(all) < 100 && r.IntN(3) == 0:
			s := &session{out: outboxState{peer: subject()}}
			if r.IntN(2) == 0 { // a consumer's, which has not heard from its producer
				s.out.peer, s.out.subject, s.stream = "", subject(), new(Stream)
			}
			p.add(s)
			all = append(all, s)
		case r.IntN(3) == 0:
			i := r.IntN(len(all))
			p.remove(all[i])
			p.remove(all[i]) // does nothing
			all = slices.Delete(all, i, i+1)
		case r.IntN(10) == 0:
			gone := subject()
			var got, want []*session
			p.take(gone, func(s *session) { got = append(got, s) })
			all = slices.DeleteFunc(all, func(s *session) bool {
				if s.target() != gone {
					return false
				}
				want = append(want, s)
				return true
			})
			for _, s := range want {
				if !slices.Contains(got, s) {
					t.Fatalf("a session that writes to %s was not found", gone)
				}
			}
			if len(got) != len(want) {
				t.Fatalf("%d sessions write to %s, want %d", len(got), gone, len(want))
			}
		default:
			p.move(all[r.IntN(len(all))], subject())
		}
	}
	for _, s := range all {
		p.remove(s)
	}
	if len(p.first) != 0 || len(p.more) != 0 {
		t.Errorf("%d and %d subjects are listed and have no session", len(p.first), len(p.more))
	}
	s := &session{out: outboxState{peer: "a"}} // finished: it changes its peer and is not listed again
	p.move(s, "b")
	if s.out.peer != "b" || len(p.first) != 0 {
		t.Errorf("peer %s, %d subjects listed", s.out.peer, len(p.first))
	}
}

// A refused publish looks at the streams that write to its subject, and at no others: their number does not count.
func TestRefusalTouchesOnlyItsStreams(t *testing.T) {
	var p peers
	p.init()
	for i := range 10_000 {
		p.add(&session{out: outboxState{peer: fmt.Sprint("peer.", i)}})
	}
	if len(p.more) != 0 {
		t.Fatalf("%d subjects have the hash of another", len(p.more)) // one in 10^11 runs
	}
	refused := func() {
		p.take("nobody", func(*session) { t.Error("a session was found that writes elsewhere") })
	}
	if n := testing.AllocsPerRun(1000, refused); n != 0 && !race.Enabled {
		t.Errorf("%v allocations", n)
	}
	found := 0
	for i := range 10_000 {
		p.take(fmt.Sprint("peer.", i), func(*session) { found++ })
	}
	if found != 10_000 {
		t.Errorf("%d sessions were found of 10,000", found)
	}
}

// Streams do not wait for all refused requests and refused publishes that are there: the outbox does a few of them, and then
// serves the streams that have something to send.
func TestRefusalsTakeTurnsWithStreams(t *testing.T) {
	const streams, refusals = 5, 3000
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		begin := make(chan struct{})
		m.handle(t, "svc", func(w *Writer, _ *Request) error {
			if _, err := w.Write(nil); err != nil {
				return err
			}
			<-begin
			_, err := w.Write([]byte("record"))
			return err
		})
		var open []*Stream
		for range streams {
			open = append(open, m.open(t, "svc"))
		}
		synctest.Wait()
		// Everything gathers while the outbox is held in a publish.
		hold, order := make(chan struct{}), ""
		o := &m.server.ep.outbox
		m.back.Published = func(subject, _ string, data []byte) error {
			switch {
			case subject == "first":
				<-hold
			case subject == "refused":
				order += "r"
			case isSequenced(data):
				order += "S"
			}
			return nil
		}
		o.doLater(outOfStream{subject: "first", refuse: &CloseError{Code: CloseTryAgainLater}})
		synctest.Wait()
		for range refusals {
			o.doLater(outOfStream{subject: "refused", refuse: &CloseError{Code: CloseTryAgainLater}})
			o.doLater(outOfStream{subject: "denied", denied: errors.New("denied")})
		}
		close(begin)
		synctest.Wait()
		close(hold)
		synctest.Wait()
		first, last := strings.IndexByte(order, 'S'), strings.LastIndexByte(order, 'S')
		if first < 0 || len(order) < refusals+streams {
			t.Fatalf("%d messages, the first packet is number %d", len(order), first)
		}
		if last > 2*(outOfStreamTurn+streams) {
			t.Errorf("the last packet was number %d of %d messages, want it among the first", last, len(order))
		}
		for _, s := range open {
			for _, err := range s.All() {
				if err != nil {
					t.Fatal(err)
				}
			}
		}
		m.nothingLeft(t)
	})
}

// What waits to be refused is bounded by number and by bytes.
func TestRefusalsAreBounded(t *testing.T) {
	for name, subject := range map[string]string{
		"short": "a", "long": string(make([]byte, 4000)),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.back.Set(nats.RECONNECTING)
				synctest.Wait()
				o := &m.server.ep.outbox
				const asked = 2 * maxOutOfStream
				for range asked {
					o.doLater(outOfStream{subject: subject, refuse: &CloseError{Code: CloseTryAgainLater}})
				}
				kept := len(o.outOfStream)
				if kept > maxOutOfStream || kept*len(subject) > maxOutOfStreamBytes || kept < min(maxOutOfStream, maxOutOfStreamBytes/len(subject)) {
					t.Errorf("%d refusals of %d bytes each wait", kept, len(subject))
				}
				if n := m.server.Stats().DroppedControl; n != uint64(asked-kept) {
					t.Errorf("%d were counted as dropped, want %d", n, asked-kept)
				}
				m.back.Set(nats.CONNECTED)
				synctest.Wait()
				if o.outOfStreamBytes != 0 || len(o.outOfStream) != 0 {
					t.Errorf("%d refusals, %d bytes wait when all are done", len(o.outOfStream), o.outOfStreamBytes)
				}
			})
		})
	}
}
