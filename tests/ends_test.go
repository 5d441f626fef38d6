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
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

func TestCloseCodesArrive(t *testing.T) {
	p := newPair(t)
	for _, tt := range []struct {
		code int
		text []string
		want string
	}{
		{stream.CloseGoingAway, nil, ""},
		{stream.CloseProtocolError, []string{"a"}, "a"},
		{stream.CloseUnsupportedData, []string{"two", "words"}, "two words"},
		{stream.CloseAbnormalClosure, []string{"abnormal"}, "abnormal"},
		{stream.CloseMessageTooBig, nil, ""},
		{stream.CloseTryAgainLater, nil, ""},
		{stream.CloseBadRequest, []string{"grüße 🙂"}, "grüße 🙂"},
		{stream.CloseCanceled, nil, ""},
		{stream.CloseDeadlineExceeded, nil, ""},
		{stream.CloseTooSlow, nil, ""},
		{stream.CloseInternalServerErr, []string{strings.Repeat("x", stream.MaxReason)}, strings.Repeat("x", stream.MaxReason)},
		{1001, []string{""}, ""}, {1016, nil, ""}, {3000, nil, ""}, {4999, []string{"\x00"}, "\x00"}, {5999, nil, ""},
	} {
		t.Run(fmt.Sprint(tt.code), func(t *testing.T) {
			w, s := newWriterStream(t, p)
			write(t, w, []byte("before"))
			if err := w.CloseWithCode(tt.code, tt.text...); err != nil {
				t.Fatal(err)
			}
			if rec, err := s.Recv(); err != nil || string(rec) != "before" {
				t.Fatalf("%q, %v", rec, err)
			}
			_, err := s.Recv()
			got, ok := errors.AsType[*stream.CloseError](err)
			if !ok || got.Code != tt.code || got.Text != tt.want {
				t.Fatalf("%#v, want code %d, text %q", err, tt.code, tt.want)
			}
			var as *stream.CloseError
			if !errors.As(err, &as) || as != got {
				t.Error("errors.As finds something else")
			}
			if !errors.Is(err, &stream.CloseError{Code: tt.code}) || !errors.Is(err, &stream.CloseError{Code: tt.code, Text: tt.want}) {
				t.Error("errors.Is does not find it")
			}
			if errors.Is(err, &stream.CloseError{Code: tt.code + 1}) || errors.Is(err, &stream.CloseError{Code: tt.code, Text: "other"}) {
				t.Error("errors.Is finds what it is not")
			}
			if _, again := s.Recv(); again != err {
				t.Errorf("then %v", again)
			}
			if cause := context.Cause(s.Context()); cause != err {
				t.Errorf("the context's cause is %v", cause)
			}
		})
	}
	t.Run("normal with a reason", func(t *testing.T) {
		w, s := newWriterStream(t, p)
		if err := w.CloseWithCode(stream.CloseNormalClosure, "done"); err != nil {
			t.Fatal(err)
		}
		wantEOF(t, s)
	})
}

func TestCloseErrorTextNamesCodeAndReason(t *testing.T) {
	for _, tt := range []struct {
		err  stream.CloseError
		want string
	}{
		{stream.CloseError{Code: 1006, Text: "text"}, "nats stream: close 1006 (abnormal closure): text"},
		{stream.CloseError{Code: 1000}, "nats stream: close 1000 (normal)"},
		{stream.CloseError{Code: 4321}, "nats stream: close 4321"},
		{stream.CloseError{Code: 4321, Text: "mine"}, "nats stream: close 4321: mine"},
	} {
		if got := tt.err.Error(); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
}

func TestInvalidCloseCodeIsRefused(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	for _, code := range []int{-1, 0, 1, 999, 6000, 65536 + 1000, math.MaxInt, math.MinInt} {
		if err := w.CloseWithCode(code); !errors.Is(err, stream.ErrCloseCode) {
			t.Errorf("code %d: %v", code, err)
		}
	}
	write(t, w, []byte("goes on"))
	if err := w.CloseWithCode(4000, "valid"); err != nil {
		t.Errorf("then a valid one: %v", err)
	}
	got, err := readAll(s)
	if len(got) != 1 || !errors.Is(err, &stream.CloseError{Code: 4000, Text: "valid"}) {
		t.Errorf("%q, %v", got, err)
	}
}

// A reason is for people to read. It is made to fit and never keeps a stream from ending.
func TestCloseReasonIsMadeToFit(t *testing.T) {
	p := newPair(t)
	for _, tt := range []struct{ name, give, want string }{
		{"longest", strings.Repeat("x", stream.MaxReason), strings.Repeat("x", stream.MaxReason)},
		{"too long", strings.Repeat("x", stream.MaxReason+1), strings.Repeat("x", stream.MaxReason)},
		{"cut in a character", "x" + strings.Repeat("ü", stream.MaxReason/2), "x" + strings.Repeat("ü", stream.MaxReason/2-1)},
		{"not UTF-8", "a\xffb\xc3", "a\uFFFDb\uFFFD"},
		{"much too long and not UTF-8", strings.Repeat("\xc3(", 1<<20), strings.Repeat("\uFFFD(", stream.MaxReason/4)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, s := newWriterStream(t, p)
			if err := w.CloseWithCode(4000, tt.give); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Recv(); !errors.Is(err, &stream.CloseError{Code: 4000, Text: tt.want}) {
				t.Errorf("the consumer's end: %q", err)
			}
			w, s = newWriterStream(t, p)
			write(t, w, []byte("x"))
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
			if err := s.CloseWithCode(4000, tt.give); err != nil {
				t.Fatal(err)
			}
			endedBy(t, w, &stream.CloseError{Code: 4000, Text: tt.want})
		})
	}
}

