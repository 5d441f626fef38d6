package stream_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/internal/race"
	"github.com/natsstream/stream/streamtest"
)

// blocked writes records to w until one fails, and returns when that has come to a halt: how many bytes were taken, and
// where the error will come.
func blocked(t *testing.T, p *pair, w *stream.Writer, atLeast int) (*atomic.Int64, <-chan error) {
	t.Helper()
	taken := new(atomic.Int64)
	failed := make(chan error, 1)
	p.handlers.Go(func() {
		rec := make([]byte, 1000)
		for {
			n, err := w.Write(rec)
			taken.Add(int64(n))
			if err != nil {
				failed <- err
				return
			}
		}
	})
	last := int64(-1)
	eventually(t, "Write blocks", func() bool {
		time.Sleep(20 * time.Millisecond)
		was := last
		last = taken.Load()
		return last == was && last >= int64(atLeast)
	})
	return taken, failed
}

func TestWriteBlocksWithoutCredit(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(t *testing.T, p *pair, s *stream.Stream)
		want error
	}{
		{"consumer closes", func(_ *testing.T, _ *pair, s *stream.Stream) { s.Close() }, &stream.CloseError{Code: stream.CloseCanceled}},
		{"consumer closes with a code", func(t *testing.T, _ *pair, s *stream.Stream) {
			if err := s.CloseWithCode(4321, "enough"); err != nil {
				t.Error(err)
			}
		}, &stream.CloseError{Code: 4321, Text: "enough"}},
		{"consumer's client closes", func(_ *testing.T, p *pair, _ *stream.Stream) { p.consumer.Close() }, &stream.CloseError{Code: stream.CloseGoingAway}},
		{"client closes", func(_ *testing.T, p *pair, _ *stream.Stream) { p.producer.Close() }, stream.ErrClientClosed},
		{"connection closes", func(_ *testing.T, p *pair, _ *stream.Stream) { p.producer.Conn.Close() }, &stream.CloseError{Code: stream.CloseAbnormalClosure}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPair(t, pairOptions{consumer: stream.ClientParams{Window: smallestWindow}})
			w, s := newWriterStream(t, p)
			taken, failed := blocked(t, p, w, smallestWindow/2)
			others := make(chan error, 3)
			p.handlers.Go(func() { others <- errOf(w.WriteObject(strings.Repeat("x", 40<<10))) })
			p.handlers.Go(func() { others <- errOf(w.Write(make([]byte, 300<<10))) })
			p.handlers.Go(func() { others <- errOf(w.ReadFrom(strings.NewReader(strings.Repeat("x", 40<<10)))) })
			time.Sleep(5 * time.Millisecond) // most likely they wait by now; either way they must fail
			tt.end(t, p, s)
			waitFor(t, "the blocked calls to fail", func() {
				for range cap(others) {
					if err := <-others; !errors.Is(err, tt.want) {
						t.Errorf("a call that was blocked: %v; want %v", err, tt.want)
					}
				}
				if err := <-failed; !errors.Is(err, tt.want) {
					t.Errorf("Write: %v; want %v", err, tt.want)
				}
			})
			if n := taken.Load(); n > smallestWindow+2*(32<<10) {
				t.Errorf("%d bytes were taken for a window of %d", n, smallestWindow)
			}
			endedBy(t, w, tt.want)
			s.Close()
		})
	}
	t.Run("consumer reads", func(t *testing.T) {
		p := newPair(t, pairOptions{consumer: stream.ClientParams{Window: smallestWindow}})
		w, s := newWriterStream(t, p)
		taken, failed := blocked(t, p, w, smallestWindow/2)
		was := taken.Load()
		for range 2 * was / 1000 {
			if rec, err := s.Recv(); err != nil || len(rec) != 1000 {
				t.Fatalf("%d bytes, %v", len(rec), err)
			}
		}
		if taken.Load() <= was {
			t.Errorf("%d bytes were taken, %d before anything was read", taken.Load(), was)
		}
		s.Close()
		waitFor(t, "Write to fail", func() { <-failed })
	})
	t.Run("Close needs no credit", func(t *testing.T) {
		p := newPair(t, pairOptions{consumer: stream.ClientParams{Window: smallestWindow}})
		w, s := newWriterStream(t, p)
		write(t, w, make([]byte, smallestWindow))
		waitFor(t, "Close", func() {
			if err := w.CloseWithCode(4000, strings.Repeat("x", stream.MaxReason)); err != nil {
				t.Error(err)
			}
		})
		got, err := readAll(s)
		if len(got) != 1 || !errors.Is(err, &stream.CloseError{Code: 4000}) {
			t.Errorf("%d records, %v", len(got), err)
		}
	})
}

