package stream

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/natsconn/fake"
)

// until fails the test at once if ok does not become true in time.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(100 * time.Microsecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// consumerSubject is the reply subject of a consumer that grants 2^logPackets packets and 2^30 bytes.
func consumerSubject(logPackets uint8) string {
	return "x." + string(AppendToken(nil, Token{Codec: MsgPack, LogPackets: logPackets, LogBytes: 30, ID: 1}))
}

// recorder is a connection that keeps what is published, and whose publish waits, or fails, as a test wants.
type recorder struct {
	*fake.Conn
	mu       sync.Mutex
	messages []nats.Msg
	fail     func(n int, data []byte) error // of the nth attempt
	attempts int
}

func newRecorder(fail func(n int, data []byte) error) *recorder {
	r := &recorder{Conn: fake.New(), fail: fail}
	r.Requested = func(*nats.Msg) error { return nil }
	r.Published = func(subject, reply string, data []byte) error {
		r.mu.Lock()
		n := r.attempts
		r.attempts++
		r.mu.Unlock()
		if r.fail != nil {
			if err := r.fail(n, data); err != nil {
				return err
			}
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		r.messages = append(r.messages, nats.Msg{Subject: subject, Reply: reply, Data: bytes.Clone(data)})
		return nil
	}
	return r
}

func (r *recorder) sent() []nats.Msg {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.messages[:len(r.messages):len(r.messages)]
}

// frames returns the frames in the messages, which are packets.
func (r *recorder) frames(t *testing.T) (frames []Frame) {
	t.Helper()
	for _, m := range r.sent() {
		_, body, err := ParsePacketHeader(m.Data)
		for len(body) > 0 && err == nil {
			var f Frame
			if f, body, err = ParseFrame(body); err == nil {
				frames = append(frames, f)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return frames
}

// A CREDIT that was lost with the connection would leave the producer waiting for ever: it is said again.
func TestReconnectRepeatsCredit(t *testing.T) {
	ep, conn := newFlakyEndpoint(t)
	c := &Client{ep: ep, codec: MsgPack}
	s, err := c.Open(t.Context(), "x", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const producer = "producer"
	ep.receive(&nats.Msg{Subject: s.session.reply, Reply: producer, Data: testPacketFlags(PacketSeq|PacketAck, 9, 0, testData(strings.Repeat("x", initialWindow)))})
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	read := make(chan error)
	go func() { _, err := s.Recv(); read <- err }() // consumes the packet, and grants what it held
	until(t, "credit was given", func() bool {
		return conn.count(producer) > 0 && s.session.bucket.grantedBytes.Load() > initialWindow && s.session.pending.Load() == 0
	})
	for range 3 {
		conn.Set(nats.RECONNECTING)
		until(t, "the connection is down", func() bool { return !ep.outbox.up.Load() })
		before := conn.count(producer) // may have been in the connection's buffer
		conn.Set(nats.CONNECTED)
		until(t, "the credit was said again", func() bool { return conn.count(producer) > before })
	}
	_ = s.Close()
	if err := <-read; !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
}

// What a producer published last may be lost with the connection as well. It asks, so that the consumer answers or sees
// that packets are missing.
func TestReconnectAsksForCredit(t *testing.T) {
	ep, conn := newFlakyEndpoint(t)
	c := &Client{ep: ep, codec: MsgPack}
	used, unused := consumerSubject(5), "y"+consumerSubject(5)
	w, idle := c.NewWriter(used), c.NewWriter(unused)
	if _, err := w.Write([]byte("a")); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	conn.Set(nats.RECONNECTING)
	until(t, "the connection is down", func() bool { return !ep.outbox.up.Load() })
	before := conn.count(used)
	conn.Set(nats.CONNECTED)
	until(t, "the producer asked", func() bool { return conn.count(used) > before })
	until(t, "the writer that sent nothing said where it is", func() bool { return conn.count(unused) > 0 })
	for _, w := range []*Writer{w, idle} {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Where the mux is faster than the outbox, control packets are dropped and counted, as NATS may lose them, and streams go on:
// what they said is asked for.
func TestFullInboundRing(t *testing.T) {
	busy, idle := make(chan struct{}), make(chan struct{})
	conn := newRecorder(func(_ int, data []byte) error {
		if bytes.Contains(data, []byte("stuck")) {
			close(busy)
			<-idle
		}
		return nil
	})
	c := fakeClient(t, conn.Conn, ClientParams{})
	s, _ := muxStream(t, conn.Conn, c)
	var others []*Stream // as many as can fill the ring
	var fill []func([]byte)
	for range maxInbound / maxControls {
		other, deliver := muxStream(t, conn.Conn, c)
		others, fill = append(others, other), append(fill, deliver)
	}
	w, stuck := c.NewWriter(consumerSubject(5)), c.NewWriter("y"+consumerSubject(5))
	if _, err := w.Write([]byte("a")); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil { // it is registered
		t.Fatal(err)
	}
	if _, err := stuck.Write([]byte("stuck")); err != nil {
		t.Fatal(err)
	}
	<-busy
	ping := testPacketFlags(0, 7, 0, Frame{Type: FramePing})
	for _, deliver := range fill {
		for range maxControls {
			deliver(ping)
		}
	}
	if n := c.Stats().DroppedControl; n != 0 {
		t.Fatalf("%d control packets were dropped before the ring was full", n)
	}
	credit := testPacketFlags(0, 9, 0, Frame{Type: FrameCredit, Payload: AppendCredit(nil, Credit{Ack: 1, Packets: 99, Bytes: 1 << 40})})
	conn.Deliver(&nats.Msg{Subject: w.session.reply, Data: credit})
	conn.Deliver(&nats.Msg{Subject: s.session.reply, Reply: "producer", Data: testPacket(9, 0, testData("hi"))})
	if n := c.Stats().DroppedControl; n != 2 {
		t.Errorf("%d control packets were counted as dropped, want 2", n)
	}
	close(idle)

	if rec, err := s.Recv(); string(rec) != "hi" || err != nil {
		t.Errorf("%q, %v; want the record that arrived", rec, err)
	}
	until(t, "the writer asks", func() bool {
		for _, m := range conn.sent() {
			if m.Subject == w.subject && m.Reply != "" && bytes.Contains(m.Data, []byte{byte(FramePing), 0, 0, 0, 0, 0, 0, 0}) {
				return true
			}
		}
		return false
	})
	conn.Deliver(&nats.Msg{Subject: w.session.reply, Data: credit})
	conn.Deliver(&nats.Msg{Subject: s.session.reply, Reply: "producer", Data: testPacket(9, 1, testData("more"), Frame{Type: FrameClose, Code: CloseNormalClosure})})
	if rec, err := s.Recv(); string(rec) != "more" || err != nil {
		t.Errorf("%q, %v; want what came afterwards", rec, err)
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Errorf("the stream ended with %v", err)
	}
	if err := w.Sync(t.Context()); err != nil {
		t.Errorf("the writer did not hear that its packet arrived: %v", err)
	}
	for _, w := range []*Writer{w, stuck} {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
	for _, other := range others {
		_ = other.Close()
	}
}

// A message's header lies in the same memory as its data, and nobody bounds it. What waits to be read is a copy.
func TestHeaderIsNotKeptWithPayload(t *testing.T) {
	for name, payload := range map[string][]byte{
		"packet":   testPacket(7, 0, testData("hello")),
		"fallback": jsonwire.AppendData(nil, []byte("hello")),
	} {
		conn := fake.New()
		c := fakeClient(t, conn, ClientParams{})
		s, _ := muxStream(t, conn, c)
		memory := append(make([]byte, 1<<10), payload...) // as nats.go has it: the header, then the data
		conn.Deliver(&nats.Msg{Subject: s.session.reply, Header: nats.Header{"Large": {"header"}}, Data: memory[1<<10:]})
		clear(memory)
		if rec, err := s.Recv(); string(rec) != "hello" || err != nil {
			t.Errorf("%s: %q, %v: it lies in the memory of the header", name, rec, err)
		}
	}
}

// A writer whose client is closed while its first packet is under way: the token that the outbox has just given it is
// the outbox's to take back. The race detector says where that is not so.
func TestClientClosesDuringFirstLargeRecord(t *testing.T) {
	for range 3 {
		release := make(chan struct{})
		conn := newRecorder(func(int, []byte) error { <-release; return nil })
		c := fakeClient(t, conn.Conn, ClientParams{})
		w := c.NewWriter(consumerSubject(0)) // one packet, so the second piece waits
		written := make(chan error, 1)
		go func() { _, err := w.Write(make([]byte, 1<<20)); written <- err }()
		until(t, "the record waits for credit", w.waiting.Load)
		// The outbox registers the writer and then waits in publish. Any word from it would order the two.
		time.Sleep(5 * time.Millisecond)
		c.ep.cancel(ErrClientClosed) // as Close begins
		if err := <-written; !errors.Is(err, ErrClientClosed) {
			t.Errorf("Write: %v", err)
		}
		close(release)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if n := c.ep.sessions.Size(); n != 0 {
			t.Errorf("%d streams are left", n)
		}
	}
}

// Flush does not say that a record was handed to NATS which the end of the stream threw away.
func TestFlushAfterEnd(t *testing.T) {
	busy, idle := make(chan struct{}), make(chan struct{})
	conn := newRecorder(func(n int, _ []byte) error {
		if n == 0 {
			close(busy)
			<-idle
		}
		return nil
	})
	c := fakeClient(t, conn.Conn, ClientParams{})
	w := c.NewWriter(consumerSubject(5))
	if _, err := w.Write([]byte("a")); err != nil {
		t.Fatal(err)
	}
	<-busy
	if _, err := w.Write([]byte("lost")); err != nil {
		t.Fatal(err)
	}
	end := &CloseError{Code: CloseCanceled, Text: "enough"}
	reset := Frame{Type: FrameReset, Code: CloseCanceled, Payload: []byte("enough")}
	conn.Deliver(&nats.Msg{Subject: w.session.reply, Data: testPacketFlags(0, 9, 0, reset)})
	close(idle)
	until(t, "the writer has ended", func() bool { return w.Context().Err() != nil })
	until(t, "the outbox has let go of the record", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.open == nil
	})
	for range 2 {
		if err := w.Flush(); !errors.Is(err, end) {
			t.Errorf("Flush: %v, want %v", err, end)
		}
		if err := w.Close(); !errors.Is(err, end) {
			t.Errorf("Close: %v, want %v", err, end)
		}
	}
	if n := len(conn.sent()); n != 1 {
		t.Errorf("%d packets were published: %v", n, conn.sent())
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
func TestCloseAfterRepeatedPublish(t *testing.T) {
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
	until(t, "all was published", func() bool { return len(conn.sent()) == 2 && w.published.Load() == 2 })
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
func TestLargeRecordNotBegun(t *testing.T) {
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
		credit := Frame{Type: FrameCredit, Payload: AppendCredit(nil, Credit{Ack: w.published.Load(), Packets: 99, Bytes: 1 << 40})}
		conn.Deliver(&nats.Msg{Subject: w.session.reply, Data: testPacketFlags(0, 9, 0, credit)})
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

// A packet that the server no longer takes can never be sent. The stream says so, at both ends, and does not try again.
func TestPacketBeyondMaxPayload(t *testing.T) {
	conn := newRecorder(func(_ int, data []byte) error {
		if len(data) > 1000 {
			return nats.ErrMaxPayload
		}
		return nil
	})
	c := fakeClient(t, conn.Conn, ClientParams{})
	for name, subject := range map[string]string{"packets": consumerSubject(5), "fallback": "x.oldtoken"} {
		t.Run(name, func(t *testing.T) {
			w := c.NewWriter(subject)
			if _, err := w.Write([]byte("a")); err != nil {
				t.Fatal(err)
			}
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(make([]byte, 2000)); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := w.Flush(); !errors.Is(err, nats.ErrMaxPayload) {
					t.Errorf("Flush: %v", err)
				}
				if n, err := w.Write([]byte("b")); n != 0 || !errors.Is(err, nats.ErrMaxPayload) {
					t.Errorf("Write: %d, %v", n, err)
				}
				if err := w.Close(); !errors.Is(err, nats.ErrMaxPayload) {
					t.Errorf("Close: %v", err)
				}
			}
			var told CloseError
			until(t, "the consumer was told", func() bool {
				sent := conn.sent()
				last := sent[len(sent)-1].Data
				if last[0] != PacketMagic {
					var m StreamingMsg
					if err := json.Unmarshal(last, &m); err != nil || m.CloseError == nil {
						return false
					}
					told = *m.CloseError
					return true
				}
				f, _, err := ParseFrame(last[PacketHeaderSize:])
				if err != nil || f.Type != FrameReset {
					return false
				}
				told = CloseError{int(f.Code), string(f.Payload)}
				return true
			})
			if told.Code != CloseInternalServerErr || !strings.Contains(told.Text, "max_payload") {
				t.Errorf("the consumer was told %v", &told)
			}
		})
	}
}

// After Close, and after its context ended, a stream delivers nothing: also not the rest of a record that Read began.
func TestNoRestAfterEnd(t *testing.T) {
	reads := map[string]func(*Stream) (int, error){
		"Read": func(s *Stream) (int, error) { return s.Read(make([]byte, 10)) },
		"Recv": func(s *Stream) (int, error) { rec, err := s.Recv(); return len(rec), err },
		"RecvObject": func(s *Stream) (int, error) {
			var v any
			return 0, s.RecvObject(&v)
		},
		"WriteTo": func(s *Stream) (int, error) { n, err := s.WriteTo(io.Discard); return int(n), err },
	}
	for name, read := range reads {
		for _, payload := range [][]byte{testPacket(7, 0, testData("12")), jsonwire.AppendData(nil, []byte("12"))} {
			for _, how := range []string{"Close", "cancel"} {
				conn := fake.New()
				c := fakeClient(t, conn, ClientParams{})
				ctx, cancel := context.WithCancel(t.Context())
				s, err := c.Open(ctx, "x", nil)
				if err != nil {
					t.Fatal(err)
				}
				conn.Deliver(&nats.Msg{Subject: s.session.reply, Data: bytes.Clone(payload)})
				if n, err := s.Read(make([]byte, 1)); n != 1 || err != nil {
					t.Fatalf("Read: %d, %v", n, err)
				}
				want := ErrClosed
				if how == "Close" {
					_ = s.Close()
				} else {
					cancel()
					want = context.Canceled
				}
				for range 2 {
					if n, err := read(s); n != 0 || !errors.Is(err, want) {
						t.Errorf("%s after %s: %d bytes, %v; want %v", name, how, n, err, want)
					}
				}
				cancel()
				_ = s.Close()
			}
		}
	}
}

// Objects for a fallback consumer are bounded as all records are.
func TestFallbackObjectTooLarge(t *testing.T) {
	conn := newRecorder(nil)
	c := fakeClient(t, conn.Conn, ClientParams{MaxRecordSize: 10})
	w := c.NewWriter("x.oldtoken")
	for _, v := range []any{strings.Repeat("x", 9), strings.Repeat("x", 1000)} { // quoted, 11 bytes
		if n, err := w.WriteObject(v); n != 0 || !errors.Is(err, ErrRecordTooLarge) {
			t.Errorf("WriteObject: %d, %v; want ErrRecordTooLarge", n, err)
		}
	}
	if n, err := w.WriteObject(strings.Repeat("x", 8)); n != 10 || err != nil {
		t.Errorf("WriteObject of 10 bytes: %d, %v", n, err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	sent := conn.sent()
	if len(sent) != 2 || !bytes.Equal(sent[0].Data, jsonwire.AppendData(nil, []byte(`"xxxxxxxx"`))) {
		t.Errorf("%d messages, the first %q", len(sent), sent[0].Data)
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
	requests := make(chan *nats.Msg, 1)
	conn.Requested = func(m *nats.Msg) error { requests <- m; return nil }
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
	got := (<-requests).Header
	if values := got.Values("Key"); len(values) != 2 || values[0] != "one" || values[1] != "two" || got.Get("New") != "" {
		t.Errorf("the producer got the header %v", got)
	}
}

// Credit that is due before the outbox knows where the producer is goes out once it does: with a window of one packet
// both ends would wait for ever otherwise.
func TestCreditDueBeforePeerIsKnown(t *testing.T) {
	conn := newRecorder(nil)
	c := fakeClient(t, conn.Conn, ClientParams{})
	s, err := c.Open(t.Context(), "subject", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.session.mark(workCredit)
	until(t, "the outbox has served the mark", func() bool { return s.session.pending.Load() == 0 })
	data := Frame{Type: FrameData, Payload: []byte("a")}
	conn.Deliver(&nats.Msg{Subject: s.session.reply, Reply: "producer", Data: testPacketFlags(PacketSeq, 9, 0, data)})
	until(t, "credit was sent", func() bool {
		for _, m := range conn.sent() {
			if m.Subject == "producer" {
				return true
			}
		}
		return false
	})
}