// A reason that the server takes no message for must not make a stream that cannot be closed.
func TestCloseReasonBeyondMaxPayloadIsCut(t *testing.T) {
	reason := strings.Repeat("x", stream.MaxReason)
	t.Run("producer's", func(t *testing.T) {
		p := newPair(t, pairOptions{server: []streamtest.Option{streamtest.WithMaxPayload(512)}})
		w, s := newWriterStream(t, p)
		write(t, w, []byte("x"))
		if err := w.CloseWithCode(4000, reason); err != nil {
			if err := w.CloseWithCode(4000, "short"); err != nil {
				t.Fatalf("CloseWithCode with a short reason afterwards: %v", err)
			}
		}
		got, err := readAll(s)
		if len(got) != 1 || !errors.Is(err, &stream.CloseError{Code: 4000}) {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("consumer's", func(t *testing.T) {
		p := newPair(t, pairOptions{server: []streamtest.Option{streamtest.WithMaxPayload(512)}})
		w, s := newWriterStream(t, p)
		write(t, w, []byte("x"))
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		if err := s.CloseWithCode(4000, reason); err != nil {
			s.Close()
			t.Fatalf("CloseWithCode: %v", err)
		}
		waitFor(t, "the producer to notice", func() { <-w.Context().Done() })
	})
}

// The first Close decides.
func TestFirstCloseDecides(t *testing.T) {
	p := newPair(t)
	for range scaled(200) {
		w, s := newWriterStream(t, p)
		var wg sync.WaitGroup
		for k := range 4 {
			wg.Go(func() {
				if err := w.CloseWithCode(4000 + k); err != nil {
					t.Errorf("CloseWithCode: %v", err)
				}
			})
		}
		waitFor(t, "CloseWithCode", wg.Wait)
		got, err := readAll(s)
		if closed, ok := errors.AsType[*stream.CloseError](err); !ok || closed.Code < 4000 || closed.Code > 4003 || len(got) != 0 {
			t.Errorf("%q, %v", got, err)
		}
	}
}

func TestWriteAfterCloseFails(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	write(t, w, []byte("x"))
	for range 3 {
		closeWriter(t, w)
	}
	if err := w.CloseWithCode(4000, "too late to change"); err != nil {
		t.Errorf("CloseWithCode after Close: %v", err)
	}
	for i, err := range []error{
		errOf(w.Write([]byte("late"))), errOf(w.Write(nil)), errOf(w.WriteObject(1)), errOf(w.ReadFrom(strings.NewReader("late"))),
	} {
		if !errors.Is(err, stream.ErrClosed) {
			t.Errorf("call %d after Close: %v", i, err)
		}
	}
	if err := w.Flush(); err != nil {
		t.Errorf("Flush after Close: %v", err)
	}
	waitFor(t, "the writer's context to end", func() { <-w.Context().Done() })
	if got, err := readAll(s); err != io.EOF || len(got) != 1 {
		t.Errorf("%q, %v", got, err)
	}
}

func TestEndIsReturnedByEveryLaterCall(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	write(t, w, []byte("only"))
	closeWriter(t, w)
	if rec, err := s.Recv(); err != nil || string(rec) != "only" {
		t.Fatalf("%q, %v", rec, err)
	}
	for range 3 {
		wantEOF(t, s)
		if n, err := s.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("Read: %d, %v", n, err)
		}
		var v any
		if err := s.RecvObject(&v); err != io.EOF {
			t.Errorf("RecvObject: %v", err)
		}
		if n, err := s.WriteTo(io.Discard); n != 0 || err != nil {
			t.Errorf("WriteTo: %d, %v", n, err)
		}
	}
	if s.Context().Err() == nil {
		t.Error("the context goes on after the end")
	}
	if err := context.Cause(s.Context()); err != io.EOF {
		t.Errorf("the context's cause is %v", err)
	}
	for range 2 {
		if err := s.Close(); err != nil {
			t.Errorf("Close after the end: %v", err)
		}
	}
	wantEOF(t, s)
}

// A stream that failed never looks like one that is complete.

type nilError struct{ text string }

func (e *nilError) Error() string { return e.text } // panics for a nil pointer

// fallbackEnd opens a stream as a consumer of the original protocol does, and returns the error that ended it.
func fallbackEnd(t testing.TB, p *pair, subject string, data []byte) error {
	t.Helper()
	inbox := nats.NewInbox()
	sub, err := p.consumer.Conn.SubscribeSync(inbox)
	if err != nil {
		t.Fatal(err)
	}
	defer sub.Unsubscribe()
	if err := p.consumer.Conn.PublishRequest(subject, inbox, data); err != nil {
		t.Fatal(err)
	}
	for {
		m, err := sub.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		var msg stream.StreamingMsg
		if err := json.Unmarshal(m.Data, &msg); err != nil {
			t.Fatal(err)
		}
		if msg.Type != stream.StreamingMsgTypeClose {
			continue
		}
		if msg.CloseError.Code == stream.CloseNormalClosure {
			return io.EOF
		}
		return msg.CloseError
	}
}

// Only nil and a bare *CloseError of 1000 end a stream normally.
func TestHandlerErrorIsNeverANormalEnd(t *testing.T) {
	normal := &stream.CloseError{Code: stream.CloseNormalClosure, Text: "done"}
	own := &stream.CloseError{Code: 4321, Text: "mine"}
	var results sync.Map
	p, _ := newServed(t, stream.ServerParams{MaxFallback: 10, Logger: slog.New(slog.DiscardHandler)}, func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("row"))
		err, _ := results.Load(string(r.Data))
		result, _ := err.(error)
		return result
	})
	for _, c := range []struct {
		name   string
		result error
		code   int
		text   string
	}{
		{"nil", nil, 1000, ""},
		{"bare normal end", normal, 1000, ""},
		{"wrapped normal end", fmt.Errorf("stored 1 of 3 rows: %w", normal), 5000, "stored 1 of 3 rows: nats stream: close 1000 (normal): done"},
		{"joined normal end", errors.Join(normal, errors.New("disk failed")), 5000, ""},
		{"normal end joined alone", errors.Join(normal), 5000, ""},
		{"normal end behind another error", errors.Join(errors.New("disk failed"), normal), 5000, ""},
		{"nil *CloseError", (*stream.CloseError)(nil), 5000, ""},
		{"wrapped nil *CloseError", fmt.Errorf("failed: %w", (*stream.CloseError)(nil)), 5000, ""},
		{"joined nil *CloseError", errors.Join((*stream.CloseError)(nil)), 5000, ""},
		{"nil pointer of another type", (*nilError)(nil), 5000, "handler panicked"},
		{"io.EOF", io.EOF, 5000, "EOF"},
		{"other code", own, 4321, "mine"},
		{"wrapped other code", fmt.Errorf("private: %w", own), 4321, "mine"},
		{"joined other code", errors.Join(errors.New("private"), own), 4321, "mine"},
		{"code out of range", &stream.CloseError{Code: 0, Text: "x"}, 5000, ""},
		{"wrapped code out of range", fmt.Errorf("failed: %w", &stream.CloseError{Code: 6000}), 5000, ""},
		{"negative code", &stream.CloseError{Code: -1000}, 5000, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.result != nil {
				results.Store(c.name, c.result)
			}
			for _, form := range []string{"packets", "JSON"} {
				var err error
				if form == "packets" {
					s, oerr := p.consumer.Open(testContext(t), "svc", []byte(c.name))
					if oerr != nil {
						t.Fatal(oerr)
					}
					_, err = readAll(s)
				} else {
					err = fallbackEnd(t, p, "svc", []byte(c.name))
				}
				if c.code == 1000 {
					if err != io.EOF {
						t.Errorf("%s: the stream ended with %v, want io.EOF", form, err)
					}
					continue
				}
				wantCode(t, err, c.code, c.text)
			}
		})
	}
}

