package stream_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// These tests are about the promise that a stream that failed never looks like one that is complete.

type nilError struct{ text string }

func (e *nilError) Error() string { return e.text } // panics for a nil pointer

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

// A relay that returns the error of the stream it reads from, or writes to, does not end its own stream normally, whatever
// the handler of the other stream did.
func TestRelayOfAStreamThatEnded(t *testing.T) {
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

// A consumer that leaves with code 1000 has its records delivered first, however soon it leaves.
func TestLeavingNormallyDeliversWhatWasWritten(t *testing.T) {
	type result struct {
		records int
		err     error
		cause   error
	}
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	results := make(chan result, 1)
	read := func(r *stream.Request) (res result) {
		for _, err := range r.All() {
			if err != nil {
				res.err = err
				break
			}
			res.records++
		}
		return res
	}
	s.handle(t, "closed-first", func(w *stream.Writer, r *stream.Request) error {
		closeWriter(t, w)
		results <- read(r)
		return nil
	})
	s.handle(t, "reads", func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("hello"))
		results <- read(r)
		return nil
	})
	s.handle(t, "writes-for-ever", func(w *stream.Writer, r *stream.Request) error {
		var res result
		var group sync.WaitGroup
		group.Go(func() { res = read(r) })
		for {
			if _, err := w.Write(make([]byte, 1000)); err != nil {
				break
			}
		}
		group.Wait()
		<-r.Context().Done()
		res.cause = context.Cause(r.Context())
		results <- res
		return nil
	})
	for _, subject := range []string{"closed-first", "reads", "writes-for-ever"} {
		for _, c := range []struct {
			records, size int
			closeSend     bool
		}{{3, 1, false}, {0, 0, true}, {3, 1, true}, {1000, 100, false}, {1, 1 << 20, false}, {40, 20_000, false}} {
			t.Run(fmt.Sprintf("%s/%d records of %d, CloseSend %v", subject, c.records, c.size, c.closeSend), func(t *testing.T) {
				for range scaled(20) {
					st := open(t, p.consumer, subject)
					if subject == "closed-first" {
						wantEOF(t, st)
					} else if _, err := st.Recv(); err != nil {
						t.Fatal(err)
					}
					for i := range c.records {
						if _, err := st.Write(testRecord(i, c.size)); err != nil {
							t.Fatal(err)
						}
					}
					if c.closeSend {
						if err := st.CloseSend(); err != nil {
							t.Fatal(err)
						}
					}
					if err := st.CloseWithCode(stream.CloseNormalClosure, "done"); err != nil {
						t.Fatal(err)
					}
					if err := st.Close(); err != nil { // takes nothing back
						t.Fatal(err)
					}
					if _, err := st.Write(nil); err == nil {
						t.Error("Write after leaving succeeded")
					}
					if _, err := st.Recv(); err == nil || subject != "closed-first" && !errors.Is(err, stream.ErrClosed) {
						t.Errorf("Recv after leaving: %v", err)
					}
					if st.Context().Err() == nil {
						t.Error("the context of the stream goes on")
					}
					var got result
					waitFor(t, "the handler", func() { got = <-results })
					if got.err != nil || got.records != c.records {
						t.Fatalf("the handler read %d records, %v; %d were written", got.records, got.err, c.records)
					}
					if subject == "writes-for-ever" && !errors.Is(got.cause, &stream.CloseError{Code: stream.CloseNormalClosure, Text: "done"}) {
						t.Errorf("the handler's context ended with %v", got.cause)
					}
				}
			})
		}
	}
	verifyIdle(t, p.consumer)
}

