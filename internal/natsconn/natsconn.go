// Package natsconn is the seam between this module and nats.go: the few calls that an endpoint makes on a connection.
// The seam exists for tests of time. Package fake implements it in memory, because testing/synctest cannot see whether
// a goroutine waits for a socket.
package natsconn

import (
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/slab"
	"github.com/natsstream/stream/internal/tap"
)

// Conn is one NATS connection, as an endpoint uses it. All methods except Lend and Recall may be called concurrently.
type Conn interface {
	// Publish sends data to subject, with a reply subject unless reply is empty. It may block for as long as the
	// connection does. Only the outbox calls it, the callback that answers questions about services, and the goroutines
	// that probe the inbox. The message may wait for Push or Flush.
	Publish(subject, reply string, data []byte) error
	// Push sends the published messages that wait. It blocks as Publish does.
	Push()
	// Lend is Publish for a packet that others probably follow at once. If it reports kept, the message waits, and the
	// connection refers to data until Recall has returned. Until then, data must not change. Recall sends the messages
	// that wait, if Lend has kept one, and blocks as Publish does. Only the outbox calls both.
	Lend(subject string, data []byte) (kept bool, err error)
	Recall()
	// TakesNow reports whether PublishNow could send a message: the connection is fast, over plain TCP, and no message
	// waits for it. PublishNow sends data to subject if it can do so without waiting, and reports whether it did. If it
	// also reports rest, a part of the message waits for Push. Any goroutine may call both. They take no lock that is
	// held while the connection takes no bytes.
	TakesNow() bool
	PublishNow(subject string, data []byte) (sent, rest bool)
	// PublishMsg sends a message with headers. It blocks as Publish does.
	PublishMsg(m *nats.Msg) error
	// Subscribe calls f for one message after the other until unsubscribe has returned. unsubscribe first waits until f
	// has all messages that the server sent, for at most UnsubscribeTimeout. queue is a queue group, or empty.
	Subscribe(subject, queue string, f nats.MsgHandler) (unsubscribe func(), err error)
	// SubscribeInbox is Subscribe for packets of streams. On a fast connection f gets messages out of buffers that are
	// used again: the message and its subject are valid until f returns, and its data until lent.Release, which must be
	// called once. If lent is nil, all of it is valid for ever. f runs in the goroutine that reads the connection, or
	// in that of the subscription if nats.go delivers the message. It must not block.
	SubscribeInbox(subject string, f func(m *nats.Msg, lent *slab.Slab)) (inbox Inbox, err error)
	// Flush returns when the server has received all messages that were sent before, and has sent all errors about
	// them, or after the timeout.
	Flush(timeout time.Duration) error
	// OnError calls f for each error that the server reports and no call returns, until stop.
	OnError(f func(error)) (stop func())
	// StatusChanges delivers changes of status until stop. It drops a change if ten are waiting.
	StatusChanges() (changes <-chan nats.Status, stop func())
	// LastError returns the last error that the server reported, which OnError may report a moment later. It is the
	// same value there.
	LastError() error
	// Status and MaxPayload take the connection's lock, which nats.go holds while a peer takes no bytes. So the
	// endpoint's own goroutines call them, and calls of the user read the values that the endpoint remembers. Only
	// calls that make or close an endpoint, or serve a subject, call Status or MaxPayload themselves.
	Status() nats.Status
	MaxPayload() int64
}

// MostNow is the size of the longest message for PublishNow, in bytes.
const MostNow = tap.MostNow

// Inbox is a subscription that SubscribeInbox made. Unsubscribe is that of Subscribe. Fast reports whether its messages
// take the fast way now.
type Inbox struct {
	Unsubscribe func()
	Fast        func() bool
}

// conn is the real implementation.
type conn struct{ nc *nats.Conn }

// fastConn is the real implementation over a fast connection.
type fastConn struct {
	conn
	dialer *tap.Dialer
	inbox  atomic.Pointer[tap.Sub] // the last one
	proven atomic.Pointer[proven]  // by the last message of Publish or Lend; nil before
	lender *tap.Conn               // has kept data of Lend since the last Recall; nil if none has. Owned by the outbox
}

// proven is a connection for PublishNow. A reconnect leads to another connection, to a server that may take less.
type proven struct {
	conn       *tap.Conn
	maxPayload int64
}

