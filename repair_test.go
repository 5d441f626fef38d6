package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/liveness"
	"github.com/natsstream/stream/internal/natsconn/fake"
)

// Each kind of packet may be lost once, or three times, without harm to the stream.
func TestAnyPacketMayBeLost(t *testing.T) {
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

// A packet that is lost and followed by none is repaired as soon as its acknowledgement is overdue.
func TestOverduePacketIsRepaired(t *testing.T) {
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

// A consumer that leaves and whose RESET is lost is missed: its handler's context ends nevertheless.
func TestLostResetIsMissed(t *testing.T) {
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

// The last words of a stream may be lost, as often as they like within ResumeTimeout: both ends end normally all the
// same.
func TestLostLastWordsEndNormally(t *testing.T) {
	for _, lost := range []int{1, 2, 3, 5, 10} { // of what the silent end says after its peer closed
		for _, c := range []struct {
			name     string
			consumer bool // whose words are lost
			handler  func(w *Writer, r *Request) error
			writes   bool // the consumer does
		}{
			{"handler reads", false, func(_ *Writer, r *Request) error { return drain(r.Recv) }, true},
			{"handler reads and closes", false, func(w *Writer, r *Request) error { return errors.Join(drain(r.Recv), w.Close()) }, true},
			{"handler does not read", false, func(w *Writer, r *Request) error { return nil }, true},
			{"consumer reads", true, func(w *Writer, _ *Request) error { _, err := w.Write([]byte("x")); return err }, false},
			{"consumer reads and writes", true, func(w *Writer, r *Request) error { _, err := r.WriteTo(w); return err }, true},
		} {
			t.Run(fmt.Sprintf("%s/lost=%d", c.name, lost), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := memoryTest(t, ClientParams{})
					silent := m.back
					if c.consumer {
						silent = m.conn
					}
					n, closed := lost, false
					m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
						closed = closed || from != silent && hasClose(msg.Data)
						if closed && from == silent && isControl(msg.Data) && n > 0 {
							n--
							return false
						}
						return true
					})
					m.handle(t, "last", c.handler)
					s := openForAnHour(t, m, "last")
					deaf := c.name == "handler does not read" // it may have returned before the consumer writes
					if c.writes {
						_, err := s.Write([]byte("x"))
						if err = errors.Join(err, s.CloseSend()); err != nil && !(deaf && errors.Is(err, ErrClosed)) {
							t.Error(err)
						}
					}
					if err := drain(s.Recv); err != nil {
						t.Errorf("the consumer: %v", err)
					}
					if c.writes && !deaf {
						if err := s.Sync(t.Context()); err != nil {
							t.Errorf("the consumer's Sync: %v", err)
						}
					}
					<-s.Context().Done()
					if cause := context.Cause(s.Context()); cause != io.EOF && !deaf {
						t.Errorf("the consumer's context ended with %v", cause)
					}
					time.Sleep(m.times.ResumeTimeout)
					m.nothingLeft(t)
				})
			})
		}
	}
}

// A request for missing packets that is due before it is known whom to send it to is sent when it is.
func TestGapBeforeSubjectIsKnownIsAskedForLater(t *testing.T) {
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

// With round trips longer than AckTimeout every acknowledgement is asked for once in vain. That is no loss.
func TestSlowRoundTripIsNoLoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.bus.Delay = 150 * time.Millisecond
		var lost atomic.Bool
		m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
			return from != m.back || !isSequenced(msg.Data) || lost.Swap(true)
		})
		const records = 2000
		m.handle(t, "x", func(w *Writer, _ *Request) error {
			for range records {
				if _, err := w.Write(make([]byte, 30000)); err != nil {
					return err
				}
			}
			return nil
		})
		start := time.Now()
		s := m.open(t, "x")
		n := 0
		for ; ; n++ {
			if _, err := s.Recv(); err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(start); n != records || took > time.Minute {
			t.Errorf("%d of %d records in %v, want all in a minute", n, records, took)
		}
	})
}

