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
	"github.com/natsstream/stream/internal/liveness"
	"github.com/natsstream/stream/internal/natsconn/fake"
	"github.com/natsstream/stream/internal/race"
)

// noticed is within which time a dead peer is noticed with default parameters, whatever the stream does.
const noticed = 4 * time.Second

// With default parameters a peer that dies is noticed within four seconds, whether NATS knows or not, and whatever the one
// that is left does.
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

// finish ends streams of openIdle normally.
func finish(t *testing.T, all []*Stream) {
	t.Helper()
	for i, s := range all {
		if err := errors.Join(s.CloseSend(), drain(s.Recv)); err != nil {
			t.Errorf("stream %d of %d: %v", i, len(all), err)
		}
	}
}

// One question asks for all streams that two ends share. What is asked beside that, about single streams, is bounded.
func TestOneQuestionForAllStreams(t *testing.T) {
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

// scaledDown is n, or a tenth of it with -short and under the race detector.
func scaledDown(n int) int {
	if testing.Short() || race.Enabled {
		return n / 10
	}
	return n
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
func TestStreamWithoutAnswers(t *testing.T) {
	for _, n := range []int{2, 3, 20} {
		synctest.Test(t, func(t *testing.T) {
			m := memoryTest(t, ClientParams{})
			all := openIdle(t, m, n)
			broken := all[1]
			start := time.Now()
			m.bus.SetFilter(func(_, _ *fake.Conn, msg *nats.Msg) bool { return msg.Subject != broken.session.reply })
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

// A consumer's RESET that was lost is noticed although its end lives.
func TestLostStreamAtLivingPeer(t *testing.T) {
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

// A peer that dies takes its own streams with it, and nobody else's.
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

// A stream may have a patience of its own, shorter or longer than that of others to the same peer, at either end, and change it.
func TestSetPeerTimeout(t *testing.T) {
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
func TestRemoteName(t *testing.T) {
	for subject, want := range map[string]string{
		"_SINBOX.abc.~1m5I00000000001": "_SINBOX.abc",
		"alice.abc.~1j5G00000000002":   "alice.abc",
		"_R_.abcdef.ghijklmn":          "_R_.abcdef.ghijklmn",
		"_R_.abcdef.~1m5I":             "_R_.abcdef.~1m5I",
		"~1m5I00000000001":             "~1m5I00000000001",
		"inbox":                        "inbox",
	} {
		if got := remoteName(subject); got != want {
			t.Errorf("%s: %s, want %s", subject, got, want)
		}
	}
}

// Streams of one end share what is known of it. Ends that cannot be told apart by their subjects are asked each on its own.
func TestStreamsShareTheirEnd(t *testing.T) {
	ep := &endpoint{ctx: t.Context(), times: liveness.Intervals{KeepAlive: 1e9, Ack: 1e8, Resume: 1e9, Disconnect: 1e9}}
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
	if o.joinRemote(all[0]); o.remoteWheel.Len() != 12 || all[0].remote.Load().name != all[0].out.peer {
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
	if n := len(o.remotes) + o.remoteWheel.Len(); n != 0 {
		t.Errorf("%d ends are left of no stream", n)
	}
}

// A line that takes what was written slowly is not a peer that is gone.
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
func TestSignOfLifeBetweenQuestions(t *testing.T) {
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
