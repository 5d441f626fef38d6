package load

import "sync"

// SlowWindow is how many records of slow streams are in flight at most. It is smaller than the number of streams, so
// that no stream ever has two records to share a packet.
const SlowWindow = 1000

type slowStreamSession struct {
	*streamSession
	win     *Window
	next    int
	results chan error
	stop    chan struct{}
	readers sync.WaitGroup
}

// OpenSlow opens streams that send one record each, in turn.
func OpenSlow(d Dialer, cfg Config) (Session, error) {
	inner, err := newSession(d, cfg)
	if err != nil {
		return nil, err
	}
	s := &slowStreamSession{
		streamSession: inner, win: NewWindow(SlowWindow),
		results: make(chan error, 1+cfg.Streams), stop: make(chan struct{}),
	}
	for _, l := range s.lanes {
		s.readers.Go(func() {
			for {
				rec, err := l.stream.Next()
				if err == nil && !l.check.OK(rec) {
					err = l.check.ErrorFor(rec)
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
	if err := Await(s.results, 1, n); err != nil {
		return err
	}
	return s.d.Err()
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
