package main

import (
	"context"
	"errors"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/bench/original"
)

// This file streams records through the original design, package original. A goroutine of the harness sends on a lane,
// and another one receives.

// originalRival opens streams between two clients of the original design, with a connection each.
func originalRival() rival {
	return rival{
		name: "original", settings: "the original design: JSON, a lock per bucket, no flow control", unbounded: true, shared: true, maxStreams: 100,
		open: func(e *env, streams int) ([]lane, func(), error) {
			conns, err := e.dialPair()
			if err != nil {
				return nil, nil, err
			}
			ctx, cancel := context.WithCancel(context.Background())
			closer := func() { cancel(); conns.close() }
			receiver, err := original.NewClient(conns.consumer)
			if err == nil {
				err = receiver.SetPendingLimits(noLimit, noLimit)
			}
			if err != nil {
				closer()
				return nil, nil, err
			}
			sender, err := original.NewClient(conns.producer)
			if err != nil {
				closer()
				return nil, nil, err
			}
			g := newGatherer[*original.Writer](streams)
			subject := nats.NewInbox()
			if _, err := conns.producer.Subscribe(subject, func(m *nats.Msg) { _ = g.add(m.Data, original.NewWriter(sender, m.Reply)) }); err != nil {
				closer()
				return nil, nil, err
			}
			if err := conns.producer.Flush(); err != nil {
				closer()
				return nil, nil, err
			}
			lanes := make([]lane, streams)
			for i := range lanes {
				results, err := receiver.OpenStream(ctx, subject, question(i))
				if err != nil {
					closer()
					return nil, nil, err
				}
				lanes[i] = &originalLane{ctx: ctx, results: results}
			}
			writers, err := g.wait(streams)
			if err != nil {
				closer()
				return nil, nil, err
			}
			for i, w := range writers {
				lanes[i].(*originalLane).writer = w
			}
			return lanes, closer, nil
		},
	}
}

type originalLane struct {
	ctx     context.Context
	results <-chan *original.Result
	writer  *original.Writer
}

func (l *originalLane) send(rec []byte) error { _, err := l.writer.Write(rec); return err }
func (l *originalLane) flush() error          { return nil }
func (l *originalLane) receive(take func([]byte)) error {
	for {
		select {
		case r, ok := <-l.results:
			if !ok {
				return errors.New("the stream is over")
			}
			if r.Err != nil {
				return r.Err
			}
			take(r.Value)
		case <-l.ctx.Done(): // the original notices the end of its context only with a record
			return nil
		}
	}
}