// A relay that returns the error of the stream it reads from, or writes to, does not end its own stream normally,
// whatever the handler of the other stream did.
func TestRelayOfAFailedStreamFails(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	s.handle(t, "takes-one", func(_ *stream.Writer, r *stream.Request) error {
		_, err := r.Recv()
		return err
	})
	s.handle(t, "takes-none", func(*stream.Writer, *stream.Request) error { return nil })
	s.handle(t, "refuses", func(*stream.Writer, *stream.Request) error { return &stream.CloseError{Code: 4321, Text: "no"} })
	s.handle(t, "resets", func(w *stream.Writer, r *stream.Request) error {
		if err := w.CloseWithCode(stream.CloseNormalClosure); err != nil {
			return err
		}
		if err := w.Flush(); err != nil {
			return err
		}
		_, _ = r.Recv()
		return nil
	})
	failed := make(chan error, 1)
	s.handle(t, "relay", func(w *stream.Writer, r *stream.Request) (err error) {
		defer func() { failed <- err }()
		up, err := p.consumer.Open(r.Context(), string(r.Data), nil)
		if err != nil {
			return err
		}
		defer up.Close()
		for i := 0; ; i++ {
			if _, err := fmt.Fprintf(up, "row %d", i); err != nil {
				return err
			}
			if err := up.Flush(); err != nil {
				return err
			}
		}
	})
	for subject, code := range map[string]int{"takes-one": 5000, "takes-none": 5000, "resets": 5000, "refuses": 4321} {
		down, err := p.consumer.Open(testContext(t), "relay", []byte(subject))
		if err != nil {
			t.Fatal(err)
		}
		_, end := readAll(down)
		if err := <-failed; err == nil || errors.Is(err, &stream.CloseError{Code: stream.CloseNormalClosure}) {
			t.Errorf("%s: the relay's write failed with %v", subject, err)
		} else if ce, ok := errors.AsType[*stream.CloseError](end); !ok || ce.Code != code && !(code == 4321 && errors.Is(err, stream.ErrClosed)) {
			t.Errorf("%s: the consumer's stream ended with %v, want close %d", subject, end, code)
		}
	}
}

