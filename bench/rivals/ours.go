package main

import (
	"context"
	"errors"
	"io"
	"sync"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/fastconn"
)

// The library itself, with the defaults of its parameters.

const ourName = "stream"

func streamRival() rival {
	return rival{name: ourName, settings: "defaults, records are read with Next", open: openStreams}
}

func fastRival() rival {
	return rival{
		name: "stream, fast", settings: "the same over fast connections (package fastconn)",
		open: func(e *env, streams int) ([]lane, func(), error) {
			return openStreams(e.with(fastconn.Enable()), streams)
		},
	}
}

type streamLane struct {
	writer *stream.Writer
	reader *stream.Stream
}

func (l *streamLane) send(rec []byte) error { _, err := l.writer.Write(rec); return err }
func (l *streamLane) flush() error          { return nil }

func (l *streamLane) receive(take func([]byte)) error {
	for {
		rec, err := l.reader.Next()
		if err != nil {
			return err
		}
		take(rec)
	}
}

// ends are a client and a server of the library.
type ends struct {
	pair
	client  *stream.Client
	server  *stream.Server
	subject string
}

func newEnds(e *env, streams int, h stream.Handler) (_ *ends, err error) {
	conns, err := e.dialPair()
	if err != nil {
		return nil, err
	}
	x := &ends{pair: conns, subject: nats.NewInbox()}
	defer func() {
		if err != nil {
			x.close()
		}
	}()
	if x.client, err = stream.NewClient(stream.ClientParams{Conn: conns.consumer}); err != nil {
		return nil, err
	}
	if x.server, err = stream.NewServer(stream.ServerParams{Conn: conns.producer, MaxStreams: max(streams, 10_000)}); err != nil {
		return nil, err
	}
	if _, err = x.server.Handle(x.subject, h); err != nil {
		return nil, err
	}
	return x, conns.producer.Flush()
}

func (x *ends) close() {
	if x.client != nil {
		_ = x.client.Close()
	}
	if x.server != nil {
		_ = x.server.Close()
	}
	x.pair.close()
}

func openStreams(e *env, streams int) ([]lane, func(), error) {
	g := newGatherer[*stream.Writer](streams)
	x, err := newEnds(e, streams, func(w *stream.Writer, r *stream.Request) error { return g.hold(r.Data, w) })
	if err != nil {
		return nil, nil, err
	}
	closer := sync.OnceFunc(func() { close(g.done); x.close() })
	lanes := make([]lane, streams)
	for i := range lanes {
		s, err := x.client.Open(context.Background(), x.subject, question(i))
		if err != nil {
			closer()
			return nil, nil, err
		}
		lanes[i] = &streamLane{reader: s}
	}
	writers, err := g.wait(streams)
	if err != nil {
		closer()
		return nil, nil, err
	}
	for i, w := range writers {
		lanes[i].(*streamLane).writer = w
	}
	return lanes, closer, nil
}

func fastAsker() asker {
	return asker{"stream, fast", func(e *env) (func([]byte) error, func(), error) {
		return streamAsker().open(e.with(fastconn.Enable()))
	}}
}

func streamAsker() asker {
	return asker{ourName, func(e *env) (func([]byte) error, func(), error) {
		x, err := newEnds(e, 0, func(w *stream.Writer, r *stream.Request) error {
			_, err := w.Write(r.Data)
			return err
		})
		if err != nil {
			return nil, nil, err
		}
		return func(question []byte) error {
			s, err := x.client.Open(context.Background(), x.subject, question)
			if err != nil {
				return err
			}
			defer s.Close()
			if _, err := s.Next(); err != nil {
				return err
			}
			if _, err := s.Next(); err != io.EOF {
				return errors.Join(errors.New("the end is missing"), err)
			}
			return nil
		}, x.close, nil
	}}
}

func streamHandlerHolder() holder {
	return holder{"stream, handler", func(e *env, n int) (idleStreams, error) {
		g := newGatherer[*stream.Writer](n)
		x, err := newEnds(e, n, func(w *stream.Writer, r *stream.Request) error { return g.hold(r.Data, w) })
		if err != nil {
			return idleStreams{}, err
		}
		open := idleStreams{
			closer: func() { close(g.done); x.close() },
			alive:  func() int { return min(x.client.Stats().Streams, x.server.Stats().Streams) },
		}
		return open, openIdle(x.client, x.subject, n, func() error { _, err := g.wait(1); return err })
	}}
}

// openIdle opens n streams. It calls arrived for each, to wait for a request.
func openIdle(c *stream.Client, subject string, n int, arrived func() error) error {
	const ahead = 1000
	for i := range n {
		if _, err := c.Open(context.Background(), subject, []byte("0")); err != nil {
			return err
		}
		if i >= ahead {
			if err := arrived(); err != nil {
				return err
			}
		}
	}
	for range min(ahead, n) {
		if err := arrived(); err != nil {
			return err
		}
	}
	return nil
}

func streamWriterHolder() holder {
	return holder{"stream, Writer", func(e *env, n int) (idleStreams, error) {
		conns, err := e.dialPair()
		if err != nil {
			return idleStreams{}, err
		}
		consumer, err := stream.NewClient(stream.ClientParams{Conn: conns.consumer})
		if err != nil {
			conns.close()
			return idleStreams{}, err
		}
		producer, err := stream.NewClient(stream.ClientParams{Conn: conns.producer})
		if err != nil {
			_ = consumer.Close()
			conns.close()
			return idleStreams{}, err
		}
		closer := func() { _ = consumer.Close(); _ = producer.Close(); conns.close() }
		g := newGatherer[*stream.Writer](n)
		subject := nats.NewInbox()
		if _, err := conns.producer.Subscribe(subject, func(m *nats.Msg) {
			w := producer.NewWriter(m.Reply)
			_ = w.Flush()
			_ = g.add(m.Data, w)
		}); err != nil {
			closer()
			return idleStreams{}, err
		}
		if err := conns.producer.Flush(); err != nil {
			closer()
			return idleStreams{}, err
		}
		alive := func() int { return min(consumer.Stats().Streams, producer.Stats().Streams) }
		return idleStreams{closer, alive}, openIdle(consumer, subject, n, func() error { _, err := g.wait(1); return err })
	}}
}
