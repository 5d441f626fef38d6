// Package streambench measures the library against your own NATS server, in the form that benchstat reads. Put it into
// a test of your own module, and track its figures as those of any other benchmark:
//
//	func BenchmarkStream(b *testing.B) {
//		streambench.Run(b, streambench.Params{URL: os.Getenv("NATS_URL")})
//	}
//
//	go test -run '^$' -bench Stream -count 10 | tee new.txt && benchstat old.txt new.txt
//
// These benchmarks run, each below the name of yours:
//
//   - Records/size=S/streams=N: the time per record of S bytes, divided over N streams.
//   - Slow/size=S/streams=N: the same, if no stream has two records at hand that could share a packet.
//   - Latency/size=S: one record at a time, from before Write until its reader has it.
//   - Open/size=S: a stream is opened, carries one record, and ends.
//   - Echo/size=S: a record travels to a handler and back over an open stream.
//
// The names and units are part of the API. If they change, the changelog of the release states it.
//
// Producer and consumer run in the process of the benchmark, with a connection each. Each record carries its number. A
// run in which a record was lost, repeated, cut or reordered fails. The units are ns/op (a record, or a stream for
// Open), MB/s (of records), cpu-ns/rec (processor time of this process), mallocs/rec (allocations of this process), and
// p50-ns and p99-ns (percentiles of the time per operation).
package streambench

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"

	"github.com/natsstream/stream/internal/load"
)

// MinSize is the smallest size of a record, in bytes. A record needs room for its number and that of its stream.
const MinSize = load.MinSize

// Params select the NATS server and the measurements. The zero value of each field selects the default that its comment
// names.
type Params struct {
	// URL is the address of the NATS server: nats.DefaultURL by default.
	URL string
	// Options are those of the two connections of a benchmark, for example credentials. streambench sets the error
	// handler, and fails a run in which a connection reports an error.
	Options []nats.Option
	// Subject is a prefix of the request subjects of the benchmarks, without a dot at its end: streambench by default.
	// The user needs permission to subscribe to Subject.> and to publish there, and the permissions that a consumer and
	// a producer need.
	Subject string
	// Sizes are the sizes of records in bytes, at least MinSize: 16, 128, 1024 and 16384 by default.
	Sizes []int
	// Streams are the numbers of streams that records are divided over: 1 and 100 by default.
	Streams []int
	// SlowStreams is the number of streams of the benchmark Slow, more than 1,000: 10,000 by default.
	SlowStreams int
}

// Run runs all benchmarks below b. It fails b if p is invalid or the NATS server cannot be reached.
func Run(b *testing.B, p Params) {
	b.Helper()
	d, err := p.dialer()
	if err != nil {
		b.Fatal(err)
	}
	b.Run("Records", func(b *testing.B) {
		for _, streams := range p.Streams {
			for _, size := range p.Sizes {
				session(b, d, load.Config{Size: size, Streams: streams}, load.OpenSession)
			}
		}
	})
	b.Run("Slow", func(b *testing.B) {
		for _, size := range p.Sizes {
			session(b, d, load.Config{Size: size, Streams: p.SlowStreams}, load.OpenSlow)
		}
	})
	for _, op := range []struct {
		name string
		open func(load.Dialer, int) (load.Pinger, error)
	}{{"Latency", load.OpenPinger}, {"Open", load.OpenOnce}, {"Echo", load.OpenEcho}} {
		b.Run(op.name, func(b *testing.B) {
			for _, size := range p.Sizes {
				load.BenchmarkPinger(b, fmt.Sprintf("size=%d", size), func() (load.Pinger, error) { return op.open(d, size) })
			}
		})
	}
}

func session(b *testing.B, d load.Dialer, cfg load.Config, open func(load.Dialer, load.Config) (load.Session, error)) {
	load.BenchmarkSession(b, cfg.String(), cfg, func() (load.Session, error) { return open(d, cfg) })
}

// dialer fills in the defaults of p, and checks it.
func (p *Params) dialer() (*dialer, error) {
	if p.URL == "" {
		p.URL = nats.DefaultURL
	}
	if p.Subject == "" {
		p.Subject = "streambench"
	}
	if p.Sizes == nil {
		p.Sizes = []int{16, 128, 1024, 16384}
	}
	if p.Streams == nil {
		p.Streams = []int{1, 100}
	}
	if p.SlowStreams == 0 {
		p.SlowStreams = 10 * load.SlowWindow
	}
	switch {
	case len(p.Sizes) > 0 && slices.Min(p.Sizes) < MinSize:
		return nil, fmt.Errorf("streambench: Params.Sizes has %d: a record needs at least %d bytes", slices.Min(p.Sizes), MinSize)
	case len(p.Streams) > 0 && slices.Min(p.Streams) < 1:
		return nil, fmt.Errorf("streambench: Params.Streams has %d: use at least one stream", slices.Min(p.Streams))
	case p.SlowStreams <= load.SlowWindow:
		return nil, fmt.Errorf("streambench: Params.SlowStreams is %d: use more than %d streams, the records on their way at once",
			p.SlowStreams, load.SlowWindow)
	}
	return &dialer{Params: *p}, nil
}

// dialer makes the connections of the benchmarks.
type dialer struct {
	Params
	failed atomic.Pointer[error] // first asynchronous error of any connection
}

func (d *dialer) Dial() (*nats.Conn, error) {
	options := append(slices.Clone(d.Options), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		err = fmt.Errorf("streambench: a connection reported: %w", err)
		d.failed.CompareAndSwap(nil, &err)
	}))
	nc, err := nats.Connect(d.URL, options...)
	if err != nil {
		return nil, fmt.Errorf("streambench: connecting to %s: %w: check Params.URL and Params.Options", d.URL, err)
	}
	if !nc.IsConnected() {
		nc.Close()
		return nil, errors.New("streambench: the NATS server cannot be reached: start it, or do not use nats.RetryOnFailedConnect")
	}
	return nc, nil
}

func (d *dialer) Subject() string { return d.Params.Subject + "." + nuid.Next() }

func (d *dialer) Err() error {
	if p := d.failed.Load(); p != nil {
		return *p
	}
	return nil
}