// Writes to a stream that ended return the error of its reads, or ErrClosed.
func TestWritesAfterTheEndAgreeWithReads(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	results := map[string]error{"nil": nil, "error": errors.New("boom"), "code": &stream.CloseError{Code: 4321}}
	s.handle(t, "svc", func(_ *stream.Writer, r *stream.Request) error {
		if _, err := r.Recv(); err != nil {
			return err
		}
		return results[string(r.Data)]
	})
	for name := range results {
		for _, readsFirst := range []bool{false, true} {
			st, err := p.consumer.Open(testContext(t), "svc", []byte(name))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := st.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			var recvErr error
			if readsFirst {
				_, recvErr = readAll(st)
			}
			var writeErr error
			eventually(t, "a write fails", func() bool { _, writeErr = st.Write([]byte("more")); return writeErr != nil })
			flushErr, closeErr, syncErr := st.Flush(), st.CloseSend(), st.Sync(testContext(t))
			if !readsFirst {
				_, recvErr = readAll(st)
			}
			for call, err := range map[string]error{"Write": writeErr, "Flush": flushErr, "CloseSend": closeErr, "Sync": syncErr} {
				if err == nil || !errors.Is(err, stream.ErrClosed) && err.Error() != recvErr.Error() {
					t.Errorf("%s, reads first %v: %s returned %v, Recv %v", name, readsFirst, call, err, recvErr)
				}
			}
			if (recvErr == io.EOF) != (name == "nil") {
				t.Errorf("%s: Recv returned %v", name, recvErr)
			}
			st.Close()
		}
	}
}

// After a read returned the end of the context, no write succeeds, and its error is that of the read.
func TestWritesAfterTheContextEndedAgreeWithReads(t *testing.T) {
	cause := errors.New("budget used up")
	hold := func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("x"))
		<-r.Context().Done()
		return nil
	}
	p, _ := newServed(t, stream.ServerParams{}, hold)
	for name, start := range map[string]func() (context.Context, func(), []error){
		"cancel": func() (context.Context, func(), []error) {
			ctx, cancel := context.WithCancel(context.Background())
			return ctx, cancel, []error{context.Canceled}
		},
		"cancel with cause": func() (context.Context, func(), []error) {
			ctx, cancel := context.WithCancelCause(context.Background())
			return ctx, func() { cancel(cause) }, []error{context.Canceled, cause}
		},
		"deadline": func() (context.Context, func(), []error) {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
			t.Cleanup(cancel)
			return ctx, func() { <-ctx.Done() }, []error{context.DeadlineExceeded}
		},
		"deadline with cause": func() (context.Context, func(), []error) {
			ctx, cancel := context.WithTimeoutCause(context.Background(), 20*time.Millisecond, cause)
			t.Cleanup(cancel)
			return ctx, func() { <-ctx.Done() }, []error{context.DeadlineExceeded, cause}
		},
	} {
		for _, c := range []struct {
			name  string
			reads bool // before the call
			call  func(s *stream.Stream) error
		}{
			{"Write", true, func(s *stream.Stream) error { return errOf(s.Write([]byte("late"))) }},
			{"WriteObject", true, func(s *stream.Stream) error { return errOf(s.WriteObject("late")) }},
			{"WriteObject", false, func(s *stream.Stream) error { return errOf(s.WriteObject("late")) }},
			{"ReadFrom", true, func(s *stream.Stream) error { return errOf(s.ReadFrom(strings.NewReader("late"))) }},
			{"ReadFrom without progress", false, func(s *stream.Stream) error {
				return errOf(s.ReadFrom(readerFunc(func([]byte) (int, error) { return 0, nil })))
			}},
			{"Flush", true, (*stream.Stream).Flush},
			{"Flush", false, (*stream.Stream).Flush},
			{"CloseSend", true, (*stream.Stream).CloseSend},
			{"CloseSend", false, (*stream.Stream).CloseSend},
			{"large Write", false, func(s *stream.Stream) error { return errOf(s.Write(make([]byte, 1<<20))) }},
		} {
			t.Run(fmt.Sprintf("%s/%s, reads %v", name, c.name, c.reads), func(t *testing.T) {
				for range scaled(20) {
					ctx, end, want := start()
					s, err := p.consumer.Open(ctx, "svc", nil)
					if err != nil {
						t.Fatal(err)
					}
					if _, err := s.Recv(); err != nil && ctx.Err() == nil {
						t.Fatal(err)
					}
					_, _ = s.Write([]byte("in time"))
					end()
					if c.reads {
						if _, err := s.Recv(); !errors.Is(err, ctx.Err()) {
							t.Fatalf("Recv: %v", err)
						}
					}
					err = c.call(s)
					for _, w := range want {
						if !errors.Is(err, w) {
							t.Fatalf("%v, which is not %v", err, w)
						}
					}
					s.Close()
				}
			})
		}
	}
}

