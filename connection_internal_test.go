package stream

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/natsconn/fake"
	"github.com/natsstream/stream/internal/race"
)

// Before the first connect nobody knows the server's max_payload. Nothing is refused, and records travel together.
func TestNothingIsRefusedBeforeTheFirstConnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "x", func(w *Writer, r *Request) error {
			_, err := w.Write(r.Data)
			return err
		})
		conn := m.bus.Connect("early")
		conn.Set(nats.RECONNECTING)
		conn.SetMaxPayload(0)
		c := fakeClient(t, conn, ClientParams{})
		st, err := c.Open(t.Context(), "x", make([]byte, 1000))
		if err != nil {
			t.Fatal(err)
		}
		var sizes []int
		conn.Published = func(_, _ string, data []byte) error {
			if isSequenced(data) {
				sizes = append(sizes, len(data))
			}
			return nil
		}
		w := c.NewWriter(consumerSubject(5))
		for range 1000 {
			if n, err := w.Write(make([]byte, 10)); n != 10 || err != nil {
				t.Fatal(n, err)
			}
		}
		synctest.Wait()
		conn.SetMaxPayload(4000)
		conn.Set(nats.CONNECTED)
		if rec, err := st.Recv(); len(rec) != 1000 || err != nil {
			t.Errorf("%d bytes, %v", len(rec), err)
		}
		if err := w.Flush(); err != nil {
			t.Error(err)
		}
		if len(sizes) != 6 || slices.Max(sizes) > 4000 { // of two packets, four and two pieces
			t.Errorf("18 KB in packets of %v", sizes)
		}
	})
}

// The server's max_payload changes under streams whose packets are sealed already. Nothing is lost, also if the smaller
// packets are more than the peer has granted.
func TestMaxPayloadChangesUnderStreams(t *testing.T) {
	for _, window := range []int{4 << 10, 64 << 10, 4 << 20} {
		for _, size := range []int{10, 3000, 100_000} {
			t.Run(fmt.Sprintf("window=%d/size=%d", window, size), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := memoryTest(t, ClientParams{Window: window})
					m.bus.Delay = time.Millisecond
					n := max(20, min(3000, 2<<20/size))
					record := func(i int) []byte { return bytes.Repeat([]byte{byte(i), byte(i >> 8)}, size/2) }
					m.handle(t, "x", func(w *Writer, r *Request) error {
						for i := range n {
							if _, err := w.Write(record(i)); err != nil {
								return err
							}
							if i%50 == 49 {
								if err := w.Flush(); err != nil {
									return err
								}
							}
						}
						if err := w.Sync(r.Context()); err != nil {
							return err
						}
						if got, n := w.Totals(), uint64(n); got.RecordsAcked != n || got.BytesAcked != n*uint64(size) || got.BytesOut != got.BytesAcked {
							t.Errorf("after Sync of %d records of %d bytes: %+v", n, size, got)
						}
						return nil
					})
					st := m.open(t, "x")
					rng := rand.New(rand.NewPCG(uint64(window), uint64(size)))
					done := make(chan struct{})
					go func() {
						for {
							select {
							case <-done:
								return
							case <-time.After(5 * time.Millisecond):
							}
							// Packets under way are not sent again here, so none is ever too large: nothing is lost.
							m.back.SetMaxPayload(int64(200 + rng.IntN(100_000)))
						}
					}()
					defer close(done)
					for i := range n {
						rec, err := st.Recv()
						if err != nil || !bytes.Equal(rec, record(i)) {
							t.Fatalf("record %d of %d: %d bytes, %v", i, n, len(rec), err)
						}
					}
					if _, err := st.Recv(); err != io.EOF {
						t.Error(err)
					}
				})
			})
		}
	}
}