// A reader that sleeps now and then gets every record in order, and the producer is held back: it is never further
// ahead than the window and the packet that uses it up.
func TestSlowReaderHoldsBackItsProducer(t *testing.T) {
	const size = 1024
	n := scaled(200_000)
	if race.Enabled {
		n = min(n, 50_000)
	}
	for _, window := range []int{64 << 10, fullWindow} {
		t.Run(fmt.Sprintf("window=%d", window), func(t *testing.T) {
			p, slow := newWatchedPair(t, pairOptions{consumer: stream.ClientParams{Window: window}})
			var read, lead atomic.Int64
			serve(t, p, "records", func(w *stream.Writer, _ *nats.Msg) {
				for i := range n {
					if _, err := w.Write(testRecord(i, size)); err != nil {
						t.Errorf("Write of record %d: %v", i, err)
						return
					}
					lead.Store(max(lead.Load(), int64(i)+1-read.Load()))
				}
				closeWriter(t, w)
			})
			s := open(t, p.consumer, "records")
			r := rand.New(rand.NewPCG(1, uint64(window)))
			for i := range n {
				rec, err := s.Recv()
				if err != nil {
					t.Fatalf("Recv of record %d: %v", i, err)
				}
				if !bytes.Equal(rec, testRecord(i, size)) {
					t.Fatalf("record %d differs", i)
				}
				read.Store(int64(i) + 1)
				if r.IntN(4000) == 0 {
					time.Sleep(time.Duration(r.IntN(5000)) * time.Microsecond)
				}
			}
			wantEOF(t, s)
			// A packet is consumed when the read after its last record begins, so the records that were read and not
			// consumed counts as lead too: the bound is exact.
			limit := int64(window+fullPacket) / (size + stream.FrameHeaderSize)
			t.Logf("largest lead %d records, limit %d", lead.Load(), limit)
			if lead.Load() > limit {
				t.Errorf("the producer was %d records ahead, the window allows %d", lead.Load(), limit)
			}
			slow.verify(t, p)
		})
	}
}

// writeCounted writes n records of one size, each with its number, and closes.
func writeCounted(t testing.TB, w *stream.Writer, n, size int) {
	buf := make([]byte, size)
	for i := range n {
		binary.BigEndian.PutUint64(buf, uint64(i))
		if _, err := w.Write(buf); err != nil {
			t.Errorf("Write of record %d: %v", i, err)
			return
		}
	}
	closeWriter(t, w)
}

// readStreams reads many streams of writeCounted at once, to their ends.
func readStreams(t testing.TB, c *stream.Client, subject string, streams, n, size int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	var readers sync.WaitGroup
	for range streams {
		s, err := c.Open(ctx, subject, nil)
		if err != nil {
			t.Error(err)
			break
		}
		readers.Go(func() {
			defer s.Close()
			for i := range n {
				rec, err := s.Recv()
				if err != nil || len(rec) != size || binary.BigEndian.Uint64(rec) != uint64(i) {
					t.Errorf("record %d: %d bytes, %v", i, len(rec), err)
					return
				}
			}
			if _, err := s.Recv(); err != io.EOF {
				t.Errorf("after the last record: %v", err)
			}
		})
	}
	readers.Wait()
}

