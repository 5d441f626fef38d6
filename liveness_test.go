package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/liveness"
	"github.com/natsstream/stream/internal/natsconn/fake"
	"github.com/natsstream/stream/internal/race"
)

// An hour in which nobody says anything: every stream lives, for a few control packets, no timer and no goroutine each.
func TestStreamsSurviveAnHourOfSilence(t *testing.T) {
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
		// A question and an answer each time, or one answer to two questions at once. One end's question most often
		// spares the other its own. One question asks for all streams, and a rarer one for each.
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
func TestPeerThatIsGoneEndsTheStream(t *testing.T) {
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

// A half that was closed does not keep the other one from noticing that the peer is gone.
func TestPeerThatIsGoneAfterCloseSendIsNoticed(t *testing.T) {
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

func sendSlowly(write func([]byte) (int, error)) (err error) {
	for err == nil {
		_, err = write([]byte("x"))
		time.Sleep(50 * time.Millisecond)
	}
	return err
}

func syncSlowly(w interface {
	io.Writer
	Sync(context.Context) error
}) (err error) {
	for err == nil {
		if _, err = w.Write([]byte("x")); err == nil {
			err = w.Sync(context.Background())
		}
		time.Sleep(50 * time.Millisecond)
	}
	return err
}

// With default parameters a peer that dies is noticed within four seconds, whether NATS knows or not, and whatever the
// one that is left does.
func TestDeadPeerIsNoticedSoon(t *testing.T) {
	ends := map[string]struct {
		handler  func(w *Writer, r *Request) error // until the end
		consumer func(s *Stream) error
	}{
		"idle":   {func(_ *Writer, r *Request) error { <-r.Context().Done(); return context.Cause(r.Context()) }, func(s *Stream) error { time.Sleep(10*time.Second + noticed/2); return drain(s.Recv) }},
		"reads":  {func(_ *Writer, r *Request) error { return drain(r.Recv) }, func(s *Stream) error { return drain(s.Recv) }},
		"writes": {func(w *Writer, _ *Request) error { return sendSlowly(w.Write) }, func(s *Stream) error { return sendSlowly(s.Write) }},
		"syncs":  {func(w *Writer, _ *Request) error { return syncSlowly(w) }, func(s *Stream) error { return syncSlowly(s) }},
	}
	for name, end := range ends {
		for _, consumer := range []bool{true, false} { // who is left
			for _, vanish := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s/consumer=%v/vanish=%v", name, consumer, vanish), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						m := memoryTest(t, ClientParams{})
						ended := make(chan outcome, 1)
						m.handle(t, "stay", func(w *Writer, r *Request) error {
							if consumer {
								return drain(r.Recv)
							}
							err := end.handler(w, r)
							ended <- outcome{err, time.Now()}
							return err
						})
						s := openForAnHour(t, m, "stay")
						go func() {
							if !consumer {
								_ = drain(s.Recv)
								return
							}
							ended <- outcome{end.consumer(s), time.Now()}
						}()
						time.Sleep(10 * time.Second)
						start := time.Now()
						switch {
						case vanish:
							m.bus.SetFilter(fake.BlackHole(nil, nil))
						case consumer:
							m.back.Set(nats.RECONNECTING)
						default:
							m.conn.Set(nats.RECONNECTING)
						}
						(<-ended).expect(t, "noticing it", &CloseError{Code: CloseAbnormalClosure}, start, 0, noticed)
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
	}
}

// A silence of three seconds in either direction does no harm.
func TestShortSilenceDoesNoHarm(t *testing.T) {
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

// A stream that has come to its end is given up when nothing is acknowledged any longer, not while what was sent
// arrives bit by bit.
func TestEndIsKeptWhileItArrives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := newRecorder(nil)
		c := fakeClient(t, conn, ClientParams{})
		ep := c.ep
		ep.times.Patience = int64(time.Hour) // this peer answers no questions
		defer ep.close(testClosed)
		w := c.NewWriter(consumerSubject(5))
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
		for ack := range w.sender.published.Load() + 1 {
			if s.end.Load() != nil {
				t.Fatalf("given up after packet %d was acknowledged: %v", ack, s.end.Load().err)
			}
			credit := Credit{Ack: ack, Packets: 32, Bytes: 1 << 30}
			ep.receive(&nats.Msg{Subject: s.reply(), Data: AppendPacket(nil, PacketHeader{Sender: 9}, Frame{Type: FrameCredit, Payload: AppendCredit(nil, credit)})}, nil)
			time.Sleep(defaultResumeTimeout * 4 / 5)
			synctest.Wait()
		}
		if n := ep.sessions.Size(); n != 0 {
			t.Errorf("%d streams are left", n)
		}
	})
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

// An end whose process stood still, or whose clock was set, has not heard its peers meanwhile: that is no silence of
// theirs.
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

// A control packet that finds no room on the way to the outbox is noted if it belongs to a stream: it may be an answer.
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

// openIdle opens n streams on which nothing happens.
func openIdle(t *testing.T, m *memoryPair, n int) []*Stream {
	t.Helper()
	m.handle(t, "wait", waits(make(chan error, n)))
	all := make([]*Stream, n)
	for i := range all {
		all[i] = openForAnHour(t, m, "wait")
	}
	time.Sleep(time.Second)
	return all
}

// scaledDown is n, or a tenth of it with -short and under the race detector.
func scaledDown(n int) int {
	if testing.Short() || race.Enabled {
		return n / 10
	}
	return n
}

// One question asks for all streams that two ends share. The number of questions about single streams is bounded.
func TestOneQuestionAsksForAllStreams(t *testing.T) {
	const duration = 5 * time.Minute
	for _, n := range []int{1, 10, scaledDown(1000), scaledDown(10_000)} {
		t.Run(fmt.Sprintf("streams=%d", n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				all := openIdle(t, m, n)
				pings := 0
				m.bus.SetFilter(func(_, _ *fake.Conn, msg *nats.Msg) bool {
					if isFrame(msg.Data, FramePing) {
						pings++
					}
					return true
				})
				time.Sleep(duration)
				synctest.Wait()
				m.bus.SetFilter(nil)
				peers := int(duration/(defaultKeepAlive*9/10)) + 1
				single := int(duration/time.Duration(max(min(keepAlivesPerStream*int64(defaultKeepAlive), streamSilence), int64(n)*streamQuestion)*9/10)) * n
				if most := 2*peers + single + n; pings > most {
					t.Errorf("%d PINGs in %v, at most %d are needed", pings, duration, most)
				}
				if least := int(duration/(2*defaultKeepAlive)) + single/2; pings < least {
					t.Errorf("%d PINGs in %v, at least %d are needed", pings, duration, least)
				}
				finish(t, all)
				m.nothingLeft(t)
			})
		})
	}
}

// The more streams there are, the rarer is each asked; and the more do not answer, the rarer is that repeated.
func TestQuestionsAboutStreamsAreSpread(t *testing.T) {
	second := int64(time.Second)
	ep := &endpoint{times: liveness.Intervals{KeepAlive: second / 2, Ack: second / 4, Resume: 3 * second, Disconnect: 30 * second}}
	ep.outbox.init(ep)
	ep.initTime()
	o := &ep.outbox
	set := make([]session, 20_000)
	for n := range set {
		o.spread()
		if perSecond := float64(n) / time.Duration(o.streamTimes.KeepAlive).Seconds(); perSecond > 126 {
			t.Fatalf("%d streams are asked %.0f times a second", n, perSecond)
		}
		if d := time.Duration(o.streamTimes.KeepAlive); n < 1000 && d > 15*time.Second {
			t.Fatalf("each of %d streams is asked every %v", n, d)
		}
		if perSecond := float64(o.asking) / time.Duration(o.repeat).Seconds(); perSecond > 20_001 {
			t.Fatalf("%.0f questions a second are repeated", perSecond)
		}
		p := &remote{}
		if perSecond := float64(n) / time.Duration(p.keepAlive(o)).Seconds(); perSecond > 2001 {
			t.Fatalf("%d other ends are asked %.0f times a second", n, perSecond)
		}
		p.shortest = second
		if d := p.keepAlive(o); d > second/patienceParts {
			t.Fatalf("an end whose stream has a patience of a second is asked every %v", time.Duration(d))
		}
		o.lookAtRemote(p, int64(n)*1e6)
		o.wheel.Set(&set[n], int64(n)*1e6)
		o.asking += 100
	}
}

// A stream that gets no answers does no harm to others of the same peer, which are not asked at the time.
func TestStreamWithoutAnswersHarmsNoOther(t *testing.T) {
	for _, n := range []int{2, 3, 20} {
		synctest.Test(t, func(t *testing.T) {
			m := memoryTest(t, ClientParams{})
			all := openIdle(t, m, n)
			broken := all[1]
			start := time.Now()
			m.bus.SetFilter(func(_, _ *fake.Conn, msg *nats.Msg) bool { return msg.Subject != broken.session.reply() })
			if _, err := broken.Recv(); !errors.Is(err, &CloseError{Code: CloseAbnormalClosure}) {
				t.Errorf("it ended with %v", err)
			}
			took(t, "noticing it", start, 0, time.Duration(streamSilence)+time.Second+defaultResumeTimeout+timerSlack)
			time.Sleep(10 * time.Minute)
			finish(t, append(all[:1:1], all[2:]...))
			m.bus.SetFilter(nil)
			m.nothingLeft(t)
		})
	}
}

// Records that arrive on one stream are a sign of life for all of its peer.
func TestRecordsAreSignsOfLifeForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		all := openIdle(t, m, 20)
		m.handle(t, "send", func(w *Writer, _ *Request) error { return sendSlowly(w.Write) })
		busy := openForAnHour(t, m, "send")
		go func() { _ = drain(busy.Recv) }()
		time.Sleep(time.Second)
		m.bus.SetFilter(lose(-1, func(from, _ *fake.Conn, msg *nats.Msg) bool { return from == m.back && !isSequenced(msg.Data) }))
		time.Sleep(10 * time.Second)
		m.bus.SetFilter(nil)
		_ = busy.Close()
		finish(t, all)
		m.nothingLeft(t)
	})
}

