package stream

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn/fake"
)

// roundTrips returns those that windows are tested with. In a bubble processors take no time, so a round trip of zero
// would have no rate.
func roundTrips() []time.Duration {
	if testing.Short() {
		return []time.Duration{time.Millisecond, 200 * time.Millisecond}
	}
	return []time.Duration{20 * time.Microsecond, time.Millisecond, 10 * time.Millisecond, 50 * time.Millisecond, 200 * time.Millisecond}
}

// smallWindows are parameters an eighth as large as the defaults, so that tests move fewer bytes.
var smallWindows = ClientParams{Window: defaultWindow / 8, MaxBuffered: defaultMaxBuffered / 8}

// pour is a handler that writes records of size bytes until its consumer leaves.
func pour(size int) Handler {
	return func(w *Writer, _ *Request) error {
		for rec := make([]byte, size); ; {
			if _, err := w.Write(rec); err != nil {
				return nil
			}
		}
	}
}

// drink is a handler that reads until its consumer leaves.
func drink(_ *Writer, r *Request) error {
	for {
		if _, err := r.Recv(); err != nil {
			return nil
		}
	}
}

// quiet is a handler that neither reads nor writes.
func quiet(_ *Writer, r *Request) error {
	<-r.Context().Done()
	return nil
}

// read reads records until d has passed and returns their bytes.
func read(t *testing.T, s *Stream, d time.Duration) (n int) {
	for start := time.Now(); time.Since(start) < d; {
		rec, err := s.Recv()
		if err != nil {
			t.Error(err)
			return n
		}
		n += len(rec)
	}
	return n
}

// write writes records of size bytes until d has passed and returns their bytes.
func write(t *testing.T, s *Stream, size int, d time.Duration) (n int) {
	rec := make([]byte, size)
	for start := time.Now(); time.Since(start) < d; {
		m, err := s.Write(rec)
		if err != nil {
			t.Error(err)
			return n
		}
		n += m
	}
	return n
}

// A window grows to the largest whatever the round trip, the size of records and the place where the grants fall.
func TestWindowGrowsAtEveryRoundTrip(t *testing.T) {
	for _, rtt := range roundTrips() {
		for _, size := range []int{500, 4000, 16 << 10, 33_000, 60_000, 200_000} {
			t.Run(fmt.Sprintf("%v/%d", rtt, size), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := memoryTest(t, smallWindows)
					m.bus.Delay = rtt / 2
					m.handle(t, "pour", pour(size))
					s := m.open(t, "pour")
					read(t, s, 40*rtt)
					if w := s.session.bucket.window.Bytes; w != uint64(smallWindows.Window) {
						t.Errorf("a window of %d bytes after 40 round trips, want %d", w, smallWindows.Window)
					}
					if n, want := read(t, s, 20*rtt), 10*smallWindows.Window; n < want {
						t.Errorf("%d bytes came in 20 round trips, want at least %d", n, want)
					}
					_ = s.Close()
				})
			})
		}
	}
}

