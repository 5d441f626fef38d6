package stream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/natsconn/fake"
)

// The close codes of the errors that handlers return, as a table.
func TestHandlersResultsMapToCloseCodes(t *testing.T) {
	normal := &CloseError{Code: CloseNormalClosure, Text: "done"}
	for _, c := range []struct {
		err  error
		want int
		text string
	}{
		{nil, CloseNormalClosure, ""},
		{normal, CloseNormalClosure, "done"},
		{fmt.Errorf("x: %w", normal), CloseInternalServerErr, "x: nats stream: close 1000 (normal): done"},
		{errors.Join(normal), CloseInternalServerErr, normal.Error()},
		{(*CloseError)(nil), CloseInternalServerErr, (*CloseError)(nil).Error()},
		{&CloseError{4000, "a"}, 4000, "a"},
		{fmt.Errorf("x: %w", &CloseError{4000, "a"}), 4000, "a"},
		{contextError(func() context.Context {
			ctx, cancel := context.WithCancelCause(context.Background())
			cancel(&CloseError{4008, "late"})
			return ctx
		}()), 4008, "late"},
		{&CloseError{999, "a"}, CloseInternalServerErr, "nats stream: close 999: a"},
		{ErrClosed, CloseInternalServerErr, ErrClosed.Error()},
		{fmt.Errorf("%w: 5 bytes", ErrRecordTooLarge), CloseMessageTooBig, ErrRecordTooLarge.Error() + ": 5 bytes"},
		{errors.Join(errors.New("x"), ErrRecordTooLarge), CloseMessageTooBig, "x\n" + ErrRecordTooLarge.Error()},
		{errors.Join(&CloseError{4000, "a"}, ErrRecordTooLarge), 4000, "a"},
	} {
		if got := handlerEnd(c.err); got != (CloseError{c.want, c.text}) {
			t.Errorf("%v: %+v, want %d %q", c.err, got, c.want, c.text)
		}
	}
	if errors.Is((*CloseError)(nil), normal) {
		t.Error("a nil *CloseError is a normal end")
	}
}

// A consumer that breaks a rule which the mux checks ends the context of its handler.
func TestViolationEndsTheHandlersContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		cause := make(chan error, 1)
		m.handle(t, "svc", func(w *Writer, r *Request) error {
			if _, err := w.Write([]byte("x")); err != nil {
				return err
			}
			<-r.Context().Done()
			cause <- context.Cause(r.Context())
			return nil
		})
		s := m.open(t, "svc")
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := m.conn.Publish(s.session.out.peer, "", nil); err != nil { // an empty message
			t.Fatal(err)
		}
		select {
		case err := <-cause:
			if !errors.Is(err, &CloseError{Code: CloseUnsupportedData}) {
				t.Errorf("the handler's context ended with %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Error("the handler's context goes on")
		}
		_ = s.Close()
		time.Sleep(time.Minute)
		m.nothingLeft(t)
	})
}

// A call that returns the end of the stream returns after the contexts have ended, also if the goroutine that ends the
// stream has only just begun to.
func TestContextsHaveEndedIfCallsFail(t *testing.T) {
	for name, call := range map[string]func(w *Writer) error{
		"Write": func(w *Writer) error { _, err := w.Write([]byte("x")); return err },
		"Flush": (*Writer).Flush,
		"Recv":  func(w *Writer) error { _, err := w.session.recvRecord(forever); return err },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ep := fakeClient(t, newRecorder(nil), ClientParams{}).ep
				defer ep.close(testClosed)
				offer, _ := ParseToken(lastToken(consumerSubject(8)))
				w := ep.newProducer(lifecycle.Handler, ep.ctx, consumerSubject(8), offer, false, minWindow)
				s := w.session
				ctx := s.ctx.get(ep.ctx)
				s.end.Store(&ending{kind: endReset, err: &CloseError{Code: CloseCanceled}})
				if err := call(w); !errors.Is(err, &CloseError{Code: CloseCanceled}) {
					t.Errorf("the call returned %v", err)
				}
				if w.Context().Err() == nil || ctx.Err() == nil {
					t.Errorf("the call returned before its context ended: %v, %v", w.Context().Err(), ctx.Err())
				}
				s.mark(workEnd)
			})
		})
	}
}

