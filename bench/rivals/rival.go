package main

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/streamtest"
)

// A rival is one way to move records from a producer to a consumer.
type rival struct {
	name string
	// settings says which of the rival's settings differ from their defaults, and the reason.
	settings string
	// unbounded: the rival has no flow control. The harness holds at most windowBytes of its records on their way.
	unbounded bool
	// shared: one goroutine produces for all streams, because they share one buffer or are cheaper that way.
	shared bool
	// lossy: records may be lost without an error. The harness counts them. Of any other rival a lost record is an
	// error.
	lossy bool
	// stalls: the rival may lose an acknowledgement on a busy machine, and its stream stands still then.
	stalls bool
	// maxStreams is the largest number of streams that is measured. 0: no bound.
	maxStreams int
	// open opens lanes, ready to carry records. closer ends them and their connections.
	open func(env *env, streams int) (lanes []lane, closer func(), err error)
}

// A lane carries the records of one stream. One goroutine calls send and flush, another calls receive.
type lane interface {
	// send sends a record, now or with the next flush. The lane does not keep rec.
	send(rec []byte) error
	flush() error
	// receive calls take for each record, in order, until the lane is closed. take does not keep the record.
	receive(take func(rec []byte)) error
}

// An asker does the work of the measurement "open": it asks a question of size bytes, gets one record and the end.
type asker struct {
	name string
	open func(env *env) (ask func(question []byte) error, closer func(), err error)
}

// A holder opens idle streams for the measurement of memory.
type holder struct {
	name string
	// open opens n streams that stay idle.
	open func(env *env, n int) (idleStreams, error)
}

func rivals() []rival {
	return []rival{
		streamRival(), fastRival(), natsRival(), requestRival(), requestManyRival(), psrpcRival(),
		jetStreamRival("jetstream-consume"), jetStreamRival("jetstream-fetch"),
		grpcRival(), connectRival(), yamuxRival(), quicRival(), originalRival(), relayRival(),
	}
}

func askers() []asker {
	return []asker{streamAsker(), fastAsker(), natsAsker(), grpcUnaryAsker(), grpcStreamAsker(), connectAsker()}
}

func holders() []holder {
	return []holder{streamWriterHolder(), streamHandlerHolder(), natsHolder(), grpcHolder(), yamuxHolder()}
}

// env is the embedded NATS server, with the first asynchronous error of the connections to it.
type env struct {
	server  *streamtest.Server
	options []nats.Option
	failed  *atomic.Pointer[error]
}

// newEnv starts a server with JetStream. Its files lie in dir.
func newEnv(dir string) (*env, error) {
	s, err := streamtest.Start(streamtest.WithOptions(func(o *server.Options) {
		o.JetStream = true
		o.StoreDir = dir
	}))
	if err != nil {
		return nil, err
	}
	return (&env{server: s}).fresh(), nil
}

func (e *env) close() { e.server.Shutdown() }

// fresh returns a view of the server that has no errors yet.
func (e *env) fresh() *env { return &env{server: e.server, failed: new(atomic.Pointer[error])} }

// with returns the same server. Its connections have the given options.
func (e *env) with(options ...nats.Option) *env {
	return &env{server: e.server, options: options, failed: e.failed}
}

// dial connects to the server. Its first asynchronous error is kept.
func (e *env) dial() (*nats.Conn, error) {
	return e.server.Dial(append(slices.Clone(e.options), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		if errors.Is(err, nats.ErrSlowConsumer) {
			return // the receiver counts the records that it lacks
		}
		err = fmt.Errorf("asynchronous error of a connection: %w", err)
		e.failed.CompareAndSwap(nil, &err)
	}))...)
}

// pair is the connection of a producer and the one of a consumer.
type pair struct{ producer, consumer *nats.Conn }

func (e *env) dialPair() (pair, error) {
	p, err := e.dial()
	if err != nil {
		return pair{}, err
	}
	c, err := e.dial()
	if err != nil {
		p.Close()
		return pair{}, err
	}
	return pair{producer: p, consumer: c}, nil
}

func (p pair) close() {
	p.producer.Close()
	p.consumer.Close()
}

func (e *env) err() error {
	if p := e.failed.Load(); p != nil {
		return *p
	}
	return nil
}