// A consumer that leaves with code 1000 wakes its own reader, and a writer that waits for credit.
func TestLeavingNormallyEndsCallsThatWait(t *testing.T) {
	release := make(chan struct{})
	p, _ := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("hello"))
		<-release
		n := 0
		for _, err := range r.All() {
			if err != nil && !errors.Is(err, &stream.CloseError{Code: stream.CloseCanceled}) {
				t.Errorf("after %d records: %v", n, err)
			}
			n++
		}
		return nil
	})
	for _, size := range []int{1000, 1 << 20} { // of the latter a part is sent when the credit is used up
		st := open(t, p.consumer, "svc")
		if _, err := st.Recv(); err != nil {
			t.Fatal(err)
		}
		var wrote atomic.Int64
		var group sync.WaitGroup
		group.Go(func() {
			for {
				if _, err := st.Write(make([]byte, size)); err != nil {
					if !errors.Is(err, stream.ErrClosed) {
						t.Errorf("Write: %v", err)
					}
					return
				}
				wrote.Add(1)
			}
		})
		group.Go(func() {
			if _, err := st.Recv(); !errors.Is(err, stream.ErrClosed) {
				t.Errorf("Recv: %v", err)
			}
		})
		for before := int64(-1); before != wrote.Load(); { // until it waits
			before = wrote.Load()
			time.Sleep(20 * time.Millisecond)
		}
		if err := st.CloseWithCode(stream.CloseNormalClosure); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "calls to return", group.Wait)
		release <- struct{}{}
	}
}

// What is lost on the way of a consumer that left with code 1000 is sent again, and its handler never reads a normal end
// without it.
func TestLeavingNormallyOverALossyConnection(t *testing.T) {
	checkLeaks(t)
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	type result struct {
		records int
		err     error
	}
	results := make(chan result, 1)
	s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
		closeWriter(t, w)
		var res result
		for _, err := range r.All() {
			if res.err = err; err != nil {
				break
			}
			res.records++
		}
		results <- res
		return nil
	})
	for lost := range 4 { // the packet that is lost, counted from the first
		n := 0
		proxy := streamtest.RunInterceptor(t, p.server.URL())
		nc, err := nats.Connect(proxy.URL(), nats.IgnoreDiscoveredServers())
		if err != nil {
			t.Fatal(err)
		}
		client := p.newClient(t, stream.ClientParams{Conn: nc})
		st := open(t, client, "svc")
		wantEOF(t, st)
		proxy.SetRules(streamtest.Only(streamtest.To(streamtest.ToServer), func(m *streamtest.Message) (v streamtest.Verdict) {
			if len(m.Data) > 1 && m.Data[0] == stream.PacketMagic && m.Data[1]&byte(stream.PacketSeq) != 0 {
				v.Drop = n == lost
				n++
			}
			return v
		}))
		for i := range 3 {
			if _, err := st.Write(testRecord(i, 30_000)); err != nil {
				t.Fatal(err)
			}
		}
		st.CloseWithCode(stream.CloseNormalClosure, "done")
		var got result
		waitFor(t, "the handler", func() { got = <-results })
		if got.err != nil || got.records != 3 {
			t.Errorf("packet %d was lost: the handler read %d records, %v", lost, got.records, got.err)
		}
		verifyIdle(t, client)
		client.Close() // while its way to the server is there
	}
}

