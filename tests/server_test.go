package stream_test

import (
	"bytes"
	"context"
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

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

func TestServerRefusesImpossibleParams(t *testing.T) {
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
func TestLargestParamsDoNotOverflow(t *testing.T) {
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

func panickingHandlerForTheStack() error { panic("no such luck") }

// The result of a handler decides how its stream ends, after all records of the handler.
func TestHandlerResultEndsItsStream(t *testing.T) {
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

// Beyond MaxStreams requests are refused, over all subjects, and there is room again when a handler returned.
func TestMaxStreamsRefusesAndRecovers(t *testing.T) {
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

// A full member of a queue group leaves it, so that requests go to members with room, and returns when it has room.
func TestFullServerLeavesItsQueueGroups(t *testing.T) {
	const small, large = 2, 40
	p := newPair(t)
	var members [2]*held
	var servers [2]*service
	for i, size := range []int{small, large} {
		members[i] = newHeld()
		servers[i] = newService(t, p, stream.ServerParams{MaxStreams: size})
		servers[i].register(t, "svc", "q", members[i].handle)
		servers[i].register(t, "also", "q", members[i].handle)
	}
	var streams []*stream.Stream
	for i := range small + large { // opened one after the other: each finds all members that have room
		subject := []string{"svc", "also"}[i%2]
		var s *stream.Stream
		eventually(t, "a member with room takes the request", func() bool {
			s = open(t, p.consumer, subject)
			_, err := s.Recv()
			return err == nil
		})
		streams = append(streams, s)
	}
	if a, b := members[0].calls.Load(), members[1].calls.Load(); a != small || b != large {
		t.Errorf("%d and %d handlers ran, there is room for %d and %d", a, b, small, large)
	}
	for _, subject := range []string{"svc", "also"} {
		eventually(t, "all members have left "+subject, func() bool {
			return errors.Is(refusedWith(t, p, subject), nats.ErrNoResponders)
		})
	}
	close(members[0].release)
	for _, subject := range []string{"svc", "also"} {
		eventually(t, "the member with room is back at "+subject, func() bool {
			_, err := open(t, p.consumer, subject).Recv()
			return err == nil
		})
	}
	close(members[1].release)
	for _, s := range streams {
		wantEOF(t, s)
	}
}

// Of a full member nothing is lost when it leaves its group: each of many requests at once is served or refused.
func TestLeavingAQueueGroupLosesNoRequest(t *testing.T) {
	p := newPair(t)
	for range 2 {
		newService(t, p, stream.ServerParams{MaxStreams: 3}).register(t, "svc", "q", func(w *stream.Writer, r *stream.Request) error { return nil })
	}
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range scaled(200) {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				s, err := p.consumer.Open(ctx, "svc", nil)
				if err != nil {
					t.Error(err)
				} else if _, err := s.Recv(); err != io.EOF && !stream.Retryable(err) {
					t.Error(err)
				}
				cancel()
			}
		})
	}
	waitFor(t, "all requests to be answered", wg.Wait)
}

func TestFullServerStaysIfToldTo(t *testing.T) {
	for name, c := range map[string]struct {
		queue string
		stays bool
	}{"in its queue group": {"q", true}, "without a queue group": {"", false}} {
		t.Run(name, func(t *testing.T) {
			h := newHeld()
			p := newPair(t)
			s := newService(t, p, stream.ServerParams{MaxStreams: 1, StayWhenFull: c.stays})
			s.register(t, "svc", c.queue, h.handle)
			running := begin(t, p, "svc")
			for range 20 {
				wantCode(t, refusedWith(t, p, "svc"), stream.CloseTryAgainLater, "")
			}
			close(h.release)
			wantEOF(t, running)
		})
	}
}

// The end of a server that is full, and so in none of its groups, is as that of any other.
func TestFullServerDrainsAndClosesAsAnyOther(t *testing.T) {
	h := newHeld()
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{MaxStreams: 1})
	s.register(t, "svc", "q", h.handle)
	running := begin(t, p, "svc")
	eventually(t, "it has left", func() bool { return errors.Is(refusedWith(t, p, "svc"), nats.ErrNoResponders) })
	s.register(t, "later", "q", h.handle)
	eventually(t, "it takes no request for what it handles since", func() bool {
		return errors.Is(refusedWith(t, p, "later"), nats.ErrNoResponders)
	})
	if _, err := s.HandleQueue("a b", "q", h.handle); !errors.Is(err, nats.ErrBadSubject) {
		t.Errorf("a bad subject: %v", err)
	}
	drained := make(chan error, 1)
	go func() { drained <- s.Drain(testContext(t)) }()
	close(h.release)
	wantEOF(t, running)
	var err error
	waitFor(t, "Drain", func() { err = <-drained })
	if err != nil {
		t.Errorf("Drain: %v", err)
	}
	if err := refusedWith(t, p, "svc"); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("after Drain: %v", err)
	}
	if n := h.calls.Load(); n != 1 {
		t.Errorf("%d handlers ran", n)
	}
}

