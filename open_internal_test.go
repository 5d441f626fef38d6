package stream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn"
	"github.com/natsstream/stream/internal/natsconn/fake"
	"github.com/natsstream/stream/internal/slab"
)

// The decision about a message at a handler, by everything that it depends on.
func TestRequestsAreSortedByTheirForm(t *testing.T) {
	const inbox = "_SINBOX.server."
	token := string(AppendToken(nil, Token{Codec: JSON, LogPackets: 5, LogBytes: 18, ID: 7}))
	offer := nats.Header{headerOpen: {"~1j5I"}}
	packet := AppendPacket(nil, PacketHeader{Flags: PacketSeq, Sender: 2}, Frame{Type: FrameData, Payload: []byte("x")})
	version2 := append([]byte{PacketMagic, 0x21}, packet[2:]...)
	type want int
	const (
		binary want = iota
		json
		stray
		refused
	)
	for _, c := range []struct {
		pattern, subject, reply string
		header                  nats.Header
		data                    []byte
		want                    want
	}{
		{"svc", "svc", "_SINBOX.x." + token, nil, nil, binary},
		{"svc", "svc", "_SINBOX.x." + token, offer, nil, binary},
		{"svc", "svc", "_SINBOX.x.Ab3dEf7h", nil, nil, json},
		{"svc", "svc", "_R_.Ab3dEf7hIj", nil, nil, json},
		{"svc", "svc", "_R_.Ab3dEf7hIj", offer, nil, binary},
		{"svc", "svc", "_INBOX.x.y", offer, nil, binary},
		{"svc", "svc", "inbox.alice." + token, offer, nil, binary},
		{"svc", "svc", token, nil, nil, binary},
		{"svc", "svc", "an.old.consumer", nil, nil, json},
		{"svc", "svc", "an.old.consumer", offer, nil, refused},
		{"svc", "svc", "", nil, nil, refused},
		{"svc", "svc", "", offer, nil, refused},
		{"svc", "svc", "_SINBOX.x.~2" + token[2:], nil, nil, refused},
		{"svc", "svc", "_SINBOX.x.~2" + token[2:], offer, nil, binary}, // the header counts
		{"svc", "svc", "_SINBOX.x." + token, nats.Header{headerOpen: {"~2j5I"}}, nil, refused},
		{"svc", "svc", "_SINBOX.x." + token, nats.Header{headerOpen: {"x"}}, nil, json},
		{"svc", "svc", "_SINBOX.x." + token, nats.Header{headerOpen: {"~1j5I", "~1j5I"}}, nil, binary},

		// Reply subjects.
		{"svc", "svc", ">", nil, nil, refused},
		{"svc", "svc", "*", offer, nil, refused},
		{"svc", "svc", "_SINBOX.*." + token, nil, nil, refused},
		{"svc", "svc", "_SINBOX.." + token, nil, nil, refused},
		{"svc", "svc", ".", nil, nil, refused},
		{"svc", "svc", "_SINBOX.x.", nil, nil, refused},
		{"svc", "svc", "a b." + token, nil, nil, refused},
		{"svc", "svc", "$JS.API.STREAM.PURGE.ORDERS", nil, nil, refused},
		{"svc", "svc", "$JS.API." + token, offer, nil, refused},
		{"svc", "svc", "svc", nil, nil, refused},
		{"svc", "svc", "svc", offer, nil, refused},
		{"svc.*", "svc.a", "svc.b", nil, nil, refused},
		{"svc.*", "svc.a", "svc.b." + token, nil, nil, binary},
		{"svc.*", "svc.a", "svc." + token, nil, nil, binary},
		{"svc.>", "svc.a", "svc.b.c", nil, nil, refused},
		{">", "svc", "old.consumer", nil, nil, refused},
		{">", "svc", "_SINBOX.x.Ab3dEf7h", nil, nil, json},

		// Messages that are no requests.
		{"svc", "svc", "_SINBOX.x." + token, nil, packet, stray},
		{"svc", "svc", "", nil, packet, stray},
		{"svc", "svc", "_SINBOX.x." + token, nil, version2, stray},
		{"svc", "svc", "_SINBOX.x." + token, offer, packet, binary},
		{"svc", "svc", "_SINBOX.x." + token, nil, packet[:len(packet)-1], binary},
		{"svc", "svc", "_SINBOX.x." + token, nil, append([]byte{}, PacketMagic), binary},
		{"svc", "svc", "_SINBOX.x.Ab3dEf7h", nil, append([]byte("\xf5"), packet...), json},
		{"svc", "svc", "_SINBOX.x.Ab3dEf7h", nil, []byte(`{"type":1}`), json},
		{"svc", "svc", "_SINBOX.x." + token, nats.Header{headerProbe: {"1"}}, []byte(`{"type":1}`), stray},
		{"svc", "svc", "", nats.Header{"Status": {"503"}}, nil, stray},
		{"svc", "svc", "_SINBOX.x." + token, nats.Header{"Status": {"503"}}, nil, stray},
		{"svc", "svc", "_SINBOX.x." + token, nats.Header{"Status": {"ready"}}, []byte("x"), binary},
		{">", inbox + token, "_SINBOX.x." + token, offer, nil, stray},
		{"_SINBOX.>", inbox + token, "_SINBOX.x." + token, offer, nil, stray},
		{"_SINBOX.>", "_SINBOX.other.x", "_SINBOX.x." + token, offer, nil, binary},
		{">", "_INBOX.other.x", "_SINBOX.x." + token, offer, nil, stray},
		{"*.>", "$JS.API.INFO", "_INBOX.x.y", nil, nil, stray},
		{"$KV.>", "$KV.bucket.key", "_INBOX.x.y", nil, nil, json},
		{"svc.*", "svc.$x", "_INBOX.x.y", nil, nil, json},
	} {
		r, err := parseRequest(&nats.Msg{Subject: c.subject, Reply: c.reply, Header: c.header, Data: c.data}, c.pattern, inbox)
		got := refused
		switch {
		case err == errStray:
			got = stray
		case err == nil && r.json:
			got = json
		case err == nil:
			got = binary
		case !errors.Is(err, nats.ErrBadSubject) && !errors.Is(err, ErrVersion) && !errors.Is(err, nats.ErrMsgNoReply):
			t.Errorf("%+v: error %v", c, err)
		}
		if got != c.want {
			t.Errorf("handler of %s, message to %s with reply %q, header %v, data %q: %d, %v; want %d", c.pattern, c.subject, c.reply, c.header, c.data, got, err, c.want)
		}
	}
}