// New returns the Conn that is nc.
func New(nc *nats.Conn) Conn {
	if d := tap.Of(nc); d != nil {
		return &fastConn{conn: conn{nc}, dialer: d}
	}
	return conn{nc}
}

// maxSubjects is the largest length of a subject and a reply subject together. Over a longer control line, a NATS
// server closes the connection, and so all its streams. By default a control line has 4,096 bytes, of which 32 are for
// sizes.
const maxSubjects = 4096 - 32

// CheckSubjects returns an error that wraps nats.ErrBadSubject if a subject and a reply subject of n bytes together are
// too long for a NATS server.
func CheckSubjects(n int) error {
	if n > maxSubjects {
		return fmt.Errorf("subject and reply subject of %d bytes, a server takes %d: %w", n, maxSubjects, nats.ErrBadSubject)
	}
	return nil
}

func (c conn) Publish(subject, reply string, data []byte) error {
	if err := CheckSubjects(len(subject) + len(reply)); err != nil {
		return err
	}
	if reply == "" {
		return c.nc.Publish(subject, data)
	}
	return c.nc.PublishRequest(subject, reply, data)
}

// Publish writes packets between the commands of nats.go if nats.go is connected and would accept the message. A packet
// may overtake messages that nats.go buffers. Messages of the fallback have no numbers: they all go through nats.go,
// which keeps their order.
func (c *fastConn) Publish(subject, reply string, data []byte) error {
	if t, most := c.taker(len(subject)+len(reply), data); t != nil && t.Publish(subject, reply, nil, data) {
		c.prove(t, most)
		return nil
	}
	return c.conn.Publish(subject, reply, data)
}

// taker returns the connection for a packet past nats.go, nil if there is none, and the max_payload of its server or of
// a later one. The subjects have n bytes.
func (c *fastConn) taker(n int, data []byte) (t *tap.Conn, most int64) {
	if t = c.tapped(); t == nil || len(data) == 0 || data[0] != packetMagic {
		return nil, 0
	}
	if most = c.nc.MaxPayload(); int64(len(data)) > most || CheckSubjects(n) != nil {
		return nil, 0
	}
	return t, most
}

// prove notes that t has taken a message.
func (c *fastConn) prove(t *tap.Conn, most int64) {
	if p := c.proven.Load(); p == nil || p.conn != t || p.maxPayload != most {
		c.proven.Store(&proven{t, most})
	}
}

// Lend keeps data of at most one connection, which may no longer be the present one at Recall.
func (c *fastConn) Lend(subject string, data []byte) (kept bool, err error) {
	t, most := c.taker(len(subject), data)
	if c.lender != t {
		c.Recall()
	}
	if t != nil {
		if published, kept := t.Lend(subject, data); published {
			c.prove(t, most)
			if kept {
				c.lender = t
			}
			return kept, nil
		}
	}
	return false, c.conn.Publish(subject, "", data)
}

func (c *fastConn) Recall() {
	if c.lender != nil {
		c.lender.Recall()
		c.lender = nil
	}
}

// PublishMsg writes requests as Publish does packets, if nothing waits in nats.go: a request must not overtake the
// subscriptions and messages that the program sent before it. They may be those of the server that it is for.
func (c *fastConn) PublishMsg(m *nats.Msg) error {
	if t := c.tapped(); t != nil && int64(m.Size()) <= c.nc.MaxPayload() && CheckSubjects(len(m.Subject)+len(m.Reply)) == nil && c.nc.HeadersSupported() {
		if n, err := c.nc.Buffered(); n == 0 && err == nil && t.Publish(m.Subject, m.Reply, m.Header, m.Data) {
			return nil
		}
	}
	return c.conn.PublishMsg(m)
}

func (c *fastConn) Push() {
	if t := c.tapped(); t != nil {
		t.Push()
	}
}

// packetMagic is the first byte of every packet. No message of the fallback begins with it.
const packetMagic = 0xF5

// tapped returns the connection that the inbox is subscribed on, nil if there is none.
func (c *fastConn) tapped() *tap.Conn {
	if s := c.inbox.Load(); s != nil {
		return s.Conn()
	}
	return nil
}

func (c *fastConn) TakesNow() bool {
	p := c.proven.Load()
	return p != nil && p.conn == c.tapped() && p.conn.TakesNow()
}

