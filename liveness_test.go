package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/liveness"
	"github.com/natsstream/stream/internal/natsconn/fake"
	"github.com/natsstream/stream/internal/race"
)

// waits is a handler that reads until the consumer is done or the stream ends, and reports why its context ended.
func waits(ended chan<- error) Handler {
	return func(_ *Writer, r *Request) error {
		for _, err := range r.All() {
			if err != nil {
				<-r.Context().Done()
				ended <- context.Cause(r.Context())
				return err
			}
		}
		return nil
	}
}

// An hour in which nobody says anything: every stream lives, for a few control packets, no timer and no goroutine each.
func TestHourOfSilence(t *testing.T) {
	streams := 5000
	if testing.Short() || race.Enabled {
		streams = 500
	}
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "wait", waits(nil))
		runtime.GC() // while one is under way, NumGoroutine may count goroutines that have ended
		before := runtime.NumGoroutine()
		all := make([]*Stream, streams)
		for i := range all {
			all[i] = m.open(t, "wait")
		}
		time.Sleep(time.Minute)
		runtime.GC()
		if n := runtime.NumGoroutine() - before - streams; n > 10 { // one each is the handler's
			t.Errorf("%d goroutines beside the handlers'", n)
		}
		pings := 0
		m.bus.SetFilter(func(_, _ *fake.Conn, msg *nats.Msg) bool {
			if isFrame(msg.Data, FramePing) {
				pings++
			}
			return true
		})
		m.sent.take()
		m.sentBack.take()
		time.Sleep(time.Hour)
		synctest.Wait()
		m.bus.SetFilter(nil)
		sent, control := m.sent.take()
		back, backControl := m.sentBack.take()
		if sent != control || back != backControl {
			t.Errorf("%d and %d messages, of which %d and %d are control packets", sent, back, control, backControl)
		}
		// A question and an answer each time, or one answer to two questions at once. One end's question most often spares
		// the other its own. One question asks for all streams, and a rarer one for each.
		silence := time.Duration(max(streamSilence, int64(streams)*streamQuestion))
		if most := streams*int(time.Hour/(silence*9/10)) + 2*int(time.Hour/(defaultKeepAlive*9/10)); pings > most || sent+back > int64(2*pings) || sent+back < int64(2*pings-pings/100) {
			t.Errorf("%d PINGs in %d control packets, want at most %d and an answer to each", pings, sent+back, most)
		}
		if least := streams * int(time.Hour/(silence*11/10)); pings < least {
			t.Errorf("%d PINGs: %d would have been needed", pings, least)
		}
		for _, s := range all {
			if err := s.CloseSend(); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Recv(); err != io.EOF {
				t.Fatal(err)
			}
		}
		m.nothingLeft(t)
	})
}

// A peer that is gone, whether NATS knows or packets vanish, ends the stream at the other end with 1006, in time.
func TestPeerGone(t *testing.T) {
	const slack = 250 * time.Millisecond
	for name, c := range map[string]struct {
		consumer, vanish bool // who is left, and how the other one goes
	}{
		"consumer's connection is gone": {consumer: false},
		"producer's connection is gone": {consumer: true},
		"consumer vanishes":             {consumer: false, vanish: true},
		"producer vanishes":             {consumer: true, vanish: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				ended := make(chan error, 1)
				m.handle(t, "wait", waits(ended))
				s := m.open(t, "wait")
				time.Sleep(time.Minute)
				start := time.Now()
				limit := m.times.KeepAlive + m.times.ResumeTimeout + slack
				switch {
				case c.vanish:
					m.bus.SetFilter(fake.BlackHole(nil, nil))
					limit += liveness.SuspectPings * m.times.AckTimeout
				case c.consumer:
					m.back.Set(nats.RECONNECTING)
				default:
					m.conn.Set(nats.RECONNECTING)
				}
				var err error
				if c.consumer {
					_, err = s.Recv()
				} else {
					err = <-ended
				}
				if !errors.Is(err, &CloseError{Code: CloseAbnormalClosure}) {
					t.Errorf("ended with %v, want close 1006", err)
				}
				took(t, "noticing it", start, 0, limit)
				m.bus.SetFilter(nil)
				m.conn.Set(nats.CONNECTED)
				m.back.Set(nats.CONNECTED)
				time.Sleep(time.Minute)
				_ = s.Close()
				m.nothingLeft(t)
			})
		})
	}
}

