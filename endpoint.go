package stream

import (
	"context"
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/puzpuzpuz/xsync/v3"

	"github.com/natsstream/stream/internal/flow"
	"github.com/natsstream/stream/internal/liveness"
	"github.com/natsstream/stream/internal/natsconn"
	"github.com/natsstream/stream/internal/wheel"
)

// endpoint is shared by all streams of one Client or Server. It has the mux, which passes each packet to its stream,
// and three goroutines: the outbox, the ticker and the watcher of the connection. newEndpoint starts them, and they
// have ended when close returns. Any goroutine may read the fields that are set once and the atomics, and run the
// functions of this file. Only the watcher and goroutines that close the endpoint run endAll.
type endpoint struct {
	conn   natsconn.Conn
	prefix string // of every reply subject, up to and including the dot before the token

	window    uint64 // upper bound of one stream's window, bytes, a power of two
	maxRecord int
	fallback  uint64 // bytes that may wait from one fallback peer
	budget    int64  // for arrived packets and records in pieces together, and once more for all that is kept
	windows   *flow.Windows
	arrived   atomic.Int64 // bytes of the budget that arrived packets have
	assembled atomic.Int64 // the same of records in pieces
	room      recordRoom
	times     liveness.Intervals

	// clock is the outbox's clock at its last tick, for uses that do not need the exact time. The outbox stores it.
	clock   atomic.Int64
	started time.Time
	ticker  wheel.Ticker

	sessions  *xsync.MapOf[[TokenSize]byte, *session] // by token: see find
	enveloped enveloped
	outbox    outbox
	kept      atomic.Int64 // bytes of all buffers that writers keep; it changes with each packet
	counters  counters
	observer  *observer // nil without hooks

	// The last known state of the connection. maxPayload is the server's max_payload in bytes.
	maxPayload atomic.Int64
	draining   atomic.Bool
	connected  atomic.Int64 // when the watcher last saw the connection come up, by now. It tells connections apart.

	streamEnded func() // set by a server: called when the outbox is done with a handler's stream

	inbox      inbox
	onIdle     atomic.Pointer[func()]                       // set by a server: called when no stream is left
	onRefused  atomic.Pointer[func(natsconn.Denial, error)] // set by a server: called when NATS refuses a subscription beside the inbox
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

// find returns the session with a token.
func (ep *endpoint) find(token string) (s *session, ok bool) {
	if len(token) != TokenSize {
		return nil, false
	}
	var key [TokenSize]byte
	copy(key[:], token[:TokenSize])
	return ep.sessions.Load(key)
}

func (ep *endpoint) endAll(e *ending) {
	ep.gone.CompareAndSwap(nil, e)
	ep.cancel(e.err)
	ep.sessions.Range(func(_ [TokenSize]byte, s *session) bool {
		s.requestEnd(e)
		return true
	})
}

// now returns the time since the endpoint was made, never 0.
func (ep *endpoint) now() int64 { return int64(time.Since(ep.started)) + 1 }

func floorPow2(n uint64) uint64 { return 1 << (bits.Len64(n) - 1) }

// barred returns the reason why no stream may begin or go on: the endpoint is gone, or its inbox is refused. It returns
// nil if streams may begin and go on.
func (ep *endpoint) barred() *ending {
	if e := ep.gone.Load(); e != nil {
		return e
	}
	return ep.inbox.refused.Load()
}

func (ep *endpoint) err() error {
	if ep.ctx.Err() == nil { // gone is set a moment before
		return nil
	}
	return ep.gone.Load().err
}
