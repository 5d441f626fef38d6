// Package fake implements natsconn.Conn in memory, for tests. Connections to one Bus reach each other through it. New
// returns a connection without a bus: it hands published messages to functions of the test, and the test delivers
// messages by hand.
//
// All waiting in this package is durable in the sense of testing/synctest, so time passes in a bubble.
package fake

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn"
	"github.com/natsstream/stream/internal/slab"
)

// MaxPayload is the largest payload, in bytes, that connections report for their server, unless SetMaxPayload changes
// it.
const MaxPayload = 1 << 20

// Bus is a NATS server in memory. It knows subjects, a wildcard as their last token, queue groups and the 503 of a
// subject that nobody listens on. The zero value is ready for use.
type Bus struct {
	Delay time.Duration // of every message; set it before there is any

	mu     sync.Mutex
	subs   []*subscription
	turn   int // of queue groups' members
	filter Filter
}

// Filter reports whether the bus delivers m, which from published, to to. A message that it holds back is lost on the
// way: the server has taken it, so nobody is told. from is nil for messages of the server itself. The bus is locked
// during the call, so calls come one at a time. Of an envelope it sees the packets, one after the other, as if each had
// come alone. The bus takes those out that it holds back.
type Filter func(from, to *Conn, m *nats.Msg) bool

// BlackHole loses everything from one connection to the other. Either may be nil, for any.
func BlackHole(from, to *Conn) Filter {
	return func(f, t *Conn, _ *nats.Msg) bool {
		return from != nil && f != from || to != nil && t != to
	}
}

// SetFilter makes the bus ask f about every message from now on. nil lets all pass.
func (b *Bus) SetFilter(f Filter) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.filter = f
}

// Connect returns a connection to the bus, which is up.
func (b *Bus) Connect(name string) *Conn {
	c := New()
	c.Name, c.bus = name, b
	return c
}

// Conn is one connection. The exported fields are to be set before it is used.
type Conn struct {
	Name string

	// Published is called for each message without headers that is published. Its error is that of the publish. On a
	// bus, the bus gets the message afterwards. data is not to be kept.
	Published func(subject, reply string, data []byte) error
	// Requested is called in the same way for messages with headers, which are not to be kept. If it is nil, Published
	// gets them.
	Requested func(*nats.Msg) error
	// Now plays a connection with PublishNow. nil stands for one without. A message that it sends is then published as
	// any other.
	Now func(subject string, data []byte) (sent, rest bool)
	// Wrote is called with the number of packets of Lend that go out together. The connection is locked meanwhile.
	Wrote func(packets int)
	// Refuse is asked about each subscription. If it returns an error, the server refuses the subscription as NATS
	// does: Subscribe succeeds, nothing is delivered, and the error is reported.
	Refuse func(subject, queue string) error

	bus        *Bus // nil for a connection of its own
	state      atomic.Int64
	maxPayload atomic.Int64

	sending sync.Mutex // guards loans. Held while they go to the bus
	loans   []loan     // in the order of Lend

	mu      sync.Mutex
	receive nats.MsgHandler // of the first subscription, for Deliver
	changes []chan nats.Status
	onError map[int]func(error)
	next    int
	last    error // of those reported
}

// New returns a connection without a bus, which is up.
func New() *Conn {
	c := &Conn{onError: make(map[int]func(error))}
	c.state.Store(int64(nats.CONNECTED))
	c.maxPayload.Store(MaxPayload)
	return c
}

// loan is a packet of Lend that waits.
type loan struct {
	subject    string
	data, copy []byte
}

// mostLent is how many packets wait for Recall at most.
const mostLent = 3

// subscription is one subscription on a bus. Its goroutine ends with unsubscribe.
type subscription struct {
	conn           *Conn
	subject, queue string
	f              nats.MsgHandler
	mu             sync.Mutex
	filled         sync.Cond
	pending        []*nats.Msg
	at             []time.Time // when they arrive
	closed         bool
	ended          chan struct{}
}