// creditFrom returns a CREDIT packet that acknowledges the packets up to ack and grants more.
func creditFrom(sender uint64, ack uint32, flags FrameFlags) []byte {
	credit := AppendCredit(nil, Credit{Ack: ack, Packets: 200, Bytes: 1 << 40})
	return AppendPacket(nil, PacketHeader{Sender: sender}, Frame{Type: FrameCredit, Flags: flags, Payload: credit})
}

// An acknowledgement half the number space away is neither of the past nor of the future.
func TestAcknowledgementFromAfarIsIgnored(t *testing.T) {
	conn := newRecorder(nil)
	c := fakeClient(t, conn.Conn, ClientParams{})
	w := c.NewWriter(consumerSubject(5))
	write := func() {
		t.Helper()
		if _, err := w.Write([]byte("a")); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	write()
	for _, ack := range []uint32{1, 1 + 1<<31, 2 + 1<<31, math.MaxUint32, 0} {
		conn.Deliver(&nats.Msg{Subject: w.session.reply(), Data: creditFrom(9, ack, 0)})
	}
	conn.Deliver(&nats.Msg{Subject: w.session.reply(), Data: AppendPacket(nil, PacketHeader{Sender: 9}, Frame{Type: FramePing})})
	for len(conn.sent()) < 2 { // the answer: all of them were looked at
		time.Sleep(time.Millisecond)
	}
	write()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.acked != 1 {
		t.Errorf("%d packets count as acknowledged, 1 was", w.acked)
	}
}

// A consumer that never wrote has nothing to be acknowledged.
func TestNothingWrittenNeedsNoAcknowledgement(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := newRecorder(nil)
		ep := fakeClient(t, conn, ClientParams{}).ep
		defer ep.close(testClosed)
		s, err := ep.open(t.Context(), &nats.Msg{Subject: "x"}, openOptions{codec: MsgPack})
		if err != nil {
			t.Fatal(err)
		}
		ep.receive(&nats.Msg{Subject: s.session.reply(), Reply: "peer", Data: creditFrom(8, 9, 0)}, nil)
		_, err = s.Recv()
		if ce, ok := errors.AsType[*CloseError](err); !ok || ce.Code != CloseProtocolError {
			t.Errorf("got %v, want %d", err, CloseProtocolError)
		}
	})
}

// A PING behind retransmitted packets must not make the peer miss packets that are not on their way yet.
func TestPingSaysWhatIsOnItsWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := newRecorder(nil)
		c := fakeClient(t, conn, ClientParams{})
		ep := c.ep
		w := c.NewWriter(consumerSubject(8))
		for range 100 {
			if _, err := w.Write([]byte("a")); err != nil {
				t.Fatal(err)
			}
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		ep.receive(&nats.Msg{Subject: w.session.reply(), Data: creditFrom(9, 0, FlagGap)}, nil)
		synctest.Wait()
		if limit, again := w.sender.unacked.loss.Limit(), w.sender.unacked.Cursor(); limit != 50 || again != 50 {
			t.Errorf("limit %d, %d sent again after a loss of 100 packets, want 50 of each", limit, again)
		}
		var ping *PacketHeader
		for _, m := range conn.sent() {
			if isFrame(m.Data, FramePing) {
				h, _, err := ParsePacketHeader(m.Data)
				if err != nil {
					t.Fatal(err)
				}
				ping = &h
			}
		}
		if ping == nil || ping.Seq != 50 {
			t.Errorf("PING %v, want one of sequence number 50", ping)
		}
		ep.close(testClosed)
	})
}