// Streams that are opened and canceled at once, as many as there can be: no more handlers run than may, and nothing is
// left of them.
func TestStormOfCanceledRequestsLeavesNothing(t *testing.T) {
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

func TestRequestHasSubjectHeaderAndData(t *testing.T) {
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

// Requests that nobody could be answered for are counted and reach no handler.
func TestRequestsNobodyCanAnswerAreCounted(t *testing.T) {
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

// The header has the consumer's offer if the reply subject has none, or was rewritten.
func TestOfferInHeaderCounts(t *testing.T) {
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

func TestMalformedTimeoutIsRefused(t *testing.T) {
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

// Without a queue group each server gets each request. The consumer is bound to whichever answers first, and the other
// handler learns that it is not heard, also where it is silent.
func TestFirstOfTwoHandlersIsHeardAlone(t *testing.T) {
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

// A queue group spreads requests: each goes to one of its servers.
func TestQueueGroupSharesRequests(t *testing.T) {
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

// A handler's subscription also receives messages that are no requests, and the reply subject of a request is not
// always one to write to.

// restless are times that make both ends ask each other often.
var restless = stream.ClientParams{KeepAlive: 20 * time.Millisecond, AckTimeout: 10 * time.Millisecond}

// A wildcard may cover the inboxes of both ends, so that the handler receives every packet of its own streams. Each
// request still runs it once.
func TestWildcardHandlerRunsOncePerRequest(t *testing.T) {
	group := newConcurrent(t)
	defer group.Wait()
	for _, c := range []struct{ pattern, subject, inbox string }{
		{">", "svc", ""},
		{"*.>", "svc.echo", ""},
		{"svc.>", "svc.echo", "svc.inbox"},
		{"*.*.*.*", "svc.x.y.z", "_I"},
		{"_SINBOX.>", "_SINBOX.svc", ""},
		{">", "svc", "inbox.custom"},
	} {
		group.Run(fmt.Sprintf("%s, inbox %q", c.pattern, c.inbox), func(t *testing.T) {
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

// A handler for everything answers no requests to JetStream, and acknowledges no message that JetStream delivers.
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

// JetStream acknowledges a request on a subject that one of its streams keeps. Nobody takes that for an answer,
// whichever comes first, nor its refusal.
func TestJetStreamAcknowledgementIsNoAnswer(t *testing.T) {
	p := newRestricted(t, fmt.Sprintf("jetstream { store_dir: %q }", t.TempDir()))
	srv := newService(t, p, stream.ServerParams{})
	js, err := srv.nc.JetStream()
	if err != nil {
		t.Fatal(err)
	}
	for _, config := range []*nats.StreamConfig{
		{Name: "AUDIT", Subjects: []string{"svc.>"}, Storage: nats.MemoryStorage},
		{Name: "FULL", Subjects: []string{"full.>"}, Storage: nats.MemoryStorage, MaxMsgs: 1, Discard: nats.DiscardNew},
	} {
		if _, err := js.AddStream(config); err != nil {
			t.Fatal(err)
		}
	}
	slow := func(h stream.Handler) stream.Handler { // its answer comes second
		return func(w *stream.Writer, r *stream.Request) error {
			time.Sleep(20 * time.Millisecond)
			return h(w, r)
		}
	}
	for _, subject := range []string{"svc", "full"} {
		srv.handle(t, subject+".echo", echo)
		srv.handle(t, subject+".slow", slow(echo))
		old, err := srv.nc.Subscribe(subject+".old", func(m *nats.Msg) { // a producer that knows only the fallback
			time.Sleep(5 * time.Millisecond)
			for _, answer := range []string{`{"type":1,"data":"YQ=="}`, `{"type":1,"data":"Yg=="}`, `{"type":2,"closeError":{"Code":1000,"Text":""}}`} {
				if err := srv.nc.Publish(m.Reply, []byte(answer)); err != nil {
					t.Error(err)
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = old.Unsubscribe() }()
	}
	if err := srv.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	c := p.newClient(t, stream.ClientParams{})
	for range scaled(100) {
		for _, subject := range []string{"svc", "full"} {
			verifyEcho(t, c, subject+".echo", 3, 10)
			records, err := readAll(open(t, c, subject+".old"))
			if len(records) != 2 || err != io.EOF {
				t.Fatalf("the fallback on %s: %q, %v", subject, records, err)
			}
		}
	}
	before := c.Stats().DroppedPubAck
	for _, subject := range []string{"svc", "full"} {
		verifyEcho(t, c, subject+".slow", 3, 10)
	}
	if n := c.Stats().DroppedPubAck - before; n != 2 {
		t.Errorf("%d acknowledgements were counted, want 2", n)
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
	// A consumer whose headers do not get through is recognised by its token.
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

// controlOf returns a subject below the inbox of the producer's client that no stream has.
func controlOf(t *testing.T, p *pair) string {
	t.Helper()
	subject, requests := rawRequests(t, p)
	s := open(t, p.producer, subject)
	reply := nextRequest(t, requests).Reply
	s.Close()
	return reply
}

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

// Subjects so long that a NATS server would close the connection over them harm only the end that named them.
func TestOverlongSubjectsHarmNobodyElse(t *testing.T) {
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

func TestRegistrationStopEndsOneSubject(t *testing.T) {
	for _, queue := range []string{"", "q"} {
		t.Run("queue="+queue, func(t *testing.T) {
			h := newHeld()
			p := newPair(t)
			s := newService(t, p, stream.ServerParams{})
			r, other := s.register(t, "svc", queue, h.handle), s.register(t, "other", queue, h.handle)
			running := begin(t, p, "svc")
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(r.Stop)
			}
			waitFor(t, "Stop", wg.Wait)
			if err := refusedWith(t, p, "svc"); !errors.Is(err, nats.ErrNoResponders) {
				t.Errorf("after Stop: %v", err)
			}
			alive := begin(t, p, "other")
			close(h.release)
			wantEOF(t, running) // Stop does not disturb handlers
			wantEOF(t, alive)
			again := s.register(t, "svc", queue, h.handle)
			wantEOF(t, begin(t, p, "svc"))
			again.Stop()
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			other.Stop()
		})
	}
}

func TestRegistrationStopMayBeCalledInItsHandler(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	registered := make(chan *stream.Registration, 1)
	registered <- s.register(t, "once", "", func(*stream.Writer, *stream.Request) error {
		(<-registered).Stop()
		return nil
	})
	var err error
	st := open(t, p.consumer, "once")
	waitFor(t, "the handler to stop itself", func() { _, err = st.Recv() })
	if err != io.EOF {
		t.Errorf("the handler ended with %v", err)
	}
	if err := refusedWith(t, p, "once"); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("after Stop: %v", err)
	}
}

// Every request that NATS delivered before Stop returned is served: none of them waits for an answer that never comes.
func TestRegistrationStopServesWhatWasDelivered(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	for range scaled(20) {
		r := s.register(t, "svc", "", func(*stream.Writer, *stream.Request) error { return nil })
		const n = 20
		results := make(chan error, n)
		for range n {
			st := open(t, p.consumer, "svc")
			go func() {
				_, err := st.Recv()
				results <- err
			}()
		}
		r.Stop()
		for range n {
			var err error
			waitFor(t, "the result of each open", func() { err = <-results })
			if err != io.EOF && !errors.Is(err, nats.ErrNoResponders) {
				t.Fatal(err)
			}
		}
	}
}

// NATS refuses a subject that a server handles, at first or by a reload. The registration says so, and serves it when
// NATS lets it.
func TestRefusedRegistrationRecovers(t *testing.T) {
	config := func(subjects string) string {
		return fmt.Sprintf(`authorization { users: [
			{ user: producer, password: secret-of-producer, permissions: { subscribe: [ "_SINBOX.producer.>", %s ], publish: ">" } }
			{ user: alice, password: secret-of-alice } ] }`, subjects)
	}
	for _, queue := range []string{"", "q"} {
		t.Run(fmt.Sprintf("queue group %q", queue), func(t *testing.T) {
			p := newRestricted(t, config(`"svc.always"`))
			s := newService(t, p, stream.ServerParams{Logger: slog.New(slog.DiscardHandler)}, user("producer")...)
			always := s.register(t, "svc.always", queue, echo)
			r := s.register(t, "svc.x", queue, echo)
			alice := p.newClient(t, stream.ClientParams{}, user("alice")...)
			verifyEcho(t, alice, "svc.always", 3, 10)
			for range 2 {
				eventually(t, "the registration tells", func() bool { return r.Err() != nil })
				wantRefused(t, r.Err(), "svc.x")
				if _, err := readAll(open(t, alice, "svc.x")); !errors.Is(err, nats.ErrNoResponders) {
					t.Errorf("a stream on the refused subject: %v", err)
				}
				if err := always.Err(); err != nil {
					t.Errorf("the other registration: %v", err)
				}
				wantNotDone(t, s.Done(), s.Err())
				reload(t, p.server, config(`"svc.always", "svc.x"`))
				eventually(t, "the registration is accepted", func() bool { return r.Err() == nil })
				verifyEcho(t, alice, "svc.x", 3, 10)
				verifyEcho(t, alice, "svc.always", 3, 10)
				reload(t, p.server, config(`"svc.always"`))
			}
			eventually(t, "the registration tells", func() bool { return r.Err() != nil })
			r.Stop()
			if _, err := readAll(open(t, alice, "svc.x")); !errors.Is(err, nats.ErrNoResponders) {
				t.Errorf("after Stop: %v", err)
			}
		})
	}
}
