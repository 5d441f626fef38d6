package fake

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn"
)

var _ natsconn.Conn = (*Conn)(nil)

// The bus routes as a NATS server does.
func TestBus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bus := new(Bus)
		a, b := bus.Connect("a"), bus.Connect("b")
		var (
			mu  sync.Mutex
			got []string
		)
		listen := func(c *Conn, subject, queue string) func() {
			stop, err := c.Subscribe(subject, queue, func(m *nats.Msg) {
				mu.Lock()
				defer mu.Unlock()
				got = append(got, c.Name+" "+m.Subject+" "+m.Header.Get("Status")+string(m.Data))
			})
			if err != nil {
				t.Fatal(err)
			}
			return stop
		}
		expect := func(want ...string) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
			got = nil
		}
		defer listen(a, "in.*", "")()
		defer listen(b, "x", "")()
		stopA, stopB := listen(a, "q", "group"), listen(b, "q", "group")

		data := []byte("1")
		a.Publish("x", "", data)
		data[0] = '2' // published is copied
		expect("b x 1")
		b.Publish("in.1", "", []byte("1"))
		b.Publish("in.1.2", "", []byte("1"))
		b.Publish("in.", "", []byte("1"))
		expect("a in.1 1")
		a.Publish("q", "", []byte("1"))
		a.Publish("q", "", []byte("2"))
		synctest.Wait()
		if len(got) != 2 || got[0][0] == got[1][0] {
			t.Errorf("queue group got %q", got)
		}
		got = nil
		stopA()
		a.Publish("q", "in.7", nil)
		expect("b q ")
		stopB()
		a.Publish("q", "in.7", nil)
		b.Publish("q", "in.7", nil) // not b's to hear
		expect("a in.7 503")
		b.Set(nats.RECONNECTING)
		a.Publish("x", "in.8", nil)
		b.Publish("in.1", "", nil)
		expect("a in.8 503")
		b.Set(nats.CONNECTED)
		bus.SetFilter(BlackHole(a, b))
		a.Publish("x", "in.9", nil)
		b.Publish("x", "", []byte("own"))
		expect("b x own")
		b.Set(nats.CLOSED)
		if err := b.Publish("x", "", nil); !errors.Is(err, nats.ErrConnectionClosed) {
			t.Error(err)
		}
	})
}

// A connection without a bus hands what is published to the test, and what the test delivers to the first subscription.
func TestConnWithoutBus(t *testing.T) {
	c := New()
	var got []string
	failed := errors.New("failed")
	c.Published = func(subject, reply string, data []byte) error {
		got = append(got, subject+" "+reply+" "+string(data))
		return failed
	}
	if err := c.Publish("a", "b", []byte("c")); err != failed {
		t.Error(err)
	}
	if err := c.PublishMsg(&nats.Msg{Subject: "d", Data: []byte("e")}); err != failed {
		t.Error(err)
	}
	c.Requested = func(m *nats.Msg) error { got = append(got, "request "+m.Subject); return nil }
	if err := c.PublishMsg(&nats.Msg{Subject: "f"}); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"first", "second"} {
		if _, err := c.Subscribe(name, "", func(m *nats.Msg) { got = append(got, name+" "+string(m.Data)) }); err != nil {
			t.Fatal(err)
		}
	}
	c.Deliver(&nats.Msg{Data: []byte("x")})
	if want := []string{"a b c", "d  e", "request f", "first x"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// What a connection reports reaches every handler until it is stopped, in the form of nats.go.
func TestReports(t *testing.T) {
	c := New()
	var got []string
	note := func(err error) {
		d, ok := natsconn.Denied(err)
		if !ok {
			t.Errorf("%v is no denial", err)
		}
		if d.Subscribe {
			d.Subject += " subscribe"
		}
		got = append(got, d.Subject)
	}
	stop := c.OnError(note)
	stopOther := c.OnError(note)
	c.DenyPublish("a")
	stop()
	c.DenySubscribe("b.*")
	stopOther()
	c.DenyPublish("c")
	if want := []string{"a", "a", "b.* subscribe"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// A subscription that is refused succeeds, receives nothing, and its error is reported.
func TestRefuse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bus := new(Bus)
		c := bus.Connect("c")
		refused := true
		c.Refuse = func(subject, queue string) error {
			if refused {
				return SubscriptionDenied(subject + queue)
			}
			return nil
		}
		var reported []error
		defer c.OnError(func(err error) { reported = append(reported, err) })()
		got := 0
		for _, want := range []int{0, 1} {
			stop, err := c.Subscribe("a", "q", func(*nats.Msg) { got++ })
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(c.Publish("a", "", nil), c.Flush(0)); err != nil {
				t.Error(err)
			}
			stop()
			if got != want {
				t.Errorf("%d messages, want %d", got, want)
			}
			refused = false
		}
		if len(reported) != 1 || reported[0] != c.LastError() {
			t.Errorf("reported %v, LastError %v", reported, c.LastError())
		}
		c.Set(nats.RECONNECTING)
		if c.Flush(0) == nil {
			t.Error("a flush without a connection")
		}
	})
}