// Once Close has returned, the writer's context is over.
func TestCloseEndsTheWritersContext(t *testing.T) {
	_, c, _ := newFaulty(t)
	for i := range 2000 {
		for _, token := range []string{string(AppendToken(nil, Token{Codec: MsgPack, LogPackets: 5, LogBytes: 16, ID: uint64(i)})), "old"} {
			w := c.NewWriter(fmt.Sprintf("x%d.%s", i, token)) // peers of their own: none of them acknowledges anything
			if _, err := w.Write([]byte("a")); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			if cause := context.Cause(w.Context()); cause != ErrClosed {
				t.Fatalf("close %d: the cause is %v", i, cause)
			}
		}
	}
}

// CLOSE is held back for a handler's result, and not longer than three ticks.
func TestCloseWaitsForTheHandlersResult(t *testing.T) {
	for _, c := range []struct {
		name  string
		works time.Duration // between Close and the error
		lost  bool          // the error comes too late for the consumer
	}{
		{"returns at once", 0, false},
		{"returns before closeDelay", closeDelay - time.Millisecond, false},
		{"works on", closeDelay + 2*maxTick + time.Millisecond, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.handle(t, "svc", func(w *Writer, _ *Request) error {
					if _, err := w.Write([]byte("x")); err != nil {
						return err
					}
					if err := w.Close(); err != nil {
						return err
					}
					time.Sleep(c.works)
					return errors.New("failed")
				})
				start := time.Now()
				s := m.open(t, "svc")
				if _, err := s.Recv(); err != nil {
					t.Fatal(err)
				}
				_, err := s.Recv()
				if (err == io.EOF) != c.lost {
					t.Errorf("the stream ended with %v", err)
				}
				if took := time.Since(start); took > closeDelay+2*maxTick {
					t.Errorf("it ended after %v", took)
				}
				_ = s.Close()
				time.Sleep(time.Minute)
				if n := m.server.Stats().UnreportedErrors; n != 0 != c.lost {
					t.Errorf("%d errors count as unreported", n)
				}
				m.nothingLeft(t)
			})
		})
	}
}

// A look at a CLOSE that is held back which comes late says that the process stood still: the handler gets its time
// again.
func TestCloseWaitsAgainAfterAStandstill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ep := fakeClient(t, newRecorder(nil), ClientParams{}).ep
		defer ep.close(testClosed)
		offer, _ := ParseToken(lastToken(consumerSubject(8)))
		w := ep.newProducer(lifecycle.Handler, ep.ctx, consumerSubject(8), offer, false, minWindow)
		s, o := w.session, &ep.outbox
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		o.park.Wake()   // the outbox notes that CLOSE is held back
		synctest.Wait() // the outbox sleeps: what it owns is the test's
		w.sender.unacked.closeAt = ep.now()
		late := w.sender.unacked.closeAt + int64(2*maxTick) + 1
		o.checkHeldClose(s, late)
		if w.closed.Load() || w.sender.unacked.closeAt != late+int64(closeDelay) {
			t.Errorf("after a late look CLOSE is written: %v, and the next look is at %d", w.closed.Load(), w.sender.unacked.closeAt)
		}
		o.checkHeldClose(s, w.sender.unacked.closeAt)
		if !w.closed.Load() || w.sender.unacked.closeAt != 0 {
			t.Error("CLOSE is still held back")
		}
	})
}

// A handler that closes and returns nil at once sends its records and CLOSE in one packet, and does not say that it
// reads on.
func TestCloseOfAHandlerThatReturnsCostsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		var frames []Frame
		packets := 0
		m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
			if from == m.back && isSequenced(msg.Data) {
				packets++
				_, b, _ := ParsePacketHeader(msg.Data)
				for len(b) > 0 {
					var f Frame
					f, b, _ = ParseFrame(b)
					frames = append(frames, f)
				}
			}
			return true
		})
		m.handle(t, "svc", func(w *Writer, _ *Request) error {
			defer w.Close()
			_, err := w.Write([]byte("x"))
			return err
		})
		s := m.open(t, "svc")
		for range 2 {
			_, _ = s.Recv()
		}
		last := frames[len(frames)-1]
		if packets > 2 || last.Type != FrameClose || last.Code != CloseNormalClosure || last.Flags != 0 {
			t.Errorf("%d packets, the last frame is %+v", packets, last)
		}
		time.Sleep(time.Minute)
		m.nothingLeft(t)
	})
}

