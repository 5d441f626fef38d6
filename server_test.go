package stream_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// slack is what a loaded machine may add to a bound on time.
const slack = 250 * time.Millisecond

// service is a Server on a connection of its own.
type service struct {
	*stream.Server
	nc *nats.Conn
}

// newService makes a server for a test. At the end of the test, where it passed, no stream and no reserved byte may be left.
func newService(t testing.TB, p *pair, params stream.ServerParams, opts ...nats.Option) *service {
	t.Helper()
	nc, err := p.server.Dial(opts...)
	if err != nil {
		t.Fatal(err)
	}
	params.Conn = nc
	s, err := stream.NewServer(params)
	if err != nil {
		nc.Close()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var left stream.Stats
		if !t.Failed() && !poll(func() bool { left = s.Stats(); return left.Streams == 0 && left.Reserved == 0 && left.Kept == 0 }) {
			t.Errorf("server has not given back: %d streams, %d bytes reserved, %d kept", left.Streams, left.Reserved, left.Kept)
		}
		verifyPromptly(t, "Server.Close", func() { _ = s.Close() })
		nc.Close()
	})
	return &service{s, nc}
}

// handle serves subject and returns when NATS knows.
func (s *service) handle(t testing.TB, subject string, h stream.Handler) {
	t.Helper()
	if _, err := s.Handle(subject, h); err != nil {
		t.Fatal(err)
	}
	if err := s.nc.Flush(); err != nil {
		t.Fatal(err)
	}
}

// newServed is a pair and a server that serves "svc" with h.
func newServed(t testing.TB, params stream.ServerParams, h stream.Handler) (*pair, *service) {
	t.Helper()
	p := newPair(t)
	s := newService(t, p, params)
	s.handle(t, "svc", h)
	return p, s
}

// wantClose fails the test unless err is, or wraps, a *CloseError with that code and text; an empty text is any.
func wantCode(t testing.TB, err error, code int, text string) {
	t.Helper()
	ce, ok := errors.AsType[*stream.CloseError](err)
	if !ok || ce.Code != code || text != "" && ce.Text != text {
		t.Errorf("error %v; want close code %d %q", err, code, text)
	}
}

// lockedBuffer is a buffer that a logger may write to while a test reads.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func panickingHandlerForTheStack() error { panic("no such luck") }

// What a handler returns is how its stream ends, after everything it wrote.
func TestHandlerResult(t *testing.T) {
	var log lockedBuffer
	var result func(w *stream.Writer) error
	p, _ := newServed(t, stream.ServerParams{Logger: slog.New(slog.NewTextHandler(&log, nil))},
		func(w *stream.Writer, r *stream.Request) error {
			write(t, w, []byte("a"), testRecord(1, 100_000))
			return result(w)
		})
	own := &stream.CloseError{Code: 4321, Text: "mine"}
	for _, c := range []struct {
		name   string
		result func(w *stream.Writer) error
		code   int
		text   string
	}{
		{"nil", func(*stream.Writer) error { return nil }, 1000, ""},
		{"CloseError", func(*stream.Writer) error { return own }, 4321, "mine"},
		{"wrapped CloseError", func(*stream.Writer) error { return fmt.Errorf("around: %w", own) }, 4321, "mine"},
		{"normal CloseError", func(*stream.Writer) error { return &stream.CloseError{Code: 1000} }, 1000, ""},
		{"nil CloseError", func(*stream.Writer) error { return (*stream.CloseError)(nil) }, 5000, ""},
		{"code too small", func(*stream.Writer) error { return &stream.CloseError{Code: 42, Text: "x"} }, 5000, ""},
		{"code too large", func(*stream.Writer) error { return &stream.CloseError{Code: 70000} }, 5000, ""},
		{"other error", func(*stream.Writer) error { return errors.New("boom") }, 5000, "boom"},
		{"io.EOF", func(*stream.Writer) error { return io.EOF }, 5000, "EOF"},
		{"panic", func(*stream.Writer) error { return panickingHandlerForTheStack() }, 5000, ""},
		{"panic with nil", func(*stream.Writer) error { panic(nil) }, 5000, ""},
		{"goroutine exits", func(*stream.Writer) error { runtime.Goexit(); return nil }, 5000, ""},
		{"closed itself", func(w *stream.Writer) error {
			if err := w.CloseWithCode(4444, "itself"); err != nil {
				t.Error(err)
			}
			return errors.New("not heard")
		}, 4444, "itself"},
		{"closed itself, then panic", func(w *stream.Writer) error {
			if err := w.CloseWithCode(4445, "itself"); err != nil {
				t.Error(err)
			}
			return panickingHandlerForTheStack()
		}, 4445, "itself"},
	} {
		t.Run(c.name, func(t *testing.T) {
			result = c.result
			s := open(t, p.consumer, "svc")
			records, err := readAll(s)
			if len(records) != 2 || !bytes.Equal(records[1], testRecord(1, 100_000)) {
				t.Errorf("%d records, or others than were written", len(records))
			}
			if c.code == 1000 {
				if err != io.EOF {
					t.Errorf("ended with %v, want io.EOF", err)
				}
				return
			}
			wantCode(t, err, c.code, c.text)
		})
	}
	for _, want := range []string{"no such luck", "panickingHandlerForTheStack", "subject=svc"} {
		eventually(t, "the logger has "+want, func() bool { return strings.Contains(log.String(), want) })
	}

	t.Run("long text", func(t *testing.T) {
		result = func(*stream.Writer) error { return errors.New(strings.Repeat("ä", stream.MaxReason)) }
		_, err := readAll(open(t, p.consumer, "svc"))
		ce, ok := errors.AsType[*stream.CloseError](err)
		if !ok || ce.Code != 5000 || len(ce.Text) > stream.MaxReason || len(ce.Text) < stream.MaxReason-4 || !utf8.ValidString(ce.Text) {
			t.Errorf("ended with %v", err)
		}
	})
}