// A reader that never reads holds back its own producer, and no other stream.
func TestReaderThatNeverReadsHoldsUpItsProducerAlone(t *testing.T) {
	const (
		streams = 100
		size    = 1024
	)
	n := scaled(2000)
	p, slow := newWatchedPair(t, pairOptions{})
	var stuckBytes atomic.Int64
	serve(t, p, "stuck", func(w *stream.Writer, _ *nats.Msg) {
		buf := make([]byte, size)
		for {
			if _, err := w.Write(buf); err != nil {
				if !errors.Is(err, &stream.CloseError{Code: stream.CloseCanceled}) {
					t.Errorf("Write to a consumer that left: %v", err)
				}
				return
			}
			stuckBytes.Add(size + stream.FrameHeaderSize)
		}
	})
	serve(t, p, "records", func(w *stream.Writer, _ *nats.Msg) { writeCounted(t, w, n, size) })

	before := liveHeap()
	stuck := open(t, p.consumer, "stuck")
	held := waitStuck(t, &stuckBytes)
	readStreams(t, p.consumer, "records", streams, n, size)

	if now := stuckBytes.Load(); now != held {
		t.Errorf("nobody read and the producer went on from %d to %d bytes", held, now)
	}
	if limit := int64(firstWindow + fullPacket); held > limit {
		t.Errorf("%d bytes taken from the producer of a reader that never reads, the window allows %d", held, limit)
	}
	// A producer keeps the last packets of a stream until its consumer's end says, at its next tick, that they arrived.
	eventually(t, "only the stuck stream is left at either end", func() bool {
		n := p.consumer.Stats().Reserved
		return n > 0 && n <= firstWindow+fullPacket && p.consumer.Stats().Streams == 1 && p.producer.Stats().Streams == 1
	})
	// Both ends are in this process. The producer keeps what was not acknowledged.
	if grown, limit := liveHeap()-before, int64(2*(firstWindow+fullPacket)+1<<20); !race.Enabled && grown > limit {
		t.Errorf("%d bytes held for a reader that never reads, want at most %d", grown, limit)
	}
	slow.verify(t, p)
	stuck.Close()
}

// mixedSizes yields the sizes of a stream's records: mostly small, now and then one that fills a packet, needs one of
// its own, or is cut into pieces.
func mixedSizes(seed uint64, n int) func(yield func(i, size int) bool) {
	return func(yield func(i, size int) bool) {
		r := rand.New(rand.NewPCG(seed, 0))
		for i := range n {
			size := r.IntN(300)
			switch k := r.IntN(1000); {
			case k < 100:
				size = r.IntN(8 << 10)
			case k < 110:
				size = r.IntN(64 << 10)
			case k < 113:
				size = r.IntN(600 << 10)
			}
			if !yield(i, size) {
				return
			}
		}
	}
}

// mixedSum is the checksum of the first n records that one goroutine writes to one stream.
type mixedSum struct {
	hash maphash.Hash
	n    int
}

var mixedSeed = maphash.MakeSeed()

func (m *mixedSum) add(rec []byte) {
	if m.n == 0 {
		m.hash.SetSeed(mixedSeed)
	}
	m.n++
	_, _ = m.hash.Write(binary.BigEndian.AppendUint32(nil, uint32(len(rec))))
	_, _ = m.hash.Write(rec)
}

