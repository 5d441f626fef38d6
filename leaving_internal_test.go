package stream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/concurrency"
	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/natsconn"
	"github.com/natsstream/stream/internal/natsconn/fake"
)

// The consumer's deadline ends its own calls, and the handler's context with its calls at the same time, by the
// handler's own clock: also where nothing tells it. The time that the request waited for the connection is not added.
func TestDeadlineEndsBothEnds(t *testing.T) {
	const timeout, waited = 1500 * time.Millisecond, 400 * time.Millisecond
	for name, silent := range map[string]bool{"told": false, "RESET is lost": true} {
		for _, late := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/late=%v", name, late), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := memoryTest(t, ClientParams{})
					var header string
					drop := lose(-1, frameOf(m.conn, FrameReset))
					m.bus.SetFilter(func(from, to *fake.Conn, msg *nats.Msg) bool {
						if msg.Subject == "wait" {
							header = msg.Header.Get("Stream-Timeout")
						}
						return !silent || drop(from, to, msg)
					})
					var left time.Duration
					ended := make(chan outcome, 3)
					m.handle(t, "wait", func(w *Writer, r *Request) error {
						deadline, _ := r.Context().Deadline()
						left = time.Until(deadline)
						go func() {
							<-r.Context().Done()
							ended <- outcome{context.Cause(r.Context()), time.Now()}
						}()
						go func() {
							var err error
							for err == nil {
								_, err = w.Write(make([]byte, 1000))
							}
							ended <- outcome{err, time.Now()}
						}()
						_, err := r.Recv()
						ended <- outcome{err, time.Now()}
						<-w.Context().Done()
						time.Sleep(time.Second) // the goroutines above use w and r
						return err
					})
					start := time.Now()
					ctx, cancel := context.WithTimeout(t.Context(), timeout)
					defer cancel()
					want := timeout
					if late {
						m.conn.Set(nats.RECONNECTING)
						synctest.Wait()
					}
					s, err := m.client.Open(ctx, "wait", nil)
					if err != nil {
						t.Fatal(err)
					}
					if late {
						time.Sleep(waited)
						m.conn.Set(nats.CONNECTED)
						want -= waited
					}
					synctest.Wait()
					if header != fmt.Sprint(want.Milliseconds()) || left != want {
						t.Errorf("header says %q ms, the handler has %v, want %v", header, left, want)
					}
					<-s.Context().Done()
					_, err = s.Recv() // before the records that arrived
					outcome{err, time.Now()}.expect(t, "Recv", context.DeadlineExceeded, start, timeout, timeout)
					for range 3 {
						(<-ended).expect(t, "the handler", &CloseError{Code: CloseDeadlineExceeded}, start, timeout, timeout+timerSlack)
					}
					m.bus.SetFilter(nil)
					time.Sleep(time.Minute)
					m.nothingLeft(t)
				})
			})
		}
	}
}

