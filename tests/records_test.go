package stream_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/internal/poison"
	"github.com/natsstream/stream/internal/race"
	"github.com/natsstream/stream/streamtest"
)

func around(sizes ...int) (all []int) {
	for _, n := range sizes {
		for _, d := range []int{-17, -16, -15, -9, -8, -7, -1, 0, 1, 7, 8, 9, 15, 16, 17} {
			all = append(all, n+d)
		}
	}
	return all
}

func compareRecords(t *testing.T, got, want [][]byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%d records arrived of %d", len(got), len(want))
	}
	for i := range want {
		if !bytes.Equal(got[i], want[i]) {
			t.Fatalf("record %d differs: %d bytes, want %d", i, len(got[i]), len(want[i]))
		}
	}
}

// sendAndCompare sends a record of each size, in order, and compares the records that arrive.
func sendAndCompare(t *testing.T, p *pair, sizes []int) {
	t.Helper()
	records := make([][]byte, len(sizes))
	for i, n := range sizes {
		records[i] = testRecord(i, n)
	}
	w, s := newWriterStream(t, p)
	p.handlers.Go(func() {
		var buf []byte
		for i, rec := range records {
			buf = append(buf[:0], rec...)
			if n, err := w.Write(buf); n != len(rec) || err != nil {
				t.Errorf("Write of record %d, %d bytes: %d, %v", i, len(rec), n, err)
				break
			}
			clear(buf) // Write has made a copy
		}
		closeWriter(t, w)
	})
	got, err := readAll(s)
	if err != io.EOF {
		t.Fatalf("after %d records: %v", len(got), err)
	}
	compareRecords(t, got, records)
}

func TestRecordsOfAnySizeArrive(t *testing.T) {
	sizes := []int{0, 1, 2, 7, 8, 16, 255, 256, 480, 488, 496, 497, 512, 1024, 4079, 4080, 4081, 4096, 0, 0, 16384}
	sizes = append(sizes, around(coalesceLimit, 32<<10, singleLimit-frameOverhead, singleLimit, 2*singleLimit)...)
	sizes = append(sizes, 1<<20-frameOverhead, 1<<20, 1<<20+1, 0)
	p := newPair(t)
	for _, n := range sizes {
		t.Run(fmt.Sprint("alone/", n), func(t *testing.T) { sendAndCompare(t, p, []int{n}) })
	}
	t.Run("together", func(t *testing.T) { sendAndCompare(t, p, sizes) })
	t.Run("reversed", func(t *testing.T) {
		reversed := make([]int, len(sizes))
		for i, n := range sizes {
			reversed[len(sizes)-1-i] = n
		}
		sendAndCompare(t, p, reversed)
	})
}

func TestManySmallRecordsArrive(t *testing.T) {
	for _, size := range []int{0, 1, 16, 1024, 16 << 10, coalesceLimit - 1, coalesceLimit, coalesceLimit + 1} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			sizes := make([]int, scaled(min(20000, 64<<20/(size+64))))
			for i := range sizes {
				sizes[i] = size
			}
			p := newPair(t)
			sendAndCompare(t, p, sizes)
			if sent := p.producer.Stats(); size <= 16 && sent.PacketsSent > uint64(len(sizes)/2) {
				t.Errorf("%d records took %d packets", len(sizes), sent.PacketsSent)
			}
		})
	}
}

func TestRecordsArriveWithSmallMaxPayload(t *testing.T) {
	for _, limit := range []int{1 << 10, 4 << 10, 32 << 10, 64 << 10} {
		t.Run(fmt.Sprint(limit), func(t *testing.T) {
			p := newPair(t, pairOptions{server: []streamtest.Option{streamtest.WithMaxPayload(int32(limit))}})
			sizes := append([]int{0, 1, 500}, around(limit-frameOverhead, limit, 2*(limit-frameOverhead))...)
			sizes = append(sizes, 100*limit+1, 0, 1)
			sendAndCompare(t, p, sizes)
		})
	}
}

func TestRecordsOfRandomSizesArrive(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options pairOptions
		largest int
		count   int
	}{
		{"default", pairOptions{}, 100, 50000},
		{"small and large", pairOptions{}, 400 << 10, 1500},
		{"smallest window", pairOptions{consumer: stream.ClientParams{Window: smallestWindow}}, 3000, 10000},
		{"little memory", pairOptions{consumer: stream.ClientParams{MaxBuffered: smallestWindow}}, 3000, 10000},
		{"producer's window", pairOptions{producer: stream.ClientParams{Window: smallestWindow}}, 40000, 2000},
		{"max_payload 1 KiB", pairOptions{server: []streamtest.Option{streamtest.WithMaxPayload(1 << 10)}}, 10000, 2000},
		{"shared client", pairOptions{shared: true}, 3000, 10000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			r := rand.New(rand.NewPCG(seed, 0))
			sizes := make([]int, scaled(tt.count))
			for i := range sizes {
				sizes[i] = r.IntN(1 + r.IntN(1+r.IntN(tt.largest))) // most are small
			}
			sendAndCompare(t, newPair(t, tt.options), sizes)
		})
	}
}