func TestRequestFields(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	type fields struct {
		subject, data string
		header        nats.Header
		deadline      bool
	}
	got := make(chan fields, 1)
	s.handle(t, "svc.*.x", func(w *stream.Writer, r *stream.Request) error {
		_, deadline := r.Context().Deadline()
		got <- fields{r.Subject, string(r.Data), r.Header, deadline}
		return nil
	})
	for _, c := range []struct {
		name string
		msg  *nats.Msg
		want nats.Header
	}{
		{"no header", &nats.Msg{Subject: "svc.a.x", Data: []byte("hello")}, nil},
		{"header", &nats.Msg{Subject: "svc.b.x", Data: []byte{}, Header: nats.Header{"Key": {"1", "2"}, "lower": {"v"}}},
			nats.Header{"Key": {"1", "2"}, "lower": {"v"}}},
		{"header of the library", &nats.Msg{Subject: "svc.c.x", Header: nats.Header{"Stream-Other": {"1"}}}, nil},
		{"both", &nats.Msg{Subject: "svc.c.x", Header: nats.Header{"Stream-Other": {"1"}, "K": {"v"}}}, nats.Header{"K": {"v"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			st, err := p.consumer.OpenMsg(ctx, c.msg)
			if err != nil {
				t.Fatal(err)
			}
			defer st.Close()
			wantEOF(t, st)
			f := <-got
			if f.subject != c.msg.Subject || f.data != string(c.msg.Data) || fmt.Sprint(f.header) != fmt.Sprint(c.want) || (f.header == nil) != (c.want == nil) || f.deadline {
				t.Errorf("handler saw %+v, want header %v", f, c.want)
			}
		})
	}
}

// Beyond MaxStreams requests are refused, over all subjects, and there is room again when a handler returned.
func TestMaxStreams(t *testing.T) {
	release, began := make(chan struct{}), make(chan struct{}, 10)
	h := func(w *stream.Writer, r *stream.Request) error {
		began <- struct{}{}
		<-release
		return nil
	}
	p, s := newServed(t, stream.ServerParams{MaxStreams: 2, MaxFallback: 2}, h)
	s.handle(t, "other", h)
	a := open(t, p.consumer, "svc")
	<-began
	b := open(t, p.consumer, "other")
	<-began
	for _, subject := range []string{"svc", "other"} {
		_, err := open(t, p.consumer, subject).Recv()
		wantCode(t, err, stream.CloseTryAgainLater, "")
	}
	// The same in the words of a fallback consumer.
	inbox, messages := jsonInbox(t, p)
	if err := p.consumer.Conn.PublishRequest("svc", inbox, nil); err != nil {
		t.Fatal(err)
	}
	if m := nextJSON(t, messages); m.Type != stream.StreamingMsgTypeClose || m.CloseError == nil || m.CloseError.Code != stream.CloseTryAgainLater {
		t.Errorf("a fallback consumer got %+v", m)
	}
	release <- struct{}{}
	release <- struct{}{}
	wantEOF(t, a)
	wantEOF(t, b)
	close(release)
	eventually(t, "there is room again", func() bool {
		_, err := open(t, p.consumer, "svc").Recv()
		return err == io.EOF
	})
}

// jsonInbox subscribes to a reply subject as the original library made it.
func jsonInbox(t testing.TB, p *pair) (string, *nats.Subscription) {
	t.Helper()
	inbox := nats.NewInbox() + ".Ab3dEf7h"
	sub, err := p.consumer.Conn.SubscribeSync(inbox)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	return inbox, sub
}

func nextJSON(t testing.TB, sub *nats.Subscription) stream.StreamingMsg {
	t.Helper()
	raw := nextRequest(t, sub)
	var m stream.StreamingMsg
	if err := json.Unmarshal(raw.Data, &m); err != nil {
		t.Fatalf("message %q: %v", raw.Data, err)
	}
	return m
}

// Old consumers are served by the same handler. It reads nothing from them.
func TestServerFallback(t *testing.T) {
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

// Requests that nobody could be answered for are counted and reach no handler.
func TestDroppedRequests(t *testing.T) {
	p, s := newServed(t, stream.ServerParams{}, func(*stream.Writer, *stream.Request) error {
		t.Error("the handler was called")
		return nil
	})
	nc := p.consumer.Conn
	version2 := func(s string) string { return strings.Replace(s, "~1", "~2", 1) }
	offer := string(stream.AppendOffer(nil, stream.Token{Codec: stream.MsgPack, LogPackets: 5, LogBytes: 18}))
	for i, m := range []*nats.Msg{
		{Subject: "svc"},
		{Subject: "svc", Reply: version2(rawInbox())},
		{Subject: "svc", Reply: nats.NewInbox(), Header: nats.Header{"Stream-Open": {version2(offer)}}},
		{Subject: "svc", Reply: rawInbox(), Header: nats.Header{"Stream-Open": {version2(offer)}}},
	} {
		if err := nc.PublishMsg(m); err != nil {
			t.Fatal(err)
		}
		eventually(t, fmt.Sprint("request ", i, " is counted"), func() bool { return s.Stats().DroppedRequest == uint64(i+1) })
	}
}

// The header tells what the consumer takes where the reply subject cannot, or was rewritten.
func TestOpenHeader(t *testing.T) {
	p, _ := newServed(t, stream.ServerParams{ResumeTimeout: 50 * time.Millisecond}, func(w *stream.Writer, r *stream.Request) error {
		if _, err := w.WriteObject("x"); err != nil {
			t.Error(err)
		}
		return nil
	})
	nc := p.consumer.Conn
	for name, reply := range map[string]string{
		"no token":       nats.NewInbox(),
		"fallback token": nats.NewInbox() + ".Ab3dEf7h",
		"another token":  rawInbox(),
	} {
		t.Run(name, func(t *testing.T) {
			sub, err := nc.SubscribeSync(reply)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = sub.Unsubscribe() }()
			offer := string(stream.AppendOffer(nil, stream.Token{Codec: stream.JSON, LogPackets: 4, LogBytes: 16}))
			req := &nats.Msg{Subject: "svc", Reply: reply, Header: nats.Header{"Stream-Open": {offer}}}
			if err := nc.PublishMsg(req); err != nil {
				t.Fatal(err)
			}
			m := nextRequest(t, sub)
			h, rest, err := stream.ParsePacketHeader(m.Data)
			if err != nil || h.Flags&stream.PacketSeq == 0 || m.Reply == "" {
				t.Fatalf("got %q, %v; want a packet", m.Data, err)
			}
			f, _, err := stream.ParseFrame(rest)
			if err != nil || f.Type != stream.FrameData || f.Flags&stream.FlagCodecMask != stream.FlagJSON || string(f.Payload) != `"x"` {
				t.Errorf("first frame %+v, %v", f, err)
			}
		})
	}
}

func TestMalformedTimeout(t *testing.T) {
	p, _ := newServed(t, stream.ServerParams{}, func(_ *stream.Writer, r *stream.Request) error {
		t.Error("the handler was called")
		return nil
	})
	for _, v := range []string{"", "x", "0", "-1", "+1", "1.5", "1s", "99999999999999999999"} {
		ctx, cancel := context.WithCancel(context.Background())
		s, err := p.consumer.OpenMsg(ctx, &nats.Msg{Subject: "svc", Header: nats.Header{"Stream-Timeout": {v}}})
		if err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the refusal", func() { _, err = s.Recv() })
		wantCode(t, err, stream.CloseBadRequest, "")
		cancel()
		s.Close()
	}
}

// A queue group spreads requests: each goes to one of its servers.
func TestHandleQueue(t *testing.T) {
	p := newPair(t)
	var counts [2]atomic.Int32
	for i := range counts {
		s := newService(t, p, stream.ServerParams{})
		if _, err := s.HandleQueue("svc", "q", func(w *stream.Writer, r *stream.Request) error {
			counts[i].Add(1)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if err := s.nc.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	const n = 200
	for range n {
		wantEOF(t, open(t, p.consumer, "svc"))
	}
	a, b := counts[0].Load(), counts[1].Load()
	if a+b != n || a < n/10 || b < n/10 {
		t.Errorf("%d and %d requests, want %d together and both a fair part", a, b, n)
	}
}

// Without a queue group each server gets each request. The consumer is bound to whichever answers first, and the other
// handler learns that it is not heard, also where it is silent.
func TestHandleTwice(t *testing.T) {
	for _, silent := range []bool{false, true} {
		t.Run(fmt.Sprintf("silent=%v", silent), func(t *testing.T) {
			p := newPair(t)
			ended := make(chan int, 2)
			var causes [2]error
			for i := range 2 {
				s := newService(t, p, stream.ServerParams{})
				s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
					if !silent {
						write(t, w, []byte{byte(i)})
					}
					_, err := r.Recv()
					if err == io.EOF { // the one that was heard
						write(t, w, []byte{byte(i)})
						return nil
					}
					<-r.Context().Done()
					causes[i] = context.Cause(r.Context())
					ended <- i
					return nil
				})
			}
			s := open(t, p.consumer, "svc")
			if _, err := s.Write([]byte("to whoever is bound")); err != nil {
				t.Fatal(err)
			}
			_ = s
			var loser int
			select {
			case loser = <-ended:
			case <-time.After(patience):
				t.Fatal("the other handler's context did not end")
			}
			wantCode(t, causes[loser], stream.CloseCanceled, "")
		})
	}
}

// Drain waits for handlers and for what they wrote, and takes no new streams meanwhile.
func TestDrain(t *testing.T) {
	release, began := make(chan struct{}), make(chan struct{})
	p, s := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		if string(r.Data) != "stay" {
			return nil
		}
		close(began)
		<-release
		if err := r.Context().Err(); err != nil {
			t.Errorf("the context ended while Drain waited: %v", err)
		}
		for i := range 500 {
			write(t, w, testRecord(i, 1000))
		}
		return nil
	})
	ctx := testContext(t)
	st, err := p.consumer.Open(ctx, "svc", []byte("stay"))
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	<-began
	drained := make(chan error, 2)
	for range 2 {
		go func() { drained <- s.Drain(ctx) }()
	}
	eventually(t, "nobody responds", func() bool {
		_, err := open(t, p.consumer, "svc").Recv()
		return errors.Is(err, nats.ErrNoResponders)
	})
	select {
	case err := <-drained:
		t.Fatalf("Drain returned %v before the handler did", err)
	default:
	}
	close(release)
	records, err := readAll(st)
	if len(records) != 500 || err != io.EOF {
		t.Errorf("%d records, %v; want 500 and io.EOF", len(records), err)
	}
	for range 2 {
		waitFor(t, "Drain", func() { err = <-drained })
		if err != nil {
			t.Errorf("Drain: %v", err)
		}
	}
	waitFor(t, "Drain once more", func() { err = s.Drain(ctx) })
	if err != nil {
		t.Errorf("Drain once more: %v", err)
	}
	if _, err := s.Handle("more", func(*stream.Writer, *stream.Request) error { return nil }); !errors.Is(err, stream.ErrServerClosed) {
		t.Errorf("Handle after Drain: %v", err)
	}
	var none context.Context
	if err := s.Drain(none); !errors.Is(err, nats.ErrInvalidContext) {
		t.Errorf("Drain(nil): %v", err)
	}
}

