package tap

import (
	"net"
	"sync/atomic"
)

// Conn is a connection to a NATS server between nats.go and the network. Read may be called by one goroutine at a time,
// nats.go's reader, which also runs takes. nats.go's writers run subscribe, with outgoing.mu held.
type Conn struct {
	net.Conn
	dialer *Dialer
	taken  atomic.Pointer[[]takenSub] // replaced by Write, read by Read
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
func (c *Conn) subscribe(subject []byte, sid int64) {
	s := c.dialer.sub(subject)
	if s == nil {
		return
	}
	var taken []takenSub
	if old := c.taken.Load(); old != nil {
		for _, t := range *old {
			if t.sid != sid && !t.sub.closed.Load() {
				taken = append(taken, t)
			}
		}
	}
	taken = append(taken, takenSub{sid, s})
	c.taken.Store(&taken)
	s.conn.Store(c)
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
