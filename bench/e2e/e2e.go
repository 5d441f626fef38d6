// Package e2e moves records from a producer to a consumer in several ways, so
// that their speed can be compared in one process and one run. The benchmarks
// of package bench and the program bench/table share it.
//
// Producer and consumer have a connection each; between them is an embedded
// nats-server on loopback TCP. Every record carries its number and that of its
// stream, and the consumer checks both: a run that lost, repeated or reordered
// a record is an error, not a fast run.
package e2e

import (
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/fastconn"
	"github.com/natsstream/stream/internal/load"
)

// Matrix returns every cell that is measured end to end.
func Matrix() []load.Config {
	var cells []load.Config
	for _, streams := range []int{1, 100} {
		for _, size := range []int{16, 128, 1024, 16384} {
			cells = append(cells, load.Config{Size: size, Streams: streams})
		}
	}
	return cells
}

// Impl is one way to move records.
type Impl struct {
	Name string
	// Open opens streams to measure throughput, OpenPinger one stream to measure latency.
	Open       func(d load.Dialer, cfg load.Config) (load.Session, error)
	OpenPinger func(d load.Dialer, size int) (load.Pinger, error)
}

// Impls are the implementations that are compared, the library first.
func Impls() []Impl {
	return []Impl{
		{Name: "stream", Open: load.OpenSession, OpenPinger: load.OpenPinger},
		{Name: "fast", Open: overFast(load.OpenSession), OpenPinger: overFast(load.OpenPinger)},
		{Name: "nats", Open: openNATS, OpenPinger: openNATSPinger},
		{Name: "tcp", Open: openTCP, OpenPinger: openTCPPinger},
		{Name: "original", Open: openOriginal, OpenPinger: openOriginalPinger},
	}
}

// overFast opens streams over fast connections.
func overFast[P, T any](open func(load.Dialer, P) (T, error)) func(load.Dialer, P) (T, error) {
	return func(d load.Dialer, p P) (T, error) { return open(fastDialer{d.(*Env)}, p) }
}

type fastDialer struct{ *Env }

func (d fastDialer) Dial() (*nats.Conn, error) { return d.dial(fastconn.Enable()) }

// PingImpls are the implementations that are compared one record at a time: in
// addition plain NATS with a receiver in the shape of Stream.Recv.
func PingImpls() []Impl {
	return append(Impls(), Impl{Name: "nats-sync", OpenPinger: openNATSSyncPinger})
}
