package stream

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/natsconn"
	"github.com/natsstream/stream/internal/natsconn/fake"
	"github.com/natsstream/stream/internal/poison"
	"github.com/natsstream/stream/internal/race"
)

// Whatever is marked is served afterwards, from however many goroutines it is marked, also
// while the connection comes and goes.
func TestOutboxServesWhateverIsMarked(t *testing.T) {
	const sessions, markers = 50, 8
	rounds := 100_000
	if testing.Short() {
		rounds /= 10
	}
	var marks, seen [sessions]atomic.Int64
	conn := fake.New()
	conn.Published = func(subject, _ string, _ []byte) error {
		i := binary.BigEndian.Uint16([]byte(subject))
		seen[i].Store(marks[i].Load())
		return nil
	}
	c := fakeClient(t, conn, ClientParams{})
	all := make([]*session, sessions)
	for i := range all {
		s := unopenedStream(c.ep)
		s.out.peer = string(binary.BigEndian.AppendUint16(nil, uint16(i)))
		all[i] = s
	}
	var wg sync.WaitGroup
	for m := range markers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(m), 2))
			for range rounds {
				i := r.IntN(sessions)
				marks[i].Add(1)
				all[i].mark(workCredit)
			}
		})
	}
	flapping := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for n := 0; ; n++ {
			select {
			case <-flapping:
				conn.Set(nats.CONNECTED)
				return
			default:
				conn.Set([]nats.Status{nats.RECONNECTING, nats.CONNECTED}[n%2])
				time.Sleep(100 * time.Microsecond)
			}
		}
	}()
	wg.Wait()
	close(flapping)
	<-stopped
	end := time.Now().Add(30 * time.Second)
	for i := range all {
		for seen[i].Load() != marks[i].Load() {
			if time.Now().After(end) {
				t.Fatalf("session %d: marked %d times, served last at mark %d; pending %b, held %b", i,
					marks[i].Load(), seen[i].Load(), all[i].pending.Load(), all[i].out.deferredUntilUp)
			}
			time.Sleep(time.Millisecond)
		}
	}
}

// The queue is a stack that is taken whole and turned round, so streams are served in turn.
func TestOutboxTakeKeepsOrder(t *testing.T) {
	ep := new(endpoint)
	ep.outbox.init(ep)
	sessions := make([]session, 10)
	for i := range sessions {
		s := &sessions[i]
		s.ep = ep
		s.mark(workCredit)
		s.mark(workPackets) // queued once
	}
	n := 0
	for s := ep.outbox.take(); s != nil; s, n = s.next, n+1 {
		if s != &sessions[n] {
			t.Fatalf("place %d is not that of session %d", n, n)
		}
		if s.pending.Load() != workCredit|workPackets {
			t.Errorf("session %d: pending %b", n, s.pending.Load())
		}
	}
	if n != len(sessions) || ep.outbox.take() != nil {
		t.Fatalf("%d sessions on the queue, want %d", n, len(sessions))
	}
}

// The server may refuse a client's subscription before the client has done anything.
func TestSubscriptionRefusedAtOnceIsReported(t *testing.T) {
	conn := fake.New()
	conn.Refuse = func(subject, _ string) error { return fake.SubscriptionDenied(subject) }
	c := fakeClient(t, conn, ClientParams{})
	if _, err := c.Open(t.Context(), "x", nil); !errors.Is(err, nats.ErrPermissionViolation) {
		t.Errorf("Open: %v", err)
	}
}