func TestSubjectMatchesWildcards(t *testing.T) {
	for _, c := range []struct {
		pattern, subject string
		want             bool
	}{
		{"a", "a", true}, {"a", "b", false}, {"a", "a.b", false}, {"a.b", "a", false}, {"a.b", "a.b", true},
		{"*", "a", true}, {"*", "a.b", false}, {"*.b", "a.b", true}, {"a.*", "a.b", true}, {"a.*", "a.b.c", false}, {"a.*", "a", false},
		{">", "a", true}, {">", "a.b.c", true}, {"a.>", "a.b", true}, {"a.>", "a.b.c", true}, {"a.>", "a", false}, {"a.>", "b.c", false},
		{"*.>", "a", false}, {"*.>", "a.b", true}, {"a.*.c", "a.b.c", true}, {"a.*.c", "a.b.d", false},
	} {
		if got := subjectMatches(c.pattern, c.subject); got != c.want {
			t.Errorf("%s, %s: %v", c.pattern, c.subject, got)
		}
	}
}

// A window of more than 2^30 packets counts as 2^30: beyond it numbers before and behind could not be told apart.
func TestOfferedWindowIsCapped(t *testing.T) {
	for _, c := range []struct{ logPackets, logBytes uint8 }{{0, 0}, {5, 18}, {30, 40}, {31, 61}} {
		got := offered(Token{LogPackets: c.logPackets, LogBytes: c.logBytes})
		if got.packets != 1<<min(c.logPackets, 30) || got.bytes != 1<<c.logBytes {
			t.Errorf("%+v gives %+v", c, got)
		}
	}
}

