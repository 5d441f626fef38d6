package faults

import (
	"context"
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
	bytes   int // in all
}

func (x lineTest) String() string {
	way := "down"
	if x.up {
		way = "up"
	}
	return fmt.Sprintf("%d KiB per s, %s, %d streams, records of %d", x.kib, way, x.streams, x.record)
}

// TestSlowLine streams over lines of many rates: everything arrives, and a quiet stream beside goes on.
func TestSlowLine(t *testing.T) {
	var tests []lineTest
	for _, up := range []bool{false, true} {
		tests = append(tests,
			lineTest{16, up, 1, 1000, 200 << 10},
			lineTest{128, up, 1, 1_000_000, 2_000_000},
			lineTest{256, up, 100, 1000, 3 << 20},
		)
		if runs(1, 2) == 1 {
			continue
		}
		for _, kib := range []int{16, 43, 128, 256, 1024, 10 << 10} {
			for _, streams := range []int{1, 100} {
				for _, record := range []int{100, 1_000_000} {
					bytes := max(kib<<10*20, streams*record) // 20 s, or as long as one record of each stream takes
					if bytes < kib<<10*240 {
						tests = append(tests, lineTest{kib, up, streams, record, bytes})
					}
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
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	quiet, err := client.Open(ctx, "quiet", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer quiet.Close()
	var bulk sync.WaitGroup
	for range x.streams {
		bulk.Go(func() {
			if err := x.one(ctx, client, records, send, count); err != nil {
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
			// What queues on the line, and a turn of nobody else, is what an echo waits for.
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
