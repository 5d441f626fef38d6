package stream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn"
)

// inbox is the one wildcard subscription of an endpoint, and whether the NATS server delivers to it. A server that
// refuses the subscription, or drops it at a reload, reports that some time later, by an error on the connection. While
// the inbox is refused, all streams end and none begins, because no packet would arrive. The watcher subscribes again
// until the server accepts.
//
// The watcher runs look and renew. newEndpoint runs init and subscribes first, the watcher subscribes again, and the
// goroutine that closes the endpoint runs close. The mux runs receive. NATS's error callback runs denied, doubt and
// muted. Calls of the user run confirm, which may run denied, and onChange. The goroutine of an examination runs room
// and cannotProbe. The watcher and the examination run probe, with probing held. changed is called with mu held.
type inbox struct {
	ep      *endpoint
	refused atomic.Pointer[ending] // the refusal by the server; nil if messages may arrive

	news      chan struct{} // capacity 1: wakes the watcher
	confirmed atomic.Bool   // confirm has had its answer
	doubted   atomic.Bool   // the server refused a subscription without naming it

	asked   atomic.Uint64 // number of the last probe
	arrived atomic.Uint64 // number of the last probe that arrived
	answer  chan struct{} // capacity 1: a probe arrived, or was refused
	mute    atomic.Bool   // the server does not let this end publish to its own inbox

	probing     sync.Mutex // held while the inbox, or free room on the connection, is probed
	subscribing sync.Mutex // held during calls to NATS
	subscribed  atomic.Pointer[natsconn.Inbox]
	closed      bool

	mu      sync.Mutex // guards changes of refused, and the fields below
	known   error      // the last refusal that was handled: it may be reported twice
	since   time.Time  // of refused
	changed func(error)
}

const (
	probeToken   = "probe"                // of a message to the own inbox. Tokens of streams begin with another character
	probeTimeout = 2 * time.Second        // for the server to answer
	probeDelay   = 250 * time.Millisecond // for the mux to take all messages that arrived. A probe that takes longer is not lost

	// A refused subject is subscribed to again after a quarter of the time that it has been refused for, within these
	// bounds: a reload that goes wrong is often mended at once, and each try is an error in the server's log.
	minRenewal = 25 * time.Millisecond
	maxRenewal = 5 * time.Second
)

func (b *inbox) init(ep *endpoint) {
	b.ep = ep
	b.news, b.answer = make(chan struct{}, 1), make(chan struct{}, 1)
}

// subscribe makes the subscription. It is made again while the endpoint lives; the old one has ended then.
func (b *inbox) subscribe() error {
	b.subscribing.Lock()
	defer b.subscribing.Unlock()
	if b.closed {
		return ErrClosed
	}
	if old := b.subscribed.Swap(nil); old != nil {
		old.Unsubscribe()
	}
	subscribed, err := b.ep.conn.SubscribeInbox(b.ep.prefix+"*", b.ep.receive)
	if err != nil {
		return fmt.Errorf("stream: subscribe to %s*: %w", b.ep.prefix, err)
	}
	b.subscribed.Store(&subscribed)
	return nil
}

func (b *inbox) close() {
	b.subscribing.Lock()
	defer b.subscribing.Unlock()
	b.closed = true
	if last := b.subscribed.Load(); last != nil {
		last.Unsubscribe()
	}
}

// onChange sets the function that is called with the reason when the inbox is refused, and with nil when it is heard
// again.
func (b *inbox) onChange(f func(error)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.changed = f
	if e := b.refused.Load(); e != nil {
		f(e.err)
	}
}

// denied records that the server does not let this end subscribe to its inbox. It is called once for each error, but
// the watcher may have seen the error before.
func (b *inbox) denied(err error) {
	b.mu.Lock()
	seen := b.known == err
	b.known = err
	b.mu.Unlock()
	if !seen {
		b.refuse(fmt.Errorf("stream: may not subscribe to %s*, where answers would come; allow it (docs/PROTOCOL.md section 15): %w", b.ep.prefix, err))
	}
}

// confirm checks, once and while the connection is up, whether the server has refused the inbox. A server that
// subscribes to its subjects without this check would receive requests that it cannot serve.
func (b *inbox) confirm() {
	conn := b.ep.conn
	if b.confirmed.Load() || conn.Status() != nats.CONNECTED || conn.Flush(probeTimeout) != nil {
		return
	}
	b.confirmed.Store(true)
	last := conn.LastError()
	if d, ok := natsconn.Denied(last); ok && d.Subscribe && d.Subject == b.ep.prefix+"*" {
		b.denied(last)
	}
}

// doubt notes that the server refused a subscription, which may be the inbox.
func (b *inbox) doubt() {
	b.doubted.Store(true)
	b.wake()
}

func (b *inbox) wake() {
	select {
	case b.news <- struct{}{}:
	default:
	}
}

// refuse ends all streams and lets none begin, until heard is called.
func (b *inbox) refuse(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	// Peers get a RESET, because it alone informs them: publishing still works.
	e := &ending{kind: endFault, err: err, reset: CloseError{CloseGoingAway, "the NATS server refuses this end's inbox"}}
	if !b.refused.CompareAndSwap(nil, e) {
		return
	}
	b.since = time.Now()
	if b.changed != nil {
		b.changed(err)
	}
	b.ep.sessions.Range(func(_ [TokenSize]byte, s *session) bool {
		s.requestEnd(e)
		return true
	})
	b.ep.outbox.doLater(outOfStream{silenced: e})
	b.wake()
}

// heard lets streams begin again.
func (b *inbox) heard() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refused.Store(nil)
	if b.changed != nil {
		b.changed(nil)
	}
}

