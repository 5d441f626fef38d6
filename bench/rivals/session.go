package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/natsstream/stream/internal/load"
)

// A record begins with its number, the number of its stream, and, if it has room for that, the time at which it was
// due.
const (
	minSize   = 16
	timedSize = 24
)

func streamOf(rec []byte) uint64 { return binary.LittleEndian.Uint64(rec[8:]) }

const (
	// windowBytes and windowRecords bound the records of a rival without flow control that are on their way.
	windowBytes   = 2 << 20
	windowRecords = 8 << 10
	// slowWindow bounds the records on their way if each stream sends now and then. It is smaller than the number of
	// streams: no stream ever has two records that could share a packet.
	slowWindow = 1000
)

// A mode says how the streams of a session send.
type mode uint8

const (
	together mode = iota // each as fast as it can
	inTurn               // now and then, one after the other
	atPace               // when their records are due
)

// A session holds the open streams of a rival. It serves one run at a time.
type session struct {
	rival  rival
	lanes  []*endpoints
	window *load.Window
	mode   mode
	closer func()

	arrived  atomic.Int64 // records, and records that are known to be lost
	lost     atomic.Int64
	failed   chan error
	halted   chan struct{} // closed when nothing more is to be sent
	stopping atomic.Bool   // the same
	closing  atomic.Bool
	receives sync.WaitGroup
	samples  atomic.Pointer[samples] // of the paced run that is under way
	broke    atomic.Pointer[error]   // the reason for which a stream of a lossy rival ended
}

// endpoints are the two ends of one stream.
type endpoints struct {
	lane
	session *session
	rec     []byte
	sent    int64  // the sending goroutine's until all have ended
	next    uint64 // the number of the record that is expected next; the receiving goroutine's alone
	stream  uint64
	start   time.Time
}

// newSession opens streams for records of size bytes.
func newSession(e *env, r rival, size, streams int, m mode) (*session, error) {
	lanes, closer, err := r.open(e, streams)
	if err != nil {
		return nil, err
	}
	s := &session{rival: r, closer: closer, mode: m, failed: make(chan error, streams+1), halted: make(chan struct{})}
	switch {
	case m == atPace: // the pace bounds the records on their way
	case m == inTurn:
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
		s.receives.Go(func() { s.ended(p.receive(p.take)) })
	}
	return s, nil
}

// ended takes note that a reader returned. Before the session closes, its stream broke off: the records that a lossy
// rival still sends on it are lost, and for any other rival that is an error.
func (s *session) ended(err error) {
	if s.closing.Load() {
		return
	}
	if err == nil {
		err = errors.New("a stream ended by itself")
	}
	if s.rival.lossy {
		s.broke.CompareAndSwap(nil, &err)
		return
	}
	s.fail(err)
}

func (s *session) fail(err error) {
	select {
	case s.failed <- err:
	default:
	}
}

// halt ends the sending. The session cannot go on after it.
func (s *session) halt() {
	if s.stopping.CompareAndSwap(false, true) {
		close(s.halted)
	}
}

// close ends the streams and waits for their readers.
func (s *session) close() {
	s.closing.Store(true)
	s.halt()
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
		s.window.Release(int64(missed) + 1)
	}
}

// due stamps the next record with the time at which it is due.
func (p *endpoints) due(at time.Time) {
	binary.LittleEndian.PutUint64(p.rec[16:], uint64(at.Sub(p.start)))
}

// errHalted is the error of a producer after its session was halted.
var errHalted = errors.New("halted")

// produce sends the next record of the stream.
func (p *endpoints) produce() error {
	if w := p.session.window; w != nil {
		w.Acquire(p.session.halted)
	}
	if p.session.stopping.Load() {
		return errHalted
	}
	binary.LittleEndian.PutUint64(p.rec, uint64(p.sent))
	p.sent++
	return p.send(p.rec)
}

// A run counts the records of one run.
type run struct {
	sent, lost int
	took       time.Duration // until the last record arrived
}

func (r run) arrived() int { return r.sent - r.lost }

// run sends n records, divided over the streams, and returns when all have arrived, or are known to be lost.
func (s *session) run(n int, l limits) (run, error) {
	return s.watch(l, func(producers *sync.WaitGroup) {
		if s.mode == inTurn || s.rival.shared {
			producers.Go(func() { s.stopped(s.produceInTurn(n)) })
			return
		}
		for i, p := range s.lanes {
			k := n / len(s.lanes)
			if i < n%len(s.lanes) {
				k++
			}
			producers.Go(func() { s.stopped(p.produceAll(k)) })
		}
	})
}

