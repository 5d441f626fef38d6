package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/natsconn/fake"
)

// Cases in which a call, or a stream, once waited for what could not come.

// A deadline may be further away than a time.Duration reaches.
func TestFarDeadline(t *testing.T) {
	h := make(nats.Header)
	ctx, cancel := context.WithDeadline(t.Context(), time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC))
	defer cancel()
	setTimeout(h, ctx)
	if d, err := parseTimeout(h); err != nil || d < 290*365*24*time.Hour {
		t.Errorf("%v arrives as %v, %v", h, d, err)
	}
}

// However often and however impatiently a server is ended: who asked it is answered.
func TestEndingAServerAnswers(t *testing.T) {
	for name, end := range map[string]func(m *memoryPair, ended context.Context){
		"Close":             func(m *memoryPair, _ context.Context) { _ = m.server.Close() },
		"Drain impatiently": func(m *memoryPair, ended context.Context) { _ = m.server.Drain(ended) },
		"Drain, then Close": func(m *memoryPair, _ context.Context) {
			go func() { _ = m.server.Drain(context.Background()) }()
			synctest.Wait()
			_ = m.server.Close()
		},
		"Drain twice": func(m *memoryPair, _ context.Context) {
			go func() { _ = m.server.Drain(context.Background()) }()
			synctest.Wait()
			_ = m.server.Drain(context.Background())
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.bus.Delay = 100 * time.Millisecond
				m.handle(t, "x", func(*Writer, *Request) error { return nil })
				s := m.open(t, "x")
				synctest.Wait() // NATS has the request, the server does not
				ended, cancel := context.WithCancel(t.Context())
				cancel()
				go end(m, ended)
				start := time.Now()
				_, err := s.Recv()
				took(t, fmt.Sprintf("the answer, %v,", err), start, 0, time.Second)
				time.Sleep(time.Second) // the acknowledgement is under way
				m.nothingLeft(t)
			})
		})
	}
}

// A handler that runs while the endpoint goes away may have no token yet. Its consumer is told nevertheless.
func TestSilentHandlersOfAServerThatCloses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "x", func(_ *Writer, r *Request) error {
			<-r.Context().Done()
			return nil
		})
		s := m.open(t, "x")
		time.Sleep(maxTick + time.Millisecond) // the outbox knows it, and has not said hello
		// As if the check came between the end of the endpoint and that of its outbox.
		ep := m.server.ep
		e := &ending{kind: endLocal, err: ErrServerClosed, reset: CloseError{CloseGoingAway, "server closed"}}
		ep.gone.Store(e)
		time.Sleep(3 * maxTick)
		m.server.Close()
		_, err := s.Recv()
		if ce, ok := errors.AsType[*CloseError](err); !ok || ce.Code != CloseGoingAway {
			t.Errorf("the consumer got %v", err)
		}
	})
}

// A request that is being taken while the connection is lost for good is not waited for.
func TestDrainAfterTheConnectionIsLost(t *testing.T) {
	for range 10 {
		conn := newRecorder(nil)
		server, err := newServer(conn.Conn, "", ServerParams{})
		if err != nil {
			t.Fatal(err)
		}
		h := make(nats.Header)
		for k := range 50_000 { // looking through them takes a while
			h[fmt.Sprint("Key-", k)] = []string{""}
		}
		began, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			close(began)
			server.request(&nats.Msg{Subject: "x", Reply: consumerSubject(5), Header: h},
				&Registration{server: server, subject: "x", handler: func(*Writer, *Request) error { return nil }})
		}()
		<-began
		time.Sleep(50 * time.Microsecond)
		conn.Set(nats.CLOSED)
		<-done
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if err := server.Drain(ctx); err != nil {
			t.Errorf("Drain: %v", err)
		}
		cancel()
		server.Close()
	}
}

// slowSubscriber is a connection that takes no bytes when "slow" is subscribed to.
type slowSubscriber struct {
	*fake.Conn
	begun, hold chan struct{}
}

func (c *slowSubscriber) Subscribe(subject, queue string, f nats.MsgHandler) (func(), error) {
	if subject == "slow" {
		close(c.begun)
		<-c.hold
	}
	return c.Conn.Subscribe(subject, queue, f)
}