// zeros yields zeros without end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// No call outlives its context by more than 50 ms, whatever the connection and the peer do.
func TestCallsHeedContexts(t *testing.T) {
	const timeout = time.Second
	record := make([]byte, 10_000)
	fill := func(write func([]byte) (int, error)) (err error) {
		for err == nil {
			_, err = write(record)
		}
		return err
	}
	type end struct {
		recv       func() ([]byte, error)
		recvObject func(any) error
		read       func([]byte) (int, error)
		writeTo    func(io.Writer) (int64, error)
		send       interface {
			io.Writer
			io.ReaderFrom
			WriteObject(any) (int, error)
			Flush() error
			Sync(context.Context) error
		}
		closeSend func() error
		st        *Stream
		w         *Writer
	}
	calls := map[string]func(ctx context.Context, e end) error{
		"Recv":        func(_ context.Context, e end) error { _, err := e.recv(); return err },
		"RecvObject":  func(_ context.Context, e end) error { var v any; return e.recvObject(&v) },
		"Read":        func(_ context.Context, e end) error { _, err := e.read(make([]byte, 1)); return err },
		"WriteTo":     func(_ context.Context, e end) error { _, err := e.writeTo(io.Discard); return err },
		"Write":       func(_ context.Context, e end) error { return fill(e.send.Write) },
		"large Write": func(_ context.Context, e end) error { _, err := e.send.Write(make([]byte, 4<<20)); return err },
		"WriteObject": func(_ context.Context, e end) error {
			return fill(func(p []byte) (int, error) { return e.send.WriteObject(p) })
		},
		"ReadFrom": func(_ context.Context, e end) error {
			_, err := e.send.ReadFrom(io.LimitReader(zeros{}, 16<<20))
			return err
		},
		"Flush": func(_ context.Context, e end) error {
			_, err := e.send.Write(record)
			if err == nil {
				err = e.send.Flush()
			}
			return err
		},
		"Close": func(_ context.Context, e end) error {
			_, err := e.send.Write(record)
			if err == nil {
				err = e.closeSend()
			}
			return err
		},
		"Sync": func(ctx context.Context, e end) error {
			_, err := e.send.Write(record)
			if err == nil {
				err = e.send.Sync(ctx)
			}
			return err
		},
		"Sync without end": func(_ context.Context, e end) error {
			_, err := e.send.Write(record)
			if err == nil {
				err = e.send.Sync(context.Background())
			}
			return err
		},
		"Header": func(_ context.Context, e end) error {
			if e.st == nil {
				return nil
			}
			_, err := e.st.Header()
			return err
		},
	}
	// Calls that succeed at once if only the peer is slow: they do not wait for it.
	quick := map[string]bool{"Flush": true, "Close": true, "Sync": true, "Sync without end": true}
	for name, call := range calls {
		for _, where := range []string{"peer is silent", "down", "down from the beginning"} {
			for _, consumer := range []bool{true, false} {
				if !consumer && where == "down from the beginning" {
					continue // there is no handler then
				}
				t.Run(fmt.Sprintf("%s/%s/consumer=%v", name, where, consumer), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						m := memoryTest(t, ClientParams{})
						ended := make(chan outcome, 1)
						try := func(ctx context.Context, e end) {
							if where == "down" {
								time.Sleep(timeout / 2)
								m.conn.Set(nats.RECONNECTING)
								m.back.Set(nats.RECONNECTING)
								synctest.Wait()
							}
							err := call(ctx, e)
							ended <- outcome{err, time.Now()}
						}
						m.handle(t, "slow", func(w *Writer, r *Request) error {
							if !consumer {
								try(r.Context(), end{recv: r.Recv, recvObject: r.RecvObject, read: r.Read, writeTo: r.WriteTo, send: w, closeSend: w.Close, w: w})
							}
							<-r.Context().Done()
							return nil
						})
						if where == "down from the beginning" {
							m.conn.Set(nats.RECONNECTING)
							synctest.Wait()
						}
						start := time.Now()
						ctx, cancel := context.WithTimeout(context.Background(), timeout)
						defer cancel()
						s, err := m.client.Open(ctx, "slow", nil)
						if err != nil {
							t.Fatal(err)
						}
						if consumer {
							try(ctx, end{recv: s.Recv, recvObject: s.RecvObject, read: s.Read, writeTo: s.WriteTo, send: s, closeSend: s.CloseSend, st: s})
						}
						o := <-ended
						switch took := o.at.Sub(start); {
						case took > timeout+50*time.Millisecond:
							t.Errorf("returned %v after its context ended", took-timeout)
						case name == "Close" && !consumer && o.err == nil: // waits for nothing in a handler
						case o.err == nil && !(quick[name] && where == "peer is silent") && name != "Header":
							t.Errorf("did not wait")
						case o.err != nil && took < timeout:
							t.Errorf("%v after %v", o.err, took)
						case o.err != nil && !errors.Is(o.err, context.DeadlineExceeded) && !errors.Is(o.err, &CloseError{Code: CloseDeadlineExceeded}):
							t.Error(o.err)
						}
						_ = s.Close()
						time.Sleep(time.Second)
						m.conn.Set(nats.CONNECTED)
						m.back.Set(nats.CONNECTED)
						time.Sleep(time.Minute)
						m.nothingLeft(t)
					})
				})
			}
		}
	}
	t.Run("Drain", func(t *testing.T) {
		for _, down := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				release := make(chan struct{})
				m.handle(t, "deaf", func(*Writer, *Request) error { <-release; return nil })
				s := m.open(t, "deaf")
				synctest.Wait()
				if down {
					m.back.Set(nats.RECONNECTING)
				}
				start := time.Now()
				ctx, cancel := context.WithTimeout(t.Context(), timeout)
				defer cancel()
				err := m.server.Drain(ctx)
				outcome{err, time.Now()}.expect(t, "Drain", context.DeadlineExceeded, start, timeout, timeout+50*time.Millisecond)
				close(release)
				_ = s.Close()
			})
		}
	})
}