func TestMaxRecordSizeIsEnforced(t *testing.T) {
	p := newPair(t)
	t.Run("default", func(t *testing.T) {
		w, s := newWriterStream(t, p)
		largest := testRecord(1, defaultRecord)
		p.handlers.Go(func() {
			write(t, w, largest)
			if n, err := w.Write(make([]byte, defaultRecord+1)); n != 0 || !errors.Is(err, stream.ErrRecordTooLarge) {
				t.Errorf("Write beyond MaxRecordSize: %d, %v", n, err)
			}
			if _, err := w.WriteObject(make([]byte, defaultRecord+1)); !errors.Is(err, stream.ErrRecordTooLarge) {
				t.Errorf("WriteObject beyond MaxRecordSize: %v", err)
			}
			write(t, w, []byte("goes on"))
			closeWriter(t, w)
		})
		got, err := readAll(s)
		if err != io.EOF {
			t.Fatal(err)
		}
		compareRecords(t, got, [][]byte{largest, []byte("goes on")})
	})
	t.Run("own", func(t *testing.T) {
		c := p.newClient(t, stream.ClientParams{MaxRecordSize: 10})
		reply := make(chan string, 1)
		sub, err := c.Conn.Subscribe("own", func(m *nats.Msg) { reply <- m.Reply })
		if err != nil {
			t.Fatal(err)
		}
		defer sub.Unsubscribe()
		if err := c.Conn.Flush(); err != nil {
			t.Fatal(err)
		}
		s := open(t, p.consumer, "own")
		w := c.NewWriter(<-reply)
		write(t, w, make([]byte, 10))
		if _, err := w.Write(make([]byte, 11)); !errors.Is(err, stream.ErrRecordTooLarge) {
			t.Errorf("Write: %v", err)
		}
		closeWriter(t, w)
		if got, err := readAll(s); err != io.EOF || len(got) != 1 {
			t.Errorf("%d records, %v", len(got), err)
		}
	})
	for _, limit := range []int{10, 1000, 100 << 10, 300 << 10, 1 << 20} {
		t.Run(fmt.Sprint("receiver takes ", limit), func(t *testing.T) {
			p := newPair(t, pairOptions{consumer: stream.ClientParams{MaxRecordSize: limit}})
			w, s := newWriterStream(t, p)
			ok := testRecord(1, limit)
			p.handlers.Go(func() {
				write(t, w, []byte("small"), ok, make([]byte, limit+1))
				<-w.Context().Done()
				if err := context.Cause(w.Context()); !errors.Is(err, &stream.CloseError{Code: stream.CloseMessageTooBig}) {
					t.Errorf("the producer's cause: %v", err)
				}
			})
			got, err := readAll(s)
			if !errors.Is(err, &stream.CloseError{Code: stream.CloseMessageTooBig}) {
				t.Fatalf("%v, want close code 1009", err)
			}
			compareRecords(t, got, [][]byte{[]byte("small"), ok})
			if _, again := s.Recv(); again != err {
				t.Errorf("another error afterwards: %v", again)
			}
		})
	}
}

func TestEmptyStreamEndsNormally(t *testing.T) {
	w, s := newWriterStream(t, newPair(t))
	closeWriter(t, w)
	wantEOF(t, s)
}

func TestRecordsOfRecvStayAsTheyAre(t *testing.T) {
	p := newPair(t)
	count := scaled(20000)
	serve(t, p, "kept", func(w *stream.Writer, _ *nats.Msg) {
		for i := range count {
			write(t, w, testRecord(i, i%300))
		}
		closeWriter(t, w)
	})
	var kept [][]byte
	for range 3 { // what later streams use must not be what earlier ones handed out
		got, err := readAll(open(t, p.consumer, "kept"))
		if err != io.EOF || len(got) != count {
			t.Fatalf("%d records, %v", len(got), err)
		}
		kept = append(kept, got...)
	}
	for i, rec := range kept {
		if !bytes.Equal(rec, testRecord(i%count, i%count%300)) {
			t.Fatalf("record %d was overwritten", i)
		}
	}
	// A record is the caller's to append to and to change.
	for i, rec := range kept {
		_ = append(rec, 0xAA)
		clear(rec)
		if i+1 < len(kept) && !bytes.Equal(kept[i+1], testRecord((i+1)%count, (i+1)%count%300)) {
			t.Fatalf("a change of record %d changes the one behind it", i)
		}
	}
}