// Streams that end with their first packet show that their peer lives, like others.
func TestShortStreamsAreSignsOfLifeForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		all := openIdle(t, m, 20)
		m.handle(t, "short", func(w *Writer, _ *Request) error { _, err := w.Write([]byte("x")); return err })
		m.bus.SetFilter(lose(-1, func(from, _ *fake.Conn, msg *nats.Msg) bool { return from == m.back && !isSequenced(msg.Data) }))
		for range 50 {
			time.Sleep(200 * time.Millisecond)
			if err := drain(openForAnHour(t, m, "short").Recv); err != nil {
				t.Fatal(err)
			}
		}
		m.bus.SetFilter(nil)
		finish(t, all)
		m.nothingLeft(t)
	})
}

// Many streams whose questions wait on a slow line do not fill it with repetitions.
func TestFewOfManyUnansweredQuestionsAreRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.bus.Delay = time.Second
		const streams, trip = 500, 2 * time.Second
		var questions atomic.Int64
		m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
			if from == m.back && isFrame(msg.Data, FramePing) {
				questions.Add(1)
			}
			return true
		})
		m.handle(t, "wait", waits(make(chan error, streams)))
		all := make([]*Stream, streams)
		for i := range all {
			all[i] = openForAnHour(t, m, "wait")
		}
		time.Sleep(m.bus.Delay + trip)
		free := int(trip / (defaultAckTimeout / unpaidPart))
		asked := int(questions.Load())
		if most := streams + firstPaid + free; asked < streams || asked > most {
			t.Errorf("%d questions before the first answer, at most %d may be", asked, most)
		}
		m.bus.SetFilter(nil)
		time.Sleep(10 * time.Second)
		finish(t, all)
		time.Sleep(10 * time.Second)
		m.nothingLeft(t)
	})
}