// The consumer's context ends when both directions have come to their ends, also where nobody calls anything then.
func TestContextEndsWithBothDirections(t *testing.T) {
	for _, last := range []string{"acknowledgement", "read"} {
		synctest.Test(t, func(t *testing.T) {
			m := memoryTest(t, ClientParams{})
			m.handle(t, "echo", func(w *Writer, r *Request) error {
				_, err := r.WriteTo(w)
				return err
			})
			s := m.open(t, "echo")
			if _, err := s.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
			if last == "acknowledgement" { // of the CLOSE
				m.bus.SetFilter(lose(1, sequencedOf(m.conn)))
			}
			if err := s.CloseSend(); err != nil {
				t.Fatal(err)
			}
			if last == "read" {
				time.Sleep(time.Second)
			}
			if _, err := s.Recv(); err != io.EOF {
				t.Fatal(err)
			}
			time.Sleep(2 * maxTick)
			if cause := context.Cause(s.Context()); cause != io.EOF {
				t.Errorf("%s came last: the context's cause is %v", last, cause)
			}
			m.nothingLeft(t)
		})
	}
}

// A consumer that left with code 1000 before its peer is gone does not wait for ever.
func TestLeavingNormallyWithoutPeerEnds(t *testing.T) {
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

// A consumer may leave with code 1000 before everything arrived. That is no acknowledgement.
func TestLeavingAcknowledgesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := newRecorder(nil)
		c := fakeClient(t, conn, ClientParams{})
		ep := c.ep
		defer ep.close(testClosed)
		w := c.NewWriter(consumerSubject(8))
		if _, err := w.Write([]byte("lost")); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		reset := AppendPacket(nil, PacketHeader{Sender: 9}, Frame{Type: FrameReset, Code: CloseNormalClosure})
		ep.receive(&nats.Msg{Subject: w.session.reply(), Data: reset}, nil)
		if err := w.Sync(t.Context()); err == nil {
			t.Error("Sync says that everything arrived")
		}
	})
}