// A publish that fails is reported once, by the call that waits for it or the next one, and tried again by the call
// after that: no record is lost, repeated or out of order.
func TestFailedPublishIsReportedOnceAndRepeated(t *testing.T) {
	subject := "x." + string(AppendToken(nil, Token{Codec: MsgPack, LogPackets: 8, LogBytes: 20, ID: 1}))
	for _, fallback := range []bool{false, true} {
		for failures := range 4 {
			conn, c, fail := newFaulty(t)
			to := subject
			if fallback {
				to = "x.oldtoken"
			}
			w := c.NewWriter(to)
			if _, err := w.Write([]byte("first")); err != nil {
				t.Fatal(err)
			}
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			fail(failures)
			failed := 0
			for {
				err := w.CloseWithCode(4000, "end")
				if err == nil {
					break
				}
				if failed++; !errors.Is(err, errFaulty) || failed > failures {
					t.Fatalf("CloseWithCode, %d. time: %v", failed, err)
				}
			}
			if failed != failures {
				t.Errorf("%d publishes failed and %d closes", failures, failed)
			}
			if _, err := w.Write(nil); !errors.Is(err, ErrClosed) {
				t.Errorf("Write after Close: %v", err)
			}
			sent := conn.sent()
			if len(sent) != 2 {
				t.Fatalf("%d messages were published: %v", len(sent), sent)
			}
			if fallback {
				if got := string(sent[1].Data); got != `{"type":2,"closeError":{"Code":4000,"Text":"end"}}` {
					t.Errorf("the second is %s", got)
				}
				continue
			}
			h, body, err := ParsePacketHeader(sent[1].Data)
			if err != nil || h.Seq != 1 {
				t.Fatalf("the second packet's header is %+v, %v", h, err)
			}
			if fr, rest, err := ParseFrame(body); err != nil || fr.Type != FrameClose || fr.Code != 4000 || len(rest) != 0 {
				t.Errorf("the second packet holds %+v, %v", fr, err)
			}
		}
	}
}

// A fault between records: the writer goes on where it stood.
func TestFailedPublishOfRecordsLosesNothing(t *testing.T) {
	conn, c, fail := newFaulty(t)
	w := c.NewWriter("x." + string(AppendToken(nil, Token{Codec: MsgPack, LogPackets: 30, LogBytes: 60, ID: 1})))
	const records = 1000 // fewer packets than may wait for their acknowledgement
	for i := range records {
		if i%7 == 0 {
			fail(i % 3)
		}
		for {
			_, err := w.Write([]byte{byte(i >> 8), byte(i)})
			if err == nil {
				break
			}
			if !errors.Is(err, errFaulty) {
				t.Fatal(err)
			}
		}
	}
	fail(0)
	for {
		err := w.Close()
		if err == nil {
			break
		}
		if !errors.Is(err, errFaulty) {
			t.Fatal(err)
		}
	}
	next, seq := 0, uint32(0)
	for _, m := range conn.sent() {
		h, body, err := ParsePacketHeader(m.Data)
		if err != nil || h.Seq != seq {
			t.Fatalf("packet %d: %+v, %v", seq, h, err)
		}
		seq++
		for len(body) > 0 {
			var fr Frame
			if fr, body, err = ParseFrame(body); err != nil {
				t.Fatal(err)
			}
			if fr.Type == FrameClose {
				break
			}
			if got := int(fr.Payload[0])<<8 | int(fr.Payload[1]); got != next {
				t.Fatalf("record %d, want %d", got, next)
			}
			next++
		}
	}
	if next != records {
		t.Errorf("%d records were published", next)
	}
	if err := context.Cause(w.Context()); err == nil {
		t.Error("the writer's context goes on")
	}
}

// A request that cannot be published ends its stream, and nothing is kept of it.
func TestFailedRequestEndsItsStream(t *testing.T) {
	_, c, fail := newFaulty(t)
	fail(1)
	s, err := c.Open(t.Context(), "x", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); !errors.Is(err, errFaulty) {
		t.Errorf("Recv: %v", err)
	}
	until(t, "nothing is kept", func() bool { n := c.Stats(); return n.Streams == 0 && n.Reserved == 0 })
}

type netTimeout struct{}

func (netTimeout) Error() string   { return "broken" }
func (netTimeout) Timeout() bool   { return true }
func (netTimeout) Temporary() bool { return true }

