package e2e

import "sync"

// Many slow streams: each sends a record now and then. They are visited in
// turn, and at most slowWindow records are in flight, fewer than there are
// streams, so that no stream ever has two records to share a message.

const slowWindow = 1000

// SlowImpls are the ways to send now and then on many streams. The floor is
// plain NATS with a single subject for all records, whatever cfg.Streams says;
// the implementation nats-subjects has a subject and a subscription per stream.
func SlowImpls() []Impl {
	return []Impl{
		{Name: "stream", Open: openSlowStream},
		{Name: "nats", Open: func(env *Env, cfg Config) (Session, error) {
			cfg.Streams = 1
			return newNATSSession(env, cfg, slowWindow)
		}},
		{Name: "nats-subjects", Open: func(env *Env, cfg Config) (Session, error) {
			return newNATSSession(env, cfg, slowWindow)
		}},
	}
}

type slowStreamSession struct {
	*streamSession
	win     *Window
	next    int
	results chan error
	stop    chan struct{}
	readers sync.WaitGroup
}

func openSlowStream(env *Env, cfg Config) (Session, error) {
	inner, err := newStreamSession(env, cfg)
	if err != nil {
		return nil, err
	}
	s := &slowStreamSession{
		streamSession: inner, win: NewWindow(slowWindow),
		results: make(chan error, 1+cfg.Streams), stop: make(chan struct{}),
	}
	for _, l := range s.lanes {
		s.readers.Go(func() {
			for {
				rec, err := l.stream.Recv()
				if err == nil && !l.check.ok(rec) {
					err = l.check.errorFor(rec)
				}
				if err != nil {
					s.results <- err
					return
				}
				s.win.Release(1)
			}
		})
	}
	return s, nil
}

func (s *slowStreamSession) Run(n int) error {
	go func() { s.results <- s.produce(n) }()
	if err := await(s.results, 1, n); err != nil {
		return err
	}
	return s.env.Err()
}

func (s *slowStreamSession) produce(n int) error {
	for range n {
		l := s.lanes[s.next]
		if s.next++; s.next == len(s.lanes) {
			s.next = 0
		}
		s.win.Acquire(s.stop)
		if err := l.produce(1); err != nil {
			return err
		}
	}
	s.win.Drain(s.stop)
	return nil
}

func (s *slowStreamSession) Close() {
	close(s.stop)
	s.streamSession.Close()
	s.readers.Wait()
}