// A silence of three seconds in either direction does no harm.
func TestBlackHoleHeals(t *testing.T) {
	for _, toServer := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			m := memoryTest(t, ClientParams{KeepAlive: time.Second})
			m.handle(t, "count", func(w *Writer, r *Request) error {
				for i := range 100 {
					time.Sleep(100 * time.Millisecond)
					if _, err := w.Write([]byte{byte(i)}); err != nil {
						return err
					}
				}
				return nil
			})
			s := m.open(t, "count")
			go func() {
				time.Sleep(4 * time.Second)
				if toServer {
					m.bus.SetFilter(fake.BlackHole(m.conn, m.back))
				} else {
					m.bus.SetFilter(fake.BlackHole(m.back, m.conn))
				}
				time.Sleep(3 * time.Second)
				m.bus.SetFilter(nil)
			}()
			i := 0
			for rec, err := range s.All() {
				if err != nil || len(rec) != 1 || int(rec[0]) != i {
					t.Fatalf("record %d: %v, %v", i, rec, err)
				}
				i++
			}
			if i != 100 {
				t.Errorf("%d records", i)
			}
			m.nothingLeft(t)
		})
	}
}

// Each kind of packet may be lost once, or three times, without harm to the stream.
func TestLostOnce(t *testing.T) {
	for name, match := range map[string]func([]byte) bool{
		"sequenced": isSequenced,
		"CLOSE":     hasClose,
		"CREDIT":    func(b []byte) bool { return isFrame(b, FrameCredit) },
		"PING":      func(b []byte) bool { return isFrame(b, FramePing) },
	} {
		for _, times := range []int{1, 3} {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.handle(t, "sync", func(w *Writer, r *Request) error {
					for range 3 {
						if _, err := w.Write([]byte("x")); err != nil {
							return err
						}
						if err := w.Sync(r.Context()); err != nil {
							return err
						}
					}
					return nil
				})
				left := times
				m.bus.SetFilter(func(_, _ *fake.Conn, msg *nats.Msg) bool {
					if left > 0 && match(msg.Data) {
						left--
						return false
					}
					return true
				})
				start := time.Now()
				s := m.open(t, "sync")
				n := 0
				for _, err := range s.All() {
					if err != nil {
						t.Fatalf("%s lost %d times: %v", name, times, err)
					}
					n++
				}
				if n != 3 {
					t.Errorf("%s lost %d times: %d records", name, times, n)
				}
				took(t, name, start, 0, 20*m.times.AckTimeout)
				time.Sleep(m.times.ResumeTimeout)
				m.nothingLeft(t)
			})
		}
	}
}

// While this end's own connection is down, clocks stand still until DisconnectTimeout; short outages do not add up.
func TestDisconnectTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "wait", waits(make(chan error, 1)))
		s := m.open(t, "wait")
		time.Sleep(time.Second)
		both := func(status nats.Status) { m.conn.Set(status); m.back.Set(status) }
		for range 2 {
			both(nats.RECONNECTING)
			time.Sleep(20 * time.Second) // more than KeepAlive, less than DisconnectTimeout
			both(nats.CONNECTED)
			time.Sleep(5 * time.Millisecond) // less than a tick
		}
		both(nats.RECONNECTING)
		time.Sleep(15 * time.Second)
		if s.Context().Err() != nil {
			t.Fatalf("ended with %v", context.Cause(s.Context()))
		}
		start := time.Now()
		_, err := s.Recv()
		if !errors.Is(err, &CloseError{Code: CloseAbnormalClosure}) || !errors.Is(err, nats.ErrDisconnected) {
			t.Errorf("ended with %v", err)
		}
		took(t, "giving up", start, 14*time.Second, 16*time.Second)
		time.Sleep(100 * time.Millisecond) // the other end's ticker may come second
		both(nats.CONNECTED)
		m.nothingLeft(t)
	})
}