// matches reports whether a message to subject goes to a subscription of pattern.
func matches(pattern, subject string) bool {
	prefix, ok := strings.CutSuffix(pattern, "*")
	if !ok {
		return pattern == subject
	}
	last, ok := strings.CutPrefix(subject, prefix)
	return ok && last != "" && !strings.Contains(last, ".")
}

// Publish implements natsconn.Conn. It fails with nats.ErrConnectionClosed on a bus once the connection is closed. On a
// bus, a message that is published while the connection is down is lost. A message that is larger than the server takes
// fails with nats.ErrMaxPayload before anybody sees it.
func (c *Conn) Publish(subject, reply string, data []byte) error {
	if !c.fits(data) {
		return nats.ErrMaxPayload
	}
	if c.Published != nil {
		if err := c.Published(subject, reply, data); err != nil {
			return err
		}
	}
	c.Recall()
	if c.bus == nil {
		return nil
	}
	return c.bus.publish(c, &nats.Msg{Subject: subject, Reply: reply, Data: data})
}

// TakesNow implements natsconn.Conn.
func (c *Conn) TakesNow() bool { return c.Now != nil && c.isUp() }

// PublishNow implements natsconn.Conn.
func (c *Conn) PublishNow(subject string, data []byte) (sent, rest bool) {
	if !c.TakesNow() {
		return false, false
	}
	if sent, rest = c.Now(subject, data); !sent {
		return false, false
	}
	return c.Publish(subject, "", data) == nil, rest
}

// Push implements natsconn.Conn: nothing waits.
func (c *Conn) Push() {}

// Lend implements natsconn.Conn. It keeps packets of all sizes. Published is called at once.
func (c *Conn) Lend(subject string, data []byte) (kept bool, err error) {
	if !c.isUp() {
		return false, c.Publish(subject, "", data)
	}
	if !c.fits(data) {
		return false, nats.ErrMaxPayload
	}
	if c.Published != nil {
		if err := c.Published(subject, "", data); err != nil {
			return false, err
		}
	}
	c.sending.Lock()
	defer c.sending.Unlock()
	c.loans = append(c.loans, loan{subject, data, bytes.Clone(data)})
	if len(c.loans) < mostLent {
		return true, nil
	}
	c.recallLocked()
	return false, nil
}

// Recall implements natsconn.Conn. It panics if a packet has changed since Lend.
func (c *Conn) Recall() {
	c.sending.Lock()
	defer c.sending.Unlock()
	c.recallLocked()
}

func (c *Conn) recallLocked() {
	for _, l := range c.loans {
		if !bytes.Equal(l.data, l.copy) {
			panic(fmt.Sprintf("fake: a packet to %s changed before Recall", l.subject))
		}
		if c.bus != nil {
			_ = c.bus.publish(c, &nats.Msg{Subject: l.subject, Data: l.data})
		}
	}
	if n := len(c.loans); n > 0 && c.Wrote != nil {
		c.Wrote(n)
	}
	c.loans = nil
}

// PublishMsg implements natsconn.Conn as Publish does.
func (c *Conn) PublishMsg(m *nats.Msg) (err error) {
	if !c.fits(m.Data) {
		return nats.ErrMaxPayload
	}
	switch {
	case c.Requested != nil:
		err = c.Requested(m)
	case c.Published != nil:
		err = c.Published(m.Subject, m.Reply, m.Data)
	}
	if err != nil {
		return err
	}
	c.Recall()
	if c.bus == nil {
		return nil
	}
	return c.bus.publish(c, m)
}

