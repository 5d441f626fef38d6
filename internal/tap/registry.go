package tap

import (
	"reflect"
	"sync"
	"sync/atomic"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/slab"
)

// This file registers subscriptions. Any goroutine may run it, but nats.go runs Deliver in the goroutine of the
// subscription, and nats.go's writers run subscribe. Dialer.mu guards the maps of the subscriptions.

// Handler receives a message of a subscription. It runs in the goroutine that reads the connection or in Deliver, with
// Sub.mu held, so it must not block. The message and its Subject are valid until Handler returns. m.Data is valid until
// lent.Release if lent is not nil, and for ever otherwise. Data of a message that is lent has the capacity of its
// length.
type Handler func(m *nats.Msg, lent *slab.Slab)

// RequestHandler receives a message of a subscription. It runs as Handler does. header has the bytes of the headers,
// and is nil if m.Header has them or if there are none. The message and header are valid until RequestHandler returns,
// the strings and the data in the message for ever.
type RequestHandler func(m *nats.Msg, header []byte)

// user is a connection of nats.go with subscriptions that are taken. Dialer.mu guards its fields.
type user struct {
	subs     int            // that are registered; without any, the Dialer forgets the user
	conn     *Conn          // that last sent one of the inboxes, nil if none did
	requests map[int64]*Sub // by the number of the subscription, which is unique for this user only
}

// Sub is a subscription with messages that a connection takes out of its stream. It also takes the messages that
// nats.go delivers, for a connection that is not tapped.
type Sub struct {
	dialer  *Dialer
	nc      *nats.Conn
	subject string

	user *user // nil if the subscription is not registered. Guarded by Dialer.mu
	sid  int64 // the number of the subscription if it is one for requests. Guarded by Dialer.mu

	mu       sync.Mutex // held while the handler runs: a new connection may begin before nats.go has delivered all of the old one
	handler  Handler
	requests RequestHandler // instead of handler
	closed   atomic.Bool    // it has no handler any more

	conn atomic.Pointer[Conn] // that last sent the inbox to the server
}

// registerLocked counts s as a subscription of its user.
func (s *Sub) registerLocked() {
	d := s.dialer
	if s.user = d.users[s.nc]; s.user == nil {
		s.user = &user{requests: make(map[int64]*Sub)}
		if d.users == nil {
			d.users = make(map[*nats.Conn]*user)
		}
		d.users[s.nc] = s.user
	}
	s.user.subs++
}

// Register makes connections of nc, which d dials, take the messages of the inbox with the given subject from when
// nats.go sends its subscription to the server. The name of an inbox is random, so no other connection of nats.go sends
// it. A subject has one Sub at a time: a second one replaces the first when nats.go subscribes again.
func (d *Dialer) Register(nc *nats.Conn, subject string, h Handler) *Sub {
	s := &Sub{dialer: d, nc: nc, subject: subject, handler: h}
	d.mu.Lock()
	defer d.mu.Unlock()
	s.registerLocked()
	if d.inboxes == nil {
		d.inboxes = make(map[string]*Sub)
	}
	d.inboxes[subject] = s
	return s
}

// NewRequests returns a Sub for a subscription of nc to subject that nats.go is about to make. Its Deliver is the
// callback of the subscription.
func (d *Dialer) NewRequests(nc *nats.Conn, subject string, h RequestHandler) *Sub {
	return &Sub{dialer: d, nc: nc, subject: subject, requests: h}
}

// Take makes connections take the messages of s, which is the subscription sub of nats.go, from when they have sent an
// inbox of the same connection of nats.go. Others may have subscribed to the same subject, so its number tells s from
// theirs. nats.go does not export the number. If it is not found, nats.go goes on delivering the messages.
func (s *Sub) Take(sub *nats.Subscription) {
	sid := reflect.ValueOf(sub).Elem().FieldByName("sid")
	if sid.Kind() != reflect.Int64 {
		return
	}
	d := s.dialer
	d.mu.Lock()
	defer d.mu.Unlock()
	s.registerLocked()
	s.sid = sid.Int()
	s.user.requests[s.sid] = s
	if c := s.user.conn; c != nil {
		c.requests.Store(s.sid, s)
	}
}

// subscribe makes Read take the messages of an inbox that is about to be sent, if it is registered. The inbox tells
// which connection of nats.go sends it, so Read takes the requests of this one as well. Other connections of nats.go
// have the same numbers for other subscriptions. nats.go's writers run subscribe, with outgoing.mu held.
func (c *Conn) subscribe(subject, queue []byte, sid int64) {
	d := c.dialer
	d.mu.Lock()
	defer d.mu.Unlock()
	s := d.inboxes[string(subject)]
	if s == nil || len(queue) > 0 || c.nc != nil && c.nc != s.nc {
		return
	}
	c.takeInboxLocked(sid, s)
	s.conn.Store(c)
	c.nc = s.nc
	if s.user.conn != c {
		s.user.conn = c
		for sid, r := range s.user.requests {
			c.requests.Store(sid, r)
		}
	}
}

// Close returns when the handler has returned, and no message is handed to it from then on. Nothing refers to the
// handler then.
func (s *Sub) Close() {
	s.mu.Lock()
	s.handler, s.requests = nil, nil
	s.closed.Store(true)
	s.mu.Unlock()
	d := s.dialer
	d.mu.Lock()
	defer d.mu.Unlock()
	u := s.user
	if u == nil {
		return
	}
	s.user = nil
	if d.inboxes[s.subject] == s {
		delete(d.inboxes, s.subject)
	}
	if c := s.conn.Load(); c != nil {
		c.leaveInboxLocked(s)
	}
	if u.requests[s.sid] == s {
		delete(u.requests, s.sid)
		if u.conn != nil {
			u.conn.requests.Delete(s.sid)
		}
	}
	if u.subs--; u.subs == 0 {
		delete(d.users, s.nc)
	}
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