// A request crossed accounts if its offer is in the header and its reply subject says nothing.
func TestRequestThatCrossedAccountsIsRecognised(t *testing.T) {
	const token = "~1m5I0123456789A"
	for _, c := range []struct {
		reply   string
		header  nats.Header
		crossed bool
	}{
		{"_R_.Ab3dEf7hIj.Kl", nats.Header{headerOpen: {"~1m5I"}}, true},
		{"_INBOX.x.y", nats.Header{headerOpen: {"~1m5I"}}, true},
		{"_SINBOX.x." + token, nats.Header{headerOpen: {"~1m5I"}}, false},
		{"_SINBOX.x." + token, nil, false},
		{"_R_.Ab3dEf7hIj.Kl", nil, false}, // a fallback consumer
		{"_R_.Ab3dEf7hIj.Kl", nats.Header{headerOpen: {"x"}}, false},
	} {
		r, err := parseRequest(&nats.Msg{Subject: "svc", Reply: c.reply, Header: c.header}, "svc", "_SINBOX.server.")
		if err != nil || r.crossed != c.crossed {
			t.Errorf("%+v: %+v, %v", c, r, err)
		}
	}
}

// A packet that asks for a stream is a control packet of no sender that begins with RESUME.
func TestSoughtTokenIsRecognised(t *testing.T) {
	const token = "~1m5G0123456789A"
	name := Frame{Type: FrameResume, Payload: []byte(token)}
	for _, c := range []struct {
		header PacketHeader
		frames []Frame
		want   string
	}{
		{PacketHeader{}, []Frame{name}, token},
		{PacketHeader{}, []Frame{name, {Type: FramePing}}, token},
		{PacketHeader{Sender: 1}, []Frame{name}, ""},
		{PacketHeader{Flags: PacketSeq}, []Frame{name}, ""},
		{PacketHeader{}, []Frame{{Type: FramePing}, name}, ""},
		{PacketHeader{}, []Frame{{Type: FrameResume, Payload: []byte(token[1:])}}, ""},
		{PacketHeader{}, nil, ""},
	} {
		if got := soughtToken(AppendPacket(nil, c.header, c.frames...)); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
	for _, b := range []string{"", "\xf5", `{"type":1}`} {
		if got := soughtToken([]byte(b)); got != "" {
			t.Errorf("%q: %q", b, got)
		}
	}
}

// The request is published after OpenMsg has returned. By then its header is the caller's again.
func TestOpenMsgCopiesHeader(t *testing.T) {
	busy, idle := make(chan struct{}), make(chan struct{})
	conn := newRecorder(func(n int, _ []byte) error {
		if n == 0 {
			close(busy)
			<-idle
		}
		return nil
	})
	requests := make(chan nats.Header, 1)
	conn.Requested = func(m *nats.Msg) error { requests <- maps.Clone(m.Header); return nil }
	c := fakeClient(t, conn.Conn, ClientParams{})
	w := c.NewWriter(consumerSubject(5))
	if _, err := w.Write([]byte("a")); err != nil {
		t.Fatal(err)
	}
	<-busy // the outbox is kept from the request

	msg := &nats.Msg{Subject: "subject", Data: []byte("data"), Header: nats.Header{"Key": {"one", "two"}}}
	s, err := c.OpenMsg(t.Context(), msg)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if len(msg.Header) != 1 {
		t.Errorf("OpenMsg changed the header: %v", msg.Header)
	}
	msg.Header["Key"][0] = "changed"
	msg.Header["Key"] = append(msg.Header["Key"][:1], "changed")
	msg.Header.Set("New", "header")
	close(idle)
	got := <-requests
	if values := got.Values("Key"); len(values) != 2 || values[0] != "one" || values[1] != "two" || got.Get("New") != "" {
		t.Errorf("the producer got the header %v", got)
	}
}

// A handler that says nothing lets the consumer know where it is: the consumer's first Write waits for that.
func TestSilentHandlerIsAnnounced(t *testing.T) {
	for name, c := range map[string]struct {
		silent func(r *Request)
		lost   int // of the handler's PINGs
		atMost time.Duration
	}{
		"reads":              {silent: func(r *Request) { _, _ = r.Recv() }, atMost: 2 * helloWait},
		"reads later":        {silent: func(*Request) { time.Sleep(time.Second) }, atMost: 2 * helloWait},
		"does nothing":       {silent: func(r *Request) { <-r.Context().Done() }, atMost: 2 * helloWait},
		"and loses its PING": {silent: func(r *Request) { _, _ = r.Recv() }, lost: 1, atMost: 100*time.Millisecond + defaultAckTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.bus.SetFilter(lose(c.lost, frameOf(m.back, FramePing)))
				m.handle(t, "silent", func(_ *Writer, r *Request) error { c.silent(r); return nil })
				start := time.Now()
				s := openForAnHour(t, m, "silent")
				_, err := s.Write([]byte("x"))
				outcome{err, time.Now()}.expect(t, "Write", nil, start, 0, c.atMost)
				_ = s.Close()
				time.Sleep(time.Second)
				m.nothingLeft(t)
			})
		})
	}
}