// Streams of every kind at once: several clients, random sizes, several goroutines writing to one stream, readers with
// delays of their own. The records of each goroutine arrive, in its order and unchanged.
func TestMixedLoadArrivesUnchanged(t *testing.T) {
	const writers = 3 // goroutines of one stream
	streams, n := 40, scaled(1500)
	if race.Enabled {
		streams, n = 16, min(n, 300)
	}
	// Too little for all windows to grow, and enough for the largest record of each of 14 streams at once, twice.
	few := stream.ClientParams{MaxBuffered: 24 << 20}
	p, slow := newWatchedPair(t, pairOptions{producer: few, consumer: few})
	producers := []*stream.Client{p.producer, p.newClient(t, stream.ClientParams{}), p.newClient(t, stream.ClientParams{Conn: p.producer.Conn})}
	consumers := []*stream.Client{p.consumer, p.newClient(t, stream.ClientParams{Window: 8 << 10}), producers[0]}
	var wrote sync.Map // request -> *[writers]mixedSum
	for i, c := range producers {
		serveClient(t, p, c, fmt.Sprintf("mixed.%d", i), func(w *stream.Writer, req *nats.Msg) {
			sums := new([writers]mixedSum)
			var group sync.WaitGroup
			seed, err := strconv.ParseUint(string(req.Data), 10, 64)
			if err != nil {
				t.Error(err)
				return
			}
			for k := range sums {
				group.Go(func() {
					r := rand.New(rand.NewPCG(seed, uint64(k)))
					buf := make([]byte, 600<<10)
					for _, size := range mixedSizes(seed*writers+uint64(k), n) {
						rec := buf[:1+size]
						rec[0] = byte(k)
						for i := 1; i < len(rec); i += 61 {
							rec[i] = byte(r.Uint32())
						}
						sums[k].add(rec)
						if _, err := w.Write(rec); err != nil {
							t.Errorf("Write: %v", err)
							return
						}
						if r.IntN(500) == 0 {
							time.Sleep(time.Millisecond)
						}
					}
				})
			}
			group.Wait()
			wrote.Store(string(req.Data), sums)
			closeWriter(t, w)
		})
	}
	var readers sync.WaitGroup
	for i := range streams {
		id := strconv.Itoa(i)
		s, err := consumers[i%len(consumers)].Open(testContext(t), fmt.Sprintf("mixed.%d", i/3%len(producers)), []byte(id))
		if err != nil {
			t.Fatal(err)
		}
		readers.Go(func() {
			defer s.Close()
			r := rand.New(rand.NewPCG(uint64(i), 99))
			var got [writers]mixedSum
			for rec, err := range s.All() {
				if err != nil || len(rec) == 0 || int(rec[0]) >= writers {
					t.Errorf("stream %s after %d, %d, %d records: %d bytes, %v", id, got[0].n, got[1].n, got[2].n, len(rec), err)
					return
				}
				got[rec[0]].add(rec)
				if r.IntN(1000) == 0 {
					time.Sleep(time.Duration(r.IntN(4000)) * time.Microsecond)
				}
			}
			sums, ok := wrote.Load(id)
			if !ok {
				t.Errorf("stream %s ended before its producer did", id)
				return
			}
			for k := range got {
				if want := &sums.(*[writers]mixedSum)[k]; got[k].n != want.n || want.n != n || got[k].hash.Sum64() != want.hash.Sum64() {
					t.Errorf("stream %s, writer %d: %d records, wrote %d; or their content differs", id, k, got[k].n, want.n)
				}
			}
		})
	}
	waitFor(t, "all streams to end", readers.Wait)
	slow.verify(t, p)
}

// BenchmarkNeverReader compares two clients on the same connections: one has a stream that nobody reads, the other has
// none. Rounds take turns, so that what disturbs the machine disturbs both; rate-% is the rate of 100 streams beside
// the stuck one, in percent of their rate without it, the median of all rounds.
func BenchmarkNeverReader(b *testing.B) {
	const (
		streams = 100
		size    = 1024
		n       = 500
	)
	p := newPair(b)
	var stuckBytes atomic.Int64
	serve(b, p, "stuck", func(w *stream.Writer, _ *nats.Msg) {
		buf := make([]byte, size)
		for {
			if _, err := w.Write(buf); err != nil {
				return
			}
			stuckBytes.Add(size)
		}
	})
	serve(b, p, "records", func(w *stream.Writer, _ *nats.Msg) { writeCounted(b, w, n, size) })
	alone := p.newClient(b, stream.ClientParams{Conn: p.consumer.Conn})
	stuck := open(b, p.consumer, "stuck")
	waitStuck(b, &stuckBytes)

	round := func(c *stream.Client) time.Duration {
		start := time.Now()
		readStreams(b, c, "records", streams, n, size)
		return time.Since(start)
	}
	round(alone)
	round(p.consumer)
	var ratios []float64
	for i := 0; b.Loop(); i++ {
		var without, beside time.Duration
		if i%2 == 0 {
			without, beside = round(alone), round(p.consumer)
		} else {
			beside, without = round(p.consumer), round(alone)
		}
		ratios = append(ratios, float64(without)/float64(beside))
	}
	slices.Sort(ratios)
	b.ReportMetric(100*ratios[len(ratios)/2], "rate-%")
	b.ReportMetric(float64(2*b.N*streams*n)/b.Elapsed().Seconds(), "records/s")
	stuck.Close()
}

