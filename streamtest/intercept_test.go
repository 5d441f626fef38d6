package streamtest_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/streamtest"
)

// direct connects to url and nowhere else.
func direct(t *testing.T, url string) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect(url, nats.IgnoreDiscoveredServers())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// intercepted returns an interceptor with rules, a connection through it, and one beside it.
func intercepted(t *testing.T, rules ...streamtest.Rule) (i *streamtest.Interceptor, through, beside *nats.Conn) {
	t.Helper()
	srv := streamtest.Run(t)
	i = streamtest.RunInterceptor(t, srv.URL(), rules...)
	return i, direct(t, i.URL()), srv.Connect(t)
}

func subscribe(t *testing.T, nc *nats.Conn, subject string) *nats.Subscription {
	t.Helper()
	sub, err := nc.SubscribeSync(subject)
	if err != nil || nc.Flush() != nil {
		t.Fatal(err)
	}
	return sub
}

// publish publishes the numbers from 0 to n-1.
func publish(t *testing.T, nc *nats.Conn, subject string, n int) {
	t.Helper()
	for i := range n {
		if err := nc.Publish(subject, strconv.AppendInt(nil, int64(i), 10)); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
}

// next returns the data of the next n messages.
func next(t *testing.T, sub *nats.Subscription, n int) []string {
	t.Helper()
	var got []string
	for range n {
		m, err := sub.NextMsg(limit)
		if err != nil {
			t.Fatalf("%v after %d of %d messages", err, len(got), n)
		}
		got = append(got, string(m.Data))
	}
	return got
}

// none sees that no message arrives.
func none(t *testing.T, sub *nats.Subscription) {
	t.Helper()
	if m, err := sub.NextMsg(20 * time.Millisecond); err == nil {
		t.Errorf("a message too many: %q", m.Data)
	}
}

func rng() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }

// TestInterceptorPasses sends messages of all shapes in both directions, and wants them back as they were.
func TestInterceptorPasses(t *testing.T) {
	i, a, b := intercepted(t)
	if _, err := b.Subscribe("echo", func(m *nats.Msg) {
		_ = m.RespondMsg(&nats.Msg{Header: m.Header, Data: m.Data})
	}); err != nil || b.Flush() != nil {
		t.Fatal(err)
	}
	chance := rng()
	for _, size := range []int{0, 1, 2, 4095, 65535, 65536, 65537, 200_000, 1 << 19, 7} {
		for _, header := range []nats.Header{nil, {"Key": {"value\twith \"odd\" letters", "second"}}} {
			data := make([]byte, size)
			for j := range data {
				data[j] = byte(chance.Uint32())
			}
			copy(data[size/2:], "\r\nPUB x 5\r\n")
			m, err := a.RequestMsg(&nats.Msg{Subject: "echo", Header: header, Data: data}, limit)
			if err != nil || !bytes.Equal(m.Data, data) || m.Header.Get("Key") != header.Get("Key") {
				t.Fatalf("%d bytes: got %v, %v", size, m, err)
			}
		}
	}
	if _, err := a.Request("nobody", nil, limit); err != nats.ErrNoResponders {
		t.Errorf("a request to nobody: %v, want ErrNoResponders", err)
	}
	if c := i.Counts(); c != (streamtest.Counts{Passed: 42}) {
		t.Errorf("Counts() = %+v, want 42 passed", c)
	}
}

func TestInterceptorDrop(t *testing.T) {
	var runs [2][]string
	for run := range runs {
		i, a, b := intercepted(t, streamtest.Drop(0.5, rng()))
		sub := subscribe(t, b, "x")
		publish(t, a, "x", 100)
		c := i.Counts()
		if c.Dropped < 25 || c.Dropped > 75 || c.Passed+c.Dropped != 100 {
			t.Errorf("Counts() = %+v, want about half dropped", c)
		}
		runs[run] = next(t, sub, c.Passed)
		none(t, sub)
	}
	if !slices.Equal(runs[0], runs[1]) {
		t.Errorf("the same chance dropped others:\n%v\n%v", runs[0], runs[1])
	}
}

func TestInterceptorDuplicate(t *testing.T) {
	i, a, b := intercepted(t, streamtest.Duplicate(1, rng()), streamtest.Duplicate(1, rng()))
	sub := subscribe(t, a, "x") // to the client
	publish(t, b, "x", 2)
	if got := next(t, sub, 6); !slices.Equal(got, []string{"0", "0", "0", "1", "1", "1"}) {
		t.Errorf("got %v, want each three times", got)
	}
	if c := i.Counts(); c.Duplicated != 4 {
		t.Errorf("Counts() = %+v, want 4 duplicated", c)
	}
}

