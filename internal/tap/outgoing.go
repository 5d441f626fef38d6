package tap

import (
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// This file publishes messages between the commands of nats.go. The outbox, a writer that publishes in its place, and
// nats.go's writers run it, with outgoing.mu held.

// outgoing is the send side of a connection.
type outgoing struct {
	mu       sync.Mutex // guards the fields below, except waiting
	commands commands   // of nats.go
	buf      []byte     // published and not sent, without the data of loans
	loans    []loan     // in the order of their messages
	lent     int        // bytes of loans
	waiting  atomic.Bool
	failed   bool
	now      now           // set once
	timeout  time.Duration // of nats.go's flusher; set once, and no limit unless it is positive
	deadline time.Time     // of writes to a connection of the kernel; zero before the first write

	parts, buffers net.Buffers // of one write
}

// loan is data that is sent without a copy, before the bytes of outgoing.buf from at on.
type loan struct {
	at   int
	data []byte
}

const (
	sendSize = 32 << 10 // as much is sent at once
	copied   = 8 << 10  // longer data is sent without a copy
	// Lend keeps no message if another one of its size would make the write larger than mostGathered. One write of
	// 48 KiB takes less time than three of 16 KiB, at each socket on the way. Writes that are larger than a segment,
	// which has 64 KiB on the loopback, gain nothing.
	mostGathered = 64_000
)

// Publish sends a message, or keeps it until Push, more messages or a command of nats.go. Later, the message may be
// lost with the connection, as one that nats.go buffers. Publish reports false if the message has to go through
// nats.go, which may change or refuse it. It blocks while the server takes no bytes, until the timeout of nats.go's
// flusher, or up to an eighth of it longer. Then it closes the connection.
func (c *Conn) Publish(subject, reply string, header nats.Header, data []byte) bool {
	head, ok := headerSize(header)
	if !ok || !plain(subject) || reply != "" && !plain(reply) {
		return false
	}
	o := &c.out
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.failed || c.closed.Load() || !o.commands.boundary() {
		return false
	}
	o.commandLocked(subject, reply, head, head+len(data))
	o.buf = appendHeader(o.buf, header)
	if len(data) > copied {
		o.lendLocked(data)
		c.sendLocked()
		return true
	}
	o.dataLocked(data)
	o.waiting.Store(true)
	if len(o.buf)+o.lent >= sendSize {
		c.sendLocked()
	}
	return true
}

// Lend is Publish for a message that others probably follow at once, so that one write may send them. If it reports kept,
// the message waits as for Publish, and c refers to data until Recall has returned. Until then, data must not change.
func (c *Conn) Lend(subject string, data []byte) (published, kept bool) {
	if len(data) <= copied {
		return c.Publish(subject, "", nil, data), false
	}
	o := &c.out
	if !plain(subject) {
		return false, false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.failed || c.closed.Load() || !o.commands.boundary() {
		return false, false
	}
	o.commandLocked(subject, "", 0, len(data))
	o.lendLocked(data)
	if len(o.buf)+o.lent+len(data) > mostGathered {
		c.sendLocked()
		return true, false
	}
	o.waiting.Store(true)
	return true, true
}

// Recall sends messages that wait. It fails and blocks as Publish does. After it, c refers to no data of Lend. It waits
// for another goroutine's write that sends such data.
func (c *Conn) Recall() {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.sendLocked()
}

// commandLocked appends the command for a message of n bytes, of which head are its headers. The message follows it.
func (o *outgoing) commandLocked(subject, reply string, head, n int) {
	b := o.buf
	if head > 0 {
		b = append(b, 'H')
	}
	b = append(b, "PUB "...)
	b = append(b, subject...)
	b = append(b, ' ')
	if reply != "" {
		b = append(b, reply...)
		b = append(b, ' ')
	}
	if head > 0 {
		b = strconv.AppendInt(b, int64(head), 10)
		b = append(b, ' ')
	}
	b = strconv.AppendInt(b, int64(n), 10)
	o.buf = append(b, crlf...)
}

const (
	headerLine = "NATS/1.0\r\n"
	separator  = ": "
)

// headerSize returns the size of h in a message, 0 without headers. It reports false if nats.go would not send each
// name and each value as it is.
func headerSize(h nats.Header) (n int, ok bool) {
	if len(h) == 0 {
		return 0, true
	}
	n = len(headerLine) + len(crlf)
	for name, values := range h {
		if name == "" || len(values) == 0 || strings.ContainsFunc(name, func(r rune) bool { return !inName(r) }) {
			return 0, false
		}
		for _, v := range values {
			if v == "" || v[0] == ' ' || v[len(v)-1] == ' ' || strings.ContainsFunc(v, func(r rune) bool { return r < ' ' || r >= 0x7f }) {
				return 0, false
			}
			n += len(name) + len(separator) + len(v) + len(crlf)
		}
	}
	return n, true
}

// inName reports whether the name of a header may have a character. nats.go refuses a request with any other.
func inName(r rune) bool {
	return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("!#$%&'*+-.^_`|~", r)
}

// appendHeader appends h to b.
func appendHeader(b []byte, h nats.Header) []byte {
	if len(h) == 0 {
		return b
	}
	b = append(b, headerLine...)
	for name, values := range h {
		for _, v := range values {
			b = append(append(append(append(b, name...), separator...), v...), crlf...)
		}
	}
	return append(b, crlf...)
}

func (o *outgoing) dataLocked(data []byte) {
	o.buf = append(append(o.buf, data...), crlf...)
}

// lendLocked is dataLocked without a copy.
func (o *outgoing) lendLocked(data []byte) {
	o.loans = append(o.loans, loan{len(o.buf), data})
	o.lent += len(data)
	o.buf = append(o.buf, crlf...)
}

// TakesNow reports whether PublishNow can send over this connection, and no message waits for Push.
func (c *Conn) TakesNow() bool {
	return c.out.now.possible() && !c.out.waiting.Load() && !c.closed.Load()
}

// PublishNow sends a message of at most MostNow bytes without waiting: not for a lock, and not for the network. It
// reports whether it did. If the network takes a part only, PublishNow reports rest, and the rest waits for Push, more
// messages or a command of nats.go.
func (c *Conn) PublishNow(subject string, data []byte) (sent, rest bool) {
	o := &c.out
	if !o.now.possible() || len(data) > MostNow || !plain(subject) || !o.mu.TryLock() {
		return false, false
	}
	defer o.mu.Unlock()
	if o.failed || o.commands.opaque {
		o.now.off.Store(true)
	}
	if o.failed || c.closed.Load() || !o.commands.boundary() || len(o.buf) > 0 {
		return false, false
	}
	o.commandLocked(subject, "", 0, len(data))
	o.dataLocked(data)
	n := o.now.write(o.buf)
	if n == 0 {
		o.buf = o.buf[:0]
		return false, false
	}
	o.buf = o.buf[:copy(o.buf, o.buf[n:])]
	if rest = len(o.buf) > 0; rest {
		o.waiting.Store(true)
	}
	return true, rest
}

// MostNow is the size of the longest message for PublishNow, in bytes. The send buffer of a connection that takes bytes
// at all has room for as much in most cases.
const MostNow = 4 << 10

// plain reports whether a subject breaks no command. nats.go refuses others.
func plain(subject string) bool {
	for i := range len(subject) {
		if subject[i] <= ' ' {
			return false
		}
	}
	return subject != ""
}

// Push sends messages that wait. It fails and blocks as Publish does.
func (c *Conn) Push() {
	if !c.out.waiting.Load() {
		return
	}
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.sendLocked()
}

// sendLocked sends the messages that wait. Then no loan is left.
func (c *Conn) sendLocked() {
	o := &c.out
	o.waiting.Store(false)
	if len(o.buf) == 0 {
		return
	}
	if !o.failed {
		c.setDeadline()
		err := o.writeLocked(c.Conn)
		c.clearDeadline()
		if err != nil {
			// A part of a message may be sent, so nothing can follow. nats.go notices the end when it reads.
			o.failed = true
			_ = c.Close()
		}
	}
	clear(o.loans)
	o.buf, o.loans, o.lent = o.buf[:0], o.loans[:0], 0
}

// writeLocked writes the messages that wait to conn.
func (o *outgoing) writeLocked(conn net.Conn) error {
	if len(o.loans) == 0 {
		_, err := conn.Write(o.buf)
		return err
	}
	at := 0
	for _, l := range o.loans {
		o.parts = append(o.parts, o.buf[at:l.at], l.data)
		at = l.at
	}
	o.parts = append(o.parts, o.buf[at:])
	o.buffers = o.parts
	_, err := o.buffers.WriteTo(conn) // at once over TCP
	clear(o.parts)
	o.parts = o.parts[:0]
	return err
}

// setDeadline makes the next write end after the timeout of nats.go's flusher, or up to an eighth of it later. A
// connection of the kernel keeps its deadline for later writes, because setting and clearing a deadline takes a tenth of
// the time of a short write. Another connection may write by itself, as TLS does, so it has a deadline only while c
// writes.
func (c *Conn) setDeadline() {
	timeout, now := c.out.timeout, time.Now()
	if timeout <= 0 || c.out.deadline.Sub(now) >= timeout {
		return
	}
	until := now.Add(timeout).Add(timeout / 8) // the sum of both may be too large for a Duration
	if c.out.now.raw != nil {
		c.out.deadline = until
	}
	_ = c.Conn.SetWriteDeadline(until) // an error is that of the write as well
}

func (c *Conn) clearDeadline() {
	if c.out.timeout > 0 && c.out.now.raw == nil {
		_ = c.Conn.SetWriteDeadline(time.Time{})
	}
}

// SetWriteDeadline does nothing. nats.go calls it around Write, without the lock, and so would change the deadline of
// another write. Write sets the same one.
func (c *Conn) SetWriteDeadline(time.Time) error { return nil }

// SetDeadline sets the deadline of reads, because Write sets that of writes. If the flusher has no timeout, Write sets
// none. Then SetDeadline sets both, so that an attempt to connect ends in time.
func (c *Conn) SetDeadline(t time.Time) error {
	if c.out.timeout <= 0 {
		return c.Conn.SetDeadline(t)
	}
	return c.Conn.SetReadDeadline(t)
}

// Write follows the commands of nats.go, and sends them behind the messages that wait.
func (c *Conn) Write(p []byte) (int, error) {
	o := &c.out
	o.mu.Lock()
	defer o.mu.Unlock()
	c.sendLocked()
	if o.failed {
		return 0, net.ErrClosed
	}
	o.commands.write(p, c.subscribe)
	c.setDeadline()
	defer c.clearDeadline()
	n, err := c.Conn.Write(p)
	if err != nil && n > 0 {
		o.failed = true // a part of a command was sent, and nats.go closes the connection
	}
	return n, err
}
