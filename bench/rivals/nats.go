package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/synadia-io/orbit.go/natsext"
)

// noLimit lifts nats.go's bound on the messages that wait for a callback.
const noLimit = -1

// A pushLane is a subscription with a callback. The callback waits for the first receive.
type pushLane struct {
	conn    *nats.Conn
	subject string
	sub     *nats.Subscription
	ready   chan struct{}
	take    func([]byte)
	done    <-chan struct{}
}

func (l *pushLane) send(rec []byte) error { return l.conn.Publish(l.subject, rec) }
func (l *pushLane) flush() error          { return nil }

func (l *pushLane) onMessage(m *nats.Msg) {
	<-l.ready
	l.take(m.Data)
}

func (l *pushLane) receive(take func([]byte)) error {
	l.take = take
	close(l.ready)
	<-l.done
	return nil
}

const natsName = "nats"

func natsRival() rival {
	return rival{
		name: natsName, settings: "a subject and a callback subscription per stream, no pending limits", unbounded: true, shared: true,
		open: func(e *env, streams int) ([]lane, func(), error) {
			conns, err := e.dialPair()
			if err != nil {
				return nil, nil, err
			}
			done := make(chan struct{})
			closer := func() { conns.close(); close(done) }
			lanes := make([]lane, streams)
			for i := range lanes {
				l := &pushLane{conn: conns.producer, subject: fmt.Sprintf("%s.%d", nats.NewInbox(), i), ready: make(chan struct{}), done: done}
				if l.sub, err = conns.consumer.Subscribe(l.subject, l.onMessage); err == nil {
					err = l.sub.SetPendingLimits(noLimit, noLimit)
				}
				if err != nil {
					closer()
					return nil, nil, err
				}
				lanes[i] = l
			}
			return lanes, closer, conns.consumer.Flush()
		},
	}
}

// requestRival asks for each record by itself: the producer answers nats.Request with the next one.
func requestRival() rival {
	return rival{
		name: "request-loop", settings: "one nats.Request per record", maxStreams: 100,
		open: func(e *env, streams int) ([]lane, func(), error) {
			conns, err := e.dialPair()
			if err != nil {
				return nil, nil, err
			}
			done := make(chan struct{})
			closer := func() { close(done); conns.close() }
			lanes := make([]lane, streams)
			for i := range lanes {
				l := &requestLane{conn: conns.consumer, subject: nats.NewInbox(), records: make(chan []byte), sent: make(chan error), done: done}
				if _, err := conns.producer.Subscribe(l.subject, func(m *nats.Msg) {
					select {
					case rec := <-l.records:
						l.sent <- m.Respond(rec)
					case <-done:
					}
				}); err != nil {
					closer()
					return nil, nil, err
				}
				lanes[i] = l
			}
			return lanes, closer, conns.producer.Flush()
		},
	}
}

type requestLane struct {
	conn    *nats.Conn
	subject string
	records chan []byte
	sent    chan error
	done    chan struct{}
}

func (l *requestLane) send(rec []byte) error {
	select {
	case l.records <- rec:
		return <-l.sent
	case <-l.done:
		return nats.ErrConnectionClosed
	}
}

func (l *requestLane) flush() error { return nil }

func (l *requestLane) receive(take func([]byte)) error {
	for {
		m, err := l.conn.Request(l.subject, nil, time.Hour)
		if err != nil {
			return err
		}
		take(m.Data)
	}
}

