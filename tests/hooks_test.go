package stream_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// events are the calls of hooks, by stream, in their order.
type events struct {
	mu     sync.Mutex
	calls  map[uint64][]string
	closed map[uint64]error
	totals map[uint64]stream.Totals
	open   int
	resent int
	back   int
}

func newEvents() *events {
	return &events{calls: make(map[uint64][]string), closed: make(map[uint64]error), totals: make(map[uint64]stream.Totals)}
}

func (e *events) add(i stream.StreamInfo, name string) {
	e.calls[i.ID] = append(e.calls[i.ID], name)
	if i.Opened.IsZero() || i.Elapsed < 0 || i.ID == 0 || (i.Elapsed == 0) != (name == "opened") {
		e.calls[i.ID] = append(e.calls[i.ID], fmt.Sprintf("(wrong info %+v)", i))
	}
}

func (e *events) hooks() stream.Hooks {
	return stream.Hooks{
		Opened: func(i stream.StreamInfo) {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.add(i, "opened")
			e.open++
		},
		FirstRecord: func(i stream.StreamInfo) {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.add(i, "first")
		},
		Closed: func(i stream.StreamInfo, t stream.Totals, err error) {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.add(i, "closed")
			e.closed[i.ID], e.totals[i.ID] = err, t
			e.open--
		},
		Retransmitted: func(i stream.StreamInfo, n int) {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.resent += n
		},
		Reconnected: func(i stream.StreamInfo) {
			e.mu.Lock()
			defer e.mu.Unlock()
			e.back++
		},
	}
}

// wait waits until n streams were reported closed and none is open, and returns the calls of the last one.
func (e *events) wait(t *testing.T, n int) (calls string, totals stream.Totals, err error) {
	t.Helper()
	eventually(t, "the streams are reported closed", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return len(e.closed) == n && e.open == 0
	})
	e.mu.Lock()
	defer e.mu.Unlock()
	id := uint64(n)
	return strings.Join(e.calls[id], " "), e.totals[id], e.closed[id]
}

// Each way in which a stream ends is reported once at both ends, with its error and totals, after its other events.
func TestHooksReportEachStream(t *testing.T) {
	ours, theirs := newEvents(), newEvents()
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{Hooks: theirs.hooks()})
	c := p.newClient(t, stream.ClientParams{Hooks: ours.hooks()})
	s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
		switch string(r.Data) {
		case "empty":
			return nil
		case "fails":
			return &stream.CloseError{Code: 4321, Text: "text"}
		case "waits":
			_, _ = w.Write([]byte("record"))
			<-r.Context().Done()
			return nil
		}
		for rec, err := range r.All() {
			if err != nil {
				return err
			}
			if _, err := w.Write(rec); err != nil {
				return err
			}
		}
		return nil
	})
	both := "opened first closed"
	for i, c2 := range []struct {
		data           string
		use            func(st *stream.Stream)
		ours, theirs   string
		consumer       func(error) bool
		producer       func(error) bool
		in, out, acked uint64
	}{
		{"empty", func(st *stream.Stream) { wantEOF(t, st) }, "opened closed", "opened closed", isNil, isNil, 0, 0, 0},
		{"fails", func(st *stream.Stream) { _, _ = st.Recv() }, "opened closed", "opened closed", isCode(4321), isCode(4321), 0, 0, 0},
		{"waits", func(st *stream.Stream) { _, _ = st.Recv(); _ = st.Close() }, both, both, is(stream.ErrClosed), isCode(stream.CloseCanceled), 1, 0, 0},
		{"echo", func(st *stream.Stream) {
			for range 3 {
				_, _ = st.Write([]byte("four"))
			}
			_ = st.CloseSend()
			if _, err := st.Header(); err != nil {
				t.Error(err)
			}
			_, _ = readAll(st)
		}, both, both, isNil, isNil, 3, 3, 3},
	} {
		st, err := c.Open(testContext(t), "svc", []byte(c2.data))
		if err != nil {
			t.Fatal(err)
		}
		c2.use(st)
		calls, totals, err := ours.wait(t, i+1)
		if calls != c2.ours || !c2.consumer(err) || totals.RecordsIn != c2.in || totals.RecordsOut != c2.out || totals.RecordsAcked != c2.acked {
			t.Errorf("%s, consumer: %s, %+v, %v", c2.data, calls, totals, err)
		}
		calls, totals, err = theirs.wait(t, i+1)
		if calls != c2.theirs || !c2.producer(err) || totals.RecordsIn != c2.out || totals.RecordsOut != c2.in {
			t.Errorf("%s, producer: %s, %+v, %v", c2.data, calls, totals, err)
		}
	}

	st, err := c.Open(testContext(t), "nobody", nil)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = st.Recv()
	if calls, _, err := ours.wait(t, 5); calls != "opened closed" || !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("nobody serves: %s, %v", calls, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if st, err = c.Open(ctx, "svc", []byte("waits")); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Recv(); err != nil {
		t.Error(err)
	}
	cancel()
	if calls, _, err := ours.wait(t, 6); calls != both || !errors.Is(err, context.Canceled) {
		t.Errorf("the context ended: %s, %v", calls, err)
	}

	w := c.NewWriter(rawInbox())
	write(t, w, []byte("record"))
	_ = w.CloseWithCode(4999, "own")
	_ = c.Close() // nobody acknowledges it
	if calls, totals, err := ours.wait(t, 7); calls != both || err == nil || totals.RecordsOut != 1 {
		t.Errorf("a Writer: %s, %+v, %v", calls, totals, err)
	}
}