// The connection is lost before a handler that does nothing has said where it is: it does so as soon as it is back.
func TestSilentHandlerIsAnnouncedAfterAReconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "silent", func(_ *Writer, r *Request) error { <-r.Context().Done(); return nil })
		s := openForAnHour(t, m, "silent")
		synctest.Wait()
		m.back.Set(nats.RECONNECTING)
		time.Sleep(2 * time.Second)
		m.back.Set(nats.CONNECTED)
		start := time.Now()
		_, err := s.Write([]byte("x"))
		outcome{err, time.Now()}.expect(t, "Write", nil, start, 0, defaultAckTimeout+100*time.Millisecond)
		_ = s.Close()
		m.nothingLeft(t)
	})
}

// A handler that answers soon, or not before its consumer, costs no message beside its packets.
func TestHelloIsSparedIfTheHandlerAnswers(t *testing.T) {
	for name, handle := range map[string]Handler{
		"at once": func(w *Writer, _ *Request) error { _, err := w.Write([]byte("a")); return err },
		"soon": func(w *Writer, _ *Request) error {
			time.Sleep(helloWait / 2)
			_, err := w.Write([]byte("a"))
			return err
		},
		"nothing":  func(*Writer, *Request) error { return nil },
		"with EOF": func(_ *Writer, r *Request) error { time.Sleep(helloWait / 2); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				var asks, agreements atomic.Int64 // on envelopes, once in four AckTimeouts
				published := m.back.Published
				m.back.Published = func(subject, reply string, data []byte) error {
					for _, packet := range packetsOf(data) {
						switch frames := controlFrames(packet); {
						case len(frames) == 0:
						case len(frames) == 1 && frames[0].Type == FrameResponse, len(frames) == 2 && frames[0].Type == FramePing && frames[1].Type == frameEnvelopes:
							agreements.Add(1)
						default:
							asks.Add(1)
						}
					}
					return published(subject, reply, data)
				}
				m.handle(t, "x", handle)
				for range 20 {
					s := m.open(t, "x")
					for {
						if _, err := s.Recv(); err != nil {
							break
						}
					}
				}
				time.Sleep(time.Second)
				// The control packets of a stream are its consumer's: the acknowledgement of its end.
				if n := asks.Load(); n != 0 {
					t.Errorf("%d control packets of the producer", n)
				}
				if n := agreements.Load(); n > 2 {
					t.Errorf("%d control packets of the producer about envelopes, expected a statement and the answer to a trial", n)
				}
				m.nothingLeft(t)
			})
		})
	}
}

// Each of many silent handlers is announced, in time, whatever the others do; and the timer rests then.
func TestManySilentHandlersAreAnnouncedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "silent", func(_ *Writer, r *Request) error { <-r.Context().Done(); return nil })
		m.handle(t, "quick", func(w *Writer, _ *Request) error { _, err := w.Write([]byte("a")); return err })
		var wg sync.WaitGroup
		for i := range 200 {
			time.Sleep(helloWait / 7)
			if i%3 == 0 {
				s := m.open(t, "quick")
				wg.Go(func() {
					if _, err := s.Recv(); err != nil {
						t.Error(err)
					}
					_ = s.Close()
				})
				continue
			}
			s, start := m.open(t, "silent"), time.Now()
			wg.Go(func() {
				_, err := s.Write([]byte("x"))
				outcome{err, time.Now()}.expect(t, "Write", nil, start, 0, 2*helloWait)
				_ = s.Close()
			})
		}
		wg.Wait()
		time.Sleep(time.Second)
		if h := &m.server.ep.outbox.hellos; h.armed.Load() || len(h.waiting) != 0 {
			t.Error("the timer runs for nothing")
		}
		m.nothingLeft(t)
	})
}

// countedConn counts its subscriptions, and the calls that subscribe and unsubscribe.
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

func TestSuspendedRegistrationsChangeAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
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
		time.Sleep(time.Minute)
		if n := conn.now.Load(); n != 200 {
			t.Errorf("%d subscriptions of 200", n)
		}
		s.Close()
		if n := conn.now.Load(); n != 0 {
			t.Errorf("%d subscriptions after Close", n)
		}
	})
}

// A connection that takes no subscription any more is asked once.
func TestRegistrationThatCannotReturnAsksOnce(t *testing.T) {
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

func TestServerIsFullUntilSpareRoomIsFree(t *testing.T) {
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

// refusing makes conn refuse its inbox, and other subscriptions, with the error that the returned pointer holds.
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

// While its inbox is refused a client opens nothing, for the reason that NATS gave, and not long after the refusal ends
// it works again. It asks ever more rarely.
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

// A refusal that names no subject ends nothing, if the inbox is heard after all: the server refused another
// subscription.
func TestAnotherRefusedSubscriptionEndsNothing(t *testing.T) {
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
func TestForbiddenProbeEndsNothing(t *testing.T) {
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
func TestLateReportOfARefusalEndsNothing(t *testing.T) {
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

// The context of a stream is made when it is asked for. Whenever that is, it tells why the stream ended.
func TestContextTellsTheEndThatCameBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "x", func(*Writer, *Request) error { return nil })
		type key struct{}
		for _, early := range []bool{true, false} {
			ctx, cancel := context.WithCancelCause(context.WithValue(t.Context(), key{}, "value"))
			s, err := m.client.Open(ctx, "x", nil)
			if err != nil {
				t.Fatal(err)
			}
			if early && s.Context().Err() != nil {
				t.Errorf("the context of an open stream: %v", context.Cause(s.Context()))
			}
			if _, err := s.Recv(); err != io.EOF {
				t.Fatal(err)
			}
			cancel(errors.New("too late"))
			synctest.Wait()
			if c := s.Context(); c != s.Context() || c.Err() == nil || context.Cause(c) != io.EOF || c.Value(key{}) != "value" {
				t.Errorf("asked for early %v: the context ended with %v", early, context.Cause(c))
			}
		}
		s := m.open(t, "x")
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() { <-s.Context().Done() })
		}
		_ = s.Close()
		wg.Wait()
		if cause := context.Cause(s.Context()); cause != ErrClosed {
			t.Errorf("the context ended with %v", cause)
		}
		m.nothingLeft(t)
	})
}

// limitedConn has a NATS server that accepts limit subscriptions, and refuses others without saying which.
type limitedConn struct {
	*fake.Conn
	limit, now, asked atomic.Int64
}

func (c *limitedConn) Subscribe(subject, queue string, f nats.MsgHandler) (func(), error) {
	c.asked.Add(1)
	if c.now.Load() >= c.limit.Load() {
		c.Report(nats.ErrMaxSubscriptionsExceeded)
		return func() {}, nil
	}
	c.now.Add(1)
	end, err := c.Conn.Subscribe(subject, queue, f)
	return sync.OnceFunc(func() { end(); c.now.Add(-1) }), err
}

func (c *limitedConn) SubscribeInbox(subject string, f func(*nats.Msg, *slab.Slab)) (natsconn.Inbox, error) {
	end, err := c.Subscribe(subject, "", func(m *nats.Msg) { f(m, nil) })
	return natsconn.Inbox{Unsubscribe: end, Fast: func() bool { return false }}, err
}