// stopped takes note of the error of a producer.
func (s *session) stopped(err error) {
	if err != nil && !errors.Is(err, errHalted) {
		s.fail(err)
	}
}

func (p *endpoints) produceAll(n int) error {
	for range n {
		if err := p.produce(); err != nil {
			return errors.Join(err, p.flush())
		}
	}
	return p.flush()
}

func (s *session) produceInTurn(n int) error {
	for i := range n {
		p := s.lanes[i%len(s.lanes)]
		err := p.produce()
		if err != nil || s.mode == inTurn || i == n-1 {
			err = errors.Join(err, p.flush())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// limits bound a run.
type limits struct {
	// sending is the time after which the producer sends no more. The run consists of the records sent until then.
	sending time.Duration
	// patience is the time without any record after which a run stands still.
	patience time.Duration
	// tail is the same for a rival that loses records, from the time at which all have been sent.
	tail time.Duration
}

func (l limits) longest() time.Duration { return 2*l.sending + 2*l.patience }

// watch starts the producers, and returns when all of their records have arrived, or are known to be lost. The session
// is halted afterwards if it cannot go on.
func (s *session) watch(l limits, start func(producers *sync.WaitGroup)) (run, error) {
	var producers sync.WaitGroup
	arrived, lost, sent := s.arrived.Load(), s.lost.Load(), s.sent()
	began := time.Now()
	start(&producers)
	produced := make(chan struct{})
	go func() { producers.Wait(); close(produced) }()

	all := int64(math.MaxInt64) // the value of s.arrived at the end of the run, when it is known
	ending := produced
	seen, last, since := arrived, began, began // since: nothing has happened
	for pause := 20 * time.Microsecond; ; pause = min(2*pause, time.Millisecond) {
		if now := s.arrived.Load(); now != seen {
			last = time.Now()
			seen, since = now, last
		}
		if seen >= all {
			lost = s.lost.Load() - lost
			return run{sent: int(all - arrived), lost: int(lost), took: last.Sub(began)}, nil
		}
		select {
		case err := <-s.failed:
			s.halt()
			return run{}, err
		case <-ending:
			ending, since = nil, time.Now()
			all = arrived + s.sent() - sent
			continue
		case <-time.After(pause):
		}
		switch quiet, known := time.Since(since), all != math.MaxInt64; {
		case known && s.rival.lossy && quiet >= l.tail:
			// The records may still come, and would then count twice.
			s.halt()
			lost = s.lost.Load() - lost + all - seen
			return run{sent: int(all - arrived), lost: int(lost), took: last.Sub(began)}, nil
		case known && quiet >= l.patience:
			s.halt()
			return run{}, fmt.Errorf("%d of %d records are missing after %v without any", all-seen, all-arrived, l.patience)
		case quiet >= 2*l.patience || quiet >= l.patience && !s.rival.lossy:
			s.halt()
			return run{}, fmt.Errorf("the producer stands still: no record arrived for %v", l.patience)
		case quiet >= l.patience:
			s.halt() // records that are lost may have held the producer up
		case time.Since(began) >= l.longest():
			s.halt()
			return run{}, fmt.Errorf("%d records arrived within %v, not all", seen-arrived, l.longest())
		case time.Since(began) >= l.sending:
			s.halt()
		}
	}
}

// sent counts the records that were sent. No producer may run.
func (s *session) sent() (n int64) {
	for _, p := range s.lanes {
		n += p.sent
	}
	return n
}

// spent reports whether the session cannot serve another run.
func (s *session) spent() bool {
	return s.stopping.Load() || s.broke.Load() != nil
}

// errNothing says that a run has no figure.
var errNothing = errors.New("no record arrived")

// warmUp makes short runs that are not measured: buffers are allocated, windows grow, caches fill. It returns an
// estimate of the time per record.
func (s *session) warmUp(l limits) (time.Duration, error) {
	n := max(200, 4*len(s.lanes))
	var per time.Duration
	for range 6 {
		r, err := s.run(n, l)
		if err != nil {
			return 0, err
		}
		if r.arrived() == 0 {
			return 0, errNothing
		}
		per = max(r.took/time.Duration(r.arrived()), 1)
		if r.took > 40*time.Millisecond || s.spent() {
			break
		}
		n = min(4*n, int(50*time.Millisecond/per)+1)
	}
	return per, nil
}