// RESET 1000 of a consumer is a normal end of its records only if there can be none.
func TestNormalResetByConsumerEndsNormallyIfNothingCanBeLost(t *testing.T) {
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
				ep := fakeClient(t, conn, ClientParams{}).ep
				defer ep.close(testClosed)
				offer, _ := ParseToken(lastToken(consumerSubject(8)))
				w := ep.newProducer(lifecycle.Handler, ep.ctx, consumerSubject(8), offer, false, minWindow)
				s := w.session
				if _, err := w.Write([]byte("x")); err != nil {
					t.Fatal(err)
				}
				if c.closed {
					w.closeReturned(CloseError{Code: CloseNormalClosure})
				}
				if err := w.Flush(); err != nil {
					t.Fatal(err)
				}
				if c.received {
					ep.receive(&nats.Msg{Subject: s.reply(), Data: testPacket(9, 0, testData("a"))}, nil)
				}
				ep.receive(&nats.Msg{Subject: s.reply(), Data: AppendPacket(nil, PacketHeader{Sender: 9, Seq: c.seq}, Frame{Type: FrameReset, Code: uint16(c.code)})}, nil)
				synctest.Wait()
				var err error
				for n := 0; err == nil; n++ {
					if _, err = s.recvRecord(forever); err == nil && n > 0 {
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

// A consumer that has read everything and closed its own direction may leave: what was lost of its records is repaired,
// and the handler, which works on, is not stopped.
func TestClosingAfterBothEndsRepairsAndStopsNobody(t *testing.T) {
	for _, leave := range []struct {
		name string
		how  func(s *Stream, cancel func())
	}{
		{"Close", func(s *Stream, _ func()) { _ = s.Close() }},
		{"CloseWithCode", func(s *Stream, _ func()) { _ = s.CloseWithCode(CloseNormalClosure) }},
		{"context", func(_ *Stream, cancel func()) { cancel() }},
	} {
		t.Run(leave.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				const records = 10
				got := make(chan error, 1)
				m.handle(t, "up", func(w *Writer, r *Request) error {
					if err := w.Close(); err != nil {
						return err
					}
					n := 0
					for _, err := range r.All() {
						if err != nil {
							got <- err
							return err
						}
						n++
					}
					time.Sleep(time.Second)
					err := context.Cause(r.Context())
					if n != records {
						err = fmt.Errorf("%d records of %d", n, records)
					}
					got <- err
					return nil
				})
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				s, err := m.client.Open(ctx, "up", nil)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := s.Recv(); err != io.EOF { // and now it knows where to write to
					t.Fatal(err)
				}
				lost := make(map[uint32]bool) // each packet once: CloseSend may have to wait for one before it can send the next
				m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
					if from != m.conn || !isSequenced(msg.Data) {
						return true
					}
					h, _, _ := ParsePacketHeader(msg.Data)
					first := !lost[h.Seq]
					lost[h.Seq] = true
					return !first
				})
				for i := range records {
					if _, err := s.Write([]byte{byte(i)}); err != nil {
						t.Fatal(err)
					}
				}
				if err := s.CloseSend(); err != nil {
					t.Fatal(err)
				}
				leave.how(s, cancel)
				if s.Context().Err() == nil {
					t.Error("the stream's context goes on")
				}
				if _, err := s.Recv(); err != io.EOF {
					t.Errorf("a read after the end returned %v", err)
				}
				if err := <-got; err != nil {
					t.Errorf("the handler: %v", err)
				}
				if len(lost) == 0 {
					t.Error("nothing was lost")
				}
				m.nothingLeft(t)
			})
		})
	}
}

// A peer that is not there any longer is not waited for for ever, though nobody looks at the stream.
func TestClosingAfterBothEndsWithoutPeerEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "up", func(w *Writer, r *Request) error {
			defer func() { _, _ = r.Recv() }()
			return w.Close()
		})
		s := m.open(t, "up")
		if _, err := s.Recv(); err != io.EOF {
			t.Fatal(err)
		}
		m.bus.SetFilter(fake.BlackHole(nil, nil))
		if _, err := s.Write([]byte("a")); err != nil {
			t.Fatal(err)
		}
		if err := s.CloseSend(); err != nil {
			t.Fatal(err)
		}
		_ = s.Close()
		time.Sleep(m.times.KeepAlive + 4*m.times.AckTimeout + m.times.ResumeTimeout)
		m.nothingLeft(t)
	})
}

// A consumer that has read the end may give up in the middle of a large record.
func TestLargeRecordMayBeGivenUpAfterTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		left := make(chan error, 1)
		m.handle(t, "x", func(w *Writer, r *Request) error {
			if err := w.Close(); err != nil {
				return err
			}
			<-r.Context().Done()
			left <- context.Cause(r.Context())
			return nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		s, err := m.client.Open(ctx, "x", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != io.EOF {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			_, err := s.Write(make([]byte, 1<<20)) // nobody reads it
			done <- err
		}()
		time.Sleep(time.Second)
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Write: %v", err)
		}
		if err := <-left; !errors.Is(err, &CloseError{Code: CloseCanceled}) {
			t.Errorf("the handler was left with %v", err)
		}
	})
}

