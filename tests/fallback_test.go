package stream_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

func allBytes() string {
	b := make([]byte, 256)
	for i := range b {
		b[i] = byte(i)
	}
	return string(b)
}

// fallbackFixtures says what each file of testdata/fallback, a message of the original protocol, means.
var fallbackFixtures = map[string]struct {
	record    string // if end is nil
	end       *stream.CloseError
	canonical bool // what the original library writes, and so does ours, byte for byte
}{
	"data":                  {record: "hello", canonical: true},
	"data_empty":            {record: "", canonical: true},
	"data_bytes":            {record: allBytes(), canonical: true},
	"data_object":           {record: `{"name":"abc\u003cd\u003e","n":7}`, canonical: true},
	"data_empty_string":     {record: ""},
	"data_null":             {record: ""},
	"data_whitespace":       {record: "hello"},
	"data_key_order":        {record: "hello"},
	"data_key_case":         {record: "hello"},
	"data_escaped":          {record: "hello"},
	"data_escaped_slash":    {record: "\xff\xff\xff"},
	"data_extra_fields":     {record: "hello"},
	"data_repeated_key":     {record: "hello"},
	"data_with_close_error": {record: "hello"},
	"close_normal":          {end: &stream.CloseError{Code: 1000}, canonical: true},
	"close_normal_text":     {end: &stream.CloseError{Code: 1000, Text: "done"}, canonical: true},
	"close_bad_request":     {end: &stream.CloseError{Code: 4000, Text: "no such job"}, canonical: true},
	"close_escapes":         {end: &stream.CloseError{Code: 5000, Text: "<a> & \"b\" \\ c\nd\x01 \u2028 äß€😀"}, canonical: true},
	"close_key_order":       {end: &stream.CloseError{Code: 4000, Text: "no such job"}},
	"close_surrogates":      {end: &stream.CloseError{Code: 4000, Text: "😀 \ufffd."}},
	"close_code_only":       {end: &stream.CloseError{Code: 4000}},
	"close_with_data":       {end: &stream.CloseError{Code: 4000, Text: "no such job"}},
	"close_empty_error":     {end: &stream.CloseError{}},
	"close_without_error":   {end: &stream.CloseError{Code: stream.CloseProtocolError, Text: "close message without closeError"}},
	"close_null_error":      {end: &stream.CloseError{Code: stream.CloseProtocolError, Text: "close message without closeError"}},
}

