package faults

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"
	"time"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// lineTest streams through a line of some rate between the server of NATS and one of the ends, with the default times.
type lineTest struct {
	kib     int // KiB a second
	up      bool
	streams int
	record  int
	bytes   int           // in all
	cut     time.Duration // after which the consumer leaves, 0 for never: the line would take too long
}

func (x lineTest) String() string {
	way := "down"
	if x.up {
		way = "up"
	}
	return fmt.Sprintf("%d KiB per s, %s, %d streams, records of %d", x.kib, way, x.streams, x.record)
}

// TestSlowLine streams over lines of many rates: everything arrives, and a quiet stream beside goes on. A hundred
// records of 1 MB take 13 minutes at 128 KiB/s, and 102 minutes at 16 KiB/s. So these rows end early: until then no
// stream ends, and the line is in use.
func TestSlowLine(t *testing.T) {
	var tests []lineTest
	for _, up := range []bool{false, true} {
		tests = append(tests,
			lineTest{kib: 16, up: up, streams: 1, record: 1000, bytes: 200 << 10},
			lineTest{kib: 128, up: up, streams: 1, record: 1_000_000, bytes: 2_000_000},
			lineTest{kib: 256, up: up, streams: 100, record: 1000, bytes: 3 << 20},
		)
		if runs(1, 2) == 1 {
			continue
		}
		for _, kib := range []int{16, 43, 128, 256, 1024, 10 << 10} {
			for _, streams := range []int{1, 100} {
				for _, record := range []int{100, 1_000_000} {
					x := lineTest{kib: kib, up: up, streams: streams, record: record}
					x.bytes = max(kib<<10*20, streams*record) // 20 s, or as long as one record of each stream takes
					if time.Duration(x.bytes/(kib<<10))*time.Second > longestLine {
						x.cut = 2 * time.Minute
					}
					tests = append(tests, x)
				}
			}
		}
	}
	for _, x := range tests {
		t.Run(x.String(), func(t *testing.T) {
			t.Parallel()
			x.run(t)
		})
	}
}

// longestLine is how long the bytes of a row may take on the line.
const longestLine = 7 * time.Minute