// When its context ends, Drain ends what is left, whether or not handlers heed that.
func TestDrainImpatient(t *testing.T) {
	release, began, causes := make(chan struct{}), make(chan struct{}, 1), make(chan error, 1)
	p, s := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("a"))
		began <- struct{}{}
		<-release // deaf to its context
		causes <- context.Cause(r.Context())
		return nil
	})
	st := open(t, p.consumer, "svc")
	if _, err := st.Recv(); err != nil {
		t.Fatal(err)
	}
	<-began
	ctx, cancel := context.WithCancelCause(testContext(t))
	drained := make(chan error, 1)
	go func() { drained <- s.Drain(ctx) }()
	eventually(t, "nobody responds", func() bool {
		_, err := open(t, p.consumer, "svc").Recv()
		return errors.Is(err, nats.ErrNoResponders)
	})
	why := errors.New("out of patience")
	start := time.Now()
	cancel(why)
	var err error
	waitFor(t, "Drain", func() { err = <-drained })
	took := time.Since(start)
	t.Logf("Drain returned %v after its context ended", took)
	if took > 50*time.Millisecond+slack {
		t.Errorf("Drain returned %v after its context ended", took)
	}
	if !errors.Is(err, context.Canceled) || !errors.Is(err, why) {
		t.Errorf("Drain: %v", err)
	}
	waitFor(t, "the end", func() { _, err = st.Recv() })
	wantCode(t, err, stream.CloseGoingAway, "")
	close(release)
	if cause := <-causes; !errors.Is(cause, stream.ErrServerClosed) {
		t.Errorf("cause of the handler's context: %v", cause)
	}
}

