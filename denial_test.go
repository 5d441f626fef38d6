package stream

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/jsonwire"
)

func TestAttribute(t *testing.T) {
	for name, c := range map[string]struct {
		requests  []waiting
		subject   string
		ok        bool
		undecided bool
	}{
		"nothing waits":         {},
		"the only one":          {requests: []waiting{{"a", 100}}, subject: "a", ok: true},
		"in the same moment":    {requests: []waiting{{"a", 100}}, subject: "a", ok: true},
		"several to a subject":  {requests: []waiting{{"a", 70}, {"a", 100}, {"a", 60}}, subject: "a", ok: true},
		"published later":       {requests: []waiting{{"a", 101}}},
		"published long before": {requests: []waiting{{"a", 49}}},
		"at the edge":           {requests: []waiting{{"a", 50}}, subject: "a", ok: true},
		"others too early, or late": {
			requests: []waiting{{"b", 49}, {"a", 100}, {"c", 101}}, subject: "a", ok: true},
		"two subjects": {requests: []waiting{{"a", 90}, {"b", 100}}, undecided: true},
	} {
		if subject, ok, undecided := attribute(c.requests, 100, 50); subject != c.subject && ok || ok != c.ok || undecided != c.undecided {
			t.Errorf("%s: %q, %v, %v", name, subject, ok, undecided)
		}
	}
}

// What is remembered of requests and refusals is bounded.
func TestDenialsAreBounded(t *testing.T) {
	var d denials
	for i := range 10 * maxRequested {
		d.publishes(fmt.Sprint(i), int64(i), 10)
		d.add(fmt.Sprint("x", i), nil, int64(i), 10)
		d.add("same", nil, int64(i), 10)
	}
	if len(d.requested) > maxRequested || len(d.pending) > maxDenials {
		t.Errorf("%d requests and %d refusals are kept", len(d.requested), len(d.pending))
	}
}

// A refusal that names a subject no stream publishes to ends the one stream that it can be about, and no other.
func TestRefusalOfAMappedSubject(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "echo", func(w *Writer, r *Request) error {
			_, err := io.Copy(w, r)
			return err
		})
		listen := func(subject string, f nats.MsgHandler) {
			stop, err := m.back.Subscribe(subject, "", f)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(stop)
		}
		slow := make(chan string, 10)
		listen("slow", func(m *nats.Msg) { slow <- m.Reply }) // a producer that answers when the test says so
		listen("lost", func(*nats.Msg) {})                    // its request is refused
		bound := m.open(t, "echo")
		exchange := func() {
			t.Helper()
			if _, err := bound.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if rec, err := bound.Recv(); string(rec) != "x" || err != nil {
				t.Fatal(string(rec), err)
			}
		}
		exchange()
		ended := func(s *Stream) bool { return s.session.end.Load() != nil }

		// Alone, it is found out.
		lost := m.open(t, "lost")
		synctest.Wait()
		m.conn.DenyPublish("mapped")
		_, err := lost.Recv()
		if !errors.Is(err, nats.ErrPermissionViolation) || !strings.Contains(err.Error(), "mapped") || !strings.Contains(err.Error(), "lost") {
			t.Errorf("%v", err)
		}
		exchange()

		// Beside another that waits too, it is found out when that has been answered.
		waits := m.open(t, "slow")
		lost = m.open(t, "lost")
		synctest.Wait()
		m.conn.DenyPublish("mapped")
		time.Sleep(10 * time.Second)
		if ended(waits) || ended(lost) {
			t.Error("a stream ended that may be healthy")
		}
		reply := <-slow
		if err := m.back.Publish(reply, "", jsonwire.AppendData(nil, []byte("late"))); err != nil {
			t.Fatal(err)
		}
		if rec, err := waits.Recv(); string(rec) != "late" || err != nil {
			t.Errorf("%q, %v", rec, err)
		}
		if _, err := lost.Recv(); !errors.Is(err, nats.ErrPermissionViolation) {
			t.Errorf("%v", err)
		}
		_ = waits.Close()
		exchange()

		// Requests from long before, or after it, and subjects of streams that have ended, are not meant.
		waits = m.open(t, "slow")
		time.Sleep(denialWindow*m.times.AckTimeout + time.Second)
		m.conn.DenyPublish("mapped")
		time.Sleep(time.Second)
		m.conn.DenyPublish("mapped")
		time.Sleep(time.Millisecond)
		after := m.open(t, "slow")
		over := m.open(t, "lost")
		synctest.Wait()
		_ = over.Close()
		m.conn.DenyPublish("lost")
		m.conn.DenyPublish(over.session.reply)
		time.Sleep(10 * time.Second)
		if ended(waits) || ended(after) {
			t.Error("a stream ended that a refusal was not about")
		}
		_, _ = waits.Close(), after.Close()
		exchange()
	})
}