// closeMeanwhile opens a stream and closes it while the outbox publishes its request. The answer arrives before the
// outbox acts on the end, because the next publish takes long.
func (m *memoryPair) closeMeanwhile(t *testing.T, subject string) {
	t.Helper()
	var s *Stream
	m.conn.Requested = func(msg *nats.Msg) error {
		switch msg.Subject {
		case "busy":
			time.Sleep(time.Millisecond)
		case subject:
			s.Close()
		}
		return nil
	}
	m.open(t, "busy")
	synctest.Wait()
	s = m.open(t, subject)
	m.open(t, "busy")
	time.Sleep(10 * time.Millisecond)
}

// Close waits for producers that have not answered yet, to tell them, but not for long, and not in vain.
func TestCloseWaitsForUnansweredRequests(t *testing.T) {
	ack := defaultAckTimeout
	for name, c := range map[string]struct {
		before        func(t *testing.T, m *memoryPair)
		atLeast, most time.Duration
		told          int // handlers
	}{
		"no stream": {func(*testing.T, *memoryPair) {}, 0, 0, 0},
		"a stream that was answered": {func(t *testing.T, m *memoryPair) {
			m.open(t, "silent")
			time.Sleep(time.Second)
		}, 0, 0, 1},
		"a stream that will be answered": {func(t *testing.T, m *memoryPair) {
			m.open(t, "silent")
			synctest.Wait() // the request is sent
		}, 1, ack, 1},
		"streams that were closed before": {func(t *testing.T, m *memoryPair) {
			for range 5 {
				s := m.open(t, "silent")
				synctest.Wait()
				s.Close()
			}
		}, 1, ack, 5},
		"requests that were not sent": {func(t *testing.T, m *memoryPair) {
			m.conn.Set(nats.RECONNECTING)
			synctest.Wait()
			m.open(t, "silent").Close()
		}, 0, natsconn.UnsubscribeTimeout, 0},
		"nobody listens": {func(t *testing.T, m *memoryPair) {
			s := m.open(t, "nobody")
			synctest.Wait() // NATS has said so
			s.Close()
		}, 0, 0, 0},
		"nobody listens, closed before that is known": {func(t *testing.T, m *memoryPair) {
			m.open(t, "nobody").Close()
			synctest.Wait()
		}, 0, 0, 0},
		"nobody listens, which is known before the end": {func(t *testing.T, m *memoryPair) {
			m.closeMeanwhile(t, "nobody")
		}, 0, 0, 0},
		"a first packet that comes before the end": {func(t *testing.T, m *memoryPair) {
			m.closeMeanwhile(t, "prompt")
		}, 0, 0, 1},
		"nobody listens to one request of two": {func(t *testing.T, m *memoryPair) {
			m.closeMeanwhile(t, "nobody")
			m.open(t, "dead")
			synctest.Wait()
		}, ack, ack, 0},
		"a producer that never answers": {func(t *testing.T, m *memoryPair) {
			m.open(t, "dead")
			synctest.Wait()
		}, ack, ack, 0},
		"one that did not answer long ago": {func(t *testing.T, m *memoryPair) {
			m.open(t, "dead").Close()
			time.Sleep(time.Minute)
		}, 0, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{KeepAlive: time.Hour, ResumeTimeout: time.Hour})
				told := make(chan error, 10)
				m.handle(t, "silent", func(w *Writer, r *Request) error {
					<-r.Context().Done()
					told <- context.Cause(r.Context())
					return nil
				})
				m.handle(t, "prompt", func(w *Writer, r *Request) error {
					_, err := w.Write([]byte("here"))
					<-r.Context().Done()
					told <- context.Cause(r.Context())
					return err
				})
				stop, err := m.back.Subscribe("dead", "", func(*nats.Msg) {})
				if err != nil {
					t.Fatal(err)
				}
				defer stop()
				c.before(t, m)
				start := time.Now()
				m.client.Close()
				took(t, "Close", start, c.atLeast, c.most)
				synctest.Wait()
				if len(told) != c.told {
					t.Errorf("%d handlers were told, want %d", len(told), c.told)
				}
				for range len(told) {
					if err := <-told; !errors.Is(err, &CloseError{Code: CloseGoingAway}) && !errors.Is(err, &CloseError{Code: CloseCanceled}) {
						t.Errorf("a handler was told %v", err)
					}
				}
			})
		})
	}
}

