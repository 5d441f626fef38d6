package e2e

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/bench/original"
	"github.com/natsstream/stream/internal/load"
)

// The baseline: the original design, made to lose nothing. Its window counts
// encoded bytes, since base64 makes a record a third larger.

type originalSession struct {
	load.Pair
	d        load.Dialer
	receiver *original.Client
	sender   *original.Client
	cancel   context.CancelFunc
	stop     chan struct{}
	lanes    []*originalLane
}

type originalLane struct {
	results <-chan *original.Result
	writer  *original.Writer
	win     *load.Window
	rec     []byte
	sent    uint64
	check   load.Checker
}

func openOriginal(d load.Dialer, cfg load.Config) (load.Session, error) {
	return newOriginalSession(d, cfg)
}

func newOriginalSession(d load.Dialer, cfg load.Config) (_ *originalSession, err error) {
	conns, err := load.DialPair(d)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &originalSession{Pair: conns, d: d, cancel: cancel, stop: make(chan struct{})}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.receiver, err = original.NewClient(s.Consumer); err != nil {
		return nil, err
	}
	if err = s.receiver.SetPendingLimits(noPendingLimit, noPendingLimit); err != nil {
		return nil, err
	}
	if s.sender, err = original.NewClient(s.Producer); err != nil {
		return nil, err
	}
	type opened struct {
		i int
		w *original.Writer
	}
	writers := make(chan opened, cfg.Streams)
	subject := nats.NewInbox()
	if _, err = s.Producer.Subscribe(subject, func(m *nats.Msg) {
		i, _ := strconv.Atoi(string(m.Data))
		writers <- opened{i, original.NewWriter(s.sender, m.Reply)}
	}); err != nil {
		return nil, err
	}
	if err = s.Producer.Flush(); err != nil {
		return nil, err
	}
	for i := range cfg.Streams {
		l := &originalLane{
			rec:   load.NewRecord(cfg.Size, i),
			check: load.Checker{Size: cfg.Size, Stream: uint64(i)},
			win:   load.NewWindow(max(2, min(natsWindowRecords, natsWindowBytes*3/4/cfg.Size)/cfg.Streams)),
		}
		if l.results, err = s.receiver.OpenStream(ctx, subject, strconv.AppendInt(nil, int64(i), 10)); err != nil {
			return nil, err
		}
		s.lanes = append(s.lanes, l)
	}
	for range cfg.Streams {
		select {
		case o := <-writers:
			s.lanes[o.i].writer = o.w
		case <-time.After(10 * time.Second):
			return nil, errors.New("original: a request did not arrive")
		}
	}
	return s, nil
}

func (s *originalSession) Run(n int) error {
	results := make(chan error, 2*len(s.lanes))
	for i, l := range s.lanes {
		k := load.Share(n, i, len(s.lanes))
		go func() { results <- l.produce(k, s.stop) }()
		go func() { results <- l.consume(k) }()
	}
	if err := load.Await(results, 2*len(s.lanes), n); err != nil {
		return fmt.Errorf("original: %w", err)
	}
	return s.d.Err()
}

func (l *originalLane) produce(n int, stop <-chan struct{}) error {
	for range n {
		l.win.Acquire(stop)
		load.Stamp(l.rec, l.sent)
		l.sent++
		if _, err := l.writer.Write(l.rec); err != nil {
			return err
		}
	}
	return nil
}

func (l *originalLane) consume(n int) error {
	for range n {
		r, ok := <-l.results
		if !ok {
			return errors.New("stream ended early")
		}
		if r.Err != nil {
			return r.Err
		}
		if !l.check.OK(r.Value) {
			return l.check.ErrorFor(r.Value)
		}
		l.win.Release(1)
	}
	return nil
}

func (s *originalSession) Close() {
	close(s.stop)
	s.cancel()
	for _, l := range s.lanes {
		if l.writer != nil {
			_ = l.writer.Close() // wakes the reader, which then sees its end
		}
	}
	_ = s.Producer.Flush()
	_ = s.Consumer.Flush()
	s.Pair.Close()
}

type originalPinger struct {
	*originalSession
	pong chan error
}

func openOriginalPinger(d load.Dialer, size int) (load.Pinger, error) {
	s, err := newOriginalSession(d, load.Config{Size: size, Streams: 1})
	if err != nil {
		return nil, err
	}
	p := &originalPinger{originalSession: s, pong: make(chan error, 1)}
	go func() {
		l := p.lanes[0]
		for r := range l.results {
			err := r.Err
			if err == nil && !l.check.OK(r.Value) {
				err = l.check.ErrorFor(r.Value)
			}
			p.pong <- err
		}
	}()
	return p, nil
}

func (p *originalPinger) Ping() error {
	l := p.lanes[0]
	load.Stamp(l.rec, l.sent)
	l.sent++
	if _, err := l.writer.Write(l.rec); err != nil {
		return err
	}
	return <-p.pong
}