// Drain heeds its context beside a Handle that waits for the connection, and ends that subscription too.
func TestDrainBesideHandle(t *testing.T) {
	conn := &slowSubscriber{fake.New(), make(chan struct{}), make(chan struct{})}
	s, err := newServer(conn, "", ServerParams{})
	if err != nil {
		t.Fatal(err)
	}
	handled := make(chan error, 1)
	go func() {
		_, err := s.Handle("slow", func(*Writer, *Request) error { return nil })
		handled <- err
	}()
	<-conn.begun
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := s.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Drain: %v", err)
	}
	close(conn.hold)
	if err := <-handled; err != nil {
		t.Error(err)
	}
	s.Close()
	if n := len(s.registrations); n != 0 {
		t.Errorf("%d subscriptions are left", n)
	}
}

// Streams opened while the connection is down for long live, and die, as others do.
func TestOpensDuringALongOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "x", func(w *Writer, r *Request) error {
			if _, err := w.Write([]byte("a")); err != nil {
				return err
			}
			<-r.Context().Done()
			return nil
		})
		m.conn.Set(nats.RECONNECTING)
		time.Sleep(m.times.DisconnectTimeout + 10*time.Second)
		var all []*Stream
		for range 60 {
			time.Sleep(maxTick) // the clock began with the endpoint: a tick comes at the same moment
			for range 30 {
				all = append(all, m.open(t, "x"))
			}
		}
		synctest.Wait()
		m.conn.Set(nats.CONNECTED)
		for _, s := range all {
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		m.bus.SetFilter(fake.BlackHole(nil, nil)) // the peer is gone without a word
		start := time.Now()
		var wg sync.WaitGroup
		for _, s := range all {
			wg.Go(func() {
				stop := time.AfterFunc(time.Hour, func() { _ = s.Close() })
				defer stop.Stop()
				if _, err := s.Recv(); !errors.Is(err, &CloseError{Code: CloseAbnormalClosure}) {
					t.Errorf("%v after %v", err, time.Since(start))
				}
			})
		}
		wg.Wait()
	})
}

// CloseSend may have come before it was known that the producer takes no records.
func TestSyncOneWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		reply := make(chan string, 1)
		stop, err := m.back.Subscribe("old", "", func(m *nats.Msg) { reply <- m.Reply })
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		s := m.open(t, "old")
		subject := <-reply
		closed := make(chan error, 1)
		go func() { closed <- s.CloseSend() }()
		synctest.Wait()
		if err := m.back.Publish(subject, "", jsonwire.AppendData(nil, []byte("a"))); err != nil {
			t.Fatal(err)
		}
		if err := <-closed; !errors.Is(err, ErrOneWay) {
			t.Errorf("CloseSend: %v", err)
		}
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := s.Sync(ctx); !errors.Is(err, ErrOneWay) {
			t.Errorf("Sync: %v", err)
		}
		took(t, "Sync", start, 0, time.Second)
		_ = s.Close()
	})
}

// stuckOutbox returns a client whose outbox waits in a publish until release is called.
func stuckOutbox(t *testing.T) (c *Client, conn *recorder, stick, release func()) {
	busy, idle := make(chan struct{}), make(chan struct{})
	conn = newRecorder(func(_ int, data []byte) error {
		if strings.Contains(string(data), "stuck") {
			close(busy)
			<-idle
		}
		return nil
	})
	c = fakeClient(t, conn.Conn, ClientParams{})
	stick = func() {
		if _, err := c.NewWriter("y" + consumerSubject(5)).Write([]byte("stuck")); err != nil {
			t.Fatal(err)
		}
		<-busy
	}
	return c, conn, stick, func() { close(idle) }
}