func limitedServer(t *testing.T, limit int64, subjects int) (*Server, *limitedConn, []*Registration) {
	t.Helper()
	conn := &limitedConn{Conn: new(fake.Bus).Connect("server")}
	conn.limit.Store(limit)
	s, err := newServer(conn, "", ServerParams{Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	var all []*Registration
	for i := range subjects {
		r, err := s.HandleQueue(fmt.Sprint("svc.", i), "q", nothing)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, r)
	}
	return s, conn, all
}

// While NATS refuses registrations without naming them, the server tries again ever more rarely, with one subscription.
// The first registrations get the room.
func TestCrowdedRegistrationsTryAgain(t *testing.T) {
	for _, outage := range []time.Duration{10 * time.Millisecond, time.Second, time.Minute, time.Hour} {
		t.Run(outage.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, conn, all := limitedServer(t, 4, 70)
				time.Sleep(time.Second)
				before := conn.asked.Load()
				time.Sleep(outage)
				for i, r := range all {
					if err := r.Err(); (err == nil) != (i < 3) || err != nil && !errors.Is(err, nats.ErrMaxSubscriptionsExceeded) {
						t.Errorf("registration %d says %v", i, err)
					}
				}
				if n, most := conn.asked.Load()-before, 100+2*int64(outage/maxRenewal); n > most {
					t.Errorf("%d subscriptions were tried in %v, want at most %d", n, outage, most)
				}
				conn.limit.Store(1000)
				time.Sleep(min(max((outage+time.Second)/4, minRenewal), maxRenewal) + time.Second)
				for i, r := range all {
					if err := r.Err(); err != nil {
						t.Errorf("with room, registration %d says %v", i, err)
					}
				}
				if n := conn.now.Load(); n != 71 {
					t.Errorf("%d subscriptions, want 71", n)
				}
				time.Sleep(maxRenewal + confirmation)
				s.mu.Lock()
				if s.doubts.examining {
					t.Error("the examination goes on when all registrations are heard")
				}
				s.mu.Unlock()
			})
		})
	}
}

// A refusal that names no subject is about another subscription of the connection, if the registrations have had their
// answers.
func TestOldRegistrationsAreNotDoubted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, conn, all := limitedServer(t, 100, 3)
		time.Sleep(2 * suspicion)
		for range 100 {
			before := conn.asked.Load()
			conn.Report(nats.ErrMaxSubscriptionsExceeded)
			time.Sleep(3 * time.Second)
			if n := conn.asked.Load() - before; n != 0 {
				t.Fatalf("the server subscribed %d times", n)
			}
			for _, r := range all {
				if err := r.Err(); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

// lateConn has a NATS server that answers late. nats.go notes a refusal when the server answers, and reports it later
// still.
type lateConn struct {
	*fake.Conn
	answers, reports time.Duration
	last             atomic.Pointer[error]
	denies           atomic.Bool
}

func (c *lateConn) Subscribe(subject, queue string, f nats.MsgHandler) (func(), error) {
	if queue != "" && c.denies.Load() {
		err := fmt.Errorf("%w: Permissions Violation for Subscription to %q using queue %q", nats.ErrPermissionViolation, subject, queue)
		time.AfterFunc(c.answers, func() { c.last.Store(&err) })
		time.AfterFunc(c.reports, func() { c.Report(err) })
	}
	return c.Conn.Subscribe(subject, queue, f)
}

func (c *lateConn) LastError() error {
	if err := c.last.Load(); err != nil {
		return *err
	}
	return nil
}

func (c *lateConn) Flush(timeout time.Duration) error {
	time.Sleep(min(timeout, c.answers))
	if timeout < c.answers {
		return nats.ErrTimeout
	}
	return nil
}

// A registration does not count as accepted before NATS has answered, however late that is.
func TestRefusedRegistrationWaitsForTheAnswer(t *testing.T) {
	for _, late := range []struct{ answers, reports time.Duration }{{0, 0}, {0, 3 * time.Second}, {1500 * time.Millisecond, 1500 * time.Millisecond},
		{1500 * time.Millisecond, 4 * time.Second}, {5 * time.Second, 5 * time.Second}} {
		t.Run(fmt.Sprint(late), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				conn := &lateConn{Conn: new(fake.Bus).Connect("server"), answers: late.answers, reports: late.reports}
				conn.denies.Store(true)
				s, err := newServer(conn, "", ServerParams{Logger: slog.New(slog.DiscardHandler)})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { s.Close() })
				r, err := s.HandleQueue("svc", "q", nothing)
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(late.reports + time.Millisecond)
				for range 6000 {
					if r.Err() == nil {
						t.Fatal("the registration counts as accepted")
					}
					time.Sleep(10 * time.Millisecond)
				}
				conn.denies.Store(false)
				time.Sleep(maxRenewal + late.reports + 10*confirmation)
				if err := r.Err(); late.answers < probeTimeout && err != nil {
					t.Errorf("it is accepted, and says %v", err)
				}
			})
		})
	}
}

