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

	"github.com/natsstream/stream/internal/liveness"
	"github.com/natsstream/stream/internal/natsconn/fake"
)

// timerSlack is what the clocks of two endpoints, which tick each on its own, may add to a time.
const timerSlack = 250 * time.Millisecond

// lose returns a filter that loses what match says, the first n of it; n < 0 is all.
func lose(n int, match func(from, to *fake.Conn, m *nats.Msg) bool) fake.Filter {
	return func(from, to *fake.Conn, m *nats.Msg) bool {
		if n == 0 || !match(from, to, m) {
			return true
		}
		n--
		return false
	}
}

// frameOf matches control packets with a frame of type typ that conn publishes.
func frameOf(conn *fake.Conn, typ FrameType) func(from, to *fake.Conn, m *nats.Msg) bool {
	return func(from, _ *fake.Conn, m *nats.Msg) bool { return from == conn && isFrame(m.Data, typ) }
}

// sequencedOf matches packets of records that conn publishes.
func sequencedOf(conn *fake.Conn) func(from, to *fake.Conn, m *nats.Msg) bool {
	return func(from, _ *fake.Conn, m *nats.Msg) bool { return from == conn && isSequenced(m.Data) }
}

// outcome is how something ended, and when.
type outcome struct {
	err error
	at  time.Time
}

// expect fails the test unless something ended with an error that target is in, after a time from atLeast to atMost.
func (o outcome) expect(t *testing.T, what string, target error, start time.Time, atLeast, atMost time.Duration) {
	t.Helper()
	if !errors.Is(o.err, target) {
		t.Errorf("%s: %v, want %v", what, o.err, target)
	}
	if d := o.at.Sub(start); d < atLeast || d > atMost {
		t.Errorf("%s after %v, should be %v to %v", what, d, atLeast, atMost)
	}
}

// openForAnHour is memoryPair.open for a test whose failure would be to wait for ever.
func openForAnHour(t *testing.T, m *memoryPair, subject string) *Stream {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	t.Cleanup(cancel)
	s, err := m.client.Open(ctx, subject, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// The consumer's deadline ends its own calls, and the handler's context with its calls at the same time, by the handler's
// own clock: also where nothing tells it. The time that the request waited for the connection is not added.
func TestDeadline(t *testing.T) {
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

// Sync returns when everything was acknowledged, however often it had to be sent again, and otherwise when its context or
// the stream ends.
func TestSync(t *testing.T) {
	const lossy = 700 * time.Millisecond
	gone := errors.New("gone")
	for name, c := range map[string]struct {
		lossy   time.Duration // from when on packets arrive; 0 is from the beginning
		timeout time.Duration
		leave   bool // the consumer leaves after lossy
		closed  bool // the writer was closed
		want    error
		atLeast time.Duration
		atMost  time.Duration
	}{
		"acknowledged":     {timeout: time.Minute},
		"closed":           {timeout: time.Minute, closed: true},
		"repaired":         {timeout: time.Minute, lossy: lossy, atLeast: lossy, atMost: lossy + 2*defaultAckTimeout + timerSlack},
		"closed, repaired": {timeout: time.Minute, lossy: lossy, closed: true, atLeast: lossy, atMost: lossy + 2*defaultAckTimeout + timerSlack},
		"context ends":     {timeout: lossy, lossy: time.Hour, want: context.DeadlineExceeded, atLeast: lossy, atMost: lossy + 50*time.Millisecond},
		"consumer leaves":  {timeout: time.Minute, lossy: lossy, leave: true, want: &CloseError{Code: 4321}, atLeast: lossy, atMost: lossy + timerSlack},
		"consumer is gone": {timeout: time.Minute, lossy: time.Hour, want: &CloseError{Code: CloseAbnormalClosure},
			atLeast: defaultPatience, atMost: noticed},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				start := time.Now()
				ended := make(chan outcome, 1)
				m.handle(t, "sync", func(w *Writer, _ *Request) error {
					if _, err := w.Write([]byte("x")); err != nil {
						t.Error(err)
					}
					if err := w.Sync(t.Context()); err != nil { // the consumer is there
						t.Error(err)
					}
					switch {
					case c.leave:
						m.bus.SetFilter(lose(-1, sequencedOf(m.back)))
					case c.lossy > 0:
						m.bus.SetFilter(fake.BlackHole(nil, nil))
					}
					if _, err := w.Write([]byte("y")); err != nil {
						t.Error(err)
					}
					if c.closed {
						if err := w.Close(); err != nil {
							t.Error(err)
						}
					}
					ctx, cancel := context.WithTimeoutCause(context.Background(), c.timeout, fmt.Errorf("%w: %w", gone, context.DeadlineExceeded))
					defer cancel()
					err := w.Sync(ctx)
					if errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, gone) {
						t.Errorf("%v lacks the cause", err)
					}
					ended <- outcome{err, time.Now()}
					return err
				})
				s := m.open(t, "sync")
				time.Sleep(c.lossy)
				if c.leave {
					_ = s.CloseWithCode(4321)
				} else {
					m.bus.SetFilter(nil)
				}
				(<-ended).expect(t, "Sync", c.want, start, c.atLeast, c.atMost)
				_ = s.Close()
				m.bus.SetFilter(nil)
				time.Sleep(time.Minute)
				m.nothingLeft(t)
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		s := m.open(t, "nobody")
		var none context.Context
		if err := s.Sync(none); !errors.Is(err, nats.ErrInvalidContext) {
			t.Errorf("Sync(nil): %v", err)
		}
		_ = s.Close()
	})
}

// A handler that says nothing lets the consumer know where it is: the consumer's first Write waits for that.
func TestHello(t *testing.T) {
	for name, c := range map[string]struct {
		silent func(r *Request)
		lost   int // of the handler's PINGs
		atMost time.Duration
	}{
		"reads":              {silent: func(r *Request) { _, _ = r.Recv() }, atMost: 2 * helloWait},
		"reads later":        {silent: func(*Request) { time.Sleep(time.Second) }, atMost: 2 * helloWait},
		"does nothing":       {silent: func(r *Request) { <-r.Context().Done() }, atMost: 2 * helloWait},
		"and loses its PING": {silent: func(r *Request) { _, _ = r.Recv() }, lost: 1, atMost: 100*time.Millisecond + defaultAckTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.bus.SetFilter(lose(c.lost, frameOf(m.back, FramePing)))
				m.handle(t, "silent", func(_ *Writer, r *Request) error { c.silent(r); return nil })
				start := time.Now()
				s := openForAnHour(t, m, "silent")
				_, err := s.Write([]byte("x"))
				outcome{err, time.Now()}.expect(t, "Write", nil, start, 0, c.atMost)
				_ = s.Close()
				time.Sleep(time.Second)
				m.nothingLeft(t)
			})
		})
	}
}

