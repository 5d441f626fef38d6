package stream

import (
	"bytes"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn/fake"
)

// What a large record takes while its pieces come is in the endpoint's budget: where there is no room the stream ends, and
// the bytes are given back in any case.
func TestReassemblyIsBudgeted(t *testing.T) {
	const size, budget = 3 << 20, 5 << 20
	for _, left := range []bool{false, true} { // the consumer leaves in mid-record
		synctest.Test(t, func(t *testing.T) {
			m := memoryTest(t, ClientParams{MaxBuffered: budget})
			m.handle(t, "large", func(w *Writer, _ *Request) error {
				_, err := w.Write(bytes.Repeat([]byte("x"), size))
				return err
			})
			type result struct {
				n   int
				err error
			}
			results := make(chan result, 2)
			recv := func(s *Stream) {
				rec, err := s.Recv()
				results <- result{len(rec), err}
			}
			packets := 0 // of the first stream; most of its record arrives, the rest has to wait
			m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
				if from == m.back && isSequenced(msg.Data) {
					packets++
				}
				return packets <= 9
			})
			first := m.open(t, "large")
			go recv(first)
			synctest.Wait()
			windows := first.session.window.Load()
			if held := m.client.ep.reserved.Load() - windows; held < 9*initialWindow || held > budget {
				t.Errorf("%d bytes are reserved for the record, of which %d have arrived", held, 9*initialWindow)
			}
			m.bus.SetFilter(func(_, _ *fake.Conn, msg *nats.Msg) bool {
				return !strings.HasPrefix(msg.Subject, first.session.reply)
			})
			second := m.open(t, "large")
			go recv(second)
			synctest.Wait()
			if r := <-results; !errors.Is(r.err, &CloseError{Code: CloseTryAgainLater}) {
				t.Errorf("a second record: %d bytes, %v; want close 1013", r.n, r.err)
			}
			m.bus.SetFilter(nil)
			if left {
				_ = first.Close()
			}
			switch r := <-results; {
			case left && !errors.Is(r.err, ErrClosed):
				t.Errorf("after Close: %v", r.err)
			case !left && (r.n != size || r.err != nil):
				t.Errorf("the first record: %d bytes, %v", r.n, r.err)
			}
			if !left {
				if _, err := first.Recv(); err != io.EOF {
					t.Error(err)
				}
			}
			time.Sleep(time.Minute)
			m.nothingLeft(t)
		})
	}
}

// openRaw opens a stream whose packets the test publishes itself, from m.back.
func openRaw(t *testing.T, params ClientParams) (m *memoryPair, s *Stream) {
	t.Helper()
	m = memoryTest(t, params)
	stop, err := m.back.Subscribe("raw", "", func(*nats.Msg) {})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	s = m.open(t, "raw")
	synctest.Wait()
	return m, s
}

// While a record is put together it takes what has arrived of it; then its reader has no more than the record. Small pieces,
// and packets padded with what is skipped, take a few times what they bring, whatever else the budget allows.
func TestReassemblyTakesWhatArrived(t *testing.T) {
	const size, each = 4200 << 10, 100 << 10
	pieces := func(n, each int, pad ...Frame) (packets [][]byte) {
		for i := range n {
			f := Frame{Type: FrameData, Flags: FlagMore, Payload: bytes.Repeat([]byte{byte(i)}, each)}
			if i == n-1 {
				f.Flags = 0
			}
			packets = append(packets, AppendPacket(nil, PacketHeader{Flags: PacketSeq, Sender: 7, Seq: uint32(i)}, append(pad, f)...))
		}
		return packets
	}
	padding := Frame{Type: frameSkippable, Payload: make([]byte, 30_000)}
	noRoom := &CloseError{Code: CloseTryAgainLater}
	for name, c := range map[string]struct {
		budget  int
		packets [][]byte
		most    int64 // bytes reserved at any time, the window's among them
		err     error
	}{
		"large":         {8 << 20, pieces(size/each, each), size + 2*initialWindow, nil},
		"tight":         {size + 2*initialWindow, pieces(size/each, each), size + 2*initialWindow, nil},
		"no room":       {size, pieces(size/each, each), size, noRoom},
		"small":         {8 << 20, pieces(20_000, 1), 3 * initialWindow, nil},
		"small, tight":  {initialWindow, pieces(20_000, 1), initialWindow, noRoom},
		"padded":        {8 << 20, pieces(1000, 1, padding), 3 * initialWindow, nil},
		"padded, tight": {initialWindow, pieces(1000, 1, padding), initialWindow, noRoom},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, s := openRaw(t, ClientParams{MaxBuffered: c.budget})
				var rec []byte
				read := make(chan error, 1)
				go func() {
					var err error
					rec, err = s.Recv()
					read <- err
				}()
				most := int64(0)
				for _, p := range c.packets {
					if err := m.back.Publish(s.session.reply, "", p); err != nil {
						t.Fatal(err)
					}
					synctest.Wait() // until it is taken
					most = max(most, m.client.ep.reserved.Load())
				}
				err := <-read
				if c.err == nil && err != nil || c.err != nil && !errors.Is(err, c.err) {
					t.Errorf("%v, want %v", err, c.err)
				}
				if most > c.most {
					t.Errorf("%d bytes were reserved, want at most %d", most, c.most)
				}
				var want []byte
				for _, p := range c.packets {
					_, body, _ := ParsePacketHeader(p)
					for len(body) > 0 && c.err == nil {
						var f Frame
						if f, body, err = ParseFrame(body); err != nil {
							t.Fatal(err)
						}
						if f.Type == FrameData {
							want = append(want, f.Payload...)
						}
					}
				}
				if !bytes.Equal(rec, want) || cap(rec) != len(rec) {
					t.Errorf("a record of %d bytes, capacity %d; want %d", len(rec), cap(rec), len(want))
				}
				_ = s.Close()
				m.nothingLeft(t)
			})
		})
	}
}

