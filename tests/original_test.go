package stream_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/concurrency"
	"github.com/natsstream/stream/internal/race"
)

type resultChannel = <-chan *concurrency.AsyncResult[[]byte]

// openStream opens a stream in the original way and plays the producer of it.
func openStream(t *testing.T, p *pair, ctx context.Context) (*stream.Writer, resultChannel) {
	t.Helper()
	subject := nats.NewInbox()
	sub, err := p.producer.Conn.SubscribeSync(subject)
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Unsubscribe()
	if err := p.producer.Conn.Flush(); err != nil {
		t.Fatal(err)
	}
	ch, err := p.consumer.OpenStream(ctx, subject, []byte("request"))
	if err != nil {
		t.Fatal(err)
	}
	req, err := sub.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	if string(req.Data) != "request" {
		t.Errorf("the request is %q", req.Data)
	}
	return stream.NewWriter(p.producer, req.Reply), ch
}

// receive returns the results up to the end of ch.
func receive(t *testing.T, ch resultChannel) (values [][]byte, failures []error) {
	t.Helper()
	waitFor(t, "the channel to be closed", func() {
		for res := range ch {
			if value, err := res.ValueOrError(); err != nil {
				failures = append(failures, err)
			} else {
				values = append(values, value)
			}
		}
	})
	return values, failures
}

func TestOpenStreamYieldsRecordsAndCloses(t *testing.T) {
	p := newPair(t)
	w, ch := openStream(t, p, testContext(t))
	if cap(ch) != stream.RequestChanLen || stream.RequestChanLen != 16 {
		t.Errorf("the channel holds %d results, RequestChanLen is %d", cap(ch), stream.RequestChanLen)
	}
	count := scaled(10000)
	p.handlers.Go(func() {
		for i := range count {
			write(t, w, testRecord(i, i%500))
		}
		closeWriter(t, w)
	})
	values, failures := receive(t, ch)
	if len(values) != count || failures != nil {
		t.Fatalf("%d values, %v", len(values), failures)
	}
	for i, v := range values {
		if !bytes.Equal(v, testRecord(i, i%500)) {
			t.Fatalf("value %d differs", i)
		}
	}
}

func TestOpenStreamReportsCloseCodes(t *testing.T) {
	p := newPair(t)
	for _, code := range []int{stream.CloseGoingAway, stream.CloseUnsupportedData, stream.CloseAbnormalClosure, stream.CloseBadRequest, stream.CloseInternalServerErr} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			w, ch := openStream(t, p, testContext(t))
			write(t, w, []byte("value"))
			if err := w.CloseWithCode(code, "some", "text"); err != nil {
				t.Fatal(err)
			}
			values, failures := receive(t, ch)
			if len(values) != 1 || len(failures) != 1 {
				t.Fatalf("%q, %v", values, failures)
			}
			closed, ok := failures[0].(*stream.CloseError)
			if !ok || closed.Code != code || closed.Text != "some text" {
				t.Errorf("%#v", failures[0])
			}
		})
	}
}

// Objects arrive as JSON, whatever codec the client asks for otherwise.
func TestOpenStreamObjectsAreJSON(t *testing.T) {
	type object struct {
		Name string `json:"name"`
		List []int  `json:"list"`
		HTML string
	}
	for _, codec := range []stream.Codec{stream.CodecDefault, stream.JSON, stream.MsgPack} {
		p := newPair(t, pairOptions{consumer: stream.ClientParams{Codec: codec}})
		w, ch := openStream(t, p, testContext(t))
		want := object{"gopher", []int{1, 2, 3}, "<&>"}
		exact, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := w.WriteObject(want); n != len(exact) || err != nil {
			t.Errorf("WriteObject: %d, %v", n, err)
		}
		closeWriter(t, w)
		values, failures := receive(t, ch)
		if len(values) != 1 || failures != nil {
			t.Fatalf("%q, %v", values, failures)
		}
		if !bytes.Equal(values[0], exact) {
			t.Errorf("%s, want %s", values[0], exact)
		}
	}
}

