package streamnet

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/natsstream/stream"
)

// This file has Conn and Dial. Any goroutine may call them. Reads lock reading, and writes lock writing. Close sets
// closed with mu locked, so no later call starts.

// Addr is the address of an end of a connection.
type Addr struct {
	Subject string // the subject that the listener serves; empty for the dialing end, which has none
}

// Network returns "nats".
func (Addr) Network() string { return "nats" }

// String returns the subject, or "consumer" for the dialing end.
func (a Addr) String() string {
	if a.Subject == "" {
		return "consumer"
	}
	return a.Subject
}

// reader is the read half of a stream: a *stream.Stream or a *stream.Request.
type reader interface {
	io.Reader
	io.WriterTo
	SetReadDeadline(time.Time) error
}

// writer is the write half of a stream: a *stream.Stream or a *stream.Writer.
type writer interface {
	io.Writer
	SetWriteDeadline(time.Time) error
}

// Conn is a connection over a stream. Its methods may be called by any goroutine at any time.
type Conn struct {
	r             reader
	w             writer
	local, remote Addr

	closeWrite func() error // ends the write half
	closeAll   func()       // ends the stream
	accepted   bool         // the stream is a handler's, which no call may use after closeAll

	reading sync.Mutex // one read at a time: a stream takes no more
	writing sync.Mutex // one write at a time, so that no other write comes between the records of a large one

	closed atomic.Bool
	mu     sync.Mutex
	calls  sync.WaitGroup // reads, writes and deadlines under way; begun with mu held
	once   sync.Once
}

var _ net.Conn = (*Conn)(nil)

// recordSize is the most bytes of a record. It is more than the buffers of io.Copy have, and fits into a packet. So a
// reader seldom waits for a second packet of a record.
const recordSize = 60 << 10

// enter begins a call that uses the stream, unless Close was called. leave ends it.
func (c *Conn) enter() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed.Load() {
		return net.ErrClosed
	}
	c.calls.Add(1)
	return nil
}

func (c *Conn) leave() { c.calls.Done() }

// Read reads bytes of the other end. It returns [io.EOF] after all of them, when the other end has called Close or
// CloseWrite. Other errors are of type [*net.OpError].
func (c *Conn) Read(p []byte) (int, error) {
	if err := c.enter(); err != nil {
		return 0, c.failed("read", err)
	}
	defer c.leave()
	c.reading.Lock()
	defer c.reading.Unlock()
	n, err := c.r.Read(p)
	return n, c.failed("read", err)
}

// WriteTo implements [io.WriterTo]: it writes the bytes of the other end to w until its end, without a copy.
func (c *Conn) WriteTo(w io.Writer) (int64, error) {
	if err := c.enter(); err != nil {
		return 0, c.failed("read", err)
	}
	defer c.leave()
	c.reading.Lock()
	defer c.reading.Unlock()
	n, err := c.r.WriteTo(w)
	return n, c.failed("read", err)
}

// Write sends p. It waits while the other end is behind by a window. It returns the number of bytes that it accepted.
// Errors are of type [*net.OpError].
func (c *Conn) Write(p []byte) (n int, err error) {
	if err := c.enter(); err != nil {
		return 0, c.failed("write", err)
	}
	defer c.leave()
	c.writing.Lock()
	defer c.writing.Unlock()
	for first := true; first || n < len(p); first = false {
		m, err := c.w.Write(p[n:min(len(p), n+recordSize)])
		if n += m; err != nil {
			return n, c.failed("write", err)
		}
	}
	return n, nil
}

// Close ends the connection. Calls that wait return [net.ErrClosed]. The other end reads all bytes that were written
// before, and then [io.EOF]. A second Close returns net.ErrClosed.
func (c *Conn) Close() error {
	err := c.failed("close", net.ErrClosed)
	c.once.Do(func() {
		err = nil
		c.mu.Lock()
		c.closed.Store(true)
		c.mu.Unlock()
		if c.accepted { // calls under way end at a deadline in the past
			past := time.Unix(1, 0)
			_ = c.r.SetReadDeadline(past)
			_ = c.w.SetWriteDeadline(past)
			c.calls.Wait()
		}
		c.closeAll()
	})
	return err
}