// All calls return when their stream ends, also while the connection takes no bytes.
func TestCallsReturnBesideAStuckPublish(t *testing.T) {
	c, conn, stick, release := stuckOutbox(t)
	ctx, cancel := context.WithCancel(t.Context())
	s, err := c.Open(ctx, "x", nil)
	if err != nil {
		t.Fatal(err)
	}
	conn.Deliver(&nats.Msg{Subject: s.session.reply, Reply: consumerSubject(5), Data: testPacketFlags(0, 8, 0, Frame{Type: FramePing})})
	if _, err := s.Write([]byte("a")); err != nil {
		t.Fatal(err)
	}
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	stick()
	var wg sync.WaitGroup
	for name, call := range map[string]func() error{
		"Sync":  func() error { return s.Sync(context.Background()) },
		"Flush": func() error { _, _ = s.Write([]byte("b")); return s.Flush() },
		"Recv":  func() error { _, err := s.Recv(); return err },
	} {
		wg.Go(func() {
			if err := call(); !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	time.Sleep(20 * time.Millisecond) // all of them wait
	cancel()
	wg.Wait()
	release()
}

// A consumer learns that its producer takes no records however many control packets come before.
func TestOneWayBesideAFlood(t *testing.T) {
	c, conn, stick, release := stuckOutbox(t)
	_, deliverOther := muxStream(t, conn.Conn, c)
	s, deliver := muxStream(t, conn.Conn, c)
	stick()
	for range maxInbound {
		deliverOther(testPacketFlags(0, 7, 0, Frame{Type: FramePing}))
	}
	deliver(jsonwire.AppendData(nil, []byte("a")))
	release()
	if _, err := s.Write([]byte("x")); !errors.Is(err, ErrOneWay) {
		t.Errorf("Write: %v", err)
	}
	_ = s.Close()
}

type netTimeout struct{}

func (netTimeout) Error() string   { return "broken" }
func (netTimeout) Timeout() bool   { return true }
func (netTimeout) Temporary() bool { return true }

// A packet that cannot be sent again does not keep records written meanwhile from being sent.
func TestPublishingAgainFails(t *testing.T) {
	const n = 1000
	release, waiting := make(chan struct{}), make(chan struct{})
	var arm atomic.Bool
	conn := newRecorder(func(_ int, data []byte) error {
		h, _, _ := ParsePacketHeader(data)
		switch {
		case h.Flags&PacketSeq == 0 || !arm.Load():
		case h.Seq == n/2+99:
			close(waiting)
			<-release
		case h.Seq == n/2+100:
			arm.Store(false)
			return netTimeout{}
		}
		return nil
	})
	c := fakeClient(t, conn.Conn, ClientParams{})
	w := c.NewWriter(consumerSubject(31))
	for range n {
		if _, err := w.Write([]byte("a")); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	credit := func(ack uint32, flags FrameFlags) {
		conn.Deliver(&nats.Msg{Subject: w.session.reply, Data: testPacketFlags(0, 9, 0, Frame{Type: FrameCredit, Flags: flags,
			Payload: AppendCredit(nil, Credit{Ack: ack, Packets: 1 << 30, Bytes: 1 << 40})})})
	}
	credit(0, FlagGap)
	until(t, "half was sent again", func() bool { return c.Stats().PacketsResent == n/2 })
	arm.Store(true)
	credit(n/2, 0)
	<-waiting
	if _, err := w.Write([]byte("b")); err != nil {
		t.Fatal(err)
	}
	close(release)
	until(t, "sending again failed", func() bool { return !arm.Load() })
	credit(n, 0) // it had everything
	done := make(chan error, 1)
	go func() { done <- w.Flush() }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("Flush hangs")
	}
}

// lateWatcher is a connection whose status the watcher gets to see late, and whose requests take their time.
type lateWatcher struct {
	*fake.Conn
	hold  chan struct{} // the first look waits for it
	once  atomic.Bool
	after func() // runs when a request was published, before the call returns
}

func (c *lateWatcher) Status() nats.Status {
	var pc [16]uintptr
	frames := runtime.CallersFrames(pc[:runtime.Callers(1, pc[:])])
	for more := c.hold != nil; more; {
		var f runtime.Frame
		f, more = frames.Next()
		if strings.HasSuffix(f.Function, ".watch") && c.once.CompareAndSwap(false, true) {
			<-c.hold
		}
	}
	return c.Conn.Status()
}

func (c *lateWatcher) PublishMsg(m *nats.Msg) error {
	err := c.Conn.PublishMsg(m)
	if c.after != nil {
		c.after()
	}
	return err
}

// A request that is lost with the connection is missed, whenever that is.
func TestRequestLostInAnyMoment(t *testing.T) {
	for _, when := range []string{"before the watcher looks", "before publishing returns"} {
		t.Run(when, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				bus := new(fake.Bus)
				conn := &lateWatcher{Conn: bus.Connect("client")}
				flip := func() {
					conn.Set(nats.RECONNECTING)
					time.Sleep(10 * time.Millisecond)
					conn.Set(nats.CONNECTED)
					time.Sleep(10 * time.Millisecond)
				}
				late := when == "before the watcher looks"
				if late {
					conn.hold = make(chan struct{})
				} else {
					conn.after = flip
				}
				p, err := ClientParams{}.withDefaults()
				if err != nil {
					t.Fatal(err)
				}
				ep, err := newEndpoint(conn, "", p)
				if err != nil {
					t.Fatal(err)
				}
				c := &Client{ep: ep, codec: MsgPack}
				defer c.Close()
				back := bus.Connect("server")
				stop, err := back.Subscribe("x", "", func(*nats.Msg) {})
				if err != nil {
					t.Fatal(err)
				}
				defer stop()
				bus.SetFilter(fake.BlackHole(nil, back))
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				s, err := c.Open(ctx, "x", nil)
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Millisecond)
				if late {
					conn.Set(nats.RECONNECTING)
					close(conn.hold)
					synctest.Wait()
					conn.Set(nats.CONNECTED)
				}
				start := time.Now()
				if _, err = s.Recv(); !errors.Is(err, &CloseError{Code: CloseAbnormalClosure}) {
					t.Errorf("Recv: %v", err)
				}
				took(t, "Recv", start, 0, p.ResumeTimeout+time.Second)
			})
		})
	}
}

