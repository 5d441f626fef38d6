package stream

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/nats-io/nats.go"
)

// This file repeats requests that reached no handler. The goroutine of the caller of OpenRetry runs it.

// refusal is the end of a stream that a server without room refused. It arrived before any other packet, so no handler ran.
type refusal struct{ *CloseError }

func (r refusal) Unwrap() error { return r.CloseError }

// Retryable reports whether err, returned by a method of a [Stream], proves that the request reached no handler. Then opening
// the stream again cannot run a handler twice. Two ends prove it: [nats.ErrNoResponders] as the answer to the request, and
// [CloseTryAgainLater] from a server without room. For every other error Retryable returns false, although the caller may
// know that the request can be repeated.
//
// If several servers get the same request, because they handle its subject outside a queue group, the result is about the
// server that answered first.
func Retryable(err error) bool {
	if _, ok := errors.AsType[refusal](err); ok {
		return true
	}
	_, closed := errors.AsType[*CloseError](err) // a peer that was lost later is reported with ErrNoResponders too
	return errors.Is(err, nats.ErrNoResponders) && !closed
}

// Retry sets how often and how soon [Client.OpenRetry] repeats a request. The zero value of a field selects the default.
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

// wait returns how long to wait after the n-th refusal, counted from 0. The result is random, between half of the time that
// Retry sets and the whole, so that consumers that were refused together do not return together.
func (r Retry) wait(n int) time.Duration {
	d := r.MaxWait
	if n < 62 && r.Wait <= r.MaxWait>>n {
		d = r.Wait << n
	}
	return d - rand.N(d/2+1)
}

// OpenRetry opens a stream as [Client.OpenMsg] does and waits for the producer's answer. If the stream ends and its error is
// [Retryable], OpenRetry sends the request again. It never does so if a handler may have run. The answer is the producer's first
// packet, or its notice that the handler runs, a few milliseconds after the request. OpenRetry returns the stream after an
// answer. It also returns a stream that ended with another error; reads of the stream return that error.
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