// A half that was closed does not keep the other one from noticing that the peer is gone.
func TestPeerGoneAfterCloseSend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "stay", func(_ *Writer, r *Request) error { <-r.Context().Done(); return nil })
		s := m.open(t, "stay")
		if _, err := s.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		m.back.Set(nats.RECONNECTING)
		if err := s.CloseSend(); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		if _, err := s.Recv(); !errors.Is(err, &CloseError{Code: CloseAbnormalClosure}) {
			t.Errorf("ended with %v", err)
		}
		took(t, "noticing it", start, 0, m.times.KeepAlive+m.times.ResumeTimeout+time.Second)
		m.back.Set(nats.CONNECTED)
		time.Sleep(time.Minute)
		m.nothingLeft(t)
	})
}

// A producer without a Server answers when it is asked whether it lives.
func TestWriterAnswersPing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{KeepAlive: time.Second})
		back := &Client{ep: m.server.ep, codec: MsgPack}
		writers := make(chan *Writer, 1)
		stop, err := m.back.Subscribe("old", "", func(msg *nats.Msg) { writers <- back.NewWriter(msg.Reply) })
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		s := m.open(t, "old")
		w := <-writers
		time.Sleep(time.Hour)
		if _, err := w.Write([]byte("still here")); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if rec, err := s.Recv(); string(rec) != "still here" || err != nil {
			t.Errorf("%q, %v", rec, err)
		}
		if _, err := s.Recv(); err != io.EOF {
			t.Error(err)
		}
		m.nothingLeft(t)
	})
}

// A request that waited for the connection was not lost with it: whoever answers it may take its time.
func TestRequestAfterReconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		stop, err := m.back.Subscribe("slow", "", func(msg *nats.Msg) {
			time.AfterFunc(3*m.times.ResumeTimeout, func() {
				_ = m.back.Publish(msg.Reply, "", jsonwire.AppendClose(nil, jsonwire.Close{Code: CloseNormalClosure}))
			})
		})
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		m.conn.Set(nats.RECONNECTING)
		s := m.open(t, "slow")
		time.Sleep(time.Second)
		m.conn.Set(nats.CONNECTED)
		if _, err := s.Recv(); err != io.EOF {
			t.Error(err)
		}
		m.nothingLeft(t)
	})
}

// recorded makes an endpoint in a bubble whose messages conn takes.
func recorded(t *testing.T, conn *recorder) *endpoint {
	t.Helper()
	p, err := ClientParams{}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	ep, err := newEndpoint(conn, "", p)
	if err != nil {
		t.Fatal(err)
	}
	return ep
}

// A stream that has come to its end is given up when nothing is acknowledged any longer, not while what was sent arrives bit
// by bit.
func TestEndIsKeptWhileItArrives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := newRecorder(nil)
		ep := recorded(t, conn)
		ep.times.Patience = int64(time.Hour) // this peer answers no questions
		defer ep.close(testClosed)
		w := (&Client{ep: ep, codec: MsgPack}).NewWriter(consumerSubject(5))
		for range 3 {
			if _, err := w.Write(make([]byte, coalesceSize*5/8)); err != nil { // a packet each
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		s := w.session
		for ack := range w.published.Load() + 1 {
			if s.end.Load() != nil {
				t.Fatalf("given up after packet %d was acknowledged: %v", ack, s.end.Load().err)
			}
			credit := Credit{Ack: ack, Packets: 32, Bytes: 1 << 30}
			ep.receive(&nats.Msg{Subject: s.reply, Data: AppendPacket(nil, PacketHeader{Sender: 9}, Frame{Type: FrameCredit, Payload: AppendCredit(nil, credit)})})
			time.Sleep(defaultResumeTimeout * 4 / 5)
			synctest.Wait()
		}
		if n := ep.sessions.Size(); n != 0 {
			t.Errorf("%d streams are left", n)
		}
	})
}