// A packet that was published once keeps its number. If it is missed when the server does not take it any more, it goes
// in fragments, and so do those behind it.
func TestLostPacketBeyondShrunkMaxPayloadGoesInFragments(t *testing.T) {
	for _, sizes := range [][]int{{10_000}, {10_000, 10_000, 10_000}, {100, 10_000, 10_000}} {
		synctest.Test(t, func(t *testing.T) {
			m := memoryTest(t, ClientParams{})
			m.bus.Delay = time.Millisecond // the sender hears of the loss after max_payload has shrunk
			m.handle(t, "x", func(w *Writer, r *Request) error {
				if _, err := w.Write(make([]byte, 20_000)); err != nil {
					return err
				}
				if err := w.Sync(r.Context()); err != nil { // packets of this size pass
					return err
				}
				m.bus.SetFilter(lose(1, sequencedOf(m.back)))
				for _, size := range sizes {
					if _, err := w.Write(make([]byte, size)); err != nil {
						return err
					}
					if err := w.Flush(); err != nil {
						return err
					}
				}
				m.back.SetMaxPayload(5000)
				_, err := w.Write([]byte("next"))
				return err
			})
			st := m.open(t, "x")
			for _, size := range slices.Concat([]int{20_000}, sizes, []int{4}) {
				if rec, err := st.Recv(); err != nil || len(rec) != size {
					t.Errorf("of %d: %d bytes, %v; want %d", sizes, len(rec), err, size)
				}
			}
			if _, err := st.Recv(); err != io.EOF {
				t.Errorf("of %d: %v", sizes, err)
			}
			m.nothingLeft(t)
		})
	}
}

// If the server does not even take the fragments, the stream ends with an error that names both sizes.
func TestLostPacketBeyondShrunkMaxPayloadEndsTheStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		cause := make(chan error, 1)
		m.handle(t, "x", func(w *Writer, r *Request) error {
			m.bus.SetFilter(lose(1, sequencedOf(m.back)))
			if _, err := w.Write(make([]byte, 10_000)); err != nil {
				return err
			}
			if err := w.Flush(); err != nil {
				return err
			}
			m.back.SetMaxPayload(500)
			<-r.Context().Done()
			_, err := w.Write(nil)
			cause <- err
			return err
		})
		size := fmt.Sprint(PacketHeaderSize + FrameHeaderSize + 10_000)
		_, err := m.open(t, "x").Recv()
		if ce, ok := errors.AsType[*CloseError](err); !ok || ce.Code != CloseInternalServerErr || !strings.Contains(ce.Text, size) || !strings.Contains(ce.Text, "500") {
			t.Errorf("consumer: %v", err)
		}
		if err := <-cause; !errors.Is(err, nats.ErrMaxPayload) || !strings.Contains(err.Error(), size) || !strings.Contains(err.Error(), "500") {
			t.Errorf("handler: %v", err)
		}
		m.nothingLeft(t)
	})
}

// A request is measured against the current max_payload of the server, in both directions.
func TestOpenIsMeasuredAgainstTheCurrentMaxPayload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "x", func(w *Writer, r *Request) error { return nil })
		try := func(size int) error {
			st, err := m.client.Open(t.Context(), "x", make([]byte, size))
			if err != nil {
				return fmt.Errorf("Open: %w", err)
			}
			defer st.Close()
			_, err = st.Recv()
			return err
		}
		m.conn.SetMaxPayload(1000)
		for _, step := range []struct {
			max  int64
			size int
			ok   bool
		}{{1000, 2000, false}, {4000, 2000, true}, {1000, 2000, false}, {1000, 100, true}, {0, 5 << 20, true}} {
			m.conn.SetMaxPayload(step.max)
			err := try(step.size)
			if step.ok && err != io.EOF || !step.ok && !errors.Is(err, nats.ErrMaxPayload) {
				t.Errorf("request of %d bytes, the server takes %d: %v", step.size, step.max, err)
			}
			if !step.ok && err != nil && !strings.Contains(err.Error(), fmt.Sprint(step.max)) {
				t.Errorf("the error does not say that the server takes %d: %v", step.max, err)
			}
		}
		m.nothingLeft(t)
		m.conn.Set(nats.RECONNECTING) // nobody can be asked
		m.conn.SetMaxPayload(1000)
		time.Sleep(time.Second)
		st, err := m.client.Open(t.Context(), "x", make([]byte, 2000))
		if err != nil {
			t.Fatal(err)
		}
		_ = st.Close()
		m.conn.Set(nats.CONNECTED)
		m.nothingLeft(t)
	})
}