// Every read may follow every other one on one stream. The records of Recv and All are never overwritten. The others
// are checked before the next read.
func TestReadsOfAllKindsMix(t *testing.T) {
	sizes := []int{0, 1, 16, 100, 1000, 20 << 10, 40 << 10, 300 << 10}
	count := scaled(3000)
	p := newPair(t)
	type reads interface {
		Recv() ([]byte, error)
		Next() ([]byte, error)
		RecvObject(v any) error
		All() iter.Seq2[[]byte, error]
		Read(p []byte) (int, error)
		Ready() bool
	}
	size := func(i int) int { return sizes[(i*7+i/8)%len(sizes)] }
	send := func(w io.Writer) {
		for i := range count {
			if n, err := w.Write(testRecord(i, size(i))); err != nil {
				t.Errorf("record %d: %d, %v", i, n, err)
				return
			}
		}
	}
	check := func(s reads) {
		r := rand.New(rand.NewPCG(3, 4))
		kept := make(map[int][]byte)
		buf := make([]byte, 300<<10)
		for i := range count {
			var rec, keep []byte
			var err error
			kind := r.IntN(7)
			switch kind {
			case 0:
				rec, err = s.Recv()
				keep = rec
			case 1:
				for rec, err = range s.All() {
					break
				}
				keep = rec
			case 2:
				rec, err = s.Next()
			case 3:
				rec, err = s.Next()
				if len(rec) > 0 {
					rec[0]++ // the caller may change it
					rec[0]--
				}
			case 4, 5:
				if size(i) == 0 { // Read passes over it
					rec, err = s.Next()
					break
				}
				cut := r.IntN(size(i)) + 1
				if _, err = io.ReadFull(s, buf[:cut]); err == nil && cut < size(i) {
					var rest []byte
					if kind == 4 {
						rest, err = s.Next()
					} else {
						rest, err = s.Recv()
						keep = rest
					}
					cut += copy(buf[cut:], rest)
				}
				rec = buf[:cut]
			case 6:
				s.Ready() // may read ahead
				rec, err = s.Recv()
				keep = rec
			}
			if err != nil || !bytes.Equal(rec, testRecord(i, size(i))) {
				t.Errorf("record %d, read %d: %d bytes, want %d, %v", i, kind, len(rec), size(i), err)
				return
			}
			kept[i] = keep
		}
		if rec, err := s.Next(); err != io.EOF {
			t.Errorf("at the end: %d bytes, %v", len(rec), err)
		}
		for i, rec := range kept {
			if !bytes.HasSuffix(testRecord(i, size(i)), rec) {
				t.Errorf("record %d was overwritten", i)
				return
			}
		}
	}
	svc := newService(t, p, stream.ServerParams{})
	svc.handle(t, "reads", func(w *stream.Writer, r *stream.Request) error {
		check(r)
		send(w)
		return nil
	})
	s := open(t, p.consumer, "reads")
	send(s)
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	check(s)
}

// A record of Next is overwritten after its packet was read, or at the next large record, in builds that look for that.
func TestRecordsOfNextAreOverwritten(t *testing.T) {
	for _, size := range []int{100, 100 << 10} {
		t.Run(fmt.Sprintf("%d bytes", size), func(t *testing.T) {
			p := newPair(t)
			w, s := newWriterStream(t, p)
			var lent [][]byte
			for i := range 3 {
				write(t, w, testRecord(i, size))
				if err := w.Flush(); err != nil {
					t.Fatal(err)
				}
				rec, err := s.Next()
				if err != nil || !bytes.Equal(rec, testRecord(i, size)) {
					t.Fatalf("record %d: %d bytes, %v", i, len(rec), err)
				}
				lent = append(lent, rec)
			}
			for i, rec := range lent[:2] {
				if overwritten := !bytes.Equal(rec, testRecord(i, size)); poison.Enabled && !overwritten {
					t.Errorf("record %d is as it was", i)
				}
			}
			closeWriter(t, w)
			wantEOF(t, s)
		})
	}
}

// Write copies: a caller may use its buffer again at once, also if a record is cut into pieces. The buffers of packets
// go back to their pools only after their last use, and the records of a reader are never overwritten. Builds with
// -race or -tags poison overwrite each buffer that goes back.
func TestWriteCopiesAndReadsAreNotOverwritten(t *testing.T) {
	sizes := []int{0, 1, 16, 100, 1000, 5000, 32 << 10, 40 << 10, 256 << 10, 300 << 10, 700 << 10}
	rounds := scaled(400)
	if race.Enabled {
		rounds = min(rounds, 40)
	}
	p, slow := newWatchedPair(t, pairOptions{consumer: stream.ClientParams{Window: 1 << 20}})
	serve(t, p, "records", func(w *stream.Writer, req *nats.Msg) {
		r := rand.New(rand.NewPCG(1, 2))
		buf := make([]byte, sizes[len(sizes)-1])
		for i := range rounds {
			rec := buf[:sizes[r.IntN(len(sizes))]]
			if strings.HasSuffix(string(req.Data), "small") {
				rec = buf[:r.IntN(600)]
			}
			copy(rec, testRecord(i, len(rec)))
			if _, err := w.Write(rec); err != nil {
				t.Errorf("Write of record %d: %v", i, err)
				return
			}
			for k := range rec {
				rec[k] = 0xEE
			}
		}
		closeWriter(t, w)
	})
	var readers sync.WaitGroup
	for k := range 8 {
		kind := []string{"large", "small"}[k%2]
		s, err := p.consumer.Open(testContext(t), "records", []byte(kind))
		if err != nil {
			t.Fatal(err)
		}
		readers.Go(func() {
			defer s.Close()
			got, err := readAll(s)
			if err != io.EOF || len(got) != rounds {
				t.Errorf("stream %d: %d records of %d, %v", k, len(got), rounds, err)
				return
			}
			for i, rec := range got {
				if !bytes.Equal(rec, testRecord(i, len(rec))) {
					t.Errorf("stream %d: record %d of %d bytes was overwritten", k, i, len(rec))
					return
				}
			}
		})
	}
	waitFor(t, "all streams to end", readers.Wait)
	slow.verify(t, p)
}

