package stream

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn/fake"
)

// However many streams there are whose peers do not acknowledge, they share the budget, and each goes on.
func TestStreamsShareWhatMayBeKept(t *testing.T) {
	const budget, window, packet = 64 << 20, 4 << 20, 40 << 10
	for _, streams := range []int{1, 10, 100, 1000, 50_000} {
		var all int64
		kept := make([]uint64, streams)
		for more := true; more; {
			more = false
			for i := range kept {
				if mayKeep(kept[i], all, window, budget) {
					kept[i] += packet
					all += packet
					more = true
				}
			}
		}
		least, most := kept[0], kept[0]
		for _, k := range kept {
			least, most = min(least, k), max(most, k)
		}
		if limit := budget + int64(streams)*(minWindow+packet); all > limit {
			t.Errorf("%d streams keep %d bytes, want at most %d", streams, all, limit)
		}
		if most > window+packet || least == 0 || most-least > packet {
			t.Errorf("%d streams keep %d to %d bytes each", streams, least, most)
		}
		// One that comes later gets nearly as much.
		var late uint64
		for mayKeep(late, all, window, budget) {
			late += packet
			all += packet
		}
		if late+packet < least/2 {
			t.Errorf("beside %d streams that keep %d bytes each another may keep %d", streams, least, late)
		}
	}
}

// silent opens streams on subject, each from a client of its own, and keeps their consumers from saying anything: tell says it
// for them.
func (m *memoryPair) silent(t *testing.T, subject string, n int) (streams []*Stream, tell func(s *Stream, f Frame)) {
	t.Helper()
	for range n {
		ep, err := newEndpoint(m.bus.Connect("silent"), "", m.times)
		if err != nil {
			t.Fatal(err)
		}
		c := &Client{ep: ep, codec: MsgPack}
		t.Cleanup(func() { c.Close() })
		s, err := c.Open(t.Context(), subject, nil)
		if err != nil {
			t.Fatal(err)
		}
		streams = append(streams, s)
	}
	synctest.Wait()
	m.bus.SetFilter(func(from, _ *fake.Conn, _ *nats.Msg) bool { return from == m.back })
	return streams, func(s *Stream, f Frame) {
		m.server.ep.receive(&nats.Msg{Subject: s.session.out.peer, Data: s.controlPacket(f)})
		synctest.Wait()
	}
}

// grantsAll is a CREDIT that grants more than anybody sends.
func grantsAll(ack uint32) Frame {
	return Frame{Type: FrameCredit, Payload: AppendCredit(nil, Credit{Ack: ack, Packets: ack + 1<<20, Bytes: 1 << 50})}
}

// memoryOf returns the bytes of the buffers that the sender of s has, counted one by one.
func memoryOf(w *Writer) (n, written int64) {
	q := w.unacked.Unacked // a copy: only its cursor changes
	q.Again(q.Acked(), 1<<62, 0)
	for p, ok := q.Missing(); ok; p, ok = q.Missing() {
		n, written = n+int64(cap(p.buf)), written+int64(len(p.buf))
		q.Resent()
	}
	for range w.ready.Len() { // the outbox is idle
		p, _ := w.ready.Pop()
		n, written = n+int64(cap(p.buf)), written+int64(len(p.buf))
		w.ready.Push(p)
	}
	if w.open != nil {
		n, written = n+int64(cap(w.open.buf)), written+int64(w.n)
	}
	return n, written
}