func TestOpenStreamReportsNoResponders(t *testing.T) {
	p := newPair(t)
	ch, err := p.consumer.OpenStream(testContext(t), "nobody", nil)
	if err != nil {
		t.Fatal(err)
	}
	values, failures := receive(t, ch)
	if values != nil || len(failures) != 1 || !errors.Is(failures[0], nats.ErrNoResponders) {
		t.Errorf("%q, %v; want nats.ErrNoResponders alone", values, failures)
	}
}

func TestOpenStreamEndsWithItsContext(t *testing.T) {
	for _, deadline := range []bool{false, true} {
		start := func(t *testing.T) (context.Context, func()) {
			if !deadline {
				return context.WithCancel(context.Background())
			}
			ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
			t.Cleanup(cancel)
			return ctx, func() { <-ctx.Done() }
		}
		name := fmt.Sprintf("deadline=%v/", deadline)
		t.Run(name+"silent producer", func(t *testing.T) {
			p := newPair(t)
			ctx, end := start(t)
			w, ch := openStream(t, p, ctx)
			defer w.CloseWithCode(4000)
			end()
			if values, failures := receive(t, ch); values != nil || len(failures) != 1 || !errors.Is(failures[0], ctx.Err()) {
				t.Errorf("%q, %v; want %v alone", values, failures, ctx.Err())
			}
		})
		t.Run(name+"full channel", func(t *testing.T) {
			p := newPair(t)
			ctx, end := start(t)
			w, ch := openStream(t, p, ctx)
			for i := range 10 * stream.RequestChanLen {
				write(t, w, testRecord(i, 10))
			}
			eventually(t, "the channel is full", func() bool { return len(ch) == cap(ch) })
			end()
			waitFor(t, "the producer to notice", func() { <-w.Context().Done() })
			values, failures := receive(t, ch)
			if len(failures) != 1 || !errors.Is(failures[0], ctx.Err()) || len(values) > stream.RequestChanLen+1 {
				t.Errorf("%d values, %v; want %v at the end", len(values), failures, ctx.Err())
			}
			for i, v := range values {
				if !bytes.Equal(v, testRecord(i, 10)) {
					t.Errorf("value %d differs", i)
				}
			}
		})
	}
}

func TestOpenStreamEndsWithItsClient(t *testing.T) {
	p := newPair(t)
	w, ch := openStream(t, p, testContext(t))
	write(t, w, []byte("value"))
	waitFor(t, "the value", func() {
		if v, err := (<-ch).ValueOrError(); err != nil || string(v) != "value" {
			t.Errorf("%q, %v", v, err)
		}
	})
	waitFor(t, "Close", func() { p.consumer.Close() })
	if values, failures := receive(t, ch); values != nil || len(failures) != 1 || failures[0] != stream.ErrClientClosed {
		t.Errorf("%q, %v", values, failures)
	}
	endedBy(t, w, &stream.CloseError{Code: stream.CloseGoingAway})
}

func TestOpenStreamEndsWithItsConnection(t *testing.T) {
	p := newPair(t, hasty)
	w, ch := openStream(t, p, testContext(t))
	write(t, w, []byte("value"))
	waitFor(t, "the value", func() { <-ch })
	p.consumer.Conn.Close()
	values, failures := receive(t, ch)
	if values != nil || len(failures) != 1 || !errors.Is(failures[0], &stream.CloseError{Code: stream.CloseAbnormalClosure}) {
		t.Errorf("%q, %v", values, failures)
	}
	_ = w.Close()
}