// A packet that cannot be sent again does not keep records written meanwhile from being sent.
func TestFailedRetransmissionHoldsUpNoRecords(t *testing.T) {
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
		conn.Deliver(&nats.Msg{Subject: w.session.reply(), Data: testPacketFlags(0, 9, 0, Frame{Type: FrameCredit, Flags: flags,
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

// faultOnce makes a client whose first publish waits for release and then fails.
func faultOnce(t *testing.T) (conn *recorder, c *Client, busy, release chan struct{}) {
	busy, release = make(chan struct{}), make(chan struct{})
	conn = newRecorder(func(n int, _ []byte) error {
		if n > 0 {
			return nil
		}
		close(busy)
		<-release
		return errFaulty
	})
	return conn, fakeClient(t, conn.Conn, ClientParams{}), busy, release
}

// A publish that failed and then succeeded, before anybody asked, is no reason for Close to fail.
func TestCloseSucceedsAfterRepeatedPublish(t *testing.T) {
	conn, c, busy, release := faultOnce(t)
	w := c.NewWriter(consumerSubject(5))
	if _, err := w.Write([]byte("a")); err != nil {
		t.Fatal(err)
	}
	<-busy
	if _, err := w.Write([]byte("b")); err != nil { // has opened the next packet, so that the next Write is a short one
		t.Fatal(err)
	}
	close(release)
	until(t, "the publish failed", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.publishError != nil
	})
	if _, err := w.Write([]byte("c")); err != nil {
		t.Fatal(err)
	}
	until(t, "all was published", func() bool { return len(conn.sent()) == 2 && w.sender.published.Load() == 2 })
	if err := w.Flush(); err != nil {
		t.Errorf("Flush: %v", err)
	}
	if err := w.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	frames := conn.frames(t)
	if len(frames) != 4 || frames[3].Type != FrameClose || frames[3].Code != CloseNormalClosure {
		t.Fatalf("%d frames were published: %v", len(frames), frames)
	}
	for i, want := range []string{"a", "b", "c"} {
		if got := string(frames[i].Payload); got != want {
			t.Errorf("record %d is %q, want %q", i, got, want)
		}
	}
}

// A large record of which nothing was sent, because an earlier packet could not be, has not cut the stream off.
func TestLargeRecordNotBegunDoesNotCutTheStreamOff(t *testing.T) {
	conn, c, busy, release := faultOnce(t)
	w := c.NewWriter(consumerSubject(0)) // one packet
	if _, err := w.Write([]byte("a")); err != nil {
		t.Fatal(err)
	}
	<-busy
	large := bytes.Repeat([]byte("large"), 200_000)
	written := make(chan error, 1)
	go func() { _, err := w.Write(large); written <- err }()
	until(t, "the record waits for credit", w.waiting.Load)
	close(release)
	if err := <-written; !errors.Is(err, errFaulty) {
		t.Fatalf("Write: %v", err)
	}
	if err := context.Cause(w.Context()); err != nil {
		t.Fatalf("the stream ended: %v", err)
	}
	if err := w.Flush(); err != nil { // the first packet, again
		t.Fatalf("Flush: %v", err)
	}
	acknowledge := func() {
		credit := Frame{Type: FrameCredit, Payload: AppendCredit(nil, Credit{Ack: w.sender.published.Load(), Packets: 99, Bytes: 1 << 40})}
		conn.Deliver(&nats.Msg{Subject: w.session.reply(), Data: testPacketFlags(0, 9, 0, credit)})
	}
	acknowledge()
	closed := make(chan error, 1)
	go func() {
		_, err := w.Write(large)
		closed <- errors.Join(err, w.Close())
	}()
	until(t, "the record is written and the writer closed", func() bool {
		acknowledge()
		return len(closed) > 0
	})
	if err := <-closed; err != nil {
		t.Fatalf("Write, again, and Close: %v", err)
	}
	var got []byte
	frames := conn.frames(t)
	for _, f := range frames[1 : len(frames)-1] {
		got = append(got, f.Payload...)
	}
	if string(frames[0].Payload) != "a" || !bytes.Equal(got, large) || frames[len(frames)-1].Type != FrameClose {
		t.Errorf("%d frames were published, %d bytes of the large record", len(frames), len(got))
	}
}

// All calls return when their stream ends, also while the connection takes no bytes.
func TestCallsReturnBesideAStuckPublish(t *testing.T) {
	c, conn, stick, release := stuckOutbox(t)
	ctx, cancel := context.WithCancel(t.Context())
	s, err := c.Open(ctx, "x", nil)
	if err != nil {
		t.Fatal(err)
	}
	conn.Deliver(&nats.Msg{Subject: s.session.reply(), Reply: consumerSubject(5), Data: testPacketFlags(0, 8, 0, Frame{Type: FramePing})})
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

func TestRefusalIsAttributedToItsRequest(t *testing.T) {
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

// The memory for requests and refusals is bounded.
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
func TestRefusalOfAMappedSubjectEndsOneStream(t *testing.T) {
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
		m.conn.DenyPublish(over.session.reply())
		time.Sleep(10 * time.Second)
		if ended(waits) || ended(after) {
			t.Error("a stream ended that a refusal was not about")
		}
		_, _ = waits.Close(), after.Close()
		exchange()
	})
}

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
				s.out.peer, s.out.subject = "", subject()
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

// Streams do not wait for all refused requests and refused publishes that are there: the outbox does a few of them, and
// then serves the streams that have something to send.
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

// The queue of requests to refuse is bounded by number and by bytes.
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

// However many streams wait for a slow peer, each waits, has its turn or leaves with a constant amount of work, and
// they have their turns in order.
func TestWaitingStreamsTakeTurnsInConstantWork(t *testing.T) {
	const n = 10_000
	random := rand.New(rand.NewPCG(1, 2))
	for name, leavers := range map[string][]int{
		"none leaves":         nil,
		"half, newest first":  lastFirst(n)[:n/2],
		"all, newest first":   lastFirst(n),
		"half, in any order":  random.Perm(n)[:n/2],
		"all but the oldest":  lastFirst(n)[:n-1],
		"nearly all, any way": random.Perm(n)[:n-n/100],
	} {
		t.Run(name, func(t *testing.T) {
			ep := &endpoint{started: time.Now()}
			ep.outbox.init(ep)
			o := &ep.outbox
			all := make([]*session, n)
			for i := range all {
				all[i] = waitingSession(ep)
			}
			l := all[0].out.line
			l.turn = all[0] // so that nobody has a turn while the others leave
			for _, i := range leavers {
				o.leaveLine(all[i], 0)
				l.turn = all[0]
			}
			if got, want := l.waits(), n-len(leavers); got != want {
				t.Fatalf("%d wait, want %d", got, want)
			}
			work := l.turns.others.Pushed()
			for _, s := range all {
				if s.out.line == nil {
					continue
				}
				if next := l.next(); next != s {
					t.Fatal("a stream had its turn before one that has waited longer")
				}
			}
			if l.waits() != 0 {
				t.Errorf("%d still wait", l.waits())
			}
			if work > 3*n {
				t.Errorf("sessions were queued %d times for %d that waited", work, n)
			}
		})
	}
}

// waitingSession returns a session that has much to send and waits for the line to its peer.
func waitingSession(ep *endpoint) *session {
	snd := new(sender)
	snd.unacked.queue = new(packet)
	s := &session{ep: ep, role: lifecycle.Writer, out: outboxState{peer: "peer.x"}}
	s.send.Store(snd)
	ep.outbox.wait(ep.outbox.lineOf(s), s)
	return s
}

// Sealed packets reach the outbox in the order in which they were sealed, also while the outbox takes some of them.
func TestSealedPacketsAreTakenInOrder(t *testing.T) {
	const n = 10_000
	var ready readyPackets
	var writer sync.WaitGroup
	writer.Go(func() {
		for i := range n {
			ready.push(&packet{enveloped: int32(i)})
			if i%7 == 0 {
				runtime.Gosched()
			}
		}
	})
	next := int32(0)
	for next < n {
		for p := ready.take(); p != nil; p = p.next {
			if p.enveloped != next {
				t.Fatalf("packet %d was taken after packet %d", p.enveloped, next-1)
			}
			next++
		}
		runtime.Gosched()
	}
	writer.Wait()
	if !ready.empty() {
		t.Error("a packet is left after all were taken")
	}
}

// lastFirst returns the numbers below n, the greatest first.
func lastFirst(n int) []int {
	all := make([]int, n)
	for i := range all {
		all[i] = n - 1 - i
	}
	return all
}

// A line keeps nothing for streams that have left it while others wait.
func TestStreamsThatLeftALineAreForgotten(t *testing.T) {
	ep := &endpoint{started: time.Now()}
	ep.outbox.init(ep)
	o := &ep.outbox
	first := waitingSession(ep)
	l := first.out.line
	l.turn = first
	for i := range 10_000 {
		o.leaveLine(waitingSession(ep), 0)
		if q := l.turns.others.Len(); q > 3 {
			t.Fatalf("after %d streams that left, the queue holds %d", i, q)
		}
	}
	l.turn = nil
	l.next()
	o.tickLines(ep.now())
	if l.turns != nil {
		t.Error("a line that nobody waits for keeps its queues")
	}
}

// Builds that overwrite memory do so with packets that come back to the pool, and other builds do not.
func TestPacketsThatComeBackAreOverwritten(t *testing.T) {
	p := getPacket(100)
	buf := p.buf[:cap(p.buf)]
	copy(buf, "record")
	putPacket(p)
	if overwritten := buf[0] == poison.Byte && !bytes.Contains(buf[:packetClasses[0]], []byte("cord")); overwritten != poison.Enabled {
		t.Errorf("overwritten %v, in a build with poison %v", overwritten, poison.Enabled)
	}
}

// A small packet fills its size class, and its buffer begins with a cache line.
func TestSmallPacketFitsItsSizeClass(t *testing.T) {
	if unsafe.Sizeof(uintptr(0)) != 8 {
		return // the fields have other sizes
	}
	var p smallPacket
	if size, buffer := unsafe.Sizeof(p), unsafe.Offsetof(p.bytes); size != 256 || buffer != 64 {
		t.Errorf("a small packet has %d bytes, and its buffer begins at %d", size, buffer)
	}
}

// ahead returns a writer that has written one empty record. Its outbox stands still in the publish of that record until
// the test calls release. The channel gets each message that the outbox publishes.
func ahead(t *testing.T) (w *Writer, conn *fake.Conn, release func(), messages chan nats.Msg) {
	t.Helper()
	conn = fake.New()
	begun, goOn := make(chan struct{}, 1), make(chan struct{})
	messages = make(chan nats.Msg, 100)
	conn.Published = func(to, _ string, data []byte) error {
		select {
		case begun <- struct{}{}:
			<-goOn
		default:
		}
		messages <- nats.Msg{Subject: to, Data: bytes.Clone(data)}
		return nil
	}
	c := fakeClient(t, conn, ClientParams{})
	w = c.NewWriter("_SINBOX.ahead." + string(AppendToken(nil, Token{LogPackets: 8, LogBytes: 24, ID: 1})))
	w.packetSize.Store(2 * coalesceSize) // as if the line were fast
	release = sync.OnceFunc(func() { close(goOn) })
	t.Cleanup(release)
	if _, err := w.Write(nil); err != nil {
		t.Fatal(err)
	}
	<-begun
	return w, conn, release, messages
}

// records returns the lengths of the records in a packet, and the padding behind them.
func records(t *testing.T, packet []byte) (lengths []int, padding []byte) {
	t.Helper()
	_, rest, err := ParsePacketHeader(packet)
	for len(rest) > 0 && err == nil {
		var f Frame
		if f, rest, err = ParseFrame(rest); f.Type == FrameData {
			lengths = append(lengths, len(f.Payload))
		} else if f.Type == framePadding && len(rest) == 0 {
			padding = f.Payload
		} else {
			t.Fatalf("%v", f)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return lengths, padding
}

// A full packet of small records has the length that makes its message, with the command, 32 KiB: reads of the server do
// not cut it. The padding is zero, and has no bytes of other streams. Totals do not count it.
func TestFullPacketsEndWhereReadsOfTheServerEnd(t *testing.T) {
	for _, size := range []int{0, 1, 7, 16, 100, 128, 777, 1000, 1024, 1290} {
		w, _, release, messages := ahead(t)
		record, n := bytes.Repeat([]byte{0xab}, size), uint64(1)
		for written := 0; written < coalesceSize+4096; written += FrameHeaderSize + size {
			if _, err := w.Write(record); err != nil {
				t.Fatal(err)
			}
			n++
		}
		if got := w.Totals(); got.RecordsOut != n || got.BytesOut != (n-1)*uint64(size) {
			t.Errorf("%d records of %d bytes were written, and counted as %+v", n, size, got)
		}
		release()
		<-messages // the first record
		full := <-messages
		if n := len(fmt.Sprintf("PUB %s %d\r\n\r\n", full.Subject, len(full.Data))) + len(full.Data); n != alignedSize {
			t.Errorf("records of %d bytes: the message of a full packet has %d bytes", size, n)
		}
		if _, padding := records(t, full.Data); padding == nil || len(bytes.Trim(padding, "\x00")) != 0 {
			t.Errorf("records of %d bytes: a full packet ends with %q", size, padding)
		}
	}
}

// A packet that the outbox takes while an object is encoded behind it gets no padding: the bytes there are the object's.
func TestPaddingLeavesTheEncoderItsBytes(t *testing.T) {
	w, _, release, messages := ahead(t)
	if _, err := w.Write(make([]byte, 31_800)); err != nil {
		t.Fatal(err)
	}
	object := bytes.Repeat([]byte("o"), 400)
	_, err := w.WriteAppend(func(dst []byte) ([]byte, error) {
		dst = append(dst, object[:200]...)
		w.mu.Lock()
		w.sealOpenLocked() // as the outbox does
		w.mu.Unlock()
		return append(dst, object[200:]...), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	release()
	<-messages // the first record
	if lengths, padding := records(t, (<-messages).Data); len(lengths) != 1 || padding != nil {
		t.Errorf("a packet of records with %d bytes has a padding of %d", lengths, len(padding))
	}
	if m := <-messages; !bytes.HasSuffix(m.Data, object) {
		t.Errorf("the object became %q", m.Data[PacketHeaderSize:])
	}
}

// A packet is not padded beyond max_payload. It loses its padding if max_payload shrinks before it is published.
func TestPaddingHeedsMaxPayload(t *testing.T) {
	for _, max := range []int64{31_900, 32_000, 32_500, 32_700} {
		for _, late := range []bool{false, true} {
			w, conn, release, messages := ahead(t)
			shrink := func() {
				conn.SetMaxPayload(max)
				if !late {
					w.session.ep.maxPayload.Store(max)
				}
			}
			if !late {
				shrink()
			}
			n, size := 0, 31_600
			for n < 2 {
				if _, err := w.Write(make([]byte, size)); err != nil {
					t.Fatal(err)
				}
				n++
			}
			if late {
				shrink()
			}
			w.mu.Lock()
			sealed := w.sealedBytes
			w.mu.Unlock()
			if want := uint64(2*(PacketHeaderSize+FrameHeaderSize) + size); !late && sealed != want {
				t.Errorf("max_payload %d: the first two packets have %d bytes, want %d", max, sealed, want)
			}
			release()
			<-messages
			m := <-messages
			lengths, padding := records(t, m.Data)
			if int64(len(m.Data)) > max || len(lengths) != 1 || lengths[0] != size || padding != nil {
				t.Errorf("max_payload %d, shrunk late: %v: a packet of %d bytes with records of %d, padding of %d", max, late, len(m.Data), lengths, len(padding))
			}
		}
	}
}

// A record that is written while the outbox sleeps is published by the goroutine that writes it. If the connection does
// not take it at once, the outbox publishes it.
func TestWriterPublishesWhileTheOutboxSleeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		got := make(chan string, 1)
		m.handle(t, "x", func(_ *Writer, r *Request) error {
			for {
				p, err := r.Recv()
				if err != nil {
					return nil // the end, which the test looks at
				}
				got <- string(p)
			}
		})
		var takes, writing bool // not atomic: this goroutine publishes itself
		direct := 0
		m.conn.Now = func(string, []byte) (sent, rest bool) {
			if !writing {
				t.Error("another goroutine than the writer's published")
			}
			direct++
			return takes, false
		}
		st := m.open(t, "x")
		write := func(record string) {
			t.Helper()
			time.Sleep(time.Millisecond) // the outbox sleeps
			writing = true
			if _, err := st.Write([]byte(record)); err != nil {
				t.Fatal(err)
			}
			writing = false
			if p := <-got; p != record {
				t.Fatalf("got %q, want %q", p, record)
			}
		}
		write("first") // by the outbox, because it also says where this end receives
		write(strings.Repeat("x", 1000))
		for i, now := range []bool{true, true, false, true, false, false, true} {
			takes, direct = now, 0
			write(fmt.Sprint("record ", i))
			if direct != 1 {
				t.Errorf("record %d was published %d times by its writer", i, direct)
			}
		}
		direct = 0
		write(strings.Repeat("x", natsconn.MostNow))
		if direct != 0 {
			t.Error("a record that is too large for it was published at once")
		}
		finish(t, []*Stream{st})
	})
}

// Writers that publish in the place of the outbox and the outbox itself lose nothing, in whatever order they come, and
// the race detector finds none of them beside another.
func TestWritersAndTheOutboxTakeTurns(t *testing.T) {
	streams, records := 8, 1000
	if testing.Short() {
		records /= 10
	}
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "echo", func(w *Writer, r *Request) error {
			for {
				p, err := r.Recv()
				if err == io.EOF {
					return nil
				}
				if err == nil {
					_, err = w.Write(p)
				}
				if err != nil {
					return err
				}
			}
		})
		var number, direct atomic.Int64
		now := func(string, []byte) (sent, rest bool) {
			sent = number.Add(1)%4 != 0
			if sent {
				direct.Add(1)
			}
			return sent, sent && number.Load()%8 == 1
		}
		m.conn.Now, m.back.Now = now, now
		var messages atomic.Int64
		m.bus.SetFilter(func(_, _ *fake.Conn, msg *nats.Msg) bool { return !isSequenced(msg.Data) || messages.Add(1)%50 != 0 })
		var all sync.WaitGroup
		for i := range streams {
			st := m.open(t, "echo")
			all.Go(func() {
				random := rand.New(rand.NewPCG(1, uint64(i)))
				for n := range records {
					if _, err := st.Write(binary.BigEndian.AppendUint32(nil, uint32(n))); err != nil {
						t.Errorf("stream %d: Write: %v", i, err)
						return
					}
					time.Sleep(time.Duration(random.IntN(200)) * time.Microsecond)
				}
				if err := st.CloseSend(); err != nil {
					t.Errorf("stream %d: CloseSend: %v", i, err)
				}
			})
			all.Go(func() {
				n := uint32(0)
				for ; ; n++ {
					p, err := st.Recv()
					if err == io.EOF {
						break
					}
					if err != nil || len(p) != 4 || binary.BigEndian.Uint32(p) != n {
						t.Errorf("stream %d: record %d is %x, %v", i, n, p, err)
						return
					}
				}
				if n != uint32(records) {
					t.Errorf("stream %d: %d records, want %d", i, n, records)
				}
			})
		}
		all.Wait()
		if direct.Load() < int64(streams*records/10) {
			t.Errorf("writers published %d packets themselves", direct.Load())
		}
	})
}

// A visit needs a pause. After visits that no pause follows, ever more pauses pass without one, and visits that pauses
// follow make up for them.
func TestVisitsFollowPauses(t *testing.T) {
	const pause, none = visitPause, visitPause - 1
	for name, test := range map[string]struct {
		idle []int64 // before each record
		want string  // x for a visit
	}{
		"one record at a time":       {[]int64{pause, pause, pause, pause}, "xxxx"},
		"no pauses":                  {[]int64{none, none, none}, "---"},
		"a pause among many":         {[]int64{none, pause, none, none, none}, "-x---"},
		"a mistake":                  {[]int64{pause, none, pause, pause, pause}, "x--xx"},
		"two mistakes":               {[]int64{pause, none, pause, pause, none, pause, pause, pause, pause}, "x--x----x"},
		"a mistake that is forgiven": {[]int64{pause, none, pause, pause, pause, none, pause, pause}, "x--xx--x"},
	} {
		var v visits
		got := ""
		for _, idle := range test.idle {
			if v.due(idle) {
				v.judge = true
				got += "x"
			} else {
				got += "-"
			}
		}
		if got != test.want {
			t.Errorf("%s: %s, want %s", name, got, test.want)
		}
	}
	var v visits
	n := 0
	for range 10_000 {
		if v.due(pause) {
			v.judge = true
			n++
			v.due(none)
		}
	}
	if n > 200 {
		t.Errorf("%d visits in 10,000 pauses of a stream that writes on after each", n)
	}
}

// sealedTogether gives two streams each n sealed packets of 16 KiB while the connection is down, so that the outbox
// publishes them without a pause once up is called. prepare is called before the packets are written.
func sealedTogether(t *testing.T, n int, prepare func(*memoryPair, *Stream, *Stream)) (up func()) {
	t.Helper()
	const size = 16 << 10
	m := memoryTest(t, ClientParams{})
	begin := make(chan struct{})
	m.handle(t, "records", func(w *Writer, _ *Request) error {
		if _, err := w.Write(nil); err != nil { // the consumer is bound
			return err
		}
		<-begin
		for range n {
			if _, err := w.Write(make([]byte, size)); err != nil {
				return err
			}
		}
		return nil
	})
	a, b := m.open(t, "records"), m.open(t, "records")
	synctest.Wait()
	m.back.Set(nats.RECONNECTING)
	synctest.Wait()
	prepare(m, a, b)
	close(begin)
	synctest.Wait()
	return func() { m.back.Set(nats.CONNECTED) }
}

// Sealed packets share writes.
func TestSealedPacketsShareWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var writes []int
		var streams [2]*Stream
		up := sealedTogether(t, 12, func(m *memoryPair, a, b *Stream) {
			streams = [2]*Stream{a, b}
			m.back.Wrote = func(n int) { writes = append(writes, n) }
		})
		up()
		for _, s := range streams {
			if err := drain(s.Recv); err != nil {
				t.Error(err)
			}
		}
		synctest.Wait()
		if len(writes) == 0 || slices.Max(writes) < 2 { // flow control lets single packets go as well
			t.Errorf("writes with %v packets", writes)
		}
	})
}

