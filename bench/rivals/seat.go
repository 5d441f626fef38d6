package main

import (
	"fmt"
	"slices"
	"time"
)

// bounds end a measurement of a rival that stands still. No sound rival comes near them.
type bounds struct {
	open  time.Duration // to open the streams of a session
	close time.Duration // to end them
	all   time.Duration // for everything in one cell
	run   limits
}

const (
	openLimit  = time.Minute
	closeLimit = 15 * time.Second
	runLimit   = 5 * time.Second // to send the records of a run, beyond twice the time planned for it
	patience   = 5 * time.Second // without any record, or for an answer
	tail       = time.Second     // without any record after the last was sent, for a rival that loses records
	// maxFailures is how often a rival may fail in a cell before it is left out of the rest of the cell.
	maxFailures = 3
)

// limitsOf returns the limits of a run that is planned for d.
func limitsOf(d time.Duration) limits {
	return limits{sending: 2*d + runLimit, patience: patience, tail: tail}
}

// boundsOf returns the bounds of a rival. Each of its runs is planned to take the time each, and the whole rival the
// time all.
func boundsOf(each, all time.Duration) bounds {
	return bounds{open: openLimit, close: closeLimit, all: openLimit + 3*all, run: limitsOf(each)}
}

// within returns the result of f, or an error if f takes longer than d. late disposes of a value that comes after that,
// which may be zero.
func within[T any](d time.Duration, what string, f func() (T, error), late func(T)) (T, error) {
	type result struct {
		value T
		err   error
	}
	results := make(chan result, 1)
	go func() {
		value, err := f()
		results <- result{value, err}
	}()
	limit := time.NewTimer(d)
	defer limit.Stop()
	select {
	case r := <-results:
		return r.value, r.err
	case <-limit.C:
		go func() { late((<-results).value) }()
		var none T
		return none, fmt.Errorf("%s took longer than %v", what, d)
	}
}

// closeWithin calls closer, if there is one, and waits for its end no longer than d.
func closeWithin(d time.Duration, closer func()) error {
	if closer == nil {
		return nil
	}
	_, err := within(d, "to close", func() (struct{}, error) { closer(); return struct{}{}, nil }, func(struct{}) {})
	return err
}

// A seat is the place of one rival in a cell. It replaces a session that cannot go on.
type seat struct {
	rival         rival
	env           *env
	size, streams int
	mode          mode
	bounds        bounds
	warmUp        func(*session) error

	session  *session
	warm     bool
	left     time.Duration // the time that the rival may still use in this cell
	failures int
	done     int // runs
	notes    []string
}

func newSeat(e *env, r rival, size, streams int, m mode, b bounds, warmUp func(*session) error) *seat {
	s := &seat{rival: r, env: e.fresh(), size: size, streams: streams, mode: m, bounds: b, left: b.all, warmUp: warmUp}
	if r.maxStreams != 0 && streams > r.maxStreams {
		s.failures = maxFailures
		s.note(fmt.Sprintf("not measured with more than %d", r.maxStreams))
	}
	return s
}

func (s *seat) note(text string) {
	if !slices.Contains(s.notes, text) {
		s.notes = append(s.notes, text)
	}
}

// over reports whether the rival is left out of the rest of the cell.
func (s *seat) over() bool { return s.failures >= maxFailures }

// open opens a session if there is none. It warms up the first one that is sound.
func (s *seat) open() error {
	if s.session != nil {
		return nil
	}
	opened, err := within(s.bounds.open, "to open the streams", func() (*session, error) {
		return newSession(s.env, s.rival, s.size, s.streams, s.mode)
	}, func(late *session) {
		if late != nil {
			late.close()
		}
	})
	if err != nil {
		return err
	}
	s.session = opened
	if !s.warm {
		err = s.warmUp(opened)
		s.warm = err == nil
	}
	return err
}

// prepare opens a session for the next run. It reports whether the rival is still in the cell.
func (s *seat) prepare() bool {
	if s.left < 0 && !s.over() {
		s.failures = maxFailures
		s.note(fmt.Sprintf("stopped after %d runs, because it takes too long", s.done))
		s.close()
	}
	for !s.over() {
		from := time.Now()
		err := s.open()
		if err == nil && s.session.spent() {
			s.close() // it lost records
			err = s.open()
		}
		s.left -= time.Since(from)
		if err == nil {
			return true
		}
		s.fail(err)
	}
	return false
}

// run calls f with a session, unless the rival is out of the cell. It reports whether f was called and had no error.
func (s *seat) run(f func(*session) error) bool {
	if !s.prepare() {
		return false
	}
	from := time.Now()
	err := f(s.session)
	s.left -= time.Since(from)
	if err != nil {
		s.fail(err)
		return false
	}
	s.done++
	return true
}

func (s *seat) fail(err error) {
	s.failures++
	s.note(err.Error())
	s.close()
}

// close ends the session, if there is one, and notes its errors.
func (s *seat) close() {
	if s.session != nil {
		if broke := s.session.broke.Load(); broke != nil {
			s.note("a stream broke off: " + (*broke).Error())
		}
		if err := closeWithin(s.bounds.close, s.session.close); err != nil {
			s.note(err.Error())
		}
		s.session = nil
	}
	if err := s.env.err(); err != nil {
		s.note(err.Error())
	}
}