// flushed is a connection that counts how often it was flushed.
type flushed struct {
	*fake.Conn
	times int
	took  time.Duration
}

func (c *flushed) Flush(timeout time.Duration) error {
	c.times++
	time.Sleep(min(c.took, timeout))
	return nil
}

// A producer may send several packets before the RESET reaches it. They stand for one request.
func TestCloseWaitsForEachProducerOnce(t *testing.T) {
	for _, n := range []int{1, 2, 4, 8} {
		synctest.Test(t, func(t *testing.T) {
			m := memoryTest(t, ClientParams{})
			m.bus.Delay = time.Millisecond
			m.handle(t, "writes", func(w *Writer, r *Request) error { // perhaps behind a PING
				if _, err := w.Write([]byte("a")); err != nil {
					return err
				}
				<-r.Context().Done()
				return nil
			})
			ended := make(chan time.Duration, 1)
			start := time.Now()
			m.handle(t, "waits", func(_ *Writer, r *Request) error {
				<-r.Context().Done()
				ended <- time.Since(start)
				return nil
			})
			for range n {
				m.open(t, "writes")
			}
			m.open(t, "waits")
			time.Sleep(100 * time.Microsecond) // the requests are on their way
			m.client.Close()
			if took := <-ended; took > 100*time.Millisecond {
				t.Errorf("beside %d producers that write, the handler that waits ends after %v", n, took)
			}
		})
	}
}

// Close flushes the connection, unless it is down, and does not wait for a server that does not answer.
func TestCloseFlushesTheConnection(t *testing.T) {
	for name, c := range map[string]struct {
		status nats.Status
		takes  time.Duration
		times  int
		took   time.Duration
	}{
		"connected":     {nats.CONNECTED, time.Millisecond, 1, time.Millisecond},
		"no answer":     {nats.CONNECTED, time.Hour, 1, natsconn.UnsubscribeTimeout},
		"reconnecting":  {nats.RECONNECTING, time.Hour, 0, 0},
		"closed before": {nats.CLOSED, time.Hour, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				conn := &flushed{Conn: fake.New(), took: c.takes}
				s, err := newServer(conn, "", ServerParams{})
				if err != nil {
					t.Fatal(err)
				}
				conn.Set(c.status)
				synctest.Wait()
				start := time.Now()
				s.Close()
				took(t, "Close", start, c.took, c.took)
				if conn.times != c.times {
					t.Errorf("flushed %d times", conn.times)
				}
			})
		})
	}
}

// A server that closes tells also the consumers that speak only the fallback and never heard from their handler.
func TestServerCloseTellsSilentFallbackConsumers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		release := make(chan struct{})
		m.handle(t, "x", func(*Writer, *Request) error { <-release; return nil })
		user := m.bus.Connect("user")
		var told atomic.Int32
		stop, err := user.Subscribe("inbox.old", "", func(*nats.Msg) { told.Add(1) })
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		if err := user.Publish("x", "inbox.old", nil); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		m.server.Close()
		synctest.Wait()
		close(release)
		time.Sleep(time.Minute)
		if n := told.Load(); n != 1 {
			t.Errorf("the consumer was told %d times, want once", n)
		}
		m.server.mu.Lock()
		defer m.server.mu.Unlock()
		if n := m.server.sessions; n != 0 {
			t.Errorf("%d sessions are left", n)
		}
	})
}