func TestReadYieldsTheRecordsAsBytes(t *testing.T) {
	p := newPair(t)
	var want []byte
	for i := range 300 {
		want = append(want, testRecord(i, i)...)
	}
	serve(t, p, "bytes", func(w *stream.Writer, _ *nats.Msg) {
		for i := range 300 {
			write(t, w, testRecord(i, i))
		}
		closeWriter(t, w)
	})
	for _, size := range []int{1, 7, 100, 64 << 10} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			s := open(t, p.consumer, "bytes")
			if n, err := s.Read(nil); n != 0 || err != nil {
				t.Errorf("Read of nothing: %d, %v", n, err)
			}
			var got []byte
			buf := make([]byte, size)
			for {
				n, err := s.Read(buf)
				got = append(got, buf[:n]...)
				if err == io.EOF {
					break
				}
				if err != nil || n == 0 {
					t.Fatalf("%d, %v", n, err)
				}
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%d bytes differ from the %d written", len(got), len(want))
			}
		})
	}
	t.Run("mixed with Recv", func(t *testing.T) {
		s := open(t, p.consumer, "bytes")
		r := rand.New(rand.NewPCG(1, 2))
		var got []byte
		for {
			var part []byte
			var err error
			if r.IntN(2) == 0 {
				part, err = s.Recv()
			} else {
				part = make([]byte, 1+r.IntN(200))
				var n int
				n, err = s.Read(part)
				part = part[:n]
			}
			got = append(got, part...)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%d bytes differ from the %d written", len(got), len(want))
		}
	})
	t.Run("io.Copy", func(t *testing.T) {
		var got bytes.Buffer
		if n, err := io.Copy(&got, open(t, p.consumer, "bytes")); n != int64(len(want)) || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		if !bytes.Equal(got.Bytes(), want) {
			t.Error("the bytes differ")
		}
	})
	t.Run("io.ReadAll", func(t *testing.T) {
		got, err := io.ReadAll(open(t, p.consumer, "bytes"))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	})
}

type shortWriter struct {
	room int
	err  error
}

func (w *shortWriter) Write(p []byte) (int, error) {
	n := min(len(p), w.room)
	w.room -= n
	return n, w.err
}

func TestWriteToCopiesAllRecords(t *testing.T) {
	p := newPair(t)
	failure := errors.New("disk full")
	for _, tt := range []struct {
		name string
		to   shortWriter
		code int
		n    int64
		want error
	}{
		{"normal", shortWriter{room: 1000}, stream.CloseNormalClosure, 12, nil},
		{"short write", shortWriter{room: 6}, stream.CloseNormalClosure, 6, io.ErrShortWrite},
		{"failed write", shortWriter{room: 2, err: failure}, stream.CloseNormalClosure, 2, failure},
		{"failed stream", shortWriter{room: 1000}, 4444, 12, &stream.CloseError{Code: 4444}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, s := newWriterStream(t, p)
			write(t, w, []byte("1234"), []byte("5678"), []byte("9012"))
			if err := w.CloseWithCode(tt.code); err != nil {
				t.Fatal(err)
			}
			if n, err := s.WriteTo(&tt.to); n != tt.n || !errors.Is(err, tt.want) {
				t.Errorf("%d, %v; want %d, %v", n, err, tt.n, tt.want)
			}
		})
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// WriteTo ends with an error for a Writer that counts wrongly.
func TestWriteToFailsForAFaultyWriter(t *testing.T) {
	boom := errors.New("boom")
	p := newPair(t)
	for _, c := range []struct {
		name string
		n    func(p []byte) int
		err  error
		want string
		sent int64
	}{
		{"more", func(p []byte) int { return len(p) + 1 }, nil, "invalid write result", 0},
		{"negative", func([]byte) int { return -1 }, nil, "invalid write result", 0},
		{"more, and an error", func(p []byte) int { return len(p) + 1 }, boom, "boom", 0},
		{"less", func(p []byte) int { return len(p) - 1 }, nil, io.ErrShortWrite.Error(), 2},
		{"nothing", func([]byte) int { return 0 }, nil, io.ErrShortWrite.Error(), 0},
		{"an error", func([]byte) int { return 1 }, boom, "boom", 1},
		{"all", func(p []byte) int { return len(p) }, nil, "", 6},
	} {
		w, s := newWriterStream(t, p)
		write(t, w, []byte("abc"), []byte("def"))
		closeWriter(t, w)
		n, err := s.WriteTo(writerFunc(func(p []byte) (int, error) { return c.n(p), c.err }))
		if n != c.sent || c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: WriteTo: %d, %v; want %d, %q", c.name, n, err, c.sent, c.want)
		}
		s.Close()
	}
}

