package stream

// This file reports the end of a client or server. Any goroutine may call its functions, which read atomics.

// Done returns a channel that is closed when the client can open no more streams: after [Client.Close], or if its
// connection was closed for good. A connection that is down and will be tried again does not close it.
func (c *Client) Done() <-chan struct{} { return c.ep.ctx.Done() }

// Err returns nil until Done is closed, and then the reason: [ErrClientClosed], or an error that matches
// [nats.ErrConnectionClosed].
func (c *Client) Err() error { return c.ep.err() }

// Done returns a channel that is closed when the server can serve no more streams: after [Server.Close], at the end of
// [Server.Drain], or if its connection was closed for good. A connection that is down and will be tried again does not
// close it.
func (s *Server) Done() <-chan struct{} { return s.ep.ctx.Done() }

// Err returns nil until Done is closed, and then the reason: [ErrServerClosed], or an error that matches
// [nats.ErrConnectionClosed].
func (s *Server) Err() error { return s.ep.err() }