// The last result of OpenStream has the error of any end but the normal one. The results before it are the first
// records.
func TestOpenStreamReportsEveryEnd(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	s.handle(t, "endless", func(w *stream.Writer, _ *stream.Request) error {
		for i := 0; ; i++ {
			if _, err := w.Write([]byte(fmt.Sprint(i))); err != nil {
				return err
			}
		}
	})
	cause := errors.New("budget used up")
	c := newConcurrent(t)
	defer c.Wait()
	for _, read := range []int{0, 1, stream.RequestChanLen, 100} {
		for name, start := range map[string]func() (context.Context, func()){
			"cancel": func() (context.Context, func()) { return context.WithCancel(context.Background()) },
			"cause": func() (context.Context, func()) {
				ctx, cancel := context.WithCancelCause(context.Background())
				return ctx, func() { cancel(cause) }
			},
		} {
			for _, waits := range []bool{false, true} {
				c.Run(fmt.Sprintf("%s/%d read, waits %v", name, read, waits), func(t *testing.T) {
					ctx, end := start()
					ch, err := p.consumer.OpenStream(ctx, "endless", nil)
					if err != nil {
						t.Fatal(err)
					}
					next := 0
					for range read {
						if v, err := (<-ch).ValueOrError(); err != nil || string(v) != fmt.Sprint(next) {
							t.Fatalf("record %d: %q, %v", next, v, err)
						}
						next++
					}
					if waits {
						eventually(t, "the channel is full", func() bool { return len(ch) == cap(ch) })
					}
					end()
					if waits { // until it is taken for a caller that is gone
						eventually(t, "only the error is left", func() bool { return len(ch) == 1 })
					}
					var last error
					waitFor(t, "the channel to be closed", func() {
						for res := range ch {
							v, err := res.ValueOrError()
							switch {
							case last != nil:
								t.Errorf("a result after the error: %q, %v", v, err)
							case err != nil:
								last = err
							case string(v) != fmt.Sprint(next):
								t.Errorf("record %q after %d", v, next-1)
							}
							next++
						}
					})
					if !errors.Is(last, context.Canceled) || name == "cause" && !errors.Is(last, cause) {
						t.Errorf("the last result has %v", last)
					}
				})
			}
		}
	}
}

// Results are never used again: a caller may keep all of them.
func TestOpenStreamResultsAreKept(t *testing.T) {
	p := newPair(t)
	var kept []*concurrency.AsyncResult[[]byte]
	const count = 300
	for k := range 3 {
		w, ch := openStream(t, p, testContext(t))
		p.handlers.Go(func() {
			for i := range count {
				write(t, w, testRecord(k*count+i, 40))
			}
			if err := w.CloseWithCode(4000 + k); err != nil {
				t.Errorf("CloseWithCode: %v", err)
			}
		})
		waitFor(t, "the channel to be closed", func() {
			for res := range ch {
				kept = append(kept, res)
			}
		})
	}
	runtime.GC()
	if len(kept) != 3*(count+1) {
		t.Fatalf("%d results", len(kept))
	}
	seen := make(map[*concurrency.AsyncResult[[]byte]]bool)
	for n, res := range kept {
		if seen[res] {
			t.Fatalf("result %d was used twice", n)
		}
		seen[res] = true
		k, i := n/(count+1), n%(count+1)
		if i == count {
			if !errors.Is(res.Err, &stream.CloseError{Code: 4000 + k}) {
				t.Errorf("the last result of stream %d: %v", k, res.Err)
			}
		} else if res.Err != nil || !bytes.Equal(res.Value, testRecord(k*count+i, 40)) {
			t.Fatalf("result %d of stream %d was overwritten", i, k)
		}
	}
}