func TestAllYieldsRecordsAndTheError(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	write(t, w, []byte("a"), []byte("b"), []byte("c"), []byte("d"))
	if err := w.CloseWithCode(4444); err != nil {
		t.Fatal(err)
	}
	for rec, err := range s.All() {
		if err != nil || string(rec) != "a" {
			t.Fatalf("%q, %v", rec, err)
		}
		break
	}
	if s.Context().Err() != nil {
		t.Fatal("leaving the loop ended the stream")
	}
	if rec, err := s.Recv(); err != nil || string(rec) != "b" {
		t.Fatalf("%q, %v", rec, err)
	}
	var got []string
	var failures int
	for rec, err := range s.All() {
		if err != nil {
			failures++
			if rec != nil || !errors.Is(err, &stream.CloseError{Code: 4444}) {
				t.Errorf("%q, %v", rec, err)
			}
			continue
		}
		got = append(got, string(rec))
	}
	if fmt.Sprint(got) != "[c d]" || failures != 1 {
		t.Errorf("%v and %d errors", got, failures)
	}
	for range s.All() { // still the same end
		failures++
	}
	if failures != 2 {
		t.Errorf("%d errors", failures)
	}
}

func TestConcurrentRecvIsRefused(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	got := make(chan string, 2)
	for range 2 {
		go func() {
			rec, err := s.Recv()
			got <- fmt.Sprint(string(rec), err)
		}()
	}
	waitFor(t, "one of two reads to fail", func() {
		if v := <-got; v != fmt.Sprint(stream.ErrConcurrentRecv) {
			t.Errorf("one of two reads: %s", v)
		}
	})
	// The other one waits: nothing was sent.
	for range 100 {
		if _, err := s.Recv(); err != stream.ErrConcurrentRecv {
			t.Fatalf("Recv: %v", err)
		}
		if err := s.RecvObject(new(string)); err != stream.ErrConcurrentRecv {
			t.Fatalf("RecvObject: %v", err)
		}
		if _, err := s.WriteTo(io.Discard); err != stream.ErrConcurrentRecv {
			t.Fatalf("WriteTo: %v", err)
		}
	}
	write(t, w, []byte("one"))
	waitFor(t, "the other read", func() {
		if v := <-got; v != "one<nil>" {
			t.Errorf("the other read: %s", v)
		}
	})
	write(t, w, []byte("two"))
	closeWriter(t, w)
	if rec, err := s.Recv(); err != nil || string(rec) != "two" {
		t.Errorf("afterwards: %q, %v", rec, err)
	}
	wantEOF(t, s)
}

// Two readers are an error of the program, yet the race detector's builds lose and repeat no record. Others look
// closely only where a read may wait, so there is one reader at a time then.
func TestConcurrentRecvLosesNothing(t *testing.T) {
	p := newPair(t)
	count := scaled(50000)
	serve(t, p, "hammer", func(w *stream.Writer, _ *nats.Msg) {
		for i := range count {
			write(t, w, binary.BigEndian.AppendUint32(nil, uint32(i)))
			if i%1000 == 0 {
				runtime.Gosched()
			}
		}
		closeWriter(t, w)
	})
	s := open(t, p.consumer, "hammer")
	readers := 1
	if race.Enabled {
		readers = 2
	}
	var mu sync.Mutex
	seen := make([]int, count)
	var wg sync.WaitGroup
	for range readers {
		wg.Go(func() {
			for {
				rec, err := s.Recv()
				switch {
				case err == stream.ErrConcurrentRecv:
					runtime.Gosched()
				case err == io.EOF:
					return
				case err != nil || len(rec) != 4:
					t.Errorf("%d bytes, %v", len(rec), err)
					return
				default:
					mu.Lock()
					seen[binary.BigEndian.Uint32(rec)]++
					mu.Unlock()
				}
			}
		})
	}
	waitFor(t, "the readers", wg.Wait)
	for i, n := range seen {
		if n != 1 {
			t.Fatalf("record %d came %d times", i, n)
		}
	}
}