// Streams that are open, or were busy before, do not slow a busy one, in either direction.
func TestIdleStreamsSlowNobody(t *testing.T) {
	const size = 16 << 10
	idle := 10_000
	if testing.Short() {
		idle /= 20
	}
	for _, rtt := range roundTrips() {
		for _, up := range []bool{false, true} {
			move := func(t *testing.T, m *memoryPair, subject string, d time.Duration) (*Stream, int) {
				s := m.open(t, subject)
				if up {
					return s, write(t, s, size, d)
				}
				return s, read(t, s, d)
			}
			rate := func(t *testing.T, before func(t *testing.T, m *memoryPair)) (n int) {
				synctest.Test(t, func(t *testing.T) {
					m := memoryTest(t, smallWindows)
					m.bus.Delay = rtt / 2
					m.handle(t, "quiet", quiet)
					m.handle(t, "busy", pour(size))
					if up {
						m.handle(t, "drink", drink)
					}
					before(t, m)
					subject := "busy"
					if up {
						subject = "drink"
					}
					var s *Stream
					s, n = move(t, m, subject, 60*rtt)
					_ = s.Close()
				})
				return n
			}
			alone := 0
			for _, c := range []struct {
				name   string
				before func(t *testing.T, m *memoryPair)
			}{
				{"alone", func(*testing.T, *memoryPair) {}},
				{"two that were busy", func(t *testing.T, m *memoryPair) { wereBusy(t, m, move, up, rtt, 2) }},
				{"thirty that were busy", func(t *testing.T, m *memoryPair) { wereBusy(t, m, move, up, rtt, 30) }},
				{"open", func(t *testing.T, m *memoryPair) {
					for range 200 {
						m.open(t, "quiet")
					}
				}},
				{"many open", func(t *testing.T, m *memoryPair) {
					for range idle {
						m.open(t, "quiet")
					}
				}},
			} {
				t.Run(fmt.Sprintf("%v/up=%v/%s", rtt, up, c.name), func(t *testing.T) {
					n := rate(t, c.before)
					if alone == 0 {
						alone = n
					}
					if n < alone*8/10 {
						t.Errorf("%d bytes in 60 round trips, %d alone", n, alone)
					}
				})
			}
		}
	}
}

// wereBusy opens n streams that are busy one after the other, and stay open and silent afterwards.
func wereBusy(t *testing.T, m *memoryPair, move func(*testing.T, *memoryPair, string, time.Duration) (*Stream, int), up bool, rtt time.Duration, n int) {
	t.Helper()
	stop := make([]atomic.Bool, n)
	for i := range n {
		subject := fmt.Sprintf("busy%d", i)
		m.handle(t, subject, func(w *Writer, r *Request) error {
			if up {
				return drink(w, r)
			}
			for rec := make([]byte, 16<<10); !stop[i].Load(); {
				if _, err := w.Write(rec); err != nil {
					return nil
				}
			}
			return quiet(w, r)
		})
		s, _ := move(t, m, subject, 30*rtt)
		stop[i].Store(true)
		if !up {
			go func() { // what was on its way
				for {
					if _, err := s.Recv(); err != nil {
						return
					}
				}
			}()
		}
	}
	time.Sleep(time.Second)
}

// Streams that are busy at once share what there is, and use most of it.
func TestBusyStreamsShare(t *testing.T) {
	const size = 16 << 10
	many := 100
	if testing.Short() {
		many /= 4
	}
	for _, rtt := range roundTrips() {
		for _, streams := range []int{2, 10, many} {
			t.Run(fmt.Sprintf("%v/%d", rtt, streams), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := memoryTest(t, smallWindows)
					m.bus.Delay = rtt / 2
					m.handle(t, "pour", pour(size))
					rates := make([]float64, streams)
					var all sync.WaitGroup
					for i := range streams {
						all.Go(func() {
							time.Sleep(time.Duration(i) * rtt / 10) // they begin one after the other
							s := m.open(t, "pour")
							read(t, s, 40*rtt)
							rates[i] = float64(read(t, s, 40*rtt))
							_ = s.Close()
						})
					}
					all.Wait()
					var sum, squares float64
					for _, r := range rates {
						sum += r
						squares += r * r
					}
					if jain := sum * sum / (float64(streams) * squares); jain < 0.8 {
						t.Errorf("Jain's index is %.2f, want at least 0.8: %.0f", jain, rates)
					}
					if want := 40 * 0.5 * min(float64(smallWindows.MaxBuffered/growthPart), float64(streams*smallWindows.Window)); sum < want {
						t.Errorf("%.0f bytes came in 40 round trips, want at least %.0f", sum, want)
					}
				})
			})
		}
	}
}