// Streams that are opened, used and closed one after another leave nothing behind, however they end.
func TestSoakSequentialLeavesNothing(t *testing.T) {
	p := newPair(t)
	fillEnded(t, p)
	serveFew(t, p)
	verifyFootprint(t, p, soakRounds(), func(n int) {
		for i := range n {
			ctx, cancel := context.WithCancel(context.Background())
			records := 1 + i%3
			data := []byte(strconv.Itoa(records))
			if i%5 == 4 { // the original API
				results, err := p.consumer.OpenStream(ctx, "few", data)
				if err != nil {
					t.Fatal(err)
				}
				got := 0
				for r := range results {
					if r.Err != nil {
						t.Fatal(r.Err)
					}
					got++
				}
				if got != records {
					t.Fatalf("%d results of %d", got, records)
				}
				cancel()
				continue
			}
			s, err := p.consumer.Open(ctx, "few", data)
			if err != nil {
				t.Fatal(err)
			}
			for range records {
				if rec, err := s.Recv(); err != nil || !bytes.Equal(rec, data) {
					t.Fatalf("stream %d: %q, %v", i, rec, err)
				}
				if i%5 == 1 { // leaves early
					break
				}
			}
			switch i % 5 {
			case 1:
				s.Close()
			case 2: // ends its context instead
				cancel()
			default:
				if _, err := s.Recv(); err != io.EOF {
					t.Fatalf("stream %d: %v", i, err)
				}
				s.Close()
			}
			cancel()
		}
	})
}

// Streams that come and go at the same time leave nothing behind either, not even through one that stays.
func TestSoakConcurrentLeavesNothing(t *testing.T) {
	const workers = 64
	p := newPair(t)
	fillEnded(t, p)
	serveFew(t, p)
	serve(t, p, "quiet", func(w *stream.Writer, req *nats.Msg) {
		if _, err := w.Write(req.Data); err != nil {
			t.Errorf("Write: %v", err)
		}
		<-w.Context().Done()
	})
	churn := func(n int) {
		var group sync.WaitGroup
		for k := range workers {
			group.Go(func() {
				for range n / workers {
					s, err := p.consumer.Open(t.Context(), "few", []byte("2"))
					if err != nil {
						t.Error(err)
						return
					}
					if got, err := readAll(s); len(got) != 2 || err != io.EOF {
						t.Errorf("worker %d: %d records, %v", k, len(got), err)
					}
				}
			})
		}
		group.Wait()
	}
	n := soakRounds()
	// The ones that stay are opened while others come and go, each of them with whatever the outbox had to do then.
	var stay []*stream.Stream
	var opened sync.WaitGroup
	opened.Go(func() { churn(2000) })
	for range 32 {
		s, err := p.consumer.Open(context.Background(), "quiet", nil) // for as long as it takes
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		stay = append(stay, s)
		time.Sleep(time.Millisecond)
	}
	opened.Wait()
	heap := liveHeap()
	start := time.Now()
	churn(n)
	took := time.Since(start)
	eventually(t, "only the streams that stay are left", func() bool { return p.consumer.Stats().Streams == len(stay) })
	after := liveHeap()
	t.Logf("%d streams in %v: heap %d, then %d bytes", n, took.Round(time.Millisecond), heap, after)
	if limit := int64(1<<20 + 4*n); !race.Enabled && after-heap > limit {
		t.Errorf("the heap grew from %d to %d bytes over %d streams", heap, after, n)
	}
	for _, s := range stay {
		s.Close()
	}
}