func TestWriteReturnsLength(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	p.handlers.Go(func() {
		for _, n := range []int{0, 1, 100, coalesceLimit, coalesceLimit + 1, singleLimit + 1, 1 << 20} {
			if got, err := w.Write(make([]byte, n)); got != n || err != nil {
				t.Errorf("Write of %d bytes: %d, %v", n, got, err)
			}
		}
		if n, err := fmt.Fprintf(w, "%s", "five!"); n != 5 || err != nil {
			t.Errorf("Fprintf: %d, %v", n, err)
		}
		for _, v := range []any{nil, 1, "text", strings.Repeat("x", 100<<10), make([]byte, 1<<20)} {
			if n, err := w.WriteObject(v); n != len(encoded(stream.MsgPack, v)) || err != nil {
				t.Errorf("WriteObject of %T: %d, %v; want %d", v, n, err, len(encoded(stream.MsgPack, v)))
			}
		}
		closeWriter(t, w)
	})
	if got, err := readAll(s); err != io.EOF || len(got) != 13 {
		t.Errorf("%d records, %v", len(got), err)
	}
}

func TestReadFromSendsWhatItReads(t *testing.T) {
	content := testRecord(1, 3<<20+12345)
	failure := errors.New("disk broken")
	for _, tt := range []struct {
		name   string
		from   io.Reader
		n      int
		want   error
		server []streamtest.Option
	}{
		{"whole", bytes.NewReader(content), len(content), nil, nil},
		{"empty", bytes.NewReader(nil), 0, nil, nil},
		{"byte by byte", iotest.OneByteReader(bytes.NewReader(content[:10000])), 10000, nil, nil},
		{"data with EOF", iotest.DataErrReader(bytes.NewReader(content)), len(content), nil, nil},
		{"failing", io.MultiReader(bytes.NewReader(content[:50000]), iotest.ErrReader(failure)), 50000, failure, nil},
		{"small max_payload", bytes.NewReader(content), len(content), nil, []streamtest.Option{streamtest.WithMaxPayload(1 << 10)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPair(t, pairOptions{server: tt.server})
			w, s := newWriterStream(t, p)
			p.handlers.Go(func() {
				n, err := io.Copy(w, struct{ io.Reader }{tt.from}) // without WriterTo, as a file
				if n != int64(tt.n) || err != tt.want {
					t.Errorf("%d, %v; want %d, %v", n, err, tt.n, tt.want)
				}
				closeWriter(t, w)
			})
			var got bytes.Buffer
			if _, err := io.Copy(&got, s); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got.Bytes(), content[:tt.n]) {
				t.Errorf("%d bytes arrived and differ", got.Len())
			}
		})
	}
	t.Run("smaller MaxRecordSize", func(t *testing.T) {
		p := newPair(t, pairOptions{producer: stream.ClientParams{MaxRecordSize: 1000}})
		w, s := newWriterStream(t, p)
		p.handlers.Go(func() {
			if n, err := w.ReadFrom(bytes.NewReader(content)); n != int64(len(content)) || err != nil {
				t.Errorf("%d, %v", n, err)
			}
			closeWriter(t, w)
		})
		got, err := io.ReadAll(s)
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	})
	t.Run("stream to stream", func(t *testing.T) {
		p := newPair(t)
		w, s := newWriterStream(t, p)
		w2, s2 := newWriterStream(t, p)
		p.handlers.Go(func() {
			for i := range 1000 {
				write(t, w, testRecord(i, i))
			}
			closeWriter(t, w)
		})
		p.handlers.Go(func() {
			if _, err := io.Copy(w2, s); err != nil { // record by record
				t.Errorf("io.Copy: %v", err)
			}
			closeWriter(t, w2)
		})
		got, err := readAll(s2)
		if err != io.EOF || len(got) != 1000 {
			t.Fatalf("%d records, %v", len(got), err)
		}
		for i, rec := range got {
			if !bytes.Equal(rec, testRecord(i, i)) {
				t.Fatalf("record %d differs", i)
			}
		}
	})
}