// PublishNow uses only a connection that has taken a message of Publish or Lend: these have asked nats.go how much the
// server takes, and a lock of nats.go keeps PublishNow from asking.
func (c *fastConn) PublishNow(subject string, data []byte) (sent, rest bool) {
	p := c.proven.Load()
	if p == nil || p.conn != c.tapped() || int64(len(data)) > p.maxPayload || CheckSubjects(len(subject)) != nil {
		return false, false
	}
	return p.conn.PublishNow(subject, data)
}

// Push does nothing: the flusher of nats.go sends soon.
func (c conn) Push() {}

// Lend is Publish: nats.go copies data.
func (c conn) Lend(subject string, data []byte) (kept bool, err error) {
	return false, c.Publish(subject, "", data)
}

func (c conn) Recall() {}

// TakesNow reports false: nats.go hands each message to its flusher, and may wait for a lock before.
func (c conn) TakesNow() bool { return false }

func (c conn) PublishNow(string, []byte) (sent, rest bool) { return false, false }

func (c conn) PublishMsg(m *nats.Msg) error { return c.nc.PublishMsg(m) }

func (c conn) Flush(timeout time.Duration) error { return c.nc.FlushTimeout(timeout) }

// UnsubscribeTimeout bounds the wait for a connection that takes no bytes.
const UnsubscribeTimeout = 2 * time.Second

func (c conn) Subscribe(subject, queue string, f nats.MsgHandler) (func(), error) {
	_, unsubscribe, err := c.subscribe(subject, queue, f)
	return unsubscribe, err
}

func (c conn) subscribe(subject, queue string, f nats.MsgHandler) (sub *nats.Subscription, unsubscribe func(), err error) {
	if sub, err = c.nc.QueueSubscribe(subject, queue, f); err != nil {
		return nil, nil, err
	}
	// Credit bounds the pending messages here, stream by stream. The default limits bound all streams together, and
	// drop the newest message of any stream.
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		_ = sub.Unsubscribe()
		return nil, nil, err
	}
	closed := make(chan struct{})
	sub.SetClosedHandler(func(string) { close(closed) })
	return sub, func() {
		if sub.Drain() == nil {
			select {
			case <-closed:
				return
			case <-time.After(UnsubscribeTimeout):
			}
		}
		_ = sub.Unsubscribe() // fails if the connection has dropped the subscription already
	}, nil
}

func (c conn) SubscribeInbox(subject string, f func(*nats.Msg, *slab.Slab)) (Inbox, error) {
	unsubscribe, err := c.Subscribe(subject, "", func(m *nats.Msg) { f(m, nil) })
	return Inbox{unsubscribe, func() bool { return false }}, err
}

func (c *fastConn) SubscribeInbox(subject string, f func(*nats.Msg, *slab.Slab)) (Inbox, error) {
	sub := c.dialer.Register(c.nc, subject, f)
	c.inbox.Store(sub)
	unsubscribe, err := c.Subscribe(subject, "", sub.Deliver)
	if err != nil {
		sub.Close()
		return Inbox{}, err
	}
	return Inbox{func() { unsubscribe(); sub.Close() }, sub.Taken}, nil
}

// SubscribeRequests is Subscribe for requests. On a fast connection f may run in the goroutine that reads the
// connection, so it must not block. header has the bytes of the headers, and is nil if m.Header has them or if there
// are none. The message and header are valid until f returns, the strings and the data in the message for ever.
func SubscribeRequests(c Conn, subject, queue string, f func(m *nats.Msg, header []byte)) (unsubscribe func(), err error) {
	fast, ok := c.(*fastConn)
	if !ok {
		return c.Subscribe(subject, queue, func(m *nats.Msg) { f(m, nil) })
	}
	s := fast.dialer.NewRequests(fast.nc, subject, f)
	sub, end, err := fast.subscribe(subject, queue, s.Deliver)
	if err != nil {
		return nil, err
	}
	s.Take(sub)
	return func() { end(); s.Close() }, nil
}

func (c conn) LastError() error { return c.nc.LastError() }

func (c conn) Status() nats.Status { return c.nc.Status() }
func (c conn) MaxPayload() int64   { return c.nc.MaxPayload() }

func (c conn) StatusChanges() (<-chan nats.Status, func()) {
	ch := c.nc.StatusChanged(nats.CONNECTED, nats.RECONNECTING, nats.DISCONNECTED, nats.DRAINING_SUBS, nats.DRAINING_PUBS, nats.CLOSED)
	return ch, func() { c.nc.RemoveStatusListener(ch) }
}
