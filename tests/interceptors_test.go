package stream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// trace records what happened, in order.
type trace struct {
	mu  sync.Mutex
	all []string
}

func (l *trace) add(s string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, s)
}

func (l *trace) take() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := strings.Join(l.all, " ")
	l.all = nil
	return s
}

func (l *trace) seen() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.all)
}

// only returns those words of all that are among some.
func only(all, some string) []string {
	return slices.DeleteFunc(strings.Fields(all), func(w string) bool { return !slices.Contains(strings.Fields(some), w) })
}

type key struct{}

// The first interceptor is outermost, at both ends. An interceptor of a server passes values through the context of the
// request, and one of a client sets headers, also for OpenStream.
func TestInterceptorsSurroundInOrder(t *testing.T) {
	var did trace
	around := func(name string) func(stream.Handler) stream.Handler {
		return func(next stream.Handler) stream.Handler {
			did.add("make-" + name)
			return func(w *stream.Writer, r *stream.Request) error {
				did.add(name)
				defer did.add("/" + name)
				values, _ := r.Context().Value(key{}).(string)
				return next(w, r.WithContext(context.WithValue(r.Context(), key{}, values+name)))
			}
		}
	}
	p := newPair(t)
	interceptors := []func(stream.Handler) stream.Handler{around("a"), around("b")}
	s := newService(t, p, stream.ServerParams{Interceptors: interceptors})
	clear(interceptors) // the server has a copy
	s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
		did.add("handler")
		if rec, err := r.Recv(); err != io.EOF {
			t.Errorf("the copy reads %q, %v", rec, err)
		}
		_, err := fmt.Fprint(w, r.Context().Value(key{}), r.Header.Get("Names"), string(r.Data), r.Subject)
		return err
	})
	if got, want := did.take(), "make-b make-a"; got != want {
		t.Errorf("registration: %s, want %s", got, want)
	}
	name := func(name string) func(stream.OpenFunc) stream.OpenFunc {
		return func(next stream.OpenFunc) stream.OpenFunc {
			return func(ctx context.Context, msg *nats.Msg, opts ...stream.OpenOption) (*stream.Stream, error) {
				did.add(name)
				defer did.add("/" + name)
				msg.Header.Set("Names", msg.Header.Get("Names")+name)
				msg.Data = append([]byte(name), msg.Data...)
				return next(ctx, msg, opts...)
			}
		}
	}
	c := p.newClient(t, stream.ClientParams{Interceptors: []func(stream.OpenFunc) stream.OpenFunc{name("c"), name("d")}})
	msg := &nats.Msg{Subject: "svc", Data: []byte("!"), Header: nats.Header{"Names": {"of:"}}}
	st, err := c.OpenMsg(testContext(t), msg)
	if err != nil {
		t.Fatal(err)
	}
	if err := st.CloseSend(); err != nil {
		t.Error(err)
	}
	if rec, err := st.Recv(); err != nil || string(rec) != "abof:cddc!svc" {
		t.Errorf("got %q, %v", rec, err)
	}
	wantEOF(t, st)
	eventually(t, "the handler has returned", func() bool { return strings.Contains(strings.Join(did.seen(), " "), "/a") })
	if got := did.take(); strings.Join(only(got, "c d /d /c"), " ") != "c d /d /c" || strings.Join(only(got, "a b handler /b /a"), " ") != "a b handler /b /a" {
		t.Errorf("order of the calls: %s", got)
	}
	if len(msg.Header) != 1 || msg.Header.Get("Names") != "of:" || string(msg.Data) != "!" {
		t.Errorf("the caller's message was changed: %+v", msg)
	}

	did.take()
	results, err := c.OpenStream(testContext(t), "nobody", nil)
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the end of the channel", func() {
		for range results {
		}
	})
	if got := did.take(); !strings.HasPrefix(got, "c d") {
		t.Errorf("OpenStream: %s", got)
	}
}

// What an interceptor does not do is not done, and what it does twice is done twice.
func TestInterceptorsDecideHowOftenTheNextRuns(t *testing.T) {
	p := newPair(t)
	denied := errors.New("denied")
	var extra *stream.Stream
	around := func(next stream.OpenFunc) stream.OpenFunc {
		return func(ctx context.Context, msg *nats.Msg, opts ...stream.OpenOption) (*stream.Stream, error) {
			switch string(msg.Data) {
			case "never":
				return nil, denied
			case "nothing":
				return nil, nil
			case "both":
				var err error
				if extra, err = next(ctx, msg, opts...); err != nil {
					return nil, err
				}
				return extra, denied
			case "twice":
				first, err := next(ctx, msg, opts...)
				if err != nil {
					return nil, err
				}
				_ = first.Close()
			case "no message":
				return next(ctx, nil)
			case "no context":
				var none context.Context
				return next(none, msg)
			}
			return next(ctx, msg, opts...)
		}
	}
	s := newService(t, p, stream.ServerParams{Interceptors: []func(stream.Handler) stream.Handler{func(next stream.Handler) stream.Handler {
		return func(w *stream.Writer, r *stream.Request) error {
			switch string(r.Data) {
			case "handler never":
				return &stream.CloseError{Code: 4321, Text: "not for you"}
			case "handler twice":
				if err := next(w, r); err != nil {
					return err
				}
			case "handler closed":
				_ = w.Close()
			}
			return next(w, r)
		}
	}}})
	s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
		_, err := w.Write([]byte("record"))
		return err
	})
	c := p.newClient(t, stream.ClientParams{Interceptors: []func(stream.OpenFunc) stream.OpenFunc{around}})
	for data, want := range map[string]error{
		"never": denied, "both": denied, "no message": nats.ErrInvalidMsg, "no context": nats.ErrInvalidContext, "nothing": nil,
	} {
		st, err := c.Open(testContext(t), "svc", []byte(data))
		if st != nil || err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("%s: %v, %v", data, st, err)
		}
	}
	if _, err := extra.Recv(); err != stream.ErrClosed {
		t.Errorf("a stream that was returned with an error: %v", err)
	}
	for data, records := range map[string]int{"twice": 1, "handler twice": 2, "handler never": 0, "handler closed": 0} {
		st, err := c.Open(testContext(t), "svc", []byte(data))
		if err != nil {
			t.Fatal(err)
		}
		got, err := readAll(st)
		if len(got) != records {
			t.Errorf("%s: %d records, %v", data, len(got), err)
		}
		switch data {
		case "handler never":
			wantCode(t, err, 4321, "not for you")
		case "handler closed":
			wantCode(t, err, stream.CloseInternalServerErr, "")
		default:
			if err != io.EOF {
				t.Error(data, err)
			}
		}
	}
}

