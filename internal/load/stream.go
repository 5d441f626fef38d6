package load

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// Run of streamSession has two goroutines for each stream, as a service would have: one calls Write, the other Next.
// Nothing but the library holds the producer back. Ping writes in the goroutine of its caller. Lanes have no lock.
type streamSession struct {
	Pair
	d        Dialer
	receiver *stream.Client
	sender   *stream.Client
	cancel   context.CancelFunc
	lanes    []*streamLane
}

type streamLane struct {
	stream *stream.Stream
	writer *stream.Writer
	rec    []byte
	sent   uint64
	check  Checker
}

// OpenSession opens streams to measure throughput.
func OpenSession(d Dialer, cfg Config) (Session, error) { return newSession(d, cfg) }

func newSession(d Dialer, cfg Config) (_ *streamSession, err error) {
	conns, err := DialPair(d)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &streamSession{Pair: conns, d: d, cancel: cancel}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.receiver, err = stream.NewClient(stream.ClientParams{Conn: conns.Consumer}); err != nil {
		return nil, err
	}
	if s.sender, err = stream.NewClient(stream.ClientParams{Conn: conns.Producer}); err != nil {
		return nil, err
	}
	type opened struct {
		i int
		w *stream.Writer
	}
	writers := make(chan opened, cfg.Streams)
	subject := d.Subject()
	if _, err = conns.Producer.Subscribe(subject, func(m *nats.Msg) {
		i, _ := strconv.Atoi(string(m.Data))
		writers <- opened{i, s.sender.NewWriter(m.Reply)}
	}); err != nil {
		return nil, err
	}
	if err = conns.Producer.Flush(); err != nil {
		return nil, err
	}
	for i := range cfg.Streams {
		l := &streamLane{
			rec:   NewRecord(cfg.Size, i),
			check: Checker{Size: cfg.Size, Stream: uint64(i)},
		}
		if l.stream, err = s.receiver.Open(ctx, subject, strconv.AppendInt(nil, int64(i), 10)); err != nil {
			return nil, err
		}
		s.lanes = append(s.lanes, l)
	}
	for range cfg.Streams {
		select {
		case o := <-writers:
			s.lanes[o.i].writer = o.w
		case <-time.After(10 * time.Second):
			return nil, errors.New("stream: a request did not arrive")
		}
	}
	return s, nil
}

func (s *streamSession) Run(n int) error {
	results := make(chan error, 2*len(s.lanes))
	for i, l := range s.lanes {
		k := Share(n, i, len(s.lanes))
		go func() { results <- l.produce(k) }()
		go func() { results <- l.consume(k) }()
	}
	if err := Await(results, 2*len(s.lanes), n); err != nil {
		return fmt.Errorf("stream: %w", err)
	}
	return s.d.Err()
}

func (l *streamLane) produce(n int) error {
	w, rec := l.writer, l.rec
	for range n {
		Stamp(rec, l.sent)
		l.sent++
		if _, err := w.Write(rec); err != nil {
			return err
		}
	}
	return nil
}

func (l *streamLane) consume(n int) error {
	s := l.stream
	for range n {
		rec, err := s.Next()
		if err != nil {
			return err
		}
		if !l.check.OK(rec) {
			return l.check.ErrorFor(rec)
		}
	}
	return nil
}

func (s *streamSession) Close() {
	for _, l := range s.lanes {
		_ = l.stream.Close()
	}
	s.cancel()
	if s.receiver != nil {
		_ = s.receiver.Close()
	}
	if s.sender != nil {
		_ = s.sender.Close()
	}
	s.Pair.Close()
}

type streamPinger struct {
	*streamSession
	pong chan error
}

// OpenPinger opens a stream to measure the time that one record takes.
func OpenPinger(d Dialer, size int) (Pinger, error) {
	s, err := newSession(d, Config{Size: size, Streams: 1})
	if err != nil {
		return nil, err
	}
	p := &streamPinger{streamSession: s, pong: make(chan error, 1)}
	go func() {
		l := p.lanes[0]
		for {
			rec, err := l.stream.Next()
			if err == nil && !l.check.OK(rec) {
				err = l.check.ErrorFor(rec)
			}
			select {
			case p.pong <- err:
			case <-l.stream.Context().Done():
			}
			if err != nil {
				return
			}
		}
	}()
	return p, nil
}

func (p *streamPinger) Ping() error {
	l := p.lanes[0]
	Stamp(l.rec, l.sent)
	l.sent++
	if _, err := l.writer.Write(l.rec); err != nil {
		return err
	}
	return <-p.pong
}