func TestCloseFromHandler(t *testing.T) {
	result := make(chan error, 1)
	var s *service
	p, s := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("a"))
		if _, err := r.Recv(); err != nil {
			t.Error(err)
		}
		_ = s.Close()
		if r.Context().Err() == nil {
			t.Error("the context goes on after Close")
		}
		_, err := w.Write([]byte("b"))
		result <- err
		return nil
	})
	st := open(t, p.consumer, "svc")
	if _, err := st.Recv(); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Write([]byte("go")); err != nil {
		t.Fatal(err)
	}
	var err error
	waitFor(t, "the end", func() { _, err = st.Recv() })
	wantCode(t, err, stream.CloseGoingAway, "")
	if err := <-result; !errors.Is(err, stream.ErrServerClosed) {
		t.Errorf("Write after Close: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("Close again: %v", err)
	}
	if _, err := s.Handle("more", func(*stream.Writer, *stream.Request) error { return nil }); !errors.Is(err, stream.ErrServerClosed) {
		t.Errorf("Handle after Close: %v", err)
	}
	if err := s.Drain(testContext(t)); err != nil {
		t.Errorf("Drain after Close: %v", err)
	}
}

func TestServerParams(t *testing.T) {
	p := newPair(t)
	nc := p.producer.Conn
	if _, err := stream.NewServer(stream.ServerParams{}); !errors.Is(err, nats.ErrInvalidConnection) {
		t.Errorf("nil connection: %v", err)
	}
	for want, params := range map[string]stream.ServerParams{
		"MaxStreams":        {MaxStreams: -1},
		"MaxFallback":       {MaxFallback: -1},
		"FallbackTimeout":   {FallbackTimeout: -1},
		"Window":            {Window: 1},
		"MaxBuffered":       {MaxBuffered: -1},
		"MaxRecordSize":     {MaxRecordSize: -1},
		"KeepAlive":         {KeepAlive: 1},
		"PeerTimeout":       {PeerTimeout: 1},
		"AckTimeout":        {AckTimeout: -1},
		"ResumeTimeout":     {ResumeTimeout: 1},
		"DisconnectTimeout": {DisconnectTimeout: 1},
	} {
		params.Conn = nc
		if s, err := stream.NewServer(params); err == nil || s != nil || !strings.Contains(err.Error(), want) {
			t.Errorf("bad %s: %v", want, err)
		}
	}
	s := newService(t, p, stream.ServerParams{})
	if _, err := s.Handle("svc", nil); err == nil {
		t.Error("a nil handler was taken")
	}
	h := func(*stream.Writer, *stream.Request) error { return nil }
	for _, subject := range []string{"", "a b", "a..b"} {
		if _, err := s.Handle(subject, h); !errors.Is(err, nats.ErrBadSubject) {
			t.Errorf("Handle(%q): %v", subject, err)
		}
	}
}

