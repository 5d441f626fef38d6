package stream

import (
	"errors"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn"
)

// This file follows the NATS connection: its status, and the errors that NATS reports. The endpoint's watcher runs it,
// except reported and subscriptionRefused, which NATS's error callback runs.

// watch follows the connection's status and the inbox until the endpoint or the connection is closed. before reports
// whether the connection has been up.
func (ep *endpoint) watch(changes <-chan nats.Status, before bool) {
	defer close(ep.watched)
	defer ep.stopWatch()
	again := time.NewTimer(never) // to subscribe to a refused inbox again
	defer again.Stop()
	first, changed, renew := true, true, false
	for {
		if changed {
			// The status in the channel may be old: the channel drops news while it is full. So the channel only wakes
			// the watcher.
			status := ep.conn.Status()
			if status == nats.CLOSED {
				ep.lost()
				return
			}
			ep.follow(status, before && !first)
			before = before || status == nats.CONNECTED
			renew = !first
		}
		again.Stop()
		if ep.outbox.up.Load() {
			if next := ep.inbox.look(renew); next != 0 {
				again.Reset(next)
			}
		}
		first, changed, renew = false, false, false
		select {
		case _, ok := <-changes:
			if !ok {
				return
			}
			changed = true
		case <-ep.inbox.news:
		case <-again.C:
			renew = true
		}
	}
}

// follow handles the connection's status. A draining connection still accepts messages, until its subscriptions are
// gone. again reports that the connection was up before.
func (ep *endpoint) follow(status nats.Status, again bool) {
	switch status {
	case nats.CONNECTED:
		ep.connected.Store(ep.now())
		ep.lookAtMaxPayload()
		if again {
			ep.outbox.resume() // before the outbox publishes and its clock runs
		}
		ep.outbox.up.Store(true) // also if the outbox saw the connection go first
		if again {               // the interruption may have been too short for its own status
			ep.probe()
		}
		ep.outbox.park.Wake()
	case nats.DRAINING_SUBS, nats.DRAINING_PUBS:
		if !ep.draining.Swap(true) {
			ep.outbox.doLater(outOfStream{drains: true})
		}
	default:
		ep.outbox.up.Store(false)
		ep.ticker.Arm() // DisconnectTimeout runs
	}
}

// probe marks every session with workResume: it sends its credit and a PING, because earlier ones may have been lost
// with the connection. The answers resume waiting streams and ask for missing packets.
func (ep *endpoint) probe() {
	ep.sessions.Range(func(_ [TokenSize]byte, s *session) bool {
		s.mark(workResume)
		return true
	})
}

// lost ends every stream because the connection is closed for good. It also ends all goroutines and hooks that keep the
// endpoint and the connection in memory, because the user may never call Close. Records that arrived can still be read.
func (ep *endpoint) lost() {
	ep.outbox.up.Store(false)
	ep.endAll(&ending{kind: endFault, err: connectionLost(nats.ErrConnectionClosed)})
	ep.outbox.finish()
	ep.stopTicker()
	ep.stopErrors()
	if ep.observer != nil {
		ep.observer.close()
	}
}

// reported handles an error that NATS reported. If this end may not publish to a subject, the streams of that subject
// end. If it may not receive, all streams end.
func (ep *endpoint) reported(err error) {
	d, ok := natsconn.Denied(err)
	switch {
	case errors.Is(err, nats.ErrMaxSubscriptionsExceeded):
		ep.inbox.doubt()
		ep.subscriptionRefused(natsconn.Denial{}, err)
	case !ok:
	case d.Subscribe && d.Subject == ep.prefix+"*":
		ep.inbox.denied(err)
	case d.Subscribe:
		ep.subscriptionRefused(d, err)
	case d.Subject == ep.prefix+probeToken:
		ep.inbox.muted()
	default:
		ep.outbox.doLater(outOfStream{subject: d.Subject, denied: err})
	}
}

// subscriptionRefused passes a refused subscription to the server, if there is one. d is zero if NATS did not name the
// subject.
func (ep *endpoint) subscriptionRefused(d natsconn.Denial, err error) {
	if f := ep.onRefused.Load(); f != nil {
		(*f)(d, err)
	}
}
