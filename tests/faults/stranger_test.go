package faults

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// spy sees all messages, and so learns where the ends of the last stream are and what numbers they send with.
type spy struct {
	nc *nats.Conn

	mu                 sync.Mutex
	consumer, producer string // reply subjects
	senders            map[uint64]bool
}

func newSpy(t *testing.T, url string) *spy {
	t.Helper()
	s := &spy{nc: connect(t, url), senders: map[uint64]bool{}}
	if _, err := s.nc.Subscribe(">", s.see); err != nil {
		t.Fatal(err)
	}
	if err := s.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *spy) see(m *nats.Msg) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case m.Header.Get("Stream-Open") != "": // a request
		s.consumer, s.producer = m.Reply, ""
	case m.Subject == s.consumer && m.Reply != "":
		s.producer = m.Reply
	}
	if h, _, err := stream.ParsePacketHeader(m.Data); err == nil {
		s.senders[h.Sender] = true
	}
}

// stranger returns a number that nobody has sent with.
func (s *spy) stranger() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if n := rand.Uint64() >> 16; !s.senders[n] {
			return n
		}
	}
}

// find waits until the spy knows the consumer's end and, unless alone, the producer's. It forgets them then: the spy
// may see late what it sends itself, and the request of the next stream.
func (s *spy) find(t *testing.T, alone bool) (consumer, producer string) {
	t.Helper()
	if !within(patience, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		consumer, producer = s.consumer, s.producer
		found := consumer != "" && (alone || producer != "")
		if found {
			s.consumer, s.producer = "", ""
		}
		return found
	}) {
		t.Fatalf("the ends are %q and %q", consumer, producer)
	}
	return consumer, producer
}

// forgeries returns packets with each type of frame, as a stranger might send them who knows where an end is but not
// the number that its peer sends with.
func forgeries(sender uint64) (all [][]byte) {
	credit := stream.AppendCredit(nil, stream.Credit{Ack: 1 << 20, Packets: 1 << 29, Bytes: 1 << 40})
	frames := []stream.Frame{
		{Type: stream.FrameData, Payload: []byte("forged")},
		{Type: stream.FrameData, Flags: stream.FlagMore, Payload: []byte("forged")},
		{Type: stream.FrameClose, Code: stream.CloseNormalClosure},
		{Type: stream.FrameClose, Code: stream.CloseInternalServerErr},
		{Type: stream.FrameReset, Code: stream.CloseNormalClosure},
		{Type: stream.FrameReset, Code: stream.CloseCanceled, Payload: []byte("forged")},
		{Type: stream.FrameCredit, Payload: credit},
		{Type: stream.FrameCredit, Flags: stream.FlagGap, Payload: credit},
		{Type: stream.FramePing},
		{Type: stream.FrameMeta, Payload: []byte("NATS/1.0\r\nForged: yes\r\n\r\n")},
		{Type: stream.FrameMeta, Flags: stream.FlagTrailer, Payload: []byte("NATS/1.0\r\nForged: yes\r\n\r\n")},
		{Type: 0}, {Type: 7}, {Type: 127}, {Type: 128}, {Type: 255},
	}
	for _, f := range frames {
		for _, flags := range []stream.PacketFlags{0, stream.PacketSeq, stream.PacketSeq | stream.PacketAck} {
			for _, seq := range []uint32{0, 1, 2, 3, 1 << 10, 1 << 31} {
				all = append(all, stream.AppendPacket(nil, stream.PacketHeader{Flags: flags, Sender: sender, Seq: seq}, f))
			}
		}
	}
	return append(all, stream.AppendPacket(nil, stream.PacketHeader{Sender: sender}), []byte(`{"type":1,"data":"Zm9yZ2Vk"}`),
		[]byte(`{"type":2,"closeError":{"Code":1000,"Text":""}}`), []byte{stream.PacketMagic}, []byte("forged"))
}

