// Package load moves numbered records from a producer to a consumer of the library, and checks each of them. The
// benchmarks of package streambench and of the folder bench share it. A run that lost, repeated or reordered a record
// is an error, not a fast run. The goroutine of a benchmark runs it, with goroutines of its own for the two ends of
// each stream.
package load

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/nats-io/nats.go"
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

// A Dialer connects to the NATS server of a measurement.
type Dialer interface {
	// Dial makes a connection, which belongs to the caller.
	Dial() (*nats.Conn, error)
	// Subject returns a request subject that nobody uses.
	Subject() string
	// Err returns the first asynchronous error of one of the connections, which makes a run worthless.
	Err() error
}

// Pair is a producer's and a consumer's connection.
type Pair struct{ Producer, Consumer *nats.Conn }

// DialPair makes two connections.
func DialPair(d Dialer) (Pair, error) {
	p, err := d.Dial()
	if err != nil {
		return Pair{}, err
	}
	c, err := d.Dial()
	if err != nil {
		p.Close()
		return Pair{}, err
	}
	return Pair{Producer: p, Consumer: c}, nil
}

// Close closes both connections.
func (p Pair) Close() {
	p.Producer.Close()
	p.Consumer.Close()
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

// Share returns how many of n records stream i of k carries.
func Share(n, i, k int) int {
	if i < n%k {
		return n/k + 1
	}
	return n / k
}

// NewRecord returns a record of stream i. The number is stamped for each send.
func NewRecord(size, i int) []byte {
	rec := make([]byte, size)
	for j := range rec {
		rec[j] = byte('a' + j%26)
	}
	binary.LittleEndian.PutUint64(rec[8:], uint64(i))
	return rec
}

// Stamp writes the number of a record into it.
func Stamp(rec []byte, seq uint64) { binary.LittleEndian.PutUint64(rec, seq) }

// Checker verifies that the records of one stream come complete and in order.
type Checker struct {
	Size   int
	Stream uint64
	Next   uint64 // number of the record to come
}

// OK reports whether rec is the next record of the stream, whole.
func (c *Checker) OK(rec []byte) bool {
	if len(rec) != c.Size || binary.LittleEndian.Uint64(rec) != c.Next || binary.LittleEndian.Uint64(rec[8:]) != c.Stream {
		return false
	}
	c.Next++
	return true
}

// ErrorFor returns the error of a record that is not OK.
func (c *Checker) ErrorFor(rec []byte) error {
	if len(rec) != c.Size {
		return fmt.Errorf("stream %d: record %d has %d bytes, want %d", c.Stream, c.Next, len(rec), c.Size)
	}
	return fmt.Errorf("stream %d: got record %d of stream %d, want record %d",
		c.Stream, binary.LittleEndian.Uint64(rec), binary.LittleEndian.Uint64(rec[8:]), c.Next)
}

// StreamOf returns the number of the stream in a record.
func StreamOf(rec []byte) uint64 { return binary.LittleEndian.Uint64(rec[8:]) }

var errStalled = errors.New("records missing: the run did not end in time")

// runLimit returns the time after which a run of n records counts as having lost one.
func runLimit(n int) time.Duration {
	return 30*time.Second + time.Duration(n)*100*time.Microsecond
}

// Await collects the results of count goroutines that move n records.
func Await(results <-chan error, count, n int) error {
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