// A consumer that leaves and whose RESET is lost is missed: its handler's context ends nevertheless.
func TestResetLost(t *testing.T) {
	for name, leave := range map[string]func(s *Stream, cancel func()){
		"cancel": func(_ *Stream, cancel func()) { cancel() },
		"Close":  func(s *Stream, _ func()) { _ = s.Close() },
		"code":   func(s *Stream, _ func()) { _ = s.CloseWithCode(4321) },
	} {
		for lost, want := range map[int]struct {
			code   int
			atMost time.Duration
		}{
			1:  {CloseCanceled, defaultKeepAlive + timerSlack},
			-1: {CloseAbnormalClosure, defaultKeepAlive + liveness.SuspectPings*defaultAckTimeout + defaultResumeTimeout + timerSlack},
		} {
			t.Run(fmt.Sprintf("%s/lost=%d", name, lost), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := memoryTest(t, ClientParams{})
					m.bus.SetFilter(lose(lost, frameOf(m.conn, FrameReset)))
					ended := make(chan outcome, 1)
					m.handle(t, "stay", func(w *Writer, r *Request) error {
						if _, err := w.Write([]byte("x")); err != nil {
							t.Error(err)
						}
						<-r.Context().Done()
						ended <- outcome{context.Cause(r.Context()), time.Now()}
						return nil
					})
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					s, err := m.client.Open(ctx, "stay", nil)
					if err != nil {
						t.Fatal(err)
					}
					if _, err := s.Recv(); err != nil {
						t.Fatal(err)
					}
					start := time.Now()
					leave(s, cancel)
					(<-ended).expect(t, "the handler's context", &CloseError{Code: want.code}, start, 0, want.atMost)
					m.bus.SetFilter(nil)
					time.Sleep(time.Second)
					m.nothingLeft(t)
				})
			})
		}
	}
}

// A request, or its answer, that is lost with the consumer's own connection: the answer comes again, the request does not.
func TestRequestLost(t *testing.T) {
	const down = time.Second
	for name, answer := range map[string]bool{"request": false, "answer": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.handle(t, "one", func(w *Writer, _ *Request) error { _, err := w.Write([]byte("x")); return err })
				if answer {
					m.bus.SetFilter(fake.BlackHole(m.back, nil))
				} else {
					m.bus.SetFilter(fake.BlackHole(m.conn, nil))
				}
				s := openForAnHour(t, m, "one")
				synctest.Wait()
				m.conn.Set(nats.RECONNECTING)
				time.Sleep(down)
				m.bus.SetFilter(nil)
				m.conn.Set(nats.CONNECTED)
				start := time.Now()
				rec, err := s.Recv()
				if answer {
					outcome{err, time.Now()}.expect(t, "Recv", nil, start, 0, defaultAckTimeout+timerSlack)
					if string(rec) != "x" {
						t.Errorf("record %q", rec)
					}
					if _, err := s.Recv(); err != io.EOF {
						t.Error(err)
					}
				} else {
					outcome{err, time.Now()}.expect(t, "Recv", &CloseError{Code: CloseAbnormalClosure}, start, defaultResumeTimeout, defaultResumeTimeout+timerSlack)
				}
				time.Sleep(time.Minute)
				m.nothingLeft(t)
			})
		})
	}
}

