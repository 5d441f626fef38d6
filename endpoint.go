package stream

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"math"
	"math/bits"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nuid"
	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/puzpuzpuz/xsync/v3"

	"github.com/natsstream/stream/internal/flow"
	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/liveness"
	"github.com/natsstream/stream/internal/natsconn"
	"github.com/natsstream/stream/internal/wheel"
)

// endpoint is what all streams of one Client or Server share: the mux (one wildcard subscription that hands each packet
// to its stream), the outbox (one goroutine that does all publishing; outbox.go), the ticker (internal/wheel) and one
// goroutine that watches the connection. Its goroutines are started by newEndpoint and have ended when close returns.
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

	// clock is the outbox's clock at its last tick: near enough for what is looked at by each packet. Stored by the
	// outbox.
	clock   atomic.Int64
	started time.Time
	ticker  wheel.Ticker

	sessions *xsync.MapOf[string, *session] // by token
	outbox   outbox
	kept     atomic.Int64 // bytes of all buffers that writers keep; it changes with each packet
	counters counters

	// What the connection said last. maxPayload is the server's max_payload in bytes.
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
	gone       atomic.Pointer[ending] // why there are no new streams: closed, or the connection is
	ctx        context.Context        // parent of every writer's; ends with gone
	cancel     context.CancelCauseFunc
}

// session is one stream at one end: what the mux finds under the stream's token. It has two halves, one to receive and
// one to send, which are the same at both ends.
type session struct {
	// What the mux looks at comes first, on two cache lines: with thousands of streams none of them is at hand.
	end      atomic.Pointer[ending] // set once, by whoever ends the stream first
	role     lifecycle.Role
	controls uint32 // control words ever handed to the outbox; the mux's
	sender   uint64 // this end's sender number
	bucket   bucket // the receive half: what arrived

	// Set once. These lie apart from what changes with each packet.
	ep     *endpoint
	reply  string                  // this end's subject: prefix and token. Empty until the session is registered
	writer atomic.Pointer[Writer]  // the send half; a consumer's is made when it first writes
	stream *Stream                 // at the consumer's end
	server *Server                 // at a handler's end
	cancel context.CancelCauseFunc // of the context of Stream or Request

	reader               // of what arrived
	oneWay   atomic.Bool // the producer speaks the fallback and takes no records
	returned atomic.Bool // the handler returned, or the consumer parted: nobody reads what still comes

	// The outbox's queue. pending holds what is to be done; a session is queued exactly while it is not zero.
	pending  atomic.Uint32
	patience atomic.Uint32 // how long the peer may be silent on this stream, milliseconds; 0 is as long as on others
	next     *session

	// Owned by the outbox once the session is marked.
	subject  string        // where the request went
	peer     string        // subject of the other end; a consumer learns it from the producer's first packet
	move     *move         // another subject that the other end named, and has not proved to receive at
	request  *nats.Msg     // what opens the stream, until it is published
	answered chan struct{} // closed, and set to nil, when the producer has answered; nil if nobody waits for that
	held     uint32        // work that waits for the connection; not zero while in outbox.held
	owed     uint32        // work for the peer that was due before its subject was known
	state    lifecycle.State
	places   places        // in which of the outbox's lists it is
	acted    atomic.Uint32 // control words ever acted on
	line     *line         // the way to the peer
	life     life

	remote atomic.Pointer[remote] // whose stream this is. The outbox stores it, and the reader asks which records share a peer
	popped atomic.Int64           // endpoint's clock when the reader took the last packet: a sign of life that costs the mux nothing
}

