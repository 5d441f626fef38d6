package stream

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"
	"weak"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/natsconn/fake"
	"github.com/natsstream/stream/internal/poison"
)

// A large record counts against the endpoint's budget while its pieces arrive. A record that finds no
// room waits, and so does its sender, until another is complete or given up. The bytes are given back in any case.
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
			windows := first.session.recv.held.Load()
			if held := m.client.ep.memory() - windows; held < 9*initialWindow || held > budget {
				t.Errorf("%d bytes are reserved for the record, of which %d have arrived", held, 9*initialWindow)
			}
			arrived = 0
			m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
				if msg.Subject == first.session.reply() { // a question passes: it tells the server which packets are lost, and both streams share the line
					return !isSequenced(msg.Data)
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

// Many large records at once all arrive, at a consumer and at handlers, and hold no more than the budget and one
// record.
func TestManyLargeRecordsArrive(t *testing.T) {
	const streams, size, budget = 20, 3 << 20, 4 << 20
	const most = budget + 9*size/4 + maxChunk
	record := bytes.Repeat([]byte("x"), size)
	for _, up := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			m := memoryTest(t, ClientParams{MaxBuffered: budget})
			reserved := m.client.ep
			read := func(s interface{ Recv() ([]byte, error) }) {
				for range 2 {
					if rec, err := s.Recv(); err != nil || !bytes.Equal(rec, record) {
						t.Errorf("a record of %d bytes, %v", len(rec), err)
					}
					if n := reserved.memory(); n > most {
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
				reserved = m.server.ep
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

// Records that are never completed give way to those that wait: their streams end with 1013, and the others' records
// arrive.
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
					packet := AppendPacket(nil, PacketHeader{Flags: PacketSeq, Sender: w.session.senderNumber}, piece)
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
					unfinished.Store(s.session.reply(), true)
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

// A record that is put together takes the memory of the pieces that have arrived. After that its reader has no more than
// the record. Small pieces, and packets padded with skipped frames, take a few times the memory of their content, even if
// the budget allows more.
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
					if err := m.back.Publish(s.session.reply(), "", p); err != nil {
						t.Fatal(err)
					}
					synctest.Wait() // until it is taken
					most = max(most, m.client.ep.memory())
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
func TestTinyPiecesTakeMemoryOfTheirRecord(t *testing.T) {
	one := AppendFrame(nil, Frame{Type: FrameData, Flags: FlagMore, Payload: []byte("x")})
	for _, size := range []int{1 << 18, 1 << 20} {
		synctest.Test(t, func(t *testing.T) {
			m, s := openRaw(t, ClientParams{})
			pieces := (size - PacketHeaderSize - FrameHeaderSize) / len(one)
			length := PacketHeaderSize + pieces*len(one) + FrameHeaderSize
			packet := AppendPacketHeader(nil, PacketHeader{Flags: PacketSeq, Sender: 8, Length: uint32(length)})
			packet = AppendFrame(append(packet, bytes.Repeat(one, pieces)...), Frame{Type: FrameData})
			if err := m.back.Publish(s.session.reply(), "", packet); err != nil {
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

// A record larger than MaxRecordSize ends the stream before any memory is taken for its excess.
func TestRecordTooLargeTakesNoMemory(t *testing.T) {
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
					if err := m.back.Publish(s.session.reply(), "", packet); err != nil {
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

// cut returns n bytes in pieces of the sizes that next returns.
func cut(n int, next func() int) (pieces [][]byte) {
	for n > 0 {
		p := make([]byte, min(n, max(1, next())))
		for i := range p {
			p[i] = byte(n + i)
		}
		n -= len(p)
		pieces = append(pieces, p)
	}
	return pieces
}

// A record is put together with work and memory in proportion to its size, whatever its pieces and their packets look
// like.
func TestAssemblyIsLinear(t *testing.T) {
	const size = 1 << 20
	r := rand.New(rand.NewPCG(1, 2))
	turn := 0
	alternate := func(sizes ...int) func() int {
		return func() int { turn++; return sizes[turn%len(sizes)] }
	}
	for name, c := range map[string]struct {
		size   int
		next   func() int
		packet func(piece int) int // that the piece came in
	}{
		"one byte each, one packet":          {size, alternate(1), func(int) int { return 4 << 20 }},
		"one byte each, a packet each":       {size, alternate(1), func(n int) int { return n + 20 }},
		"one byte each, in large packets":    {size / 16, alternate(1), func(int) int { return 1 << 20 }},
		"most of a packet":                   {size, alternate(30_000), func(n int) int { return n + 20 }},
		"a little less than half":            {size, alternate(30_000), func(n int) int { return 2*n + 2 }},
		"exactly half":                       {size, alternate(30_000), func(n int) int { return 2 * n }},
		"large pieces, larger packets":       {size, alternate(200_000), func(int) int { return 8 << 20 }},
		"just not worth keeping":             {size, alternate(minKept - 1), func(n int) int { return n + 20 }},
		"just worth keeping":                 {size, alternate(minKept), func(n int) int { return n + 20 }},
		"large and small in turn":            {size, alternate(minKept, 1), func(n int) int { return n + 20 }},
		"small ones behind each that is not": {size, alternate(5000, 1, 1, 1, 1, 1), func(n int) int { return n + 20 }},
		"any":                                {size, func() int { return 1 << r.IntN(17) }, func(n int) int { return n + r.IntN(1<<17) }},
		"two":                                {10, alternate(5), func(n int) int { return n + 20 }},
	} {
		t.Run(name, func(t *testing.T) {
			pieces := cut(c.size, c.next)
			packets := make([]int, len(pieces))
			for i, p := range pieces {
				packets[i] = c.packet(len(p))
			}
			want := bytes.Join(pieces, nil)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			var a assembly
			most, taken := uint64(2*minChunk+maxChunk), uint64(0)
			for i, p := range pieces[:len(pieces)-1] {
				if !a.add(p, packets[i], func(n uint64) bool { taken += n; return true }) {
					t.Fatal("memory that was granted is refused")
				}
				arrived := a.size
				if limit := 2*arrived + arrived/8 + most; a.held > limit {
					t.Fatalf("%d bytes are held for %d that arrived, want at most %d", a.held, arrived, limit)
				}
			}
			rec := a.record(nil, pieces[len(pieces)-1])
			runtime.ReadMemStats(&after)
			if !bytes.Equal(rec, want) || cap(rec) != len(rec) {
				t.Errorf("a record of %d bytes, capacity %d; want %d", len(rec), cap(rec), len(want))
			}
			if taken != a.held {
				t.Errorf("%d bytes are held, %d were granted", a.held, taken)
			}
			// The record, once more in chunks, and the entries with what append left behind.
			if n, limit := after.TotalAlloc-before.TotalAlloc, uint64(3*c.size+4*minChunk+2*maxChunk); n > limit {
				t.Errorf("%d bytes were allocated, want at most %d", n, limit)
			}
		})
	}
}

// A large record that is only lent takes memory that is used again. One that its user keeps, and a small one, have memory
// of their own.
func TestLargeRecordsAreLent(t *testing.T) {
	c := fakeClient(t, fake.New(), ClientParams{})
	s := unopenedStream(c.ep)
	piece := bytes.Repeat([]byte("p"), 30_000)
	joined := func(pieces int, u use) []byte {
		rec := s.joined(&assembly{pieces: slices.Repeat([][]byte{piece}, pieces), size: uint64(pieces * len(piece))}, []byte("last"), u)
		if len(rec) != pieces*len(piece)+4 || cap(rec) != len(rec) || bytes.Count(rec, []byte("p")) != pieces*len(piece) || !bytes.HasSuffix(rec, []byte("last")) {
			t.Fatalf("a record of %d bytes, capacity %d, of %d pieces", len(rec), cap(rec), pieces)
		}
		return rec
	}
	lent := joined(4, untilNext)
	if again := joined(3, untilNext); !poison.Enabled && &again[0] != &lent[0] {
		t.Error("the memory of a record is not used again")
	}
	for _, rec := range [][]byte{joined(4, forever), joined(1, untilNext)} {
		if joined(4, untilNext); len(bytes.TrimLeft(rec, "p")) != 4 {
			t.Error("a record was overwritten")
		}
	}
	for pieces := 1; pieces < 60; pieces++ {
		joined(pieces, untilNext) // also larger than all memory that is lent
	}
}

// Only Next holds the memory of a large record until a later read. The other reads need it no more when they return.
func TestLargeRecordsAreGivenBackSoon(t *testing.T) {
	m := memoryTest(t, ClientParams{})
	large := make([]byte, 100<<10)
	m.handle(t, "x", func(w *Writer, r *Request) error {
		for range 4 {
			if _, err := w.Write(large); err != nil {
				return err
			}
		}
		return nil
	})
	s := m.open(t, "x")
	for _, c := range []struct {
		name string
		read func() error
		want bool
	}{
		{"Next", func() error { _, err := s.Next(); return err }, true},
		{"Read", func() error { _, err := io.ReadFull(s, make([]byte, len(large))); return err }, false},
		{"RecvObject", func() error { _ = s.RecvObject(new(int)); return nil }, false},
		{"WriteTo", func() error { _, err := s.WriteTo(io.Discard); return err }, false},
	} {
		if err := c.read(); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if got := s.session.hasJoined(); got != c.want {
			t.Errorf("after %s: holds memory %v, want %v", c.name, got, c.want)
		}
	}
}

// Where the memory for a piece is refused, nothing is counted for it.
func TestRefusedPieceIsNotCounted(t *testing.T) {
	for _, most := range []uint64{0, minChunk - 1, minChunk, 5000, 100_000} {
		t.Run(fmt.Sprint(most), func(t *testing.T) {
			var a assembly
			taken := uint64(0)
			take := func(n uint64) bool {
				if taken+n > most {
					return false
				}
				taken += n
				return true
			}
			for i := 0; a.add(make([]byte, 1+i%3000), 3020, take); i++ {
				if i > 1_000_000 {
					t.Fatal("more is held than was granted")
				}
			}
			if a.held != taken || a.held > most {
				t.Errorf("%d bytes are held, %d were granted of %d", a.held, taken, most)
			}
		})
	}
}

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

// grantsAll is a CREDIT that grants more than anybody sends.
func grantsAll(ack uint32) Frame {
	return Frame{Type: FrameCredit, Payload: AppendCredit(nil, Credit{Ack: ack, Packets: ack + 1<<20, Bytes: 1 << 50})}
}

// memoryOf returns the bytes of the buffers that the sender of s has, counted one by one.
func memoryOf(w *Writer) (n, written int64) {
	q := w.sender.unacked.Unacked // a copy: only its cursor changes
	q.Again(q.Acked(), 1<<62, 0)
	for p, ok := q.Missing(); ok; p, ok = q.Missing() {
		n, written = n+int64(cap(p.buf)), written+int64(len(p.buf))
		q.Resent()
	}
	for _, list := range []*packet{w.sender.unacked.queue, w.ready.newest.Load()} { // the outbox is idle
		for p := list; p != nil; p = p.next {
			n, written = n+int64(cap(p.buf)), written+int64(len(p.buf))
		}
	}
	if w.open != nil {
		n, written = n+int64(cap(w.open.buf)), written+int64(w.n)
	}
	return n, written
}

// A peer grants without end and acknowledges nothing. The packets that a producer keeps for it are counted by their
// memory. The window bounds them, and the budget bounds those of all streams, for records of any size.
func TestKeptPacketsAreCountedAndBounded(t *testing.T) {
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

// A consumer that acknowledges a packet now and then is waited for, but neither for hours nor while others need the
// memory.
func TestTrickledAcknowledgementsEndTheStream(t *testing.T) {
	const packets, every = 2000, 4 * time.Second
	for name, c := range map[string]struct {
		streams, budget int
		least, most     time.Duration
	}{
		"there is room": {1, 64 << 20, 30 * time.Minute, time.Duration(maxLinger) + 2*defaultResumeTimeout},
		"others wait":   {4, 7 * maxUnacked * smallSize, 0, 4 * defaultResumeTimeout},
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

// The unread messages of a fallback producer are bounded in memory, however small they are.
func TestFallbackFloodOfSmallMessagesIsBounded(t *testing.T) {
	conn := fake.New()
	const limit = 1 << 20
	c := fakeClient(t, conn, ClientParams{FallbackBuffer: limit})
	s, deliver := muxStream(t, conn, c)
	n := 0
	for ; s.session.end.Load() == nil && n < limit; n++ {
		deliver([]byte("{}"))
	}
	if n > limit/fallbackOverhead+1 {
		t.Errorf("%d messages of two bytes were taken with a buffer of %d", n, limit)
	}
	if e := s.session.end.Load(); e == nil || !errors.Is(e.err, &CloseError{Code: CloseTooSlow}) {
		t.Errorf("the stream ended with %v", e)
	}
	_ = s.Close()
}

// Objects for a fallback consumer are bounded as all records are.
func TestFallbackObjectTooLargeIsRefused(t *testing.T) {
	conn := newRecorder(nil)
	c := fakeClient(t, conn.Conn, ClientParams{MaxRecordSize: 10})
	w := c.NewWriter("x.oldtoken")
	for _, v := range []any{strings.Repeat("x", 9), strings.Repeat("x", 1000)} { // quoted, 11 bytes
		if n, err := w.WriteObject(v); n != 0 || !errors.Is(err, ErrRecordTooLarge) {
			t.Errorf("WriteObject: %d, %v; want ErrRecordTooLarge", n, err)
		}
	}
	if n, err := w.WriteObject(strings.Repeat("x", 8)); n != 10 || err != nil {
		t.Errorf("WriteObject of 10 bytes: %d, %v", n, err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	sent := conn.sent()
	if len(sent) != 2 || !bytes.Equal(sent[0].Data, jsonwire.AppendData(nil, []byte(`"xxxxxxxx"`))) {
		t.Errorf("%d messages, the first %q", len(sent), sent[0].Data)
	}
}

// A message's header lies in the same memory as its data, and nobody bounds it. A record that waits to be read is a
// copy.
func TestHeaderIsNotKeptWithPayload(t *testing.T) {
	for name, payload := range map[string][]byte{
		"packet":   testPacket(7, 0, testData("hello")),
		"fallback": jsonwire.AppendData(nil, []byte("hello")),
	} {
		conn := fake.New()
		c := fakeClient(t, conn, ClientParams{})
		s, _ := muxStream(t, conn, c)
		memory := append(make([]byte, 1<<10), payload...) // as nats.go has it: the header, then the data
		conn.Deliver(&nats.Msg{Subject: s.session.reply(), Header: nats.Header{"Large": {"header"}}, Data: memory[1<<10:]})
		clear(memory)
		if rec, err := s.Recv(); string(rec) != "hello" || err != nil {
			t.Errorf("%s: %q, %v: it lies in the memory of the header", name, rec, err)
		}
	}
}

// The outbox gets a copy of an answer to an unknown stream, and not the message with its headers.
func TestHeaderIsNotKeptForUnknownStreams(t *testing.T) {
	c, conn, stick, release := stuckOutbox(t)
	stick()
	defer release()
	answer := AppendPacket(nil, PacketHeader{Sender: 1}, Frame{Type: FrameResponse, Payload: make([]byte, nonceSize)})
	var messages []weak.Pointer[[1 << 16]byte]
	for range 10 {
		memory := new([1 << 16]byte)
		messages = append(messages, weak.Make(memory))
		data := memory[len(memory)-len(answer):]
		copy(data, answer)
		conn.Deliver(&nats.Msg{Subject: c.ep.prefix + strings.Repeat("x", TokenSize), Header: nats.Header{"Large": {"header"}}, Data: data})
	}
	runtime.GC()
	for i, m := range messages {
		if m.Value() != nil {
			t.Errorf("message %d is in memory", i)
		}
	}
}

// Peers that come and go, each another one, do not fill the memory, and a peer that comes back finds its line.
func TestLinesWithoutUsersAreBounded(t *testing.T) {
	ep := &endpoint{started: time.Now()}
	ep.outbox.init(ep)
	o := &ep.outbox
	use := func(peer string) *line {
		s := &session{ep: ep, role: lifecycle.Writer, out: outboxState{peer: peer + ".x"}}
		l := o.lineOf(s)
		o.leaveLine(s, 0)
		return l
	}
	first := use("first")
	for i := range 3 * maxIdleLines {
		use(fmt.Sprint("peer", i))
		if again := use("first"); again != first {
			t.Fatalf("the line was forgotten after %d others", i)
		}
		if n := len(o.lines.byPeer); n > maxIdleLines || n != o.lines.idle {
			t.Fatalf("%d lines are remembered, %d are counted", n, o.lines.idle)
		}
	}
	o.tickLines(ep.now() + 2*lineIdle)
	if n := len(o.lines.byPeer); n != 0 || o.lines.idle != 0 {
		t.Errorf("%d lines are left, %d are counted", n, o.lines.idle)
	}
}

// Handlers that return at once leave a bounded number of streams behind, whatever their consumers acknowledge.
func TestLingeringStreamsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.server.room = roomFor(1)
		m.handle(t, "x", func(w *Writer, _ *Request) error {
			_, err := w.Write(make([]byte, 1000))
			return err
		})
		stranger := m.bus.Connect("stranger")
		var refusals atomic.Int32
		stop, err := stranger.Subscribe("in.*", "", func(msg *nats.Msg) {
			if isFrame(msg.Data, FrameReset) {
				refusals.Add(1)
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		const n, others = 200, lingering - 100
		count := func(n int) (sessions int) {
			m.server.mu.Lock()
			defer m.server.mu.Unlock()
			m.server.sessions += n
			return m.server.sessions
		}
		count(others) // as if so many waited already
		for i := range n {
			reply := "in." + string(AppendToken(nil, Token{Codec: MsgPack, LogPackets: 10, LogBytes: 20, ID: uint64(i)}))
			if err := stranger.PublishMsg(&nats.Msg{Subject: "x", Reply: reply}); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		sessions := count(-others)
		if sessions > 100+2 || sessions+int(refusals.Load()) != n {
			t.Errorf("%d streams are kept and %d were refused of %d", sessions, refusals.Load(), n)
		}
		time.Sleep(2 * m.times.ResumeTimeout)
		m.nothingLeft(t)
	})
}

// An endpoint remembers streams for their time, a bounded number of them, and takes no memory before one has ended.
func TestEndedStreamsAreRememberedInBounds(t *testing.T) {
	const now, until = 1000, 2000
	token := func(i int) (b [TokenSize]byte) { copy(b[:], fmt.Sprintf("%016d", i)); return b }
	var table endedStreams
	if table.find("0000000000000001", now) != nil {
		t.Error("an empty table knows a stream")
	}
	held := func(n int, now int64) (found int) {
		for i := range n {
			b := token(i)
			if e := table.find(string(b[:]), now); e != nil {
				found++
				if e.code != uint16(i) {
					t.Errorf("stream %d has the word of %d", i, e.code)
				}
			}
		}
		return found
	}
	for i := range 200 {
		table.add(endedStream{token: token(i), until: until, code: uint16(i)}, now)
	}
	if n := held(200, now); n != 200 {
		t.Errorf("%d of 200 streams are remembered", n)
	}
	if n := held(200, until); n != 0 {
		t.Errorf("%d streams are remembered when their time is over", n)
	}
	for i := range 4 * maxEnded {
		table.add(endedStream{token: token(i), until: until}, now)
	}
	if n := len(table.circle); n != maxEnded {
		t.Errorf("%d places, want %d", n, maxEnded)
	}
	for i := 4*maxEnded - 1; i >= 0; i-- {
		b := token(i)
		if found := table.find(string(b[:]), now) != nil; found != (i >= 3*maxEnded) {
			t.Fatalf("stream %d of %d is remembered: %v", i, 4*maxEnded, found)
		}
	}
	places := len(table.circle)
	for i := range 4 * maxEnded { // all others are over
		table.add(endedStream{token: token(i), until: 2 * until}, until)
	}
	if n := len(table.circle); n != places {
		t.Errorf("%d places, want %d", n, places)
	}
	table.next = ^uint32(0) - maxEnded/2 // the numbers come round
	for i := range 2 * maxEnded {
		table.add(endedStream{token: token(i), until: 3 * until, code: uint16(i)}, 2*until)
		for n := max(0, i-3); n <= i; n++ {
			b := token(n)
			if e := table.find(string(b[:]), 2*until); e == nil || e.code != uint16(n) {
				t.Fatalf("stream %d is not remembered after stream %d", n, i)
			}
		}
	}
}

// The allocator puts a header of 8 bytes before an object of more than 512 bytes with pointers. It has a size class for
// 640 bytes, and the next is for 704. It has one for 1152, and the next is for 1280. Every idle stream costs the
// difference if one of the two types grows beyond its class.
func TestEndsFitTheirSizeClasses(t *testing.T) {
	const header = 8
	for _, end := range []struct {
		name        string
		size, class uintptr
	}{
		{"a Stream", unsafe.Sizeof(Stream{}), 640},
		{"a producer", unsafe.Sizeof(producer{}), 1152},
	} {
		t.Logf("%s has %d bytes of %d", end.name, header+end.size, end.class)
		if header+end.size > end.class {
			t.Errorf("%s has %d bytes with its header, and its size class %d: keep what few streams need in a struct of its own, made on first use",
				end.name, header+end.size, end.class)
		}
	}
}

// Each Write uses the fields of its packer from the lock to the open packet. In a producer they lie on one cache line.
func TestWriteFieldsLieTogether(t *testing.T) {
	const line, header = 64, 8
	var p producer
	if unsafe.Sizeof(uintptr(0)) != 8 {
		return // cache lines hold other fields on this processor
	}
	first := header + uintptr(unsafe.Pointer(&p.mu)) - uintptr(unsafe.Pointer(&p))
	last := header + uintptr(unsafe.Pointer(&p.open)) + unsafe.Sizeof(p.open) - 1 - uintptr(unsafe.Pointer(&p))
	if first/line != last/line {
		t.Errorf("they lie at %d to %d, on two lines", first, last)
	}
}

// The mux looks at the first fields of a session for each packet. They lie on two cache lines, and its end of the ring
// on the next. The allocator aligns a Stream, and a session with its Writer, to cache lines, and puts a header before
// it.
func TestMuxFieldsLieTogether(t *testing.T) {
	const line, header = 64, 8
	var s session
	if size := unsafe.Sizeof(uintptr(0)); size != 8 {
		return // cache lines hold other fields on this processor
	}
	for name, end := range map[string]uintptr{
		"end":            unsafe.Offsetof(s.end) + unsafe.Sizeof(s.end),
		"controls":       unsafe.Offsetof(s.controls) + unsafe.Sizeof(s.controls),
		"senderNumber":   unsafe.Offsetof(s.senderNumber) + unsafe.Sizeof(s.senderNumber),
		"received":       unsafe.Offsetof(s.bucket) + unsafe.Offsetof(s.bucket.received) + unsafe.Sizeof(s.bucket.received),
		"grantedPackets": unsafe.Offsetof(s.bucket) + unsafe.Offsetof(s.bucket.grantedPackets) + unsafe.Sizeof(s.bucket.grantedPackets),
		"park":           unsafe.Offsetof(s.bucket) + unsafe.Offsetof(s.bucket.park) + unsafe.Sizeof(s.bucket.park),
	} {
		if header+end > 2*line {
			t.Errorf("%s ends at byte %d, beyond the second cache line", name, header+end)
		}
	}
	// The ring has these fields between its two ends, which must not meet on a cache line.
	if size := unsafe.Sizeof(s.bucket.ring.Between); size < line-unsafe.Sizeof(uintptr(0)) {
		t.Errorf("%d bytes lie between the two ends of the ring", size)
	}
}

// A session that the outbox has served refers to no other: through one idle stream all that were ever queued behind
// it would stay in memory.
func TestOutboxForgetsWhatItServed(t *testing.T) {
	c, conn, count := newCountedClient(t)
	ep := c.ep
	conn.Set(nats.RECONNECTING)
	var all []*session
	for range 20 {
		s := unopenedStream(ep)
		if err := ep.register(s, s.controlToken()); err != nil {
			t.Fatal(err)
		}
		s.out.peer = s.reply()
		all = append(all, s)
	}
	// The outbox is busy with none of them while they are queued, so they are taken together.
	ep.outbox.queue.Store(nil)
	for _, s := range all {
		s.pending.Store(workCredit)
		ep.outbox.push(s)
	}
	conn.Set(nats.CONNECTED)
	ep.outbox.park.Wake()
	for _, s := range all {
		until(t, "it is served", func() bool { return count(s.out.peer) > 0 })
	}
	ep.close(testClosed) // the outbox has ended: what follows is no race
	for i, s := range all {
		if s.next != nil {
			t.Errorf("session %d still refers to the one that was queued behind it", i)
			return
		}
	}
}

// A stream that nobody reads any more gives back the packets that arrived for it, however long the application refers
// to it.
func TestStreamsThatWereLeftKeepNoPackets(t *testing.T) {
	const streams, record = 50, 100_000
	for name, c := range map[string]struct {
		handler Handler                                                   // after it has written a record; waits for the consumer if nil
		leave   func(m *memoryPair, s *Stream, cancel context.CancelFunc) // after the record has arrived
	}{
		"closed":                    {nil, func(_ *memoryPair, s *Stream, _ context.CancelFunc) { _ = s.Close() }},
		"closed with a code":        {nil, func(_ *memoryPair, s *Stream, _ context.CancelFunc) { _ = s.CloseWithCode(4321) }},
		"canceled":                  {nil, func(_ *memoryPair, _ *Stream, cancel context.CancelFunc) { cancel() }},
		"client closed":             {nil, func(m *memoryPair, _ *Stream, _ context.CancelFunc) { m.client.Close() }},
		"closed after the end":      {func(*Writer, *Request) error { return nil }, func(_ *memoryPair, s *Stream, _ context.CancelFunc) { _ = s.Close() }},
		"closed after a reset":      {nil, func(m *memoryPair, s *Stream, _ context.CancelFunc) { m.server.Close(); synctest.Wait(); _ = s.Close() }},
		"closed twice, read before": {nil, func(_ *memoryPair, s *Stream, _ context.CancelFunc) { _, _ = s.Recv(); _ = s.Close(); _ = s.Close() }},
		"closed within a read": {nil, func(_ *memoryPair, s *Stream, _ context.CancelFunc) {
			s.session.recv.readLock.Or(gateReading)
			_ = s.Close()
			s.session.unlockRead()
		}},
		"left with all that was written": {func(_ *Writer, r *Request) error { return drain(r.Recv) }, func(_ *memoryPair, s *Stream, _ context.CancelFunc) {
			_, _ = s.Write([]byte("x"))
			_ = s.CloseWithCode(CloseNormalClosure)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.handle(t, "svc", func(w *Writer, r *Request) error {
					if _, err := w.Write(make([]byte, record)); err != nil {
						return err
					}
					if c.handler != nil {
						return c.handler(w, r)
					}
					<-r.Context().Done()
					return nil
				})
				before := heap()
				all := make([]*Stream, streams)
				for i := range all {
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					s, err := m.client.Open(ctx, "svc", nil)
					if err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
					if s.session.bucket.ring.Empty() {
						t.Fatal("nothing arrived")
					}
					c.leave(m, s, cancel)
					all[i] = s
					if name == "client closed" || name == "closed after a reset" { // there is one client, and one server
						all = all[:1]
						break
					}
				}
				synctest.Wait()
				m.nothingLeft(t)
				for _, s := range all {
					if n := s.session.bucket.ring.Len(); n != 0 {
						t.Errorf("%d packets are kept", n)
					}
				}
				if n := heap() - before; n > streams*record/4 && len(all) == streams {
					t.Errorf("%d bytes are kept for %d streams", n, streams)
				}
				for _, s := range all {
					if _, err := s.Recv(); err == nil {
						t.Error("a record was read")
					}
				}
			})
		})
	}
}

// A request that its handler's application keeps refers to no packet of the consumer.
func TestRequestsThatWereServedKeepNoPackets(t *testing.T) {
	const record = 60_000
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		begin := make(chan struct{})
		var kept *Request
		m.handle(t, "svc", func(_ *Writer, r *Request) error {
			kept = r
			<-begin
			return nil
		})
		s := m.open(t, "svc")
		if _, err := s.Write(make([]byte, record)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if kept.session.bucket.ring.Empty() {
			t.Fatal("nothing arrived")
		}
		close(begin)
		_ = drain(s.Recv)
		_ = s.Close()
		m.nothingLeft(t)
		if n := kept.session.bucket.ring.Len(); n != 0 {
			t.Errorf("%d packets are kept", n)
		}
		if _, err := kept.Recv(); err == nil {
			t.Error("a record was read")
		}
	})
}

// heap returns the bytes of all objects in use. A pool keeps its objects over one collection.
func heap() int64 {
	for range 3 {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// The data and the headers of a request are kept while its handler runs, and no longer, although the stream may wait
// for its consumer.
func TestDataOfARequestIsFreedWithItsHandler(t *testing.T) {
	const requests, size = 100, 200_000
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		begin, running := make(chan struct{}), 0
		var data []weak.Pointer[byte] // the data of each request, in the order of the requests
		held := func() (n int) {
			runtime.GC()
			for _, p := range data {
				if p.Value() != nil {
					n++
				}
			}
			return n
		}
		m.handle(t, "svc", func(_ *Writer, r *Request) error {
			data = append(data, weak.Make(&r.Data[0])) // synctest.Wait follows each request
			<-begin
			if len(r.Data) != size {
				t.Errorf("%d bytes of data", len(r.Data))
			}
			return nil
		})
		var all []*Stream
		before := heap()
		for range requests {
			s, err := m.client.Open(t.Context(), "svc", make([]byte, size))
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, s)
			synctest.Wait()
		}
		m.server.mu.Lock()
		running = m.server.handlers
		m.server.mu.Unlock()
		if n := heap() - before; running != requests || held() != requests || n > requests*size*12/10 {
			t.Errorf("%d handlers run, the data of %d is held, %d bytes are in use, want %d", running, held(), n, requests*size)
		}
		m.bus.SetFilter(func(from, _ *fake.Conn, _ *nats.Msg) bool { return from == m.back }) // nobody acknowledges
		close(begin)
		synctest.Wait()
		if n := heap() - before; m.server.Stats().Streams == 0 || held() > 0 || n > requests*size/5 {
			t.Errorf("the data of %d requests is held, %d bytes are in use for %d streams whose handlers have returned",
				held(), n, m.server.Stats().Streams)
		}
		m.bus.SetFilter(nil)
		for _, s := range all {
			if err := drain(s.Recv); err != nil {
				t.Error(err)
			}
		}
		m.nothingLeft(t)
	})
}

// Headers from a peer take no more than a multiple of their bytes, whatever they are like.
func TestHeadersTakeBoundedMemory(t *testing.T) {
	const most = 280 << 10
	name := func(i int) string { return strconv.FormatInt(int64(i), 36) }
	for kind, line := range map[string]func(i int) string{
		"names only":         func(i int) string { return name(i) + ":\r\n" },
		"one name":           func(int) string { return "a:\r\n" },
		"names and values":   func(i int) string { return name(i) + ": x\r\n" },
		"values with spaces": func(i int) string { return name(i) + ":      x\r\n" },
	} {
		b := []byte(metaHead)
		for i := 0; ; i++ {
			l := line(i)
			if len(b)+len(l)+len(metaEOL) > maxMeta {
				break
			}
			b = append(b, l...)
		}
		b = append(b, metaEOL...)
		var h nats.Header
		var err error
		before := heap()
		h, err = parseMeta(b)
		if n := heap() - before; err != nil || n > most+16<<10 {
			t.Errorf("%s: %d bytes take %d, want %d at most; %v", kind, len(b), n, most, err)
		}
		runtime.KeepAlive(h)
		runtime.KeepAlive(b)
	}
}
