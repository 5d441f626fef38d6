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
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// What bounds a producer's lead; docs/PROTOCOL.md sections 6 and 8.
const (
	firstWindow = 256 << 10 // bytes offered to a new stream
	fullWindow  = 4 << 20   // bytes a window may grow to
	fullPacket  = 32 << 10  // bytes of a packet of many records
)

// slowConsumers counts what NATS drops because a subscription or a connection does not keep up.
type slowConsumers struct{ n atomic.Int64 }

func (c *slowConsumers) option() nats.Option {
	return nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		if errors.Is(err, nats.ErrSlowConsumer) {
			c.n.Add(1)
		}
	})
}

func (c *slowConsumers) verify(t testing.TB, p *pair) {
	t.Helper()
	if n := c.n.Load(); n != 0 {
		t.Errorf("NATS dropped messages of a subscription %d times", n)
	}
	if n := p.server.SlowConsumers(); n != 0 {
		t.Errorf("the server cut off %d slow consumers", n)
	}
	for _, s := range []stream.Stats{p.producer.Stats(), p.consumer.Stats()} {
		if n := s.DroppedMalformed + s.DroppedForeign + s.DroppedDuplicate + s.DroppedControl; n != 0 {
			t.Errorf("packets dropped: %+v", s)
		}
	}
}

// newWatchedPair is newPair with both connections' slow consumers counted.
func newWatchedPair(t testing.TB, o pairOptions) (*pair, *slowConsumers) {
	slow := new(slowConsumers)
	o.producerConn = append(o.producerConn, slow.option())
	o.consumerConn = append(o.consumerConn, slow.option())
	return newPair(t, o), slow
}

// A reader that sleeps now and then gets every record in order, and the producer is held back: it is never further
// ahead than the window and the packet that uses it up.
func TestSlowReader(t *testing.T) {
	const size = 1024
	n := scaled(200_000)
	if stream.RaceEnabled {
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
			// A packet is consumed when the read after its last record begins, so what was read and not consumed
			// counts as lead too: the bound is exact.
			limit := int64(window+fullPacket) / (size + stream.FrameHeaderSize)
			t.Logf("largest lead %d records, limit %d", lead.Load(), limit)
			if lead.Load() > limit {
				t.Errorf("the producer was %d records ahead, the window allows %d", lead.Load(), limit)
			}
			slow.verify(t, p)
		})
	}
}

// A reader that never reads holds back its own producer, and nothing else.
func TestNeverReader(t *testing.T) {
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
		return p.consumer.Stats().Reserved == firstWindow && p.consumer.Stats().Streams == 1 && p.producer.Stats().Streams == 1
	})
	// Both ends are in this process. The producer keeps what was not acknowledged.
	if grown, limit := liveHeap()-before, int64(2*(firstWindow+fullPacket)+1<<20); !stream.RaceEnabled && grown > limit {
		t.Errorf("%d bytes held for a reader that never reads, want at most %d", grown, limit)
	}
	slow.verify(t, p)
	stuck.Close()
}

// waitStuck waits until the counter has stopped, and returns it.
func waitStuck(t testing.TB, bytes *atomic.Int64) int64 {
	t.Helper()
	last := int64(-1)
	eventually(t, "the producer is held back", func() bool {
		time.Sleep(20 * time.Millisecond)
		now := bytes.Load()
		stopped := now == last && now > firstWindow/2
		last = now
		return stopped
	})
	return last
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
// delays of their own. What each goroutine wrote arrives, in its order and unchanged.
func TestMixedLoad(t *testing.T) {
	const writers = 3 // goroutines of one stream
	streams, n := 40, scaled(1500)
	if stream.RaceEnabled {
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

// liveHeap returns the bytes of all live objects. A pool keeps what it has over one collection.
func liveHeap() int64 {
	for range 3 {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
