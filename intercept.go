package stream

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/nats-io/nats.go"
)

// This file puts interceptors around handlers and around Open. The goroutines that call NewClient, NewServer, Handle
// and Open run it. It touches fields that are set once.

// OpenFunc opens a stream, as [Client.OpenMsg] does. The interceptors of [ClientParams] are functions from one OpenFunc
// to another.
type OpenFunc func(ctx context.Context, msg *nats.Msg, opts ...OpenOption) (*Stream, error)

// errNoStream is returned by Open if an interceptor returned neither a stream nor an error.
var errNoStream = errors.New("stream: an interceptor of ClientParams returned neither a stream nor an error: return what the next OpenFunc returned, or an error")

// chain puts interceptors around f, the first one outermost.
func chain[F any](f F, interceptors []func(F) F) F {
	for _, around := range slices.Backward(interceptors) {
		f = around(f)
	}
	return f
}

// checkInterceptors returns an error if one of the interceptors is nil.
func checkInterceptors[F any](interceptors []func(F) F) error {
	for i, around := range interceptors {
		if around == nil {
			return fmt.Errorf("stream: parameter Interceptors: number %d is nil: leave it out", i)
		}
	}
	return nil
}

// intercept puts interceptors around the open of c.
func (c *Client) intercept(interceptors []func(OpenFunc) OpenFunc) error {
	if len(interceptors) == 0 {
		return nil
	}
	if c.intercepted = chain(OpenFunc(c.open), interceptors); c.intercepted == nil {
		return errors.New("stream: an interceptor of ClientParams returned a nil OpenFunc: return the next one, or one that calls it")
	}
	return nil
}

// openIntercepted is open with interceptors. They get a copy of msg, so they may change its subject, data and header.
func (c *Client) openIntercepted(ctx context.Context, msg *nats.Msg, opts []OpenOption) (*Stream, error) {
	m := &nats.Msg{Subject: msg.Subject, Data: msg.Data, Header: make(nats.Header, len(msg.Header))}
	for key, values := range msg.Header {
		m.Header[key] = slices.Clone(values)
	}
	s, err := c.intercepted(ctx, m, opts...)
	switch {
	case err != nil && s != nil:
		_ = s.Close()
		s = nil
	case err == nil && s == nil:
		err = errNoStream
	}
	return s, err
}
