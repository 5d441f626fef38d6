package stream_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	natsserver "github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/internal/race"
	"github.com/natsstream/stream/streamtest"
)

func TestNewClientRefusesImpossibleParams(t *testing.T) {
	p := newPair(t)
	if c, err := stream.NewClient(stream.ClientParams{}); c != nil || !errors.Is(err, nats.ErrInvalidConnection) {
		t.Errorf("no connection: %v, %v", c, err)
	}
	for _, params := range []stream.ClientParams{
		{Codec: stream.MsgPack + 1}, {Window: -1}, {Window: smallestWindow - 1}, {MaxBuffered: -1}, {MaxBuffered: 1}, {MaxRecordSize: -1}, {FallbackBuffer: -1},
	} {
		params.Conn = p.consumer.Conn
		if c, err := stream.NewClient(params); c != nil || err == nil {
			t.Errorf("%+v: %v, %v", params, c, err)
		}
	}
	nc, err := p.server.Dial()
	if err != nil {
		t.Fatal(err)
	}
	nc.Close()
	if c, err := stream.NewClient(stream.ClientParams{Conn: nc}); c != nil || !errors.Is(err, nats.ErrConnectionClosed) {
		t.Errorf("closed connection: %v, %v", c, err)
	}
}

// A record that MaxBuffered has no room for never arrives, so such parameters are refused. The default of MaxRecordSize
// follows MaxBuffered down.
func TestMaxRecordSizeFitsIntoMaxBuffered(t *testing.T) {
	const packet = 256 << 10
	p := newPair(t)
	for _, c := range []struct {
		buffered, record int
		largest          int // 0 if refused
	}{
		{0, 0, 16 << 20},
		{0, 64 << 20, 64 << 20},
		{0, 64<<20 + 1, 0},
		{0, 100 << 20, 0},
		{1 << 20, 1 << 20, 1 << 20},
		{1 << 20, 1<<20 + 1, 0},
		{1 << 20, 16 << 20, 0},
		{1 << 20, 0, 1 << 20},
		{200 << 20, 100 << 20, 100 << 20},
		{200 << 20, 0, 16 << 20},
		{smallestWindow, 0, packet},
		{smallestWindow, packet, packet},
		{smallestWindow, packet + 1, 0},
	} {
		client, err := stream.NewClient(stream.ClientParams{Conn: p.consumer.Conn, MaxBuffered: c.buffered, MaxRecordSize: c.record})
		server, serverErr := stream.NewServer(stream.ServerParams{Conn: p.producer.Conn, MaxBuffered: c.buffered, MaxRecordSize: c.record})
		for _, err := range []error{err, serverErr} {
			if (err == nil) != (c.largest > 0) {
				t.Errorf("MaxBuffered %d, MaxRecordSize %d: %v", c.buffered, c.record, err)
			}
			if err != nil && (!strings.Contains(err.Error(), "MaxRecordSize") || !strings.Contains(err.Error(), "raise MaxBuffered")) {
				t.Errorf("%v: it does not say what to do", err)
			}
		}
		if err == nil {
			w := client.NewWriter(nats.NewInbox())
			if _, err := w.Write(make([]byte, c.largest+1)); !errors.Is(err, stream.ErrRecordTooLarge) ||
				!strings.HasSuffix(err.Error(), fmt.Sprintf("MaxRecordSize is %d", c.largest)) {
				t.Errorf("MaxBuffered %d, MaxRecordSize %d: %v; want %d", c.buffered, c.record, err, c.largest)
			}
			client.Close()
		}
		if serverErr == nil {
			server.Close()
		}
	}
}

// An argument that is nil is named by the error, which matches that of nats.go.
func TestNilArgumentsAreNamedByErrors(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	var none context.Context
	_, noClientConn := stream.NewClient(stream.ClientParams{})
	_, noServerConn := stream.NewServer(stream.ServerParams{})
	_, noClient := stream.NewWriter(nil, "x").Write(nil)
	_, noOpen := p.consumer.Open(none, "x", nil)
	w, st := newWriterStream(t, p)
	noSync := w.Sync(none)
	for name, c := range map[string]struct{ err, is error }{
		"ClientParams.Conn": {noClientConn, nats.ErrInvalidConnection},
		"ServerParams.Conn": {noServerConn, nats.ErrInvalidConnection},
		"NewWriter":         {noClient, nats.ErrInvalidConnection},
		"Open":              {noOpen, nats.ErrInvalidContext},
		"Sync":              {noSync, nats.ErrInvalidContext},
		"Server.Drain":      {s.Drain(none), nats.ErrInvalidContext},
	} {
		if !errors.Is(c.err, c.is) || !strings.Contains(c.err.Error(), name) {
			t.Errorf("%s: %v", name, c.err)
		}
	}
	closeWriter(t, w)
	wantEOF(t, st)
}