// Records that the end of a stream threw away were not received: Sync says so.
func TestSyncFailsIfRecordsWereThrownAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "svc", func(w *Writer, r *Request) error {
			if _, err := w.Write([]byte("x")); err != nil {
				return err
			}
			<-r.Context().Done()
			return nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		s, err := m.client.Open(ctx, "svc", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Write([]byte("received")); err != nil {
			t.Fatal(err)
		}
		if err := s.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
		m.conn.Set(nats.RECONNECTING)
		synctest.Wait()
		if _, err := s.Write([]byte("thrown away")); err != nil {
			t.Fatal(err)
		}
		cancel()
		synctest.Wait()
		m.conn.Set(nats.CONNECTED)
		if err := s.Sync(t.Context()); !errors.Is(err, context.Canceled) {
			t.Errorf("Sync: %v", err)
		}
		time.Sleep(time.Minute)
		m.nothingLeft(t)
	})
}

// Sync succeeds whether the consumer acknowledges the end or leaves after it.
func TestSyncSucceedsIfTheConsumerLeavesAfterTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		synced := make(chan error, 1)
		m.handle(t, "x", func(w *Writer, _ *Request) error {
			if _, err := w.Write([]byte("a")); err != nil {
				return err
			}
			if err := w.Close(); err != nil {
				return err
			}
			synced <- w.Sync(context.Background())
			return nil
		})
		for range 1000 {
			s := m.open(t, "x")
			for {
				if _, err := s.Recv(); err == io.EOF {
					break
				} else if err != nil {
					t.Fatal(err)
				}
			}
			_ = s.Close()
			if err := <-synced; err != nil {
				t.Fatal(err)
			}
		}
	})
}

// CloseSend may have come before it was known that the producer takes no records.
func TestSyncReturnsIfTheProducerTakesNoRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		reply := make(chan string, 1)
		stop, err := m.back.Subscribe("old", "", func(m *nats.Msg) { reply <- m.Reply })
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		s := m.open(t, "old")
		subject := <-reply
		closed := make(chan error, 1)
		go func() { closed <- s.CloseSend() }()
		synctest.Wait()
		if err := m.back.Publish(subject, "", jsonwire.AppendData(nil, []byte("a"))); err != nil {
			t.Fatal(err)
		}
		if err := <-closed; !errors.Is(err, ErrOneWay) {
			t.Errorf("CloseSend: %v", err)
		}
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := s.Sync(ctx); !errors.Is(err, ErrOneWay) {
			t.Errorf("Sync: %v", err)
		}
		took(t, "Sync", start, 0, time.Second)
		_ = s.Close()
	})
}

// Flush does not say that a record was handed to NATS which the end of the stream threw away.
func TestFlushFailsAfterTheEnd(t *testing.T) {
	busy, idle := make(chan struct{}), make(chan struct{})
	conn := newRecorder(func(n int, _ []byte) error {
		if n == 0 {
			close(busy)
			<-idle
		}
		return nil
	})
	c := fakeClient(t, conn.Conn, ClientParams{})
	w := c.NewWriter(consumerSubject(5))
	if _, err := w.Write([]byte("a")); err != nil {
		t.Fatal(err)
	}
	<-busy
	if _, err := w.Write([]byte("lost")); err != nil {
		t.Fatal(err)
	}
	end := &CloseError{Code: CloseCanceled, Text: "enough"}
	reset := Frame{Type: FrameReset, Code: CloseCanceled, Payload: []byte("enough")}
	conn.Deliver(&nats.Msg{Subject: w.session.reply(), Data: testPacketFlags(0, 9, 0, reset)})
	close(idle)
	until(t, "the writer has ended", func() bool { return w.Context().Err() != nil })
	until(t, "the outbox has let go of the record", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.open == nil
	})
	for range 2 {
		if err := w.Flush(); !errors.Is(err, end) {
			t.Errorf("Flush: %v, want %v", err, end)
		}
		if err := w.Close(); !errors.Is(err, end) {
			t.Errorf("Close: %v, want %v", err, end)
		}
	}
	if n := len(conn.sent()); n != 1 {
		t.Errorf("%d packets were published: %v", n, conn.sent())
	}
}