// A handler that runs while the endpoint goes away may have no token yet. Its consumer is told nevertheless.
func TestServerCloseTellsConsumersOfSilentHandlers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "x", func(_ *Writer, r *Request) error {
			<-r.Context().Done()
			return nil
		})
		s := m.open(t, "x")
		time.Sleep(maxTick + time.Millisecond) // the outbox knows it, and has not said hello
		// As if the check came between the end of the endpoint and that of its outbox.
		ep := m.server.ep
		e := &ending{kind: endLocal, err: ErrServerClosed, reset: CloseError{CloseGoingAway, "server closed"}}
		ep.gone.Store(e)
		time.Sleep(3 * maxTick)
		m.server.Close()
		_, err := s.Recv()
		if ce, ok := errors.AsType[*CloseError](err); !ok || ce.Code != CloseGoingAway {
			t.Errorf("the consumer got %v", err)
		}
	})
}

// A server that is closed tells also those consumers that have not heard from their handlers, and counts no session of
// a handler that does not return.
func TestServerCloseTellsConsumersThatHaveNoAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		release := make(chan struct{})
		m.handle(t, "deaf", func(*Writer, *Request) error { <-release; return nil })
		s := openForAnHour(t, m, "deaf")
		synctest.Wait()
		start := time.Now()
		_ = m.server.Close()
		_, err := s.Recv()
		outcome{err, time.Now()}.expect(t, "Recv", &CloseError{Code: CloseGoingAway}, start, 0, 0)
		close(release)
		m.nothingLeft(t)
	})
}

// However often and however impatiently a server is ended, each call returns, and its consumers are answered.
func TestEveryCallThatEndsAServerReturns(t *testing.T) {
	away := &CloseError{Code: CloseGoingAway}
	for name, c := range map[string]struct {
		end  func(m *memoryPair, ended context.Context)
		want error // of the consumer
	}{
		"Close":             {func(m *memoryPair, _ context.Context) { _ = m.server.Close() }, away},
		"Drain impatiently": {func(m *memoryPair, ended context.Context) { _ = m.server.Drain(ended) }, away},
		"Drain, then Close": {func(m *memoryPair, _ context.Context) {
			go func() { _ = m.server.Drain(context.Background()) }()
			synctest.Wait()
			_ = m.server.Close()
		}, away},
		"Drain twice": {func(m *memoryPair, _ context.Context) {
			go func() { _ = m.server.Drain(context.Background()) }()
			synctest.Wait()
			_ = m.server.Drain(context.Background())
		}, io.EOF},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.bus.Delay = 100 * time.Millisecond
				m.handle(t, "x", func(*Writer, *Request) error { return nil })
				s := m.open(t, "x")
				synctest.Wait() // NATS has the request, the server does not
				ended, cancel := context.WithCancel(t.Context())
				cancel()
				start := time.Now()
				returned := make(chan struct{})
				go func() {
					defer close(returned)
					c.end(m, ended)
				}()
				if _, err := s.Recv(); !errors.Is(err, c.want) {
					t.Errorf("Recv: %v, want %v", err, c.want)
				}
				took(t, "the answer", start, 0, time.Second)
				<-returned
				took(t, "the call", start, 0, 2*time.Second)
				time.Sleep(time.Second) // the acknowledgement is under way
				m.nothingLeft(t)
			})
		})
	}
}

// A request that is being taken while the connection is lost for good is not waited for.
func TestDrainDoesNotWaitForALostConnection(t *testing.T) {
	for range 10 {
		conn := newRecorder(nil)
		server, err := newServer(conn.Conn, "", ServerParams{})
		if err != nil {
			t.Fatal(err)
		}
		h := make(nats.Header)
		for k := range 50_000 { // looking through them takes a while
			h[fmt.Sprint("Key-", k)] = []string{""}
		}
		began, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			close(began)
			server.request(&nats.Msg{Subject: "x", Reply: consumerSubject(5), Header: h},
				&Registration{server: server, subject: "x", handler: func(*Writer, *Request) error { return nil }})
		}()
		<-began
		time.Sleep(50 * time.Microsecond)
		conn.Set(nats.CLOSED)
		<-done
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if err := server.Drain(ctx); err != nil {
			t.Errorf("Drain: %v", err)
		}
		cancel()
		server.Close()
	}
}