// drain makes a connection drain until the test ends.
func drain(t *testing.T, p *pair, nc *nats.Conn) {
	t.Helper()
	entered, leave := make(chan struct{}), make(chan struct{})
	if _, err := nc.Subscribe("drain", func(*nats.Msg) {
		close(entered)
		<-leave
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { close(leave) })
	if err := nc.Publish("drain", nil); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the message", func() { <-entered })
	if err := nc.Drain(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the connection drains", nc.IsDraining)
}

func TestOpenFailsForImpossibleRequests(t *testing.T) {
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	cause := errors.New("because")
	caused, cancelCause := context.WithCancelCause(context.Background())
	cancelCause(cause)
	late, cancelLate := context.WithDeadline(context.Background(), time.Unix(0, 0))
	defer cancelLate()
	fine := context.Background()

	p := newPair(t, pairOptions{server: []streamtest.Option{streamtest.WithMaxPayload(8 << 10)}})
	closed := p.newClient(t, stream.ClientParams{})
	closed.Conn.Close()
	draining := p.newClient(t, stream.ClientParams{})
	drain(t, p, draining.Conn)
	for c, want := range map[*stream.Client]error{closed: nats.ErrConnectionClosed, draining: nats.ErrConnectionDraining} {
		eventually(t, "the client notices", func() bool { // an Open just after Close or Drain may succeed
			s, err := c.Open(fine, "_.early", nil)
			if s != nil {
				s.Close()
			}
			return errors.Is(err, want) && c.Stats().Streams == 0
		})
	}
	done := p.newClient(t, stream.ClientParams{})
	if err := done.Close(); err != nil {
		t.Fatal(err)
	}
	large := nats.Header{"Large": {strings.Repeat("x", 9<<10)}}

	serve(t, p, ">", func(w *stream.Writer, req *nats.Msg) {
		if !strings.HasPrefix(req.Subject, "_") {
			t.Errorf("a request was sent to %s", req.Subject)
		}
	})
	for _, tt := range []struct {
		name   string
		client *stream.Client
		ctx    context.Context
		msg    nats.Msg
		want   error
	}{
		{"nil context", p.consumer, nil, nats.Msg{Subject: "a"}, nats.ErrInvalidContext},
		{"ended context", p.consumer, ended, nats.Msg{Subject: "a"}, context.Canceled},
		{"ended context, canceled", p.consumer, caused, nats.Msg{Subject: "a"}, context.Canceled},
		{"ended context, its cause", p.consumer, caused, nats.Msg{Subject: "a"}, cause},
		{"passed deadline", p.consumer, late, nats.Msg{Subject: "a"}, context.DeadlineExceeded},
		{"no subject", p.consumer, fine, nats.Msg{}, nats.ErrBadSubject},
		{"space", p.consumer, fine, nats.Msg{Subject: "a b"}, nats.ErrBadSubject},
		{"line break", p.consumer, fine, nats.Msg{Subject: "a\r\nPUB b 0\r\n"}, nats.ErrBadSubject},
		{"empty token", p.consumer, fine, nats.Msg{Subject: "a..b"}, nats.ErrBadSubject},
		{"leading dot", p.consumer, fine, nats.Msg{Subject: ".a"}, nats.ErrBadSubject},
		{"trailing dot", p.consumer, fine, nats.Msg{Subject: "a."}, nats.ErrBadSubject},
		{"star", p.consumer, fine, nats.Msg{Subject: "a.*"}, nats.ErrBadSubject},
		{"all", p.consumer, fine, nats.Msg{Subject: ">"}, nats.ErrBadSubject},
		{"large request", p.consumer, fine, nats.Msg{Subject: "a", Data: make([]byte, 8<<10+1)}, nats.ErrMaxPayload},
		{"large with its header", p.consumer, fine, nats.Msg{Subject: "a", Data: make([]byte, 8<<10)}, nats.ErrMaxPayload},
		{"large header", p.consumer, fine, nats.Msg{Subject: "a", Header: large}, nats.ErrMaxPayload},
		{"closed connection", closed, fine, nats.Msg{Subject: "a"}, nats.ErrConnectionClosed},
		{"draining connection", draining, fine, nats.Msg{Subject: "a"}, nats.ErrConnectionDraining},
		{"closed client", done, fine, nats.Msg{Subject: "a"}, stream.ErrClientClosed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if s, err := tt.client.OpenMsg(tt.ctx, &tt.msg); s != nil || !errors.Is(err, tt.want) {
				t.Errorf("OpenMsg: %v; want %v", err, tt.want)
				if s != nil {
					s.Close()
				}
			}
			if tt.msg.Header == nil {
				if s, err := tt.client.Open(tt.ctx, tt.msg.Subject, tt.msg.Data); s != nil || !errors.Is(err, tt.want) {
					t.Errorf("Open: %v; want %v", err, tt.want)
					if s != nil {
						s.Close()
					}
				}
				if ch, err := tt.client.OpenStream(tt.ctx, tt.msg.Subject, tt.msg.Data); ch != nil || !errors.Is(err, tt.want) {
					t.Errorf("OpenStream: %v; want %v", err, tt.want)
				}
			}
			if s := tt.client.Stats(); s.Streams != 0 || s.Reserved != 0 {
				t.Errorf("kept: %+v", s)
			}
		})
	}
	if s, err := p.consumer.OpenMsg(fine, nil); s != nil || !errors.Is(err, nats.ErrInvalidMsg) {
		t.Errorf("OpenMsg(nil): %v, %v", s, err)
	}
	if err := p.consumer.Conn.Flush(); err != nil { // nothing was published behind the errors
		t.Fatal(err)
	}
}

func TestOpenFailsAtOnceWithoutResponders(t *testing.T) {
	p := newPair(t)
	s := open(t, p.consumer, "nobody")
	for range 2 {
		if rec, err := s.Recv(); rec != nil || !errors.Is(err, nats.ErrNoResponders) {
			t.Errorf("Recv: %q, %v", rec, err)
		}
	}
	if err := context.Cause(s.Context()); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("the context's cause: %v", err)
	}
}