// A packet that the server no longer takes can never be sent. The stream says so, at both ends, and does not try again.
func TestPacketBeyondMaxPayloadEndsTheStream(t *testing.T) {
	conn := newRecorder(func(_ int, data []byte) error {
		if len(data) > 1000 {
			return nats.ErrMaxPayload
		}
		return nil
	})
	c := fakeClient(t, conn.Conn, ClientParams{})
	for name, subject := range map[string]string{"packets": consumerSubject(5), "fallback": "x.oldtoken"} {
		t.Run(name, func(t *testing.T) {
			w := c.NewWriter(subject)
			if _, err := w.Write([]byte("a")); err != nil {
				t.Fatal(err)
			}
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(make([]byte, 2000)); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := w.Flush(); !errors.Is(err, nats.ErrMaxPayload) {
					t.Errorf("Flush: %v", err)
				}
				if n, err := w.Write([]byte("b")); n != 0 || !errors.Is(err, nats.ErrMaxPayload) {
					t.Errorf("Write: %d, %v", n, err)
				}
				if err := w.Close(); !errors.Is(err, nats.ErrMaxPayload) {
					t.Errorf("Close: %v", err)
				}
			}
			var told CloseError
			until(t, "the consumer was told", func() bool {
				sent := conn.sent()
				last := sent[len(sent)-1].Data
				if last[0] != PacketMagic {
					var m StreamingMsg
					if err := json.Unmarshal(last, &m); err != nil || m.CloseError == nil {
						return false
					}
					told = *m.CloseError
					return true
				}
				f, _, err := ParseFrame(last[PacketHeaderSize:])
				if err != nil || f.Type != FrameReset {
					return false
				}
				told = CloseError{int(f.Code), string(f.Payload)}
				return true
			})
			if told.Code != CloseInternalServerErr || !strings.Contains(told.Text, "max_payload") {
				t.Errorf("the consumer was told %v", &told)
			}
		})
	}
}

