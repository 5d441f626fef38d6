package stream

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/nats-io/nats.go"
)

// This file decides which requests surely reached no handler, and when to repeat them. Any goroutine may run it. It
// touches no state.

// refusal is the end of a stream that a server without room refused. It arrived before any other packet, so no handler
// ran.
type refusal struct{ *CloseError }

func (r refusal) Unwrap() error { return r.CloseError }

// Retryable reports whether err, returned by a method of a [Stream], proves that the request reached no handler. Then
// opening the stream again cannot run a handler twice. Two errors prove it: [nats.ErrNoResponders] as the answer to the
// request, and [CloseTryAgainLater] from a server without room. For every other error Retryable returns false, although
// the caller may know that the request can be repeated.
//
// If several servers get the same request, because they handle its subject outside a queue group, the result is about
// the server that answered first.
func Retryable(err error) bool {
	if _, ok := errors.AsType[refusal](err); ok {
		return true
	}
	_, closed := errors.AsType[*CloseError](err) // a peer that was lost later is reported with ErrNoResponders too
	return errors.Is(err, nats.ErrNoResponders) && !closed
}

// Retry sets how often and how soon [WithRetry] repeats a request. The zero value of a field selects the default.
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

// wait returns how long to wait after the n-th refusal, counted from 0. The result is random, between half of the time
// that Retry sets and the whole, so that consumers that were refused together do not return together.
func (r Retry) wait(n int) time.Duration {
	d := r.MaxWait
	if n < 62 && r.Wait <= r.MaxWait>>n {
		d = r.Wait << n
	}
	return d - rand.N(d/2+1)
}