// Parameters may be as large as an int can be: no sum of them overflows.
func TestLargestParams(t *testing.T) {
	most := math.MaxInt
	p := newPair(t, pairOptions{consumer: stream.ClientParams{
		Window: most, MaxBuffered: most, MaxRecordSize: most, FallbackBuffer: most, KeepAlive: math.MaxInt64,
		AckTimeout: math.MaxInt64, ResumeTimeout: math.MaxInt64, DisconnectTimeout: math.MaxInt64,
	}})
	s := newService(t, p, stream.ServerParams{MaxStreams: most/2 + 1, Window: most, MaxBuffered: most, MaxRecordSize: most})
	s.handle(t, "echo", func(w *stream.Writer, r *stream.Request) error {
		_, err := r.WriteTo(w)
		return err
	})
	st := open(t, p.consumer, "echo")
	for i := range 20 {
		want := testRecord(i, 300<<10) // in pieces
		if _, err := st.Write(want); err != nil {
			t.Fatal(err)
		}
		if rec, err := st.Recv(); err != nil || !bytes.Equal(rec, want) {
			t.Fatalf("record %d: %d bytes, %v", i, len(rec), err)
		}
	}
	if err := st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	wantEOF(t, st)
}

// Streams that are opened and canceled at once, as many as there can be: no more handlers run than may, and nothing is
// left of them.
func TestServerStorm(t *testing.T) {
	const maxStreams = 50
	var running, most atomic.Int32
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{MaxStreams: maxStreams})
	s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
		n := running.Add(1)
		defer running.Add(-1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		_, _ = w.Write(make([]byte, 1000))
		<-r.Context().Done()
		return nil
	})
	parent := testContext(t)
	storm := func(n int) {
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				ctx, cancel := context.WithCancel(parent)
				defer cancel()
				st, err := p.consumer.Open(ctx, "svc", nil)
				if err != nil {
					t.Error(err)
					return
				}
				switch i % 4 {
				case 0:
					st.Close()
				case 1:
					_, _ = st.Recv()
				case 2:
					go func() { _, _ = st.Write([]byte("x")) }()
				}
			})
		}
		waitFor(t, "the storm to pass", wg.Wait)
		eventually(t, "all streams are given back", func() bool {
			return running.Load() == 0 && s.Stats().Streams == 0 && s.Stats().Reserved == 0
		})
	}
	verifyFootprint(t, p, scaled(2000), storm)
	if n := most.Load(); n > maxStreams || n == 0 {
		t.Errorf("%d handlers ran at once, MaxStreams is %d", n, maxStreams)
	}
}