// ReadFrom ends with an error for a Reader that counts wrongly or makes no progress, and sends nothing that it did not
// read.
func TestReadFromFailsForAFaultyReader(t *testing.T) {
	p := newPair(t)
	for _, c := range []struct {
		name string
		read func(call int, p []byte) (int, error)
		want string
		sent int64
	}{
		{"more than there is room for", func(_ int, p []byte) (int, error) { return len(p) + 20, nil }, "invalid read result", 0},
		{"more, and io.EOF", func(_ int, p []byte) (int, error) { return len(p) + 1, io.EOF }, "invalid read result", 0},
		{"negative", func(_ int, p []byte) (int, error) { return -1, nil }, "invalid read result", 0},
		{"negative, and io.EOF", func(_ int, p []byte) (int, error) { return -1, io.EOF }, "invalid read result", 0},
		{"nothing for ever", func(int, []byte) (int, error) { return 0, nil }, io.ErrNoProgress.Error(), 0},
		{"nothing after a record", func(call int, p []byte) (int, error) { return min(1, max(0, 1-call)), nil }, io.ErrNoProgress.Error(), 1},
		{"fails with a record", func(_ int, p []byte) (int, error) { return 2, errors.New("boom") }, "boom", 2},
		{"pauses", func(call int, p []byte) (int, error) {
			switch {
			case call == 500:
				return 0, io.EOF
			case call%50 == 49:
				return 1, nil
			}
			return 0, nil
		}, "", 10},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, s := newWriterStream(t, p)
			call := -1
			n, err := w.ReadFrom(readerFunc(func(p []byte) (int, error) { call++; return c.read(call, p) }))
			if n != c.sent || c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("ReadFrom: %d, %v; want %d, %q", n, err, c.sent, c.want)
			}
			closeWriter(t, w)
			var got int64
			records, end := readAll(s)
			for _, rec := range records {
				got += int64(len(rec))
			}
			if got != c.sent || end != io.EOF {
				t.Errorf("%d bytes arrived, %v", got, end)
			}
		})
	}
}

// The buffers of ReadFrom come from a pool. A Reader that counts bytes that it did not write sends none of other
// streams.
func TestReadFromSendsNoBytesOfOtherStreams(t *testing.T) {
	p := newPair(t)
	secret := bytes.Repeat([]byte("secret"), 5000)
	for range 20 {
		other, s := newWriterStream(t, p)
		write(t, other, secret)
		closeWriter(t, other)
		if _, err := readAll(s); err != io.EOF {
			t.Fatal(err)
		}
		if err := other.Sync(testContext(t)); err != nil {
			t.Fatal(err)
		}
		w, s := newWriterStream(t, p)
		lied := false
		if _, err := w.ReadFrom(readerFunc(func(p []byte) (int, error) {
			if lied {
				return 0, io.EOF
			}
			lied = true
			return len(p), nil
		})); err != nil {
			t.Fatal(err)
		}
		closeWriter(t, w)
		records, err := readAll(s)
		if err != io.EOF || bytes.Contains(slices.Concat(records...), []byte("secret")) {
			t.Fatalf("%v: a Reader that wrote nothing sent bytes of another stream", err)
		}
	}
}

// ReadFrom of a Reader without progress ends with the stream.
func TestReadFromEndsWithTheStream(t *testing.T) {
	p := newPair(t)
	ctx, cancel := context.WithCancel(testContext(t))
	w, s := newWriterStreamContext(t, p, ctx)
	write(t, w, []byte("x"))
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	cancel()
	waitFor(t, "the writer's end", func() { <-w.Context().Done() })
	if _, err := w.ReadFrom(readerFunc(func([]byte) (int, error) { return 0, nil })); !errors.Is(err, &stream.CloseError{Code: stream.CloseCanceled}) {
		t.Errorf("ReadFrom: %v", err)
	}
}

func TestFlushSendsWhatIsBuffered(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	if err := w.Flush(); err != nil {
		t.Errorf("Flush of nothing: %v", err)
	}
	if n := p.producer.Stats().PacketsSent; n != 0 {
		t.Errorf("Flush of nothing sent %d packets", n)
	}
	for i := range 100 {
		write(t, w, testRecord(i, 10))
		before := p.producer.Stats()
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		after := p.producer.Stats()
		if after.PacketsSent == 0 || after.PacketsSent < before.PacketsSent {
			t.Fatalf("after Flush %d: %+v", i, after)
		}
		if rec, err := s.Recv(); err != nil || !bytes.Equal(rec, testRecord(i, 10)) {
			t.Fatalf("%x, %v", rec, err)
		}
	}
	closeWriter(t, w)
	wantEOF(t, s)
}

// Records of many goroutines on one writer: all arrive once, those of one goroutine in its order.
func TestConcurrentWritesKeepTheirOrder(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options pairOptions
		size    func(r *rand.Rand) int
		count   int
	}{
		{"small", pairOptions{}, func(r *rand.Rand) int { return r.IntN(100) }, 10000},
		{"mixed", pairOptions{}, func(r *rand.Rand) int { return r.IntN(1 + r.IntN(100<<10)) }, 300},
		{"pieces", pairOptions{}, func(r *rand.Rand) int { return r.IntN(3 * singleLimit) }, 30},
		{"smallest window", pairOptions{consumer: stream.ClientParams{Window: smallestWindow}}, func(r *rand.Rand) int { return r.IntN(3000) }, 1000},
		{"max_payload", pairOptions{server: []streamtest.Option{streamtest.WithMaxPayload(1 << 10)}}, func(r *rand.Rand) int { return r.IntN(3000) }, 1000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const writers = 8
			p := newPair(t, tt.options)
			w, s := newWriterStream(t, p)
			count := scaled(tt.count)
			p.handlers.Go(func() {
				var wg sync.WaitGroup
				for k := range writers {
					wg.Go(func() {
						r := rand.New(rand.NewPCG(uint64(k), 7))
						for i := range count {
							rec := binary.BigEndian.AppendUint32(nil, uint32(k<<24|i))
							rec = append(rec, testRecord(k<<24|i, tt.size(r))...)
							write(t, w, rec)
							if i%100 == 99 {
								if err := w.Flush(); err != nil {
									t.Errorf("Flush: %v", err)
								}
							}
						}
					})
				}
				wg.Wait()
				closeWriter(t, w)
			})
			var next [writers]int
			for rec, err := range s.All() {
				if err != nil {
					t.Fatal(err)
				}
				id := int(binary.BigEndian.Uint32(rec))
				if k, i := id>>24, id&(1<<24-1); i != next[k] {
					t.Fatalf("record %d of goroutine %d, want %d", i, k, next[k])
				} else {
					next[k]++
				}
				if !bytes.Equal(rec[4:], testRecord(id, len(rec)-4)) {
					t.Fatalf("record %x differs", id)
				}
			}
			for k, n := range next {
				if n != count {
					t.Errorf("%d records of goroutine %d", n, k)
				}
			}
		})
	}
}