// A writer that can never write holds nothing, and its context has ended.
func TestWriterThatCannotWrite(t *testing.T) {
	c := fakeClient(t, fake.New(), ClientParams{})
	for _, subject := range []string{"", "x.~2"} {
		w := c.NewWriter(subject)
		if w.Context().Err() == nil || !errors.Is(context.Cause(w.Context()), w.unusable) {
			t.Errorf("%q: the context's cause is %v, want %v", subject, context.Cause(w.Context()), w.unusable)
		}
	}
}

// Handlers that return at once leave a bounded number of streams behind, whatever their consumers acknowledge.
func TestLingeringStreamsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.server.room = roomFor(1)
		m.handle(t, "x", func(w *Writer, _ *Request) error {
			_, err := w.Write(make([]byte, 1000))
			return err
		})
		stranger := m.bus.Connect("stranger")
		var refusals atomic.Int32
		stop, err := stranger.Subscribe("in.*", "", func(msg *nats.Msg) {
			if isFrame(msg.Data, FrameReset) {
				refusals.Add(1)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		const n, others = 200, lingering - 100
		count := func(n int) (sessions int) {
			m.server.mu.Lock()
			defer m.server.mu.Unlock()
			m.server.sessions += n
			return m.server.sessions
		}
		count(others) // as if so many waited already
		for i := range n {
			reply := "in." + string(AppendToken(nil, Token{Codec: MsgPack, LogPackets: 10, LogBytes: 20, ID: uint64(i)}))
			if err := stranger.PublishMsg(&nats.Msg{Subject: "x", Reply: reply}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		sessions := count(-others)
		if sessions > 100+2 || sessions+int(refusals.Load()) != n {
			t.Errorf("%d streams are kept and %d were refused of %d", sessions, refusals.Load(), n)
		}
		time.Sleep(2 * m.times.ResumeTimeout)
		m.nothingLeft(t)
	})
}

// What encodes to nothing leaves no trace, so headers can still be set.
func TestSetHeaderAfterAFailedObject(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "x", func(w *Writer, _ *Request) error {
			if _, err := w.WriteObject(make(chan int)); err == nil {
				t.Error("a channel was encoded")
			}
			return w.SetHeader(nats.Header{"A": {"b"}})
		})
		s := m.open(t, "x")
		if h, err := s.Header(); err != nil || h.Get("A") != "b" {
			t.Errorf("Header: %v, %v", h, err)
		}
		_ = s.Close()
	})
}