// After a reconnect, idle streams ask as the peer answers. They do not fill a slow line with questions. Each asks in
// the end. The same holds for streams whose last packets are not acknowledged.
func TestIdleStreamsAskInTurnAfterAReconnect(t *testing.T) {
	type params struct {
		delay      time.Duration
		unacked    bool
		reconnects int
	}
	for name, delay := range map[string]time.Duration{"fast": time.Millisecond, "slow": 500 * time.Millisecond} {
		for _, x := range []params{{delay, false, 1}, {delay, false, 3}, {delay, true, 1}, {delay, true, 3}} {
			reconnects := x.reconnects
			t.Run(fmt.Sprintf("%s, %d times, unacked=%v", name, reconnects, x.unacked), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := memoryTest(t, ClientParams{})
					m.bus.Delay = delay
					streams := scaledDown(2000)
					all := openIdle(t, m, streams)
					if x.unacked {
						for _, s := range all {
							if _, err := s.Write([]byte("x")); err != nil {
								t.Fatal(err)
							}
						}
						synctest.Wait()
					}
					var questions atomic.Int64
					asked := make(map[string]bool) // guarded by the bus
					m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
						if from == m.conn && isFrame(msg.Data, FramePing) {
							questions.Add(1)
							asked[msg.Subject] = true
						}
						return true
					})
					free, ofPeer := int64(2*delay/(defaultAckTimeout/unpaidPart))+2, int64(2*delay/defaultAckTimeout)+2
					most := firstPaid + free + ofPeer // before the first answer
					for i := range reconnects {
						questions.Store(0)
						m.conn.Set(nats.RECONNECTING)
						time.Sleep(100 * time.Millisecond)
						m.conn.Set(nats.CONNECTED)
						time.Sleep(2*delay - 1)
						if n := questions.Load(); n > most {
							t.Errorf("%d questions after reconnect %d, want at most %d", n, i, most)
						}
						if i == 0 {
							most *= 2 // questions of before may be answered now, and each answer pays for one more
						}
					}
					time.Sleep(time.Duration(streams/firstPaid+10) * 2 * delay)
					m.bus.SetFilter(nil)
					if len(asked) != streams {
						t.Errorf("%d of %d streams have asked", len(asked), streams)
					}
					finish(t, all)
					time.Sleep(10 * time.Second)
					m.nothingLeft(t)
					if n := len(m.client.ep.outbox.askers); n != 0 {
						t.Errorf("%d lists of streams are left", n)
					}
				})
			})
		}
	}
}