// joined returns the frames of packets, with those of one record put together.
func joined(t *testing.T, packets ...[]byte) (frames []Frame) {
	t.Helper()
	for _, p := range packets {
		_, body, err := ParsePacketHeader(p)
		for len(body) > 0 && err == nil {
			var f Frame
			if f, body, err = ParseFrame(body); err == nil {
				if n := len(frames); n > 0 && frames[n-1].Flags&FlagMore != 0 {
					f.Payload = append(bytes.Clone(frames[n-1].Payload), f.Payload...)
					frames = frames[:n-1]
				}
				frames = append(frames, f)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return frames
}

// A packet that is cut carries the same records in packets that fit.
func TestCutKeepsTheRecords(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		limit := PacketHeaderSize + FrameHeaderSize + 1 + rng.IntN(200)
		var frames []Frame
		for range 1 + rng.IntN(6) {
			f := testData(strings.Repeat("r", rng.IntN(400)))
			if rng.IntN(4) == 0 {
				f.Flags |= FlagMsgPack
			}
			frames = append(frames, f)
		}
		if rng.IntN(3) == 0 {
			frames[len(frames)-1].Flags |= FlagMore // goes on in the next packet
		} else if rng.IntN(3) == 0 {
			frames = append(frames, Frame{Type: FrameClose, Code: 1000})
		}
		p := AppendPacket(nil, PacketHeader{Flags: PacketSeq | PacketAck, Sender: 7, Seq: 9}, frames...)
		pieces, ok := cutPacket(bytes.Clone(p), limit)
		if !ok {
			t.Fatalf("a packet of %v was not cut for %d bytes", frames, limit)
		}
		for i, piece := range pieces {
			h, _, err := ParsePacketHeader(piece)
			want := PacketSeq
			if i == len(pieces)-1 {
				want |= PacketAck
			}
			if err != nil || len(piece) > limit || h.Flags != want || h.Sender != 7 {
				t.Fatalf("piece %d of %d has %d bytes, limit %d, header %+v, %v", i, len(pieces), len(piece), limit, h, err)
			}
		}
		got, want := joined(t, pieces...), joined(t, p)
		if !slices.EqualFunc(got, want, func(a, b Frame) bool {
			return a.Type == b.Type && a.Flags == b.Flags && a.Code == b.Code && bytes.Equal(a.Payload, b.Payload)
		}) {
			t.Fatalf("cut for %d bytes, %v became %v", limit, want, got)
		}
	}
}

// Padding is not needed in smaller packets.
func TestCutDropsPadding(t *testing.T) {
	padding := Frame{Type: framePadding, Payload: make([]byte, 500)}
	p := AppendPacket(nil, PacketHeader{Flags: PacketSeq, Sender: 7}, testData(strings.Repeat("r", 300)), padding)
	pieces, ok := cutPacket(p, PacketHeaderSize+FrameHeaderSize+200)
	if got := joined(t, pieces...); !ok || len(pieces) != 2 || len(got) != 1 || got[0].Type != FrameData || len(got[0].Payload) != 300 {
		t.Errorf("%d pieces with %v, %v", len(pieces), got, ok)
	}
}

// Headers, trailers and reasons of a CLOSE stay whole.
func TestCutLeavesOtherFramesWhole(t *testing.T) {
	reason := []byte(strings.Repeat("x", 100))
	p := AppendPacket(nil, PacketHeader{Flags: PacketSeq, Sender: 7}, testData("a"), Frame{Type: FrameClose, Code: 4000, Payload: reason})
	if pieces, ok := cutPacket(p, PacketHeaderSize+FrameHeaderSize+100); !ok || len(pieces) != 2 {
		t.Errorf("%d pieces, %v", len(pieces), ok)
	}
	if pieces, ok := cutPacket(p, PacketHeaderSize+FrameHeaderSize+99); ok {
		t.Errorf("%q", pieces)
	}
	if _, ok := cutPacket(p, PacketHeaderSize+FrameHeaderSize); ok {
		t.Error("cut for packets that have room for nothing")
	}
}

// While this end's own connection is down, clocks stand still until DisconnectTimeout; short outages do not add up.
func TestOutagesCountOnlyFromDisconnectTimeoutOn(t *testing.T) {
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

// A request that waited for the connection was not lost with it. Its handler may take its time.
func TestRequestThatWaitedForTheConnectionIsNotLost(t *testing.T) {
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

// lateWatcher is a connection whose status the watcher gets to see late, and whose requests take their time.
type lateWatcher struct {
	*fake.Conn
	hold  chan struct{} // the first look waits for it
	once  atomic.Bool
	after func() // runs when a request was published, before the call returns
}

func (c *lateWatcher) Status() nats.Status {
	var pc [16]uintptr
	frames := runtime.CallersFrames(pc[:runtime.Callers(1, pc[:])])
	for more := c.hold != nil; more; {
		var f runtime.Frame
		f, more = frames.Next()
		if strings.HasSuffix(f.Function, ".watch") && c.once.CompareAndSwap(false, true) {
			<-c.hold
		}
	}
	return c.Conn.Status()
}

func (c *lateWatcher) PublishMsg(m *nats.Msg) error {
	err := c.Conn.PublishMsg(m)
	if c.after != nil {
		c.after()
	}
	return err
}

// A request that is lost with the connection is missed, at any moment.
func TestLostRequestIsMissedAtAnyMoment(t *testing.T) {
	for _, when := range []string{"before the watcher looks", "before publishing returns"} {
		t.Run(when, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				bus := new(fake.Bus)
				conn := &lateWatcher{Conn: bus.Connect("client")}
				flip := func() {
					conn.Set(nats.RECONNECTING)
					time.Sleep(10 * time.Millisecond)
					conn.Set(nats.CONNECTED)
					time.Sleep(10 * time.Millisecond)
				}
				late := when == "before the watcher looks"
				if late {
					conn.hold = make(chan struct{})
				} else {
					conn.after = flip
				}
				p, err := ClientParams{}.withDefaults()
				if err != nil {
					t.Fatal(err)
				}
				ep, err := newEndpoint(conn, "", p)
				if err != nil {
					t.Fatal(err)
				}
				c := &Client{ep: ep, codec: MsgPack}
				defer c.Close()
				back := bus.Connect("server")
				stop, err := back.Subscribe("x", "", func(*nats.Msg) {})
				if err != nil {
					t.Fatal(err)
				}
				defer stop()
				bus.SetFilter(fake.BlackHole(nil, back))
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				s, err := c.Open(ctx, "x", nil)
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Millisecond)
				if late {
					conn.Set(nats.RECONNECTING)
					close(conn.hold)
					synctest.Wait()
					conn.Set(nats.CONNECTED)
				}
				start := time.Now()
				if _, err = s.Recv(); !errors.Is(err, &CloseError{Code: CloseAbnormalClosure}) {
					t.Errorf("Recv: %v", err)
				}
				took(t, "Recv", start, 0, p.ResumeTimeout+time.Second)
			})
		})
	}
}