// Sync returns when everything was acknowledged, however often it had to be sent again, and otherwise when its context
// or the stream ends.
func TestSyncWaitsForAcknowledgements(t *testing.T) {
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

// Close returns when everything was published. A packet that is lost then is repaired for as long as ResumeTimeout,
// unless the endpoint is closed meanwhile, which does not wait for it.
func TestEndedStreamIsRepairedUntilResumeTimeout(t *testing.T) {
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

// An ended stream is answered for to its peer alone.
func TestEndedStreamAnswersItsPeerAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "one", func(*Writer, *Request) error { return nil }) // one packet, that of CLOSE
		m.handle(t, "wait", waits(make(chan error, 1)))
		other := openForAnHour(t, m, "wait") // the clock runs while a stream is open
		s := openForAnHour(t, m, "one")
		if err := drain(s.Recv); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * maxTick)
		peer := s.session.bucket.sender()
		answers := make(chan []byte, 10)
		stop, err := m.back.Subscribe("asker", "", func(msg *nats.Msg) { answers <- msg.Data })
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		ask := func(sender uint64) Frame {
			_ = m.back.Publish(s.session.reply(), "asker", AppendPacket(nil, PacketHeader{Sender: sender}, Frame{Type: FramePing}))
			frames := controlFrames(<-answers)
			if len(frames) != 1 {
				t.Fatalf("%d frames", len(frames))
			}
			return frames[0]
		}
		if f := ask(peer + 2); f.Type != FrameReset || f.Code != CloseCanceled {
			t.Errorf("a stranger got %v %d", f.Type, f.Code)
		}
		f := ask(peer)
		if c, err := ParseCredit(f.Payload); f.Type != FrameCredit || err != nil || c.Ack != 1 {
			t.Errorf("the peer got %v %+v, %v", f.Type, c, err)
		}
		time.Sleep(m.times.DisconnectTimeout)
		if f := ask(peer); f.Type != FrameReset {
			t.Errorf("after its time the peer got %v", f.Type)
		}
		_ = other.Close()
		m.nothingLeft(t)
	})
}

// An end draws its number from another set than its peer: a RESET with its own number is an answer to it. All 47 bits
// beside that one are random, so that two producers do not draw the same.
func TestSenderNumbersOfBothEndsDiffer(t *testing.T) {
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

// An upload is whole if the challenge of its producer's address, the answer or packets before them are lost.
func TestUploadSurvivesLossOfItsProof(t *testing.T) {
	const record, records = 10_000, 100
	frame := func(typ FrameType) func(m *nats.Msg) bool {
		return func(m *nats.Msg) bool { return isFrame(m.Data, typ) }
	}
	for name, c := range map[string]struct {
		n     int
		match func(m *nats.Msg) bool
	}{
		"nothing":    {0, frame(FrameChallenge)},
		"challenge":  {1, frame(FrameChallenge)},
		"challenges": {3, frame(FrameChallenge)},
		"answers":    {3, frame(FrameResponse)},
		"first packets": {3, func(m *nats.Msg) bool {
			h, _, err := ParsePacketHeader(m.Data)
			return err == nil && h.Flags&PacketSeq != 0 && len(m.Data) > record && h.Seq < 3
		}},
		"credit": {5, frame(FrameCredit)},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.handle(t, "up", func(w *Writer, r *Request) error {
					n := 0
					for rec, err := range r.All() {
						if err != nil || len(rec) != record {
							return fmt.Errorf("%d bytes, %w", len(rec), err)
						}
						n++
					}
					if n != records {
						return fmt.Errorf("%d records", n)
					}
					return nil
				})
				s := m.open(t, "up")
				synctest.Wait()
				challenges, left := 0, c.n
				m.bus.SetFilter(func(_, _ *fake.Conn, msg *nats.Msg) bool {
					if isFrame(msg.Data, FrameChallenge) {
						challenges++
					}
					if left == 0 || !c.match(msg) {
						return true
					}
					left--
					return false
				})
				start := time.Now()
				for range records {
					if _, err := s.Write(make([]byte, record)); err != nil {
						t.Fatal(err)
					}
				}
				if err := s.CloseSend(); err != nil {
					t.Error(err)
				}
				if err := drain(s.Recv); err != nil {
					t.Error(err)
				}
				synctest.Wait()
				if c.n == 0 && challenges != 1 {
					t.Errorf("%d challenges, want 1", challenges)
				}
				took(t, "the upload", start, 0, time.Duration(c.n+2)*4*m.times.AckTimeout)
				m.nothingLeft(t)
			})
		})
	}
}