// TestForged sends every type of frame to both ends of a stream in each of its states. Nothing changes, and a stranger
// gets at most one answer to each, no longer than a control packet.
func TestForged(t *testing.T) {
	srv := streamtest.Run(t)
	leakless(t, func() {
		sc, cc := connect(t, srv.URL()), connect(t, srv.URL())
		defer sc.Close()
		defer cc.Close()
		server, err := stream.NewServer(stream.ServerParams{Conn: sc})
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		client, err := stream.NewClient(stream.ClientParams{Conn: cc})
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		spy := newSpy(t, srv.URL())
		defer spy.nc.Close()

		// step is one thing that one end of the stream does.
		type end struct {
			w *stream.Writer
			q *stream.Request
		}
		handlers := make(chan end)
		finish := make(chan struct{})
		if _, err := server.Handle("forged", func(w *stream.Writer, q *stream.Request) error {
			handlers <- end{w, q}
			<-finish
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if err := sc.Flush(); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
		defer cancel()

		// begin opens a stream on which both ends have written and read a record.
		begin := func() (*stream.Stream, end) {
			s, err := client.Open(ctx, "forged", nil)
			if err != nil {
				t.Fatal(err)
			}
			h := <-handlers
			if _, err := h.w.Write([]byte("down")); err != nil {
				t.Fatal(err)
			}
			want(t, s.Recv, "down")
			if _, err := s.Write([]byte("up")); err != nil {
				t.Fatal(err)
			}
			want(t, h.q.Recv, "up")
			return s, h
		}
		down := func(s *stream.Stream, h end) {
			if _, err := h.w.Write([]byte("more down")); err != nil {
				t.Error(err)
			}
			want(t, s.Recv, "more down")
		}
		up := func(s *stream.Stream, h end) {
			if _, err := s.Write([]byte("more up")); err != nil {
				t.Error(err)
			}
			want(t, h.q.Recv, "more up")
		}
		closeUp := func(s *stream.Stream, h end) {
			if err := s.CloseSend(); err != nil {
				t.Error(err)
			}
			wantEOF(t, h.q.Recv)
		}
		closeDown := func(s *stream.Stream, h end) {
			if err := h.w.Close(); err != nil {
				t.Error(err)
			}
			wantEOF(t, s.Recv)
		}
		type step = func(*stream.Stream, end)
		for name, x := range map[string]struct{ before, after []step }{
			"bound":                  {nil, []step{down, up, closeUp, down, closeDown}},
			"consumer's half closed": {[]step{closeUp}, []step{down, closeDown}},
			"producer's half closed": {[]step{closeDown}, []step{up, closeUp}},
			"ended":                  {[]step{closeUp, closeDown}, nil},
		} {
			t.Run(name, func(t *testing.T) {
				s, h := begin()
				consumer, producer := spy.find(t, false)
				for _, f := range x.before {
					f(s, h)
				}
				if name == "ended" {
					finish <- struct{}{}
					giveBack(t, server.Stats, client.Stats)
				}
				spy.forge(t, consumer, client.Stats)
				spy.forge(t, producer, server.Stats)
				for _, f := range x.after {
					f(s, h)
				}
				if name != "ended" {
					finish <- struct{}{}
				}
				_, err := s.Recv()
				if err != io.EOF {
					t.Errorf("afterwards: %v", err)
				}
				s.Close()
				giveBack(t, server.Stats, client.Stats)
			})
		}
		// An opening stream has no peer yet, and takes the first who knows its token for it. A stranger knows its
		// neighbours at best.
		t.Run("opening", func(t *testing.T) {
			s, err := client.Open(ctx, "forged", nil)
			if err != nil {
				t.Fatal(err)
			}
			h := <-handlers
			token, _ := spy.find(t, true)
			last := byte('0')
			if token[len(token)-1] == last {
				last = '1'
			}
			spy.forge(t, token[:len(token)-1]+string(last), client.Stats)
			down(s, h)
			up(s, h)
			closeUp(s, h)
			closeDown(s, h)
			finish <- struct{}{}
			giveBack(t, server.Stats, client.Stats)
		})
		// One who knows the token wins or loses, but its records and the producer's never mix.
		for i, packet := range forgeries(spy.stranger()) {
			if h, _, err := stream.ParsePacketHeader(packet); err == nil && h.Seq > 1 {
				continue // as 1
			}
			s, err := client.Open(ctx, "forged", nil)
			if err != nil {
				t.Fatal(err)
			}
			h := <-handlers
			token, _ := spy.find(t, true)
			if err := errors.Join(spy.nc.Publish(token, packet), spy.nc.Flush()); err != nil {
				t.Fatal(err)
			}
			_, werr := h.w.Write([]byte("down"))
			finish <- struct{}{}
			short, stop := context.WithTimeout(ctx, 50*time.Millisecond)
			after := context.AfterFunc(short, func() { s.Close() })
			var got []string
			for {
				var rec []byte
				if rec, err = s.Recv(); err != nil {
					break
				}
				got = append(got, string(rec))
			}
			if all := strings.Join(got, " "); all != "" && all != "down" && all != "forged" || err != io.EOF && !isNamed(err) {
				t.Errorf("forgery %d of an opening stream, %x: %q, %v; the producer's write: %v", i, packet, got, err, werr)
			}
			after()
			stop()
			s.Close()
		}
		giveBack(t, server.Stats, client.Stats)
	})
}

// forge sends all forgeries to one end, whose counters are stats. It fails the test unless they are all dropped, and
// counted, and nothing else changes but for at most one answer to each.
func (s *spy) forge(t *testing.T, to string, stats func() stream.Stats) {
	t.Helper()
	before := stats()
	inbox := nats.NewInbox()
	answers := map[string]int{}
	var mu sync.Mutex
	sub, err := s.nc.Subscribe(inbox+".*", func(m *nats.Msg) {
		mu.Lock()
		defer mu.Unlock()
		answers[m.Subject]++
		if len(m.Data) > 4096 { // a control packet
			t.Errorf("an answer of %d bytes", len(m.Data))
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	all := forgeries(s.stranger())
	for i, packet := range all {
		if err := s.nc.PublishRequest(to, fmt.Sprintf("%s.%d", inbox, i), packet); err != nil {
			t.Fatal(err)
		}
	}
	dropped := func(s stream.Stats) uint64 {
		return s.DroppedUnknown + s.DroppedForeign + s.DroppedMalformed + s.DroppedDuplicate + s.DroppedEarly
	}
	if !within(patience, func() bool { return dropped(stats())-dropped(before) >= uint64(len(all)) }) {
		t.Errorf("%d of %d forgeries were dropped", dropped(stats())-dropped(before), len(all))
	}
	time.Sleep(20 * time.Millisecond) // for the answers
	if after := stats(); after.Streams != before.Streams || after.Reserved != before.Reserved {
		t.Errorf("before %+v, after %+v", before, after)
	}
	mu.Lock()
	defer mu.Unlock()
	for subject, n := range answers {
		if n > 1 {
			t.Errorf("%d answers to forgery %s", n, subject)
		}
	}
}

func want(t *testing.T, recv func() ([]byte, error), rec string) {
	t.Helper()
	if got, err := recv(); err != nil || string(got) != rec {
		t.Errorf("got %q, %v; want %q", got, err, rec)
	}
}

func wantEOF(t *testing.T, recv func() ([]byte, error)) {
	t.Helper()
	if got, err := recv(); err != io.EOF {
		t.Errorf("got %q, %v; want the end", got, err)
	}
}

// heap returns the bytes of live objects.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// fewer is n, or a tenth of it with -short.
func fewer(n int) int {
	if testing.Short() {
		return n / 10
	}
	return n
}

// TestGuessedTokens sends packets to a million tokens at random beside a stream that is in use.
func TestGuessedTokens(t *testing.T) {
	guesses := fewer(1_000_000)
	srv := streamtest.Run(t)
	trial{server: srv.URL(), client: srv.URL(), streams: 1, calm: true, fault: func(r *rig) {
		spy := newSpy(t, srv.URL())
		s, err := r.cl.Open(context.Background(), "mute", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		want(t, s.Recv, "here")
		if _, err := s.Write([]byte("x")); err != nil {
			t.Error(err)
		}
		var prefixes [][]byte
		consumer, producer := spy.find(t, false)
		for _, e := range []string{consumer, producer} {
			prefixes = append(prefixes, []byte(e[:len(e)-stream.TokenSize]))
		}
		spy.nc.Close()
		nc := connect(t, srv.URL())
		defer nc.Close()
		unknown := func() uint64 { return r.cl.Stats().DroppedUnknown + r.srv.Stats().DroppedUnknown }
		before, known, streams := heap(), unknown(), r.cl.Stats().Streams+r.srv.Stats().Streams
		packets := forgeries(rand.Uint64() >> 16)
		for i := range guesses {
			subject := stream.AppendToken(prefixes[i%2], stream.Token{Codec: stream.MsgPack, LogPackets: 5, LogBytes: 18, ID: rand.Uint64()})
			if err := nc.Publish(string(subject), packets[i%len(packets)]); err != nil {
				t.Fatal(err)
			}
			if i%10_000 == 0 { // else the server cuts off who cannot keep up
				if !within(patience, func() bool { return unknown()-known+50_000 >= uint64(i) }) {
					t.Fatalf("%d of %d heard", unknown()-known, i)
				}
			}
		}
		if !within(patience, func() bool { return unknown()-known >= uint64(guesses) }) {
			t.Errorf("%d of %d guesses hit nothing", unknown()-known, guesses)
		}
		if n := r.cl.Stats().Streams + r.srv.Stats().Streams; n != streams {
			t.Errorf("%d streams, %d before", n, streams)
		}
		if grown := heap() - before; grown > 8<<20 {
			t.Errorf("%d more bytes in use", grown)
		}
	}}.run(t)
}

// TestManyOpens opens 100,000 streams, most of them more than the server takes, and another 100,000 whose contexts end
// at once.
func TestManyOpens(t *testing.T) {
	opens := fewer(100_000)
	const workers, maxStreams = 256, 64
	srv := streamtest.Run(t)
	leakless(t, func() {
		sc, cc := connect(t, srv.URL()), connect(t, srv.URL())
		defer sc.Close()
		defer cc.Close()
		server, err := stream.NewServer(stream.ServerParams{Conn: sc, MaxStreams: maxStreams, KeepAlive: hasty.KeepAlive, ResumeTimeout: hasty.ResumeTimeout})
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		client, err := stream.NewClient(stream.ClientParams{Conn: cc})
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		var running, most, served atomic.Int64
		if _, err := server.Handle("one", func(w *stream.Writer, q *stream.Request) error {
			n := running.Add(1)
			defer running.Add(-1)
			for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
			}
			served.Add(1)
			_, err := w.Write(q.Data)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if err := sc.Flush(); err != nil {
			t.Fatal(err)
		}
		many := func(opens int, open func(context.Context) error) {
			t.Helper()
			ctx, cancel := context.WithTimeout(context.Background(), 3*patience) // each rush has its own
			defer cancel()
			var wg sync.WaitGroup
			var left atomic.Int64
			left.Store(int64(opens))
			for range workers {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						if err := open(ctx); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			if !within(settled+hasty.KeepAlive+hasty.ResumeTimeout, func() bool { return running.Load() == 0 && server.Stats().Streams == 0 }) {
				t.Errorf("%d handlers, %d streams are left at the server", running.Load(), server.Stats().Streams)
			}
			giveBack(t, client.Stats, server.Stats)
			if n := most.Load(); n > maxStreams {
				t.Errorf("%d handlers at once, at most %d are allowed", n, maxStreams)
			}
		}
		var refused atomic.Int64
		use := func(ctx context.Context) error {
			s, err := client.Open(ctx, "one", []byte("record"))
			if err != nil {
				return err
			}
			defer s.Close()
			rec, err := s.Recv()
			if err == nil && string(rec) == "record" {
				_, err = s.Recv()
			}
			switch {
			case isCode(stream.CloseTryAgainLater)(err):
				refused.Add(1)
			case err != io.EOF:
				return fmt.Errorf("%q, %w", rec, err)
			}
			return nil
		}
		many(opens, use)
		if served.Load()+refused.Load() != int64(opens) {
			t.Errorf("%d served and %d refused of %d", served.Load(), refused.Load(), opens)
		}
		t.Logf("%d served, %d refused; at most %d handlers", served.Load(), refused.Load(), most.Load())
		cancelAtOnce := func(ctx context.Context) error {
			ctx, cancel := context.WithCancel(ctx)
			s, err := client.Open(ctx, "one", []byte("record"))
			cancel()
			if err != nil {
				return err
			}
			if _, err := s.Recv(); !errors.Is(err, context.Canceled) {
				return fmt.Errorf("after cancel: %w", err)
			}
			return nil
		}
		many(opens, cancelAtOnce)
		// Queues and buffers, the NATS server's as well, stay as large as such a rush makes them, and the runtime keeps
		// the descriptors of as many goroutines as ever ran at once. So it comes twice.
		before := heap()
		many(opens, use)
		many(opens, cancelAtOnce)
		if !within(settled, func() bool { return heap()-before < 2<<20 }) {
			t.Errorf("%d more bytes in use", heap()-before)
		}
	})
}