// Results come out of slabs: much less than one allocation each.
func TestOpenStreamAllocatesLittle(t *testing.T) {
	p := newPair(t)
	w, ch := openStream(t, p, testContext(t))
	count := scaled(200000)
	start := make(chan struct{})
	p.handlers.Go(func() {
		rec := make([]byte, 128)
		for i := range 2 * count {
			if i == count {
				<-start
			}
			if _, err := w.Write(rec); err != nil {
				t.Errorf("Write: %v", err)
				return
			}
		}
		closeWriter(t, w)
	})
	receiveN := func() {
		for range count {
			if v, err := (<-ch).ValueOrError(); err != nil || len(v) != 128 {
				t.Fatalf("%d bytes, %v", len(v), err)
			}
		}
	}
	receiveN()
	n := mallocs(func() {
		close(start)
		receiveN()
	})
	perRecord := float64(n) / float64(count)
	t.Logf("%.4f mallocs per record", perRecord)
	if !race.Enabled && perRecord >= 0.2 {
		t.Errorf("%.4f mallocs per record, want less than 0.2", perRecord)
	}
	receive(t, ch)
}

func TestStreamingMsgIsEncodedAsBefore(t *testing.T) {
	for _, tt := range []struct {
		msg  stream.StreamingMsg
		want string
	}{
		{stream.StreamingMsg{Type: stream.StreamingMsgTypeData, Data: []byte("hello")}, `{"type":1,"data":"aGVsbG8="}`},
		{stream.StreamingMsg{Type: stream.StreamingMsgTypeClose, CloseError: &stream.CloseError{Code: 1000}}, `{"type":2,"closeError":{"Code":1000,"Text":""}}`},
	} {
		got, err := json.Marshal(tt.msg)
		if err != nil || string(got) != tt.want {
			t.Errorf("%s, %v; want %s", got, err, tt.want)
		}
	}
}

func TestOriginalCloseCodesAreUnchanged(t *testing.T) {
	got := []int{stream.CloseNormalClosure, stream.CloseGoingAway, stream.CloseUnsupportedData, stream.CloseAbnormalClosure, stream.CloseBadRequest, stream.CloseInternalServerErr}
	if fmt.Sprint(got) != "[1000 1001 1003 1006 4000 5000]" {
		t.Errorf("%v", got)
	}
}

func TestNewWriterRefusesWhatIsNoRequest(t *testing.T) {
	p := newPair(t)
	all := func(t *testing.T, w *stream.Writer, want error) {
		t.Helper()
		waitFor(t, "the calls to fail", func() {
			for i, err := range []error{
				errOf(w.Write(nil)), errOf(w.Write([]byte("x"))), errOf(w.WriteObject(1)), errOf(w.ReadFrom(strings.NewReader("x"))),
				errOf(fmt.Fprint(w, "x")), w.Close(), w.CloseWithCode(4000),
			} {
				if !errors.Is(err, want) {
					t.Errorf("call %d: %v; want %v", i, err, want)
				}
			}
			w.Flush() // has nothing to do
			if w.Context() == nil {
				t.Error("there is no context")
			}
		})
	}
	all(t, stream.NewWriter(nil, "a.b"), nats.ErrInvalidConnection)
	all(t, (*stream.Client)(nil).NewWriter("a.b"), nats.ErrInvalidConnection)
	all(t, stream.NewWriter(new(stream.Client), "a.b"), nats.ErrInvalidConnection)
	all(t, stream.NewWriter(p.producer, ""), nats.ErrBadSubject)
	all(t, p.producer.NewWriter("_SINBOX.x.~2m5IAAAAAAAAAAA"), stream.ErrVersion)
	if n := p.producer.Stats(); n.Streams != 0 || n.PacketsSent != 0 {
		t.Errorf("%+v", n)
	}
}

