package stream

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/nats-io/nats.go"
)

// refusal is a refusal before anything else was received: the producer's server had no room, and called no handler.
type refusal struct{ *CloseError }

func (r refusal) Unwrap() error { return r.CloseError }

// Retryable reports whether err, returned by a method of a [Stream], says that the request surely reached no handler,
// so that opening the stream again cannot run one twice. Two ends do: [nats.ErrNoResponders] in answer to the request,
// and [CloseTryAgainLater] from a server without room. Every other error is not retryable for the library; the caller
// may know more.
//
// If several servers get the same request, because they handle its subject outside a queue group, Retryable speaks of the one
// that answered first.
func Retryable(err error) bool {
	if _, ok := errors.AsType[refusal](err); ok {
		return true
	}
	_, closed := errors.AsType[*CloseError](err) // a peer that was lost later is reported with ErrNoResponders too
	return errors.Is(err, nats.ErrNoResponders) && !closed
}

// Retry says how often and how soon [Client.OpenRetry] tries again. The zero value of a field means the default.
type Retry struct {
	Attempts int           // requests in all: 5 by default
	Wait     time.Duration // before the second request, doubled for each further one: 50 ms by default
	MaxWait  time.Duration // bound of Wait: 2 s by default
}

func (r Retry) withDefaults() (Retry, error) {
	const attempts, wait, maxWait = 5, 50 * time.Millisecond, 2 * time.Second
	if r.Attempts < 0 || r.Wait < 0 || r.MaxWait < 0 {
		return r, fmt.Errorf("stream: parameter Retry is %+v: its fields must be above 0, or 0 for %d attempts, %v, %v", r, attempts, wait, maxWait)
	}
	if r.Attempts == 0 {
		r.Attempts = attempts
	}
	if r.Wait == 0 {
		r.Wait = wait
	}
	if r.MaxWait == 0 {
		r.MaxWait = maxWait
	}
	return r, nil
}

// wait returns how long to wait after the n-th refusal, counted from 0: at least half of what Retry says, at random, so that
// consumers that were refused together do not come back together.
func (r Retry) wait(n int) time.Duration {
	d := r.MaxWait
	if n < 62 && r.Wait <= r.MaxWait>>n {
		d = r.Wait << n
	}
	return d - rand.N(d/2+1)
}

// OpenRetry opens a stream as [Client.OpenMsg] does, waits until its producer answers, and sends the request again while it is
// refused in a way that is [Retryable]. It never sends it again once a handler may have run. The answer is the producer's first
// packet, or its word that the handler runs, a few milliseconds after the request. Any other end of the stream is returned by its reads.
//
// Errors: the last refusal, after retry.Attempts; those of [Client.OpenMsg]; the context's error; an error for negative
// fields of retry.
func (c *Client) OpenRetry(ctx context.Context, msg *nats.Msg, retry Retry) (*Stream, error) {
	retry, err := retry.withDefaults()
	if err != nil {
		return nil, err
	}
	if msg == nil {
		return nil, nats.ErrInvalidMsg
	}
	for n := 0; ; n++ {
		answered := make(chan struct{})
		s, err := c.open(ctx, msg, c.codec, answered)
		if err != nil {
			return nil, err
		}
		select {
		case <-answered:
		case <-ctx.Done():
			_ = s.Close()
			return nil, contextError(ctx)
		}
		end := s.session.end.Load()
		if end == nil || !Retryable(end.err) {
			return s, nil
		}
		_ = s.Close()
		if n+1 == retry.Attempts {
			return nil, end.err
		}
		select {
		case <-time.After(retry.wait(n)):
		case <-ctx.Done():
			return nil, fmt.Errorf("%w, after: %w", contextError(ctx), end.err)
		}
	}
}
