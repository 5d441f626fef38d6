package stream_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/concurrency"
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

func TestOpenStreamNormal(t *testing.T) {
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

func TestOpenStreamCloseCodes(t *testing.T) {
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
func TestOpenStreamObjects(t *testing.T) {
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

func TestOpenStreamNoResponders(t *testing.T) {
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

func TestOpenStreamContextEnds(t *testing.T) {
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

func TestOpenStreamClientCloses(t *testing.T) {
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

func TestOpenStreamConnectionCloses(t *testing.T) {
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
func TestOpenStreamAllocations(t *testing.T) {
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
	if !stream.RaceEnabled && perRecord >= 0.2 {
		t.Errorf("%.4f mallocs per record, want less than 0.2", perRecord)
	}
	receive(t, ch)
}

func TestStreamingMsgJSON(t *testing.T) {
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

func TestOriginalCloseCodes(t *testing.T) {
	got := []int{stream.CloseNormalClosure, stream.CloseGoingAway, stream.CloseUnsupportedData, stream.CloseAbnormalClosure, stream.CloseBadRequest, stream.CloseInternalServerErr}
	if fmt.Sprint(got) != "[1000 1001 1003 1006 4000 5000]" {
		t.Errorf("%v", got)
	}
}