// The message of NATS that nobody receives a request, or a packet, ends a stream before its first packet has arrived.
func TestNoRespondersCountsBeforeTheFirstPacketOnly(t *testing.T) {
	p := newPair(t, pairOptions{producer: stream.ClientParams{ResumeTimeout: 100 * time.Millisecond}})
	t.Run("consumer", func(t *testing.T) {
		// After the first packet it is about another end, for example another member of a queue.
		for name, first := range map[string][]byte{
			"packets":  rawPacket(stream.PacketSeq, 7, 0, rawData("hello")),
			"control":  rawPacket(0, 7, 0, rawPing()),
			"fallback": fallbackFixture(t, "data"),
		} {
			s, reply, nc := rawStream(t, p)
			rawPublish(t, nc, reply, first)
			if err := nc.PublishMsg(&nats.Msg{Subject: reply, Header: nats.Header{"Status": {"503"}}}); err != nil {
				t.Fatal(err)
			}
			want := 1
			switch name {
			case "packets":
				rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 7, 1, rawClose(1000)))
			case "control":
				rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 7, 0, rawClose(1000)))
				want = 0
			case "fallback":
				rawPublish(t, nc, reply, fallbackFixture(t, "close_normal"))
			}
			if got, err := readAll(s); len(got) != want || err != io.EOF {
				t.Errorf("%s: %q, %v", name, got, err)
			}
		}
	})
	t.Run("producer", func(t *testing.T) {
		// The consumer is gone before the first packet: its server says so, and it does not come back.
		w := p.producer.NewWriter(rawInbox())
		write(t, w, []byte("hello"))
		waitFor(t, "the writer's end", func() { <-w.Context().Done() })
		if _, err := w.Write([]byte("more")); !errors.Is(err, nats.ErrNoResponders) {
			t.Errorf("Write: %v, want nats.ErrNoResponders", err)
		}
		if err := w.Close(); !errors.Is(err, nats.ErrNoResponders) {
			t.Errorf("Close: %v, want nats.ErrNoResponders", err)
		}
	})
}

func TestOpenMsgSendsHeaderAndData(t *testing.T) {
	p := newPair(t)
	serve(t, p, "headers", func(w *stream.Writer, req *nats.Msg) {
		write(t, w, []byte(strings.Join(req.Header["X-Two"], ",")), req.Data, []byte(req.Reply))
		closeWriter(t, w)
	})
	msg := &nats.Msg{Subject: "headers", Reply: "unused", Data: []byte("data"), Header: nats.Header{"X-Two": {"a", "b"}}}
	s, err := p.consumer.OpenMsg(testContext(t), msg)
	if err != nil {
		t.Fatal(err)
	}
	if len(msg.Header) != 1 || len(msg.Header["X-Two"]) != 2 || msg.Reply != "unused" || string(msg.Data) != "data" {
		t.Errorf("the message was changed: %+v", msg)
	}
	got, err := readAll(s)
	if err != io.EOF || len(got) != 3 {
		t.Fatalf("%q, %v", got, err)
	}
	if string(got[0]) != "a,b" || string(got[1]) != "data" || !strings.HasPrefix(string(got[2]), "_SINBOX.") {
		t.Errorf("the producer got %q", got)
	}
}

