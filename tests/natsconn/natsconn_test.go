package natsconn_test

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"weak"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/fastconn"
	"github.com/natsstream/stream/internal/natsconn"
	"github.com/natsstream/stream/internal/slab"
	"github.com/natsstream/stream/streamtest"
)

// patience bounds each wait of a test.
const patience = 20 * time.Second

func receive[T any](t *testing.T, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(patience):
		t.Fatalf("waited in vain for %s", what)
		panic("unreachable")
	}
}

func TestDenied(t *testing.T) {
	violation := func(text string) error { return fmt.Errorf("%w: %s", nats.ErrPermissionViolation, text) }
	for name, c := range map[string]struct {
		err  error
		want natsconn.Denial
		ok   bool
	}{
		"publish":         {err: violation(`Permissions Violation for Publish to "a.b"`), want: natsconn.Denial{Subject: "a.b"}, ok: true},
		"subscribe":       {err: violation(`Permissions Violation for Subscription to "a.*"`), want: natsconn.Denial{Subject: "a.*", Subscribe: true}, ok: true},
		"queue":           {err: violation(`Permissions Violation for Subscription to "a" using queue "q\"1"`), want: natsconn.Denial{Subject: "a", Queue: `q"1`, Subscribe: true}, ok: true},
		"reload":          {err: violation(`Permissions Violation for Subscription to "a" (sid "3")`), want: natsconn.Denial{Subject: "a", Subscribe: true}, ok: true},
		"reload of queue": {err: violation(`Permissions Violation for Subscription to "a" using queue "q" (sid "3")`), want: natsconn.Denial{Subject: "a", Queue: "q", Subscribe: true}, ok: true},
		"quoted":          {err: violation(`Permissions Violation for Publish to "a\"\\b"`), want: natsconn.Denial{Subject: `a"\b`}, ok: true},
		"named like one":  {err: violation(`Permissions Violation for Publish to "for subscription"`), want: natsconn.Denial{Subject: "for subscription"}, ok: true},
		"reply":           {err: violation(`Permissions Violation for Publish with Reply of "r"`), want: natsconn.Denial{Subject: "r"}, ok: true},
		"no subject":      {err: violation("Permissions Violation")},
		"no end of quote": {err: violation(`Permissions Violation for Publish to "a`)},
		"another error":   {err: errors.New(`Permissions Violation for Publish to "a"`)},
		"none":            {},
	} {
		if got, ok := natsconn.Denied(c.err); ok != c.ok || ok && got != c.want {
			t.Errorf("%s: %+v, %v", name, got, ok)
		}
	}
}

// A subject that is too long is refused before the NATS server closes the connection over it.
func TestSubjectsAreMeasured(t *testing.T) {
	srv := streamtest.Run(t)
	nc := srv.Connect(t)
	conn := natsconn.New(nc)
	half := strings.Repeat("x", 2032)
	for name, c := range map[string]struct {
		subject, reply string
		bad            bool
	}{
		"at the limit":       {half, half, false},
		"with a reply":       {half, half + "x", true},
		"without a reply":    {half + half + "x", "", true},
		"short":              {"a", "b", false},
		"short, and no more": {"a", "", false},
	} {
		if err := conn.Publish(c.subject, c.reply, []byte("data")); errors.Is(err, nats.ErrBadSubject) != c.bad || !c.bad && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := nc.FlushTimeout(patience); err != nil {
		t.Error(err)
	}
}

// Errors reach each endpoint and the user's own handler, which is the connection's again after the last stop.
func TestErrorHandlersAreChained(t *testing.T) {
	srv := streamtest.Run(t, streamtest.WithConfig(`authorization { users: [ { user: u, password: x, permissions: { publish: "ok" } } ] }`))
	heard := make(chan string, 10)
	note := func(name string) func(error) {
		return func(err error) {
			if d, ok := natsconn.Denied(err); ok {
				heard <- name + " " + d.Subject
			}
		}
	}
	user := note("user")
	nc := srv.Connect(t, nats.UserInfo("u", "x"), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { user(err) }))
	publish := func(subject string, want ...string) {
		t.Helper()
		if err := nc.Publish(subject, nil); err != nil {
			t.Fatal(err)
		}
		got := make(map[string]bool)
		for range want {
			got[receive(t, "a denial of "+subject, heard)] = true
		}
		for _, w := range want {
			if !got[w+" "+subject] {
				t.Errorf("%s did not hear of %s: %v", w, subject, got)
			}
		}
	}
	stopA, stopB := natsconn.New(nc).OnError(note("a")), natsconn.New(nc).OnError(note("b"))
	publish("one", "a", "b", "user")
	stopA()
	publish("two", "b", "user")
	stopB()
	publish("three", "user")
	stopA = natsconn.New(nc).OnError(note("a"))
	other := note("other")
	nc.SetErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { other(err) })
	stopA() // leaves alone the handler that the user has set meanwhile
	publish("four", "other")
	if len(heard) != 0 {
		t.Errorf("heard beside: %s", <-heard)
	}
}