// A consumer's RESET that was lost is noticed although its end lives.
func TestLostResetIsNoticedAtALivingPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		all := openIdle(t, m, 10)
		ended := make(chan outcome, 1)
		m.handle(t, "left", func(_ *Writer, r *Request) error {
			<-r.Context().Done()
			ended <- outcome{context.Cause(r.Context()), time.Now()}
			return nil
		})
		s := openForAnHour(t, m, "left")
		time.Sleep(time.Second)
		m.bus.SetFilter(lose(1, frameOf(m.conn, FrameReset)))
		start := time.Now()
		_ = s.Close()
		(<-ended).expect(t, "noticing it", &CloseError{Code: CloseCanceled}, start, 0, time.Duration(streamSilence)+timerSlack)
		m.bus.SetFilter(nil)
		finish(t, all)
		m.nothingLeft(t)
	})
}

// A peer that dies takes its own streams with it, and no others.
func TestPeersAreJudgedApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		all := openIdle(t, m, 10)
		conn := m.bus.Connect("other")
		ep, err := newEndpoint(conn, "", m.times)
		if err != nil {
			t.Fatal(err)
		}
		other := &Client{ep: ep, codec: MsgPack}
		ended := make(chan outcome, 20)
		m.handle(t, "other", func(_ *Writer, r *Request) error {
			err := drain(r.Recv)
			ended <- outcome{err, time.Now()}
			return err
		})
		for range cap(ended) {
			if _, err := other.Open(t.Context(), "other", nil); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(time.Second)
		start := time.Now()
		conn.Set(nats.CLOSED)
		for range cap(ended) {
			(<-ended).expect(t, "the other's stream", &CloseError{Code: CloseAbnormalClosure}, start, 0, noticed)
		}
		_ = other.Close()
		time.Sleep(time.Minute)
		finish(t, all)
		m.nothingLeft(t)
	})
}