// The request is the caller's again as soon as Open returns.
func TestOpenCopiesRequest(t *testing.T) {
	p := newPair(t)
	serve(t, p, "echo", func(w *stream.Writer, req *nats.Msg) {
		write(t, w, req.Data)
		closeWriter(t, w)
	})
	data := make([]byte, 8)
	for i := range scaled(1000) {
		binary.BigEndian.PutUint64(data, uint64(i))
		s, err := p.consumer.Open(testContext(t), "echo", data)
		if err != nil {
			t.Fatal(err)
		}
		clear(data)
		rec, err := s.Recv()
		if err != nil || binary.BigEndian.Uint64(rec) != uint64(i) {
			t.Fatalf("%x, %v; want %x", rec, err, i)
		}
		wantEOF(t, s)
	}
}

// A client that is made before the first connect refuses nothing, and its streams begin with the connection.
func TestOpenWorksBeforeTheFirstConnect(t *testing.T) {
	checkLeaks(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	_ = l.Close()
	nc, err := nats.Connect(fmt.Sprintf("nats://127.0.0.1:%d", port), nats.RetryOnFailedConnect(true), nats.MaxReconnects(-1), nats.ReconnectWait(10*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	server, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if _, err := server.Handle("echo", func(w *stream.Writer, r *stream.Request) error {
		if _, err := w.Write(r.Data); err != nil {
			return err
		}
		_, err := io.Copy(w, r)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	c, err := stream.NewClient(stream.ClientParams{Conn: nc})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	data := testRecord(1, 100_000)
	s, err := c.Open(testContext(t), "echo", data)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	streamtest.Run(t, streamtest.WithOptions(func(o *natsserver.Options) { o.Port = port }))
	if rec, err := s.Recv(); err != nil || !bytes.Equal(rec, data) {
		t.Errorf("%d bytes, %v", len(rec), err)
	}
}

// Header of a stream that was refused returns the error that Recv returns.
func TestHeaderOfRefusedStreamReturnsItsError(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	no := &stream.CloseError{Code: 4321, Text: "no"}
	s.handle(t, "refuses", func(*stream.Writer, *stream.Request) error { return no })
	s.handle(t, "refuses-with-trailers", func(w *stream.Writer, _ *stream.Request) error {
		if err := w.SetTrailer(nats.Header{"T": {"x"}}); err != nil {
			t.Error(err)
		}
		return no
	})
	s.handle(t, "refuses-with-headers", func(w *stream.Writer, _ *stream.Request) error {
		if err := w.SetHeader(nats.Header{"H": {"x"}}); err != nil {
			t.Error(err)
		}
		return no
	})
	s.handle(t, "sends-then-refuses", func(w *stream.Writer, _ *stream.Request) error {
		write(t, w, []byte("row"))
		return no
	})
	s.handle(t, "is-empty", func(*stream.Writer, *stream.Request) error { return nil })
	serve(t, p, "JSON-refuses", func(w *stream.Writer, req *nats.Msg) { _ = w.CloseWithCode(4321, "no") })
	full := newService(t, p, stream.ServerParams{MaxStreams: 1})
	block := make(chan struct{})
	full.handle(t, "is-full", func(w *stream.Writer, _ *stream.Request) error {
		write(t, w, []byte("in"))
		<-block
		return nil
	})
	first := open(t, p.consumer, "is-full")
	if _, err := first.Recv(); err != nil {
		t.Fatal(err)
	}
	defer func() { close(block); wantEOF(t, first) }()
	for _, c := range []struct {
		subject string
		header  bool
		err     error
		end     error
	}{
		{"refuses", false, no, no},
		{"refuses-with-trailers", false, no, no},
		{"refuses-with-headers", true, nil, no},
		{"sends-then-refuses", false, nil, no},
		{"is-empty", false, nil, io.EOF},
		{"JSON-refuses", false, no, no},
		{"is-full", false, &stream.CloseError{Code: stream.CloseTryAgainLater}, &stream.CloseError{Code: stream.CloseTryAgainLater}},
		{"nobody", false, nats.ErrNoResponders, nats.ErrNoResponders},
	} {
		t.Run(c.subject, func(t *testing.T) {
			st := open(t, p.consumer, c.subject)
			for range 2 {
				if h, err := st.Header(); !errors.Is(err, c.err) || (h != nil) != c.header {
					t.Errorf("Header: %v, %v; want %v", h, err, c.err)
				}
			}
			if _, err := readAll(st); !errors.Is(err, c.end) {
				t.Errorf("Recv: %v, want %v", err, c.end)
			}
			if h := st.Trailer(); strings.Contains(c.subject, "trailers") && h.Get("T") != "x" {
				t.Errorf("Trailer: %v", h)
			}
		})
	}
}

func TestInboxPrefixOfConnectionIsUsed(t *testing.T) {
	p := newPair(t, pairOptions{
		consumerConn: []nats.Option{nats.CustomInboxPrefix("_mine.consumer")},
		producerConn: []nats.Option{nats.CustomInboxPrefix("_mine.producer")},
	})
	replies := make(chan string, 100)
	watch := p.server.Connect(t)
	if _, err := watch.Subscribe("_mine.>", func(m *nats.Msg) {
		if m.Reply != "" {
			replies <- m.Reply
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := watch.Flush(); err != nil {
		t.Fatal(err)
	}
	serve(t, p, "prefix", func(w *stream.Writer, req *nats.Msg) {
		if !strings.HasPrefix(req.Reply, "_mine.consumer.") {
			t.Errorf("the reply subject is %s", req.Reply)
		}
		write(t, w, []byte("x"))
		closeWriter(t, w)
	})
	if got, err := readAll(open(t, p.consumer, "prefix")); err != io.EOF || len(got) != 1 {
		t.Errorf("%q, %v", got, err)
	}
	waitFor(t, "the producer's own reply subject", func() {
		if reply := <-replies; !strings.HasPrefix(reply, "_mine.producer.") {
			t.Errorf("the producer's reply subject is %s", reply)
		}
	})
}

// An inbox prefix of 400 bytes works with any peer that has an ordinary one.
func TestLongInboxPrefixWorks(t *testing.T) {
	p := newPair(t)
	long := nats.CustomInboxPrefix("_SINBOX." + strings.Repeat("x", 400))
	srv := newService(t, p, stream.ServerParams{}, long)
	srv.handle(t, "long", echo)
	verifyEcho(t, p.consumer, "long", 3, 10)
	short := newService(t, p, stream.ServerParams{})
	short.handle(t, "short", echo)
	verifyEcho(t, p.newClient(t, stream.ClientParams{}, long), "short", 3, 10)
}

// Two responders answer one request: the records of one of them arrive, whole, and none of the other's.
func TestFirstOfTwoRespondersIsHeardAlone(t *testing.T) {
	p := newPair(t)
	other := p.newClient(t, stream.ClientParams{})
	for _, c := range []*stream.Client{p.producer, other} {
		serveClient(t, p, c, "both", func(w *stream.Writer, _ *nats.Msg) {
			for i := range 100 {
				if _, err := fmt.Fprintf(w, "%p %d", c, i); err != nil {
					return
				}
			}
			_ = w.Close()
		})
	}
	for range scaled(100) {
		s := open(t, p.consumer, "both")
		got, err := readAll(s)
		if err != io.EOF || len(got) != 100 {
			t.Fatalf("%d records, %v", len(got), err)
		}
		who, _, _ := strings.Cut(string(got[0]), " ")
		for i, rec := range got {
			if want := fmt.Sprint(who, " ", i); string(rec) != want {
				t.Fatalf("%q, want %q", rec, want)
			}
		}
	}
}

// A stream has one producer. Its packets carry a sender number of 47 random bits, and its first packet and its
// questions name a control subject that no other producer has. Packets of two producers never become one stream, not
// even if both have drawn the same number.

// controlSubject returns a producer's control subject whose token has the given id.
func controlSubject(id uint64) string {
	token := stream.Token{Codec: stream.MsgPack, LogPackets: 5, LogBytes: 16, ID: id}
	return string(stream.AppendToken([]byte("_SINBOX.producer."), token))
}

func TestProducersWithOneSenderNumberNeverMix(t *testing.T) {
	p := newPair(t)
	const number = 0xC0FFEE00BEEE
	a, b := controlSubject(1), controlSubject(2)
	packet := func(reply string, seq uint32, frames ...stream.Frame) *nats.Msg {
		return &nats.Msg{Reply: reply, Data: rawPacket(stream.PacketSeq, number, seq, frames...)}
	}
	hello := func(reply string, seq uint32) *nats.Msg {
		return &nats.Msg{Reply: reply, Data: rawPacket(0, number, seq, rawPing())}
	}
	for _, c := range []struct {
		name     string
		messages []*nats.Msg
		records  int
		mixed    bool
	}{
		{"one producer", []*nats.Msg{packet(a, 0, rawData("A0")), packet("", 1, rawData("A1"), rawClose(1000))}, 2, false},
		{"one producer repeats its first packet and asks", []*nats.Msg{packet(a, 0, rawData("A0")), packet(a, 0, rawData("A0")), hello(a, 1),
			packet("", 1, rawData("A1"), rawClose(1000))}, 2, false},
		{"a second first packet", []*nats.Msg{packet(a, 0, rawData("A0")), packet(b, 0, rawData("B0")), packet("", 1, rawData("B1"), rawClose(1000))}, 1, true},
		{"a second first packet after many", []*nats.Msg{packet(a, 0, rawData("A0")), packet("", 1, rawData("A1")), packet("", 2, rawData("A2")),
			packet(b, 0, rawData("B0")), packet("", 3, rawData("B3"), rawClose(1000))}, 3, true},
		{"a first packet after another's hello", []*nats.Msg{hello(a, 0), packet(b, 0, rawData("B0"), rawClose(1000))}, 0, true},
		{"a hello after another's first packet", []*nats.Msg{packet(a, 0, rawData("A0")), hello(b, 0), packet("", 1, rawData("B1"), rawClose(1000))}, 1, true},
		{"a hello that shows a gap", []*nats.Msg{packet(a, 0, rawData("A0")), hello(b, 7)}, 1, true},
		{"a producer across accounts", []*nats.Msg{packet("mapped.x.1", 0, rawData("A0")), hello("mapped.x.2", 1), packet("", 1, rawData("A1"), rawClose(1000))}, 2, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, reply, nc := rawStream(t, p)
			for _, m := range c.messages {
				m.Subject = reply
				if err := nc.PublishMsg(m); err != nil {
					t.Fatal(err)
				}
			}
			records, err := readAll(s)
			if ce, _ := errors.AsType[*stream.CloseError](err); c.mixed != (ce != nil && ce.Code == stream.CloseProtocolError) || !c.mixed && err != io.EOF {
				t.Errorf("the stream ended with %v", err)
			}
			for _, rec := range records {
				if rec[0] != 'A' {
					t.Errorf("record %q is of another producer", rec)
				}
			}
			if len(records) != c.records {
				t.Errorf("records %q, want %d", records, c.records)
			}
		})
	}
}

// Another producer's packets, under a number of its own, never count, and it hears that nobody listens.
func TestSecondProducerIsToldToStop(t *testing.T) {
	p := newPair(t)
	s, reply, nc := rawStream(t, p)
	other, err := nc.SubscribeSync(controlSubject(2))
	if err != nil {
		t.Fatal(err)
	}
	first := &nats.Msg{Subject: reply, Reply: controlSubject(1), Data: rawPacket(stream.PacketSeq, 2, 0, rawData("A0"))}
	second := &nats.Msg{Subject: reply, Reply: controlSubject(2), Data: rawPacket(stream.PacketSeq, 4, 0, rawData("B0"))}
	for _, m := range []*nats.Msg{first, second} {
		if err := nc.PublishMsg(m); err != nil {
			t.Fatal(err)
		}
	}
	rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 4, 1, rawData("B1"), rawClose(1000)), rawPacket(stream.PacketSeq, 2, 1, rawData("A1"), rawClose(1000)))
	if records, err := readAll(s); err != io.EOF || len(records) != 2 || string(records[0]) != "A0" || string(records[1]) != "A1" {
		t.Errorf("records %q, %v", records, err)
	}
	m, err := other.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	h, body, err := stream.ParsePacketHeader(m.Data)
	if f, _, ferr := stream.ParseFrame(body); err != nil || ferr != nil || f.Type != stream.FrameReset || h.Sender != 4 {
		t.Errorf("the second producer got %v of sender %d, %v, %v", f.Type, h.Sender, err, ferr)
	}
}

// Only an error that says that no handler saw the request is retryable.
func TestOnlyRefusalsBeforeAHandlerAreRetryable(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		want bool
	}{
		"nil":                      {nil, false},
		"no responders":            {nats.ErrNoResponders, true},
		"no responders, wrapped":   {fmt.Errorf("open: %w", nats.ErrNoResponders), true},
		"a peer that was lost":     {fmt.Errorf("%w: %w", &stream.CloseError{Code: stream.CloseAbnormalClosure}, nats.ErrNoResponders), false},
		"an error of that code":    {&stream.CloseError{Code: stream.CloseTryAgainLater}, false},
		"the connection is closed": {nats.ErrConnectionClosed, false},
		"the context ended":        {context.DeadlineExceeded, false},
		"the end":                  {io.EOF, false},
	} {
		if got := stream.Retryable(c.err); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}

	var result error
	var writes bool
	h := func(w *stream.Writer, _ *stream.Request) error {
		if writes {
			if _, err := w.Write([]byte("a")); err != nil {
				return err
			}
		}
		return result
	}
	p, _ := newServed(t, stream.ServerParams{}, h)
	for _, code := range []int{stream.CloseTryAgainLater, stream.CloseGoingAway, stream.CloseInternalServerErr} {
		for _, writes = range []bool{false, true} {
			result = &stream.CloseError{Code: code}
			_, err := readAll(open(t, p.consumer, "svc"))
			wantCode(t, err, code, "")
			if stream.Retryable(err) {
				t.Errorf("a handler returned code %d, which is retryable", code)
			}
		}
	}
	full := newHeld()
	s := newService(t, p, stream.ServerParams{MaxStreams: 1})
	s.handle(t, "full", full.handle)
	running := begin(t, p, "full")
	err := refusedWith(t, p, "full")
	wantCode(t, err, stream.CloseTryAgainLater, "")
	if !stream.Retryable(fmt.Errorf("open: %w", err)) {
		t.Errorf("a refusal is not retryable: %v", err)
	}
	close(full.release)
	wantEOF(t, running)
}

// As many streams as there is room for, opened at once, all find a member of the group that takes them, and no handler
// runs twice.
func TestOpenWithRetryFindsRoom(t *testing.T) {
	const members, size = 3, 10
	p := newPair(t)
	h := newHeld()
	for range members {
		newService(t, p, stream.ServerParams{MaxStreams: size}).register(t, "svc", "q", h.handle)
	}
	var wg sync.WaitGroup
	for range members * size {
		wg.Go(func() {
			s, err := p.consumer.Open(testContext(t), "svc", nil, stream.WithRetry(stream.Retry{Attempts: 1000, Wait: time.Millisecond, MaxWait: 50 * time.Millisecond}))
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := s.Recv(); err != nil {
				t.Error(err)
			}
			if _, err := s.Recv(); err != io.EOF {
				t.Error(err)
			}
		})
	}
	eventually(t, "all handlers run", func() bool { return h.calls.Load() == members*size })
	close(h.release)
	waitFor(t, "all streams", wg.Wait)
	if n := h.calls.Load(); n != members*size {
		t.Errorf("%d handlers ran for %d streams", n, members*size)
	}
}

func openRetry(t testing.TB, p *pair, subject string, retry stream.Retry) (s *stream.Stream, err error) {
	t.Helper()
	waitFor(t, "Open", func() { s, err = p.consumer.Open(testContext(t), subject, nil, stream.WithRetry(retry)) })
	if err == nil {
		t.Cleanup(func() { s.Close() })
	}
	return s, err
}

// A producer that answers, in whatever way, is not asked again.
func TestOpenWithRetryAsksOnceIfAnswered(t *testing.T) {
	var calls atomic.Int32
	count := func(h stream.Handler) stream.Handler {
		return func(w *stream.Writer, r *stream.Request) error { calls.Add(1); return h(w, r) }
	}
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	s.handle(t, "reads", count(func(w *stream.Writer, r *stream.Request) error {
		_, err := r.WriteTo(w) // to the end: CloseSend fails once the handler has returned
		return err
	}))
	s.handle(t, "waits", count(func(w *stream.Writer, r *stream.Request) error {
		<-r.Context().Done()
		return nil
	}))
	s.handle(t, "busy", count(func(*stream.Writer, *stream.Request) error {
		return &stream.CloseError{Code: stream.CloseTryAgainLater, Text: "its own"}
	}))
	s.handle(t, "done", count(nothing))
	sub, err := p.producer.Conn.Subscribe("old", func(m *nats.Msg) {
		calls.Add(1)
		_ = p.producer.Conn.Publish(m.Reply, []byte(`{"type":2,"closeError":{"Code":1013,"Text":"old"}}`))
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := p.producer.Conn.Flush(); err != nil {
		t.Fatal(err)
	}

	for subject, use := range map[string]func(s *stream.Stream) error{
		"reads": func(s *stream.Stream) error {
			if _, err := s.Write([]byte("a")); err != nil {
				return err
			}
			_, err := s.Recv()
			return errors.Join(err, s.CloseSend())
		},
		"waits": func(s *stream.Stream) error { return s.Close() },
		"busy": func(s *stream.Stream) error {
			_, err := s.Recv()
			wantCode(t, err, stream.CloseTryAgainLater, "its own")
			return nil
		},
		"done": func(s *stream.Stream) error { wantEOF(t, s); return nil },
		"old": func(s *stream.Stream) error {
			_, err := s.Recv()
			wantCode(t, err, stream.CloseTryAgainLater, "old")
			return nil
		},
	} {
		t.Run(subject, func(t *testing.T) {
			calls.Store(0)
			s, err := openRetry(t, p, subject, stream.Retry{})
			if err != nil {
				t.Fatal(err)
			}
			waitFor(t, "its use", func() { err = use(s) })
			if err != nil {
				t.Error(err)
			}
			if n := calls.Load(); n != 1 {
				t.Errorf("asked %d times", n)
			}
		})
	}
}

func TestOpenWithRetryGivesUp(t *testing.T) {
	full := newHeld()
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{MaxStreams: 1})
	s.handle(t, "full", full.handle)
	running := begin(t, p, "full")
	quick := stream.Retry{Attempts: 3, Wait: time.Millisecond}
	_, err := openRetry(t, p, "full", quick)
	wantCode(t, err, stream.CloseTryAgainLater, "")
	if _, err := openRetry(t, p, "nobody", quick); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("nobody serves: %v", err)
	}
	if n := full.calls.Load(); n != 1 {
		t.Errorf("%d handlers ran", n)
	}
	close(full.release)
	wantEOF(t, running)

	ctx, cancel := context.WithCancel(testContext(t))
	result := make(chan error, 1)
	go func() {
		_, err := p.consumer.Open(ctx, "nobody", nil, stream.WithRetry(stream.Retry{Wait: time.Hour, MaxWait: time.Hour}))
		result <- err
	}()
	cancel()
	waitFor(t, "the context's end", func() { err = <-result })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("the context ended: %v", err)
	}

	for _, bad := range []stream.Retry{{Attempts: -1}, {Wait: -1}, {MaxWait: -1}} {
		if _, err := openRetry(t, p, "nobody", bad); err == nil || !strings.Contains(err.Error(), "Retry") {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	if _, err := p.consumer.OpenMsg(testContext(t), nil, stream.WithRetry(stream.Retry{})); !errors.Is(err, nats.ErrInvalidMsg) {
		t.Errorf("no message: %v", err)
	}
	if _, err := openRetry(t, p, "a b", stream.Retry{}); !errors.Is(err, nats.ErrBadSubject) {
		t.Errorf("a bad subject: %v", err)
	}
}

// Producer, consumer and writers on one client, many streams at once, in both directions of every pair.
func TestOneClientServesBothEnds(t *testing.T) {
	p := newPair(t, pairOptions{shared: true})
	serve(t, p, "shared", func(w *stream.Writer, _ *nats.Msg) {
		for i := range scaled(5000) {
			write(t, w, testRecord(i, 100))
		}
		closeWriter(t, w)
	})
	var wg sync.WaitGroup
	for range 8 {
		s := open(t, p.consumer, "shared")
		wg.Go(func() {
			got, err := readAll(s)
			if err != io.EOF || len(got) != scaled(5000) {
				t.Errorf("%d records, %v", len(got), err)
			}
			for i, rec := range got {
				if !bytes.Equal(rec, testRecord(i, 100)) {
					t.Errorf("record %d differs", i)
					return
				}
			}
		})
	}
	waitFor(t, "the streams", wg.Wait)
}

func TestManyStreamsAtOnceArrive(t *testing.T) {
	p := newPair(t)
	const streams = 50
	count := scaled(2000)
	serve(t, p, "many.*", func(w *stream.Writer, req *nats.Msg) {
		for i := range count {
			if _, err := fmt.Fprintf(w, "%s %d", req.Subject, i); err != nil {
				t.Errorf("Write: %v", err)
				break
			}
		}
		closeWriter(t, w)
	})
	var wg sync.WaitGroup
	for k := range streams {
		subject := fmt.Sprint("many.", k)
		s := open(t, p.consumer, subject)
		wg.Go(func() {
			i := 0
			for rec, err := range s.All() {
				if want := fmt.Sprintf("%s %d", subject, i); err != nil || string(rec) != want {
					t.Errorf("%q, %v; want %q", rec, err, want)
					return
				}
				i++
			}
			if i != count {
				t.Errorf("%s: %d records", subject, i)
			}
		})
	}
	waitFor(t, "all streams", wg.Wait)
}

// A stream that is opened, carries one record and ends allocates little beside what NATS takes for its three messages,
// which is about 32 times.
func TestShortStreamsAllocateLittle(t *testing.T) {
	p, _ := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		_, err := w.Write(r.Data)
		return err
	})
	record := make([]byte, 128)
	run := func(n int) {
		for range n {
			s, err := p.consumer.Open(context.Background(), "svc", record)
			if err != nil {
				t.Fatal(err)
			}
			if rec, err := s.Recv(); err != nil || len(rec) != len(record) {
				t.Fatalf("%d bytes, %v", len(rec), err)
			}
			wantEOF(t, s)
		}
	}
	count := scaled(5000)
	run(count)
	perStream := float64(mallocs(func() { run(count) })) / float64(count)
	t.Logf("%.1f mallocs per stream", perStream)
	if !race.Enabled && perStream >= 48 {
		t.Errorf("%.1f mallocs per stream of one record, want less than 48", perStream)
	}
}