// Unsubscribe returns when the handler has had everything that was sent before.
func TestUnsubscribeLetsNothingGetLost(t *testing.T) {
	srv := streamtest.Run(t)
	nc := srv.Connect(t)
	conn := natsconn.New(nc)
	const n = 1000
	var got atomic.Int64
	unsubscribe, err := conn.Subscribe("a.*", "", func(*nats.Msg) { got.Add(1) })
	if err != nil {
		t.Fatal(err)
	}
	for range n {
		if err := conn.Publish("a.b", "", nil); err != nil {
			t.Fatal(err)
		}
	}
	unsubscribe()
	if got.Load() != n {
		t.Errorf("%d of %d", got.Load(), n)
	}
	unsubscribe() // again does nothing
}

// A change of status arrives; after stop, none does, and the channel is closed.
func TestStatusChanges(t *testing.T) {
	srv := streamtest.Run(t)
	nc := srv.Connect(t)
	conn := natsconn.New(nc)
	changes, stop := conn.StatusChanges()
	var wait sync.WaitGroup
	closed := make(chan struct{})
	wait.Go(func() {
		for s := range changes {
			if s == nats.CLOSED {
				close(closed)
			}
		}
	})
	if conn.Status() != nats.CONNECTED || conn.MaxPayload() != nc.MaxPayload() {
		t.Error(conn.Status(), conn.MaxPayload())
	}
	nc.Close()
	receive(t, "the end of the connection", closed)
	stop()
	wait.Wait()
}