// A handler's writes fail after its deadline with the same errors as its reads.
func TestHandlersWritesAfterItsDeadlineAgreeWithReads(t *testing.T) {
	results := make(chan [3]error, 1)
	p, _ := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("x"))
		<-r.Context().Done()
		_, recv := r.Recv()
		results <- [3]error{recv, errOf(w.Write([]byte("late"))), w.Flush()}
		return nil
	})
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	s, err := p.consumer.Open(ctx, "svc", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := readAll(s); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Recv of the consumer: %v", err)
	}
	got := <-results
	for i, call := range []string{"Recv", "Write", "Flush"} {
		if got[i] == nil || got[i].Error() != got[0].Error() {
			t.Errorf("%s: %v, Recv: %v", call, got[i], got[0])
		}
	}
}

// A record that the sender refuses because of its size ends the stream with 1009, if the handler returns that error.
func TestRecordTooLargeEndsTheStreamWith1009(t *testing.T) {
	p, _ := newServed(t, stream.ServerParams{MaxRecordSize: 1000, MaxFallback: 10}, func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("row"))
		var err error
		if strings.HasPrefix(string(r.Data), "object") {
			_, err = w.WriteObject(strings.Repeat("x", 2000))
		} else {
			_, err = w.Write(make([]byte, 1001))
		}
		if !errors.Is(err, stream.ErrRecordTooLarge) {
			t.Errorf("Write of a record that is too large: %v", err)
		}
		if strings.HasSuffix(string(r.Data), "wrapped") {
			err = fmt.Errorf("row 2: %w", err)
		}
		return err
	})
	for _, data := range []string{"bytes", "bytes wrapped", "object", "object wrapped"} {
		st, err := p.consumer.Open(testContext(t), "svc", []byte(data))
		if err != nil {
			t.Fatal(err)
		}
		records, err := readAll(st)
		wantCode(t, err, stream.CloseMessageTooBig, "")
		if len(records) != 1 {
			t.Errorf("%s: %d records", data, len(records))
		}
		wantCode(t, fallbackEnd(t, p, "svc", []byte(data)), stream.CloseMessageTooBig, "")
	}
}

// A handler that closes its Writer and then fails has its failure reported, by whatever way it fails.
func TestHandlerThatClosesAndFailsIsReported(t *testing.T) {
	fails := map[string]func(w *stream.Writer) error{
		"error": func(*stream.Writer) error { return errors.New("disk failed before row 2") },
		"close error": func(*stream.Writer) error {
			return fmt.Errorf("private: %w", &stream.CloseError{Code: 4321, Text: "disk failed"})
		},
		"panic":          func(*stream.Writer) error { panic("disk failed") },
		"goroutine ends": func(*stream.Writer) error { runtime.Goexit(); return nil },
	}
	closes := map[string]func(w *stream.Writer) error{
		"Close":         (*stream.Writer).Close,
		"CloseWithCode": func(w *stream.Writer) error { return w.CloseWithCode(stream.CloseNormalClosure, "done") },
		"twice":         func(w *stream.Writer) error { return errors.Join(w.Close(), w.Close()) },
	}
	p, s := newServed(t, stream.ServerParams{Logger: slog.New(slog.DiscardHandler)}, func(w *stream.Writer, r *stream.Request) error {
		fail, how, _ := strings.Cut(string(r.Data), "/")
		defer func() {
			if err := closes[how](w); err != nil {
				t.Errorf("%s: %v", how, err)
			}
		}()
		write(t, w, []byte("row 1"))
		return fails[fail](w)
	})
	for fail := range fails {
		for how := range closes {
			for range scaled(20) {
				st, err := p.consumer.Open(testContext(t), "svc", []byte(fail+"/"+how))
				if err != nil {
					t.Fatal(err)
				}
				records, err := readAll(st)
				if _, ok := errors.AsType[*stream.CloseError](err); !ok || len(records) != 1 {
					t.Errorf("%s after %s: %d records, %v", fail, how, len(records), err)
				}
			}
			if err := fallbackEnd(t, p, "svc", []byte(fail+"/"+how)); err == io.EOF {
				t.Errorf("%s after %s: a fallback consumer got the normal end", fail, how)
			}
		}
	}
	if n := s.Stats().UnreportedErrors; n != 0 {
		t.Errorf("%d errors count as unreported", n)
	}
}