// Under load neither Write nor Recv allocates: the allocations of NATS and the endpoint for a packet are shared by
// hundreds of records. Race builds allocate on their own account and only count the records.
func TestWriteAndRecvAllocateNothing(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	warm, count := scaled(100000), scaled(1000000)
	start := make(chan struct{})
	p.handlers.Go(func() {
		rec := make([]byte, 128)
		for i := range warm + count {
			if i == warm {
				<-start
			}
			if _, err := w.Write(rec); err != nil {
				t.Errorf("Write: %v", err)
				return
			}
		}
		closeWriter(t, w)
	})
	recv := func(n int) {
		for i := range n {
			if rec, err := s.Recv(); err != nil || len(rec) != 128 {
				t.Fatalf("record %d: %d bytes, %v", i, len(rec), err)
			}
		}
	}
	recv(warm)
	n := mallocs(func() {
		close(start)
		recv(count)
	})
	wantEOF(t, s)
	perRecord := float64(n) / float64(count)
	t.Logf("%.4f mallocs per record", perRecord)
	if !race.Enabled && perRecord >= 0.05 {
		t.Errorf("%.4f mallocs per record of 128 bytes, want less than 0.05", perRecord)
	}
}

// A write costs no allocation. Race builds allocate on their own account.
func TestWriteAllocatesNothing(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	var group sync.WaitGroup
	group.Go(func() { _, _ = readAll(s) })
	rec := make([]byte, 64)
	for range 10_000 {
		write(t, w, rec)
	}
	if n := testing.AllocsPerRun(20_000, func() { _, _ = w.Write(rec) }); n != 0 && !race.Enabled {
		t.Errorf("%v allocations for each Write", n)
	}
	closeWriter(t, w)
	group.Wait()
}

// Headers come before the first record, trailers with the end.
func TestHeaderComesFirstAndTrailerLast(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	for _, records := range []int{0, 1, 1000} {
		subject := fmt.Sprint("meta", records)
		s.handle(t, subject, func(w *stream.Writer, _ *stream.Request) error {
			for _, bad := range []nats.Header{{"": {"x"}}, {"a b": {"x"}}, {"K": {"line\nbreak"}}, {"K": {strings.Repeat("x", 20_000)}}} {
				if err := w.SetHeader(bad); !errors.Is(err, stream.ErrHeader) {
					t.Errorf("SetHeader(%.40v): %v", bad, err)
				}
			}
			if err := w.SetHeader(nats.Header{"H": {"1", "2"}}); err != nil {
				t.Error(err)
			}
			if err := w.SetHeader(nats.Header{"H": {"3"}}); !errors.Is(err, stream.ErrHeader) {
				t.Errorf("a second SetHeader: %v", err)
			}
			for i := range records {
				write(t, w, testRecord(i, 100))
			}
			if err := w.SetTrailer(nats.Header{"T": {"end"}}); err != nil {
				t.Error(err)
			}
			return &stream.CloseError{Code: 4001 + records}
		})
		st := open(t, p.consumer, subject)
		h, err := st.Header()
		if err != nil || len(h.Values("H")) != 2 {
			t.Errorf("%d records: headers %v, %v", records, h, err)
		}
		if h := st.Trailer(); h != nil {
			t.Errorf("trailers before the end: %v", h)
		}
		got, err := readAll(st)
		if len(got) != records || !errors.Is(err, &stream.CloseError{Code: 4001 + records}) {
			t.Errorf("%d records, %v; want %d", len(got), err, records)
		}
		if h := st.Trailer(); h.Get("T") != "end" {
			t.Errorf("trailers %v", h)
		}
	}
	eventually(t, "the server holds nothing", func() bool { s := s.Stats(); return s.Streams == 0 && s.Reserved == 0 })
}