func fallbackFixture(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "testdata", "fallback", name+".json"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// wantClose fails the test unless s ends as the producer said.
func wantClose(t testing.TB, s *stream.Stream, want *stream.CloseError) {
	t.Helper()
	if want.Code == stream.CloseNormalClosure {
		wantEOF(t, s)
		return
	}
	for range 2 { // and goes on saying so
		if rec, err := s.Recv(); rec != nil || !equalClose(err, want) {
			t.Fatalf("Recv: %q, %v; want %v", rec, err, want)
		}
	}
}

// An old producer to Open and OpenStream.
func TestFallbackMessagesMeanWhatTheyMeant(t *testing.T) {
	files, err := filepath.Glob("../testdata/fallback/*.json")
	if err != nil || len(files) != len(fallbackFixtures) {
		t.Errorf("%d fixtures, %v; the test knows %d", len(files), err, len(fallbackFixtures))
	}
	p := newPair(t)
	normal := fallbackFixture(t, "close_normal")
	for name, want := range fallbackFixtures {
		t.Run(name, func(t *testing.T) {
			message := fallbackFixture(t, name)
			messages := [][]byte{fallbackFixture(t, "data_bytes"), message}
			if want.end == nil {
				messages = append(messages, normal)
			}

			s, publish := oldProducer(t, p)
			publish(messages...)
			if rec, err := s.Recv(); string(rec) != allBytes() || err != nil {
				t.Fatalf("the record before: %q, %v", rec, err)
			}
			if want.end == nil {
				if rec, err := s.Recv(); string(rec) != want.record || err != nil {
					t.Fatalf("Recv: %q, %v; want %q", rec, err, want.record)
				}
				wantEOF(t, s)
			} else {
				wantClose(t, s, want.end)
			}

			subject, requests := rawRequests(t, p)
			ch, err := p.consumer.OpenStream(testContext(t), subject, nil)
			if err != nil {
				t.Fatal(err)
			}
			rawPublish(t, p.producer.Conn, nextRequest(t, requests).Reply, messages...)
			results := [][]byte{[]byte(allBytes())}
			if want.end == nil {
				results = append(results, []byte(want.record))
			}
			for _, want := range results {
				if r := <-ch; r == nil || r.Err != nil || !bytes.Equal(r.Value, want) {
					t.Fatalf("result %+v, want %q", r, want)
				}
			}
			r, more := <-ch
			if want.end == nil || want.end.Code == stream.CloseNormalClosure {
				if more {
					t.Fatalf("result %+v, want the channel closed", r)
				}
				return
			}
			if !more || !equalClose(r.Err, want.end) {
				t.Fatalf("result %+v, want %v", r, want.end)
			}
			if r, more := <-ch; more {
				t.Fatalf("result %+v behind the error", r)
			}
		})
	}
}

// oldInbox is a reply subject as the original library made them: eight base-62 characters are no token of ours.
const oldInbox = "_INBOX.WzMBDEFgQTDaRKtrDRD6kp.Ab3dEf9Z"

// Our writer to an old consumer, byte for byte, one message a record.
func TestFallbackWriterSendsWhatTheOriginalSent(t *testing.T) {
	p := newPair(t)
	sub, err := p.consumer.Conn.SubscribeSync(oldInbox)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.consumer.Conn.Flush(); err != nil {
		t.Fatal(err)
	}
	next := func(t *testing.T, want []byte) {
		t.Helper()
		m, err := sub.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(m.Data, want) {
			t.Errorf("message\n%s, want\n%s", m.Data, want)
		}
		if m.Reply != "" || len(m.Header) != 0 {
			t.Errorf("message with reply %q, header %v: the original has neither", m.Reply, m.Header)
		}
	}
	for name, fixture := range fallbackFixtures {
		if !fixture.canonical {
			continue
		}
		t.Run(name, func(t *testing.T) {
			w := p.producer.NewWriter(oldInbox)
			end := fixture.end
			if end == nil {
				if n, err := w.Write([]byte(fixture.record)); n != len(fixture.record) || err != nil {
					t.Fatalf("Write: %d, %v", n, err)
				}
				next(t, fallbackFixture(t, name)) // also without Flush
				end = &stream.CloseError{Code: stream.CloseNormalClosure}
			}
			var text []string
			if end.Text != "" {
				text = []string{end.Text}
			}
			if err := w.CloseWithCode(end.Code, text...); err != nil {
				t.Fatal(err)
			}
			if fixture.end == nil {
				name = "close_normal"
			}
			next(t, fallbackFixture(t, name))
			if err := w.Close(); err != nil {
				t.Errorf("second Close: %v", err)
			}
			if _, err := w.Write([]byte("late")); !errors.Is(err, stream.ErrClosed) {
				t.Errorf("Write after Close: %v", err)
			}
		})
	}
	t.Run("objects", func(t *testing.T) {
		type object struct {
			Name string `json:"name"`
			N    int    `json:"n"`
		}
		w := p.producer.NewWriter(oldInbox)
		encoded, _ := json.Marshal(object{"abc<d>", 7})
		if n, err := w.WriteObject(object{"abc<d>", 7}); n != len(encoded) || err != nil {
			t.Fatalf("WriteObject: %d, %v; want the length of %s", n, err, encoded)
		}
		next(t, fallbackFixture(t, "data_object"))
		if n, err := w.WriteObject(make(chan int)); n != 0 || err == nil {
			t.Errorf("WriteObject of a channel: %d, %v", n, err)
		}
		write(t, w, []byte("hello"))
		next(t, fallbackFixture(t, "data"))
		closeWriter(t, w)
		next(t, fallbackFixture(t, "close_normal"))
	})
	t.Run("as encoding/json", func(t *testing.T) {
		w := p.producer.NewWriter(oldInbox)
		sizes := []int{1, 2, 3, 4, 5, 100, 511, 512, 513, 4000, 100_000, 700_000}
		for i, size := range sizes {
			write(t, w, testRecord(i, size))
		}
		closeWriter(t, w)
		for i, size := range sizes {
			want, _ := json.Marshal(stream.StreamingMsg{Type: stream.StreamingMsgTypeData, Data: testRecord(i, size)})
			next(t, want)
		}
		next(t, fallbackFixture(t, "close_normal"))
	})
	t.Run("ReadFrom", func(t *testing.T) {
		w := p.producer.NewWriter(oldInbox)
		data := testRecord(0, 200_000)
		if n, err := io.Copy(w, struct{ io.Reader }{bytes.NewReader(data)}); n != int64(len(data)) || err != nil {
			t.Fatalf("io.Copy: %d, %v", n, err)
		}
		closeWriter(t, w)
		var got []byte
		for {
			m, err := sub.NextMsg(patience)
			if err != nil {
				t.Fatal(err)
			}
			var msg stream.StreamingMsg
			if err := json.Unmarshal(m.Data, &msg); err != nil {
				t.Fatal(err)
			}
			if msg.Type == stream.StreamingMsgTypeClose {
				break
			}
			got = append(got, msg.Data...)
		}
		if !bytes.Equal(got, data) {
			t.Errorf("%d bytes arrived, %d were sent, or they differ", len(got), len(data))
		}
	})
	if n, _, err := sub.Pending(); n != 0 || err != nil {
		t.Errorf("%d messages too many, %v", n, err)
	}
}

// The original WriteObject sent JSON, whatever the consumer asked for.
func TestFallbackObjectsAreJSON(t *testing.T) {
	p := newPair(t)
	s, publish := oldProducer(t, p)
	publish(fallbackFixture(t, "data_object"), fallbackFixture(t, "data"), fallbackFixture(t, "data_object"), fallbackFixture(t, "close_normal"))
	var v struct {
		Name string
		N    int
	}
	if err := s.RecvObject(&v); err != nil || v.Name != "abc<d>" || v.N != 7 {
		t.Errorf("RecvObject: %+v, %v", v, err)
	}
	if err := s.RecvObject(&v); err == nil { // "hello" is no JSON; that is an error of this call alone
		t.Error("RecvObject of bytes that are no JSON: no error")
	}
	if err := s.RecvObject(&v); err != nil {
		t.Errorf("RecvObject of the next record: %v", err)
	}
	if err := s.RecvObject(&v); err != io.EOF {
		t.Errorf("RecvObject at the end: %v, want io.EOF", err)
	}
}

// An old consumer knows no pieces, so a record that fits no message is refused, and the
// writer goes on.
func TestFallbackRecordTooLargeIsRefused(t *testing.T) {
	const maxPayload = 4096
	p := newPair(t, pairOptions{server: []streamtest.Option{streamtest.WithMaxPayload(maxPayload)}})
	sub, err := p.consumer.Conn.SubscribeSync(oldInbox)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.consumer.Conn.Flush(); err != nil {
		t.Fatal(err)
	}
	w := p.producer.NewWriter(oldInbox)
	largest := (maxPayload - len(`{"type":1,"data":""}`)) / 4 * 3
	for _, n := range []int{largest, largest + 1, largest + 3, maxPayload, 1 << 20, 17 << 20, largest} {
		m, err := w.Write(testRecord(n, n))
		if n <= largest && (m != n || err != nil) {
			t.Fatalf("Write of %d bytes: %d, %v", n, m, err)
		}
		if n > largest && (m != 0 || !errors.Is(err, stream.ErrRecordTooLarge)) {
			t.Fatalf("Write of %d bytes: %d, %v; want ErrRecordTooLarge", n, m, err)
		}
	}
	if n, err := w.WriteObject(strings.Repeat("x", largest)); n != 0 || !errors.Is(err, stream.ErrRecordTooLarge) {
		t.Errorf("WriteObject: %d, %v; want ErrRecordTooLarge", n, err)
	}
	closeWriter(t, w)
	for range 2 {
		m, err := sub.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		var msg stream.StreamingMsg
		if err := json.Unmarshal(m.Data, &msg); err != nil || !bytes.Equal(msg.Data, testRecord(largest, largest)) {
			t.Errorf("a record of %d bytes, %v; want %d bytes", len(msg.Data), err, largest)
		}
	}
	if m, err := sub.NextMsg(patience); err != nil || !bytes.Equal(m.Data, fallbackFixture(t, "close_normal")) {
		t.Errorf("%v, %v; want the close message", m, err)
	}
}

// A writer to an old consumer has no way back, so only this end can end it.
func TestFallbackWriterIsEndedByItsOwnSideOnly(t *testing.T) {
	t.Run("client closed", func(t *testing.T) {
		p := newPair(t)
		c := p.newClient(t, stream.ClientParams{})
		unused, used := c.NewWriter(oldInbox), c.NewWriter(oldInbox)
		write(t, used, []byte("hello"))
		if err := used.Flush(); err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
		for _, w := range []*stream.Writer{unused, used} {
			waitFor(t, "Write and Close", func() {
				_, werr := w.Write([]byte("late"))
				if cerr := w.Close(); !errors.Is(cerr, stream.ErrClientClosed) {
					t.Errorf("Write: %v, Close: %v; want ErrClientClosed", werr, cerr)
				}
			})
		}
	})
	t.Run("connection closed", func(t *testing.T) {
		p := newPair(t)
		c := p.newClient(t, stream.ClientParams{})
		unused, used := c.NewWriter(oldInbox), c.NewWriter(oldInbox)
		write(t, used, []byte("hello"))
		if err := used.Flush(); err != nil {
			t.Fatal(err)
		}
		c.Conn.Close()
		for _, w := range []*stream.Writer{unused, used} {
			waitFor(t, "Write and Close", func() {
				_, werr := w.Write([]byte("late"))
				cerr := w.Close()
				if !errors.Is(cerr, nats.ErrConnectionClosed) {
					t.Errorf("Write: %v, Close: %v; want nats.ErrConnectionClosed", werr, cerr)
				}
			})
		}
	})
}

// An old producer cannot be told to wait. The stream whose reader falls behind ends, after what
// was queued, and no other one notices.
func TestFallbackOverrunEndsOneStream(t *testing.T) {
	const limit = 10_000
	p := newPair(t, pairOptions{consumer: stream.ClientParams{FallbackBuffer: limit}})
	w, other := newWriterStream(t, p)
	slow, publishSlow := oldProducer(t, p)
	quick, publishQuick := oldProducer(t, p)

	message := func(i int) []byte {
		return fmt.Appendf(nil, `{"type":1,"data":"%s"}`, base64.StdEncoding.EncodeToString(testRecord(i, 75)))
	}
	fits := limit / len(message(0))
	for i := range 3 * fits {
		publishSlow(message(i))
		publishQuick(message(i))
		write(t, w, testRecord(i, 75))
		for _, s := range []*stream.Stream{quick, other} {
			if rec, err := s.Recv(); !bytes.Equal(rec, testRecord(i, 75)) || err != nil {
				t.Fatalf("record %d of another stream: %d bytes, %v", i, len(rec), err)
			}
		}
	}
	closeWriter(t, w)
	publishQuick(fallbackFixture(t, "close_normal"))
	wantEOF(t, quick)
	wantEOF(t, other)

	got, err := readAll(slow)
	ce, ok := errors.AsType[*stream.CloseError](err)
	if !ok || ce.Code != stream.CloseTooSlow || ce.Text == "" {
		t.Fatalf("the slow stream ends with %v, want close %d and a reason", err, stream.CloseTooSlow)
	}
	if len(got) != fits {
		t.Errorf("%d records before the end, %d fit into the buffer", len(got), fits)
	}
	for i, rec := range got {
		if !bytes.Equal(rec, testRecord(i, 75)) {
			t.Fatalf("record %d differs", i)
		}
	}
}

// A stream takes the form of its first message, and drops and counts the other.
func TestStreamKeepsTheFormOfItsFirstMessage(t *testing.T) {
	p := newPair(t)
	t.Run("packets into a fallback stream", func(t *testing.T) {
		s, publish := oldProducer(t, p)
		before := p.consumer.Stats()
		publish(fallbackFixture(t, "data"),
			rawPacket(stream.PacketSeq, 7, 0, rawData("x"), rawClose(1000)),
			rawPacket(0, 7, 0, rawReset(4000)),
			[]byte{stream.PacketMagic},
			fallbackFixture(t, "data_bytes"),
			fallbackFixture(t, "close_normal"))
		got, err := readAll(s)
		if len(got) != 2 || string(got[0]) != "hello" || string(got[1]) != allBytes() || err != io.EOF {
			t.Fatalf("%q, %v", got, err)
		}
		after := p.consumer.Stats()
		if f, m := after.DroppedForeign-before.DroppedForeign, after.DroppedMalformed-before.DroppedMalformed; f != 2 || m != 1 {
			t.Errorf("%d foreign and %d malformed packets counted, want 2 and 1", f, m)
		}
	})
	t.Run("JSON into a stream of packets", func(t *testing.T) {
		s, publish := oldProducer(t, p)
		before := p.consumer.Stats()
		publish(rawPacket(stream.PacketSeq, 7, 0, rawData("a")),
			fallbackFixture(t, "data"),
			fallbackFixture(t, "close_bad_request"),
			[]byte("not even JSON"),
			rawPacket(stream.PacketSeq, 7, 1, rawData("b"), rawClose(1000)))
		got, err := readAll(s)
		if len(got) != 2 || string(got[0]) != "a" || string(got[1]) != "b" || err != io.EOF {
			t.Fatalf("%q, %v", got, err)
		}
		if n := p.consumer.Stats().DroppedForeign - before.DroppedForeign; n != 3 {
			t.Errorf("%d foreign messages counted, want 3", n)
		}
	})
}

// A busy old producer and our reader, and our writer and a busy old consumer; nothing is lost and
// records stay apart though they are decoded in place.
func TestFallbackManyStreamsArrive(t *testing.T) {
	p := newPair(t)
	count := scaled(20_000)
	t.Run("read", func(t *testing.T) {
		s, reply, nc := rawStream(t, p)
		p.handlers.Go(func() {
			for i := range count {
				m, err := json.Marshal(stream.StreamingMsg{Type: stream.StreamingMsgTypeData, Data: testRecord(i, i%300)})
				if err == nil {
					err = nc.Publish(reply, m)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
			rawPublish(t, nc, reply, []byte(`{"type":2,"closeError":{"Code":1000,"Text":""}}`))
		})
		got, err := readAll(s)
		if len(got) != count || err != io.EOF {
			t.Fatalf("%d records of %d, %v", len(got), count, err)
		}
		for i, rec := range got {
			if !bytes.Equal(rec, testRecord(i, i%300)) {
				t.Fatalf("record %d differs", i)
			}
		}
	})
	t.Run("write", func(t *testing.T) {
		messages := make(chan *nats.Msg, count+1)
		sub, err := p.consumer.Conn.ChanSubscribe(oldInbox, messages)
		if err != nil {
			t.Fatal(err)
		}
		defer sub.Unsubscribe()
		if err := p.consumer.Conn.Flush(); err != nil {
			t.Fatal(err)
		}
		w := p.producer.NewWriter(oldInbox)
		for i := range count {
			write(t, w, testRecord(i, i%300))
		}
		closeWriter(t, w)
		for i := range count {
			var msg stream.StreamingMsg
			if err := json.Unmarshal((<-messages).Data, &msg); err != nil || !bytes.Equal(msg.Data, testRecord(i, i%300)) {
				t.Fatalf("record %d differs, %v", i, err)
			}
		}
		if m := <-messages; !bytes.Equal(m.Data, fallbackFixture(t, "close_normal")) {
			t.Errorf("%s, want the close message", m.Data)
		}
	})
}

// Old consumers are served by the same handler. It reads nothing from them.
func TestFallbackConsumerIsServed(t *testing.T) {
	result := make(chan error, 1)
	p, _ := newServed(t, stream.ServerParams{MaxFallback: 10}, func(w *stream.Writer, r *stream.Request) error {
		_, err := r.Recv()
		result <- err
		if err := w.SetHeader(nats.Header{"K": {"v"}}); err != nil {
			t.Error(err)
		}
		write(t, w, []byte("one"), nil)
		if _, err := w.WriteObject(map[string]int{"n": 1}); err != nil {
			t.Error(err)
		}
		if string(r.Data) == "fail" {
			return &stream.CloseError{Code: 4321, Text: "text"}
		}
		return nil
	})
	for data, want := range map[string]stream.CloseError{"": {Code: 1000}, "fail": {Code: 4321, Text: "text"}} {
		inbox, messages := jsonInbox(t, p)
		if err := p.consumer.Conn.PublishRequest("svc", inbox, []byte(data)); err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{"one", "", `{"n":1}`} {
			if m := nextJSON(t, messages); m.Type != stream.StreamingMsgTypeData || string(m.Data) != want {
				t.Errorf("got %+v, want %q", m, want)
			}
		}
		if m := nextJSON(t, messages); m.Type != stream.StreamingMsgTypeClose || m.CloseError == nil || *m.CloseError != want {
			t.Errorf("got %+v, want %v", m, want)
		}
		if err := <-result; err != io.EOF {
			t.Errorf("Recv in the handler: %v, want io.EOF", err)
		}
	}
}

func requestFallback(t *testing.T, nc *nats.Conn, reply string) {
	t.Helper()
	if err := nc.PublishRequest("svc", reply, nil); err != nil {
		t.Fatal(err)
	}
}

func wantRefusal(t *testing.T, messages *nats.Subscription, code int) {
	t.Helper()
	if m := nextJSON(t, messages); m.Type != stream.StreamingMsgTypeClose || m.CloseError == nil || m.CloseError.Code != code {
		t.Errorf("a fallback consumer got %+v, want close %d", m, code)
	}
}

func TestServerRefusesTheFallbackByDefault(t *testing.T) {
	p, _ := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		if len(r.Data) == 0 {
			t.Error("a fallback consumer is served")
		}
		return nil
	})
	inbox, messages := jsonInbox(t, p)
	requestFallback(t, p.consumer.Conn, inbox)
	wantRefusal(t, messages, stream.CloseUnsupportedData)
	s, err := p.consumer.Open(testContext(t), "svc", []byte("binary"))
	if err != nil {
		t.Fatal(err)
	}
	wantEOF(t, s)
	// One message for one message: there is nothing to be gained by a reply subject of somebody else.
	if m, err := messages.NextMsg(20 * time.Millisecond); err == nil {
		t.Errorf("a second message: %q", m.Data)
	}
}

// A consumer that speaks only the fallback acknowledges nothing and answers no question. What it can make a server do
// is bounded by the server's parameters, and by NATS, which says if nobody receives a message.

// fallbackCause serves "svc" with handlers that write until that fails, and returns the causes of their ends.
func fallbackCause(t *testing.T, params stream.ServerParams) (*pair, *service, chan error) {
	t.Helper()
	causes := make(chan error, 100)
	p, s := newServed(t, params, func(w *stream.Writer, r *stream.Request) error {
		for {
			if _, err := w.Write([]byte("record")); err != nil {
				<-r.Context().Done()
				causes <- context.Cause(r.Context())
				return err
			}
			_ = w.Flush() // the next write fails as well
		}
	})
	return p, s, causes
}

// Requests whose reply subject nobody listens at do not hold handlers.
func TestFallbackStreamEndsIfNobodyReceivesIt(t *testing.T) {
	const requests = 5
	p, s, causes := fallbackCause(t, stream.ServerParams{MaxStreams: requests + 1, MaxFallback: requests})
	for range 4 {
		for range requests {
			requestFallback(t, p.consumer.Conn, "no.body")
		}
		for range requests {
			waitFor(t, "the handler's end", func() {
				err := <-causes
				if !errors.Is(err, nats.ErrNoResponders) {
					t.Errorf("the handler's context ended with %v", err)
				}
				wantCode(t, err, stream.CloseAbnormalClosure, "")
			})
		}
		eventually(t, "the streams are gone", func() bool { return s.Stats().Streams == 0 })
		time.Sleep(10 * time.Millisecond) // the handlers are counted out as they return
	}
}

func TestFallbackConsumerThatLeavesIsNoticed(t *testing.T) {
	p, _, causes := fallbackCause(t, stream.ServerParams{MaxFallback: 1, KeepAlive: 20 * time.Millisecond})
	inbox, messages := jsonInbox(t, p)
	requestFallback(t, p.consumer.Conn, inbox)
	for range 100 {
		if m := nextJSON(t, messages); m.Type != stream.StreamingMsgTypeData || string(m.Data) != "record" {
			t.Fatalf("got %+v", m)
		}
	}
	if err := messages.Unsubscribe(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the handler's end", func() {
		if err := <-causes; !errors.Is(err, nats.ErrNoResponders) {
			t.Errorf("the handler's context ended with %v", err)
		}
	})
}

