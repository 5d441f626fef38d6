package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
)

// This file opens streams to all producers that answer one request. Goroutines of the user run it. The methods of
// the gathering, which they call, take its lock.

// WithMinResponders sets how many responders [Client.OpenMany] needs: 1 by default. If fewer have answered when
// OpenMany takes no more, [Responders.Next] returns a [*TooFewRespondersError] in place of [io.EOF]. n must be at least
// 1.
func WithMinResponders(n int) OpenOption {
	return withMany(func(o *openOptions) {
		if o.many.minimum = n; n < 1 || n > mostResponders {
			o.fail("WithMinResponders", n, fmt.Sprintf("from 1 to %d", mostResponders))
		}
	})
}

// WithMaxResponders sets how many responders [Client.OpenMany] takes: 1,024 by default, and at most 65,536. It resets
// later ones with [CloseCanceled].
func WithMaxResponders(n int) OpenOption {
	return withMany(func(o *openOptions) {
		if o.many.maximum = n; n < 1 || n > mostResponders {
			o.fail("WithMaxResponders", n, fmt.Sprintf("from 1 to %d", mostResponders))
		}
	})
}

// WithStallTimeout sets how long [Client.OpenMany] waits for a further responder, from the request or from the last one
// that answered: 1 s by default. A responder answers with its first packet, or with its notice that the handler runs,
// which comes a few milliseconds after the request. So this time need not cover the work of handlers. Time without a
// connection does not count. d must be at least 1 ms.
func WithStallTimeout(d time.Duration) OpenOption {
	return withMany(func(o *openOptions) {
		if o.many.stall = min(d, never); d < time.Millisecond {
			o.fail("WithStallTimeout", d, "at least 1ms")
		}
	})
}

// withMany returns an option that sets something in the options of OpenMany. An option can be used for many requests.
func withMany(set func(*openOptions)) OpenOption {
	return func(o *openOptions) {
		if o.many == nil {
			o.many = &manyOptions{minimum: 1, maximum: defaultMaxResponders, stall: defaultStall}
		}
		set(o)
	}
}

// Responders are the streams of all producers that answer one request, made by [Client.OpenMany]. Its methods may be
// called by many goroutines at once.
type Responders struct {
	gathering *gathering
	opened    *Stream // the request, which no user reads
}

// OpenMany sends data to subj as one request to any number of producers, and returns a stream for each that answers:
// one for every [Server] that serves subj outside a queue group ([Server.Handle]), and for one member of each queue
// group. It does not wait for them: [Responders.Next] does. Each stream is like one of [Client.Open], with its own
// liveness, repair and flow control. Records that are written to a stream reach only the producer of that stream. So a
// producer that is slow, or that ends, affects no other.
//
// OpenMany takes no more responders when the maximum has answered ([WithMaxResponders]), when no further one has
// answered for a time ([WithStallTimeout]), when ctx ends, or after [Responders.Close]. It resets responders that
// answer later with [CloseCanceled]. ctx also bounds each of the streams. [WithOpenTimeout] bounds the wait for the
// first responder. [WithKeepAlive] and [WithWindow] apply to each stream. [WithRetry] does not work with OpenMany.
//
// A producer that refuses the request in its first packet, such as a server that is full, has no stream and counts
// neither for the minimum nor for the maximum. A producer that speaks only the JSON fallback gets no stream either,
// because messages of the fallback do not show which producer sent them. Interceptors of [ClientParams] see one stream
// without records, which ends when no more responders are taken and Next has returned all streams.
//
// Errors are those of [Client.Open]. Call Next until it has returned all streams, or call Close: a stream that Next has
// not returned stays open until its end.
func (c *Client) OpenMany(ctx context.Context, subj string, data []byte, opts ...OpenOption) (*Responders, error) {
	return c.OpenManyMsg(ctx, &nats.Msg{Subject: subj, Data: data}, opts...)
}

// OpenManyMsg is [Client.OpenMany] with a message; see [Client.OpenMsg].
func (c *Client) OpenManyMsg(ctx context.Context, msg *nats.Msg, opts ...OpenOption) (*Responders, error) {
	if msg == nil {
		return nil, nats.ErrInvalidMsg
	}
	asked := withMany(func(o *openOptions) { o.many.asked = true })
	st, err := c.openMsg(ctx, msg, append(slices.Clip(opts), asked))
	if err != nil {
		return nil, err
	}
	g := st.session.gathering()
	if g == nil || g.request != &st.session {
		_ = st.Close()
		return nil, errors.New("stream: an interceptor of ClientParams returned another stream than that of OpenMany: pass all options on, and return what the next OpenFunc returned")
	}
	return &Responders{g, st}, nil
}

// openMany opens the stream of a request of OpenMany.
func (c *Client) openMany(ctx context.Context, msg *nats.Msg, o openOptions) (*Stream, error) {
	m := o.many
	switch {
	case !m.asked:
		return nil, errors.New("stream: options WithMinResponders, WithMaxResponders and WithStallTimeout are for several responders: use Client.OpenMany")
	case o.retry != nil:
		return nil, errors.New("stream: option WithRetry does not work with OpenMany, because some handlers may have run: call OpenMany again if that does no harm")
	case m.minimum > m.maximum:
		return nil, fmt.Errorf("stream: option WithMinResponders is %d and WithMaxResponders %d: the minimum must not be larger", m.minimum, m.maximum)
	}
	return c.openOnce(ctx, msg, o)
}

// Next returns the stream of the next responder, in the order of their first packets. It waits for one until ctx ends.
// Errors:
//
//   - [io.EOF] after the last responder. No more are taken.
//   - A [*TooFewRespondersError] in its place if fewer have answered than [WithMinResponders] asks for.
//   - [nats.ErrNoResponders] if nobody serves the subject.
//   - [ErrOpenTimeout] if nobody has answered within the time of [WithOpenTimeout].
//   - The error of ctx. A later call of Next may return further streams.
//   - The error of the context given to OpenMany after it ended, [ErrClosed] after [Responders.Close], or
//     [ErrClientClosed]. The streams that Next has not returned are closed.
//   - A [*CloseError] with [CloseAbnormalClosure] if the connection was lost for too long.
//
// Streams that Next has returned go on, whatever it returns later.
func (r *Responders) Next(ctx context.Context) (*Stream, error) {
	if ctx == nil {
		return nil, noContext("Responders.Next")
	}
	for {
		st, news, err := r.gathering.next()
		switch {
		case st != nil:
			st.session.heed(st.session.recv.parent)
			return st, nil
		case err != nil:
			return nil, err
		}
		select {
		case <-news:
		case <-ctx.Done():
			return nil, contextError(ctx)
		}
	}
}

// All returns an iterator over the streams. It stops after the last responder. At any other end, the last pair holds
// the error of [Responders.Next]. A loop that is left early leaves the streams open. A later call of All or Next
// continues after the last stream that was returned.
func (r *Responders) All() iter.Seq2[*Stream, error] {
	return func(yield func(*Stream, error) bool) {
		for {
			st, err := r.Next(context.Background())
			if err == io.EOF || !yield(st, err) || err != nil {
				return
			}
		}
	}
}

// Close ends the request. It takes no more responders, and closes all streams of the request, also those that Next has
// returned; see [Stream.Close]. Close may be called at any time, and never fails.
func (r *Responders) Close() error {
	all := r.gathering.close()
	_ = r.opened.Close()
	for _, st := range all {
		_ = st.Close()
	}
	return nil
}