func (s *session) init(ep *endpoint, role lifecycle.Role, packets uint32, bytes uint64) {
	s.ep, s.role, s.sender = ep, role, newSender(role == lifecycle.Consumer)
	s.maxRecord = uint64(ep.maxRecord)
	s.bucket.init(packets, bytes)
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

// receive is the mux: the callback of the wildcard subscription, called for one message after the other. It finds the
// stream and hands it the packet. For a packet in order it decodes no frame and allocates nothing; for any message it
// takes no lock, blocks on nothing and publishes nothing: what one stream makes it do must not cost the others.
func (ep *endpoint) receive(m *nats.Msg) {
	s, ok := ep.sessions.Load(m.Subject[len(ep.prefix):])
	if !ok {
		ep.receiveUnknown(m)
		return
	}
	if end := s.end.Load(); end != nil { // on its way out of the map
		if m.Reply != "" && s.closeRead(end) {
			s.mark(workCredit) // it has everything, and says so, or that it leaves after that
			return
		}
		ep.receiveUnknown(m)
		return
	}
	if m.Size() > len(m.Subject)+len(m.Reply)+len(m.Data) {
		m.Data = bytes.Clone(m.Data) // else its header, which nobody counts, would stay alive with it
	}
	data := m.Data
	if len(data) == 0 || data[0] != PacketMagic {
		ep.receiveJSON(s, m)
		return
	}
	if m.Reply != "" && s.stream != nil && s.bucket.impostor(data, m.Reply) {
		ep.answer(m)
		ep.refuse(s, m, violation, protocolError(CloseProtocolError, "two producers answer with one sender number; open the stream again"))
		return
	}
	if len(data) >= 2 && data[1]&byte(PacketSeq) == 0 {
		ep.receiveControl(s, m)
		return
	}
	if s.role == lifecycle.Writer {
		ep.receiveBack(s, m)
		return
	}
	v, err := s.bucket.accept(data)
	if v != accepted {
		ep.refuse(s, m, v, err)
		return
	}
	if m.Reply != "" {
		ep.outbox.deliver(control{session: s, reply: m.Reply})
	}
	if data[1]&byte(PacketAck|PacketMark) != 0 {
		s.mark(workCredit)
	}
}

// receiveUnknown takes a message for a token that is not, or no longer, in use. Where the sender can be reached, it is
// told: a consumer that left before the first packet came could not do so. docs/PROTOCOL.md section 9.3.
func (ep *endpoint) receiveUnknown(m *nats.Msg) {
	if m.Subject[len(ep.prefix):] == probeToken {
		ep.inbox.receive(m.Data)
		return
	}
	ep.counters.unknown.Add(1)
	if len(m.Data) == 0 && m.Header.Get("Status") == "503" { // nobody received the request of a stream that has ended
		ep.outbox.deliver(control{absent: true})
		return
	}
	ep.answer(m)
}

// answer tells the sender of a packet that no stream takes it, where it can be reached.
func (ep *endpoint) answer(m *nats.Msg) {
	if m.Reply == "" {
		return
	}
	if h, _, err := ParsePacketHeader(m.Data); err == nil {
		ep.outbox.deliver(control{reply: m.Reply, token: m.Subject[len(ep.prefix):], sender: h.Sender})
	}
}

// receiveBack takes a sequenced packet for a producer that reads nothing: records must not gather unread. A consumer may say
// that it sends none.
func (ep *endpoint) receiveBack(s *session, m *nats.Msg) {
	if _, body, err := ParsePacketHeader(m.Data); err == nil && onlyClose(body) {
		if v, err := s.bucket.accept(m.Data); v != accepted {
			ep.refuse(s, m, v, err)
		} else {
			s.mark(workCredit)
		}
		return
	}
	v, err := s.bucket.acceptControl(m.Data, s.sender)
	if v == accepted || v == gap {
		v, err = violation, protocolError(CloseProtocolError, "this producer takes no records")
	}
	ep.refuse(s, m, v, err)
}

// receiveControl checks a packet without sequence number and leaves it to the outbox, where its frames are acted on.
func (ep *endpoint) receiveControl(s *session, m *nats.Msg) {
	v, err := s.bucket.acceptControl(m.Data, s.sender)
	if v == gap {
		ep.missing(s)
	} else if v != accepted {
		ep.refuse(s, m, v, err)
		return
	}
	ep.outbox.deliver(control{session: s, reply: m.Reply, packet: m.Data})
}

func (ep *endpoint) receiveJSON(s *session, m *nats.Msg) {
	if len(m.Data) == 0 {
		// NATS says that nobody listens, docs/PROTOCOL.md section 9.3: to a request that the stream has no
		// producer, later that its peer may be gone.
		switch {
		case m.Header.Get("Status") != "503":
			ep.refuse(s, m, violation, protocolError(CloseUnsupportedData, "empty message"))
		case s.stream != nil && s.bucket.mode == modeUnbound:
			s.endFromMux(&ending{kind: endFault, err: nats.ErrNoResponders})
		default:
			ep.outbox.deliver(control{session: s, absent: true})
		}
		return
	}
	if s.stream == nil { // a consumer that is sent packets answers in packets: this is somebody else
		ep.refuse(s, m, foreign, nil)
		return
	}
	first := s.bucket.mode == modeUnbound
	if jsonwire.IsPubAck(m.Data) {
		ep.counters.pubAcks.Add(1)
		return
	}
	v, err := s.bucket.acceptJSON(m.Data, ep.fallback)
	if v != accepted {
		ep.refuse(s, m, v, err)
	} else if first {
		s.oneWay.Store(true)
		s.mark(workBind | workSettle) // its reader may have come to the end before this
	}
}

// refuse counts what was not accepted, asks for what is missing, and ends the stream where it cannot go on.
func (ep *endpoint) refuse(s *session, m *nats.Msg, v verdict, err *CloseError) {
	switch v {
	case duplicate:
		ep.counters.duplicate.Add(1)
		if m.Data[1]&byte(PacketAck|PacketMark) != 0 {
			s.mark(workCredit) // the answer to the first one was lost
		}
	case gap:
		ep.counters.early.Add(1)
		ep.missing(s)
	case foreign:
		ep.counters.foreign.Add(1)
		ep.answer(m)
	case malformed:
		ep.counters.malformed.Add(1)
	case violation:
		s.endFromMux(&ending{kind: endFault, err: err, reset: *err})
	}
}

// missing asks for the packets that are missing, unless it just did.
func (ep *endpoint) missing(s *session) {
	if s.bucket.ask(ep.clock.Load(), ep.times.Ack) {
		s.mark(workGap)
	}
}

// register gives the session a token and makes the mux deliver to it. offer is what the token tells the peer. It returns why
// that cannot be, if so.
func (ep *endpoint) register(s *session, offer Token) *ending {
	buf := make([]byte, 0, len(ep.prefix)+TokenSize)
	buf = append(buf, ep.prefix...)
	var id [8]byte
	rand.Read(id[:])
	offer.ID = binary.BigEndian.Uint64(id[:])
	s.reply = string(AppendToken(buf, offer))
	ep.sessions.Store(s.token(), s)
	// The goroutine that ends the endpoint, or finds its inbox refused, says so first and visits the sessions afterwards: either it
	// sees this one, or this sees the reason.
	e := ep.barred()
	if e != nil {
		s.unregister()
	}
	return e
}

func (s *session) token() string { return s.reply[len(s.ep.prefix):] }

func (s *session) unregister() {
	if s.reply != "" {
		s.ep.sessions.Delete(s.token())
	}
}

// newSender returns a random number for a send half. It tells two answers to one request apart. It comes from a cryptographic
// source: a RESET with the receiver's own number says that the peer has forgotten the stream, so a stranger must not guess it.
// Those of consumers are odd and those of producers even: an end does not mistake such a RESET for one of its peer because both
// have drawn the same number.
func newSender(odd bool) uint64 {
	var b [8]byte
	rand.Read(b[:])
	n := binary.BigEndian.Uint64(b[:]) & maxSender &^ 1
	if odd {
		n |= 1
	}
	return n
}

// The more streams there are, the smaller their windows: what all of them hold in flight passes through the processor's
// caches, or does not fit and passes through memory. 100 streams of 256 KiB ran at little more than half the speed of
// the same 100 with what reserve gives them.
const (
	smallerFrom = 64 // with this part of the budget in use first windows begin to shrink, by half for each doubling
	growthPart  = 8  // windows grow within this part of the budget; the rest is for new streams
)

// reserve takes a first window for a stream out of the budget: want bytes, or half, a quarter, … of it. Below minWindow
// a stream would crawl, so that much is given in any case.
func (ep *endpoint) reserve(want uint64) uint64 {
	for used := ep.reserved.Load(); want > minWindow && used > ep.budget/smallerFrom; used /= 2 {
		want /= 2
	}
	for ; want > minWindow; want /= 2 {
		if ep.take(want, ep.budget) {
			return want
		}
	}
	ep.reserved.Add(int64(want))
	return want
}

// grow takes n more bytes for a window that is too small.
func (ep *endpoint) grow(n uint64) bool { return ep.take(n, ep.budget/growthPart) }

// take takes n bytes out of the budget, if no more than limit are in use then.
func (ep *endpoint) take(n uint64, limit int64) bool {
	if ep.reserved.Add(int64(n)) > limit {
		ep.reserved.Add(-int64(n))
		return false
	}
	return true
}

// watch follows the connection's status and the inbox until the endpoint is closed or the connection is. before says whether the
// connection has been up.
func (ep *endpoint) watch(changes <-chan nats.Status, before bool) {
	defer close(ep.watched)
	defer ep.stopWatch()
	again := time.NewTimer(never) // to subscribe to a refused inbox again
	defer again.Stop()
	first, changed, renew := true, true, false
	for {
		if changed {
			// What the channel says may be old: it drops news while it is full. That there was news is enough.
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

// follow takes the connection's status. A connection that drains still takes what is published, until its subscriptions are
// gone. again says that it has been up before.
func (ep *endpoint) follow(status nats.Status, again bool) {
	switch status {
	case nats.CONNECTED:
		ep.lookAtMaxPayload()
		if again {
			ep.outbox.resume() // before anything is published and its clocks start
		}
		ep.outbox.up.Store(true) // also if the outbox saw the connection go first
		if again {               // it may have been away too shortly to be seen so
			ep.probe()
		}
		ep.outbox.park.Wake()
	case nats.DRAINING_SUBS, nats.DRAINING_PUBS:
		ep.draining.Store(true)
	default:
		ep.outbox.up.Store(false)
		ep.ticker.Arm() // DisconnectTimeout runs
	}
}

// probe says again what may have been lost with a connection: every reader its credit, every writer how far it is. The
// answers set going what waits, and ask for what is missing.
func (ep *endpoint) probe() {
	ep.sessions.Range(func(_ string, s *session) bool {
		s.mark(workResume)
		return true
	})
}

// lost ends every stream because the connection is closed for good, and with them everything that keeps the endpoint and the
// connection alive, because nobody may ever call close. Records that arrived can still be read.
func (ep *endpoint) lost() {
	ep.outbox.up.Store(false)
	ep.endAll(&ending{kind: endFault, err: connectionLost(nats.ErrConnectionClosed)})
	ep.outbox.stop()
	ep.stopTicker()
	ep.stopErrors()
}

// reported takes an error that NATS reported: a stream whose subject this end may not publish to ends, and all of them if it may
// not receive.
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
		ep.outbox.ask(aside{subject: d.Subject, denied: err})
	}
}

// subscriptionRefused tells the server, if there is one, of a refused subscription. d is zero if NATS did not say which.
func (ep *endpoint) subscriptionRefused(d natsconn.Denial, err error) {
	if f := ep.onRefused.Load(); f != nil {
		(*f)(d, err)
	}
}

// barred returns why no stream may begin or go on: the endpoint is gone, or its inbox is refused. It returns nil if streams may.
func (ep *endpoint) barred() *ending {
	if e := ep.gone.Load(); e != nil {
		return e
	}
	return ep.inbox.refused.Load()
}

func (ep *endpoint) endAll(e *ending) {
	ep.gone.CompareAndSwap(nil, e)
	ep.cancel(e.err)
	ep.sessions.Range(func(_ string, s *session) bool {
		s.requestEnd(e)
		return true
	})
}

// close ends every stream with e, tells their peers, and returns when the endpoint's goroutines have ended.
func (ep *endpoint) close(e *ending) {
	if ep.closing.Swap(true) {
		<-ep.closed
		return
	}
	until := time.Now().Add(natsconn.UnsubscribeTimeout)
	ep.endAll(e)
	ep.outbox.awaitAnswers(min(time.Duration(ep.times.Ack), natsconn.UnsubscribeTimeout))
	ep.inbox.close()
	ep.outbox.stop()
	// The last words are in a buffer of nats.go, and the program may end after this.
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

// unknownPayload stands for max_payload until a NATS server has said it, which it has not before the first connect. Nothing is
// refused or cut because of a limit that is not known.
const unknownPayload = math.MaxInt32

// lookAtMaxPayload remembers what the connection's server takes. The server changes it at any time: with each INFO, of which
// nats.go tells nobody. It takes the connection's lock, so only the endpoint's own goroutines call it.
func (ep *endpoint) lookAtMaxPayload() {
	n := ep.conn.MaxPayload()
	if n <= 0 {
		n = unknownPayload
	}
	if ep.maxPayload.Load() != n {
		ep.maxPayload.Store(n)
	}
}

// freshMaxPayload is maxPayload as the connection says now, for a call that fails otherwise. It waits for the outbox, at most
// AckTimeout, because the connection may take no bytes.
func (ep *endpoint) freshMaxPayload(ctx context.Context) int64 {
	o := &ep.outbox
	if !o.up.Load() {
		return ep.maxPayload.Load()
	}
	looked := make(chan struct{})
	o.ask(aside{looked: looked})
	late := time.NewTimer(time.Duration(ep.times.Ack))
	defer late.Stop()
	select {
	case <-looked:
	case <-late.C:
	case <-ctx.Done():
	case <-o.done:
	}
	return ep.maxPayload.Load()
}

// reasonLimit is the longest reason that a message has room for.
func (ep *endpoint) reasonLimit() int {
	return max(0, min(MaxReason, int(ep.maxPayload.Load())-PacketHeaderSize-FrameHeaderSize))
}

// lastToken returns the last token of a subject.
func lastToken(subject string) string { return subject[strings.LastIndexByte(subject, '.')+1:] }

func floorPow2(n uint64) uint64 { return 1 << (bits.Len64(n) - 1) }