// A request that cannot be published leaves nothing behind.
func TestSoakOfUnpublishableRequestsLeavesNothing(t *testing.T) {
	const maxPayload = 4096
	p := newPair(t, pairOptions{server: []streamtest.Option{streamtest.WithMaxPayload(maxPayload)}})
	closedConn, err := p.server.Dial()
	if err != nil {
		t.Fatal(err)
	}
	closed := p.newClient(t, stream.ClientParams{Conn: closedConn})
	closedConn.Close()
	done := p.newClient(t, stream.ClientParams{})
	if err := done.Close(); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name    string
		client  *stream.Client
		subject string
		bytes   int
		want    error
	}{
		{"tooLarge", p.consumer, "records", maxPayload + 1, nats.ErrMaxPayload},
		{"tooLargeWithItsHeader", p.consumer, "records", maxPayload, nats.ErrMaxPayload},
		{"badSubject", p.consumer, "two words", 0, nats.ErrBadSubject},
		{"wildcard", p.consumer, "records.*", 0, nats.ErrBadSubject},
		{"noSubject", p.consumer, "", 0, nats.ErrBadSubject},
		{"connectionClosed", closed, "records", 0, nats.ErrConnectionClosed},
		{"clientClosed", done, "records", 0, stream.ErrClientClosed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			data := make([]byte, tc.bytes)
			verifyFootprint(t, p, soakRounds()/10, func(n int) {
				for range n {
					s, err := tc.client.Open(t.Context(), tc.subject, data)
					if err == nil {
						_, err = s.Recv()
					}
					if !errors.Is(err, tc.want) {
						t.Fatalf("%v, want %v", err, tc.want)
					}
				}
			})
		})
	}
}

func TestSoakWithoutRespondersLeavesNothing(t *testing.T) {
	p := newPair(t)
	verifyFootprint(t, p, soakRounds()/10, func(n int) {
		inParallel(t, n, func(i int, _ *rand.Rand) {
			if i%2 == 0 {
				s, err := p.consumer.Open(t.Context(), "nobody", nil)
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := s.Recv(); !errors.Is(err, nats.ErrNoResponders) {
					t.Errorf("Recv: %v", err)
				}
				return
			}
			results, err := p.consumer.OpenStream(t.Context(), "nobody", nil)
			if err != nil {
				t.Error(err)
				return
			}
			n := 0
			for res := range results {
				n++
				if !errors.Is(res.Err, nats.ErrNoResponders) {
					t.Errorf("the channel yields %v", res.Err)
				}
			}
			if n != 1 {
				t.Errorf("the channel yields %d results, want 1", n)
			}
		})
	})
}