// Streams that hold no packet reserve nothing, whatever went through them, and large records find all of the budget.
func TestIdleStreamsReserveNothing(t *testing.T) {
	const size = 1 << 20
	streams := 12_000
	if testing.Short() {
		streams /= 10
	}
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{MaxBuffered: streams * (64 << 20 / 12_000)})
		m.server.room.handlers = 2 * streams
		m.bus.Delay = time.Millisecond
		m.handle(t, "little", func(w *Writer, r *Request) error {
			if _, err := w.Write(make([]byte, 30_000)); err != nil {
				return err
			}
			return quiet(w, r)
		})
		m.handle(t, "large", func(w *Writer, _ *Request) error {
			_, err := w.Write(make([]byte, size))
			return err
		})
		var read atomic.Int64
		for range streams {
			s := m.open(t, "little")
			go func() {
				for {
					if _, err := s.Recv(); err != nil {
						return
					}
					read.Add(1)
				}
			}()
		}
		time.Sleep(10 * time.Second)
		if n := int(read.Load()); n != streams {
			t.Fatalf("%d of %d streams got their record", n, streams)
		}
		if n := m.client.Stats().Reserved; n != 0 {
			t.Errorf("%d bytes are reserved for idle streams", n)
		}
		start := time.Now()
		var all sync.WaitGroup
		for range 3 {
			all.Go(func() {
				s := m.open(t, "large")
				if rec, err := s.Recv(); err != nil || len(rec) != size {
					t.Errorf("%d bytes, %v", len(rec), err)
				}
				_ = s.Close()
			})
		}
		all.Wait()
		took(t, "three large records at once beside idle streams", start, 0, time.Second/2)
	})
}

// unread takes, and returns the bytes of packets that a stream's reader has not read.
func unread(s *session) (n int) {
	for {
		p, ok := s.bucket.ring.Pop()
		if !ok {
			return n
		}
		n += len(p.data)
	}
}

// If a reader keeps up, the mux takes memory only for the first packets. Later packets use the memory that the reader leaves
// to the stream.
func TestReaderThatKeepsUpKeepsItsMemory(t *testing.T) {
	for _, size := range []int{100, 1 << 10, 16 << 10, 32 << 10} {
		conn := benchConn(false)
		s, deliver := muxStream(t, conn, fakeClient(t, conn, ClientParams{}))
		taken := 0
		warm := uint32(20 + initialWindow/size) // packets at the beginning
		for seq := range 2 * warm {
			before := s.session.recv.held.Load()
			deliver(testPacket(7, seq, Frame{Type: FrameData, Payload: make([]byte, size)}))
			if s.session.recv.held.Load() > before && seq >= warm {
				taken++
			}
			if seq == 0 {
				continue // the reader is one packet behind, so it never runs dry
			}
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		if held := s.session.recv.held.Load(); taken > 0 || held > roomStep {
			t.Errorf("records of %d bytes: the mux took memory for %d of the later packets, and the stream has %d bytes; want none, and at most %d", size, taken, held, roomStep)
		}
	}
}

// A peer that sends all it was granted at once, on many streams that nobody reads, does not make this end hold more
// than its budget, the free bytes of each stream, and a packet.
func TestFloodIsBounded(t *testing.T) {
	const budget, streams, packets, packet = 4 << 20, 100, 20, 100_000
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{MaxBuffered: budget})
		stop, err := m.back.Subscribe("raw", "", func(*nats.Msg) {})
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		all := make([]*Stream, streams)
		for i := range all {
			all[i] = m.open(t, "raw")
			all[i].session.bucket.grantedBytes.Store(1 << 40) // as if it had been busy for long
			all[i].session.bucket.grantedPackets.Store(maxPackets)
		}
		synctest.Wait()
		for seq := range uint32(packets) {
			p := AppendPacket(nil, PacketHeader{Flags: PacketSeq, Sender: 6, Seq: seq}, Frame{Type: FrameData, Payload: make([]byte, packet)})
			for _, s := range all {
				if err := m.back.Publish(s.session.reply(), "", p); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait()
		}
		if n := m.client.Stats().Reserved; n > budget || n < budget/2 {
			t.Errorf("%d bytes are reserved of %d", n, budget)
		}
		if m.client.Stats().DroppedNoRoom == 0 {
			t.Error("no packet was dropped")
		}
		sum, fewest := 0, budget
		for _, s := range all {
			n := unread(&s.session)
			sum += n
			fewest = min(fewest, n)
			if e := s.session.end.Load(); e != nil {
				t.Fatalf("a stream within its credit ended: %v", e.err)
			}
		}
		if most := budget + streams*(minWindow+packet+100); sum > most || fewest == 0 {
			t.Errorf("%d bytes are held, want at most %d; one stream holds %d", sum, most, fewest)
		}
	})
}

