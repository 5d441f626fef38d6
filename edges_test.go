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

	"github.com/natsstream/stream/internal/natsconn/fake"
)

// Cases at the edges of numbers and times: each of them went wrong once.

func creditFrom(sender uint64, ack uint32, flags FrameFlags) []byte {
	credit := AppendCredit(nil, Credit{Ack: ack, Packets: 200, Bytes: 1 << 40})
	return AppendPacket(nil, PacketHeader{Sender: sender}, Frame{Type: FrameCredit, Flags: flags, Payload: credit})
}

// An acknowledgement half the number space away is neither of the past nor of the future.
func TestAcknowledgementFromAfar(t *testing.T) {
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
		conn.Deliver(&nats.Msg{Subject: w.session.reply, Data: creditFrom(9, ack, 0)})
	}
	conn.Deliver(&nats.Msg{Subject: w.session.reply, Data: AppendPacket(nil, PacketHeader{Sender: 9}, Frame{Type: FramePing})})
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

// A PING behind what is sent again must not make the peer miss what is not on its way yet.
func TestPingSaysWhatIsOnItsWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := newRecorder(nil)
		ep := recorded(t, conn)
		w := (&Client{ep: ep, codec: MsgPack}).NewWriter(consumerSubject(8))
		for range 100 {
			if _, err := w.Write([]byte("a")); err != nil {
				t.Fatal(err)
			}
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		ep.receive(&nats.Msg{Subject: w.session.reply, Data: creditFrom(9, 0, FlagGap)})
		synctest.Wait()
		if limit, again := w.unacked.loss.Limit(), w.unacked.Cursor(); limit != 50 || again != 50 {
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

// With round trips longer than AckTimeout every acknowledgement is asked for once in vain. That is no loss.
func TestLossOnASlowRoundTrip(t *testing.T) {
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

// A server that closes tells also the consumers that speak only the fallback and never heard from their handler.
func TestSilentHandlerOfAFallbackConsumer(t *testing.T) {
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

// Streams that are opened and given up while the connection is down leave nothing behind.
func TestOpensWithoutConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.conn.Set(nats.RECONNECTING)
		synctest.Wait()
		for range 1000 {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
			s, err := m.client.Open(ctx, "x", nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Recv(); !errors.Is(err, context.DeadlineExceeded) {
				t.Fatal(err)
			}
			cancel()
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if n := len(m.client.ep.outbox.waitingUntilUp); n != 0 {
			t.Errorf("%d streams that ended are held", n)
		}
	})
}

// Sync succeeds whether the consumer acknowledges the end or leaves after it.
func TestSyncAndAConsumerThatLeaves(t *testing.T) {
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

// A connection that is slow takes bytes: no stream ends for it while packets of others go out.
func TestManyOverASlowConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := newRecorder(func(int, []byte) error {
			time.Sleep(26 * time.Millisecond) // 16 KiB at 5 Mbit/s
			return nil
		})
		// By default the peers would have given up at the end.
		c := fakeClient(t, conn.Conn, ClientParams{KeepAlive: time.Minute})
		var writers []*Writer
		for i := range 5000 {
			w := c.NewWriter(fmt.Sprint("y", i) + consumerSubject(5))
			if _, err := w.Write(make([]byte, 16000)); err != nil {
				t.Fatal(err)
			}
			writers = append(writers, w)
		}
		time.Sleep(5000 * 26 * time.Millisecond)
		stuck := &CloseError{CloseAbnormalClosure, "the connection takes no bytes"}
		for i, w := range writers {
			if err := context.Cause(w.Context()); errors.Is(err, stuck) {
				t.Fatalf("writer %d: %v", i, err)
			}
		}
	})
}

// A consumer may leave with code 1000 before everything arrived. That is no acknowledgement.
func TestLeavingAcknowledgesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := newRecorder(nil)
		ep := recorded(t, conn)
		defer ep.close(testClosed)
		w := (&Client{ep: ep, codec: MsgPack}).NewWriter(consumerSubject(8))
		if _, err := w.Write([]byte("lost")); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		reset := AppendPacket(nil, PacketHeader{Sender: 9}, Frame{Type: FrameReset, Code: CloseNormalClosure})
		ep.receive(&nats.Msg{Subject: w.session.reply, Data: reset})
		if err := w.Sync(t.Context()); err == nil {
			t.Error("Sync says that everything arrived")
		}
	})
}

// A consumer that has read everything and closed its own direction may leave: what was lost of its records is repaired, and
// the handler, which works on, is not stopped.
func TestClosingAfterBothEnds(t *testing.T) {
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
func TestClosingAfterBothEndsWithoutPeer(t *testing.T) {
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

// What consumers send to handlers that do not read is bounded as well.
func TestHandlersWindows(t *testing.T) {
	for _, c := range []struct {
		name    string
		p       ClientParams
		streams int
		most    int
	}{
		{"Window", ClientParams{Window: minWindow}, 1, minWindow},
		{"MaxBuffered", ClientParams{MaxBuffered: 256 << 10}, 100, 256<<10 + 100*minWindow},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, c.p)
				m.handle(t, "deaf", func(_ *Writer, r *Request) error {
					<-r.Context().Done()
					return nil
				})
				var sent atomic.Int64
				const record = 1000
				for range c.streams {
					s := m.open(t, "deaf")
					go func() {
						for {
							if _, err := s.Write(make([]byte, record)); err != nil {
								return
							}
							if s.Flush() == nil {
								sent.Add(record)
							}
						}
					}()
				}
				time.Sleep(time.Second)
				reserved := int(m.server.Stats().Reserved)
				if reserved == 0 || reserved > c.most {
					t.Errorf("%d bytes are reserved, should be 1 to %d", reserved, c.most)
				}
				if n, most := int(sent.Load()), reserved+2*c.streams*record; n == 0 || n > most { // a packet beyond the window, and one not sent
					t.Errorf("%d bytes were sent to handlers that do not read, with %d reserved", n, reserved)
				}
				m.close()
				m.nothingLeft(t)
			})
		})
	}
}

// A consumer that never wrote has nothing to be acknowledged.
func TestAcknowledgementOfNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := newRecorder(nil)
		ep := recorded(t, conn)
		defer ep.close(testClosed)
		s, err := ep.open(t.Context(), &nats.Msg{Subject: "x"}, MsgPack, nil)
		if err != nil {
			t.Fatal(err)
		}
		ep.receive(&nats.Msg{Subject: s.session.reply, Reply: "peer", Data: creditFrom(8, 9, 0)})
		_, err = s.Recv()
		if ce, ok := errors.AsType[*CloseError](err); !ok || ce.Code != CloseProtocolError {
			t.Errorf("got %v, want %d", err, CloseProtocolError)
		}
	})
}

// META is what it says it is from its first byte to its last.
func TestMetaForm(t *testing.T) {
	for in, good := range map[string]bool{
		"NATS/1.0\r\n\r\n":                  true,
		"NATS/1.0\r\nA: b\r\n\r\n":          true,
		"NATS/1.0\r\nA:  b \r\nA:c\r\n\r\n": true,
		"":                                  false,
		"NATS/1.0 503\r\n\r\n":              false,
		"NATS/1.0\r\nA: b\r\n":              false,
		"NATS/1.0\r\n":                      false,
		"NATS/1.0\r\nA\r\n\r\n":             false,
		"HTTP/1.1\r\nA: b\r\n\r\n":          false,
	} {
		if h, err := parseMeta([]byte(in)); (err == nil) != good {
			t.Errorf("%q: %v, %v", in, h, err)
		}
	}
}