// A stream may have a patience of its own, shorter or longer than that of others to the same peer, at either end, and
// change it.
func TestSetPeerTimeoutChangesPatienceOfOneStream(t *testing.T) {
	for _, d := range []time.Duration{300 * time.Millisecond, time.Second, 2 * time.Second, 10 * time.Second, time.Minute} {
		for _, vanish := range []bool{true, false} {
			for _, consumer := range []bool{true, false} { // whose patience it is
				t.Run(fmt.Sprintf("%v/vanish=%v/consumer=%v", d, vanish, consumer), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						m := memoryTest(t, ClientParams{AckTimeout: 50 * time.Millisecond})
						ended := make(chan outcome, 1)
						m.handle(t, "own", func(w *Writer, r *Request) error {
							if !consumer {
								w.SetPeerTimeout(d)
								err := drain(r.Recv)
								ended <- outcome{err, time.Now()}
								return err
							}
							return drain(r.Recv)
						})
						others := openIdle(t, m, 3)
						s := openForAnHour(t, m, "own")
						go func() {
							if consumer {
								s.SetPeerTimeout(time.Hour)
								s.SetPeerTimeout(d)
								_, err := s.Recv()
								ended <- outcome{err, time.Now()}
							}
						}()
						time.Sleep(time.Minute) // nobody is given up
						start := time.Now()
						switch {
						case vanish:
							m.bus.SetFilter(fake.BlackHole(nil, nil))
						case consumer:
							m.back.Set(nats.RECONNECTING)
						default:
							m.conn.Set(nats.RECONNECTING)
						}
						least := time.Duration(0)
						if d > 3*time.Second { // the peer was heard a KeepAlive ago, and no answer was to be expected then
							least = d - defaultKeepAlive - timerSlack
						}
						(<-ended).expect(t, "its end", &CloseError{Code: CloseAbnormalClosure}, start, least, d+timerSlack)
						m.bus.SetFilter(nil)
						m.conn.Set(nats.CONNECTED)
						m.back.Set(nats.CONNECTED)
						time.Sleep(time.Minute)
						for _, s := range others {
							_ = s.Close()
						}
						_ = s.Close()
						m.nothingLeft(t)
					})
				})
			}
		}
	}
	t.Run("survives", func(t *testing.T) { // what others do not
		synctest.Test(t, func(t *testing.T) {
			m := memoryTest(t, ClientParams{})
			all := openIdle(t, m, 3)
			other := all[1]
			m.handle(t, "patient", func(w *Writer, r *Request) error { w.SetPeerTimeout(time.Minute); return drain(r.Recv) })
			own := openForAnHour(t, m, "patient")
			own.SetPeerTimeout(time.Minute)
			time.Sleep(time.Second)
			m.bus.SetFilter(fake.BlackHole(nil, nil))
			if _, err := other.Recv(); !errors.Is(err, &CloseError{Code: CloseAbnormalClosure}) {
				t.Errorf("the other ended with %v", err)
			}
			time.Sleep(30 * time.Second)
			m.bus.SetFilter(nil)
			time.Sleep(time.Second)
			finish(t, []*Stream{own})
			for _, s := range all {
				_ = s.Close()
			}
			m.nothingLeft(t)
		})
	})
	t.Run("without a peer", func(t *testing.T) {
		var w *Writer = (*Client)(nil).NewWriter("x")
		w.SetPeerTimeout(time.Second) // it can never write
	})
}

