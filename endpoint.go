package stream

import (
	"context"
	"math/bits"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"
	"github.com/puzpuzpuz/xsync/v3"

	"github.com/natsstream/stream/internal/flow"
	"github.com/natsstream/stream/internal/liveness"
	"github.com/natsstream/stream/internal/natsconn"
	"github.com/natsstream/stream/internal/wheel"
)

// endpoint is shared by all streams of one Client or Server. It has the mux, which passes each packet to its stream,
// and three goroutines: the outbox, the ticker and the watcher of the connection. newEndpoint starts them, and they
// have ended when close returns. Any goroutine may read the fields that are set once and the atomics.
type endpoint struct {
	conn   natsconn.Conn
	prefix string // of every reply subject, up to and including the dot before the token

	window    uint64 // upper bound of one stream's window, bytes, a power of two
	maxRecord int
	fallback  uint64 // bytes a fallback peer may pile up
	budget    int64  // for all windows together, and once more for all that is kept
	reserved  atomic.Int64
	room      recordRoom
	times     liveness.Intervals

	// clock is the outbox's clock at its last tick, for uses that do not need the exact time. The outbox stores it.
	clock   atomic.Int64
	started time.Time
	ticker  wheel.Ticker

	sessions *xsync.MapOf[string, *session] // by token
	outbox   outbox
	kept     atomic.Int64 // bytes of all buffers that writers keep; it changes with each packet
	counters counters

	// The last known state of the connection. maxPayload is the server's max_payload in bytes.
	maxPayload atomic.Int64
	draining   atomic.Bool

	inbox      inbox
	onRefused  atomic.Pointer[func(natsconn.Denial, error)] // set by a server: a subscription beside the inbox is refused
	stopWatch  func()
	stopErrors func()
	stopTicker func()
	watched    chan struct{} // closed when the watcher has ended
	closing    atomic.Bool
	closed     chan struct{}          // closed when close has done its work
	gone       atomic.Pointer[ending] // set once: the end of all streams, because the endpoint or its connection was closed
	ctx        context.Context        // parent of every writer's; ends with gone
	cancel     context.CancelCauseFunc
}

// inboxPrefix starts every reply subject unless the connection has an inbox prefix of its own.
const inboxPrefix = "_SINBOX"

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
		sessions:  xsync.NewMapOf[string, *session](),
		watched:   make(chan struct{}),
		closed:    make(chan struct{}),
		times:     p.intervals(),
		started:   time.Now(),
	}
	ep.room.records = flow.NewRecords[*session, *remote](ep.budget, &ep.reserved)
	ep.ctx, ep.cancel = context.WithCancelCause(context.Background())
	ep.outbox.init(ep)
	ep.initTime()
	ep.stopTicker = sync.OnceFunc(ep.ticker.Stop)
	ep.inbox.init(ep)
	ep.stopErrors = sync.OnceFunc(conn.OnError(ep.reported)) // before the subscription, which may be refused at once
	if err := ep.inbox.subscribe(); err != nil {
		ep.stopErrors()
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

func (ep *endpoint) endAll(e *ending) {
	ep.gone.CompareAndSwap(nil, e)
	ep.cancel(e.err)
	ep.sessions.Range(func(_ string, s *session) bool {
		s.requestEnd(e)
		return true
	})
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
	close(ep.closed)
}

// now returns the time since the endpoint was made, never 0.
func (ep *endpoint) now() int64 { return int64(time.Since(ep.started)) + 1 }

// lastToken returns the last token of a subject.
func lastToken(subject string) string { return subject[strings.LastIndexByte(subject, '.')+1:] }

func floorPow2(n uint64) uint64 { return 1 << (bits.Len64(n) - 1) }