// A packet full of the smallest pieces costs its reader memory in proportion to the record, not for each piece.
func TestTinyPiecesAreLinear(t *testing.T) {
	one := AppendFrame(nil, Frame{Type: FrameData, Flags: FlagMore, Payload: []byte("x")})
	for _, size := range []int{1 << 18, 1 << 20} {
		synctest.Test(t, func(t *testing.T) {
			m, s := openRaw(t, ClientParams{})
			pieces := (size - PacketHeaderSize - FrameHeaderSize) / len(one)
			length := PacketHeaderSize + pieces*len(one) + FrameHeaderSize
			packet := AppendPacketHeader(nil, PacketHeader{Flags: PacketSeq, Sender: 8, Length: uint32(length)})
			packet = AppendFrame(append(packet, bytes.Repeat(one, pieces)...), Frame{Type: FrameData})
			if err := m.back.Publish(s.session.reply, "", packet); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			rec, err := s.Recv()
			runtime.ReadMemStats(&after)
			if err != nil || len(rec) != pieces {
				t.Errorf("a record of %d bytes, %v; want %d", len(rec), err, pieces)
			}
			if n, limit := after.TotalAlloc-before.TotalAlloc, uint64(3*pieces+2*maxChunk); n > limit {
				t.Errorf("%d bytes were allocated for a record of %d, want at most %d", n, pieces, limit)
			}
			_ = s.Close()
			m.nothingLeft(t)
		})
	}
}

// A record larger than MaxRecordSize ends the stream before memory is taken for what is too much of it.
func TestTooBigTakesNoMemory(t *testing.T) {
	const max, slack = 100_000, 20_000
	frame := func(n int, flags FrameFlags) Frame {
		return Frame{Type: FrameData, Flags: flags, Payload: make([]byte, n)}
	}
	for name, frames := range map[string][]Frame{
		"one frame":          {frame(max+1, 0)},
		"first piece":        {frame(max+1, FlagMore)},
		"second piece":       {frame(60_000, FlagMore), frame(60_000, FlagMore)},
		"last piece":         {frame(60_000, FlagMore), frame(60_000, 0)},
		"pieces without end": {frame(30_000, FlagMore), frame(30_000, FlagMore), frame(30_000, FlagMore), frame(30_000, FlagMore)},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, s := openRaw(t, ClientParams{MaxRecordSize: max})
				for i, f := range frames {
					packet := AppendPacket(nil, PacketHeader{Flags: PacketSeq, Sender: 7, Seq: uint32(i)}, f)
					if err := m.back.Publish(s.session.reply, "", packet); err != nil {
						t.Fatal(err)
					}
				}
				synctest.Wait()
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				_, err := s.Recv()
				runtime.ReadMemStats(&after)
				if !errors.Is(err, &CloseError{Code: CloseMessageTooBig}) {
					t.Errorf("%v, want close 1009", err)
				}
				if n := after.TotalAlloc - before.TotalAlloc; n > slack {
					t.Errorf("%d bytes were allocated, want at most %d", n, slack)
				}
				m.nothingLeft(t)
			})
		})
	}
}

// A large record of one stream does not hold up small ones of another: its pieces and their packets take turns.
func TestLargeAndSmallTakeTurns(t *testing.T) {
	const piece = 16 << 10
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		release := make(chan struct{})
		send := func(size int) Handler {
			return func(w *Writer, _ *Request) error {
				if _, err := w.Write(nil); err != nil { // the consumer is bound
					return err
				}
				<-release
				for range max(1, 600_000/size) {
					if _, err := w.Write(make([]byte, size)); err != nil {
						return err
					}
				}
				return nil
			}
		}
		m.handle(t, "large", send(1<<20))
		m.handle(t, "small", send(1000))
		large, small := m.open(t, "large"), m.open(t, "small")
		synctest.Wait()
		// While the connection is down both fill their credit. All is sent when it comes back, by one goroutine: in which
		// order depends on nothing else.
		m.back.Set(nats.RECONNECTING)
		synctest.Wait()
		m.server.ep.maxPayload.Store(piece) // so that many pieces fit the credit
		close(release)
		synctest.Wait()
		var order strings.Builder
		m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
			if from == m.back && isSequenced(msg.Data) {
				order.WriteString(map[string]string{large.session.reply: "L", small.session.reply: "s"}[msg.Subject])
			}
			return true
		})
		m.back.Set(nats.CONNECTED)
		synctest.Wait()
		m.bus.SetFilter(nil)
		got := order.String()
		n := min(strings.Count(got, "L"), strings.Count(got, "s"))
		if n < initialWindow/piece-1 {
			t.Fatalf("packets went in the order %s: too few to tell", got)
		}
		// At the beginning a session may be queued and wait for the connection at the same time: it has two turns once.
		turns := got[:2*(n-1)]
		if doubles := strings.Count(turns, "LL") + strings.Count(turns, "ss"); doubles > 2 || strings.Contains(turns, "LLL") || strings.Contains(turns, "sss") {
			t.Errorf("packets went in the order %s", got)
		}
		for _, s := range []*Stream{large, small} {
			for _, err := range s.All() {
				if err != nil {
					t.Fatal(err)
				}
			}
		}
		m.nothingLeft(t)
	})
}