func (b *Bus) publish(c *Conn, m *nats.Msg) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c.Status() == nats.CLOSED {
		return nats.ErrConnectionClosed
	}
	if !c.isUp() {
		return nil // lost
	}
	heard := false
	groups := make(map[string][]*subscription)
	for _, sub := range b.subs {
		if !matches(sub.subject, m.Subject) || !sub.conn.isUp() {
			continue
		}
		heard = true
		if sub.queue != "" {
			groups[sub.queue] = append(groups[sub.queue], sub)
			continue
		}
		b.deliverLocked(c, sub, m)
	}
	for _, name := range slices.Sorted(maps.Keys(groups)) {
		b.turn++
		b.deliverLocked(c, groups[name][b.turn%len(groups[name])], m)
	}
	if heard || m.Reply == "" {
		return nil
	}
	for _, sub := range b.subs { // nobody listens
		if sub.conn == c && matches(sub.subject, m.Reply) {
			b.deliverLocked(nil, sub, &nats.Msg{Subject: m.Reply, Header: nats.Header{"Status": {"503"}}})
		}
	}
	return nil
}

// passes asks the filter. It replaces the data of an envelope.
func (b *Bus) passes(from, to *Conn, m *nats.Msg) bool {
	prefix, ok := strings.CutSuffix(m.Subject, ".e")
	if !ok || len(m.Data) < packetHead || m.Data[0] != 0xF5 || m.Data[1]&4 == 0 {
		return b.filter(from, to, m)
	}
	left := bytes.Clone(m.Data[:packetHead])
	for rest := m.Data[packetHead:]; len(rest) > 0; {
		n := tokenSize + int(binary.BigEndian.Uint32(rest[tokenSize+12:]))
		if b.filter(from, to, &nats.Msg{Subject: prefix + "." + string(rest[:tokenSize]), Data: rest[tokenSize:n:n]}) {
			left = append(left, rest[:n]...)
		}
		rest = rest[n:]
	}
	binary.BigEndian.PutUint32(left[12:], uint32(len(left)))
	m.Data = left
	return len(left) > packetHead
}

// Sizes in an envelope, docs/PROTOCOL.md section 4.3.
const (
	packetHead = 16
	tokenSize  = 16
)

func (b *Bus) deliverLocked(from *Conn, sub *subscription, m *nats.Msg) {
	if b.filter != nil && !b.passes(from, sub.conn, m) {
		return
	}
	header := maps.Clone(m.Header)
	for key, values := range header {
		header[key] = slices.Clone(values)
	}
	sub.mu.Lock()
	defer sub.mu.Unlock()
	sub.pending = append(sub.pending, &nats.Msg{Subject: m.Subject, Reply: m.Reply, Header: header, Data: bytes.Clone(m.Data)})
	sub.at = append(sub.at, time.Now().Add(b.Delay))
	sub.filled.Signal()
}

// SubscribeInbox implements natsconn.Conn as Subscribe does: there is no fast way.
func (c *Conn) SubscribeInbox(subject string, f func(*nats.Msg, *slab.Slab)) (natsconn.Inbox, error) {
	unsubscribe, err := c.Subscribe(subject, "", func(m *nats.Msg) { f(m, nil) })
	return natsconn.Inbox{Unsubscribe: unsubscribe, Fast: func() bool { return false }}, err
}

// Subscribe implements natsconn.Conn. Without a bus, messages come from Deliver alone.
func (c *Conn) Subscribe(subject, queue string, f nats.MsgHandler) (func(), error) {
	if c.Refuse != nil {
		if err := c.Refuse(subject, queue); err != nil {
			c.Report(err)
			return func() {}, nil
		}
	}
	if c.bus == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.receive == nil {
			c.receive = f
		}
		return func() {}, nil
	}
	sub := &subscription{conn: c, subject: subject, queue: queue, f: f, ended: make(chan struct{})}
	sub.filled.L = &sub.mu
	b := c.bus
	b.mu.Lock()
	defer b.mu.Unlock()
	if c.Status() == nats.CLOSED {
		return nil, nats.ErrConnectionClosed
	}
	b.subs = append(b.subs, sub)
	go sub.run()
	return func() {
		b.mu.Lock()
		b.subs = slices.DeleteFunc(b.subs, func(s *subscription) bool { return s == sub })
		b.mu.Unlock()
		sub.mu.Lock()
		sub.closed = true
		sub.filled.Signal()
		sub.mu.Unlock()
		<-sub.ended
	}, nil
}