// Packets that found no room are sent again when there is some. All records arrive in order, and nobody's stream ends
// meanwhile, although their handlers returned long before anybody read.
func TestDroppedForWantOfRoomIsRepaired(t *testing.T) {
	const budget, streams, records, size = 1 << 20, 40, 200, 1000
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{MaxBuffered: budget})
		m.server.ep.budget = defaultMaxBuffered // a server that has little memory left does not wait so long
		m.bus.Delay = time.Millisecond
		var returned atomic.Int64
		m.handle(t, "numbers", func(w *Writer, _ *Request) error {
			for i := range records {
				if _, err := w.Write(binary.BigEndian.AppendUint32(make([]byte, size), uint32(i))); err != nil {
					return err
				}
			}
			returned.Add(1)
			return nil
		})
		all := make([]*Stream, streams)
		for i := range all {
			all[i] = m.open(t, "numbers")
			all[i].session.bucket.grantedBytes.Store(1 << 40)
		}
		time.Sleep(time.Minute)
		if returned.Load() == 0 {
			t.Error("no handler has returned")
		}
		for i, s := range all {
			time.Sleep(time.Second)
			for j := range records {
				rec, err := s.Recv()
				if err != nil {
					t.Fatalf("stream %d, record %d: %v", i, j, err)
				}
				if n := binary.BigEndian.Uint32(rec[size:]); n != uint32(j) {
					t.Fatalf("stream %d: record %d, want %d", i, n, j)
				}
			}
			if _, err := s.Recv(); err != io.EOF {
				t.Errorf("stream %d: %v at the end", i, err)
			}
		}
		if m.client.Stats().DroppedNoRoom == 0 {
			t.Error("no packet was dropped")
		}
		m.nothingLeft(t)
	})
}

// A packet that finds no room has passed whatever lies between the two ends. So its size is not suspected, it is sent
// again as a whole, and a stream whose packets pass only in fragments does not end, however long its reader pauses.
func TestWantOfRoomIsNoFaultOfSizes(t *testing.T) {
	const budget, records = 1 << 20, 30
	for _, c := range []struct {
		name    string
		size    int // of records
		passes  int // larger messages do not pass
		inParts bool
	}{
		{"all sizes pass", 30_000, 1 << 20, false},
		{"records pass in large fragments", 30_000, 10_000, true},
		{"records pass in small fragments", 3000, 2000, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{MaxBuffered: budget})
				m.bus.Delay = time.Millisecond
				var parts atomic.Int64
				m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
					if from == m.back && isFrame(msg.Data, FrameFragment) && len(msg.Data) > 100 {
						parts.Add(1)
					}
					return len(msg.Data) <= c.passes
				})
				m.handle(t, "growing", func(w *Writer, _ *Request) error {
					for i := range records {
						if _, err := w.Write(binary.BigEndian.AppendUint32(make([]byte, min(c.size, 1000*(i+1))), uint32(i))); err != nil {
							return err
						}
						if err := w.Flush(); err != nil {
							return err
						}
					}
					return nil
				})
				s := m.open(t, "growing")
				m.client.ep.arrived.Add(budget) // the packets of other streams
				time.Sleep(5 * time.Minute)
				if m.client.Stats().DroppedNoRoom == 0 {
					t.Error("no packet was dropped")
				}
				for i := range records {
					if i == records/2 {
						m.client.ep.arrived.Add(-budget)
					}
					rec, err := s.Recv()
					if err != nil {
						t.Fatalf("record %d: %v", i, err)
					}
					if n := binary.BigEndian.Uint32(rec[len(rec)-4:]); n != uint32(i) {
						t.Fatalf("record %d, want %d", n, i)
					}
					time.Sleep(time.Second)
				}
				if _, err := s.Recv(); err != io.EOF {
					t.Error(err)
				}
				if n := parts.Load(); n > 0 != c.inParts {
					t.Errorf("%d fragments were sent", n)
				}
			})
		})
	}
}