func TestInterceptorReorder(t *testing.T) {
	hold := func(data string, n int) streamtest.Rule {
		return streamtest.Only(func(m *streamtest.Message) bool { return string(m.Data) == data },
			func(*streamtest.Message) streamtest.Verdict { return streamtest.Verdict{Hold: n} })
	}
	// The last waits for two that never come, and the timer releases it.
	i, a, b := intercepted(t, hold("1", 2), hold("2", 1), hold("5", 2))
	sub := subscribe(t, b, "x")
	publish(t, a, "x", 6)
	if got := next(t, sub, 6); !slices.Equal(got, []string{"0", "3", "2", "4", "1", "5"}) {
		t.Errorf("got %v, want 0 3 2 4 1 5", got)
	}
	if c := i.Counts(); c.Held != 3 || c.Passed != 6 {
		t.Errorf("Counts() = %+v, want 3 held", c)
	}
	i.SetRules(streamtest.Reorder(0.2, 3, rng()))
	publish(t, a, "x", 1000)
	got := next(t, sub, 1000)
	inversions := 0
	seen := map[string]bool{got[0]: true}
	for j := 1; j < len(got); j++ {
		seen[got[j]] = true
		x, _ := strconv.Atoi(got[j-1])
		if y, _ := strconv.Atoi(got[j]); y < x {
			inversions++
		}
	}
	if inversions < 50 || len(seen) != 1000 {
		t.Errorf("%d inversions, %d different messages; want about 200 and 1000", inversions, len(seen))
	}
	i.SetRules(hold("0", 5))
	publish(t, a, "x", 1)
	a.Close() // what is held goes out before the end
	if got := next(t, sub, 1); got[0] != "0" {
		t.Errorf("got %v", got)
	}
}