func (sub *subscription) run() {
	defer close(sub.ended)
	for {
		sub.mu.Lock()
		for len(sub.pending) == 0 && !sub.closed {
			sub.filled.Wait()
		}
		list, at := sub.pending, sub.at
		sub.pending, sub.at = nil, nil
		sub.mu.Unlock()
		if len(list) == 0 {
			return
		}
		for i, m := range list {
			time.Sleep(time.Until(at[i]))
			sub.f(m)
		}
	}
}

// Flush implements natsconn.Conn. A connection that is up has nothing to flush; one that is not waits in vain.
func (c *Conn) Flush(timeout time.Duration) error {
	if c.isUp() {
		return nil
	}
	time.Sleep(timeout)
	return nats.ErrTimeout
}

// Deliver calls the handler of the connection's first subscription with m. It is for connections without a bus. As with
// a real subscription, calls must not overlap.
func (c *Conn) Deliver(m *nats.Msg) {
	c.mu.Lock()
	f := c.receive
	c.mu.Unlock()
	f(m)
}

// OnError implements natsconn.Conn.
func (c *Conn) OnError(f func(error)) func() {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := c.next
	c.next++
	c.onError[id] = f
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.onError, id)
	}
}

// Report reports err in the way in which NATS reports errors that no call returns.
func (c *Conn) Report(err error) {
	c.mu.Lock()
	calls := slices.Collect(maps.Values(c.onError))
	c.last = err
	c.mu.Unlock()
	for _, f := range calls {
		f(err)
	}
}

// LastError implements natsconn.Conn.
func (c *Conn) LastError() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last
}

// DenyPublish reports that the connection may not publish to subject, as NATS does some time after the publish.
func (c *Conn) DenyPublish(subject string) {
	c.Report(fmt.Errorf("%w: Permissions Violation for Publish to %q", nats.ErrPermissionViolation, subject))
}

// DenySubscribe reports that the connection may not subscribe to subject.
func (c *Conn) DenySubscribe(subject string) { c.Report(SubscriptionDenied(subject)) }

// SubscriptionDenied is the error of a server that does not let a connection subscribe to subject.
func SubscriptionDenied(subject string) error {
	return fmt.Errorf("%w: Permissions Violation for Subscription to %q", nats.ErrPermissionViolation, subject)
}

// StatusChanges implements natsconn.Conn.
func (c *Conn) StatusChanges() (<-chan nats.Status, func()) {
	ch := make(chan nats.Status, 10)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changes = append(c.changes, ch)
	return ch, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.changes = slices.DeleteFunc(c.changes, func(other chan nats.Status) bool { return other == ch })
		close(ch)
	}
}

// Set changes the connection's status. While it is not connected, no message reaches it, and its own messages are lost.
func (c *Conn) Set(s nats.Status) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state.Store(int64(s))
	for _, ch := range c.changes {
		select {
		case ch <- s:
		default: // as nats.go does
		}
	}
}

// isUp reports whether messages pass. A connection that drains still takes them.
func (c *Conn) isUp() bool {
	s := c.Status()
	return s == nats.CONNECTED || s == nats.DRAINING_SUBS || s == nats.DRAINING_PUBS
}

// Status implements natsconn.Conn.
func (c *Conn) Status() nats.Status { return nats.Status(c.state.Load()) }

// MaxPayload implements natsconn.Conn.
func (c *Conn) MaxPayload() int64 { return c.maxPayload.Load() }

// SetMaxPayload changes the largest payload that the server accepts. No handler is called. A connection that has never
// been up has 0.
func (c *Conn) SetMaxPayload(bytes int64) { c.maxPayload.Store(bytes) }

// fits reports whether the server takes data. Headers are not counted.
func (c *Conn) fits(data []byte) bool {
	max := c.maxPayload.Load()
	return max == 0 || int64(len(data)) <= max
}