// A panic passes through all interceptors, and the end of it is as without them.
func TestPanicsPassThroughInterceptors(t *testing.T) {
	var did trace
	seen := func(name string) func(stream.Handler) stream.Handler {
		return func(next stream.Handler) stream.Handler {
			return func(w *stream.Writer, r *stream.Request) (err error) {
				defer func() {
					if v := recover(); v != nil {
						did.add(fmt.Sprint(name, ":", v))
						panic(v)
					}
				}()
				return next(w, r)
			}
		}
	}
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{Logger: slog.New(slog.DiscardHandler), Interceptors: []func(stream.Handler) stream.Handler{seen("a"), seen("b")}})
	s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error { panic("oops") })
	c := p.newClient(t, stream.ClientParams{Interceptors: []func(stream.OpenFunc) stream.OpenFunc{func(next stream.OpenFunc) stream.OpenFunc {
		return func(ctx context.Context, msg *nats.Msg, opts ...stream.OpenOption) (*stream.Stream, error) {
			if msg.Data != nil {
				panic("mine")
			}
			return next(ctx, msg, opts...)
		}
	}}})
	func() {
		defer func() {
			if v := recover(); v != "mine" {
				t.Errorf("Open panicked with %v", v)
			}
		}()
		_, _ = c.Open(testContext(t), "svc", []byte("x"))
	}()
	_, err := readAll(open(t, c, "svc"))
	wantCode(t, err, stream.CloseInternalServerErr, "handler panicked")
	if got := did.take(); got != "b:oops a:oops" {
		t.Error(got)
	}
}

// Interceptors that cannot be called are errors before anything is started.
func TestInvalidInterceptorsAreRefused(t *testing.T) {
	p := newPair(t)
	conn := p.consumer.Conn
	if _, err := stream.NewClient(stream.ClientParams{Conn: conn, Interceptors: []func(stream.OpenFunc) stream.OpenFunc{nil}}); err == nil {
		t.Error("a nil interceptor of a client")
	}
	none := func(stream.OpenFunc) stream.OpenFunc { return nil }
	if _, err := stream.NewClient(stream.ClientParams{Conn: conn, Interceptors: []func(stream.OpenFunc) stream.OpenFunc{none}}); err == nil {
		t.Error("an interceptor that returns nil")
	}
	if _, err := stream.NewServer(stream.ServerParams{Conn: conn, Interceptors: []func(stream.Handler) stream.Handler{nil}}); err == nil {
		t.Error("a nil interceptor of a server")
	}
	s := newService(t, p, stream.ServerParams{Interceptors: []func(stream.Handler) stream.Handler{func(stream.Handler) stream.Handler { return nil }}})
	if _, err := s.Handle("svc", nothing); err == nil || !strings.Contains(err.Error(), "interceptor") {
		t.Error("an interceptor that returns nil:", err)
	}
}

// The context of WithContext replaces that of the request for its user, and for nothing else.
func TestWithContextChangesContextOnly(t *testing.T) {
	p, _ := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		ctx, cancel := context.WithCancel(r.Context())
		r2 := r.WithContext(ctx)
		if r2.Context() != ctx || r.Context() == ctx || r2.Subject != r.Subject || r2.Draining() != r.Draining() {
			t.Error("the copy differs in more, or the original has changed")
		}
		cancel()
		rec, err := r2.Recv()
		if err != nil || string(rec) != "one" {
			t.Errorf("a read after the end of the new context: %q, %v", rec, err)
		}
		rec, err = r.Recv()
		if err != nil || string(rec) != "two" {
			t.Errorf("the original reads on: %q, %v", rec, err)
		}
		defer func() {
			if recover() == nil {
				t.Error("a nil context is accepted")
			}
		}()
		var none context.Context
		r.WithContext(none)
		return nil
	})
	st := open(t, p.consumer, "svc")
	for _, rec := range []string{"one", "two"} {
		if _, err := st.Write([]byte(rec)); err != nil {
			t.Fatal(err)
		}
	}
	wantEOF(t, st)
}