// A connection that takes no bytes holds up the outbox. Streams end in time all the same.
func TestConnectionTakesNoBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		conn := newRecorder(func(n int, _ []byte) error {
			if n > 0 {
				<-release
			}
			return nil
		})
		ep := recorded(t, conn)
		w := (&Client{ep: ep, codec: MsgPack}).NewWriter(consumerSubject(5))
		if _, err := w.Write([]byte("a")); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte("b")); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		err := w.Flush()
		if !errors.Is(err, &CloseError{Code: CloseAbnormalClosure}) {
			t.Errorf("Flush: %v", err)
		}
		if took, most := time.Since(start), defaultKeepAlive+defaultResumeTimeout; took < most/2 || took > most+2*maxTick {
			t.Errorf("after %v, want %v", took, most)
		}
		synctest.Wait() // Flush returns while the ticker is still at it
		if n := ep.sessions.Size(); n != 0 {
			t.Errorf("%d streams are left", n)
		}
		close(release)
		ep.close(testClosed)
	})
}

// An end draws its number from another set than its peer: a RESET with its own number is an answer to it. All 47 bits beside
// that one are random, so that two producers do not draw the same.
func TestSenderNumbers(t *testing.T) {
	seen := map[uint64]bool{}
	ones, zeros := uint64(0), uint64(0)
	for range 10_000 {
		consumer, producer := newSender(true), newSender(false)
		if consumer%2 != 1 || producer%2 != 0 {
			t.Fatal("a consumer's number is even, or a producer's odd")
		}
		for _, n := range []uint64{consumer, producer} {
			if n > maxSender || seen[n] {
				t.Fatalf("%#x was drawn before, or is too large", n)
			}
			seen[n] = true
			ones, zeros = ones|n, zeros|^n
		}
	}
	if ones != maxSender || zeros&maxSender != maxSender {
		t.Errorf("bits that were ever set: %#x, ever clear: %#x", ones, zeros&maxSender)
	}
}

// flap breaks the connections again and again until stop is called: up for up, down for down.
func flap(up, down time.Duration, conns ...*fake.Conn) (stop func()) {
	quit, ended := make(chan struct{}), make(chan struct{})
	set := func(s nats.Status, d time.Duration) bool {
		for _, c := range conns {
			c.Set(s)
		}
		select {
		case <-quit:
			return false
		case <-time.After(d):
			return true
		}
	}
	go func() {
		defer close(ended)
		for set(nats.RECONNECTING, down) && set(nats.CONNECTED, up) {
		}
	}()
	return func() {
		close(quit)
		<-ended
		for _, c := range conns {
			c.Set(nats.CONNECTED)
		}
	}
}