// Messages that carry a question to NATS are what they would be without: the original library sees no difference.
func TestFallbackQuestionsDisturbNobody(t *testing.T) {
	const records = 500
	tried := make(chan struct{})
	p, s := newServed(t, stream.ServerParams{MaxFallback: 1, KeepAlive: time.Millisecond}, func(w *stream.Writer, _ *stream.Request) error {
		for left := records; left > 0; {
			select {
			case <-tried:
				left--
			case <-time.After(time.Millisecond): // until there was a question
			}
			if _, err := w.Write([]byte("record")); err != nil {
				return err
			}
			if err := w.Flush(); err != nil {
				return err
			}
		}
		return nil
	})
	inbox, messages := jsonInbox(t, p)
	requestFallback(t, p.consumer.Conn, inbox)
	asked := 0
	m := nextRequest(t, messages)
	for i := 0; string(m.Data) != `{"type":2,"closeError":{"Code":1000,"Text":""}}`; i++ {
		if string(m.Data) != `{"type":1,"data":"cmVjb3Jk"}` {
			t.Fatalf("message %d is %q", i, m.Data)
		}
		if (m.Reply != "") != (m.Header.Get("Stream-Probe") != "") {
			t.Fatalf("message %d has reply subject %q, header %v", i, m.Reply, m.Header)
		}
		if m.Reply != "" {
			if asked++; asked == 1 { // to know the subject is of no use
				rawPublish(t, p.consumer.Conn, m.Reply, rawPacket(0, 7, 0, rawCredit(stream.Credit{Ack: 9})), rawPacket(stream.PacketSeq, 7, 0, rawData("x")), []byte(`{"type":1}`))
				eventually(t, "it is dropped", func() bool { return s.Stats().DroppedForeign > 0 })
				close(tried)
			}
		}
		m = nextRequest(t, messages)
	}
	if asked == 0 {
		t.Error("no message asked")
	}
}

