package stream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/internal/race"
	"github.com/natsstream/stream/streamtest"
)

// One request, many responders: each has a stream of its own, and how many there are is known in the end.

// stall is for tests in which the last responder ends the gathering.
var stall = stream.WithStallTimeout(patience)

// newServices makes n servers, each on a connection of its own, that serve "all" with what handler returns for their
// numbers.
func newServices(t testing.TB, p *pair, n int, params stream.ServerParams, handler func(i int) stream.Handler) (all []*service) {
	t.Helper()
	for i := range n {
		s := newService(t, p, params)
		s.handle(t, "all", handler(i))
		all = append(all, s)
	}
	return all
}

// openMany sends a request to all servers that patience, or the end of the test, ends.
func openMany(t testing.TB, c *stream.Client, opts ...stream.OpenOption) *stream.Responders {
	t.Helper()
	r, err := c.OpenMany(testContext(t), "all", []byte("request"), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// take returns the streams that Next returns, and its last error.
func take(t testing.TB, r *stream.Responders) (all []*stream.Stream, err error) {
	t.Helper()
	waitFor(t, "the last responder", func() {
		for {
			var s *stream.Stream
			if s, err = r.Next(testContext(t)); err != nil {
				return
			}
			all = append(all, s)
		}
	})
	return all, err
}

// named is a handler that says its number, echoes records with it, and ends normally when its consumer does.
func named(i int) stream.Handler {
	return func(w *stream.Writer, r *stream.Request) error {
		if _, err := fmt.Fprintf(w, "%d: %s", i, r.Data); err != nil {
			return err
		}
		for rec, err := range r.All() {
			if err != nil {
				return err
			}
			if _, err := fmt.Fprintf(w, "%d: %s", i, rec); err != nil {
				return err
			}
		}
		return nil
	}
}

// verifyNamed uses a stream to a named handler and returns the handler's name.
func verifyNamed(t testing.TB, s *stream.Stream, records int) (name string) {
	t.Helper()
	var writing sync.WaitGroup
	writing.Go(func() {
		for i := range records {
			if _, err := s.Write([]byte(fmt.Sprint("record ", i))); err != nil {
				t.Errorf("write: %v", err)
				return
			}
		}
		if err := s.CloseSend(); err != nil {
			t.Error(err)
		}
	})
	defer writing.Wait()
	for i := -1; ; i++ {
		rec, err := s.Recv()
		if err == io.EOF && i == records {
			return name
		} else if err != nil {
			t.Errorf("of %q after %d records: %v", name, i, err)
			return name
		}
		who, what, _ := strings.Cut(string(rec), ": ")
		want := fmt.Sprint("record ", i)
		if i < 0 {
			name, want = who, "request"
		}
		if who != name || what != want {
			t.Errorf("%q; want %q of %q", rec, want, name)
			return name
		}
	}
}

func TestEachResponderHasAStreamOfItsOwn(t *testing.T) {
	p := newPair(t)
	newServices(t, p, 5, stream.ServerParams{}, named)
	for range scaled(20) {
		streams, err := take(t, openMany(t, p.consumer, stall, stream.WithMaxResponders(5)))
		if err != io.EOF || len(streams) != 5 {
			t.Fatalf("%d streams, %v", len(streams), err)
		}
		var names [5]string
		var all sync.WaitGroup
		for i, s := range streams {
			all.Go(func() { names[i] = verifyNamed(t, s, 1000) })
		}
		all.Wait()
		if slices.Sort(names[:]); strings.Join(names[:], "") != "01234" {
			t.Fatalf("responders %q", names)
		}
	}
}

// A slow responder, one that dies and one that never answers affect no other, and the end is known.
func TestRespondersAreIndependent(t *testing.T) {
	p := newPair(t, pairOptions{consumer: stream.ClientParams{KeepAlive: 100 * time.Millisecond, PeerTimeout: time.Second, ResumeTimeout: time.Second}})
	release := make(chan struct{})
	newServices(t, p, 3, stream.ServerParams{}, named)
	waiting := func(name string) func(int) stream.Handler {
		return func(int) stream.Handler {
			return func(w *stream.Writer, _ *stream.Request) error {
				if err := errors.Join(w.SetHeader(nats.Header{"Name": {name}}), w.Flush()); err != nil {
					return err
				}
				select {
				case <-release:
				case <-w.Context().Done():
					return context.Cause(w.Context())
				}
				_, err := w.Write([]byte("late"))
				return err
			}
		}
	}
	newServices(t, p, 1, stream.ServerParams{}, waiting("slow"))
	dead := newServices(t, p, 1, stream.ServerParams{}, waiting("dead"))[0]
	if _, err := p.producer.Conn.Subscribe("all", func(*nats.Msg) {}); err != nil || p.producer.Conn.Flush() != nil { // never answers
		t.Fatal(err)
	}
	streams, err := take(t, openMany(t, p.consumer, stall, stream.WithMinResponders(5), stream.WithMaxResponders(5)))
	if err != io.EOF || len(streams) != 5 {
		t.Fatalf("%d streams, %v", len(streams), err)
	}
	waits := make(map[string]*stream.Stream)
	for _, s := range streams {
		h, err := s.Header()
		if err != nil {
			t.Fatal(err)
		}
		if h != nil {
			waits[h.Get("Name")] = s
		}
	}
	dead.nc.Close()
	for _, s := range streams {
		if s != waits["slow"] && s != waits["dead"] {
			verifyNamed(t, s, 100)
		}
	}
	_, err = waits["dead"].Recv()
	wantCode(t, err, stream.CloseAbnormalClosure, "")
	close(release)
	if rec, err := waits["slow"].Recv(); string(rec) != "late" || err != nil {
		t.Errorf("the slow responder: %q, %v", rec, err)
	}
	wantEOF(t, waits["slow"])
}

// A handler that neither reads nor writes answers by its hello.
func TestSilentHandlersAreResponders(t *testing.T) {
	p := newPair(t)
	newServices(t, p, 3, stream.ServerParams{}, func(int) stream.Handler {
		return func(w *stream.Writer, _ *stream.Request) error {
			<-w.Context().Done()
			return nil
		}
	})
	r := openMany(t, p.consumer, stall, stream.WithMaxResponders(3))
	if streams, err := take(t, r); err != io.EOF || len(streams) != 3 {
		t.Errorf("%d streams, %v", len(streams), err)
	}
	r.Close()
}

func TestTooFewRespondersAreAnError(t *testing.T) {
	p := newPair(t)
	full := newHeld()
	refusing := newServices(t, p, 1, stream.ServerParams{MaxStreams: 1}, func(int) stream.Handler { return full.handle })[0]
	refusing.handle(t, "fill", full.handle)
	filling := begin(t, p, "fill")
	defer func() {
		close(full.release)
		wantEOF(t, filling)
	}()
	newServices(t, p, 2, stream.ServerParams{}, named)

	streams, err := take(t, openMany(t, p.consumer, stream.WithStallTimeout(3*time.Second), stream.WithMinResponders(3)))
	few, ok := errors.AsType[*stream.TooFewRespondersError](err)
	if !ok || few.Minimum != 3 || few.Answered != 2 || few.Refused != 1 || len(streams) != 2 {
		t.Fatalf("%d streams, %v", len(streams), err)
	}
	wantCode(t, few.Err, stream.CloseTryAgainLater, "")
	if stream.Retryable(err) {
		t.Error("retryable, although two handlers run")
	}
	for _, s := range streams {
		verifyNamed(t, s, 3)
	}
	if streams, err := take(t, openMany(t, p.consumer, stall, stream.WithMinResponders(2), stream.WithMaxResponders(2))); err != io.EOF || len(streams) != 2 {
		t.Errorf("%d streams, %v", len(streams), err)
	}
}

// Producers without the binary form cannot be told apart, so they have no stream, and others are not disturbed.
func TestFallbackRespondersAreAnError(t *testing.T) {
	p := newPair(t)
	for range 2 {
		old := p.newClient(t, stream.ClientParams{})
		if _, err := old.Conn.Subscribe("all", func(m *nats.Msg) {
			_ = m.Respond([]byte(`{"type":1,"data":"YQ=="}`))
			_ = m.Respond([]byte(`{"type":2,"closeError":{"Code":1000,"Text":""}}`))
		}); err != nil || old.Conn.Flush() != nil {
			t.Fatal(err)
		}
	}
	_, err := take(t, openMany(t, p.consumer, stream.WithStallTimeout(300*time.Millisecond)))
	few, ok := errors.AsType[*stream.TooFewRespondersError](err)
	if !ok || few.Answered != 0 || few.Refused != 1 {
		t.Fatal(err)
	}
	wantCode(t, few.Err, stream.CloseUnsupportedData, "")

	newServices(t, p, 2, stream.ServerParams{}, named)
	streams, err := take(t, openMany(t, p.consumer, stall, stream.WithMaxResponders(2)))
	if err != io.EOF || len(streams) != 2 {
		t.Fatalf("%d streams, %v", len(streams), err)
	}
	for _, s := range streams {
		verifyNamed(t, s, 3)
	}
}

// Producers of NewWriter answer as handlers do.
func TestWritersAreResponders(t *testing.T) {
	p := newPair(t)
	for range 3 {
		serveClient(t, p, p.newClient(t, stream.ClientParams{}), "all", func(w *stream.Writer, _ *nats.Msg) {
			write(t, w, []byte("a"), []byte("b"))
			closeWriter(t, w)
		})
	}
	streams, err := take(t, openMany(t, p.consumer, stall, stream.WithMaxResponders(3)))
	if err != io.EOF || len(streams) != 3 {
		t.Fatalf("%d streams, %v", len(streams), err)
	}
	for _, s := range streams {
		if got, err := readAll(s); err != io.EOF || len(got) != 2 {
			t.Errorf("%q, %v", got, err)
		}
	}
}

func TestRespondersBeyondTheMaximumAreReset(t *testing.T) {
	p := newPair(t)
	causes := make(chan error, 5)
	newServices(t, p, 5, stream.ServerParams{}, func(int) stream.Handler {
		return func(w *stream.Writer, _ *stream.Request) error {
			if _, err := w.Write([]byte("a")); err != nil {
				return err
			}
			<-w.Context().Done()
			causes <- context.Cause(w.Context())
			return nil
		}
	})
	start := time.Now()
	r := openMany(t, p.consumer, stream.WithMaxResponders(2), stream.WithStallTimeout(time.Hour))
	streams, err := take(t, r)
	if err != io.EOF || len(streams) != 2 {
		t.Fatalf("%d streams, %v", len(streams), err)
	}
	for range 3 {
		wantCode(t, <-causes, stream.CloseCanceled, "the consumer takes no more responders")
	}
	for _, s := range streams {
		if rec, err := s.Recv(); string(rec) != "a" || err != nil {
			t.Errorf("%q, %v", rec, err)
		}
		s.Close()
		wantCode(t, <-causes, stream.CloseCanceled, "")
	}
	if d := time.Since(start); d > patience {
		t.Errorf("took %v", d)
	}
}

func TestRequestThatNobodyAnswersEnds(t *testing.T) {
	p := newPair(t)
	if _, err := take(t, openMany(t, p.consumer, stream.WithStallTimeout(time.Hour))); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("nobody there: %v", err)
	}
	if _, err := p.producer.Conn.Subscribe("all", func(*nats.Msg) {}); err != nil || p.producer.Conn.Flush() != nil {
		t.Fatal(err)
	}
	_, err := take(t, openMany(t, p.consumer, stream.WithStallTimeout(50*time.Millisecond)))
	if few, ok := errors.AsType[*stream.TooFewRespondersError](err); !ok || few.Answered != 0 || few.Err != nil {
		t.Errorf("nobody answers: %v", err)
	}
	if _, err := take(t, openMany(t, p.consumer, stream.WithOpenTimeout(50*time.Millisecond), stream.WithStallTimeout(time.Hour))); !errors.Is(err, stream.ErrOpenTimeout) {
		t.Errorf("nobody answers in time: %v", err)
	}
}

// The options of one stream apply to each stream, and the wait for the first packet ends with the first responder.
func TestOptionsApplyToEachResponder(t *testing.T) {
	p := newPair(t)
	ahead := make(chan int, 2)
	newServices(t, p, 2, stream.ServerParams{}, func(int) stream.Handler {
		return func(w *stream.Writer, _ *stream.Request) error {
			n := 0
			for ; ; n++ {
				if sent, err := w.TryWrite(make([]byte, 1000)); err != nil || !sent {
					break
				}
			}
			ahead <- n
			<-w.Context().Done()
			return nil
		}
	})
	streams, err := take(t, openMany(t, p.consumer, stall, stream.WithWindow(8<<10), stream.WithMaxResponders(2), stream.WithOpenTimeout(patience)))
	if err != io.EOF || len(streams) != 2 {
		t.Fatalf("%d streams, %v", len(streams), err)
	}
	for _, s := range streams {
		if n := <-ahead; n > 60 { // a window, and a packet that exceeds it
			t.Errorf("%d records ahead of a reader with a window of 8 KiB", n)
		}
		s.Close()
	}
}

func TestCloseOfRespondersEndsAllStreams(t *testing.T) {
	for name, end := range map[string]func(r *stream.Responders, cancel context.CancelFunc, c *stream.Client){
		"Close":        func(r *stream.Responders, _ context.CancelFunc, _ *stream.Client) { r.Close() },
		"context":      func(_ *stream.Responders, cancel context.CancelFunc, _ *stream.Client) { cancel() },
		"Client.Close": func(_ *stream.Responders, _ context.CancelFunc, c *stream.Client) { c.Close() },
	} {
		test := func(t *testing.T, maximum int) {
			p := newPair(t)
			ended := make(chan struct{}, 4)
			newServices(t, p, 4, stream.ServerParams{}, func(int) stream.Handler {
				return func(w *stream.Writer, _ *stream.Request) error {
					if _, err := w.Write([]byte("a")); err != nil {
						return err
					}
					<-w.Context().Done()
					ended <- struct{}{}
					return nil
				}
			})
			client := p.newClient(t, stream.ClientParams{})
			ctx, cancel := context.WithCancel(testContext(t))
			defer cancel()
			r, err := client.OpenMany(ctx, "all", nil, stream.WithStallTimeout(time.Hour), stream.WithMaxResponders(maximum))
			if err != nil {
				t.Fatal(err)
			}
			var streams []*stream.Stream
			for range 2 { // the others have answered, and wait to be taken
				s, err := r.Next(ctx)
				if err != nil {
					t.Fatal(err)
				}
				streams = append(streams, s)
			}
			eventually(t, "all have answered", func() bool { return client.Stats().Streams == 5 })
			end(r, cancel, client)
			waitFor(t, "all handlers to end", func() {
				for range 4 {
					<-ended
				}
			})
			for _, s := range streams {
				if _, err := s.Recv(); err == nil || err == io.EOF {
					t.Errorf("a stream goes on: %v", err)
				}
			}
			if _, err := r.Next(testContext(t)); err == nil || err == io.EOF {
				t.Errorf("Next: %v", err)
			}
			r.Close()
			if _, err := r.Next(testContext(t)); !errors.Is(err, stream.ErrClosed) {
				t.Errorf("Next after Close: %v", err)
			}
		}
		t.Run(name, func(t *testing.T) { test(t, 100) })
		t.Run(name+" after the last responder", func(t *testing.T) { test(t, 4) })
	}
}

// The end of a call's own context ends nothing but the call.
func TestNextHeedsItsContext(t *testing.T) {
	p := newPair(t)
	r := openManySilent(t, p)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := r.Next(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	var none context.Context
	if _, err := r.Next(none); !errors.Is(err, nats.ErrInvalidContext) {
		t.Error(err)
	}
}

// openManySilent sends a request that nobody answers.
func openManySilent(t testing.TB, p *pair) *stream.Responders {
	t.Helper()
	sub, err := p.producer.Conn.SubscribeSync("all")
	if err != nil || p.producer.Conn.Flush() != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	return openMany(t, p.consumer, stream.WithStallTimeout(time.Hour))
}

func TestOpenManyRefusesImpossibleOptions(t *testing.T) {
	p := newPair(t)
	for name, opts := range map[string][]stream.OpenOption{
		"WithMinResponders": {stream.WithMinResponders(0)},
		"WithMaxResponders": {stream.WithMaxResponders(1 << 20)},
		"WithStallTimeout":  {stream.WithStallTimeout(0)},
		"the minimum":       {stream.WithMaxResponders(2), stream.WithMinResponders(3)},
		"WithRetry":         {stream.WithRetry(stream.Retry{})},
		"WithWindow":        {stream.WithWindow(1)},
	} {
		if _, err := p.consumer.OpenMany(t.Context(), "all", nil, opts...); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, o := range []stream.OpenOption{stream.WithMinResponders(1), stream.WithMaxResponders(1), stream.WithStallTimeout(time.Second)} {
		if _, err := p.consumer.Open(t.Context(), "all", nil, o); err == nil || !strings.Contains(err.Error(), "OpenMany") {
			t.Errorf("an option of OpenMany for Open: %v", err)
		}
	}
	if _, err := p.consumer.OpenManyMsg(t.Context(), nil); !errors.Is(err, nats.ErrInvalidMsg) {
		t.Error(err)
	}
	var none context.Context
	if _, err := p.consumer.OpenMany(none, "all", nil); !errors.Is(err, nats.ErrInvalidContext) {
		t.Error(err)
	}
}

// Interceptors see the request as one stream, which ends with the gathering. Hooks see the stream of each responder.
func TestInterceptorsAndHooksSeeResponders(t *testing.T) {
	var did trace
	seen := make(chan *stream.Stream, 1)
	p := newPair(t, pairOptions{consumer: stream.ClientParams{
		Interceptors: []func(stream.OpenFunc) stream.OpenFunc{func(next stream.OpenFunc) stream.OpenFunc {
			return func(ctx context.Context, msg *nats.Msg, opts ...stream.OpenOption) (*stream.Stream, error) {
				msg.Header["Name"] = []string{"value"}
				s, err := next(ctx, msg, opts...)
				seen <- s
				return s, err
			}
		}},
		Hooks: stream.Hooks{
			Opened: func(stream.StreamInfo) { did.add("opened") },
			Closed: func(_ stream.StreamInfo, totals stream.Totals, err error) {
				did.add(fmt.Sprintf("closed-%d-%v", totals.RecordsIn, err))
			},
		},
	}})
	newServices(t, p, 2, stream.ServerParams{}, func(int) stream.Handler {
		return func(w *stream.Writer, r *stream.Request) error {
			_, err := w.Write([]byte(r.Header.Get("Name")))
			return err
		}
	})
	streams, err := take(t, openMany(t, p.consumer, stall, stream.WithMaxResponders(2)))
	if err != io.EOF || len(streams) != 2 {
		t.Fatalf("%d streams, %v", len(streams), err)
	}
	for _, s := range streams {
		if got, err := readAll(s); err != io.EOF || len(got) != 1 || string(got[0]) != "value" {
			t.Errorf("%q, %v", got, err)
		}
	}
	waitFor(t, "the end of the request's context", func() { <-(<-seen).Context().Done() })
	eventually(t, "all hooks were called", func() bool { return len(did.seen()) == 4 })
	if got := did.seen(); len(only(strings.Join(got, " "), "opened")) != 2 || len(only(strings.Join(got, " "), "closed-1-<nil>")) != 2 {
		t.Errorf("hooks: %q", got)
	}
}

// A stranger's messages to the request's subject: they begin no stream without a place to answer to, they count once,
// and however many senders they invent, memory has a bound.
func TestStrangersBeginFewStreams(t *testing.T) {
	p := newPair(t)
	subject, requests := rawRequests(t, p)
	r, err := p.consumer.OpenMany(testContext(t), subject, nil, stream.WithStallTimeout(time.Hour), stream.WithMaxResponders(10))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	reply, nc := nextRequest(t, requests).Reply, p.producer.Conn
	var quiet [][]byte
	for n := range uint64(1000) {
		quiet = append(quiet, rawPacket(stream.PacketSeq, 2*n+2, 0, rawData("no address")), rawPacket(0, 2*n+2, 0, rawPing()),
			rawPacket(0, 2*n+2, 0, rawCredit(stream.Credit{})), []byte("x"), []byte{0xF5, 0x11})
		for range 2 {
			quiet = append(quiet, rawPacket(0, 1<<20+2*n, 0, rawReset(stream.CloseTryAgainLater)))
		}
	}
	rawPublish(t, nc, reply, quiet...)
	waitBehind(t, p)
	eventually(t, "only the request is left", func() bool { return p.consumer.Stats().Streams == 1 })
	answers, err := nc.SubscribeSync(controlSubject(1))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = answers.Unsubscribe() }()
	before := liveHeap()
	const flood = 20_000
	for n := range uint64(flood) {
		m := &nats.Msg{Subject: reply, Reply: controlSubject(n + 1), Data: rawPacket(stream.PacketSeq, 1<<30+2*n, 0, rawData("a"))}
		if err := nc.PublishMsg(m); err != nil {
			t.Fatal(err)
		}
	}
	rawPublish(t, nc, reply)
	waitBehind(t, p)
	if s := p.consumer.Stats(); s.Streams > 12 || s.DroppedForeign < flood-10 { // with that of waitBehind
		t.Errorf("a flood of senders: %+v", s)
	}
	if !race.Enabled {
		eventually(t, "a flood of senders takes less than a megabyte", func() bool { return liveHeap()-before < 1<<20 })
	}
	streams, err := take(t, r)
	if err != io.EOF || len(streams) != 10 {
		t.Errorf("%d streams, %v", len(streams), err)
	}
	runtime.KeepAlive(streams)
}

// A producer that never moves to the token of its stream is served at that of the request, for as long as it sends. Its
// packets reach its own stream, lost, repeated and out of order, also after the gathering and all other streams have
// ended.
func TestResponderMayStayAtTheRequest(t *testing.T) {
	p := newPair(t)
	subject, requests := rawRequests(t, p)
	r, err := p.consumer.OpenMany(testContext(t), subject, nil, stream.WithStallTimeout(time.Hour), stream.WithMaxResponders(2))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	reply, nc := nextRequest(t, requests).Reply, p.producer.Conn
	send := func(sender uint64, seq uint32, answer string, frames ...stream.Frame) {
		t.Helper()
		if err := nc.PublishMsg(&nats.Msg{Subject: reply, Reply: answer, Data: rawPacket(stream.PacketSeq, sender, seq, frames...)}); err != nil {
			t.Fatal(err)
		}
	}
	a, b := controlSubject(1), controlSubject(2)
	heard, err := nc.SubscribeSync(a)
	if err != nil || nc.Flush() != nil {
		t.Fatal(err)
	}
	send(2, 1, "", rawData("A1")) // before the packet with the address
	send(2, 0, a, rawData("A0"))
	send(4, 0, b, rawData("B0"))
	send(2, 0, a, rawData("A0"))
	send(2, 2, "", rawData("A2"))
	send(4, 1, "", rawData("B1"), rawClose(1000))
	send(2, 1, "", rawData("A1"))
	send(2, 2, "", rawData("A2"))
	rawPublish(t, nc, reply)
	streams, err := take(t, r)
	if err != io.EOF || len(streams) != 2 {
		t.Fatalf("%d streams, %v", len(streams), err)
	}
	if got, err := readAll(streams[1]); err != io.EOF || string(bytes.Join(got, nil)) != "B0B1" {
		t.Errorf("the second stream: %q, %v", got, err)
	}
	for i := range 3 {
		if rec, err := streams[0].Recv(); string(rec) != fmt.Sprint("A", i) || err != nil {
			t.Fatalf("record %d of the first stream: %q, %v", i, rec, err)
		}
	}
	question := message(t, heard, stream.FramePing)
	if question.Reply == reply || question.Reply == "" {
		t.Errorf("the consumer says %q is the stream's subject, that of the request is %q", question.Reply, reply)
	}
	for i := 3; i < 10; i++ {
		send(2, uint32(i), "", rawData(fmt.Sprint("A", i)))
	}
	send(2, 10, "", rawClose(1000))
	rawPublish(t, nc, reply)
	if got, err := readAll(streams[0]); err != io.EOF || len(got) != 7 {
		t.Errorf("%q, %v", got, err)
	}
	eventually(t, "the request's subject is out of use", func() bool { return p.consumer.Stats().Streams == 0 })
}

// Loss, repetition and disorder of all messages, the first ones included, cost no record and no responder.
func TestRespondersSurviveFaults(t *testing.T) {
	p := newPair(t)
	rng := rand.New(rand.NewPCG(1, 2))
	proxy := streamtest.RunInterceptor(t, p.server.URL())
	isPacket := func(m *streamtest.Message) bool { return len(m.Data) > 0 && m.Data[0] == stream.PacketMagic }
	proxy.SetRules(streamtest.Only(isPacket, streamtest.Drop(0.05, rng), streamtest.Duplicate(0.05, rng), streamtest.Reorder(0.05, 3, rng)))
	nc, err := nats.Connect(proxy.URL(), nats.IgnoreDiscoveredServers())
	if err != nil {
		t.Fatal(err)
	}
	client := p.newClient(t, stream.ClientParams{Conn: nc, AckTimeout: 50 * time.Millisecond})
	newServices(t, p, 5, stream.ServerParams{AckTimeout: 50 * time.Millisecond}, named)
	for range max(5, scaled(20)) {
		streams, err := take(t, openMany(t, client, stall, stream.WithMaxResponders(5)))
		if err != io.EOF || len(streams) != 5 {
			t.Fatalf("%d streams, %v", len(streams), err)
		}
		var all sync.WaitGroup
		for _, s := range streams {
			all.Go(func() { verifyNamed(t, s, 300) })
		}
		all.Wait()
	}
	if n := proxy.Counts(); n.Dropped == 0 || n.Duplicated == 0 || n.Held == 0 {
		t.Errorf("too few faults: %+v", n)
	}
	proxy.SetRules()
	verifyIdle(t, client) // before the proxy ends
}

// Many requests leave nothing: no stream, no memory, no goroutine.
func TestManyRequestsToRespondersLeaveNothing(t *testing.T) {
	p := newPair(t)
	servers := newServices(t, p, 3, stream.ServerParams{}, func(int) stream.Handler {
		return func(w *stream.Writer, _ *stream.Request) error {
			_, err := w.Write([]byte("a"))
			return err
		}
	})
	for i, s := range servers {
		subject := fmt.Sprint("ended.", i)
		s.handle(t, subject, func(*stream.Writer, *stream.Request) error { return nil })
		endMany(t, p.consumer, subject)
	}
	ctx := testContext(t)
	verifyFootprint(t, p, scaled(1000), func(n int) {
		for i := range n {
			r, err := p.consumer.OpenMany(ctx, "all", nil, stream.WithMaxResponders(3), stall)
			if err != nil {
				t.Fatal(err)
			}
			for s, err := range r.All() {
				if err != nil {
					t.Fatal(err)
				}
				if i%2 == 0 {
					if got, err := readAll(s); err != io.EOF || len(got) != 1 {
						t.Fatalf("%q, %v", got, err)
					}
				}
			}
			r.Close()
		}
	})
}