func TestSuspectedSubscriptions(t *testing.T) {
	young := facts{subscribed: true, fresh: true}
	with := func(change func(*facts)) facts {
		f := young
		change(&f)
		return f
	}
	for name, c := range map[string]struct {
		facts facts
		want  bool
	}{
		"young":                           {young, true},
		"on a connection seen late":       {with(func(f *facts) { f.fresh = false }), true},
		"none":                            {with(func(f *facts) { f.subscribed = false }), false},
		"heard":                           {with(func(f *facts) { f.heard = true }), false},
		"old":                             {with(func(f *facts) { f.age = suspicion }), false},
		"made with room, refusal after":   {with(func(f *facts) { f.fitted = true }), true},
		"made with room, no refusal":      {with(func(f *facts) { f.fitted, f.fresh = true, false }), false},
		"made with room, refusal later":   {with(func(f *facts) { f.fitted, f.lasted = true, confirmation }), false},
		"made with room, on old refusals": {with(func(f *facts) { f.fitted, f.age = true, suspicion }), false},
	} {
		if got := c.facts.suspected(); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// The subscription with which a server listens outside its queue group is tried again, too.
func TestRefusedListeningTriesAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, conn, all := limitedServer(t, 4, 3)
		all[0].listen(time.Minute)
		time.Sleep(10 * time.Second)
		if n := conn.now.Load(); n != 4 {
			t.Fatalf("%d subscriptions, want 4", n)
		}
		before := conn.asked.Load()
		time.Sleep(20 * time.Second)
		if n := conn.asked.Load() - before; n == 0 || n > 40 {
			t.Errorf("%d subscriptions were tried", n)
		}
		conn.limit.Store(5)
		time.Sleep(10 * time.Second)
		if n := conn.now.Load(); n != 5 {
			t.Errorf("%d subscriptions with room, want 5", n)
		}
		time.Sleep(time.Minute)
		if n := conn.now.Load(); n != 4 {
			t.Errorf("%d subscriptions afterwards, want 4", n)
		}
		for i, r := range all {
			if err := r.Err(); err != nil {
				t.Errorf("registration %d says %v", i, err)
			}
		}
	})
}

// A stream that cannot begin, because its client is being closed, does not end twice.
func TestOpenBesideClose(t *testing.T) {
	rounds := 2000
	if testing.Short() {
		rounds /= 10
	}
	for range rounds {
		conn := fake.New()
		conn.Requested = func(*nats.Msg) error { return nil }
		c := fakeClient(t, conn, ClientParams{})
		var opening sync.WaitGroup
		for range 4 {
			opening.Go(func() {
				for {
					s, err := c.Open(t.Context(), "x", nil, WithRetry(Retry{Attempts: 2}))
					if err != nil {
						return
					}
					_ = s.Close()
				}
			})
		}
		conn.Set(nats.CLOSED)
		_ = c.Close()
		opening.Wait()
	}
}

func TestHeadersOfRequestsAreThoseThatNATSDecodes(t *testing.T) {
	var headers requestHeaders
	for _, text := range []string{
		"Stream-Open: ~1m5I\r\n", "Stream-Open: ~1m5I\r\n", "Stream-Open: ~1j5G\r\n", "Stream-Open:  ~1m5\r\n", "Stream-Open: ~1m5 \r\n",
		"Stream-Open: a\r\nB:\r\n", "Stream-Open: \t~1m5\r\n", "Stream-Open: ~1m\x80\x81\r\n", "Stream-Open: ~1m5Ix\r\n", "stream-open: ~1m5I\r\n",
		"Stream-Open: ~1m5I\r\nA: 1\r\n", "A: 1\r\nStream-Open: ~1m5I\r\n", "Stream-Open: ~1m5I\r\nStream-Open: ~1m5I\r\n", "", "broken",
	} {
		b := []byte("NATS/1.0\r\n" + text + "\r\n")
		want, _ := nats.DecodeHeadersMsg(bytes.Clone(b))
		if got := headers.decode(b); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %q, nats.go decodes %q", text, got, want)
		}
		clear(b) // the receive buffer is used again
		_ = userHeader(headers.header)
	}
	b := []byte("NATS/1.0\r\nStream-Open: ~1m5I\r\n\r\n")
	if n := testing.AllocsPerRun(100, func() { _ = userHeader(headers.decode(b)) }); n != 0 {
		t.Errorf("%v allocations for the headers of a request", n)
	}
}