// The streams of one end are told by their subjects, which differ in the token alone. A subject that was mapped between
// accounts tells nothing.
func TestRemoteNameIsTheSubjectWithoutToken(t *testing.T) {
	for subject, want := range map[string]string{
		"_SINBOX.abc.~1m5I00000000001": "_SINBOX.abc",
		"alice.abc.~1j5G00000000002":   "alice.abc",
		"_R_.abcdef.ghijklmn":          "_R_.abcdef.ghijklmn ",
		"_R_.abcdef.~1m5I":             "_R_.abcdef.~1m5I ",
		"~1m5I00000000001":             "~1m5I00000000001 ",
		"inbox":                        "inbox ",
		"_SINBOX.abc":                  "_SINBOX.abc ", // this name belongs to another end
	} {
		if got := remoteName(subject); got != want {
			t.Errorf("%s: %s, want %s", subject, got, want)
		}
	}
}

// Streams of one end share the knowledge about it. Ends that cannot be told apart by their subjects are asked each on
// its own.
func TestStreamsOfOneEndAreAskedTogether(t *testing.T) {
	ep := &endpoint{ctx: t.Context(), started: time.Now(), times: liveness.Intervals{KeepAlive: 1e9, Ack: 1e8, Resume: 1e9, Disconnect: 1e9}}
	ep.outbox.init(ep)
	ep.initTime()
	o := &ep.outbox
	var all []*session
	for i := range 20 {
		subject := consumerSubject(5)
		if i%2 == 1 {
			subject = fmt.Sprintf("_R_.abc.%d", i)
		}
		s := ep.newProducer(lifecycle.Writer, t.Context(), subject, Token{}, false, 0).session
		all = append(all, s)
		o.joinRemote(s)
		o.joinRemote(s)
	}
	if n := len(o.remotes); n != 11 {
		t.Errorf("%d ends, want one of ten streams and ten of one", n)
	}
	seen := make(map[*session]bool)
	for range 10 {
		seen[o.speaker(all[0].remote.Load(), 1)] = true
	}
	if len(seen) != 10 {
		t.Errorf("an end with 10 streams is asked on %d", len(seen))
	}
	all[0].out.peer = "_R_.abc.moved"
	if o.joinRemote(all[0]); o.remoteWheel.Len() != 12 || all[0].remote.Load().name != all[0].out.peer+noToken {
		t.Errorf("a stream that moved has the end %q of %d", all[0].remote.Load().name, o.remoteWheel.Len())
	}
	for i, s := range all {
		n := 0
		if i != 0 && i%2 == 0 {
			n = len(s.remote.Load().streams)
			if want := (len(all) - i) / 2; n != want {
				t.Errorf("%d streams are left, want %d", n, want)
			}
		}
		o.leaveRemote(s)
		o.leaveRemote(s)
	}
	shared := o.remotes[remoteName(consumerSubject(5))]
	o.joinRemote(all[0])
	if all[2].out.peer = consumerSubject(6); o.remotes[remoteName(all[2].out.peer)] != shared {
		t.Error("an end was forgotten as soon as its last stream had ended")
	}
	shared.questions, shared.suspect, shared.absent, shared.shortest = 3, 1, true, 1
	if o.joinRemote(all[2]); shared.questions != 0 || shared.suspect != 0 || shared.absent || shared.shortest != 0 {
		t.Errorf("a new stream has the suspicions of older ones: %+v", shared)
	}
	o.leaveRemote(all[0])
	o.leaveRemote(all[2])
	if n := o.remoteWheel.Len(); n != len(o.remotes) || n != o.idleRemotes {
		t.Errorf("%d ends without streams, %d on the wheel, %d counted", len(o.remotes), n, o.idleRemotes)
	}
	o.up.Store(true)
	now := ep.now() + 10e9
	o.remoteWheel.Advance(now, func(p *remote) { o.checkRemote(p, now) })
	if n := len(o.remotes) + o.remoteWheel.Len() + o.idleRemotes; n != 0 {
		t.Errorf("%d ends are left of no stream", n)
	}
	for i := range 3 * maxIdleRemotes {
		all[0].out.peer = fmt.Sprintf("_R_.abc.%d", i)
		o.joinRemote(all[0])
		o.leaveRemote(all[0])
	}
	if n := len(o.remotes); n > maxIdleRemotes || n != o.remoteWheel.Len() || n != o.idleRemotes {
		t.Errorf("%d ends without streams, %d on the wheel, %d counted", n, o.remoteWheel.Len(), o.idleRemotes)
	}
}