// A handler that closes its Writer and then fails has its failure reported, by whatever way it fails.
func TestHandlerThatClosesAndFails(t *testing.T) {
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

// An honest Close of a handler reaches the consumer while the handler goes on, in any way it does so. The handler's error
// after that is logged and counted.
func TestCloseOfAHandlerThatGoesOn(t *testing.T) {
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
func TestCloseOfAHandlerThatSucceeds(t *testing.T) {
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

// Header of a stream that was refused returns the error that Recv returns.
func TestHeaderOfARefusedStream(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	no := &stream.CloseError{Code: 4321, Text: "no"}
	s.handle(t, "refuses", func(*stream.Writer, *stream.Request) error { return no })
	s.handle(t, "refuses-with-trailers", func(w *stream.Writer, _ *stream.Request) error {
		if err := w.SetTrailer(nats.Header{"T": {"x"}}); err != nil {
			t.Error(err)
		}
		return no
	})
	s.handle(t, "refuses-with-headers", func(w *stream.Writer, _ *stream.Request) error {
		if err := w.SetHeader(nats.Header{"H": {"x"}}); err != nil {
			t.Error(err)
		}
		return no
	})
	s.handle(t, "sends-then-refuses", func(w *stream.Writer, _ *stream.Request) error {
		write(t, w, []byte("row"))
		return no
	})
	s.handle(t, "is-empty", func(*stream.Writer, *stream.Request) error { return nil })
	serve(t, p, "JSON-refuses", func(w *stream.Writer, req *nats.Msg) { _ = w.CloseWithCode(4321, "no") })
	full := newService(t, p, stream.ServerParams{MaxStreams: 1})
	block := make(chan struct{})
	full.handle(t, "is-full", func(w *stream.Writer, _ *stream.Request) error {
		write(t, w, []byte("in"))
		<-block
		return nil
	})
	first := open(t, p.consumer, "is-full")
	if _, err := first.Recv(); err != nil {
		t.Fatal(err)
	}
	defer func() { close(block); wantEOF(t, first) }()
	for _, c := range []struct {
		subject string
		header  bool
		err     error
		end     error
	}{
		{"refuses", false, no, no},
		{"refuses-with-trailers", false, no, no},
		{"refuses-with-headers", true, nil, no},
		{"sends-then-refuses", false, nil, no},
		{"is-empty", false, nil, io.EOF},
		{"JSON-refuses", false, no, no},
		{"is-full", false, &stream.CloseError{Code: stream.CloseTryAgainLater}, &stream.CloseError{Code: stream.CloseTryAgainLater}},
		{"nobody", false, nats.ErrNoResponders, nats.ErrNoResponders},
	} {
		t.Run(c.subject, func(t *testing.T) {
			st := open(t, p.consumer, c.subject)
			for range 2 {
				if h, err := st.Header(); !errors.Is(err, c.err) || (h != nil) != c.header {
					t.Errorf("Header: %v, %v; want %v", h, err, c.err)
				}
			}
			if _, err := readAll(st); !errors.Is(err, c.end) {
				t.Errorf("Recv: %v, want %v", err, c.end)
			}
			if h := st.Trailer(); strings.Contains(c.subject, "trailers") && h.Get("T") != "x" {
				t.Errorf("Trailer: %v", h)
			}
		})
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// ReadFrom ends with an error for a Reader that counts wrongly or makes no progress, and sends nothing that it did not read.
func TestReadFromOfAFaultyReader(t *testing.T) {
	p := newPair(t)
	for _, c := range []struct {
		name string
		read func(call int, p []byte) (int, error)
		want string
		sent int64
	}{
		{"more than there is room for", func(_ int, p []byte) (int, error) { return len(p) + 20, nil }, "invalid read result", 0},
		{"more, and io.EOF", func(_ int, p []byte) (int, error) { return len(p) + 1, io.EOF }, "invalid read result", 0},
		{"negative", func(_ int, p []byte) (int, error) { return -1, nil }, "invalid read result", 0},
		{"negative, and io.EOF", func(_ int, p []byte) (int, error) { return -1, io.EOF }, "invalid read result", 0},
		{"nothing for ever", func(int, []byte) (int, error) { return 0, nil }, io.ErrNoProgress.Error(), 0},
		{"nothing after a record", func(call int, p []byte) (int, error) { return min(1, max(0, 1-call)), nil }, io.ErrNoProgress.Error(), 1},
		{"fails with a record", func(_ int, p []byte) (int, error) { return 2, errors.New("boom") }, "boom", 2},
		{"pauses", func(call int, p []byte) (int, error) {
			switch {
			case call == 500:
				return 0, io.EOF
			case call%50 == 49:
				return 1, nil
			}
			return 0, nil
		}, "", 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, s := newWriterStream(t, p)
			call := -1
			n, err := w.ReadFrom(readerFunc(func(p []byte) (int, error) { call++; return c.read(call, p) }))
			if n != c.sent || c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("ReadFrom: %d, %v; want %d, %q", n, err, c.sent, c.want)
			}
			closeWriter(t, w)
			var got int64
			records, end := readAll(s)
			for _, rec := range records {
				got += int64(len(rec))
			}
			if got != c.sent || end != io.EOF {
				t.Errorf("%d bytes arrived, %v", got, end)
			}
		})
	}
}

// The buffers of ReadFrom come from a pool. A Reader that counts bytes that it did not write sends none of other streams.
func TestReadFromSendsNoBytesOfOtherStreams(t *testing.T) {
	p := newPair(t)
	secret := bytes.Repeat([]byte("secret"), 5000)
	for range 20 {
		other, s := newWriterStream(t, p)
		write(t, other, secret)
		closeWriter(t, other)
		if _, err := readAll(s); err != io.EOF {
			t.Fatal(err)
		}
		if err := other.Sync(testContext(t)); err != nil {
			t.Fatal(err)
		}
		w, s := newWriterStream(t, p)
		lied := false
		if _, err := w.ReadFrom(readerFunc(func(p []byte) (int, error) {
			if lied {
				return 0, io.EOF
			}
			lied = true
			return len(p), nil
		})); err != nil {
			t.Fatal(err)
		}
		closeWriter(t, w)
		records, err := readAll(s)
		if err != io.EOF || bytes.Contains(slices.Concat(records...), []byte("secret")) {
			t.Fatalf("%v: a Reader that wrote nothing sent bytes of another stream", err)
		}
	}
}

// ReadFrom of a Reader without progress ends with the stream.
func TestReadFromEndsWithTheStream(t *testing.T) {
	p := newPair(t)
	ctx, cancel := context.WithCancel(testContext(t))
	w, s := newWriterStreamContext(t, p, ctx)
	write(t, w, []byte("x"))
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	cancel()
	waitFor(t, "the writer's end", func() { <-w.Context().Done() })
	if _, err := w.ReadFrom(readerFunc(func([]byte) (int, error) { return 0, nil })); !errors.Is(err, &stream.CloseError{Code: stream.CloseCanceled}) {
		t.Errorf("ReadFrom: %v", err)
	}
}

// WriteTo ends with an error for a Writer that counts wrongly.
func TestWriteToOfAFaultyWriter(t *testing.T) {
	boom := errors.New("boom")
	p := newPair(t)
	for _, c := range []struct {
		name string
		n    func(p []byte) int
		err  error
		want string
		sent int64
	}{
		{"more", func(p []byte) int { return len(p) + 1 }, nil, "invalid write result", 0},
		{"negative", func([]byte) int { return -1 }, nil, "invalid write result", 0},
		{"more, and an error", func(p []byte) int { return len(p) + 1 }, boom, "boom", 0},
		{"less", func(p []byte) int { return len(p) - 1 }, nil, io.ErrShortWrite.Error(), 2},
		{"nothing", func([]byte) int { return 0 }, nil, io.ErrShortWrite.Error(), 0},
		{"an error", func([]byte) int { return 1 }, boom, "boom", 1},
		{"all", func(p []byte) int { return len(p) }, nil, "", 6},
	} {
		w, s := newWriterStream(t, p)
		write(t, w, []byte("abc"), []byte("def"))
		closeWriter(t, w)
		n, err := s.WriteTo(writerFunc(func(p []byte) (int, error) { return c.n(p), c.err }))
		if n != c.sent || c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: WriteTo: %d, %v; want %d, %q", c.name, n, err, c.sent, c.want)
		}
		s.Close()
	}
}

// After a read returned the end of the context, no write succeeds, and its error is that of the read.
func TestWritesAfterTheEndOfTheContext(t *testing.T) {
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
func TestHandlerWritesAfterItsDeadline(t *testing.T) {
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

// A consumer that only writes hears soon that its handler has returned, long before AckTimeout, whether the handler read some
// records, none, or sent some.
func TestRefusedUploadIsHeardAtOnce(t *testing.T) {
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
func TestFirstWriteAfterTheHandlerReturned(t *testing.T) {
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

// The last result of OpenStream has the error of any end but the normal one. The results before it are the first records.
func TestOpenStreamTellsOfEveryEnd(t *testing.T) {
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
	for _, read := range []int{0, 1, stream.RequestChanLen, 100} {
		for name, start := range map[string]func() (context.Context, func()){
			"cancel": func() (context.Context, func()) { return context.WithCancel(context.Background()) },
			"cause": func() (context.Context, func()) {
				ctx, cancel := context.WithCancelCause(context.Background())
				return ctx, func() { cancel(cause) }
			},
		} {
			for _, waits := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%d read, waits %v", name, read, waits), func(t *testing.T) {
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
					if waits { // long enough to be taken for a caller that is gone
						time.Sleep(200 * time.Millisecond)
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

// A write costs no allocation. Race builds allocate on their own account.
func TestWriteAllocatesNothing(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	var group sync.WaitGroup
	group.Go(func() { _, _ = readAll(s) })
	rec := make([]byte, 64)
	for range 10_000 {
		write(t, w, rec)
	}
	if n := testing.AllocsPerRun(20_000, func() { _, _ = w.Write(rec) }); n != 0 && !stream.RaceEnabled {
		t.Errorf("%v allocations for each Write", n)
	}
	closeWriter(t, w)
	group.Wait()
}