// Time that the connection was up counts, also if it breaks again and again. A peer that is gone is given up, a request
// that was lost is, and so is an end that nobody acknowledges.
func TestTimeAddsUpOverReconnects(t *testing.T) {
	for _, up := range []time.Duration{3 * time.Second, 700 * time.Millisecond, 200 * time.Millisecond} {
		down := up / 2
		// limit is how long d of connected time takes, at most.
		limit := func(d time.Duration) time.Duration { return d + (d/up+2)*down + time.Second }
		ends := func(name string, most func(p ClientParams) time.Duration, f func(t *testing.T, m *memoryPair, stop func()) error) {
			t.Run(fmt.Sprintf("%s/up=%v", name, up), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := memoryTest(t, ClientParams{})
					stop := func() {}
					start := time.Now()
					if err := f(t, m, func() { start, stop = time.Now(), flap(up, down, m.conn, m.back) }); !errors.Is(err, &CloseError{Code: CloseAbnormalClosure}) {
						t.Errorf("ended with %v", err)
					}
					took(t, "the end", start, 0, limit(most(m.times)))
					stop()
					m.bus.SetFilter(nil)
					time.Sleep(time.Minute)
					m.nothingLeft(t)
				})
			})
		}
		silence := func(p ClientParams) time.Duration { return p.KeepAlive + 4*p.AckTimeout + 2*p.ResumeTimeout }
		resume := func(p ClientParams) time.Duration { return 2 * p.ResumeTimeout }
		ends("producer gone", silence, func(t *testing.T, m *memoryPair, broken func()) error {
			m.handle(t, "wait", waits(make(chan error, 1)))
			s := openForAnHour(t, m, "wait")
			time.Sleep(time.Second)
			m.bus.SetFilter(fake.BlackHole(nil, nil))
			broken()
			_, err := s.Recv()
			return err
		})
		ends("consumer gone", silence, func(t *testing.T, m *memoryPair, broken func()) error {
			ended := make(chan error, 1)
			m.handle(t, "wait", waits(ended))
			s := openForAnHour(t, m, "wait")
			time.Sleep(time.Second)
			m.bus.SetFilter(fake.BlackHole(nil, nil))
			broken()
			err := <-ended
			_ = s.Close()
			return err
		})
		ends("request lost", resume, func(t *testing.T, m *memoryPair, broken func()) error {
			m.handle(t, "wait", waits(make(chan error, 1)))
			m.bus.SetFilter(fake.BlackHole(m.conn, nil))
			s := openForAnHour(t, m, "wait")
			synctest.Wait()
			broken()
			_, err := s.Recv()
			return err
		})
		ends("end not acknowledged", resume, func(t *testing.T, m *memoryPair, broken func()) error {
			ended := make(chan error, 1)
			m.handle(t, "close", func(w *Writer, _ *Request) error {
				m.bus.SetFilter(fake.BlackHole(nil, nil))
				if err := w.Close(); err != nil {
					return err
				}
				broken()
				ended <- w.Sync(context.Background())
				return nil
			})
			s := openForAnHour(t, m, "close")
			err := <-ended
			_ = s.Close()
			return err
		})
	}
}

// A connection that breaks again and again does no harm to streams whose ends both live.
func TestStreamsSurviveReconnects(t *testing.T) {
	for _, up := range []time.Duration{3 * time.Second, 700 * time.Millisecond} {
		t.Run(fmt.Sprintf("up=%v", up), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.handle(t, "echo", func(w *Writer, r *Request) error { _, err := r.WriteTo(w); return err })
				quiet, busy := openForAnHour(t, m, "echo"), openForAnHour(t, m, "echo")
				time.Sleep(time.Second)
				stop := flap(up, up/2, m.conn)
				read := make(chan int)
				go func() {
					n := 0
					for _, err := range busy.All() {
						if err != nil {
							t.Error(err)
						}
						n++
					}
					read <- n
				}()
				for i := range 300 {
					if _, err := busy.Write([]byte{byte(i)}); err != nil {
						t.Error(err)
						break
					}
					time.Sleep(time.Second)
				}
				stop()
				for _, s := range []*Stream{quiet, busy} {
					if err := s.CloseSend(); err != nil {
						t.Error(err)
					}
				}
				if n := <-read; n != 300 {
					t.Errorf("%d records", n)
				}
				if _, err := quiet.Recv(); err != io.EOF {
					t.Error(err)
				}
				m.nothingLeft(t)
			})
		})
	}
}