// A message of the original protocol is none of frames, whatever it looks like.
func TestHeaderBeforeAFallbackMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		stop, err := m.back.Subscribe("old", "", func(msg *nats.Msg) {
			_ = m.back.Publish(msg.Reply, "", AppendFrame(nil, testData("forged")))
		})
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		s := m.open(t, "old")
		if _, err := s.Header(); err != nil {
			t.Fatal(err)
		}
		rec, err := s.Recv()
		if !errors.Is(err, &CloseError{Code: CloseUnsupportedData}) {
			t.Errorf("Recv: %q, %v", rec, err)
		}
		_ = s.Close()
	})
}

// No write succeeds after Close, not even into a packet that is open.
func TestStreamWriteAfterClose(t *testing.T) {
	conn := newRecorder(nil)
	c := fakeClient(t, conn.Conn, ClientParams{})
	for range 1000 {
		s, err := c.Open(t.Context(), "x", nil)
		if err != nil {
			t.Fatal(err)
		}
		conn.Deliver(&nats.Msg{Subject: s.session.reply, Reply: consumerSubject(5), Data: testPacketFlags(0, 8, 0, Frame{Type: FramePing})})
		for range 2 {
			if _, err := s.Write([]byte("a")); err != nil {
				t.Fatal(err)
			}
		}
		_ = s.Close()
		if _, err := s.Write([]byte("b")); !errors.Is(err, ErrClosed) {
			t.Fatalf("Write after Close: %v", err)
		}
	}
}

// A consumer may say to any producer that it sends no records.
func TestCloseSendToAWriter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		producer, err := newEndpoint(m.bus.Connect("producer"), "", m.times)
		if err != nil {
			t.Fatal(err)
		}
		pc := &Client{ep: producer, codec: MsgPack}
		defer pc.Close()
		reply := make(chan string, 1)
		stop, err := m.back.Subscribe("w", "", func(m *nats.Msg) { reply <- m.Reply })
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		s := m.open(t, "w")
		w := pc.NewWriter(<-reply)
		for _, rec := range []string{"a", "b"} {
			if _, err := w.Write([]byte(rec)); err != nil {
				t.Fatal(err)
			}
			if got, err := s.Recv(); err != nil || string(got) != rec {
				t.Fatalf("Recv: %q, %v", got, err)
			}
			if err := s.CloseSend(); err != nil {
				t.Fatal(err)
			}
			if err := s.Sync(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != io.EOF {
			t.Errorf("Recv: %v", err)
		}
		time.Sleep(time.Second)
		if n := producer.sessions.Size() + m.client.ep.sessions.Size(); n != 0 {
			t.Errorf("%d sessions are left", n)
		}
	})
}

// What a fallback producer piles up is bounded in memory, however small its messages.
func TestFallbackFloodOfSmallMessages(t *testing.T) {
	conn := fake.New()
	const limit = 1 << 20
	c := fakeClient(t, conn, ClientParams{FallbackBuffer: limit})
	s, deliver := muxStream(t, conn, c)
	n := 0
	for ; s.session.end.Load() == nil && n < limit; n++ {
		deliver([]byte("{}"))
	}
	if n > limit/fallbackOverhead+1 {
		t.Errorf("%d messages of two bytes were taken with a buffer of %d", n, limit)
	}
	if e := s.session.end.Load(); e == nil || !errors.Is(e.err, &CloseError{Code: CloseTooSlow}) {
		t.Errorf("the stream ended with %v", e)
	}
	_ = s.Close()
}

// A consumer that has read the end may give up in the middle of a large record.
func TestGivingUpALargeRecordAfterTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		left := make(chan error, 1)
		m.handle(t, "x", func(w *Writer, r *Request) error {
			if err := w.Close(); err != nil {
				return err
			}
			<-r.Context().Done()
			left <- context.Cause(r.Context())
			return nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		s, err := m.client.Open(ctx, "x", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != io.EOF {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			_, err := s.Write(make([]byte, 1<<20)) // nobody reads it
			done <- err
		}()
		time.Sleep(time.Second)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Write: %v", err)
		}
		if err := <-left; !errors.Is(err, &CloseError{Code: CloseCanceled}) {
			t.Errorf("the handler was left with %v", err)
		}
	})
}