// requestManyRival is orbit's RequestMany: one request, and the producer publishes answers to its reply subject.
func requestManyRival() rival {
	return rival{
		name: "request-many", settings: "orbit.go natsext.RequestMany, no stall time, and a context of an hour, because it ends after 2 s without one; it has no flow control and loses what a slow reader does not take", unbounded: true, lossy: true,
		open: func(e *env, streams int) ([]lane, func(), error) {
			conns, err := e.dialPair()
			if err != nil {
				return nil, nil, err
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
			closer := func() { cancel(); conns.close() }
			g := newGatherer[string](streams)
			subject := nats.NewInbox()
			if _, err := conns.producer.Subscribe(subject, func(m *nats.Msg) { _ = g.add(m.Data, m.Reply) }); err != nil {
				closer()
				return nil, nil, err
			}
			if err := conns.producer.Flush(); err != nil {
				closer()
				return nil, nil, err
			}
			lanes := make([]lane, streams)
			for i := range lanes {
				messages, err := natsext.RequestMany(ctx, conns.consumer, subject, question(i))
				if err != nil {
					closer()
					return nil, nil, err
				}
				lanes[i] = &manyLane{conn: conns.producer, messages: func(yield func([]byte) bool) error {
					for m, err := range messages {
						if err != nil {
							return err
						}
						if !yield(m.Data) {
							return nil
						}
					}
					return nil
				}}
			}
			replies, err := g.wait(streams)
			if err != nil {
				closer()
				return nil, nil, err
			}
			for i, reply := range replies {
				lanes[i].(*manyLane).subject = reply
			}
			return lanes, closer, nil
		},
	}
}

type manyLane struct {
	conn     *nats.Conn
	subject  string
	messages func(yield func([]byte) bool) error
}

func (l *manyLane) send(rec []byte) error { return l.conn.Publish(l.subject, rec) }
func (l *manyLane) flush() error          { return nil }
func (l *manyLane) receive(take func([]byte)) error {
	return l.messages(func(rec []byte) bool { take(rec); return true })
}

// jetStreamRival stores each record in a stream in memory. An ordered consumer reads it.
func jetStreamRival(name string) rival {
	return rival{
		name: name, settings: "stream in memory that keeps 64 MiB, PublishAsync with 4,096 pending, ordered consumer", maxStreams: 1,
		unbounded: true,
		open: func(e *env, streams int) ([]lane, func(), error) {
			conns, err := e.dialPair()
			if err != nil {
				return nil, nil, err
			}
			ctx, cancel := context.WithCancel(context.Background())
			// A Fetch may wait for ever on a connection that was closed.
			var receiving sync.WaitGroup
			closer := func() { cancel(); receiving.Wait(); conns.close() }
			lanes := make([]lane, streams)
			for i := range lanes {
				l, err := openJetStream(ctx, conns, &receiving, name == "jetstream-fetch")
				if err != nil {
					closer()
					return nil, nil, err
				}
				lanes[i] = l
			}
			return lanes, closer, nil
		},
	}
}

type jetStreamLane struct {
	ctx       context.Context
	receiving *sync.WaitGroup
	publisher jetstream.JetStream
	subject   string
	consumer  jetstream.Consumer
	fetch     bool
}

func openJetStream(ctx context.Context, conns pair, receiving *sync.WaitGroup, fetch bool) (lane, error) {
	publisher, err := jetstream.New(conns.producer, jetstream.WithPublishAsyncMaxPending(4096))
	if err != nil {
		return nil, err
	}
	reader, err := jetstream.New(conns.consumer)
	if err != nil {
		return nil, err
	}
	name := "RECORDS" + nats.NewInbox()[len(nats.InboxPrefix):]
	store, err := reader.CreateStream(ctx, jetstream.StreamConfig{
		Name: name, Subjects: []string{name}, Storage: jetstream.MemoryStorage, MaxBytes: 64 << 20, Discard: jetstream.DiscardOld,
	})
	if err != nil {
		return nil, err
	}
	consumer, err := store.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverAllPolicy})
	if err != nil {
		return nil, err
	}
	return &jetStreamLane{ctx: ctx, receiving: receiving, publisher: publisher, subject: name, consumer: consumer, fetch: fetch}, nil
}

func (l *jetStreamLane) send(rec []byte) error {
	_, err := l.publisher.PublishAsync(l.subject, append([]byte(nil), rec...)) // JetStream keeps the record, to send it again if it must
	return err
}

func (l *jetStreamLane) flush() error { return nil }

func (l *jetStreamLane) receive(take func([]byte)) error {
	l.receiving.Add(1)
	defer l.receiving.Done()
	if !l.fetch {
		c, err := l.consumer.Consume(func(m jetstream.Msg) { take(m.Data()) })
		if err != nil {
			return err
		}
		<-l.ctx.Done()
		c.Stop()
		return nil
	}
	for l.ctx.Err() == nil {
		batch, err := l.consumer.Fetch(500, jetstream.FetchMaxWait(100*time.Millisecond))
		if err != nil {
			return err
		}
		for m := range batch.Messages() {
			take(m.Data())
		}
		if err := batch.Error(); err != nil && !errors.Is(err, nats.ErrTimeout) {
			return err
		}
	}
	return nil
}

const natsAskerName = "nats.Request"

func natsAsker() asker {
	return asker{natsAskerName, func(e *env) (func([]byte) error, func(), error) {
		conns, err := e.dialPair()
		if err != nil {
			return nil, nil, err
		}
		subject := nats.NewInbox()
		if _, err := conns.producer.Subscribe(subject, func(m *nats.Msg) { _ = m.Respond(m.Data) }); err != nil {
			conns.close()
			return nil, nil, err
		}
		return func(question []byte) error {
			_, err := conns.consumer.Request(subject, question, 10*time.Second)
			return err
		}, conns.close, conns.producer.Flush()
	}}
}

func natsHolder() holder {
	return holder{"nats subscription", func(e *env, n int) (idleStreams, error) {
		conns, err := e.dialPair()
		if err != nil {
			return idleStreams{}, err
		}
		prefix := nats.NewInbox()
		for i := range n {
			if _, err := conns.consumer.Subscribe(fmt.Sprintf("%s.%d", prefix, i), func(*nats.Msg) {}); err != nil {
				conns.close()
				return idleStreams{}, err
			}
		}
		return idleStreams{closer: conns.close}, conns.consumer.Flush()
	}}
}
