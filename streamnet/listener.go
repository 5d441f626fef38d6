package streamnet

import (
	"net"
	"sync"

	"github.com/natsstream/stream"
)

// Listener accepts connections. Its methods may be called by any goroutine at any time.
type Listener struct {
	addr         Addr
	registration *stream.Registration
	waiting      chan *Conn
	closed       chan struct{}
	once         sync.Once
}

var _ net.Listener = (*Listener)(nil)

// Listen serves subject with connections. Each takes one of MaxStreams of the server, from the time it arrives: a
// connection that waits for Accept counts as well. Errors are those of [stream.Server.Handle].
func Listen(server *stream.Server, subject string) (*Listener, error) {
	return ListenQueue(server, subject, "")
}

// ListenQueue is [Listen] as a member of a queue group: NATS gives each connection to one member.
func ListenQueue(server *stream.Server, subject, queue string) (*Listener, error) {
	l := &Listener{addr: Addr{subject}, waiting: make(chan *Conn), closed: make(chan struct{})}
	r, err := server.HandleQueue(subject, queue, l.handle)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: "nats", Addr: l.addr, Err: err}
	}
	l.registration = r
	return l, nil
}

// handle is the goroutine of a connection. It waits for Accept, and then for Close.
func (l *Listener) handle(w *stream.Writer, r *stream.Request) error {
	done := make(chan struct{})
	c := &Conn{accepted: true, r: r, w: w, local: Addr{r.Subject}, closeWrite: func() error {
		if err := w.Close(); err != nil {
			return err
		}
		return w.Flush() // the handler goes on, so the end has to be sent now
	}, closeAll: func() { close(done) }}
	select {
	case l.waiting <- c:
		<-done
		return nil
	case <-l.closed:
	case <-r.Draining():
	case <-r.Context().Done():
	}
	return &stream.CloseError{Code: stream.CloseGoingAway, Text: "the listener is closed"}
}

// Accept returns the next connection. It fails with [net.ErrClosed] after Close.
func (l *Listener) Accept() (net.Conn, error) {
	select {
	case <-l.closed: // first: a connection may wait as well
	default:
		select {
		case c := <-l.waiting:
			return c, nil
		case <-l.closed:
		}
	}
	return nil, &net.OpError{Op: "accept", Net: "nats", Addr: l.addr, Err: net.ErrClosed}
}

// Close ends the listener. Connections that were accepted go on, and those that wait end. Close returns when NATS has
// confirmed the end of the subscription, within 2 s. A second Close returns [net.ErrClosed].
func (l *Listener) Close() error {
	err := error(&net.OpError{Op: "close", Net: "nats", Addr: l.addr, Err: net.ErrClosed})
	l.once.Do(func() {
		err = nil
		close(l.closed)
		l.registration.Stop()
	})
	return err
}

// Addr returns the [Addr] of the listener.
func (l *Listener) Addr() net.Addr { return l.addr }
