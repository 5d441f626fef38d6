package e2e

import (
	"fmt"
	"sync/atomic"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/streamtest"
)

// Env is the embedded server of a measurement.
type Env struct {
	server *streamtest.Server
	failed atomic.Pointer[error] // first asynchronous error of any connection
}

// NewEnv starts a nats-server on a loopback port of the system's choice.
func NewEnv() (*Env, error) {
	s, err := streamtest.Start()
	if err != nil {
		return nil, err
	}
	return &Env{server: s}, nil
}

// Close stops the server.
func (e *Env) Close() { e.server.Shutdown() }

// Dial connects to the server. An asynchronous error, such as a slow consumer,
// makes [Env.Err] fail.
func (e *Env) Dial() (*nats.Conn, error) { return e.dial() }

func (e *Env) dial(opts ...nats.Option) (*nats.Conn, error) {
	return e.server.Dial(append(opts, nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
		err = fmt.Errorf("asynchronous error of a connection: %w", err)
		e.failed.CompareAndSwap(nil, &err)
	}))...)
}

// Subject returns a subject that nobody uses.
func (e *Env) Subject() string { return nats.NewInbox() }

// Err returns the first asynchronous error of a connection, or an error if the
// server found a slow consumer.
func (e *Env) Err() error {
	if p := e.failed.Load(); p != nil {
		return *p
	}
	if n := e.server.SlowConsumers(); n != 0 {
		return fmt.Errorf("the server counted %d slow consumers", n)
	}
	return nil
}
