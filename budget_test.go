package stream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn/fake"
)

// What a large record takes while its pieces come is in the endpoint's budget. A record that finds no room waits, and so does
// its sender, until another is complete or given up. The bytes are given back in any case.
func TestReassemblyIsBudgeted(t *testing.T) {
	const size, budget = 3 << 20, 4 << 20
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
			recv := func(s *Stream) chan result {
				results := make(chan result, 1)
				go func() {
					rec, err := s.Recv()
					results <- result{len(rec), err}
				}()
				return results
			}
			arrived := 0 // bytes of the first stream; most of its record arrives, the rest has to wait
			m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
				if from == m.back && isSequenced(msg.Data) && arrived < 9*initialWindow {
					arrived += len(msg.Data)
					return true
				}
				return arrived < 9*initialWindow
			})
			first := m.open(t, "large")
			firstResult := recv(first)
			synctest.Wait()
			windows := first.session.recv.window.Load()
			if held := m.client.ep.reserved.Load() - windows; held < 9*initialWindow || held > budget {
				t.Errorf("%d bytes are reserved for the record, of which %d have arrived", held, 9*initialWindow)
			}
			arrived = 0
			m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
				if msg.Subject == first.session.reply {
					return false
				}
				if from == m.back && isSequenced(msg.Data) {
					arrived += len(msg.Data)
				}
				return true
			})
			second := m.open(t, "large")
			secondResult := recv(second)
			time.Sleep(time.Second)
			synctest.Wait()
			select {
			case r := <-secondResult:
				t.Errorf("a second record did not wait: %d bytes, %v", r.n, r.err)
			default:
			}
			if most := budget/2 + initialWindow; arrived == 0 || arrived > most {
				t.Errorf("%d bytes arrived of a record that waits, want at most %d", arrived, most)
			}
			m.bus.SetFilter(nil)
			if left {
				_ = first.Close()
			}
			switch r := <-firstResult; {
			case left && !errors.Is(r.err, ErrClosed):
				t.Errorf("after Close: %v", r.err)
			case !left && (r.n != size || r.err != nil):
				t.Errorf("the first record: %d bytes, %v", r.n, r.err)
			}
			if r := <-secondResult; r.n != size || r.err != nil {
				t.Errorf("the second record: %d bytes, %v", r.n, r.err)
			}
			for _, s := range []*Stream{first, second} {
				if _, err := s.Recv(); err != io.EOF && !(left && s == first) {
					t.Error(err)
				}
			}
			m.nothingLeft(t)
		})
	}
}

// Many large records at once all arrive, at a consumer and at handlers, and hold no more than the budget and one record.
func TestManyLargeRecordsArrive(t *testing.T) {
	const streams, size, budget = 20, 3 << 20, 4 << 20
	const most = budget + 9*size/4 + maxChunk
	record := bytes.Repeat([]byte("x"), size)
	for _, up := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			m := memoryTest(t, ClientParams{MaxBuffered: budget})
			reserved := &m.client.ep.reserved
			read := func(s interface{ Recv() ([]byte, error) }) {
				for range 2 {
					if rec, err := s.Recv(); err != nil || !bytes.Equal(rec, record) {
						t.Errorf("a record of %d bytes, %v", len(rec), err)
					}
					if n := reserved.Load(); n > most {
						t.Errorf("%d bytes are reserved, want at most %d", n, most)
					}
				}
				if _, err := s.Recv(); err != io.EOF {
					t.Errorf("at the end: %v", err)
				}
			}
			write := func(w io.Writer) {
				for range 2 {
					if _, err := w.Write(record); err != nil {
						t.Error(err)
					}
				}
			}
			m.handle(t, "large", func(w *Writer, r *Request) error {
				if up {
					read(r)
				} else {
					write(w)
				}
				return nil
			})
			if up {
				reserved = &m.server.ep.reserved
			}
			var all sync.WaitGroup
			for range streams {
				s := m.open(t, "large")
				all.Go(func() {
					if !up {
						read(s)
						return
					}
					write(s)
					if err := s.CloseSend(); err != nil {
						t.Error(err)
					}
					if _, err := s.Recv(); err != io.EOF {
						t.Error(err)
					}
				})
			}
			all.Wait()
			m.nothingLeft(t)
		})
	}
}

