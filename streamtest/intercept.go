package streamtest

import (
	"net"
	"sync"
	"testing"
	"time"
)

// A Message is a NATS message between a client and its server: published (ToServer) or delivered (ToClient).
type Message struct {
	Dir     Direction
	Conn    uint64 // number of the connection, from 1 in the order of acceptance
	Subject string
	Reply   string // or empty
	Header  []byte // as sent, with the line NATS/1.0 and the empty line at its end; or empty
	Data    []byte

	sid string // of the subscription that it is delivered to
}

// A Verdict is the decision of a [Rule] about a message. The zero Verdict lets the message pass.
type Verdict struct {
	Drop   bool // it does not arrive
	Copies int  // additional copies, which arrive at once
	// Hold is the number of messages of the same connection and direction that overtake this one. A held message is
	// also released when no message passes for about 5 ms. Other parts of the protocol overtake it too, so a Flush of
	// the client does not wait for it.
	Hold int
}

// A Rule decides about a message. It may change the message's Subject, Reply, Header and Data. The message and its
// bytes belong to the rule until it returns: a rule that keeps bytes for longer must copy them. An [Interceptor] calls
// its rules one at a time, for all its connections. A rule may call Inject, which sends before the current message.
//
// The ready-made rules take a probability p, from 0 to 1, and a random source. With the same seed they decide the same
// about the same messages in the same order. Rules of one Interceptor may share a source. Rules of several
// Interceptors, and goroutines, must not.
type Rule func(m *Message) Verdict

// Counts are the numbers of messages that an [Interceptor] has handled so far.
type Counts struct {
	Passed     int // unchanged or changed, held messages included
	Dropped    int
	Duplicated int // copies
	Held       int
	Injected   int // copies delivered
}

// Interceptor is a proxy for NATS clients that lets rules decide about each message. All other bytes pass unchanged.
// Its methods may be called concurrently.
//
// Give clients the option nats.IgnoreDiscoveredServers. Otherwise a server that announces its own address leads them
// around the interceptor. TLS cannot pass.
type Interceptor struct {
	relay

	decide sync.Mutex // held while rule runs
	rule   Rule

	state  sync.Mutex
	counts Counts
	taps   map[uint64]*[2]*tap
}

// StartInterceptor starts an interceptor to target, which is host:port or a NATS URL. It listens on a free port of
// 127.0.0.1. The caller ends it with Close. The rules are those of SetRules.
func StartInterceptor(target string, rules ...Rule) (*Interceptor, error) {
	i := &Interceptor{rule: Chain(rules...), taps: map[uint64]*[2]*tap{}}
	if err := i.start(target, i.intercept); err != nil {
		return nil, err
	}
	return i, nil
}

