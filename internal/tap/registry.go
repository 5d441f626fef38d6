package tap

import (
	"reflect"
	"sync"
	"sync/atomic"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/slab"
)

// This file registers subscriptions. Any goroutine may run it, but nats.go runs Deliver in the goroutine of the
// subscription. Dialer.mu guards the map of the subscriptions.

// Handler receives a message of a subscription. It runs in the goroutine that reads the connection or in Deliver, with
// Sub.mu held, so it must not block. The message and its Subject are valid until Handler returns. m.Data is valid until
// lent.Release if lent is not nil, and for ever otherwise. Data of a message that is lent has the capacity of its
// length.
type Handler func(m *nats.Msg, lent *slab.Slab)

// RequestHandler receives a message of a subscription. It runs as Handler does. header has the bytes of the headers,
// and is nil if m.Header has them or if there are none. The message and header are valid until RequestHandler returns,
// the strings and the data in the message for ever.
type RequestHandler func(m *nats.Msg, header []byte)

// Sub is a subscription with messages that a connection takes out of its stream. It also takes the messages that
// nats.go delivers, for a connection that is not tapped.
type Sub struct {
	dialer  *Dialer
	nc      *nats.Conn
	subject string
	sid     int64 // the number of the subscription if requests is set

	mu       sync.Mutex // held while the handler runs: a new connection may begin before nats.go has delivered all of the old one
	handler  Handler
	requests RequestHandler // instead of handler
	closed   atomic.Bool

	conn atomic.Pointer[Conn] // that last sent the subscription to the server
}

// Register makes connections of nc, which d dials, take the messages of the subscription to subject from when nats.go
// sends it to the server. A subject has one Sub at a time: a second one replaces the first when nats.go subscribes
// again.
func (d *Dialer) Register(nc *nats.Conn, subject string, h Handler) *Sub {
	s := &Sub{dialer: d, nc: nc, subject: subject, handler: h}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.subs == nil {
		d.subs = make(map[string]*Sub)
	}
	d.subs[subject] = s
	return s
}

// NewRequests returns a Sub for a subscription of nc to subject that nats.go is about to make. Its Deliver is the
// callback of the subscription.
func (d *Dialer) NewRequests(nc *nats.Conn, subject string, h RequestHandler) *Sub {
	return &Sub{dialer: d, nc: nc, subject: subject, requests: h}
}

// Take makes connections take the messages of s, which is the subscription sub of nats.go. Others may have subscribed
// to the same subject, so its number tells s from theirs. nats.go does not export the number. If it is not found,
// nats.go goes on delivering the messages.
func (s *Sub) Take(sub *nats.Subscription) {
	sid := reflect.ValueOf(sub).Elem().FieldByName("sid")
	if sid.Kind() != reflect.Int64 {
		return
	}
	d := s.dialer
	d.mu.Lock()
	defer d.mu.Unlock()
	s.sid = sid.Int()
	if d.requests == nil {
		d.requests = make(map[int64]*Sub)
	}
	d.requests[s.sid] = s
	if d.latest != nil { // it may have sent the subscription already
		d.latest.take(s.sid, s)
	}
}

// sub returns the subscription that nats.go sends to the server, nil if its messages are not taken.
func (d *Dialer) sub(subject, queue []byte, sid int64) *Sub {
	d.mu.Lock()
	defer d.mu.Unlock()
	if s := d.requests[sid]; s != nil || len(queue) > 0 {
		return s
	}
	return d.subs[string(subject)]
}

// Close returns when the handler has returned, and no message is handed to it from then on.
func (s *Sub) Close() {
	d := s.dialer
	d.mu.Lock()
	if d.subs[s.subject] == s {
		delete(d.subs, s.subject)
	}
	if d.requests[s.sid] == s {
		delete(d.requests, s.sid)
	}
	d.mu.Unlock()
	s.mu.Lock()
	s.closed.Store(true)
	s.mu.Unlock()
}

// Deliver is the callback for nats.go, for messages that no connection took.
func (s *Sub) Deliver(m *nats.Msg) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed.Load():
	case s.requests != nil:
		s.requests(m, nil)
	default:
		s.handler(m, nil)
	}
}

// Conn returns the connection that last sent the subscription to the server, nil if none did. It may have ended.
func (s *Sub) Conn() *Conn { return s.conn.Load() }

// Taken reports whether the present connection takes the messages of s past nats.go.
func (s *Sub) Taken() bool {
	c := s.conn.Load()
	return c != nil && !s.closed.Load() && !c.in.opaque.Load() && !c.closed.Load()
}
