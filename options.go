package stream

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
)

// This file has the options of one stream, and repeats requests. The goroutine that opens the stream runs it. It
// touches the openOptions of its call.

// OpenOption is an option of one stream. [WithKeepAlive], [WithWindow], [WithOpenTimeout] and [WithRetry] make one, for
// [Client.Open] and [Client.OpenMsg]. [WithMinResponders], [WithMaxResponders] and [WithStallTimeout] are for
// [Client.OpenMany]. If two options set the same value, the later one applies. An option can be used for many streams.
type OpenOption func(*openOptions)

// openOptions are the options of one stream. The zero value is that of a stream without options.
type openOptions struct {
	codec    Codec         // of objects; CodecDefault for that of the client
	patience time.Duration // 0 for that of the client
	window   int           // 0 for that of the client
	timeout  time.Duration // until the first packet, 0 for none
	until    time.Time     // when timeout ends
	retry    *Retry        // nil: the request is sent once
	answered chan struct{} // closed when the request was answered, or can no longer be; nil without retry
	many     *manyOptions  // for OpenMany; nil without
	err      error         // an option has a value that it must not have
}

// WithKeepAlive sets how long the producer's end may be silent before this end sends it a PING. After four times d of
// silence, the stream ends with [CloseAbnormalClosure]. The effect is that of [Stream.SetPeerTimeout] with four times
// d. d must be at least 1 ms.
func WithKeepAlive(d time.Duration) OpenOption {
	return func(o *openOptions) {
		if o.patience = patienceParts * min(d, never); d < time.Millisecond {
			o.fail("WithKeepAlive", d, "at least 1ms")
		}
	}
}

// WithWindow sets the most bytes by which the producer may be ahead of the reader, instead of Window of [ClientParams].
// The value is rounded down to a power of two. It must be at least 4 KiB. A small window keeps the producer close to
// its reader, but it limits the rate to one window for each round trip.
func WithWindow(bytes int) OpenOption {
	return func(o *openOptions) {
		if o.window = bytes; bytes < minWindow {
			o.fail("WithWindow", bytes, "at least 4096 bytes")
		}
	}
}

// WithOpenTimeout bounds the wait for the producer's answer. The answer is the producer's first packet, or its notice
// that the handler runs, a few milliseconds after the request. Without an answer within d, the stream ends with
// [ErrOpenTimeout]. The time runs from the call of Open, also while the connection is down. It does not bound the
// stream after the answer: the context of Open does. With [WithRetry], d covers all requests and the waits between
// them. d must be at least 1 ms.
func WithOpenTimeout(d time.Duration) OpenOption {
	return func(o *openOptions) {
		if o.timeout = min(d, never); d < time.Millisecond {
			o.fail("WithOpenTimeout", d, "at least 1ms")
		}
	}
}

// WithRetry makes Open wait for the producer's answer. If the stream ends with an error that is [Retryable], Open sends
// the request again. It sends no request again that a handler may have received. The answer is the producer's first
// packet, or its notice that the handler runs, a few milliseconds after the request. Open returns the stream after an
// answer. If the stream has ended with an error that is not Retryable, Open returns the stream as well, and its reads
// return the error. Do not change the data of the request before Open returns.
//
// Further errors of Open: the last refusal, after r.Attempts; the error of the context, or [ErrOpenTimeout], together
// with the last refusal if Open waited to repeat the request; an error for negative fields of r.
func WithRetry(r Retry) OpenOption {
	return func(o *openOptions) {
		r, err := r.withDefaults()
		if o.retry = &r; err != nil && o.err == nil {
			o.err = err
		}
	}
}

// withCodec sets the codec of objects.
func withCodec(c Codec) OpenOption { return func(o *openOptions) { o.codec = c } }

func (o *openOptions) fail(name string, value any, want string) {
	if o.err == nil {
		o.err = fmt.Errorf("stream: option %s is %v: it must be %s", name, value, want)
	}
}

// collect returns the options that opts set. Without opts it does not allocate.
func (c *Client) collect(opts []OpenOption) openOptions {
	if len(opts) == 0 {
		return openOptions{codec: c.codec}
	}
	o := openOptions{codec: c.codec}
	for _, set := range opts {
		if set != nil {
			set(&o)
		}
	}
	if o.timeout != 0 {
		o.until = time.Now().Add(o.timeout)
	}
	return o
}

// openTimeoutError is the type of ErrOpenTimeout. It implements net.Error.
type openTimeoutError struct{}

func (openTimeoutError) Error() string {
	return "stream: no answer to the request within the time of WithOpenTimeout: look whether the server is well, or allow more; the handler may have run"
}
func (openTimeoutError) Timeout() bool   { return true }
func (openTimeoutError) Temporary() bool { return true }

// ErrOpenTimeout is the error of a stream that got no answer within the time of [WithOpenTimeout]. It is a [net.Error]
// with Timeout. It is not [Retryable], because the handler may have run.
var ErrOpenTimeout error = openTimeoutError{}

// openRetrying is open with WithRetry.
func (c *Client) openRetrying(ctx context.Context, msg *nats.Msg, o openOptions) (*Stream, error) {
	var late <-chan time.Time
	if o.timeout != 0 {
		timer := time.NewTimer(time.Until(o.until))
		defer timer.Stop()
		late = timer.C
	}
	for n := 0; ; n++ {
		o.answered = make(chan struct{})
		s, err := c.openOnce(ctx, msg, o)
		if err != nil {
			return nil, err
		}
		select {
		case <-o.answered:
		case <-ctx.Done():
			_ = s.Close()
			return nil, contextError(ctx)
		}
		end := s.session.end.Load()
		switch {
		case end != nil && end.err == ErrOpenTimeout:
			_ = s.Close()
			return nil, ErrOpenTimeout
		case end == nil || !Retryable(end.err):
			return s, nil
		}
		_ = s.Close()
		if n+1 == o.retry.Attempts {
			return nil, end.err
		}
		select {
		case <-time.After(o.retry.wait(n)):
		case <-late:
			return nil, fmt.Errorf("%w, after: %w", ErrOpenTimeout, end.err)
		case <-ctx.Done():
			return nil, fmt.Errorf("%w, after: %w", contextError(ctx), end.err)
		}
	}
}
