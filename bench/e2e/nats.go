package e2e

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/nats-io/nats.go"
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
	pair
	env     *Env
	win     *Window
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
	taken  uint64 // the part of check.next that was released to the window
	check  checker
	broken bool
}

func openNATS(env *Env, cfg Config) (Session, error) {
	return newNATSSession(env, cfg, min(natsWindowRecords, natsWindowBytes/cfg.Size))
}

// newNATSSession has at most limit records in flight.
func newNATSSession(env *Env, cfg Config, limit int) (Session, error) {
	conns, err := env.dialPair()
	if err != nil {
		return nil, err
	}
	s := &natsSession{
		pair: conns, env: env, win: NewWindow(limit),
		results: make(chan error, 2*cfg.Streams+1), stop: make(chan struct{}),
	}
	// Progress is told once per batch: an eighth of the window at most waits
	// untold in all lanes together.
	batch := uint64(min(64, max(1, limit/8/cfg.Streams)))
	for i := range cfg.Streams {
		l := &natsLane{
			s: s, subject: fmt.Sprintf("%s.%d", nats.NewInbox(), i), rec: newRecord(cfg.Size, i),
			batch: batch, check: checker{size: cfg.Size, stream: uint64(i)},
		}
		sub, err := s.consumer.Subscribe(l.subject, l.onMessage)
		if err == nil {
			err = sub.SetPendingLimits(noPendingLimit, noPendingLimit)
		}
		if err != nil {
			s.Close()
			return nil, err
		}
		s.lanes = append(s.lanes, l)
	}
	if err := s.consumer.Flush(); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (l *natsLane) onMessage(m *nats.Msg) {
	if !l.check.ok(m.Data) {
		if !l.broken {
			l.broken = true
			l.s.results <- l.check.errorFor(m.Data)
		}
		return
	}
	n := l.check.next
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
		if k := share(n, i, len(s.lanes)); k > 0 {
			busy++
			l.target.Store(l.sent + uint64(k))
		}
	}
	go func() { s.results <- s.produce(n) }()
	if err := await(s.results, busy+1, n); err != nil {
		return err
	}
	return s.env.Err()
}

func (s *natsSession) produce(n int) error {
	i := 0
	for range n {
		l := s.lanes[i]
		s.win.Acquire(s.stop)
		stamp(l.rec, l.sent)
		l.sent++
		if err := s.producer.Publish(l.subject, l.rec); err != nil {
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
	s.pair.Close()
}

type natsPinger struct {
	pair
	subject string
	rec     []byte
	seq     uint64
	pong    chan error
}

func openNATSPinger(env *Env, size int) (Pinger, error) {
	conns, err := env.dialPair()
	if err != nil {
		return nil, err
	}
	p := &natsPinger{pair: conns, subject: nats.NewInbox(), rec: newRecord(size, 0), pong: make(chan error, 1)}
	c := checker{size: size}
	_, err = p.consumer.Subscribe(p.subject, func(m *nats.Msg) {
		if !c.ok(m.Data) {
			p.pong <- c.errorFor(m.Data)
			return
		}
		p.pong <- nil
	})
	if err == nil {
		err = p.consumer.Flush()
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func (p *natsPinger) Ping() error {
	stamp(p.rec, p.seq)
	p.seq++
	if err := p.producer.Publish(p.subject, p.rec); err != nil {
		return err
	}
	return <-p.pong
}

// natsSyncPinger receives in the shape of Stream.Recv: a goroutine that asks
// for the next message. It costs a switch more than a callback.
type natsSyncPinger struct{ *natsPinger }

func openNATSSyncPinger(env *Env, size int) (Pinger, error) {
	conns, err := env.dialPair()
	if err != nil {
		return nil, err
	}
	p := &natsPinger{pair: conns, subject: nats.NewInbox(), rec: newRecord(size, 0), pong: make(chan error, 1)}
	sub, err := p.consumer.SubscribeSync(p.subject)
	if err == nil {
		err = p.consumer.Flush()
	}
	if err != nil {
		p.Close()
		return nil, err
	}
	go func() {
		c := checker{size: size}
		for {
			m, err := sub.NextMsgWithContext(context.Background())
			if err != nil {
				return // closed
			}
			if !c.ok(m.Data) {
				err = c.errorFor(m.Data)
			}
			p.pong <- err
		}
	}()
	return natsSyncPinger{p}, nil
}
