package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/natsconn/fake"
)

// Records that the end of a stream threw away were not received: Sync says so.
func TestSyncAfterRecordsWereThrownAway(t *testing.T) {
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

// CLOSE is held back for a handler's result, and not longer than three ticks.
func TestCloseIsHeldBackForTheHandler(t *testing.T) {
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

// A handler that closes and returns nil at once sends its records and CLOSE in one packet, and does not say that it reads on.
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

// A consumer that left with code 1000 before its peer is gone does not wait for ever.
func TestLeavingNormallyWithoutPeer(t *testing.T) {
	for _, c := range []struct {
		name string
		gone func(m *memoryPair)
	}{
		{"packets vanish", func(m *memoryPair) { m.bus.SetFilter(fake.BlackHole(nil, nil)) }},
		{"connection down", func(m *memoryPair) { m.conn.Set(nats.RECONNECTING) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.handle(t, "svc", func(w *Writer, r *Request) error {
					if _, err := w.Write([]byte("x")); err != nil {
						return err
					}
					for _, err := range r.All() {
						if err != nil {
							return err
						}
					}
					return errors.New("a normal end, and records were lost")
				})
				s := m.open(t, "svc")
				if _, err := s.Recv(); err != nil {
					t.Fatal(err)
				}
				if _, err := s.Write([]byte("arrives")); err != nil {
					t.Fatal(err)
				}
				if err := s.Sync(t.Context()); err != nil {
					t.Fatal(err)
				}
				c.gone(m)
				synctest.Wait()
				if _, err := s.Write([]byte("lost")); err != nil {
					t.Fatal(err)
				}
				if err := s.CloseWithCode(CloseNormalClosure); err != nil {
					t.Fatal(err)
				}
				if _, err := s.Recv(); !errors.Is(err, ErrClosed) {
					t.Errorf("Recv: %v", err)
				}
				time.Sleep(2 * time.Minute)
				m.conn.Set(nats.CONNECTED)
				time.Sleep(2 * time.Minute)
				m.nothingLeft(t)
			})
		})
	}
}

// RESET 1000 of a consumer is a normal end of its records only if there can be none.
func TestResetByConsumer(t *testing.T) {
	for _, c := range []struct {
		name             string
		closed, received bool
		seq              uint32
		code             int
		want             error // of reads
	}{
		{"nothing was sent", true, false, 0, CloseNormalClosure, io.EOF},
		{"records are missing", true, false, 1, CloseNormalClosure, &CloseError{Code: CloseCanceled}},
		{"records arrived, CLOSE did not", true, true, 1, CloseNormalClosure, &CloseError{Code: CloseCanceled}},
		{"the handler has not closed", false, false, 0, CloseNormalClosure, &CloseError{Code: CloseCanceled}},
		{"another code", true, false, 0, CloseCanceled, &CloseError{Code: CloseCanceled}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				conn := newRecorder(nil)
				ep := recorded(t, conn)
				defer ep.close(testClosed)
				offer, _ := ParseToken(lastToken(consumerSubject(8)))
				ctx, cancel := context.WithCancelCause(ep.ctx)
				defer cancel(nil)
				w := ep.newProducer(lifecycle.Handler, ctx, consumerSubject(8), offer, false, minWindow)
				s := w.session
				s.cancel, s.recv.parent = cancel, ep.ctx
				if _, err := w.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				if c.closed {
					if err := w.Close(); err != nil {
						t.Fatal(err)
					}
				} else if err := w.Flush(); err != nil {
					t.Fatal(err)
				}
				if c.received {
					ep.receive(&nats.Msg{Subject: s.reply, Data: testPacket(9, 0, testData("a"))})
				}
				ep.receive(&nats.Msg{Subject: s.reply, Data: AppendPacket(nil, PacketHeader{Sender: 9, Seq: c.seq}, Frame{Type: FrameReset, Code: uint16(c.code)})})
				synctest.Wait()
				var err error
				for n := 0; err == nil; n++ {
					if _, err = s.recvRecord(); err == nil && n > 0 {
						t.Error("more records than arrived")
					}
				}
				if !errors.Is(err, c.want) {
					t.Errorf("reads end with %v, want %v", err, c.want)
				}
				if _, werr := w.Write(nil); werr == nil || errors.Is(werr, &CloseError{Code: CloseNormalClosure}) {
					t.Errorf("Write: %v", werr)
				}
			})
		})
	}
}

// The codes of what handlers return, as a table.
func TestHandlerEnd(t *testing.T) {
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

// A call that returns the end of the stream returns after the contexts have ended, also if the goroutine that ends the stream
// has only just begun to.
func TestContextsHaveEndedIfCallsFail(t *testing.T) {
	for name, call := range map[string]func(w *Writer) error{
		"Write": func(w *Writer) error { _, err := w.Write([]byte("x")); return err },
		"Flush": (*Writer).Flush,
		"Recv":  func(w *Writer) error { _, err := w.session.recvRecord(); return err },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ep := recorded(t, newRecorder(nil))
				defer ep.close(testClosed)
				offer, _ := ParseToken(lastToken(consumerSubject(8)))
				ctx, cancel := context.WithCancelCause(ep.ctx)
				defer cancel(nil)
				w := ep.newProducer(lifecycle.Handler, ctx, consumerSubject(8), offer, false, minWindow)
				s := w.session
				s.cancel, s.recv.parent = cancel, ep.ctx
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

// A look at a CLOSE that is held back which comes late says that the process stood still: the handler gets its time again.
func TestCloseIsHeldBackAgainAfterTheProcessStoodStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ep := recorded(t, newRecorder(nil))
		defer ep.close(testClosed)
		offer, _ := ParseToken(lastToken(consumerSubject(8)))
		w := ep.newProducer(lifecycle.Handler, ep.ctx, consumerSubject(8), offer, false, minWindow)
		s, o := w.session, &ep.outbox
		s.server = &Server{ep: ep}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // the outbox sleeps: what it owns is the test's
		s.out.life.closeAt = ep.now()
		late := s.out.life.closeAt + int64(2*maxTick) + 1
		o.checkHeldClose(s, late)
		if w.closed.Load() || s.out.life.closeAt != late+int64(closeDelay) {
			t.Errorf("after a late look CLOSE is written: %v, and the next look is at %d", w.closed.Load(), s.out.life.closeAt)
		}
		o.checkHeldClose(s, s.out.life.closeAt)
		if !w.closed.Load() || s.out.life.closeAt != 0 {
			t.Error("CLOSE is still held back")
		}
	})
}
