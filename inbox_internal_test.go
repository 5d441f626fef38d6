package stream

import (
	"errors"
	"io"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn/fake"
)

// refusing makes conn refuse its inbox, and other subscriptions, with what the returned pointer holds.
func refusing(conn *fake.Conn) *atomic.Pointer[error] {
	var why atomic.Pointer[error]
	conn.Refuse = func(subject, _ string) error {
		if e := why.Load(); e != nil {
			if *e == nil {
				return fake.SubscriptionDenied(subject)
			}
			return *e
		}
		return nil
	}
	return &why
}

// While its inbox is refused a client opens nothing, for the reason that NATS gave, and not long after the refusal ends it works
// again. It asks ever more rarely.
func TestRefusedInboxRecovers(t *testing.T) {
	var denied error // a permission, which is new each time
	crowded := nats.ErrMaxSubscriptionsExceeded
	for name, reason := range map[string]*error{"permission": &denied, "max_subscriptions": &crowded} {
		for _, outage := range []time.Duration{10 * time.Millisecond, time.Second, time.Minute, time.Hour} {
			t.Run(name+" "+outage.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := memoryTest(t, ClientParams{})
					m.handle(t, "x", func(w *Writer, r *Request) error { return nil })
					conn := m.bus.Connect("other")
					why := refusing(conn)
					var tries atomic.Int64
					refuse := conn.Refuse
					conn.Refuse = func(subject, queue string) error { tries.Add(1); return refuse(subject, queue) }
					why.Store(reason)
					c := fakeClient(t, conn, ClientParams{})
					time.Sleep(time.Second) // a refusal that names no subject takes a while to find out
					synctest.Wait()
					start := time.Now()
					want := nats.ErrPermissionViolation
					if *reason != nil {
						want = *reason
					}
					for range 10 {
						if _, err := c.Open(t.Context(), "x", nil); !errors.Is(err, want) {
							t.Fatalf("Open: %v, want %v", err, want)
						}
						if _, err := c.NewWriter(consumerSubject(5)).Write(nil); !errors.Is(err, want) {
							t.Fatalf("Write: %v, want %v", err, want)
						}
						time.Sleep(outage / 10)
					}
					select {
					case <-c.Done():
						t.Error("the client counts as done")
					default:
					}
					why.Store(nil)
					for c.ep.inbox.refused.Load() != nil {
						time.Sleep(time.Millisecond)
					}
					if late := time.Since(start) - outage; late > min(max((outage+time.Second)/4, minRenewal), maxRenewal)+time.Second {
						t.Errorf("it took %v to notice after %v", late, outage)
					}
					if n, most := tries.Load(), 60+int64(outage/maxRenewal); n > most {
						t.Errorf("%d tries in %v", n, outage)
					}
					st, err := c.Open(t.Context(), "x", nil)
					if err != nil {
						t.Fatal(err)
					}
					if _, err := st.Recv(); err != io.EOF {
						t.Error(err)
					}
				})
			})
		}
	}
}

// A refusal that names no subject ends nothing, if the inbox is heard after all: the server refused another subscription.
func TestAnotherSubscriptionRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, delay := range []time.Duration{0, 10 * time.Millisecond, 2 * time.Second} { // more than AckTimeout
			m := memoryTest(t, ClientParams{PeerTimeout: time.Minute}) // a round trip may take four seconds
			m.bus.Delay = delay
			m.handle(t, "echo", func(w *Writer, r *Request) error {
				_, err := io.Copy(w, r)
				return err
			})
			st := m.open(t, "echo")
			before := m.client.Stats().DroppedUnknown
			m.conn.Report(nats.ErrMaxSubscriptionsExceeded)
			time.Sleep(10 * time.Second)
			if n := m.client.Stats().DroppedUnknown - before; n != 0 || m.client.ep.inbox.arrived.Load() == 0 {
				t.Errorf("%d messages are counted as strange, probe %d has arrived", n, m.client.ep.inbox.arrived.Load())
			}
			for range 5 {
				m.conn.Report(nats.ErrMaxSubscriptionsExceeded)
				m.back.Report(nats.ErrMaxSubscriptionsExceeded)
				if _, err := st.Write([]byte("x")); err != nil {
					t.Fatal(delay, err)
				}
				if rec, err := st.Recv(); string(rec) != "x" || err != nil {
					t.Fatal(delay, string(rec), err)
				}
				if st, err := m.client.Open(t.Context(), "echo", nil); err != nil {
					t.Error(err)
				} else {
					_ = st.Close()
				}
			}
			if err := st.CloseSend(); err != nil {
				t.Error(err)
			}
			if _, err := st.Recv(); err != io.EOF {
				t.Error(delay, err)
			}
		}
	})
}

// An end that may not publish to its own inbox cannot find out whether it is heard. It goes on.
func TestProbeNotPermitted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "x", func(w *Writer, r *Request) error { return nil })
		conn := m.bus.Connect("restricted")
		c := fakeClient(t, conn, ClientParams{})
		m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
			if from == conn && msg.Subject == c.ep.prefix+probeToken {
				go conn.DenyPublish(msg.Subject)
				return false
			}
			return true
		})
		for range 3 {
			conn.Report(nats.ErrMaxSubscriptionsExceeded)
			time.Sleep(time.Second)
			st, err := c.Open(t.Context(), "x", nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := st.Recv(); err != io.EOF {
				t.Error(err)
			}
		}
	})
}

// The report of a refusal that the watcher has seen already comes late, when the inbox is heard again. It ends nothing.
func TestLateReportOfARefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "x", func(w *Writer, r *Request) error { <-r.Context().Done(); return nil })
		why := refusing(m.conn)
		why.Store(new(error))
		m.conn.DenySubscribe(m.client.ep.prefix + "*")
		time.Sleep(time.Second)
		if _, err := m.client.Open(t.Context(), "x", nil); !errors.Is(err, nats.ErrPermissionViolation) {
			t.Fatal(err)
		}
		last := m.conn.LastError()
		why.Store(nil)
		time.Sleep(time.Second)
		st := m.open(t, "x")
		m.conn.Report(last)
		time.Sleep(time.Second)
		if e := st.session.end.Load(); e != nil {
			t.Error(e.err)
		}
	})
}

// A writer that has published nothing has no subject by which the mux finds it. It ends with the inbox all the same.
func TestRefusedInboxEndsIdleWriters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		w := m.client.NewWriter(consumerSubject(5))
		synctest.Wait()
		why := refusing(m.conn)
		why.Store(new(error))
		m.conn.DenySubscribe(m.client.ep.prefix + "*")
		<-w.Context().Done()
		if _, err := w.Write(nil); !errors.Is(err, nats.ErrPermissionViolation) {
			t.Error(err)
		}
		why.Store(nil)
		time.Sleep(time.Second)
		if _, err := m.client.NewWriter(consumerSubject(5)).Write(nil); err != nil {
			t.Error(err)
		}
	})
}