// A writer may be made and used within a NATS callback, also on the connection and the client that opened the stream:
// a callback may write a window without waiting.
func TestNewWriterWorksInACallback(t *testing.T) {
	for _, shared := range []bool{false, true} {
		t.Run(fmt.Sprint("shared=", shared), func(t *testing.T) {
			p := newPair(t, pairOptions{shared: shared})
			sub, err := p.producer.Conn.Subscribe("callback", func(m *nats.Msg) {
				w := stream.NewWriter(p.producer, m.Reply)
				for i := range 1000 {
					write(t, w, testRecord(i, 100))
				}
				if _, err := w.WriteObject("object"); err != nil {
					t.Errorf("WriteObject: %v", err)
				}
				if err := w.Flush(); err != nil {
					t.Errorf("Flush: %v", err)
				}
				closeWriter(t, w)
			})
			if err != nil {
				t.Fatal(err)
			}
			defer sub.Unsubscribe()
			if err := p.producer.Conn.Flush(); err != nil {
				t.Fatal(err)
			}
			var streams []*stream.Stream
			for range 10 {
				streams = append(streams, open(t, p.consumer, "callback"))
			}
			for _, s := range streams {
				got, err := readAll(s)
				if err != io.EOF || len(got) != 1001 {
					t.Fatalf("%d records, %v", len(got), err)
				}
				for i, rec := range got[:1000] {
					if !bytes.Equal(rec, testRecord(i, 100)) {
						t.Fatalf("record %d differs", i)
					}
				}
			}
		})
	}
}

// A writer whose client or connection is gone says so, in whatever state it was. None of its calls hangs.
func TestWriterWithoutClientFails(t *testing.T) {
	for _, gone := range []struct {
		name  string
		close func(c *stream.Client)
		want  error
	}{
		{"clientClosed", func(c *stream.Client) { _ = c.Close() }, stream.ErrClientClosed},
		{"connectionClosed", func(c *stream.Client) { c.Conn.Close() }, nats.ErrConnectionClosed},
	} {
		for _, peer := range []string{"binary", "fallback"} {
			for _, before := range []string{"nothing", "write", "flush", "made after"} {
				t.Run(fmt.Sprintf("%s/%s/%s", gone.name, peer, strings.ReplaceAll(before, " ", "")), func(t *testing.T) {
					p := newPair(t)
					c := p.newClient(t, stream.ClientParams{})
					subject := "old.abcdefgh"
					if peer == "binary" {
						sub, err := p.producer.Conn.SubscribeSync("request")
						if err != nil {
							t.Fatal(err)
						}
						open(t, p.producer, "request")
						req, err := sub.NextMsg(patience)
						if err != nil {
							t.Fatal(err)
						}
						subject = req.Reply
					}
					var w *stream.Writer
					if before != "made after" {
						w = c.NewWriter(subject)
					}
					if before == "write" || before == "flush" {
						write(t, w, []byte("record"))
					}
					if before == "flush" {
						if err := w.Flush(); err != nil {
							t.Fatal(err)
						}
					}
					gone.close(c)
					if before == "made after" {
						w = c.NewWriter(subject)
					}
					verifyPromptly(t, "the writer's context", func() { <-w.Context().Done() })
					if t.Failed() {
						return
					}
					verifyPromptly(t, "Flush or Close", func() {
						// A packet that is open takes records until the outbox has thrown it away.
						var err error
						poll(func() bool { _, err = w.Write([]byte("more")); return err != nil })
						if !errors.Is(err, gone.want) {
							t.Errorf("Write: %v, want %v", err, gone.want)
						}
						_ = w.Flush()
						if err := w.Close(); !errors.Is(err, gone.want) {
							t.Errorf("Close: %v, want %v", err, gone.want)
						}
					})
				})
			}
		}
	}
}

// A writer that is never closed ends with its client, and so does its consumer's stream.
func TestWriterNeverClosedEndsWithItsClient(t *testing.T) {
	p := newPair(t)
	c := p.newClient(t, stream.ClientParams{})
	serveClient(t, p, c, "records", func(w *stream.Writer, _ *nats.Msg) { write(t, w, []byte("only")) })
	s := open(t, p.consumer, "records")
	if rec, err := s.Recv(); string(rec) != "only" || err != nil {
		t.Fatalf("Recv: %q, %v", rec, err)
	}
	waitFor(t, "Client.Close", func() { _ = c.Close() })
	if _, err := s.Recv(); !errors.Is(err, &stream.CloseError{Code: stream.CloseGoingAway}) {
		t.Errorf("Recv: %v", err)
	}
}