// A message is sent at once only over a connection that has carried a packet: only then nats.go was asked how much the
// server takes. After a reconnect to a server that takes less, a larger message would close the connection for good.
func TestMessagesAreSentAtOnceOverProvenConnections(t *testing.T) {
	large, small := streamtest.Run(t), streamtest.Run(t, streamtest.WithMaxPayload(1000))
	nc, err := nats.Connect(large.URL()+","+small.URL(), nats.DontRandomize(), nats.MaxReconnects(-1), nats.ReconnectWait(time.Millisecond), fastconn.Enable())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	conn := natsconn.New(nc)
	got := make(chan int, 10)
	inbox, err := conn.SubscribeInbox("inbox.*", func(m *nats.Msg, lent *slab.Slab) {
		got <- len(m.Data)
		lent.Release()
	})
	if err != nil {
		t.Fatal(err)
	}
	defer inbox.Unsubscribe()
	packet := func(n int) []byte { return append([]byte{0xF5}, make([]byte, n-1)...) }
	prove := func(n int) {
		t.Helper()
		if conn.TakesNow() {
			t.Error("a connection that has carried no packet takes one at once")
		}
		if sent, _ := conn.PublishNow("inbox.a", packet(n)); sent {
			t.Error("a packet was sent over a connection that has carried none")
		}
		if err := conn.Publish("inbox.a", "", packet(n)); err != nil {
			t.Fatal(err)
		}
		conn.Push()
		if size := receive(t, "a packet", got); size != n {
			t.Errorf("%d bytes arrived, want %d", size, n)
		}
		if !conn.TakesNow() {
			t.Fatal("a connection that has carried a packet takes none at once")
		}
		if sent, rest := conn.PublishNow("inbox.a", packet(n+1)); !sent || rest {
			t.Errorf("sent %v, rest %v", sent, rest)
		}
		if size := receive(t, "a packet that was sent at once", got); size != n+1 {
			t.Errorf("%d bytes arrived, want %d", size, n+1)
		}
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	prove(2000)
	for nc.ConnectedUrl() != small.URL() {
		if err := nc.ForceReconnect(); err != nil {
			t.Fatal(err)
		}
		for end := time.Now().Add(patience); !nc.IsConnected(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("no reconnect")
			}
		}
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	prove(500)
	if sent, _ := conn.PublishNow("inbox.a", packet(1001)); sent {
		t.Error("a packet was sent that is larger than the server takes")
	}
}

// fastConn returns a fast connection.
func fastConn(t *testing.T, srv *streamtest.Server) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect(srv.URL(), nats.MaxReconnects(-1), nats.ReconnectWait(time.Millisecond), fastconn.Enable())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// reconnect returns when nc has another connection to its server.
func reconnect(t *testing.T, nc *nats.Conn) {
	t.Helper()
	before := nc.Stats().Reconnects
	if err := nc.ForceReconnect(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(patience); nc.Stats().Reconnects == before || !nc.IsConnected(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no reconnect")
		}
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
}

func subscribeInbox(t *testing.T, conn natsconn.Conn, subject string) natsconn.Inbox {
	t.Helper()
	inbox, err := conn.SubscribeInbox(subject, func(_ *nats.Msg, lent *slab.Slab) { lent.Release() })
	if err != nil {
		t.Fatal(err)
	}
	return inbox
}

// Requests are taken past nats.go, no matter when they are registered, from when an inbox of the same connection of
// nats.go is subscribed.
func TestRequestsAreTakenFromTheFirstInboxOn(t *testing.T) {
	srv := streamtest.Run(t)
	nc := fastConn(t, srv)
	taken := make(chan bool, 10)
	var ends []func()
	serve := func(conn natsconn.Conn, subject string) {
		t.Helper()
		end, err := natsconn.SubscribeRequests(conn, subject, "", func(m *nats.Msg, header []byte) { taken <- header != nil })
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, end)
	}
	ask := func(subjects ...string) {
		t.Helper()
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
		for _, subject := range subjects {
			if err := nc.PublishMsg(&nats.Msg{Subject: subject, Header: nats.Header{"A": {"1"}}}); err != nil {
				t.Fatal(err)
			}
			if !receive(t, subject, taken) {
				t.Errorf("nats.go delivered the request to %s", subject)
			}
		}
	}
	for range 2 { // an endpoint after the last has ended
		a, b := natsconn.New(nc), natsconn.New(nc)
		serve(a, "before") // nats.go has not sent anything
		first := subscribeInbox(t, a, "a.*")
		serve(a, "behind")
		ask("before", "behind")
		serve(a, "later")
		second := subscribeInbox(t, b, "b.*")
		serve(b, "other")
		ask("before", "behind", "later", "other")
		reconnect(t, nc)
		ask("before", "behind", "later", "other")
		first.Unsubscribe()
		ends = append(ends, first.Unsubscribe, second.Unsubscribe)
		serve(b, "last")
		ask("last", "other")
		for _, end := range ends {
			end()
		}
		ends = nil
	}
}

// The cost of a subscription does not depend on the number of others.
func TestManySubscriptionsForRequestsCostTheSameEach(t *testing.T) {
	srv := streamtest.Run(t)
	nc := fastConn(t, srv)
	conn := natsconn.New(nc)
	subscribeInbox(t, conn, "inbox.*")
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	const rounds, each = 8, 250
	var allocated [rounds]uint64
	for round := range rounds {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for i := range each {
			if _, err := natsconn.SubscribeRequests(conn, fmt.Sprintf("svc.%d.%d", round, i), "", func(*nats.Msg, []byte) {}); err != nil {
				t.Fatal(err)
			}
		}
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		allocated[round] = after.TotalAlloc - before.TotalAlloc
	}
	if first, last := allocated[0], allocated[rounds-1]; last > 3*first {
		t.Errorf("%d bytes for the first %d subscriptions, %d for the last", first, each, last)
	}
}

// A connection that lives on keeps neither the handlers of ended subscriptions nor a message that was handled.
func TestConnectionsKeepNothingOfEndedSubscriptions(t *testing.T) {
	srv := streamtest.Run(t)
	nc := fastConn(t, srv)
	conn := natsconn.New(nc)
	stays := subscribeInbox(t, conn, "stays.*")
	defer stays.Unsubscribe()
	for _, again := range []bool{false, true} {
		var handler, data atomic.Pointer[weak.Pointer[byte]]
		got := make(chan struct{}, 10)
		serve := func() (end func()) {
			state := make([]byte, 100_000)
			held := weak.Make(&state[0])
			handler.Store(&held)
			inbox, err := conn.SubscribeInbox("ends.*", func(_ *nats.Msg, lent *slab.Slab) {
				got <- struct{}{}
				lent.Release()
				runtime.KeepAlive(state)
			})
			if err != nil {
				t.Fatal(err)
			}
			unsubscribe, err := natsconn.SubscribeRequests(conn, "svc", "", func(m *nats.Msg, _ []byte) {
				p := weak.Make(&m.Data[0])
				data.Store(&p)
				got <- struct{}{}
				runtime.KeepAlive(state)
			})
			if err != nil {
				t.Fatal(err)
			}
			return func() { unsubscribe(); inbox.Unsubscribe() }
		}
		end := serve()
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
		for _, subject := range []string{"ends.a", "svc"} {
			if err := conn.Publish(subject, "", append([]byte{0xF5}, make([]byte, 50_000)...)); err != nil {
				t.Fatal(err)
			}
			conn.Push()
			receive(t, "a message", got)
		}
		collected(t, "the data of a request", data.Load())
		if again {
			reconnect(t, nc)
		}
		end()
		collected(t, "a handler", handler.Load())
	}
}

func collected(t *testing.T, what string, p *weak.Pointer[byte]) {
	t.Helper()
	for end := time.Now().Add(patience); p.Value() != nil; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s is kept", what)
		}
		runtime.GC()
	}
}