// An honest Close of a handler reaches the consumer while the handler goes on, in any way it does so. The handler's
// error after that is logged and counted.
func TestCloseOfAHandlerThatGoesOnArrives(t *testing.T) {
	goesOn := map[string]func(w *stream.Writer, r *stream.Request, over chan struct{}){
		"reads": func(_ *stream.Writer, r *stream.Request, _ chan struct{}) { _, _ = r.Recv() },
		"flushes": func(w *stream.Writer, _ *stream.Request, over chan struct{}) {
			if err := w.Flush(); err != nil {
				t.Error(err)
			}
			<-over
		},
		"syncs": func(w *stream.Writer, _ *stream.Request, over chan struct{}) {
			if err := w.Sync(context.Background()); err != nil {
				t.Error(err)
			}
			<-over
		},
		"works": func(_ *stream.Writer, _ *stream.Request, over chan struct{}) { <-over },
		"waits for its writer": func(w *stream.Writer, _ *stream.Request, over chan struct{}) {
			<-w.Context().Done()
			<-over
		},
	}
	var log lockedBuffer
	var over chan struct{}
	p, s := newServed(t, stream.ServerParams{Logger: slog.New(slog.NewTextHandler(&log, nil))}, func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("row"))
		closeWriter(t, w)
		if _, err := w.Write([]byte("late")); !errors.Is(err, stream.ErrClosed) {
			t.Errorf("Write after Close: %v", err)
		}
		if err := w.SetTrailer(nats.Header{"A": {"b"}}); !errors.Is(err, stream.ErrClosed) {
			t.Errorf("SetTrailer after Close: %v", err)
		}
		goesOn[string(r.Data)](w, r, over)
		return errors.New("failed in the end: " + string(r.Data))
	})
	var want uint64
	for name := range goesOn {
		t.Run(name, func(t *testing.T) {
			over = make(chan struct{})
			st, err := p.consumer.Open(testContext(t), "svc", []byte(name))
			if err != nil {
				t.Fatal(err)
			}
			if records, err := readAll(st); len(records) != 1 || err != io.EOF {
				t.Errorf("%d records, %v; want 1 and io.EOF while the handler is at work", len(records), err)
			}
			close(over)
			st.Close()
			want++
			eventually(t, "the error is counted", func() bool { return s.Stats().UnreportedErrors == want })
			eventually(t, "the error is logged", func() bool { return strings.Contains(log.String(), "failed in the end: "+name) })
		})
	}
}

// A stream that the handler closed and whose consumer got the normal end is no failure.
func TestHandlerThatClosesAndReturnsNilIsNoFailure(t *testing.T) {
	var log lockedBuffer
	p, s := newServed(t, stream.ServerParams{Logger: slog.New(slog.NewTextHandler(&log, nil))}, func(w *stream.Writer, r *stream.Request) error {
		defer w.Close()
		write(t, w, []byte("row"))
		if string(r.Data) == "bare" {
			return &stream.CloseError{Code: stream.CloseNormalClosure}
		}
		return nil
	})
	for _, data := range []string{"nil", "bare"} {
		st, err := p.consumer.Open(testContext(t), "svc", []byte(data))
		if err != nil {
			t.Fatal(err)
		}
		if records, err := readAll(st); len(records) != 1 || err != io.EOF {
			t.Errorf("%s: %d records, %v", data, len(records), err)
		}
	}
	p.settle(t)
	if n := s.Stats().UnreportedErrors; n != 0 || log.String() != "" {
		t.Errorf("%d errors, log %q", n, log.String())
	}
}

// A consumer that only writes hears soon that its handler has returned, long before AckTimeout, whether the handler
// read some records, none, or sent some.
func TestUploadHearsAtOnceThatItsHandlerReturned(t *testing.T) {
	const ack = 20 * time.Second
	p := newPair(t, pairOptions{consumer: stream.ClientParams{AckTimeout: ack}})
	s := newService(t, p, stream.ServerParams{AckTimeout: ack})
	quota := &stream.CloseError{Code: 4321, Text: "quota"}
	handlers := map[string]stream.Handler{
		"reads-one": func(_ *stream.Writer, r *stream.Request) error {
			if _, err := r.Recv(); err != nil {
				return err
			}
			return quota
		},
		"reads-none": func(*stream.Writer, *stream.Request) error { return quota },
		"sends": func(w *stream.Writer, r *stream.Request) error {
			write(t, w, []byte("row"))
			return quota
		},
		"waits": func(w *stream.Writer, r *stream.Request) error {
			if err := w.Flush(); err != nil {
				return err
			}
			time.Sleep(20 * time.Millisecond) // the consumer has written what it may by then
			return quota
		},
		"closes-first": func(w *stream.Writer, r *stream.Request) error {
			if err := w.Close(); err != nil {
				return err
			}
			_, err := r.Recv()
			return err
		},
	}
	for name, h := range handlers {
		s.handle(t, name, h)
	}
	writes := map[string]func(s *stream.Stream) error{
		"large writes": func(s *stream.Stream) error { return errOf(s.Write(make([]byte, 32<<10))) },
		"small writes": func(s *stream.Stream) error { return errOf(s.Write(make([]byte, 100))) },
		"pieces":       func(s *stream.Stream) error { return errOf(s.Write(make([]byte, 1<<20))) },
		"flushes":      func(s *stream.Stream) error { return errors.Join(errOf(s.Write([]byte("x"))), s.Flush()) },
		"syncs": func(s *stream.Stream) error {
			return errors.Join(errOf(s.Write([]byte("x"))), s.Sync(context.Background()))
		},
		"slow writes": func(s *stream.Stream) error {
			time.Sleep(5 * time.Millisecond)
			return errOf(s.Write([]byte("x")))
		},
	}
	for name := range handlers {
		for how, call := range writes {
			t.Run(name+"/"+how, func(t *testing.T) {
				st := open(t, p.consumer, name)
				start := time.Now()
				var err error
				waitFor(t, "the end", func() {
					for err == nil {
						err = call(st)
					}
				})
				if took := time.Since(start); took > ack/2 {
					t.Errorf("heard after %v", took)
				}
				if !errors.Is(err, quota) && !errors.Is(err, stream.ErrClosed) {
					t.Errorf("failed with %v", err)
				}
				if _, err := readAll(st); !errors.Is(err, quota) && !(name == "closes-first" && err == io.EOF) {
					t.Errorf("Recv: %v", err)
				}
			})
		}
	}
}