// The outbox gives no packet back that the connection keeps for a write with others: not if the peer acknowledges it
// before it was sent, nor if its stream ends. The fake panics if such a packet changes, and a race build overwrites
// packets that are given back.
func TestPacketsAreNotReusedBeforeTheyAreSent(t *testing.T) {
	for name, frame := range map[string]func(seq uint32) Frame{
		"acknowledged": func(seq uint32) Frame {
			return Frame{Type: FrameCredit, Payload: AppendCredit(nil, Credit{Ack: seq + 1, Packets: 100, Bytes: 1 << 20})}
		},
		"reset": func(uint32) Frame { return Frame{Type: FrameReset, Code: CloseGoingAway} },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var forged atomic.Bool
				up := sealedTogether(t, 4, func(m *memoryPair, a, b *Stream) {
					m.back.Published = func(subject, _ string, data []byte) error {
						h, _, err := ParsePacketHeader(data)
						if err != nil || !isSequenced(data) || forged.Swap(true) {
							return nil
						}
						s := &a.session
						if subject == b.session.reply() {
							s = &b.session
						}
						control := AppendPacket(nil, PacketHeader{Sender: s.senderNumber}, frame(h.Seq))
						if err := m.conn.Publish(s.out.peer, "", control); err != nil {
							t.Error(err)
						}
						time.Sleep(time.Millisecond) // until the mux has it. The outbox takes it before its next packet
						return nil
					}
				})
				up()
				time.Sleep(time.Second)
				if !forged.Load() {
					t.Error("no packet was published")
				}
			})
		})
	}
}

// A packet that waits for others to share its write is sent before the outbox sleeps.
func TestKeptPacketsAreSentAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := newRecorder(nil)
		held := holding(conn.Conn)
		var wrote atomic.Int64
		conn.Wrote = func(n int) { wrote.Add(int64(n)) }
		c := fakeClient(t, conn.Conn, ClientParams{})
		var writers [2]*Writer
		for i := range writers {
			token := AppendToken(nil, Token{Codec: MsgPack, LogPackets: 8, LogBytes: 30, ID: uint64(i)})
			writers[i] = c.NewWriter(fmt.Sprintf("_SINBOX.peer%d.%s", i, token))
			if _, err := writers[i].Write(nil); err != nil { // a first packet has a reply subject, and waits for no other
				t.Fatal(err)
			}
		}
		synctest.Wait()
		held.together(c.ep, func() {
			if _, err := writers[0].Write([]byte("record")); err != nil {
				t.Error(err)
			}
			writers[1].session.mark(workWait) // has its turn next, and publishes nothing
		})
		if n := wrote.Load(); n != 1 {
			t.Errorf("%d packets were kept and sent, should be 1", n)
		}
	})
}