// heapInUse returns the bytes that heap and stacks have taken, with what cannot be used for fragmentation.
func heapInUse() int64 {
	for range 3 {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// An open stream on which nothing happens costs the consumer at most 2 KiB.
func TestIdleStreamTakesLittleMemory(t *testing.T) {
	const limit = 2048
	n := scaled(100_000)
	if race.Enabled {
		n = min(n, 5000)
	}
	// The producer is a bare connection, so that what is measured belongs to the consumer. It answers no questions, so
	// none is asked.
	p := newPair(t, pairOptions{consumer: stream.ClientParams{KeepAlive: time.Hour}})
	producer := p.producer.Conn
	_, err := producer.Subscribe("silent", func(*nats.Msg) {})
	if err != nil {
		t.Fatal(err)
	}
	first := rawPacket(stream.PacketSeq, 1, 0, rawData("record"))
	if _, err := producer.Subscribe("greeting", func(req *nats.Msg) {
		if err := producer.PublishRequest(req.Reply, "nowhere.to.be.found", first); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := producer.Flush(); err != nil {
		t.Fatal(err)
	}
	for _, subject := range []string{"silent", "greeting"} {
		t.Run(subject, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			streams := make([]*stream.Stream, 0, n)
			heap, goroutines := heapInUse(), runtime.NumGoroutine()
			// What the producer and the NATS server in this process allocate for each request lies between what stays.
			// How much of that is free at the end depends on when the collector ran, so it runs often.
			defer debug.SetGCPercent(debug.SetGCPercent(10))
			for range n {
				s, err := p.consumer.Open(ctx, subject, nil)
				if err != nil {
					t.Fatal(err)
				}
				if subject == "greeting" {
					if rec, err := s.Recv(); string(rec) != "record" || err != nil {
						t.Fatalf("Recv: %q, %v", rec, err)
					}
				}
				streams = append(streams, s)
			}
			eventually(t, "all requests were published", func() bool { // they hold their headers until then
				st, err := p.server.Raw().Varz(nil)
				return err == nil && st.InMsgs >= int64(n)
			})
			each := (heapInUse() - heap) / int64(n)
			if open := p.consumer.Stats().Streams; open != n {
				t.Errorf("%d streams are open, want %d", open, n)
			}
			t.Logf("%d idle streams, %d bytes each, %d goroutines more", n, each, runtime.NumGoroutine()-goroutines)
			if !race.Enabled && each > limit {
				t.Errorf("an idle stream costs %d bytes, want at most %d", each, limit)
			}
			if grown := runtime.NumGoroutine() - goroutines; grown > 2 {
				t.Errorf("%d goroutines for %d idle streams", grown, n)
			}
			cancel()
			runtime.KeepAlive(streams)
			verifyIdle(t, p.consumer)
		})
	}
}

// An open stream on which nothing happens costs both ends together at most 2.2 KiB with a Writer, and 3.2 KiB and the
// stack of a goroutine with a handler.
func TestIdleStreamTakesLittleMemoryAtBothEnds(t *testing.T) {
	const first = 2000 // streams that cause allocations which are made once: buffers, and caches of the NATS server
	n := 20_000        // fewer would share what a burst of questions leaves in a ring
	if race.Enabled {
		n = 2000
	}
	for _, c := range []struct {
		name  string
		limit int64
		serve func(t *testing.T, p *pair) (open func() int, end func())
	}{
		{"Writer", 2253, func(t *testing.T, p *pair) (func() int, func()) {
			sub, err := p.producer.Conn.Subscribe("idle", func(m *nats.Msg) {
				if err := p.producer.NewWriter(m.Reply).Flush(); err != nil {
					t.Error(err)
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			return func() int { return p.producer.Stats().Streams }, func() { _ = sub.Unsubscribe() }
		}},
		{"handler", 3277, func(t *testing.T, p *pair) (func() int, func()) {
			s, err := stream.NewServer(stream.ServerParams{Conn: p.producer.Conn, MaxStreams: first + n})
			if err != nil {
				t.Fatal(err)
			}
			over := make(chan struct{})
			if _, err := s.Handle("idle", func(*stream.Writer, *stream.Request) error { <-over; return nil }); err != nil {
				t.Fatal(err)
			}
			return func() int { return s.Stats().Streams }, func() { close(over); _ = s.Close() }
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t)
			served, end := c.serve(t, p)
			if err := p.producer.Conn.Flush(); err != nil {
				t.Fatal(err)
			}
			streams := make([]*stream.Stream, 0, first+n)
			open := func(n int) {
				for range n {
					s, err := p.consumer.Open(context.Background(), "idle", nil)
					if err != nil {
						t.Fatal(err)
					}
					streams = append(streams, s)
				}
				eventually(t, "both ends know the streams", func() bool {
					return p.consumer.Stats().Streams == len(streams) && served() == len(streams)
				})
			}
			open(first)
			before := liveHeap()
			open(n)
			each := (liveHeap() - before) / int64(n)
			t.Logf("%d idle streams, %d bytes each at both ends", n, each)
			if !race.Enabled && each > c.limit {
				t.Errorf("an idle stream costs %d bytes at both ends, want at most %d", each, c.limit)
			}
			end()
			for _, s := range streams {
				_ = s.Close()
			}
			verifyIdle(t, p.consumer)
		})
	}
}

// Everything at once: reads, writes, and all that ends a stream, from goroutines of their own. Nothing hangs, nothing
// races, nothing is left.
func TestEverythingAtOnceLeavesNothing(t *testing.T) {
	const streams = 60
	rounds := scaled(40)
	p := newPair(t)
	for round := range rounds {
		producer, err := stream.NewClient(stream.ClientParams{Conn: p.producer.Conn})
		if err != nil {
			t.Fatal(err)
		}
		consumer, err := stream.NewClient(stream.ClientParams{Conn: p.consumer.Conn, MaxBuffered: 4 << 20})
		if err != nil {
			t.Fatal(err)
		}
		subject := fmt.Sprintf("hammer.%d", round)
		var group sync.WaitGroup
		sub, err := p.producer.Conn.Subscribe(subject, func(req *nats.Msg) {
			w := producer.NewWriter(req.Reply)
			r := rand.New(rand.NewPCG(rand.Uint64(), 1))
			for range 2 {
				size, pause := r.IntN(40<<10), r.IntN(3)
				group.Go(func() {
					buf := make([]byte, size)
					for {
						if _, err := w.Write(buf); err != nil {
							return
						}
						if pause == 0 {
							time.Sleep(20 * time.Microsecond)
						}
					}
				})
			}
			group.Go(func() { // an encoder that writes into the open packet
				for w.Context().Err() == nil {
					if _, err := w.WriteObject(map[string]int{"round": round}); err != nil {
						return
					}
				}
			})
			wait := time.Duration(r.IntN(6000)) * time.Microsecond
			code := stream.CloseNormalClosure + r.IntN(2)*3000
			group.Go(func() {
				select {
				case <-w.Context().Done():
				case <-time.After(wait):
				}
				_ = w.Flush()
				_ = w.CloseWithCode(code, "done")
			})
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.producer.Conn.Flush(); err != nil {
			t.Fatal(err)
		}
		var open sync.WaitGroup
		for i := range streams {
			open.Go(func() {
				r := rand.New(rand.NewPCG(uint64(round), uint64(i)))
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				var others sync.WaitGroup
				defer others.Wait()
				after := func(f func()) {
					d := time.Duration(r.IntN(5000)) * time.Microsecond
					others.Go(func() { time.Sleep(d); f() })
				}
				if r.IntN(3) == 0 {
					after(cancel)
				}
				s, err := consumer.Open(ctx, subject, nil)
				if err != nil {
					if !errors.Is(err, context.Canceled) && !errors.Is(err, stream.ErrClientClosed) {
						t.Errorf("Open: %v", err)
					}
					return
				}
				switch r.IntN(4) {
				case 0:
					after(func() { s.Close() })
					after(func() { s.Close() })
				case 1:
					after(func() { _ = s.CloseWithCode(4999, "enough") })
				}
				after(func() { _ = s.Context().Err(); _ = consumer.Stats() })
				for _, err := range s.All() {
					if err != nil {
						break
					}
				}
			})
		}
		time.Sleep(time.Duration(rand.IntN(6000)) * time.Microsecond)
		first, second := consumer, producer
		if round%2 == 0 {
			first, second = producer, consumer
		}
		waitFor(t, "both clients to close under load", func() {
			_ = first.Close()
			_ = second.Close()
		})
		// A handler may be called until the subscription has ended, and then no more.
		if err := sub.Drain(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the subscription has ended", func() bool { return !sub.IsValid() })
		if round%4 == 3 { // requests that nobody got: their streams ended with the client
			if err := p.producer.Conn.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		waitFor(t, "all streams to end", open.Wait)
		waitFor(t, "all writers to end", group.Wait)
		for _, c := range []*stream.Client{producer, consumer} {
			if st := c.Stats(); st.Streams != 0 || st.Reserved != 0 {
				t.Errorf("round %d: left after the end: %+v", round, st)
			}
		}
	}
}