// RunInterceptor starts an interceptor that ends with the test. If it cannot start, the test fails at once.
func RunInterceptor(tb testing.TB, target string, rules ...Rule) *Interceptor {
	tb.Helper()
	i, err := StartInterceptor(target, rules...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(i.Close)
	return i
}

// SetRules replaces the rules. They see each message in turn. If one drops it, the next ones do not see it. Their
// copies add up, and the longest hold counts. When SetRules returns, no old rule runs, so a rule must not call it.
func (i *Interceptor) SetRules(rules ...Rule) {
	i.decide.Lock()
	defer i.decide.Unlock()
	i.rule = Chain(rules...)
}

// Counts returns the counts of the interceptor so far.
func (i *Interceptor) Counts() Counts {
	i.state.Lock()
	defer i.state.Unlock()
	return i.counts
}

// Inject sends a forged message and returns the number of copies sent. No rule sees it. A message to the server is
// published on connection m.Conn, or on the oldest one if that is 0. A message to clients is delivered to each
// subscription that matches its subject, of connection m.Conn, or of all connections if that is 0.
func (i *Interceptor) Inject(m Message) (copies int) {
	for _, l := range i.all() {
		if m.Conn != 0 && m.Conn != l.id {
			continue
		}
		i.state.Lock()
		taps := i.taps[l.id]
		i.state.Unlock()
		if taps == nil {
			continue
		}
		if m.Dir == ToServer {
			copies = taps[ToServer].inject(&m)
			break
		}
		for _, sid := range taps[ToServer].subs.match(m.Subject) {
			m.sid = sid
			copies += taps[ToClient].inject(&m)
		}
	}
	i.count(Counts{Injected: copies})
	return copies
}

func (i *Interceptor) count(c Counts) {
	i.state.Lock()
	defer i.state.Unlock()
	i.counts.Passed += c.Passed
	i.counts.Dropped += c.Dropped
	i.counts.Duplicated += c.Duplicated
	i.counts.Held += c.Held
	i.counts.Injected += c.Injected
}

func (i *Interceptor) verdict(m *Message) Verdict {
	i.decide.Lock()
	defer i.decide.Unlock()
	return i.rule(m)
}

// intercept serves a link until it ends.
func (i *Interceptor) intercept(l *link) {
	var taps [2]*tap
	for dir := range taps {
		_, dst := l.ends(Direction(dir))
		taps[dir] = newTap(Direction(dir), l.id, dst)
	}
	i.state.Lock()
	i.taps[l.id] = &taps
	i.state.Unlock()
	var wg sync.WaitGroup
	for dir, t := range taps {
		src, dst := l.ends(Direction(dir))
		wg.Go(func() {
			err := t.run(src, i)
			t.close()
			l.end(err, dst)
		})
	}
	wg.Wait()
	i.state.Lock()
	delete(i.taps, l.id)
	i.state.Unlock()
}

// holdTime is the time without a message after which held messages are released.
const holdTime = 5 * time.Millisecond

// A tap is one direction of a connection.
type tap struct {
	dir  Direction
	conn uint64
	subs subscriptions // of the client, if dir is ToServer

	mu      sync.Mutex // guards the fields below, which the reader, the timer and Inject use
	dst     net.Conn
	out     []byte // not yet written
	held    []heldMessage
	passed  uint64 // messages
	seen    uint64 // passed when the timer was set
	timer   *time.Timer
	waiting bool // the timer runs
	closed  bool
}

type heldMessage struct {
	b    []byte
	left int // messages that still have to overtake it
}

func newTap(dir Direction, conn uint64, dst net.Conn) *tap {
	t := &tap{dir: dir, conn: conn, dst: dst}
	t.timer = time.AfterFunc(time.Hour, t.tick)
	t.timer.Stop()
	return t
}

// message applies the verdict v to m.
func (t *tap) message(m *Message, v Verdict) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if v.Hold > 0 {
		var b []byte
		for range 1 + v.Copies {
			b = m.append(b)
		}
		t.held = append(t.held, heldMessage{b, v.Hold})
		if !t.waiting {
			t.waiting, t.seen = true, t.passed
			t.timer.Reset(holdTime)
		}
		return
	}
	for range 1 + v.Copies {
		t.out = m.append(t.out)
	}
	t.passed++
	keep := t.held[:0]
	for _, h := range t.held {
		if h.left--; h.left > 0 {
			keep = append(keep, h)
		} else {
			t.out = append(t.out, h.b...)
		}
	}
	clear(t.held[len(keep):])
	t.held = keep
	if len(t.out) >= flushSize {
		t.flushLocked()
	}
}

// tick releases all held messages, unless messages still pass.
func (t *tap) tick() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.waiting = len(t.held) > 0 && !t.closed
	if !t.waiting {
		return
	}
	if t.seen != t.passed {
		t.seen = t.passed
		t.timer.Reset(holdTime)
		return
	}
	t.waiting = false
	t.releaseLocked()
}

func (t *tap) releaseLocked() {
	for _, h := range t.held {
		t.out = append(t.out, h.b...)
	}
	t.held = nil
	t.flushLocked()
}

func (t *tap) inject(m *Message) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return 0
	}
	m.Dir = t.dir
	t.out = m.append(t.out)
	t.flushLocked()
	return 1
}

// raw forwards bytes that belong to no message.
func (t *tap) raw(b []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.out = append(t.out, b...)
}

// flushSize is how many bytes are worth a write of their own while more are coming.
const flushSize = 64 << 10

func (t *tap) flush() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.flushLocked()
}

// flushLocked writes all queued bytes. It ignores errors, because the reader of that connection sees them too.
func (t *tap) flushLocked() {
	if len(t.out) > 0 && !t.closed {
		_, _ = t.dst.Write(t.out)
	}
	if t.out = t.out[:0]; cap(t.out) > 16*flushSize {
		t.out = nil
	}
}

// close releases the held messages and ends all writing.
func (t *tap) close() {
	t.timer.Stop()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.releaseLocked()
	t.closed = true
}