// A producer that loses its connection for too long, before its consumer knows where it is, tells it afterwards: the
// consumer has nobody to ask.
func TestDisconnectedBeforeAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		ended := make(chan error, 1)
		m.handle(t, "wait", waits(ended))
		m.bus.SetFilter(fake.BlackHole(m.back, nil))
		s := openForAnHour(t, m, "wait")
		synctest.Wait()
		m.back.Set(nats.RECONNECTING)
		m.bus.SetFilter(nil)
		if err := <-ended; !errors.Is(err, nats.ErrDisconnected) {
			t.Errorf("the handler's context ended with %v", err)
		}
		m.back.Set(nats.CONNECTED)
		start := time.Now()
		_, err := s.Recv()
		outcome{err, time.Now()}.expect(t, "Recv", &CloseError{Code: CloseAbnormalClosure}, start, 0, timerSlack)
		m.nothingLeft(t)
	})
}

// The connection is lost before a handler that does nothing has said where it is: it does so as soon as it is back.
func TestHelloAfterReconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "silent", func(_ *Writer, r *Request) error { <-r.Context().Done(); return nil })
		s := openForAnHour(t, m, "silent")
		synctest.Wait()
		m.back.Set(nats.RECONNECTING)
		time.Sleep(2 * time.Second)
		m.back.Set(nats.CONNECTED)
		start := time.Now()
		_, err := s.Write([]byte("x"))
		outcome{err, time.Now()}.expect(t, "Write", nil, start, 0, defaultAckTimeout+100*time.Millisecond)
		_ = s.Close()
		m.nothingLeft(t)
	})
}

// A server that is closed tells also those consumers that have not heard from their handlers, and counts no session of a
// handler that does not return.
func TestServerClosedBeforeAnswer(t *testing.T) {
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

// A request for missing packets that is due before it is known whom to send it to is sent when it is.
func TestGapBeforeSubject(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		stop, err := m.back.Subscribe("raw", "", func(*nats.Msg) {})
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		s := m.open(t, "raw")
		synctest.Wait() // the outbox sleeps: what follows is as if it did it
		asked := false
		m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
			for _, f := range controlFrames(msg.Data) {
				asked = asked || f.Type == FrameCredit && f.Flags&FlagGap != 0
			}
			return true
		})
		stopPeer, err := m.back.Subscribe("peer", "", func(*nats.Msg) {})
		if err != nil {
			t.Fatal(err)
		}
		defer stopPeer()
		m.client.ep.outbox.sendCredit(&s.session, FlagGap)
		m.client.ep.outbox.setPeer(&s.session, "peer")
		synctest.Wait()
		if m.bus.SetFilter(nil); !asked {
			t.Error("nobody asked for the missing packets")
		}
		_ = s.Close()
		m.nothingLeft(t)
	})
}