// After Close, and after its context ended, a stream delivers nothing: also not the rest of a record that Read began.
func TestNothingIsDeliveredAfterTheEnd(t *testing.T) {
	reads := map[string]func(*Stream) (int, error){
		"Read": func(s *Stream) (int, error) { return s.Read(make([]byte, 10)) },
		"Recv": func(s *Stream) (int, error) { rec, err := s.Recv(); return len(rec), err },
		"RecvObject": func(s *Stream) (int, error) {
			var v any
			return 0, s.RecvObject(&v)
		},
		"WriteTo": func(s *Stream) (int, error) { n, err := s.WriteTo(io.Discard); return int(n), err },
	}
	for name, read := range reads {
		for _, payload := range [][]byte{testPacket(7, 0, testData("12")), jsonwire.AppendData(nil, []byte("12"))} {
			for _, how := range []string{"Close", "cancel"} {
				conn := fake.New()
				c := fakeClient(t, conn, ClientParams{})
				ctx, cancel := context.WithCancel(t.Context())
				s, err := c.Open(ctx, "x", nil)
				if err != nil {
					t.Fatal(err)
				}
				conn.Deliver(&nats.Msg{Subject: s.session.reply(), Data: bytes.Clone(payload)})
				if n, err := s.Read(make([]byte, 1)); n != 1 || err != nil {
					t.Fatalf("Read: %d, %v", n, err)
				}
				want := ErrClosed
				if how == "Close" {
					_ = s.Close()
				} else {
					cancel()
					want = context.Canceled
				}
				for range 2 {
					if n, err := read(s); n != 0 || !errors.Is(err, want) {
						t.Errorf("%s after %s: %d bytes, %v; want %v", name, how, n, err, want)
					}
				}
				cancel()
				_ = s.Close()
			}
		}
	}
}

// No write succeeds after Close, not even into a packet that is open.
func TestStreamWriteAfterCloseFails(t *testing.T) {
	conn := newRecorder(nil)
	c := fakeClient(t, conn.Conn, ClientParams{})
	for range 1000 {
		s, err := c.Open(t.Context(), "x", nil)
		if err != nil {
			t.Fatal(err)
		}
		conn.Deliver(&nats.Msg{Subject: s.session.reply(), Reply: consumerSubject(5), Data: testPacketFlags(0, 8, 0, Frame{Type: FramePing})})
		for range 2 {
			if _, err := s.Write([]byte("a")); err != nil {
				t.Fatal(err)
			}
		}
		_ = s.Close()
		if _, err := s.Write([]byte("b")); !errors.Is(err, ErrClosed) {
			t.Fatalf("Write after Close: %v", err)
		}
	}
}

// A writer that can never write holds nothing, and its context has ended.
func TestWriterThatCannotWriteHoldsNothing(t *testing.T) {
	c := fakeClient(t, fake.New(), ClientParams{})
	for _, subject := range []string{"", "x.~2"} {
		w := c.NewWriter(subject)
		if w.Context().Err() == nil || !errors.Is(context.Cause(w.Context()), w.unusable) {
			t.Errorf("%q: the context's cause is %v, want %v", subject, context.Cause(w.Context()), w.unusable)
		}
	}
}

// An object that fails to encode leaves no trace, so headers can still be set.
func TestSetHeaderWorksAfterAFailedObject(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "x", func(w *Writer, _ *Request) error {
			if _, err := w.WriteObject(make(chan int)); err == nil {
				t.Error("a channel was encoded")
			}
			return w.SetHeader(nats.Header{"A": {"b"}})
		})
		s := m.open(t, "x")
		if h, err := s.Header(); err != nil || h.Get("A") != "b" {
			t.Errorf("Header: %v, %v", h, err)
		}
		_ = s.Close()
	})
}