func isNil(err error) bool             { return err == nil }
func is(target error) func(error) bool { return func(err error) bool { return errors.Is(err, target) } }
func isCode(code int) func(error) bool { return is(&stream.CloseError{Code: code}) }

// JoinHooks calls each of several functions, in order, and has none that nobody set.
func TestJoinedHooksAreAllCalled(t *testing.T) {
	var calls []string
	named := func(name string) stream.Hooks {
		return stream.Hooks{
			Opened:      func(i stream.StreamInfo) { calls = append(calls, fmt.Sprint(name, " opened ", i.ID)) },
			FirstRecord: func(i stream.StreamInfo) { calls = append(calls, fmt.Sprint(name, " first ", i.ID)) },
			Closed: func(i stream.StreamInfo, totals stream.Totals, err error) {
				calls = append(calls, fmt.Sprint(name, " closed ", i.ID, totals.BytesIn, err))
			},
			Retransmitted: func(i stream.StreamInfo, n int) { calls = append(calls, fmt.Sprint(name, " retransmitted ", i.ID, n)) },
			Reconnected:   func(i stream.StreamInfo) { calls = append(calls, fmt.Sprint(name, " reconnected ", i.ID)) },
		}
	}
	h := stream.JoinHooks(named("a"), stream.Hooks{}, named("b"), named("c"))
	h.Opened(stream.StreamInfo{ID: 1})
	h.FirstRecord(stream.StreamInfo{ID: 2})
	h.Closed(stream.StreamInfo{ID: 3}, stream.Totals{BytesIn: 9}, stream.ErrClosed)
	h.Retransmitted(stream.StreamInfo{ID: 4}, 8)
	h.Reconnected(stream.StreamInfo{ID: 5})
	var want []string
	for _, event := range []string{"opened 1", "first 2", fmt.Sprint("closed 3 9 ", stream.ErrClosed), "retransmitted 4 8", "reconnected 5"} {
		for _, name := range []string{"a", "b", "c"} {
			want = append(want, name+" "+event)
		}
	}
	if !slices.Equal(calls, want) {
		t.Errorf("%q, want %q", calls, want)
	}
	if h := stream.JoinHooks(stream.Hooks{}, stream.Hooks{}); h.Opened != nil || h.FirstRecord != nil || h.Closed != nil || h.Retransmitted != nil || h.Reconnected != nil {
		t.Error("a function that nobody set")
	}
	if h := stream.JoinHooks(stream.Hooks{}, stream.Hooks{Reconnected: func(stream.StreamInfo) {}}); h.Reconnected == nil || h.Opened != nil {
		t.Error("not the functions that were set")
	}
}

// The end of a client or server is the end of its streams, and is reported before Close returns.
func TestHooksReportTheEndOfAClient(t *testing.T) {
	ours, theirs := newEvents(), newEvents()
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{Hooks: theirs.hooks()})
	h := newHeld()
	defer close(h.release)
	s.handle(t, "held", h.handle)
	for _, server := range []bool{false, true} {
		c := p.newClient(t, stream.ClientParams{Hooks: ours.hooks()})
		const n = 50
		for range n {
			st := open(t, c, "held")
			if _, err := st.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		if server {
			break // its handlers run until the end of the test
		}
		_ = c.Close()
		ours.mu.Lock()
		if len(ours.closed) != n || ours.open != 0 {
			t.Errorf("%d of %d streams are reported closed, %d are open", len(ours.closed), n, ours.open)
		}
		for id, err := range ours.closed {
			if !errors.Is(err, stream.ErrClientClosed) {
				t.Errorf("stream %d: %v", id, err)
			}
		}
		ours.mu.Unlock()
	}
	_ = s.Close()
	theirs.mu.Lock()
	defer theirs.mu.Unlock()
	if len(theirs.closed) != 100 || theirs.open != 0 {
		t.Errorf("%d of 100 streams are reported closed, %d are open", len(theirs.closed), theirs.open)
	}
}

// A hook that panics is logged, and the next event follows.
func TestHooksThatPanicAreLogged(t *testing.T) {
	e := newEvents()
	hooks := e.hooks()
	opened := hooks.Opened
	hooks.Opened = func(i stream.StreamInfo) {
		opened(i)
		panic("oops")
	}
	var logged lockedBuffer
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{Hooks: hooks, Logger: slog.New(slog.NewTextHandler(&logged, nil))})
	s.handle(t, "svc", nothing)
	wantEOF(t, open(t, p.consumer, "svc"))
	if calls, _, err := e.wait(t, 1); calls != "opened closed" || err != nil {
		t.Error(calls, err)
	}
	if !strings.Contains(logged.String(), "hook panicked") || !strings.Contains(logged.String(), "oops") {
		t.Errorf("the panic was not logged: %s", logged.String())
	}
}

// A lost packet and a lost connection are events of the streams that went on.
func TestHooksReportRepairs(t *testing.T) {
	e := newEvents()
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{Hooks: e.hooks()}, nats.ReconnectWait(10*time.Millisecond), nats.MaxReconnects(-1))
	h := newHeld()
	s.handle(t, "held", h.handle)
	st := open(t, p.consumer, "held")
	if _, err := st.Recv(); err != nil {
		t.Fatal(err)
	}
	if err := s.nc.ForceReconnect(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the stream has reconnected", func() bool {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.back > 0
	})
	close(h.release)
	wantEOF(t, st)
	if calls, _, err := e.wait(t, 1); err != nil {
		t.Error(calls, err)
	}
}
