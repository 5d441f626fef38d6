// Package original is the baseline of the benchmarks: streaming over NATS the
// way this library was first designed, with the costs and faults that the
// present design removes.
//
// It is written after a description of that design, not copied from it:
//
//   - one NATS message per record, a JSON object with the data in base64;
//   - one wildcard subscription per client and a map of buckets behind a mutex,
//     the token scanned out of the subject by fmt.Sscanf while the mutex is
//     held;
//   - a blocking send to a channel of 16 inside the subscription's callback, so
//     that one reader who pauses stops every stream of the client;
//   - no flow control, so a producer that is faster than the consumer fills
//     NATS' buffers until NATS drops messages in silence;
//   - a cancelled context is noticed only when the next message arrives.
//
// Only the benchmarks use it. They make it lose nothing by lifting the pending
// limits ([Client.SetPendingLimits]) and by bounding the bytes in flight.
package original

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"sync"

	"github.com/nats-io/nats.go"
)

// RequestChanLen is the buffer of a stream's message channel.
const RequestChanLen = 16

// Close codes of the wire format.
const (
	CloseNormalClosure   = 1000
	CloseUnsupportedData = 1003
)

// StreamingMsgType is the kind of a [StreamingMsg].
type StreamingMsgType int

// The two kinds of message.
const (
	DataMsg  StreamingMsgType = 1
	CloseMsg StreamingMsgType = 2
)

// StreamingMsg is the payload of every NATS message, as JSON.
type StreamingMsg struct {
	Type       StreamingMsgType `json:"type"`
	Data       []byte           `json:"data,omitempty"`
	CloseError *CloseError      `json:"closeError,omitempty"`
}

// CloseError is the end of a stream.
type CloseError struct {
	Code int
	Text string
}

// Error implements error.
func (e *CloseError) Error() string {
	return fmt.Sprintf("nats stream: close %d: %s", e.Code, e.Text)
}

// Result is one record, or the error that ended the stream.
type Result struct {
	Value []byte
	Err   error
}

// Client opens streams and distributes their messages.
type Client struct {
	Conn *nats.Conn

	inbox string
	sub   *nats.Subscription

	mu      sync.Mutex
	buckets map[string]*bucket
}

type bucket struct {
	ch chan *nats.Msg
}

// NewClient subscribes to the client's wildcard inbox on conn.
func NewClient(conn *nats.Conn) (*Client, error) {
	c := &Client{
		Conn:    conn,
		inbox:   nats.NewInbox(),
		buckets: make(map[string]*bucket),
	}
	sub, err := conn.Subscribe(c.inbox+".*", c.onMessage)
	if err != nil {
		return nil, err
	}
	c.sub = sub
	return c, nil
}

// SetPendingLimits sets the pending limits of the client's subscription. The
// design left them at nats.go's default and lost all messages beyond it.
func (c *Client) SetPendingLimits(messages, bytes int) error {
	return c.sub.SetPendingLimits(messages, bytes)
}

// Close ends the client's subscription.
func (c *Client) Close() error { return c.sub.Unsubscribe() }

func (c *Client) onMessage(msg *nats.Msg) {
	c.mu.Lock()
	var token string
	_, err := fmt.Sscanf(msg.Subject, c.inbox+".%s", &token)
	b := c.buckets[token]
	c.mu.Unlock()
	if err != nil || b == nil {
		return
	}
	b.ch <- msg // all other streams wait here for the reader of this one
}

// OpenStream sends a request to subject and returns the channel of its results.
func (c *Client) OpenStream(ctx context.Context, subject string, data []byte) (<-chan *Result, error) {
	token := rand.Text()[:8]
	b := &bucket{ch: make(chan *nats.Msg, RequestChanLen)}
	c.mu.Lock()
	c.buckets[token] = b
	c.mu.Unlock()

	if err := c.Conn.PublishRequest(subject, c.inbox+"."+token, data); err != nil {
		return nil, err
	}
	results := make(chan *Result)
	go c.read(ctx, token, b, results)
	return results, nil
}

func (c *Client) read(ctx context.Context, token string, b *bucket, results chan<- *Result) {
	defer func() {
		c.mu.Lock()
		delete(c.buckets, token)
		c.mu.Unlock()
		close(results)
	}()
	for msg := range b.ch {
		if ctx.Err() != nil {
			return
		}
		var m StreamingMsg
		if err := json.Unmarshal(msg.Data, &m); err != nil {
			results <- &Result{Err: &CloseError{Code: CloseUnsupportedData, Text: err.Error()}}
			return
		}
		switch m.Type {
		case CloseMsg:
			if m.CloseError.Code != CloseNormalClosure {
				results <- &Result{Err: m.CloseError}
			}
			return
		default:
			results <- &Result{Value: m.Data}
		}
	}
}

// Writer answers a request with records.
type Writer struct {
	client  *Client
	subject string

	mu     sync.Mutex
	closed bool
}

// NewWriter returns a writer to the reply subject of a request.
func NewWriter(client *Client, subject string) *Writer {
	return &Writer{client: client, subject: subject}
}

// Write publishes p as one record. Like the design it returns the length of the
// encoded message.
func (w *Writer) Write(p []byte) (int, error) {
	return w.publish(&StreamingMsg{Type: DataMsg, Data: p})
}

// Close ends the stream with CloseNormalClosure.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return errors.New("nats stream: closed")
	}
	w.closed = true
	_, err := w.publish(&StreamingMsg{Type: CloseMsg, CloseError: &CloseError{Code: CloseNormalClosure}})
	return err
}

func (w *Writer) publish(m *StreamingMsg) (int, error) {
	b, err := json.Marshal(m)
	if err != nil {
		return 0, err
	}
	return len(b), w.client.Conn.Publish(w.subject, b)
}