// An end whose process stood still, or whose clock was set, has not heard its peers meanwhile: that is no silence of theirs.
func TestStandstillIsNoSilence(t *testing.T) {
	for _, jump := range []time.Duration{time.Second, 6 * time.Second, time.Minute, 24 * time.Hour} {
		for _, consumer := range []bool{true, false} { // whose clock jumps
			for _, state := range []string{"idle", "asked", "suspect", "closing"} {
				t.Run(fmt.Sprintf("jump=%v/consumer=%v/%s", jump, consumer, state), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						m := memoryTest(t, ClientParams{})
						ep, conn := m.server.ep, m.back
						if consumer {
							ep, conn = m.client.ep, m.conn
						}
						ended := make(chan error, 1)
						m.handle(t, "wait", func(w *Writer, r *Request) error {
							for _, err := range r.All() {
								if err != nil {
									ended <- err
									return err
								}
							}
							err := w.Close()
							if err == nil {
								err = w.Sync(t.Context())
							}
							ended <- err
							return err
						})
						s := openForAnHour(t, m, "wait")
						time.Sleep(time.Second)
						switch state {
						case "idle":
						case "asked":
							m.bus.SetFilter(fake.BlackHole(nil, nil))
							time.Sleep(m.times.KeepAlive + m.times.AckTimeout)
						case "suspect":
							m.bus.SetFilter(fake.BlackHole(nil, nil))
							time.Sleep(m.times.KeepAlive + defaultPatience/4)
						case "closing":
							m.bus.SetFilter(lose(-1, frameOf(conn, FrameCredit)))
							if err := s.CloseSend(); err != nil {
								t.Fatal(err)
							}
							time.Sleep(m.times.ResumeTimeout / 2)
						}
						var jumped sync.Once // when the end publishes next, since the clock is read by who publishes
						done := make(chan struct{})
						m.bus.SetFilter(func(from, _ *fake.Conn, _ *nats.Msg) bool {
							if from == conn {
								jumped.Do(func() { ep.started = ep.started.Add(-jump); close(done) })
							}
							return true
						})
						<-done
						time.Sleep(defaultPatience / 4)
						if s.Context().Err() != nil && state != "closing" {
							t.Errorf("the stream ended with %v", context.Cause(s.Context()))
						}
						if err := s.CloseSend(); err != nil {
							t.Error(err)
						}
						if err := s.Sync(t.Context()); err != nil {
							t.Errorf("Sync: %v", err)
						}
						if _, err := s.Recv(); err != io.EOF {
							t.Errorf("Recv: %v", err)
						}
						if err := <-ended; err != nil {
							t.Errorf("the handler: %v", err)
						}
						m.nothingLeft(t)
					})
				})
			}
		}
	}
}

// No peer is given up while this end drops answers for want of room.
func TestDroppedAnswersAreNoSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "wait", waits(make(chan error, 1)))
		s := openForAnHour(t, m, "wait")
		time.Sleep(time.Second)
		m.bus.SetFilter(fake.BlackHole(nil, nil))
		for range 10 * 60 * 20 { // ten minutes
			m.client.ep.outbox.dropped.Store(true)
			time.Sleep(maxTick)
		}
		if s.Context().Err() != nil {
			t.Errorf("given up: %v", context.Cause(s.Context()))
		}
		start := time.Now()
		if _, err := s.Recv(); !errors.Is(err, &CloseError{Code: CloseAbnormalClosure}) {
			t.Errorf("ended with %v", err)
		}
		took(t, "noticing it", start, 0, m.times.KeepAlive+4*m.times.AckTimeout+m.times.ResumeTimeout+timerSlack)
		m.bus.SetFilter(nil)
		time.Sleep(time.Minute)
		m.nothingLeft(t)
	})
}

// What finds no room on the way to the outbox is noted, if it belongs to a stream: it may be an answer.
func TestDroppedAnswersAreNoted(t *testing.T) {
	var o outbox
	ep := new(endpoint)
	ep.outbox.init(ep)
	o.init(ep)
	for range maxInbound {
		o.deliver(control{session: new(session)})
	}
	if o.deliver(control{}); o.dropped.Load() {
		t.Error("a stranger's packet was noted")
	}
	if o.deliver(control{session: new(session)}); !o.dropped.Load() {
		t.Error("a stream's packet was not noted")
	}
	if n := ep.counters.overrun.Load(); n != 2 {
		t.Errorf("%d packets counted, want 2", n)
	}
}