func TestFallbackTimeoutEndsTheStream(t *testing.T) {
	p, _, causes := fallbackCause(t, stream.ServerParams{MaxFallback: 1, FallbackTimeout: 50 * time.Millisecond})
	for _, timeout := range []string{"", "3600000", "10"} {
		inbox, messages := jsonInbox(t, p)
		m := &nats.Msg{Subject: "svc", Reply: inbox, Header: nats.Header{}}
		if timeout != "" {
			m.Header["Stream-Timeout"] = []string{timeout}
		}
		if err := p.consumer.Conn.PublishMsg(m); err != nil {
			t.Fatal(err)
		}
		for {
			if m := nextJSON(t, messages); m.Type == stream.StreamingMsgTypeClose {
				wantCode(t, m.CloseError, stream.CloseDeadlineExceeded, "")
				break
			}
		}
		wantCode(t, <-causes, stream.CloseDeadlineExceeded, "")
		time.Sleep(10 * time.Millisecond) // the handler is counted out as it returns
	}
}

// Fallback consumers have their own share of the handlers, so that others find room.
func TestMaxFallbackLeavesRoomForOthers(t *testing.T) {
	release, began := make(chan struct{}), make(chan struct{}, 10)
	p, _ := newServed(t, stream.ServerParams{MaxStreams: 4, MaxFallback: 2}, func(*stream.Writer, *stream.Request) error {
		began <- struct{}{}
		<-release
		return nil
	})
	inbox, messages := jsonInbox(t, p)
	for range 2 {
		requestFallback(t, p.consumer.Conn, inbox)
		<-began
	}
	requestFallback(t, p.consumer.Conn, inbox)
	wantRefusal(t, messages, stream.CloseTryAgainLater)
	s := open(t, p.consumer, "svc")
	<-began
	close(release)
	wantEOF(t, s)
	for range 2 {
		wantRefusal(t, messages, stream.CloseNormalClosure)
	}
	eventually(t, "there is room again", func() bool {
		requestFallback(t, p.consumer.Conn, inbox)
		return nextJSON(t, messages).CloseError.Code == stream.CloseNormalClosure
	})
}

// A fallback consumer whose producer's client is closed is told, as the original library would have done it.
func TestFallbackConsumerIsToldOfClientClose(t *testing.T) {
	p := newPair(t)
	c := p.newClient(t, stream.ClientParams{})
	messages, err := p.consumer.Conn.SubscribeSync(oldInbox)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.consumer.Conn.Flush(); err != nil {
		t.Fatal(err)
	}
	w := c.NewWriter(oldInbox)
	write(t, w, []byte("hello"))
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); !errors.Is(err, stream.ErrClientClosed) {
		t.Errorf("Writer.Close: %v", err)
	}
	for _, want := range []stream.StreamingMsg{
		{Type: stream.StreamingMsgTypeData, Data: []byte("hello")},
		{Type: stream.StreamingMsgTypeClose, CloseError: &stream.CloseError{Code: stream.CloseGoingAway, Text: "client closed"}},
	} {
		b, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		m, err := messages.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		if string(m.Data) != string(b) {
			t.Errorf("%s, want %s", m.Data, b)
		}
	}
}