// Close returns when everything was published. What gets lost then is repaired for as long as ResumeTimeout, unless the
// endpoint is closed meanwhile, which does not wait for it.
func TestLinger(t *testing.T) {
	for name, c := range map[string]struct {
		lossy time.Duration
		close bool // the endpoint that lingers, at half of ResumeTimeout
		want  error
		atMin time.Duration
		atMax time.Duration
	}{
		"repaired": {lossy: 3 * time.Second, want: io.EOF, atMin: 3 * time.Second, atMax: 3*time.Second + 2*defaultAckTimeout + timerSlack},
		"given up": {lossy: time.Hour, want: &CloseError{Code: CloseAbnormalClosure}, atMin: defaultResumeTimeout, atMax: defaultResumeTimeout + timerSlack},
		"closed":   {lossy: time.Hour, close: true, want: &CloseError{Code: CloseGoingAway}, atMin: defaultResumeTimeout / 2, atMax: defaultResumeTimeout/2 + timerSlack},
	} {
		for _, consumer := range []bool{false, true} { // which end lingers
			t.Run(fmt.Sprintf("%s/consumer=%v", name, consumer), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := memoryTest(t, ClientParams{})
					sender, shut := m.back, m.server.Close
					if consumer {
						sender, shut = m.conn, m.client.Close
					}
					start := time.Now()
					ended := make(chan outcome, 1)
					send := func(write func([]byte) (int, error), closeIt func() error) {
						m.bus.SetFilter(lose(-1, sequencedOf(sender)))
						if _, err := write([]byte("x")); err != nil {
							t.Error(err)
						}
						if err := closeIt(); err != nil {
							t.Error(err)
						}
						took(t, "Close", start, 0, 100*time.Millisecond) // the consumer had to hear from its producer
					}
					receive := func(recv func() ([]byte, error)) {
						n := 0
						for {
							rec, err := recv()
							if err != nil {
								ended <- outcome{err, time.Now()}
								if err == io.EOF && n != 1 {
									t.Errorf("%d records", n)
								}
								return
							}
							if n++; string(rec) != "x" {
								t.Errorf("record %q", rec)
							}
						}
					}
					m.handle(t, "linger", func(w *Writer, r *Request) error {
						if consumer {
							receive(r.Recv)
						} else {
							send(w.Write, w.Close)
						}
						return nil
					})
					s := openForAnHour(t, m, "linger")
					if consumer {
						send(s.Write, s.CloseSend)
					} else {
						go receive(s.Recv)
					}
					go func() {
						time.Sleep(min(c.lossy, time.Minute))
						m.bus.SetFilter(nil)
					}()
					if c.close {
						time.Sleep(defaultResumeTimeout / 2)
						before := time.Now()
						_ = shut()
						took(t, "closing the endpoint", before, 0, 0)
					}
					(<-ended).expect(t, "the end", c.want, start, c.atMin, c.atMax)
					time.Sleep(2 * time.Minute)
					_ = s.Close()
					m.nothingLeft(t)
				})
			})
		}
	}
}

// A packet that is lost and followed by none is repaired as soon as its acknowledgement is overdue.
func TestOverdue(t *testing.T) {
	for _, silence := range []time.Duration{0, 10 * time.Millisecond, time.Second, 10 * time.Second, time.Minute} {
		synctest.Test(t, func(t *testing.T) {
			m := memoryTest(t, ClientParams{})
			m.handle(t, "last", func(w *Writer, r *Request) error {
				for range 3 {
					if _, err := w.Write([]byte("x")); err != nil {
						return err
					}
					time.Sleep(10 * time.Millisecond)
				}
				time.Sleep(silence)
				m.bus.SetFilter(lose(1, sequencedOf(m.back)))
				if _, err := fmt.Fprint(w, time.Now().UnixNano()); err != nil {
					return err
				}
				_, _ = r.Recv()
				return nil
			})
			s := m.open(t, "last")
			for range 3 {
				if _, err := s.Recv(); err != nil {
					t.Fatal(err)
				}
			}
			rec, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			var at int64
			fmt.Sscan(string(rec), &at)
			took(t, fmt.Sprintf("repair after a silence of %v", silence), time.Unix(0, at), 0, defaultAckTimeout+2*maxTick)
			_ = s.Close()
			m.nothingLeft(t)
		})
	}
}

// A stream on which records flow is not asked whether it lives, in either direction, as long as credits come more often
// than KeepAlive.
func TestActiveStreamSendsNoPing(t *testing.T) {
	for _, up := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			m := memoryTest(t, ClientParams{KeepAlive: time.Second})
			pings, start := 0, time.Now()
			m.bus.SetFilter(func(_, _ *fake.Conn, msg *nats.Msg) bool {
				// Before, one may say where the handler is, and another ask for its first acknowledgement.
				if isFrame(msg.Data, FramePing) && time.Since(start) > time.Second {
					pings++
				}
				return true
			})
			const records = 3000 // 5 minutes
			send := func(write func([]byte) (int, error)) {
				for range records {
					if _, err := write(make([]byte, 100)); err != nil {
						t.Error(err)
						return
					}
					time.Sleep(defaultAckTimeout * 2 / 5)
				}
			}
			m.handle(t, "busy", func(w *Writer, r *Request) error {
				if !up {
					send(w.Write)
					return nil
				}
				if _, err := w.Write(nil); err != nil {
					return err
				}
				for _, err := range r.All() {
					if err != nil {
						return err
					}
				}
				return nil
			})
			s := m.open(t, "busy")
			if up {
				if _, err := s.Recv(); err != nil {
					t.Fatal(err)
				}
				send(s.Write)
				if err := s.CloseSend(); err != nil {
					t.Error(err)
				}
			}
			for _, err := range s.All() {
				if err != nil {
					t.Fatal(err)
				}
			}
			m.nothingLeft(t)
			if pings > 0 {
				t.Errorf("up=%v: %d PINGs for %d records", up, pings, records)
			}
		})
	}
}

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
	// What succeeds at once where only the peer is slow: these do not wait for it.
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

// zeros yields zeros without end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