// A consumer may say to any producer that it sends no records.
func TestCloseSendToAWriterWorks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		producer, err := newEndpoint(m.bus.Connect("producer"), "", m.times)
		if err != nil {
			t.Fatal(err)
		}
		pc := &Client{ep: producer, codec: MsgPack}
		defer pc.Close()
		reply := make(chan string, 1)
		stop, err := m.back.Subscribe("w", "", func(m *nats.Msg) { reply <- m.Reply })
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		s := m.open(t, "w")
		w := pc.NewWriter(<-reply)
		for _, rec := range []string{"a", "b"} {
			if _, err := w.Write([]byte(rec)); err != nil {
				t.Fatal(err)
			}
			if got, err := s.Recv(); err != nil || string(got) != rec {
				t.Fatalf("Recv: %q, %v", got, err)
			}
			if err := s.CloseSend(); err != nil {
				t.Fatal(err)
			}
			if err := s.Sync(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != io.EOF {
			t.Errorf("Recv: %v", err)
		}
		time.Sleep(time.Second)
		if n := producer.sessions.Size() + m.client.ep.sessions.Size(); n != 0 {
			t.Errorf("%d sessions are left", n)
		}
	})
}

// A handler that closes with an error and goes on reading hears soon that its consumer has left, also if the consumer's
// words after the CLOSE are lost.
func TestHandlerHearsAfterItsErrorThatItsConsumerLeft(t *testing.T) {
	for lost := range 4 {
		for _, first := range []string{"", "a record"} {
			t.Run(fmt.Sprintf("lost=%d/first=%s", lost, first), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := memoryTest(t, ClientParams{})
					n, closed := lost, false
					m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
						closed = closed || from == m.back && hasClose(msg.Data)
						if closed && from == m.conn && n > 0 {
							n--
							return false
						}
						return true
					})
					read := make(chan error, 1)
					m.handle(t, "fails", func(w *Writer, r *Request) error {
						if first != "" {
							if _, err := w.Write([]byte(first)); err != nil {
								return err
							}
						}
						if err := w.CloseWithCode(4321); err != nil {
							return err
						}
						_, err := r.Recv()
						read <- err
						return nil
					})
					s := openForAnHour(t, m, "fails")
					if err := drain(s.Recv); !errors.Is(err, &CloseError{Code: 4321}) {
						t.Errorf("the consumer: %v", err)
					}
					time.Sleep(time.Duration(lost+1) * m.times.AckTimeout)
					synctest.Wait()
					if len(read) == 0 {
						t.Error("the handler still reads")
					} else if err := <-read; !errors.Is(err, &CloseError{Code: CloseCanceled}) {
						t.Errorf("the handler read %v", err)
					}
					m.nothingLeft(t)
				})
			})
		}
	}
}

// endsSoon is a context that has ended from the second look on, after it was armed.
type endsSoon struct {
	context.Context
	armed bool
	looks int
}

func (c *endsSoon) Err() error {
	if c.armed {
		if c.looks++; c.looks > 1 {
			return context.Canceled
		}
	}
	return nil
}

// recvSlowly is Recv without the fast path, which looks itself.
func recvSlowly(s *Stream) ([]byte, error) {
	rec, _, err := s.session.nextRecord(forever)
	return rec, err
}

// A read that goes on after a frame without a record, an empty record or a piece looks first whether the stream has ended.
func TestReadsStopBetweenFrames(t *testing.T) {
	for name, c := range map[string]struct {
		frames []Frame
		read   func(*Stream) ([]byte, error)
	}{
		"after an empty record": {[]Frame{testData(""), testData("x")}, func(s *Stream) ([]byte, error) {
			b := make([]byte, 9)
			n, err := s.Read(b)
			return b[:n], err
		}},
		"after a piece":           {[]Frame{{Type: FrameData, Flags: FlagMore, Payload: []byte("a")}, testData("b")}, recvSlowly},
		"after a skippable frame": {[]Frame{{Type: 0x80, Payload: []byte("?")}, testData("x")}, recvSlowly},
	} {
		t.Run(name, func(t *testing.T) {
			conn := benchConn(false)
			parent, cancel := context.WithCancel(t.Context())
			defer cancel()
			ctx := &endsSoon{Context: parent}
			s, err := fakeClient(t, conn, ClientParams{}).Open(ctx, "subject", nil)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			conn.Deliver(&nats.Msg{Subject: s.session.reply(), Data: testPacket(7, 0, c.frames...)})
			ctx.armed = true
			if rec, err := c.read(s); !errors.Is(err, context.Canceled) {
				t.Errorf("%q, %v", rec, err)
			}
		})
	}
}