// slowSubscriber is a connection that takes no bytes when "slow" is subscribed to.
type slowSubscriber struct {
	*fake.Conn
	begun, hold chan struct{}
}

func (c *slowSubscriber) Subscribe(subject, queue string, f nats.MsgHandler) (func(), error) {
	if subject == "slow" {
		close(c.begun)
		<-c.hold
	}
	return c.Conn.Subscribe(subject, queue, f)
}

// Drain heeds its context beside a Handle that waits for the connection, and ends that subscription too.
func TestDrainHeedsItsContextBesideHandle(t *testing.T) {
	conn := &slowSubscriber{fake.New(), make(chan struct{}), make(chan struct{})}
	s, err := newServer(conn, "", ServerParams{})
	if err != nil {
		t.Fatal(err)
	}
	handled := make(chan error, 1)
	go func() {
		_, err := s.Handle("slow", func(*Writer, *Request) error { return nil })
		handled <- err
	}()
	<-conn.begun
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if err := s.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Drain: %v", err)
	}
	close(conn.hold)
	if err := <-handled; err != nil {
		t.Error(err)
	}
	s.Close()
	if n := len(s.registrations); n != 0 {
		t.Errorf("%d subscriptions are left", n)
	}
}

// A writer whose client is closed while its first packet is under way: the token that the outbox has just given it is
// the outbox's to take back. The race detector says where that is not so.
func TestClientMayCloseDuringFirstLargeRecord(t *testing.T) {
	for range 3 {
		release := make(chan struct{})
		conn := newRecorder(func(int, []byte) error { <-release; return nil })
		c := fakeClient(t, conn.Conn, ClientParams{})
		w := c.NewWriter(consumerSubject(0)) // one packet, so the second piece waits
		written := make(chan error, 1)
		go func() { _, err := w.Write(make([]byte, 1<<20)); written <- err }()
		until(t, "the record waits for credit", w.waiting.Load)
		// The outbox registers the writer and then waits in publish. Any word from it would order the two.
		time.Sleep(5 * time.Millisecond)
		c.ep.cancel(ErrClientClosed) // as Close begins
		if err := <-written; !errors.Is(err, ErrClientClosed) {
			t.Errorf("Write: %v", err)
		}
		close(release)
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if n := c.ep.sessions.Size(); n != 0 {
			t.Errorf("%d streams are left", n)
		}
	}
}

// A caller of OpenStream may read again while its records are dropped. It receives records in order, and the last
// result last. A channel that holds one result holds the last one.
func TestLastResultStaysLast(t *testing.T) {
	for round := range 1000 {
		synctest.Test(t, func(t *testing.T) {
			last := concurrency.NewAsyncValue([]byte{RequestChanLen})
			ch := make(chan *concurrency.AsyncResult[[]byte], RequestChanLen)
			for i := range RequestChanLen {
				ch <- concurrency.NewAsyncValue([]byte{byte(i)})
			}
			go func() {
				defer close(ch)
				sendLast(ch, last)
			}()
			time.Sleep(abandonedAfter) // both goroutines wake now
			waits := round%2 == 0
			for waits && len(ch) > 1 {
				runtime.Gosched()
			}
			var got []byte
			for res := range ch {
				got = append(got, res.Value...)
			}
			if !slices.IsSorted(got) || bytes.Count(got, last.Value) != 1 {
				t.Fatalf("results %v, want some in order and then %d", got, last.Value)
			}
			if waits && len(got) != 1 {
				t.Fatalf("results %v of a channel that held one", got)
			}
		})
	}
}
