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
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"time"
)

// MinSize is the smallest record: room for its number and its stream's.
const MinSize = 16

// Config is one cell of the matrix.
type Config struct {
	Size    int // bytes per record, at least MinSize
	Streams int // streams the records are divided over
}

// String names the cell in the form that benchstat parses.
func (c Config) String() string { return fmt.Sprintf("size=%d/streams=%d", c.Size, c.Streams) }

// Matrix returns every cell that is measured end to end.
func Matrix() []Config {
	var cells []Config
	for _, streams := range []int{1, 100} {
		for _, size := range []int{16, 128, 1024, 16384} {
			cells = append(cells, Config{Size: size, Streams: streams})
		}
	}
	return cells
}

// Impl is one way to move records.
type Impl struct {
	Name string
	// Open opens streams to measure throughput, OpenPinger one stream to measure latency.
	Open       func(env *Env, cfg Config) (Session, error)
	OpenPinger func(env *Env, size int) (Pinger, error)
}

// Impls are the implementations that are compared, the library first.
func Impls() []Impl {
	return []Impl{
		{Name: "stream", Open: openStream, OpenPinger: openStreamPinger},
		{Name: "nats", Open: openNATS, OpenPinger: openNATSPinger},
		{Name: "tcp", Open: openTCP, OpenPinger: openTCPPinger},
		{Name: "original", Open: openOriginal, OpenPinger: openOriginalPinger},
	}
}

// PingImpls are the implementations that are compared one record at a time: in
// addition plain NATS with a receiver in the shape of Stream.Recv.
func PingImpls() []Impl {
	return append(Impls(), Impl{Name: "nats-sync", OpenPinger: openNATSSyncPinger})
}

// A Session holds open streams. It serves any number of runs, one at a time.
type Session interface {
	// Run sends n records, divided over the streams, and returns when the
	// consumer has counted and checked every one.
	Run(n int) error
	// Close ends the streams and their connections.
	Close()
}

// A Pinger sends one record at a time.
type Pinger interface {
	// Ping writes one record and returns when the consumer has it. The
	// consumer answers through a channel of this process.
	Ping() error
	Close()
}

// WarmUp makes a short unmeasured run: buffers are allocated, windows grow and
// the server's caches fill. It returns an estimate of the time per record.
func WarmUp(s Session, cfg Config) (time.Duration, error) {
	n := max(200, cfg.Streams*4)
	var per time.Duration
	for range 6 {
		start := time.Now()
		if err := s.Run(n); err != nil {
			return 0, err
		}
		took := time.Since(start)
		per = max(took/time.Duration(n), 1)
		if took > 40*time.Millisecond {
			break
		}
		n = min(n*4, int(50*time.Millisecond/per)+1)
	}
	return per, nil
}

// share returns how many of n records stream i of k carries.
func share(n, i, k int) int {
	if i < n%k {
		return n/k + 1
	}
	return n / k
}

// newRecord returns a record of stream i. The number is stamped for each send.
func newRecord(size, i int) []byte {
	rec := make([]byte, size)
	for j := range rec {
		rec[j] = byte('a' + j%26)
	}
	binary.LittleEndian.PutUint64(rec[8:], uint64(i))
	return rec
}

func stamp(rec []byte, seq uint64) { binary.LittleEndian.PutUint64(rec, seq) }

// checker verifies that the records of one stream come complete and in order.
type checker struct {
	size   int
	stream uint64
	next   uint64
}

func (c *checker) ok(rec []byte) bool {
	if len(rec) != c.size || binary.LittleEndian.Uint64(rec) != c.next || binary.LittleEndian.Uint64(rec[8:]) != c.stream {
		return false
	}
	c.next++
	return true
}

func (c *checker) errorFor(rec []byte) error {
	if len(rec) != c.size {
		return fmt.Errorf("stream %d: record %d has %d bytes, want %d", c.stream, c.next, len(rec), c.size)
	}
	return fmt.Errorf("stream %d: got record %d of stream %d, want record %d",
		c.stream, binary.LittleEndian.Uint64(rec), binary.LittleEndian.Uint64(rec[8:]), c.next)
}

// streamOf returns the number of the stream in a record.
func streamOf(rec []byte) uint64 { return binary.LittleEndian.Uint64(rec[8:]) }

var errStalled = errors.New("records missing: the run did not end in time")

// runLimit returns the time after which a run of n records counts as having lost one.
func runLimit(n int) time.Duration {
	return 30*time.Second + time.Duration(n)*100*time.Microsecond
}

// await collects the results of count goroutines that move n records.
func await(results <-chan error, count, n int) error {
	limit := time.NewTimer(runLimit(n))
	defer limit.Stop()
	for range count {
		select {
		case err := <-results:
			if err != nil {
				return err
			}
		case <-limit.C:
			return errStalled
		}
	}
	return nil
}

// Mallocs counts the allocations of the whole process.
func Mallocs() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.Mallocs
}

// Percentile returns the pth percentile of sorted durations, 0 if there are
// none.
func Percentile(sorted []time.Duration, p int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[min(len(sorted)-1, len(sorted)*p/100)]
}