// A line that is slow is not a peer that is gone.
func TestSlowLineIsNoSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 256 << 10
		m := memoryTest(t, ClientParams{})
		m.handle(t, "up", func(_ *Writer, r *Request) error { return drain(r.Recv) })
		s := openForAnHour(t, m, "up")
		time.Sleep(time.Second)
		m.bus.SetFilter(fake.BlackHole(nil, nil))
		if _, err := s.Write(make([]byte, size/8)); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		_, err := s.Recv()
		outcome{err, time.Now()}.expect(t, "giving up", &CloseError{Code: CloseAbnormalClosure}, start, defaultPatience+time.Second/4, defaultKeepAlive+defaultPatience+defaultResumeTimeout+time.Second)
		m.bus.SetFilter(nil)
		time.Sleep(time.Minute)
		m.nothingLeft(t)
	})
}

// A sign of life between two questions makes the peer's patience begin anew there, however late the outbox sees it.
func TestSignOfLifeBetweenQuestionsCounts(t *testing.T) {
	for name, c := range map[string]struct{ at, suspect int64 }{
		"before the first":   {9, 10},
		"between":            {15, 15},
		"after the last":     {21, 0},
		"when it was asked":  {20, 0},
		"as the first was":   {10, 10},
		"between, far later": {19, 19},
	} {
		p := remote{heard: 5, asked: 20, suspect: 10, questions: 3}
		if p.hear(c.at); p.suspect != c.suspect || p.heard != c.at {
			t.Errorf("%s: heard at %d, suspect since %d, want %d", name, p.heard, p.suspect, c.suspect)
		}
	}
}

// A time of "never" must not add up to one in the past.
func TestNeverIsNotSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var slow atomic.Bool
		conn := newRecorder(func(int, []byte) error {
			if slow.Swap(false) {
				time.Sleep(time.Second)
			}
			return nil
		})
		c := fakeClient(t, conn.Conn, ClientParams{
			KeepAlive: math.MaxInt64, AckTimeout: math.MaxInt64, ResumeTimeout: math.MaxInt64, DisconnectTimeout: math.MaxInt64,
		})
		w := c.NewWriter(consumerSubject(5))
		for range 3 {
			if _, err := w.Write([]byte("a")); err != nil {
				t.Fatal(err)
			}
			if err := w.Flush(); err != nil {
				t.Fatal(err, context.Cause(w.Context()))
			}
			time.Sleep(time.Second)
			slow.Store(true)
		}
	})
}

// A deadline may be further away than a time.Duration reaches.
func TestFarDeadlineDoesNotOverflow(t *testing.T) {
	h := make(nats.Header)
	ctx, cancel := context.WithDeadline(t.Context(), time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC))
	defer cancel()
	setTimeout(h, ctx)
	if d, err := parseTimeout(h); err != nil || d < 290*365*24*time.Hour {
		t.Errorf("%v arrives as %v, %v", h, d, err)
	}
}