// CloseWrite ends the write half: the other end reads [io.EOF] after all written bytes. The read half stays open.
func (c *Conn) CloseWrite() error {
	if err := c.enter(); err != nil {
		return c.failed("close", err)
	}
	defer c.leave()
	return c.failed("close", c.closeWrite())
}

// LocalAddr returns the [Addr] of this end.
func (c *Conn) LocalAddr() net.Addr { return c.local }

// RemoteAddr returns the [Addr] of the other end.
func (c *Conn) RemoteAddr() net.Addr { return c.remote }

// SetDeadline sets the deadlines of reads and writes, as [net.Conn] defines it. The stream goes on after an error of a
// deadline.
func (c *Conn) SetDeadline(t time.Time) error {
	return c.setDeadline(func() error { return errors.Join(c.r.SetReadDeadline(t), c.w.SetWriteDeadline(t)) })
}

// SetReadDeadline sets the deadline of reads; see [stream.Stream.SetReadDeadline].
func (c *Conn) SetReadDeadline(t time.Time) error {
	return c.setDeadline(func() error { return c.r.SetReadDeadline(t) })
}

// SetWriteDeadline sets the deadline of writes; see [stream.Writer.SetWriteDeadline].
func (c *Conn) SetWriteDeadline(t time.Time) error {
	return c.setDeadline(func() error { return c.w.SetWriteDeadline(t) })
}

func (c *Conn) setDeadline(set func() error) error {
	if err := c.enter(); err != nil {
		return c.failed("set", err)
	}
	defer c.leave()
	return c.failed("set", set())
}

// failed returns the error of a call of the connection for an error of its stream.
func (c *Conn) failed(op string, err error) error {
	switch {
	case err == nil || err == io.EOF:
		return err
	case c.closed.Load(): // Close has interrupted the call
		err = net.ErrClosed
	case op == "read" && errors.Is(err, closedUnwritten):
		return io.EOF
	case op == "write" && errors.Is(err, stream.ErrClosed):
		err = io.ErrClosedPipe
	}
	return &net.OpError{Op: op, Net: "nats", Source: c.local, Addr: c.remote, Err: err}
}

// closedUnwritten ends the stream of a dialing end that was closed and had written nothing. A handler would take
// CloseNormalClosure for the end of a stream that lacks records.
var closedUnwritten = &stream.CloseError{Code: 4998}

// Dial connects to a listener on subject. It returns when a server has accepted the stream of the connection, which may
// still wait for Accept there. ctx bounds Dial and not the connection. opts are those of [stream.Client.Open].
//
// Errors are of type [*net.OpError], and wrap those of Open: [github.com/nats-io/nats.go.ErrNoResponders] if nobody
// listens, and errors for which [stream.Retryable] is true if no server has room.
func Dial(ctx context.Context, client *stream.Client, subject string, opts ...stream.OpenOption) (*Conn, error) {
	c := &Conn{remote: Addr{subject}}
	whole, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })
	all := append([]stream.OpenOption{stream.WithRetry(stream.Retry{Attempts: 1})}, opts...)
	s, err := client.Open(whole, subject, nil, all...)
	if err == nil && s.Context().Err() != nil {
		err = context.Cause(s.Context())
	}
	if !stop() && ctx.Err() != nil {
		err = ctx.Err()
	}
	if err != nil {
		if s != nil {
			_ = s.Close()
		}
		cancel(nil)
		return nil, c.failed("dial", err)
	}
	wrote := &written{Stream: s}
	c.r, c.w, c.closeWrite = s, wrote, s.CloseSend
	c.closeAll = func() {
		code := stream.CloseNormalClosure
		if !wrote.any.Load() {
			code = closedUnwritten.Code
		}
		_ = s.CloseWithCode(code)
		cancel(nil)
	}
	return c, nil
}

// written is a writer that records whether anything was written to a stream.
type written struct {
	*stream.Stream
	any atomic.Bool
}

func (w *written) Write(p []byte) (int, error) {
	n, err := w.Stream.Write(p)
	if err == nil {
		w.any.Store(true)
	}
	return n, err
}
