package tap

import (
	"net"
	"sync/atomic"

	"github.com/nats-io/nats.go"
	"github.com/puzpuzpuz/xsync/v3"
)

// Conn is a connection to a NATS server between nats.go and the network. Read may be called by one goroutine at a time,
// nats.go's reader, which also runs takes. Dialer.mu is held while the taken subscriptions change.
type Conn struct {
	net.Conn
	dialer *Dialer
	closed atomic.Bool

	nc       *nats.Conn                   // that has the connection, nil before it sends an inbox. Guarded by Dialer.mu
	inboxes  atomic.Pointer[[]takenInbox] // replaced as a whole
	requests *xsync.MapOf[int64, *Sub]    // by the number of the subscription: there may be thousands

	in  incoming // of the goroutine in Read
	out outgoing
}

// takenInbox is an inbox with messages that Read takes.
type takenInbox struct {
	sid int64
	sub *Sub
}

// newConn returns a connection over raw. Bytes that were read from raw before are in read.
func newConn(d *Dialer, raw net.Conn, read []byte) *Conn {
	c := &Conn{Conn: raw, dialer: d, requests: xsync.NewMapOf[int64, *Sub]()}
	c.in.init(c, read)
	c.out.now.init(raw)
	c.out.timeout = d.opts.FlusherTimeout
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

// takeInboxLocked makes Read take the messages of inbox s.
func (c *Conn) takeInboxLocked(sid int64, s *Sub) {
	taken := append(c.otherInboxes(s), takenInbox{sid, s})
	c.inboxes.Store(&taken)
}

// leaveInboxLocked makes Read leave the messages of inbox s to nats.go.
func (c *Conn) leaveInboxLocked(s *Sub) {
	taken := c.otherInboxes(s)
	c.inboxes.Store(&taken)
}

// otherInboxes returns a copy of the list of inboxes without s.
func (c *Conn) otherInboxes(s *Sub) (others []takenInbox) {
	if taken := c.inboxes.Load(); taken != nil {
		for _, t := range *taken {
			if t.sub != s {
				others = append(others, t)
			}
		}
	}
	return others
}

// takes returns the subscription with the given number if its messages are taken, and nil otherwise. Inboxes come
// first, because they get most messages.
func (c *Conn) takes(sid int64) *Sub {
	if taken := c.inboxes.Load(); taken != nil {
		for _, t := range *taken {
			if t.sid == sid {
				return t.sub
			}
		}
	}
	s, _ := c.requests.Load(sid)
	return s
}

// Close closes the connection.
func (c *Conn) Close() error {
	c.closed.Store(true)
	return c.Conn.Close()
}