// Subjects so long that a NATS server would close the connection over them harm nobody but who named them.
func TestLongSubjects(t *testing.T) {
	left := make(chan error, 1)
	p, _ := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		if len(r.Data) == 0 {
			if _, err := r.Recv(); err != io.EOF { // other streams of the connection live on
				return err
			}
			return nil
		}
		if _, err := w.Write([]byte("a")); err != nil {
			return err
		}
		<-r.Context().Done()
		left <- context.Cause(r.Context())
		return nil
	})
	other := open(t, p.consumer, "svc")
	if _, err := p.consumer.Open(testContext(t), strings.Repeat("x", 5000), nil); !errors.Is(err, nats.ErrBadSubject) {
		t.Errorf("Open: %v", err)
	}
	offer := string(stream.AppendOffer(nil, stream.Token{Codec: stream.MsgPack, LogPackets: 5, LogBytes: 16}))
	raw := p.consumer.Conn
	request := &nats.Msg{Subject: "svc", Reply: "_" + strings.Repeat("x", 4069), Data: []byte("long"), Header: nats.Header{"Stream-Open": {offer}}}
	if err := raw.PublishMsg(request); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the handler to be told", func() {
		if err := <-left; !errors.Is(err, nats.ErrBadSubject) {
			t.Errorf("the handler's context ended with %v", err)
		}
	})
	if err := other.CloseSend(); err != nil {
		t.Fatal(err)
	}
	wantEOF(t, other)
}