// A message that is too large for the server fails, and is seen by nobody.
func TestMaxPayload(t *testing.T) {
	c := New()
	seen := 0
	c.Published = func(string, string, []byte) error { seen++; return nil }
	for _, step := range []struct {
		max  int64
		size int
		ok   bool
	}{{MaxPayload, MaxPayload, true}, {MaxPayload, MaxPayload + 1, false}, {10, 10, true}, {10, 11, false}, {0, 11, true}} {
		c.SetMaxPayload(step.max)
		before := seen
		for what, err := range map[string]error{
			"Publish":    c.Publish("a", "", make([]byte, step.size)),
			"PublishMsg": c.PublishMsg(&nats.Msg{Subject: "a", Data: make([]byte, step.size)}),
		} {
			if step.ok && err != nil || !step.ok && !errors.Is(err, nats.ErrMaxPayload) {
				t.Errorf("%s of %d bytes, %d are taken: %v", what, step.size, step.max, err)
			}
		}
		if step.ok != (seen > before) || c.MaxPayload() != step.max {
			t.Errorf("%+v: %d were seen, MaxPayload is %d", step, seen-before, c.MaxPayload())
		}
	}
}

// Changes of status arrive, and those that nobody takes are dropped.
func TestStatusChanges(t *testing.T) {
	c := New()
	changes, stop := c.StatusChanges()
	for range 100 {
		c.Set(nats.RECONNECTING)
	}
	if s := <-changes; s != nats.RECONNECTING || c.Status() != s {
		t.Error(s, c.Status())
	}
	stop()
	n := 0
	for range changes {
		n++
	}
	if n != cap(changes)-1 {
		t.Errorf("%d changes were waiting", n)
	}
}

func TestFlush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := New()
		for status, want := range map[nats.Status]error{nats.CONNECTED: nil, nats.DRAINING_PUBS: nil, nats.RECONNECTING: nats.ErrTimeout} {
			c.Set(status)
			start := time.Now()
			if err := c.Flush(time.Minute); err != want || (err != nil) != (time.Since(start) == time.Minute) {
				t.Errorf("%v: %v after %v", status, err, time.Since(start))
			}
		}
	})
}

// Of an envelope, a filter sees the packets one by one, and takes out those that it holds back.
func TestFilterSeesThroughEnvelopes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		packet := func(text string) string {
			return "\xf5\x11\x00\x00\x00\x00\x00\x07\x00\x00\x00\x01\x00\x00\x00" + string(rune(16+len(text))) + text
		}
		envelope := func(packets ...string) []byte {
			b := []byte("\xf5\x14\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
			for i, p := range packets {
				b = append(b, "~1m5I0000000000"...)
				b = append(append(b, byte('A'+i)), packet(p)...)
			}
			b[15] = byte(len(b))
			return b
		}
		bus := new(Bus)
		a, b := bus.Connect("a"), bus.Connect("b")
		var got []string
		stop, err := b.Subscribe("in.*", "", func(m *nats.Msg) { got = append(got, m.Subject+" "+string(m.Data)) })
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		var seen []string
		bus.SetFilter(func(_, _ *Conn, m *nats.Msg) bool {
			seen = append(seen, m.Subject)
			return string(m.Data) != packet("lost")
		})
		a.Publish("in.e", "", envelope("one", "lost", "three"))
		a.Publish("in.e", "", envelope("lost"))
		a.Publish("in.e", "", []byte("no envelope"))
		synctest.Wait()
		kept := envelope("one", "three")
		kept[len(kept)-len(packet("three"))-1] = 'C'
		if !slices.Equal(got, []string{"in.e " + string(kept), "in.e no envelope"}) {
			t.Errorf("got %q", got)
		}
		token := "in.~1m5I0000000000"
		if !slices.Equal(seen, []string{token + "A", token + "B", token + "C", token + "A", "in.e"}) {
			t.Errorf("the filter saw %q", seen)
		}
	})
}