// Records that are never completed give way to those that wait: their streams end with 1013, and the others' records arrive.
func TestUnfinishedRecordsGiveWay(t *testing.T) {
	const size, budget = 1 << 20, 4 << 20
	for _, c := range []struct {
		name string
		own  bool // the records that wait are of the same peer
		most time.Duration
	}{
		{"another peer waits", false, 40 * time.Second},
		{"the same peer waits", true, 20 * time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{MaxBuffered: budget})
				conn := m.bus.Connect("unfinished")
				server, err := newServer(conn, "", ServerParams{PeerTimeout: time.Hour, ResumeTimeout: time.Hour})
				if err != nil {
					t.Fatal(err)
				}
				defer server.Close()
				large := func(w *Writer, _ *Request) error {
					_, err := w.Write(make([]byte, size))
					return err
				}
				m.handle(t, "other", large)
				_, err = server.Handle("own", large)
				if err != nil {
					t.Fatal(err)
				}
				_, err = server.Handle("unfinished", func(w *Writer, r *Request) error {
					time.Sleep(100 * time.Millisecond) // the consumer hears where the handler is
					piece := Frame{Type: FrameData, Flags: FlagMore, Payload: make([]byte, 200<<10)}
					packet := AppendPacket(nil, PacketHeader{Flags: PacketSeq, Sender: w.session.sender}, piece)
					if err := conn.Publish(w.session.out.peer, "", packet); err != nil {
						t.Error(err)
					}
					<-r.Context().Done()
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
				var unfinished, controls sync.Map // their subjects at both ends
				m.bus.SetFilter(func(_, _ *fake.Conn, msg *nats.Msg) bool {
					if _, is := unfinished.Load(msg.Subject); is && msg.Reply != "" {
						controls.Store(msg.Reply, true)
					}
					_, is := controls.Load(msg.Subject)
					return !is || !isFrame(msg.Data, FrameCredit) // the handler's end knows nothing of the piece
				})
				var all sync.WaitGroup
				defer all.Wait()
				for range 30 {
					s := m.open(t, "unfinished")
					unfinished.Store(s.session.reply, true)
					all.Go(func() {
						if _, err := s.Recv(); !errors.Is(err, &CloseError{Code: CloseTryAgainLater}) && !errors.Is(err, ErrClosed) {
							t.Errorf("a record that is not completed: %v, want close 1013", err)
						}
					})
					defer s.Close()
				}
				time.Sleep(time.Second)
				start := time.Now()
				subject := "other"
				if c.own {
					subject = "own"
				}
				for range 3 {
					s := m.open(t, subject)
					if rec, err := s.Recv(); err != nil || len(rec) != size {
						t.Errorf("%d bytes, %v", len(rec), err)
					}
					_ = s.Close()
				}
				took(t, "three records beside unfinished ones", start, 0, c.most)
			})
		})
	}
}

// A record that waits for room stops waiting when its user leaves.
func TestWaitingRecordHeedsItsUser(t *testing.T) {
	const size, budget = 1 << 20, 1 << 20
	for name, leave := range map[string]func(m *memoryPair, s *Stream, cancel func()){
		"Close":        func(_ *memoryPair, s *Stream, _ func()) { _ = s.Close() },
		"context":      func(_ *memoryPair, _ *Stream, cancel func()) { cancel() },
		"Client.Close": func(m *memoryPair, _ *Stream, _ func()) { m.client.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{MaxBuffered: budget})
				m.handle(t, "large", func(w *Writer, _ *Request) error {
					_, err := w.Write(make([]byte, size))
					return err
				})
				m.bus.SetFilter(func(_, _ *fake.Conn, msg *nats.Msg) bool {
					h, _, err := ParsePacketHeader(msg.Data)
					return err != nil || h.Flags&PacketSeq == 0 || h.Seq < 3
				})
				first := m.open(t, "large")
				gone := make(chan error, 2)
				go func() { _, err := first.Recv(); gone <- err }()
				synctest.Wait()
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				second, err := m.client.Open(ctx, "large", nil)
				if err != nil {
					t.Fatal(err)
				}
				done := make(chan error, 1)
				go func() { _, err := second.Recv(); done <- err }()
				synctest.Wait()
				start := time.Now()
				leave(m, second, cancel)
				if err := <-done; err == nil {
					t.Error("a record came that was not complete")
				}
				took(t, "leaving", start, 0, time.Second)
				_ = first.Close()
				<-gone
			})
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
	for name, c := range map[string]struct {
		budget  int
		packets [][]byte
		most    int64 // bytes reserved at any time, the window's among them
	}{
		"large":         {8 << 20, pieces(size/each, each), size + 2*initialWindow},
		"tight":         {size, pieces(size/each, each), size + 2*initialWindow},
		"small":         {8 << 20, pieces(20_000, 1), 3 * initialWindow},
		"small, tight":  {initialWindow, pieces(20_000, 1), 2 * initialWindow},
		"padded":        {8 << 20, pieces(1000, 1, padding), 3 * initialWindow},
		"padded, tight": {initialWindow, pieces(1000, 1, padding), 2 * initialWindow},
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
				if err != nil {
					t.Error(err)
				}
				if most > c.most {
					t.Errorf("%d bytes were reserved, want at most %d", most, c.most)
				}
				var want []byte
				for _, p := range c.packets {
					_, body, _ := ParsePacketHeader(p)
					for len(body) > 0 {
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
