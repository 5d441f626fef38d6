package e2e

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/nats-io/nats.go"
	"github.com/natsstream/stream/internal/load"
)

// The floor: NATS by itself, publish and subscribe with a subject and a
// subscription per stream, as fast as it gets. One goroutine publishes for all
// streams, which measured as fast as one per stream or faster. The subscriber
// counts in its callback, the cheapest way to receive. Nothing but the window
// bounds the publisher; its size was chosen for speed.

const (
	natsWindowBytes   = 2 << 20
	natsWindowRecords = 8 << 10
)

// noPendingLimit lifts nats.go's limit on the pending messages of a subscription.
const noPendingLimit = -1

type natsSession struct {
	load.Pair
	d       load.Dialer
	win     *load.Window
	lanes   []*natsLane
	results chan error
	stop    chan struct{}
}

type natsLane struct {
	s       *natsSession
	subject string
	rec     []byte
	sent    uint64

	target atomic.Uint64 // number of the run's last record plus one
	batch  uint64
	taken  uint64 // the part of check.Next that was released to the window
	check  load.Checker
	broken bool
}

func openNATS(d load.Dialer, cfg load.Config) (load.Session, error) {
	return newNATSSession(d, cfg, min(natsWindowRecords, natsWindowBytes/cfg.Size))
}

// newNATSSession has at most limit records in flight.
func newNATSSession(d load.Dialer, cfg load.Config, limit int) (load.Session, error) {
	conns, err := load.DialPair(d)
	if err != nil {
		return nil, err
	}
	s := &natsSession{
		Pair: conns, d: d, win: load.NewWindow(limit),
		results: make(chan error, 2*cfg.Streams+1), stop: make(chan struct{}),
	}
	// Progress is told once per batch: an eighth of the window at most waits
	// untold in all lanes together.
	batch := uint64(min(64, max(1, limit/8/cfg.Streams)))
	for i := range cfg.Streams {
		l := &natsLane{
			s: s, subject: fmt.Sprintf("%s.%d", nats.NewInbox(), i), rec: load.NewRecord(cfg.Size, i),
			batch: batch, check: load.Checker{Size: cfg.Size, Stream: uint64(i)},
		}
		sub, err := s.Consumer.Subscribe(l.subject, l.onMessage)
		if err == nil {
			err = sub.SetPendingLimits(noPendingLimit, noPendingLimit)
		}
		if err != nil {
			s.Close()
			return nil, err
		}
		s.lanes = append(s.lanes, l)
	}
	if err := s.Consumer.Flush(); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (l *natsLane) onMessage(m *nats.Msg) {
	if !l.check.OK(m.Data) {
		if !l.broken {
			l.broken = true
			l.s.results <- l.check.ErrorFor(m.Data)
		}
		return
	}
	n := l.check.Next
	end := n == l.target.Load()
	if n-l.taken >= l.batch || end {
		l.s.win.Release(int64(n - l.taken))
		l.taken = n
	}
	if end {
		l.s.results <- nil
	}
}

func (s *natsSession) Run(n int) error {
	busy := 0
	for i, l := range s.lanes {
		if k := load.Share(n, i, len(s.lanes)); k > 0 {
			busy++
			l.target.Store(l.sent + uint64(k))
		}
	}
	go func() { s.results <- s.produce(n) }()
	if err := load.Await(s.results, busy+1, n); err != nil {
		return err
	}
	return s.d.Err()
}

func (s *natsSession) produce(n int) error {
	i := 0
	for range n {
		l := s.lanes[i]
		s.win.Acquire(s.stop)
		load.Stamp(l.rec, l.sent)
		l.sent++
		if err := s.Producer.Publish(l.subject, l.rec); err != nil {
			return err
		}
		if i++; i == len(s.lanes) {
			i = 0
		}
	}
	return nil
}

func (s *natsSession) Close() {
	close(s.stop)
	s.Pair.Close()
}

type natsPinger struct {
	load.Pair
	subject string
	rec     []byte
	seq     uint64
	pong    chan error
}

func openNATSPinger(d load.Dialer, size int) (load.Pinger, error) {
	conns, err := load.DialPair(d)
	if err != nil {
		return nil, err
	}
	p := &natsPinger{Pair: conns, subject: nats.NewInbox(), rec: load.NewRecord(size, 0), pong: make(chan error, 1)}
	c := load.Checker{Size: size}
	_, err = p.Consumer.Subscribe(p.subject, func(m *nats.Msg) {
		if !c.OK(m.Data) {
			p.pong <- c.ErrorFor(m.Data)
			return
		}
		p.pong <- nil
	})
	if err == nil {
		err = p.Consumer.Flush()
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func (p *natsPinger) Ping() error {
	load.Stamp(p.rec, p.seq)
	p.seq++
	if err := p.Producer.Publish(p.subject, p.rec); err != nil {
		return err
	}
	return <-p.pong
}

// natsSyncPinger receives in the shape of Stream.Recv: a goroutine that asks
// for the next message. It costs a switch more than a callback.
type natsSyncPinger struct{ *natsPinger }

func openNATSSyncPinger(d load.Dialer, size int) (load.Pinger, error) {
	conns, err := load.DialPair(d)
	if err != nil {
		return nil, err
	}
	p := &natsPinger{Pair: conns, subject: nats.NewInbox(), rec: load.NewRecord(size, 0), pong: make(chan error, 1)}
	sub, err := p.Consumer.SubscribeSync(p.subject)
	if err == nil {
		err = p.Consumer.Flush()
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	go func() {
		c := load.Checker{Size: size}
		for {
			m, err := sub.NextMsgWithContext(context.Background())
			if err != nil {
				return // closed
			}
			if !c.OK(m.Data) {
				err = c.ErrorFor(m.Data)
			}
			p.pong <- err
		}
	}()
	return natsSyncPinger{p}, nil
}
