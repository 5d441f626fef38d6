package bench

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/natsstream/stream/bench/e2e"
	"github.com/natsstream/stream/internal/load"
)

var env *e2e.Env

func TestMain(m *testing.M) {
	var err error
	if env, err = e2e.NewEnv(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	env.Close()
	os.Exit(code)
}

// TestEndToEnd proves that every implementation delivers every record, several
// runs in a row, before anyone believes its speed.
func TestEndToEnd(t *testing.T) {
	runs := []int{1, 99, 5000}
	if testing.Short() {
		runs = []int{1, 99, 500}
	}
	for _, impl := range e2e.Impls() {
		for _, cfg := range e2e.Matrix() {
			t.Run(fmt.Sprintf("impl=%s/%v", impl.Name, cfg), func(t *testing.T) {
				s, err := impl.Open(env, cfg)
				if err != nil {
					t.Fatal(err)
				}
				defer s.Close()
				for _, n := range runs {
					if err := s.Run(n); err != nil {
						t.Fatalf("run of %d records: %v", n, err)
					}
				}
			})
		}
	}
}

// TestPing proves the same for what is measured one by one.
func TestPing(t *testing.T) {
	for what, impls := range map[string][]e2e.Impl{"record": e2e.PingImpls(), "open": e2e.OpenImpls(), "echo": e2e.EchoImpls()} {
		for _, impl := range impls {
			t.Run(what+"/impl="+impl.Name, func(t *testing.T) {
				p, err := impl.OpenPinger(env, 128)
				if err != nil {
					t.Fatal(err)
				}
				defer p.Close()
				for range 100 {
					if err := p.Ping(); err != nil {
						t.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkEndToEnd(b *testing.B) {
	for _, impl := range e2e.Impls() {
		for _, cfg := range e2e.Matrix() {
			load.BenchmarkSession(b, fmt.Sprintf("impl=%s/%v", impl.Name, cfg), cfg, func() (load.Session, error) { return impl.Open(env, cfg) })
		}
	}
}

// BenchmarkSlowStreams has 10,000 streams that each send a record now and then,
// so that no two records can share a packet. Compare with impl=nats, which
// sends all records on one subject.
func BenchmarkSlowStreams(b *testing.B) {
	cfg := load.Config{Size: 128, Streams: 10_000}
	if testing.Short() {
		cfg.Streams = 1000
	}
	for _, impl := range e2e.SlowImpls() {
		load.BenchmarkSession(b, fmt.Sprintf("impl=%s/%v", impl.Name, cfg), cfg, func() (load.Session, error) { return impl.Open(env, cfg) })
	}
}

// BenchmarkLatency sends one record at a time: from before Write until the
// producer hears, through a channel of this process, that the consumer has it.
func BenchmarkLatency(b *testing.B) { benchmarkPings(b, e2e.PingImpls()) }

// BenchmarkOpen opens a stream that carries one record and closes, beside
// nats.Request.
func BenchmarkOpen(b *testing.B) { benchmarkPings(b, e2e.OpenImpls()) }

// BenchmarkEcho sends a record over a stream that is open in both directions
// and waits for it to come back, beside nats.Request.
func BenchmarkEcho(b *testing.B) { benchmarkPings(b, e2e.EchoImpls()) }

func benchmarkPings(b *testing.B, impls []e2e.Impl) {
	const size = 128
	for _, impl := range impls {
		load.BenchmarkPinger(b, fmt.Sprintf("impl=%s/size=%d", impl.Name, size), func() (load.Pinger, error) {
			return impl.OpenPinger(env, size)
		})
	}
}

// BenchmarkIdle measures the memory of open streams on which nothing happens.
// An operation is the opening, measuring and closing of all of them.
func BenchmarkIdle(b *testing.B) {
	streams := 100_000
	if testing.Short() {
		streams = 10_000
	}
	b.Run(fmt.Sprintf("impl=stream/streams=%d", streams), func(b *testing.B) {
		var sum e2e.IdleCost
		for range b.N {
			cost, err := e2e.Idle(env, streams)
			if err != nil {
				b.Fatal(err)
			}
			sum.HeapBytes += cost.HeapBytes
			sum.StackBytes += cost.StackBytes
			sum.Goroutines += cost.Goroutines
			sum.OpenTime += cost.OpenTime
		}
		n := float64(b.N)
		b.ReportMetric(sum.HeapBytes/n, "heap-B/stream")
		b.ReportMetric(sum.StackBytes/n, "stack-B/stream")
		b.ReportMetric(sum.Bytes()/n, "B/stream")
		b.ReportMetric(sum.Goroutines/n, "goroutines/stream")
		b.ReportMetric(float64(sum.OpenTime)/n, "open-ns/stream")
	})
}

// BenchmarkKeepAlive measures the processor time that idle streams take, so that each end knows that the other lives.
// An operation takes about 25 s.
func BenchmarkKeepAlive(b *testing.B) {
	streams, d := 100_000, 15*time.Second
	if testing.Short() {
		streams, d = 1000, time.Second
	}
	b.Run(fmt.Sprintf("impl=stream/streams=%d", streams), func(b *testing.B) {
		sum := 0.0
		for range b.N {
			cost, err := e2e.KeepAlive(env, streams, d)
			if err != nil {
				b.Fatal(err)
			}
			sum += cost
		}
		b.ReportMetric(100*sum/float64(b.N), "core-%")
	})
}
