package tap

import (
	"net"
	"slices"
	"sync/atomic"
)

// Conn is a connection to a NATS server between nats.go and the network. Read may be called by one goroutine at a time,
// nats.go's reader, which also runs takes. nats.go's writers run subscribe, with outgoing.mu held. Any goroutine may
// run take.
type Conn struct {
	net.Conn
	dialer *Dialer
	taken  atomic.Pointer[[]takenSub] // replaced by take, read by Read
	closed atomic.Bool

	in  incoming // of the goroutine in Read
	out outgoing
}

// takenSub is a subscription with messages that Read takes.
type takenSub struct {
	sid int64
	sub *Sub
}

// newConn returns a connection over raw. Bytes that were read from raw before are in read.
func newConn(d *Dialer, raw net.Conn, read []byte) *Conn {
	c := &Conn{Conn: raw, dialer: d}
	c.in.init(c, read)
	c.out.now.init(raw)
	d.mu.Lock()
	d.latest = c
	d.mu.Unlock()
	return c
}

// Read returns bytes that nats.go has to see. Before, it hands the messages of taken subscriptions to their handlers.
func (c *Conn) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for {
		if n := c.in.next(p); n > 0 {
			return n, nil
		}
		if err := c.in.fill(); err != nil {
			if !c.in.abandon() {
				return 0, err
			}
		}
	}
}

// subscribe makes Read take the messages of a subscription that is about to be sent, if it is registered.
func (c *Conn) subscribe(subject, queue []byte, sid int64) {
	if s := c.dialer.sub(subject, queue, sid); s != nil {
		c.take(sid, s)
		s.conn.Store(c)
	}
}

// take makes Read take the messages of subscription sid. Inboxes come first in the list, because they get most
// messages.
func (c *Conn) take(sid int64, s *Sub) {
	for {
		old := c.taken.Load()
		var taken []takenSub
		if old != nil {
			for _, t := range *old {
				if t.sid != sid && !t.sub.closed.Load() {
					taken = append(taken, t)
				}
			}
		}
		at := len(taken)
		if s.requests == nil {
			at = 0
		}
		taken = slices.Insert(taken, at, takenSub{sid, s})
		if c.taken.CompareAndSwap(old, &taken) {
			return
		}
	}
}

// takes returns the subscription with the given number if its messages are taken, and nil otherwise.
func (c *Conn) takes(sid int64) *Sub {
	if taken := c.taken.Load(); taken != nil {
		for _, t := range *taken {
			if t.sid == sid && !t.sub.closed.Load() {
				return t.sub
			}
		}
	}
	return nil
}

// Close closes the connection.
func (c *Conn) Close() error {
	c.closed.Store(true)
	return c.Conn.Close()
}
