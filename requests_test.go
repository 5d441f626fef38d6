package stream_test

import (
	"fmt"
	"io"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// What a handler's subscription receives is not always a request, and what a request names as its reply subject is not always
// one to write to.

// restless are times that make both ends ask each other often.
var restless = stream.ClientParams{KeepAlive: 20 * time.Millisecond, AckTimeout: 10 * time.Millisecond}

// A wildcard may cover the inboxes of both ends, so that the handler receives every packet of its own streams. Each request
// still runs it once.
func TestWildcardHandlerRunsOncePerRequest(t *testing.T) {
	for _, c := range []struct{ pattern, subject, inbox string }{
		{">", "svc", ""},
		{"*.>", "svc.echo", ""},
		{"svc.>", "svc.echo", "svc.inbox"},
		{"*.*.*.*", "svc.x.y.z", "_I"},
		{"_SINBOX.>", "_SINBOX.svc", ""},
		{">", "svc", "inbox.custom"},
	} {
		t.Run(fmt.Sprintf("%s, inbox %q", c.pattern, c.inbox), func(t *testing.T) {
			var options pairOptions
			options.consumer = restless
			if c.inbox != "" {
				options.producerConn = []nats.Option{nats.CustomInboxPrefix(c.inbox + ".p")}
				options.consumerConn = []nats.Option{nats.CustomInboxPrefix(c.inbox + ".c")}
			}
			p := newPair(t, options)
			s := newService(t, p, stream.ServerParams{KeepAlive: restless.KeepAlive, AckTimeout: restless.AckTimeout})
			var calls atomic.Int64
			s.handle(t, c.pattern, func(w *stream.Writer, r *stream.Request) error {
				calls.Add(1)
				_, err := io.Copy(w, r)
				return err
			})
			const streams = 5
			for i := range streams {
				st := open(t, p.consumer, c.subject)
				for k := range 3 {
					write := fmt.Sprint(i, k)
					if _, err := st.Write([]byte(write)); err != nil {
						t.Fatal(err)
					}
					if rec, err := st.Recv(); err != nil || string(rec) != write {
						t.Fatalf("echo of %q is %q, %v", write, rec, err)
					}
					time.Sleep(2 * restless.KeepAlive) // they ask each other
				}
				if err := st.CloseSend(); err != nil {
					t.Fatal(err)
				}
				wantEOF(t, st)
			}
			if n := calls.Load(); n != streams {
				t.Errorf("%d requests ran the handler %d times", streams, n)
			}
			if s.Stats().DroppedStray == 0 {
				t.Error("no packet was counted as a stray")
			}
		})
	}
}

// A handler for everything does not answer what clients ask JetStream, nor acknowledge what JetStream delivers.
func TestWildcardHandlerLeavesJetStreamAlone(t *testing.T) {
	dir := t.TempDir()
	p := newPair(t, pairOptions{server: []streamtest.Option{streamtest.WithOptions(func(o *server.Options) {
		o.JetStream, o.StoreDir = true, dir
	})}})
	s := newService(t, p, stream.ServerParams{MaxFallback: 10})
	var calls atomic.Int64
	s.handle(t, ">", func(*stream.Writer, *stream.Request) error {
		calls.Add(1)
		return nil
	})
	js, err := p.consumer.Conn.JetStream(nats.MaxWait(patience))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.AddStream(&nats.StreamConfig{Name: "S", Subjects: []string{"$orders.*"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish("$orders.a", []byte("first")); err != nil {
		t.Fatal(err)
	}
	sub, err := js.SubscribeSync("$orders.*", nats.DeliverSubject("delivered.here"), nats.ManualAck())
	if err != nil {
		t.Fatal(err)
	}
	m, err := sub.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := sub.ConsumerInfo(); err != nil || info.NumAckPending != 1 {
		t.Errorf("%+v, %v; want one delivery that nobody has acknowledged", info, err)
	}
	if err := m.AckSync(); err != nil {
		t.Error(err)
	}
	if stats := s.Stats(); calls.Load() != 0 || stats.DroppedStray == 0 {
		t.Errorf("the handler ran %d times; %+v", calls.Load(), stats)
	}
}

// A request may hold any bytes. Those of a packet need the header that every consumer of the library sends.
func TestRequestMayLookLikeAPacket(t *testing.T) {
	p, _ := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		_, err := w.Write(r.Data)
		return err
	})
	packet := rawPacket(stream.PacketSeq, 2, 0, rawData("x"))
	for name, data := range map[string][]byte{
		"the magic":          {stream.PacketMagic},
		"a packet":           packet,
		"a cut packet":       packet[:len(packet)-1],
		"a control packet":   rawPacket(0, 2, 0, rawPing()),
		"a fallback message": []byte(`{"type":1,"data":"aGk="}`),
		"nothing":            nil,
	} {
		s, err := p.consumer.Open(testContext(t), "svc", data)
		if err != nil {
			t.Fatal(err)
		}
		if rec, err := s.Recv(); err != nil || string(rec) != string(data) {
			t.Errorf("%s: got %q, %v", name, rec, err)
		}
		wantEOF(t, s)
	}
	// A consumer whose headers do not get through says by its token what it is.
	for name, c := range map[string]struct {
		data    []byte
		request bool
	}{
		"the magic":        {[]byte{stream.PacketMagic}, true},
		"a cut packet":     {packet[:len(packet)-1], true},
		"other bytes":      {[]byte("\xf5 is no UTF-8, and more than a header has"), true},
		"a packet":         {packet, false},
		"a control packet": {rawPacket(0, 2, 0, rawPing()), false},
		"a later version":  {append([]byte{stream.PacketMagic, 0x21}, packet[2:]...), false},
	} {
		inbox := rawInbox()
		answers, err := p.consumer.Conn.SubscribeSync(inbox)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.consumer.Conn.PublishRequest("svc", inbox, c.data); err != nil {
			t.Fatal(err)
		}
		if c.request {
			m := nextRequest(t, answers)
			rawPublish(t, p.consumer.Conn, m.Reply, rawPacket(0, 1, 0, rawReset(stream.CloseCanceled)))
		} else if m, err := answers.NextMsg(50 * time.Millisecond); err == nil {
			t.Errorf("%s was answered with %q", name, m.Data)
		}
		if err := answers.Unsubscribe(); err != nil {
			t.Fatal(err)
		}
	}
}

// oddReplies are reply subjects that a client may name and nobody may write to. To publish to one of the first closes a
// pedantic connection for good.
var oddReplies = []string{">", "*", "foo.*", "foo.>", "*.foo", "a..b", "a.", ".a", ".", "a.>.b",
	"$JS.API.STREAM.PURGE.S", "$SYS.REQ.SERVER.PING"}

func TestOddReplySubjectsAreNotWrittenTo(t *testing.T) {
	pedantic := func(o *nats.Options) error { o.Pedantic = true; return nil }
	p := newPair(t, pairOptions{producerConn: []nats.Option{pedantic}})
	s := newService(t, p, stream.ServerParams{MaxFallback: 10}, pedantic)
	s.handle(t, "svc", func(w *stream.Writer, _ *stream.Request) error {
		_, err := w.Write([]byte("x"))
		return err
	})
	nc := p.consumer.Conn
	offer := string(stream.AppendOffer(nil, stream.Token{Codec: stream.JSON, LogPackets: 4, LogBytes: 16}))
	token := string(stream.AppendToken(nil, stream.Token{Codec: stream.JSON, LogPackets: 4, LogBytes: 16, ID: 1}))
	var n uint64
	for _, reply := range oddReplies {
		for _, m := range []*nats.Msg{
			{Reply: reply},
			{Reply: reply, Header: nats.Header{"Stream-Open": {offer}}},
			{Reply: reply, Header: nats.Header{"Stream-Open": {offer}, "Stream-Timeout": {"never"}}}, // refused otherwise
			{Reply: reply + "." + token},
		} {
			m.Subject = "svc"
			if err := nc.PublishMsg(m); err != nil {
				t.Fatal(err)
			}
			n++
		}
	}
	eventually(t, "all are counted", func() bool { return s.Stats().DroppedRequest == n })

	// Packets for streams that do not exist are answered, but not there.
	for _, reply := range oddReplies {
		if err := nc.PublishRequest(controlOf(t, p), reply, rawPacket(0, 2, 0, rawPing())); err != nil {
			t.Fatal(err)
		}
	}
	// Writers refuse such a subject.
	for _, reply := range oddReplies {
		if _, err := p.producer.NewWriter(reply).Write([]byte("x")); err == nil {
			t.Errorf("a writer to %q writes", reply)
		}
	}
	for _, nc := range []*nats.Conn{p.producer.Conn, s.nc} {
		if err := nc.FlushTimeout(patience); err != nil || !nc.IsConnected() {
			t.Errorf("a producer's connection is %v: %v", nc.Status(), err)
		}
	}
	st := open(t, p.consumer, "svc")
	if records, err := readAll(st); err != io.EOF || len(records) != 1 {
		t.Errorf("%d records, %v", len(records), err)
	}
}

// controlOf returns a subject below the inbox of the producer's client that no stream has.
func controlOf(t *testing.T, p *pair) string {
	t.Helper()
	subject, requests := rawRequests(t, p)
	s := open(t, p.producer, subject)
	reply := nextRequest(t, requests).Reply
	s.Close()
	return reply
}

// Handlers whose requests name a request subject as their reply would answer each other for ever.
func TestRequestSubjectsAreNoReplySubjects(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{MaxFallback: 10, KeepAlive: 100 * time.Millisecond, AckTimeout: 20 * time.Millisecond, ResumeTimeout: 100 * time.Millisecond})
	var calls atomic.Int64
	h := func(w *stream.Writer, r *stream.Request) error {
		calls.Add(1)
		if _, err := w.Write([]byte("hello")); err != nil {
			return err
		}
		_, err := io.Copy(w, r)
		return err
	}
	for _, subject := range []string{"svc.a", "svc.b", "any.>"} {
		s.handle(t, subject, h)
	}
	offer := nats.Header{"Stream-Open": {"~1m5G"}}
	for i, c := range []struct {
		reply  string
		header nats.Header
		runs   int64
	}{
		{"svc.a", nil, 0},                  // its own subject
		{"svc.a", offer, 0},                //
		{"svc.b", offer, 0},                // that of another handler
		{"svc.b", nil, 1},                  // as a fallback consumer: messages without a reply subject are no requests
		{"any.~1m5G00000000001", nil, 1},   // a token in its place: packets are no requests
		{"any.~1m5G00000000001", offer, 1}, //
		{"any.where", offer, 0},            //
		{"elsewhere", offer, 0},            // where somebody else may have a service
		{"_INBOX.x.nobody", offer, 1},      // an inbox, mapped or made by another client
	} {
		before := calls.Load()
		if err := p.consumer.Conn.PublishMsg(&nats.Msg{Subject: "svc.a", Reply: c.reply, Header: c.header}); err != nil {
			t.Fatal(err)
		}
		if c.runs > 0 {
			eventually(t, "the handler runs", func() bool { return calls.Load() >= before+c.runs })
		}
		eventually(t, fmt.Sprint("the streams of request ", i, " end"), func() bool { return s.Stats().Streams == 0 })
		time.Sleep(20 * time.Millisecond)
		if n := calls.Load() - before; n != c.runs {
			t.Errorf("a request with reply subject %s, header %v: %d handlers ran, want %d", c.reply, c.header, n, c.runs)
		}
	}
}