// A consumer that opens a stream and first writes when the handler has returned hears it as soon.
func TestFirstWriteHearsAtOnceThatTheHandlerReturned(t *testing.T) {
	const ack = 20 * time.Second
	p := newPair(t, pairOptions{consumer: stream.ClientParams{AckTimeout: ack}})
	s := newService(t, p, stream.ServerParams{AckTimeout: ack})
	s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("row"))
		return &stream.CloseError{Code: 4321}
	})
	for _, wait := range []time.Duration{0, 150 * time.Millisecond} {
		st := open(t, p.consumer, "svc")
		if _, err := st.Recv(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(wait)
		start := time.Now()
		waitFor(t, "the end", func() {
			for {
				if _, err := st.Write([]byte("x")); err != nil {
					return
				}
				time.Sleep(time.Millisecond)
			}
		})
		if took := time.Since(start); took > ack/2 {
			t.Errorf("heard after %v", took)
		}
		if _, err := readAll(st); !errors.Is(err, &stream.CloseError{Code: 4321}) {
			t.Errorf("Recv: %v", err)
		}
	}
}

// Records go both ways, of any size, and each direction ends on its own.
func TestDirectionsEndOnTheirOwn(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	s.handle(t, "echo", func(w *stream.Writer, r *stream.Request) error {
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
	sizes := []int{0, 1, 100, 32 << 10, 256 << 10, 1 << 20}
	var wg sync.WaitGroup
	for range 8 {
		st := open(t, p.consumer, "echo")
		wg.Go(func() {
			for i := range scaled(300) {
				n := sizes[i%3]
				if i%100 == 99 {
					n = sizes[3+i/100%3]
				}
				if _, err := st.Write(testRecord(i, n)); err != nil {
					t.Errorf("Write %d: %v", i, err)
					return
				}
			}
			if err := st.CloseSend(); err != nil {
				t.Error(err)
			}
			if err := st.Sync(testContext(t)); err != nil {
				t.Errorf("Sync: %v", err)
			}
			if _, err := st.Write(nil); !errors.Is(err, stream.ErrClosed) {
				t.Errorf("Write after CloseSend: %v", err)
			}
		})
		wg.Go(func() {
			for i := 0; ; i++ {
				rec, err := st.Recv()
				if err == io.EOF && i == scaled(300) {
					return
				}
				if err != nil || !bytes.Equal(rec, testRecord(i, len(rec))) {
					t.Errorf("record %d: %d bytes, %v", i, len(rec), err)
					return
				}
			}
		})
	}
	waitFor(t, "the echoes", wg.Wait)
	eventually(t, "the server holds nothing", func() bool { s := s.Stats(); return s.Streams == 0 && s.Reserved == 0 })
}

// A consumer that writes before its producer is known, or only closes, waits for it; a handler that returns without
// reading releases a consumer that writes, with its code.
func TestWriteAndCloseSendWaitForTheProducer(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	s.handle(t, "count", func(w *stream.Writer, r *stream.Request) error {
		n := 0
		for _, err := range r.All() {
			if err != nil {
				return err
			}
			n++
		}
		_, err := fmt.Fprint(w, n)
		return err
	})
	for _, n := range []int{0, 3} {
		st := open(t, p.consumer, "count")
		for range n {
			if _, err := st.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
		}
		if err := st.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if got, err := readAll(st); err != io.EOF || len(got) != 1 || string(got[0]) != fmt.Sprint(n) {
			t.Errorf("%d records: %q, %v", n, got, err)
		}
	}
	s.handle(t, "deaf", func(*stream.Writer, *stream.Request) error { return &stream.CloseError{Code: 4242, Text: "no"} })
	st := open(t, p.consumer, "deaf")
	var err error
	waitFor(t, "Write to a handler that returned", func() {
		for err == nil {
			_, err = st.Write(make([]byte, 1000))
		}
	})
	if ce, ok := errors.AsType[*stream.CloseError](err); !ok || ce.Code != 4242 && ce.Code != stream.CloseAbnormalClosure {
		t.Errorf("Write to a handler that returned: %v", err)
	}
	if _, err := st.Recv(); !errors.Is(err, &stream.CloseError{Code: 4242}) {
		t.Errorf("Recv: %v", err)
	}
	st = open(t, p.consumer, "nobody")
	if _, err := st.Write([]byte("x")); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("Write to nobody: %v", err)
	}
	eventually(t, "the server holds nothing", func() bool { s := s.Stats(); return s.Streams == 0 && s.Reserved == 0 })
}

// A handler may close its direction first and go on reading, whether its consumer wrote before it read io.EOF, writes
// its first record afterwards, or has nothing to say.
func TestHandlerMayCloseFirstAndReadOn(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	type result struct {
		records int
		err     error
	}
	results := make(chan result, 1)
	s.handle(t, "first", func(w *stream.Writer, r *stream.Request) error {
		var res result
		defer func() { results <- res }()
		write(t, w, []byte("all there is"))
		if err := w.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		if _, err := w.Write(nil); !errors.Is(err, stream.ErrClosed) {
			t.Errorf("Write after Close: %v", err)
		}
		if string(r.Data) == "return" {
			return nil
		}
		for _, res.err = range r.All() {
			if res.err != nil {
				return nil
			}
			res.records++
		}
		return nil
	})
	send := func(n int) func(*stream.Stream) {
		return func(st *stream.Stream) {
			for i := range n {
				if _, err := st.Write(testRecord(i, 100)); err != nil {
					t.Fatalf("Write %d: %v", i, err)
				}
			}
		}
	}
	closeSend := func(st *stream.Stream) {
		if err := st.CloseSend(); err != nil {
			t.Errorf("CloseSend: %v", err)
		}
	}
	nothing := func(*stream.Stream) {}
	leave := func(st *stream.Stream) { _ = st.Close() }
	for _, c := range []struct {
		name          string
		data          string
		before, after func(*stream.Stream)
		end           func(*stream.Stream)
		want          result
	}{
		{"writes before", "", send(3), nothing, closeSend, result{records: 3}},
		{"writes before and after", "", send(3), send(1000), closeSend, result{records: 1003}},
		{"writes after", "", nothing, send(1000), closeSend, result{records: 1000}},
		{"only closes", "", nothing, nothing, closeSend, result{}},
		{"leaves without a word", "", nothing, nothing, leave, result{}},
		{"leaves within", "", send(3), nothing, leave, result{records: 3, err: &stream.CloseError{Code: stream.CloseCanceled}}},
		{"has a handler that returns", "return", nothing, nothing, nothing, result{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			st, err := p.consumer.Open(testContext(t), "first", []byte(c.data))
			if err != nil {
				t.Fatal(err)
			}
			c.before(st)
			if got, err := readAll(st); len(got) != 1 || err != io.EOF {
				t.Errorf("read %d records, %v", len(got), err)
			}
			c.after(st)
			if c.want.err != nil {
				if err := st.Sync(testContext(t)); err != nil {
					t.Errorf("Sync: %v", err)
				}
			}
			c.end(st)
			var got result
			waitFor(t, "the handler", func() { got = <-results })
			if c.want.err == nil && got.err != nil || !errors.Is(got.err, c.want.err) || got.records > c.want.records || got.err == nil && got.records != c.want.records {
				t.Errorf("the handler read %d records, %v; want %d, %v", got.records, got.err, c.want.records, c.want.err)
			}
			waitFor(t, "the stream's context to end", func() { <-st.Context().Done() })
			if _, err := st.Write([]byte("late")); err == nil {
				t.Error("Write after the end")
			}
			verifyIdle(t, p.consumer)
			eventually(t, "the server holds nothing", func() bool { s := s.Stats(); return s.Streams == 0 && s.Reserved == 0 })
		})
	}
}

// A handler that is still at work when both directions have ended normally is not stopped: its context ends when it
// returns.
func TestHandlerAtWorkAfterTheEndIsNotStopped(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{KeepAlive: 100 * time.Millisecond, ResumeTimeout: 100 * time.Millisecond})
	finished := make(chan struct{})
	result := make(chan error, 1)
	s.handle(t, "work", func(w *stream.Writer, r *stream.Request) error {
		if err := w.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		<-finished
		time.Sleep(time.Second) // long enough for the consumer to be asked, which has forgotten the stream
		result <- r.Context().Err()
		if rec, err := r.Recv(); string(rec) != "one" || err != nil {
			t.Errorf("Recv: %q, %v", rec, err)
		}
		if _, err := r.Recv(); err != io.EOF {
			t.Errorf("Recv: %v, want io.EOF", err)
		}
		result <- r.Context().Err()
		return nil
	})
	st := open(t, p.consumer, "work")
	if _, err := st.Write([]byte("one")); err != nil {
		t.Fatal(err)
	}
	if err := st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	wantEOF(t, st)
	waitFor(t, "the consumer's end", func() { <-st.Context().Done() })
	close(finished)
	for _, when := range []string{"before it read", "after it read"} {
		if err := <-result; err != nil {
			t.Errorf("the handler's context %s what came: %v", when, err)
		}
	}
	eventually(t, "the server holds nothing", func() bool { s := s.Stats(); return s.Streams == 0 && s.Reserved == 0 })
}