// look checks whether messages reach the inbox. If they do not and renew is set, it subscribes again. It returns how
// long to wait before the next look, 0 to wait for news. The watcher calls it while the connection is up.
func (b *inbox) look(renew bool) time.Duration {
	b.probing.Lock()
	defer b.probing.Unlock()
	if b.refused.Load() == nil && b.doubted.Swap(false) && b.silent() {
		b.refuse(fmt.Errorf("stream: the NATS server does not deliver to %s*, because the connection has too many subscriptions; "+
			"raise max_subscriptions: %w", b.ep.prefix, nats.ErrMaxSubscriptionsExceeded))
		renew = false
	}
	e := b.refused.Load()
	if e == nil {
		return 0
	}
	if renew && b.renew(errors.Is(e.err, nats.ErrMaxSubscriptionsExceeded)) {
		b.heard()
		return 0
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	return renewal(b.since)
}

// renewal returns when to subscribe again to a subject that has been refused since then.
func renewal(since time.Time) time.Duration { return backOff(time.Since(since)) }

func backOff(refused time.Duration) time.Duration { return min(max(refused/4, minRenewal), maxRenewal) }

// silent reports whether messages surely do not reach the inbox. It subscribes to the inbox again if the probe does not
// arrive.
func (b *inbox) silent() bool {
	n, ok := b.probe()
	if !ok || b.arrived.Load() >= n {
		return false
	}
	// The end of the subscription waits until all arrived messages are handed over, so the probe cannot be among them
	// any more. If the probe was only late, the new subscription replaces the old one: messages lost meanwhile are
	// retransmitted.
	return b.subscribe() == nil && b.arrived.Load() < n && !b.mute.Load()
}

// probe publishes a message to the inbox, and waits for it. It returns the number of the probe. ok is false if the
// result proves nothing: this end may not publish to its inbox, or the connection fails, after which the watcher looks
// again.
func (b *inbox) probe() (n uint64, ok bool) {
	ep := b.ep
	n = b.asked.Add(1)
	b.mute.Store(false)
	err := ep.conn.Publish(ep.prefix+probeToken, "", binary.BigEndian.AppendUint64(nil, n))
	if err == nil {
		err = ep.conn.Flush(probeTimeout)
	}
	if err != nil {
		b.doubted.Store(true)
		return n, false
	}
	late := time.NewTimer(probeDelay)
	defer late.Stop()
	for b.arrived.Load() < n {
		if b.cannotProbe() {
			return n, false
		}
		select {
		case <-b.answer:
		case <-late.C:
			return n, true
		case <-ep.ctx.Done(): // close waits for the watcher
			return n, false
		}
	}
	return n, true
}

// room returns how many of n more subscriptions the NATS server accepts: it subscribes n times to the subject of the
// probe, counts the subscriptions to which a probe comes, and unsubscribes. ok is false if the result proves nothing,
// as that of probe. Any goroutine may call it, except a callback of NATS.
func (b *inbox) room(n int) (accepted int, ok bool) {
	b.probing.Lock()
	defer b.probing.Unlock()
	came := make([]atomic.Bool, n)
	unsubscribe := make([]func(), 0, n)
	for i := range n {
		end, err := b.ep.conn.Subscribe(b.ep.prefix+probeToken, "", func(*nats.Msg) { came[i].Store(true) })
		if err != nil { // the connection is closed or drains
			break
		}
		unsubscribe = append(unsubscribe, end)
	}
	number, ok := b.probe()
	var ending sync.WaitGroup
	for _, end := range unsubscribe {
		ending.Go(end) // returns when all that arrived was handed over, so the probe is late for none of them
	}
	ending.Wait()
	for i := range came {
		if came[i].Load() {
			accepted++
		}
	}
	// The inbox gets the probe, too. If it does not, no subscription would.
	return accepted, len(unsubscribe) == n && (accepted > 0 || ok && b.arrived.Load() >= number)
}

// cannotProbe reports whether the last probe failed because this end may not publish to its own inbox.
func (b *inbox) cannotProbe() bool { return b.mute.Load() || b.ep.isProbe(b.ep.conn.LastError()) }

// isProbe reports whether err is the refusal of a probe, because this end may not publish to its inbox.
func (ep *endpoint) isProbe(err error) bool {
	d, ok := natsconn.Denied(err)
	return ok && !d.Subscribe && d.Subject == ep.prefix+probeToken
}

// renew subscribes again, and reports whether the server accepts. crowded reports that the server refused the inbox
// because of the number of subscriptions. The error for that does not name the subscription.
func (b *inbox) renew(crowded bool) bool {
	conn := b.ep.conn
	before := conn.LastError()
	if b.subscribe() != nil || conn.Flush(probeTimeout) != nil {
		return false
	}
	// nats.go notes an error before it reports it, and before it takes the answer to the flush.
	last := conn.LastError()
	if d, ok := natsconn.Denied(last); ok && d.Subscribe && d.Subject == b.ep.prefix+"*" && last != before {
		b.mu.Lock()
		b.known = last
		b.mu.Unlock()
		return false
	}
	if crowded {
		n, ok := b.probe()
		return !ok && !b.doubted.Load() || b.arrived.Load() >= n
	}
	return true
}

// receive takes a message to the probe's subject. Called by the mux.
func (b *inbox) receive(data []byte) {
	if len(data) != 8 {
		return
	}
	b.arrived.Store(binary.BigEndian.Uint64(data))
	b.answered()
}

// muted notes that this end may not publish to its own inbox.
func (b *inbox) muted() {
	b.mute.Store(true)
	b.answered()
}

func (b *inbox) answered() {
	select {
	case b.answer <- struct{}{}:
	default:
	}
}