func TestInterceptorChanges(t *testing.T) {
	marked := func(rules ...streamtest.Rule) streamtest.Rule {
		return streamtest.Only(streamtest.To(streamtest.ToServer),
			streamtest.Only(streamtest.HasPrefix(0xF5), rules...))
	}
	i, a, b := intercepted(t, marked(streamtest.Truncate(1, rng())))
	sub := subscribe(t, b, ">")
	send := func(data string) *nats.Msg {
		t.Helper()
		if err := a.PublishMsg(&nats.Msg{Subject: "x", Header: nats.Header{"K": {"v"}}, Data: []byte(data)}); err != nil {
			t.Fatal(err)
		}
		m, err := sub.NextMsg(limit)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	const text = "\xF5 some text"
	if m := send(text[1:]); string(m.Data) != text[1:] {
		t.Errorf("the filter let %q be changed", m.Data)
	}
	if m := send(text); len(m.Data) >= len(text) || !bytes.HasPrefix([]byte(text), m.Data) {
		t.Errorf("truncated to %q", m.Data)
	}
	i.SetRules(marked(streamtest.Corrupt(1, rng())))
	m, bits := send(text), 0
	for j := range m.Data {
		for x := m.Data[j] ^ text[j]; x != 0; x &= x - 1 {
			bits++
		}
	}
	if bits != 1 || len(m.Data) != len(text) {
		t.Errorf("corrupted to %q, want one bit flipped", m.Data)
	}
	i.SetRules(func(m *streamtest.Message) streamtest.Verdict {
		if m.Dir != streamtest.ToServer || m.Conn != 1 || m.Subject != "x" || m.Reply != "" {
			t.Errorf("the rule saw %+v", m)
		}
		m.Subject, m.Reply, m.Header, m.Data = "y", "z", nil, append(m.Data, "longer"...)
		return streamtest.Verdict{}
	})
	if m := send("a"); m.Subject != "y" || m.Reply != "z" || m.Header != nil || string(m.Data) != "alonger" {
		t.Errorf("rewritten to %+v", m)
	}
}

func TestInterceptorInject(t *testing.T) {
	i, a, b := intercepted(t)
	second := direct(t, i.URL())
	subs := map[string]*nats.Subscription{}
	for _, pattern := range []string{"a.b", "a.*", "*.b", "a.>", ">", "a", "a.b.c", "a.b.>", "*"} {
		subs[pattern] = subscribe(t, a, pattern)
	}
	gone := subscribe(t, a, "a.b")
	if err := gone.Unsubscribe(); err != nil || a.Flush() != nil {
		t.Fatal(err)
	}
	other := subscribe(t, second, "a.b")
	forged := streamtest.Message{Dir: streamtest.ToClient, Conn: 1, Subject: "a.b", Reply: "r",
		Header: []byte("NATS/1.0\r\nK: v\r\n\r\n"), Data: []byte("forged")}
	if n := i.Inject(forged); n != 5 {
		t.Errorf("Inject() = %d, want 5", n)
	}
	for _, pattern := range []string{"a.b", "a.*", "*.b", "a.>", ">"} {
		m, err := subs[pattern].NextMsg(limit)
		if err != nil || m.Subject != "a.b" || m.Reply != "r" || m.Header.Get("K") != "v" || string(m.Data) != "forged" {
			t.Errorf("%s: got %+v, %v", pattern, m, err)
		}
	}
	none(t, other)
	forged.Conn = 0
	if n := i.Inject(forged); n != 6 {
		t.Errorf("Inject() = %d, want 6", n)
	}
	next(t, other, 1)

	sub := subscribe(t, b, "to.server")
	for conn := range uint64(3) {
		if n := i.Inject(streamtest.Message{Dir: streamtest.ToServer, Conn: conn, Subject: "to.server"}); n != 1 {
			t.Errorf("Inject() = %d, want 1", n)
		}
		next(t, sub, 1)
	}
	if n := i.Inject(streamtest.Message{Dir: streamtest.ToServer, Conn: 9, Subject: "to.server"}); n != 0 {
		t.Errorf("Inject() = %d through a connection that is not there", n)
	}
	// A rule may do so too.
	i.SetRules(streamtest.Only(streamtest.To(streamtest.ToServer), func(m *streamtest.Message) streamtest.Verdict {
		i.Inject(streamtest.Message{Dir: m.Dir, Conn: m.Conn, Subject: m.Subject, Data: []byte("before")})
		return streamtest.Verdict{}
	}))
	publish(t, second, "to.server", 1)
	if got := next(t, sub, 2); !slices.Equal(got, []string{"before", "0"}) {
		t.Errorf("got %v, want before 0", got)
	}
	if c := i.Counts(); c.Injected != 15 {
		t.Errorf("Counts() = %+v, want 15 injected", c)
	}
}

func TestInterceptorNonsense(t *testing.T) {
	i, _, _ := intercepted(t)
	for _, line := range []string{"PUB x", "PUB x -1", "PUB x y z 3", "HPUB x 4 3", "HPUB x -1 3", "PUB x 99999999999"} {
		c, err := net.Dial("tcp", i.Addr())
		if err != nil {
			t.Fatal(err)
		}
		_ = c.SetDeadline(time.Now().Add(limit))
		if _, err := fmt.Fprintf(c, "CONNECT {}\r\n%s\r\n", line); err != nil {
			t.Fatal(err)
		}
		for buf := make([]byte, 4096); err == nil; {
			_, err = c.Read(buf)
		}
		if err, ok := err.(net.Error); ok && err.Timeout() {
			t.Errorf("%q did not end the connection", line)
		}
		_ = c.Close()
	}
}

// TestInterceptorBusy has several connections, all faults and injections at once, for the race detector, and says how
// fast messages pass.
func TestInterceptorBusy(t *testing.T) {
	i, a, b := intercepted(t)
	const n, size = 20_000, 1024
	done := make(chan struct{})
	got := 0
	if _, err := b.Subscribe("x", func(*nats.Msg) {
		if got++; got == n {
			close(done)
		}
	}); err != nil || b.Flush() != nil {
		t.Fatal(err)
	}
	start := time.Now()
	for range n {
		if err := a.Publish("x", make([]byte, size)); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Flush(); err != nil {
		t.Fatal(err)
	}
	receive(t, "all messages", done)
	t.Logf("%.0f MB/s", n*size/1e6/time.Since(start).Seconds())

	chance := rng()
	i.SetRules(streamtest.Drop(0.1, chance), streamtest.Duplicate(0.1, chance), streamtest.Reorder(0.1, 3, chance))
	var conns []*nats.Conn
	for range 4 {
		nc := direct(t, i.URL())
		if _, err := nc.Subscribe("y", func(m *nats.Msg) {}); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, nc)
	}
	for j := range 500 {
		publish(t, conns[j%4], "y", 10)
		i.Inject(streamtest.Message{Dir: streamtest.Direction(j % 2), Subject: "y"})
	}
	c := i.Counts()
	if c.Dropped == 0 || c.Duplicated == 0 || c.Held == 0 || c.Injected == 0 {
		t.Errorf("Counts() = %+v, want some of each", c)
	}
}