func (x lineTest) run(t *testing.T) {
	srv := streamtest.Run(t)
	proxy := streamtest.RunProxy(t, srv.URL())
	dir := streamtest.ToClient
	if x.up {
		dir = streamtest.ToServer
	}
	proxy.Throttle(dir, x.kib<<10)
	sc := connect(t, srv.URL())
	t.Cleanup(sc.Close)
	server, err := stream.NewServer(stream.ServerParams{Conn: sc})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	cc := connect(t, proxy.URL())
	t.Cleanup(cc.Close)
	client, err := stream.NewClient(stream.ClientParams{Conn: cc})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	records := max(1, x.bytes/x.streams/x.record)
	send := func(w io.Writer) error {
		for range records {
			if _, err := w.Write(make([]byte, x.record)); err != nil {
				return err
			}
		}
		return nil
	}
	count := func(recv func() ([]byte, error)) (n int, err error) {
		for {
			rec, err := recv()
			if err == io.EOF {
				return n, nil
			}
			if err != nil || len(rec) != x.record {
				return n, fmt.Errorf("record %d of %d bytes: %w", n, len(rec), err)
			}
			n++
		}
	}
	handle := func(subject string, h stream.Handler) {
		if _, err := server.Handle(subject, h); err != nil {
			t.Fatal(err)
		}
	}
	handle("down", func(w *stream.Writer, _ *stream.Request) error { return send(w) })
	handle("up", func(w *stream.Writer, r *stream.Request) error {
		n, err := count(r.Recv)
		if err == nil && n != records {
			err = fmt.Errorf("%d records of %d", n, records)
		}
		return err
	})
	handle("quiet", echo)
	if err := sc.Flush(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*longestLine)
	defer cancel()
	quiet, err := client.Open(ctx, "quiet", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer quiet.Close()
	bulkCtx := ctx
	if x.cut != 0 {
		var cancel context.CancelFunc
		bulkCtx, cancel = context.WithTimeout(ctx, x.cut)
		defer cancel()
	}
	var bulk sync.WaitGroup
	for range x.streams {
		bulk.Go(func() {
			if err := x.one(bulkCtx, client, records, send, count); err != nil && (x.cut == 0 || !errors.Is(err, context.DeadlineExceeded)) {
				t.Error(err)
			}
		})
	}
	done := make(chan struct{})
	go func() { bulk.Wait(); close(done) }()
	var longest time.Duration
	for range time.Tick(300 * time.Millisecond) {
		began := time.Now()
		if _, err := quiet.Write([]byte("x")); err != nil {
			t.Fatalf("quiet stream: %v", err)
		}
		if _, err := quiet.Recv(); err != nil {
			t.Fatalf("quiet stream: %v", err)
		}
		longest = max(longest, time.Since(began))
		select {
		case <-done:
			t.Logf("an echo beside took %v at most", longest.Round(time.Millisecond))
			// nats.go does not count the packets that a fast connection sends.
			if used := cc.Stats().InBytes + max(cc.Stats().OutBytes, client.Stats().BytesSent); used < uint64(x.cut.Seconds())*uint64(x.kib<<10)/2 {
				t.Errorf("%d bytes came over the line in %v", used, x.cut)
			}
			// An echo waits for the bytes that queue on the line, and for no turn of another stream.
			if most := 2 * time.Second; x.kib >= 256 && longest > most {
				t.Errorf("an echo beside took %v, want at most %v", longest, most)
			}
			return
		default:
		}
	}
}

func (x lineTest) one(ctx context.Context, client *stream.Client, records int, send func(io.Writer) error, count func(func() ([]byte, error)) (int, error)) error {
	subject := "down"
	if x.up {
		subject = "up"
	}
	s, err := client.Open(ctx, subject, nil)
	if err != nil {
		return err
	}
	defer s.Close()
	if x.up {
		if err := send(s); err != nil {
			return fmt.Errorf("write: %w", err)
		}
		if err := s.CloseSend(); err != nil {
			return fmt.Errorf("CloseSend: %w", err)
		}
		_, err := s.Recv()
		if err != io.EOF {
			return fmt.Errorf("the handler's end: %w", err)
		}
		return nil
	}
	n, err := count(s.Recv)
	if err == nil && n != records {
		err = fmt.Errorf("%d records of %d", n, records)
	}
	return err
}

// TestIdleStreamsSurviveAReconnectOverASlowLine makes the connections of one end or both anew, over lines on which the
// questions of all idle streams take longer than a silent peer is given.
func TestIdleStreamsSurviveAReconnectOverASlowLine(t *testing.T) {
	for _, x := range []idleTest{
		{end: "consumer", kib: 128, resets: 1, streams: max(200, runs(1000, 4000))},
		{end: "consumer", kib: 16, resets: runs(1, 2), streams: max(50, runs(200, 500))},
		{end: "producer", kib: 128, resets: runs(1, 3), streams: max(200, runs(1000, 4000))},
		{end: "both", kib: 128, resets: 1, streams: max(200, runs(1000, 4000))},
	} {
		t.Run(fmt.Sprintf("%s, %d KiB per s, %d times", x.end, x.kib, x.resets), func(t *testing.T) {
			t.Parallel()
			srv := streamtest.Run(t)
			producer, consumer := srv.URL(), srv.URL()
			var proxies []*streamtest.Proxy
			line := func(url *string) {
				p := streamtest.RunProxy(t, *url)
				proxies, *url = append(proxies, p), p.URL()
			}
			if x.end != "consumer" {
				line(&producer)
			}
			if x.end != "producer" {
				line(&consumer)
			}
			x.run(t, newPassing(t, producer, consumer, nil), proxies)
		})
	}
}

type idleTest struct {
	end                  string // with the slow line
	kib, resets, streams int
}

func (test idleTest) run(t *testing.T, x *passing, lines []*streamtest.Proxy) {
	n := test.streams
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	streams := make([]*stream.Stream, n)
	each := func(f func(i int) error) {
		var all sync.WaitGroup
		defer all.Wait()
		for k := range 64 {
			all.Go(func() {
				for i := k; i < n; i += 64 {
					if err := f(i); err != nil {
						t.Errorf("stream %d: %v", i, err)
					}
				}
			})
		}
	}
	exchange := func(i int) error {
		if _, err := streams[i].Write([]byte("x")); err != nil {
			return err
		}
		_, err := streams[i].Recv()
		return err
	}
	each(func(i int) (err error) {
		if streams[i], err = x.client.Open(ctx, "echo", nil); err == nil {
			err = exchange(i)
		}
		return err
	})
	defer each(func(i int) error { return streams[i].Close() })
	if t.Failed() {
		return
	}
	for _, line := range lines {
		line.Throttle(streamtest.Both, test.kib<<10)
	}
	for range test.resets {
		for _, line := range lines {
			line.Reset()
		}
		time.Sleep(12 * time.Second) // silent peers are given up before
	}
	if a, b := x.client.Stats().Streams, x.server.Stats().Streams; a != n || b != n {
		t.Errorf("%d and %d of %d streams are left", a, b, n)
	}
	each(exchange)
}
