package stream

import (
	"context"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"
	"github.com/puzpuzpuz/xsync/v3"

	"github.com/natsstream/stream/internal/flow"
	"github.com/natsstream/stream/internal/liveness"
	"github.com/natsstream/stream/internal/natsconn"
)

// This file starts the goroutines of an endpoint, and ends them. The goroutine that makes or closes the Client or
// Server runs it. newEndpoint sets the fields that never change.

func newEndpoint(conn natsconn.Conn, inbox string, p ClientParams) (*endpoint, error) {
	if inbox == "" {
		inbox = inboxPrefix
	}
	ep := &endpoint{
		conn:      conn,
		prefix:    inbox + "." + nuid.Next() + ".",
		window:    floorPow2(uint64(p.Window)),
		maxRecord: p.MaxRecordSize,
		fallback:  uint64(p.FallbackBuffer),
		budget:    int64(p.MaxBuffered),
		sessions:  xsync.NewMapOf[[TokenSize]byte, *session](),
		watched:   make(chan struct{}),
		closed:    make(chan struct{}),
		times:     p.intervals(),
		started:   time.Now(),
	}
	ep.enveloped.init(ep.prefix)
	ep.observer = newObserver(p.Hooks, &ep.counters.events)
	ep.room.records = flow.NewRecords[*session, *remote](ep.budget-ep.budget/growthPart, &ep.assembled, &ep.arrived)
	ep.windows = newWindows(ep.budget)
	ep.ctx, ep.cancel = context.WithCancelCause(context.Background())
	ep.outbox.init(ep)
	ep.initTime()
	ep.stopTicker = sync.OnceFunc(ep.ticker.Stop)
	ep.inbox.init(ep)
	ep.stopErrors = sync.OnceFunc(conn.OnError(ep.reported)) // before the subscription, which may be refused at once
	if err := ep.inbox.subscribe(); err != nil {
		ep.stopErrors()
		if ep.observer != nil {
			ep.observer.close()
		}
		return nil, err
	}
	changes, stop := conn.StatusChanges()
	ep.stopWatch = sync.OnceFunc(stop)
	ep.lookAtMaxPayload()
	ep.outbox.up.Store(conn.Status() == nats.CONNECTED)
	go ep.outbox.run()
	go ep.watch(changes, ep.outbox.up.Load())
	go ep.runTicker()
	return ep, nil
}

// intervals returns the times of p for package liveness.
func (p *ClientParams) intervals() liveness.Intervals {
	return liveness.Intervals{
		KeepAlive: int64(p.KeepAlive), Ack: int64(p.AckTimeout), Resume: int64(p.ResumeTimeout),
		Disconnect: int64(p.DisconnectTimeout), Patience: int64(p.PeerTimeout - p.KeepAlive),
	}
}

// close ends every stream with e, resets their peers, and returns when the endpoint's goroutines have ended.
func (ep *endpoint) close(e *ending) {
	if ep.closing.Swap(true) {
		<-ep.closed
		return
	}
	until := time.Now().Add(natsconn.UnsubscribeTimeout)
	ep.endAll(e)
	ep.outbox.awaitAnswers(min(time.Duration(ep.times.Ack), natsconn.UnsubscribeTimeout))
	ep.inbox.close()
	ep.outbox.finish()
	// The last packets are in a buffer of nats.go, and the program may exit after close.
	if left := time.Until(until); left > 0 && isUp(ep.conn.Status()) {
		_ = ep.conn.Flush(left)
	}
	ep.stopTicker()
	ep.outbox.hellos.timer.Stop()
	ep.stopErrors()
	ep.stopWatch()
	<-ep.watched
	if ep.observer != nil {
		ep.observer.close()
		ep.observer.wait()
	}
	close(ep.closed)
}