// Fragments of packets that never become complete take at most the budget, and one packet for each stream. Repeated
// beginnings take nothing more, and the end of the streams gives everything back.
func TestFloodOfFragmentsIsBounded(t *testing.T) {
	const budget, streams = 1 << 20, 50
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{MaxBuffered: budget})
		stop, err := m.back.Subscribe("raw", "", func(*nats.Msg) {})
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		all := make([]*Stream, streams)
		for i := range all {
			all[i] = m.open(t, "raw")
		}
		synctest.Wait()
		for _, at := range []Fragment{{Length: maxFragmented}, {Length: maxFragmented}, {Packet: 1, Length: maxFragmented}, {Offset: 10, Length: maxFragmented}} {
			payload := append(AppendFragment(nil, at), make([]byte, 10)...)
			p := AppendPacket(nil, PacketHeader{Sender: 6, Seq: at.Packet}, Frame{Type: FrameFragment, Payload: payload})
			for _, s := range all {
				if err := m.back.Publish(s.session.reply(), "", p); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Wait()
			if n := m.client.Stats().Reserved; n == 0 || n > budget {
				t.Errorf("%d bytes are reserved of %d", n, budget)
			}
			sum := 0
			for _, s := range all {
				if f := s.session.bucket.ring.Between.fragments.Load(); f != nil {
					sum += cap(f.whole)
				}
			}
			if sum == 0 || sum > streams*maxFragmented {
				t.Errorf("packets of %d bytes are being assembled, want at most %d", sum, streams*maxFragmented)
			}
		}
		for _, s := range all {
			if e := s.session.end.Load(); e != nil {
				t.Fatalf("a stream ended: %v", e.err)
			}
			_ = s.Close()
		}
		synctest.Wait()
		if n := m.client.Stats().Reserved; n != 0 {
			t.Errorf("%d bytes are reserved when all streams have ended", n)
		}
	})
}

// Packets that do not pass are smaller from then on. They grow again after a path is found that takes large ones.
func TestPacketsGrowAgainWhenLargeOnesPass(t *testing.T) {
	const size, limit = 30_000, 16_000
	for _, up := range []bool{false, true} {
		t.Run(fmt.Sprintf("up=%v", up), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var (
					narrow  atomic.Bool // the path drops messages of more than limit bytes
					largest atomic.Int64
				)
				m := memoryTest(t, smallWindows)
				m.bus.Delay = 5 * time.Millisecond
				m.bus.SetFilter(func(_, _ *fake.Conn, msg *nats.Msg) bool {
					if narrow.Load() && len(msg.Data) > limit {
						return false
					}
					largest.Store(max(largest.Load(), int64(len(msg.Data))))
					return true
				})
				m.handle(t, "pour", pour(size))
				m.handle(t, "drink", drink)
				subject := map[bool]string{false: "pour", true: "drink"}[up]
				s := m.open(t, subject)
				move := func(d time.Duration) int64 {
					largest.Store(0)
					n := 0
					if up {
						n = write(t, s, size, d)
					} else {
						n = read(t, s, d)
					}
					if n < 10*size {
						t.Errorf("%d bytes came in %v", n, d)
					}
					return largest.Load()
				}
				narrow.Store(true)
				move(2 * time.Second)
				if got := move(time.Second); got > limit {
					t.Errorf("a message of %d bytes passed a path for %d", got, limit)
				}
				narrow.Store(false)
				time.Sleep(2 * time.Minute)
				move(time.Second)
				if got := move(time.Second); got < size {
					t.Errorf("messages of at most %d bytes after 2 min on a path for larger ones, want %d", got, size)
				}
				_ = s.Close()
			})
		})
	}
}