// A request, or its answer, that is lost with the consumer's own connection: the answer comes again, the request does
// not.
func TestLostAnswerIsRepeatedAndLostRequestIsNot(t *testing.T) {
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
func TestProducerReportsALongOutageAfterwards(t *testing.T) {
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

// A CREDIT that was lost with the connection would leave the producer waiting for ever: it is said again.
func TestReconnectRepeatsCredit(t *testing.T) {
	c, conn, count := newCountedClient(t)
	s, err := c.Open(t.Context(), "x", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	const producer = "producer"
	c.ep.receive(&nats.Msg{Subject: s.session.reply(), Reply: producer, Data: testPacketFlags(PacketSeq|PacketAck, 9, 0, testData(strings.Repeat("x", initialWindow)))}, nil)
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	read := make(chan error)
	go func() { _, err := s.Recv(); read <- err }() // consumes the packet, and grants what it held
	until(t, "credit was given", func() bool {
		return count(producer) > 0 && s.session.bucket.grantedBytes.Load() > initialWindow && s.session.pending.Load() == 0
	})
	for range 3 {
		conn.Set(nats.RECONNECTING)
		until(t, "the connection is down", func() bool { return !c.ep.outbox.up.Load() })
		before := count(producer) // may have been in the connection's buffer
		conn.Set(nats.CONNECTED)
		until(t, "the credit was said again", func() bool { return count(producer) > before })
	}
	_ = s.Close()
	if err := <-read; !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
}

// The last packet of a producer may be lost with the connection as well. It asks, so that the consumer answers or sees
// that packets are missing.
func TestReconnectAsksForCredit(t *testing.T) {
	c, conn, count := newCountedClient(t)
	used, unused := consumerSubject(5), "y"+consumerSubject(5)
	w, idle := c.NewWriter(used), c.NewWriter(unused)
	if _, err := w.Write([]byte("a")); err != nil {
		t.Fatal(err)
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	conn.Set(nats.RECONNECTING)
	until(t, "the connection is down", func() bool { return !c.ep.outbox.up.Load() })
	before := count(used)
	conn.Set(nats.CONNECTED)
	until(t, "the producer asked", func() bool { return count(used) > before })
	until(t, "the writer that sent nothing said where it is", func() bool { return count(unused) > 0 })
	for _, w := range []*Writer{w, idle} {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Streams that are opened and given up while the connection is down leave nothing behind.
func TestOpensWithoutConnectionLeaveNothing(t *testing.T) {
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

// Streams opened while the connection is down for long live, and die, as others do.
func TestOpensDuringALongOutageLiveAsOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "x", func(w *Writer, r *Request) error {
			if _, err := w.Write([]byte("a")); err != nil {
				return err
			}
			<-r.Context().Done()
			return nil
		})
		m.conn.Set(nats.RECONNECTING)
		time.Sleep(m.times.DisconnectTimeout + 10*time.Second)
		var all []*Stream
		for range 60 {
			time.Sleep(maxTick) // the clock began with the endpoint: a tick comes at the same moment
			for range 30 {
				all = append(all, m.open(t, "x"))
			}
		}
		synctest.Wait()
		m.conn.Set(nats.CONNECTED)
		for _, s := range all {
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		m.bus.SetFilter(fake.BlackHole(nil, nil)) // the peer is gone without a word
		start := time.Now()
		var wg sync.WaitGroup
		for _, s := range all {
			wg.Go(func() {
				stop := time.AfterFunc(time.Hour, func() { _ = s.Close() })
				defer stop.Stop()
				if _, err := s.Recv(); !errors.Is(err, &CloseError{Code: CloseAbnormalClosure}) {
					t.Errorf("%v after %v", err, time.Since(start))
				}
			})
		}
		wg.Wait()
	})
}

// Work that is marked while the connection is lost and found again is done, each time: a session waits for the
// connection and is queued at the same time, and neither must throw the queue into disorder.
func TestOutboxServesAllAfterReconnects(t *testing.T) {
	const sessions = 50
	rounds := 3000
	if testing.Short() || race.Enabled {
		rounds = 300
	}
	c, conn, count := newCountedClient(t)
	ep := c.ep
	all := make([]*session, sessions)
	for i := range all {
		s := unopenedStream(ep)
		if err := ep.register(s, s.controlToken()); err != nil {
			t.Fatal(err)
		}
		s.out.peer = s.reply() // before the first mark, so the outbox does not own it yet
		all[i] = s
	}
	for round := range rounds {
		var group sync.WaitGroup
		for k := range 2 {
			group.Go(func() {
				for i := range 10 * sessions {
					all[(i*7+k)%sessions].mark(workCredit)
					if i%16 == 0 {
						runtime.Gosched()
					}
				}
			})
		}
		conn.Set(nats.RECONNECTING)
		runtime.Gosched()
		conn.Set(nats.CONNECTED)
		group.Wait()
		before := make([]int64, sessions)
		for i, s := range all {
			before[i] = count(s.out.peer)
			s.mark(workCredit)
		}
		for i, s := range all {
			until(t, fmt.Sprintf("the outbox serves session %d in round %d", i, round), func() bool { return count(s.out.peer) > before[i] })
		}
	}
	// Once all is done nothing is published.
	var last int64
	for quiet := 0; quiet < 3; {
		time.Sleep(time.Millisecond)
		var sum int64
		for _, s := range all {
			sum += count(s.out.peer)
		}
		if quiet++; sum != last {
			last, quiet = sum, 0
		}
	}
}

// Two streams wait for the connection; it comes back for as long as serving one takes.
func TestOutboxKeepsWorkThatWaitsForTheConnection(t *testing.T) {
	conn := fake.New()
	c := fakeClient(t, conn, ClientParams{})
	requested := make(chan string, 10)
	var first atomic.Bool
	conn.Requested = func(m *nats.Msg) error {
		requested <- m.Subject
		if first.CompareAndSwap(false, true) {
			c.ep.outbox.up.Store(false)
		}
		return nil
	}
	conn.Set(nats.RECONNECTING)
	for c.ep.outbox.up.Load() {
		time.Sleep(time.Millisecond)
	}
	var streams []*Stream
	for _, subject := range []string{"one", "two"} {
		s, err := c.Open(t.Context(), subject, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		streams = append(streams, s)
	}
	for _, s := range streams { // until the outbox holds them both
		for s.session.pending.Load() != 0 {
			time.Sleep(time.Millisecond)
		}
	}
	time.Sleep(10 * time.Millisecond)
	conn.Set(nats.CONNECTED)
	<-requested
	time.Sleep(10 * time.Millisecond)
	conn.Set(nats.CONNECTED)
	select {
	case <-requested:
	case <-time.After(5 * time.Second):
		t.Fatal("the second request was forgotten when the connection went down again")
	}
}

// A connection that takes no bytes holds up the outbox. Streams end in time all the same.
func TestStreamsEndWhileConnectionTakesNoBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		conn := newRecorder(func(n int, _ []byte) error {
			if n > 0 {
				<-release
			}
			return nil
		})
		c := fakeClient(t, conn, ClientParams{})
		ep := c.ep
		w := c.NewWriter(consumerSubject(5))
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

// A connection that is slow takes bytes: no stream ends for it while packets of others go out.
func TestSlowConnectionEndsNoStream(t *testing.T) {
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
