package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/natsstream/stream/internal/load"
)

// A record begins with its number, the number of its stream, and, if it has room for that, the time at which it was due.
const (
	minSize   = 16
	timedSize = 24
)

func streamOf(rec []byte) uint64 { return binary.LittleEndian.Uint64(rec[8:]) }

const (
	// windowBytes and windowRecords bound the records of a rival without flow control that are on their way.
	windowBytes   = 2 << 20
	windowRecords = 8 << 10
	// slowWindow bounds the records on their way if each stream sends now and then. It is smaller than the number of streams:
	// no stream ever has two records that could share a packet.
	slowWindow = 1000
	// patience is the time without any record after which the rest of a run counts as lost.
	patience = 5 * time.Second
	// lossyPatience is the same for a rival that loses records.
	lossyPatience = 300 * time.Millisecond
)

// A session holds the open streams of a rival. It serves one run at a time.
type session struct {
	rival  rival
	lanes  []*endpoints
	window *load.Window
	slow   bool
	closer func()

	arrived  atomic.Int64 // records, and records that are known to be lost
	lost     atomic.Int64
	failed   chan error
	stop     chan struct{} // closed when the session is closed
	receives sync.WaitGroup
	samples  atomic.Pointer[samples] // of the paced run that is under way
}

// endpoints are the two ends of one stream.
type endpoints struct {
	lane
	session *session
	rec     []byte
	sent    uint64
	next    uint64 // the number of the record that is expected next; the receiving goroutine's alone
	stream  uint64
	start   time.Time
}

// newSession opens streams for records of size bytes. slow: each stream sends now and then, and they take turns.
func newSession(e *env, r rival, size, streams int, slow bool) (*session, error) {
	lanes, closer, err := r.open(e, streams)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.name, err)
	}
	s := &session{rival: r, closer: closer, slow: slow, failed: make(chan error, streams+1), stop: make(chan struct{})}
	switch {
	case slow:
		s.window = load.NewWindow(slowWindow)
	case r.unbounded && !r.lossy:
		s.window = load.NewWindow(min(windowRecords, windowBytes/size))
	}
	start := time.Now()
	for i, l := range lanes {
		p := &endpoints{lane: l, session: s, rec: make([]byte, size), stream: uint64(i), start: start}
		for j := range p.rec {
			p.rec[j] = byte('a' + j%26)
		}
		binary.LittleEndian.PutUint64(p.rec[8:], p.stream)
		s.lanes = append(s.lanes, p)
	}
	for _, p := range s.lanes {
		s.receives.Go(func() {
			if err := p.receive(p.take); err != nil {
				s.fail(err)
			}
		})
	}
	return s, nil
}

func (s *session) fail(err error) {
	select {
	case s.failed <- fmt.Errorf("%s: %w", s.rival.name, err):
	default:
	}
}

// close ends the streams and waits for their readers.
func (s *session) close() {
	close(s.stop)
	s.closer()
	s.receives.Wait()
}

// take counts and checks a record.
func (p *endpoints) take(rec []byte) {
	s := p.session
	if len(rec) != len(p.rec) || streamOf(rec) != p.stream {
		s.fail(fmt.Errorf("stream %d: got %d bytes of stream %d, want %d bytes", p.stream, len(rec), streamOf(rec), len(p.rec)))
		return
	}
	number := binary.LittleEndian.Uint64(rec)
	missed := number - p.next
	if number < p.next || missed > 0 && !s.rival.lossy {
		s.fail(fmt.Errorf("stream %d: got record %d, want record %d", p.stream, number, p.next))
		return
	}
	p.next = number + 1
	if missed > 0 {
		s.lost.Add(int64(missed))
	}
	if x := s.samples.Load(); x != nil && len(rec) >= timedSize {
		due := time.Duration(binary.LittleEndian.Uint64(rec[16:]))
		if i := int(x.n.Add(1)) - 1; i < len(x.delays) {
			x.delays[i] = int64(time.Since(p.start) - due)
		}
	}
	s.arrived.Add(int64(missed) + 1)
	if s.window != nil {
		s.window.Release(1)
	}
}

// due stamps the next record with the time at which it is due.
func (p *endpoints) due(at time.Time) {
	binary.LittleEndian.PutUint64(p.rec[16:], uint64(at.Sub(p.start)))
}

// produce sends the next record of the stream.
func (p *endpoints) produce() error {
	if w := p.session.window; w != nil {
		w.Acquire(p.session.stop)
	}
	binary.LittleEndian.PutUint64(p.rec, p.sent)
	p.sent++
	return p.send(p.rec)
}

// run sends n records, divided over the streams, and returns how many of them were lost when the rest has arrived.
func (s *session) run(n int) (lost int, err error) {
	before, lostBefore := s.arrived.Load(), s.lost.Load()
	var producers sync.WaitGroup
	if s.slow || s.rival.shared {
		producers.Go(func() { s.produceInTurn(n) })
	} else {
		for i, p := range s.lanes {
			k := n / len(s.lanes)
			if i < n%len(s.lanes) {
				k++
			}
			producers.Go(func() {
				for range k {
					if err := p.produce(); err != nil {
						s.fail(err)
						return
					}
				}
				if err := p.flush(); err != nil {
					s.fail(err)
				}
			})
		}
	}
	return s.await(before+int64(n), lostBefore, &producers)
}

func (s *session) produceInTurn(n int) {
	for i := range n {
		p := s.lanes[i%len(s.lanes)]
		err := p.produce()
		if err == nil && (s.slow || i == n-1) {
			err = p.flush()
		}
		if err != nil {
			s.fail(err)
			return
		}
	}
}

// await returns when all records up to number target have arrived, or are known to be lost.
func (s *session) await(target, lostBefore int64, producers *sync.WaitGroup) (lost int, err error) {
	limit := patience
	if s.rival.lossy {
		limit = lossyPatience
	}
	produced := make(chan struct{})
	go func() { producers.Wait(); close(produced) }()
	seen, since := s.arrived.Load(), time.Now()
	for pause := 20 * time.Microsecond; s.arrived.Load() < target; pause = min(2*pause, time.Millisecond) {
		select {
		case err := <-s.failed:
			return 0, err
		case <-time.After(pause):
		}
		if now := s.arrived.Load(); now != seen {
			seen, since = now, time.Now()
		}
		if time.Since(since) < limit {
			continue
		}
		select {
		case <-produced:
		default:
			if !s.rival.lossy {
				return 0, fmt.Errorf("%s: the producer stands still", s.rival.name)
			}
			continue
		}
		if !s.rival.lossy {
			return 0, fmt.Errorf("%s: %d records are missing", s.rival.name, target-seen)
		}
		s.lost.Add(target - seen)
		s.arrived.Add(target - seen)
		// The records may still come, and would then count twice.
		return int(s.lost.Load() - lostBefore), errTail
	}
	<-produced
	return int(s.lost.Load() - lostBefore), nil
}

// errTail says that the last records of a run are lost, so that the session cannot go on.
var errTail = errors.New("the last records are missing")

// warmUp makes short runs that are not measured: buffers are allocated, windows grow, caches fill. It returns an estimate of
// the time per record.
func (s *session) warmUp() (time.Duration, error) {
	n := max(200, 4*len(s.lanes))
	var per time.Duration
	for range 6 {
		start := time.Now()
		if _, err := s.run(n); err != nil {
			return 0, err
		}
		took := time.Since(start)
		per = max(took/time.Duration(n), 1)
		if took > 40*time.Millisecond {
			break
		}
		n = min(4*n, int(50*time.Millisecond/per)+1)
	}
	return per, nil
}