// What a producer keeps for a peer that grants without end and acknowledges nothing is counted as it lies in memory. It is
// bounded by the window, and by the budget for all streams together, whatever the records are like.
func TestKeptIsCountedAndBounded(t *testing.T) {
	const window, budget = 256 << 10, 4 << 20
	for name, c := range map[string]struct {
		streams, size int
		flush         bool
	}{
		"records above a packet":        {1, 33_000, false},
		"records of many packets":       {1, 700_000, false},
		"records of a packet":           {1, coalesceSize - 100, false},
		"just above a class":            {1, 4090, true},
		"small, each flushed":           {1, 500, true},
		"tiny, each flushed":            {1, 1, true},
		"small":                         {1, 1000, false},
		"many streams, above a packet":  {50, 33_000, false},
		"many streams, each flushed":    {50, 1000, true},
		"many streams, of many packets": {20, 700_000, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{Window: window, MaxBuffered: budget})
				begin := make(chan struct{})
				writers := make(chan *Writer, c.streams)
				m.handle(t, "svc", func(w *Writer, _ *Request) error {
					if _, err := w.Write(nil); err != nil { // the consumer knows where its producer is
						return err
					}
					writers <- w
					<-begin
					for {
						if _, err := w.Write(make([]byte, c.size)); err != nil {
							return err
						}
						if c.flush {
							if err := w.Flush(); err != nil {
								return err
							}
						}
					}
				})
				streams, tell := m.silent(t, "svc", c.streams)
				for _, s := range streams {
					tell(s, grantsAll(0))
				}
				close(begin)
				synctest.Wait()
				var memory, written int64
				for range c.streams {
					n, bytes := memoryOf(<-writers)
					if n > window+singleSize {
						t.Errorf("a stream keeps %d bytes, its window is %d", n, window)
					}
					memory, written = memory+n, written+bytes
				}
				if kept := m.server.Stats().Kept; kept != memory {
					t.Errorf("%d bytes count as kept, %d are", kept, memory)
				}
				// A packet of each goroutine that runs may be opened at the same time.
				if limit := int64(budget + c.streams*(minWindow+coalesceSize) + 4*singleSize); memory > limit {
					t.Errorf("all streams keep %d bytes, want at most %d", memory, limit)
				}
				packets := int64(0)
				if c.size < 512 {
					packets = maxUnacked * 512
				}
				if memory > 2*written+packets {
					t.Errorf("%d bytes are kept for %d that were written", memory, written)
				}
				for _, s := range streams {
					tell(s, Frame{Type: FrameReset, Code: CloseCanceled})
					_ = s.Close()
				}
				m.nothingLeft(t)
			})
		})
	}
}

// A consumer that acknowledges a packet now and then is waited for, but neither for hours nor while others need the memory.
func TestTrickledAcknowledgementsEnd(t *testing.T) {
	const packets, every = 2000, 4 * time.Second
	for name, c := range map[string]struct {
		streams, budget int
		least, most     time.Duration
	}{
		"there is room": {1, 64 << 20, 30 * time.Minute, time.Duration(maxLinger) + 2*defaultResumeTimeout},
		"others wait":   {4, 3700 << 10, 0, 4 * defaultResumeTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{MaxBuffered: c.budget, Window: 4 << 20})
				begin := make(chan struct{})
				m.handle(t, "svc", func(w *Writer, _ *Request) error {
					if _, err := w.Write(nil); err != nil { // the consumer knows where its producer is
						return err
					}
					<-begin
					for range maxUnacked - 2 {
						if _, err := w.Write(make([]byte, 40)); err != nil { // all of them fit on a line that was not measured
							return err
						}
						if err := w.Flush(); err != nil {
							return err
						}
					}
					return nil
				})
				streams, tell := m.silent(t, "svc", c.streams)
				for _, s := range streams {
					tell(s, grantsAll(0))
				}
				close(begin)
				synctest.Wait()
				start, ack := time.Now(), uint32(0)
				for ack < packets && m.server.Stats().Streams > 0 {
					time.Sleep(every)
					ack++
					for _, s := range streams {
						tell(s, grantsAll(ack))
					}
				}
				if d := time.Since(start); d < c.least || d > c.most {
					t.Errorf("it was kept for %v, want %v to %v", d, c.least, c.most)
				}
				m.bus.SetFilter(nil)
				for _, s := range streams {
					_ = s.Close()
				}
				m.nothingLeft(t)
			})
		})
	}
}
