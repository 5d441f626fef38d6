package stream

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/liveness"
	"github.com/natsstream/stream/internal/ring"
	"github.com/natsstream/stream/internal/wheel"
)

// outbox is the one goroutine of an endpoint that publishes: requests, packets, credits, resets. Writers, readers and
// the mux only mark a session. They never publish, because a publish can block as long as the connection does, and a
// caller's context must be able to end the caller's wait. The outbox serves sessions in turn, one packet a turn, so a
// busy stream delays another one by one packet. A session that is alone has a turn of up to one write.
//
// If the outbox sleeps, a writer may publish a packet in its place, on a fast connection; see visit.go.
//
// Any goroutine may call doLater. The goroutine that closes the endpoint, and the watcher, may call finish. newEndpoint
// calls init before the outbox starts. queue.go describes the queue of marked sessions.
type outbox struct {
	ep    *endpoint
	queue atomic.Pointer[session] // a stack of marked sessions; the outbox takes all of it and reverses it
	park  ring.Parker
	up    atomic.Bool // the connection is CONNECTED

	placed        atomic.Pointer[enveloping] // a stack of those with placed packets that the outbox has not taken
	openByWriters atomic.Int32               // open envelopes that writers have opened

	delivered uint64             // bytes ever pushed to inbound; the mux's
	inbound   ring.Ring[control] // mux pushes, outbox pops
	acted     atomic.Uint64      // bytes ever popped from inbound, stored by the outbox

	// Work outside any session that does not come from the mux: requests that a Server refuses, subjects that NATS
	// denied.
	mu               sync.Mutex // guards the two fields below
	outOfStream      []outOfStream
	outOfStreamBytes int // of their subjects

	resumed atomic.Int64 // when the connection last came back, by the endpoint's time
	// connection counts how often the connection came back: messages that were published before may be lost.
	connection atomic.Uint32
	dropped    atomic.Bool // the mux found no room in inbound since the last tick

	leaving  atomic.Bool // the endpoint closes, and waits for told
	stopping atomic.Bool
	told     chan struct{} // closed after leaving, when every producer was reset
	done     chan struct{}

	// Owned by the goroutine of the outbox, or by a visitor while that sleeps.
	slept          int64 // when the outbox last had nothing left to do, by the endpoint's time
	visits         visits
	peers          peers
	lines          lines
	waitingUntilUp []*session           // sessions with deferred work, while the connection is down
	wheel          wheel.Wheel[session] // sessions by the time at which to look at them
	clock          liveness.Clock       // by which peers are judged
	ticked         int64                // when tick was last called, by the endpoint's time
	down           int64                // since when the connection is down, by the endpoint's time
	ended          endedStreams
	scratch        []byte

	yielder   ring.Yielder
	hellos    hellos
	envelopes envelopes
	alone     bool // no other session waits for its turn in this round
	lent      bool // the last packet of records waits for another one to share its write: see send

	unanswered unanswered
	sawLeaving bool
	toldAll    bool // told is closed

	denials denials

	remotes     map[string]*remote  // other ends, by their names
	idleRemotes int                 // of them have no streams
	askers      []*remote           // have streams that wait to ask
	remoteWheel wheel.Wheel[remote] // other ends by the time at which to look at them
	streamTimes liveness.Intervals  // those of the endpoint, except KeepAlive, which is that of a single stream
	repeat      int64               // the time after which a question on a single stream is repeated
	asking      int                 // streams that were asked and have not answered
}

// outOfStream is outbox work outside any session: a refused request, or a subject that NATS denied.
type outOfStream struct {
	subject string      // the peer's
	json    bool        // it speaks only the fallback
	refuse  *CloseError // the refusal to send to it
	denied  error       // NATS does not let this end publish to subject

	looked chan struct{} // look at max_payload, and close this

	silenced *ending // the inbox is refused: end the streams without a token
	drains   bool    // the connection drains: reset all streams

	sought string // a consumer asks at subject for the stream with this token
}

// Bounds of the work outside sessions that waits for the outbox. Work that finds no room is counted and dropped.
const (
	maxOutOfStream      = 1 << 14
	maxOutOfStreamBytes = 4 << 20 // of their subjects, each of which may have 4 KiB
	outOfStreamTurn     = 32      // done before sessions have their turn

	maxSought = maxOutOfStream / 4 // a consumer that asks for its stream is dropped if more wait: strangers leave room
)

func (o *outbox) init(ep *endpoint) {
	o.ep = ep
	o.peers.init()
	o.inbound.Init(maxInbound)
	o.hellos.init(o)
	o.lines.byPeer = make(map[string]*line)
	o.told, o.done = make(chan struct{}), make(chan struct{})
	o.scratch = make([]byte, 0, PacketHeaderSize+FrameHeaderSize+MaxReason)
}

func (o *outbox) run() {
	defer close(o.done)
	for rounds := 0; ; { // since sendAll
		o.lent = false
		stopping := o.stopping.Load() // sessions that were marked before are served below
		o.sawLeaving = o.leaving.Load()
		worked := o.receive()
		if o.tickIfDue() {
			worked = true
		}
		if o.doOutOfStream() {
			worked = true
		}
		if len(o.waitingUntilUp) > 0 && o.up.Load() {
			o.serveHeld()
			worked = true
		}
		for s := o.take(); s != nil; worked = true {
			next := s.next
			s.next = nil // otherwise this session keeps the next one in memory
			o.envelopes.more, o.alone = next != nil, next == nil
			o.takePlaced()
			o.serve(s, s.pending.Swap(0))
			o.settleRetained()
			if o.envelopes.packets >= maxEnclosed {
				o.sendEnvelopes()
			}
			s = next
			o.receive() // an acknowledgement frees memory and credit for the next packet
			o.tickIfDue()
		}
		if o.takePlaced() {
			worked = true
		}
		o.envelopes.more = false
		o.sendEnvelopes()
		o.watchPlaced()
		o.settleRetained()
		if o.lent && o.queue.Load() != nil && rounds < gatheredRounds { // the next packet may share its write
			rounds++
			continue
		}
		rounds = 0
		o.sendAll()
		if worked {
			continue
		}
		if o.hellos.due.Load() {
			o.greet()
			o.sendAll()
			continue
		}
		if o.sawLeaving && !o.toldAll {
			o.answerLast()
		}
		if stopping {
			o.serveHeld() // also if the connection is down
			o.endRest()
		}
		o.sendAll()
		if stopping {
			return
		}
		o.slept = o.ep.now()
		if o.announce() {
			o.park.Wait()
			o.yield()
		} else {
			o.park.Retract()
		}
	}
}

// gatheredRounds is how many rounds over the queue a packet waits at most for others that share its write.
const gatheredRounds = 4

// yield lets other goroutines run before the outbox serves the session that woke it. If many streams begin and end,
// these goroutines mark further sessions, and the messages of all of them share writes to the socket.
func (o *outbox) yield() {
	first, began := o.queue.Load(), time.Duration(o.ep.now())
	if first == nil || !o.yielder.Due(began) {
		return
	}
	runtime.Gosched()
	marked := 0
	for s := o.queue.Load(); s != first; s = s.next { // only the outbox takes sessions off the queue
		marked++
	}
	o.yielder.Yielded(began, time.Duration(o.ep.now()), marked)
}

// sendAll sends all packets that wait.
func (o *outbox) sendAll() {
	o.sendEnvelopes()
	o.ep.conn.Recall()
	o.ep.conn.Push()
}

// endRest ends the streams of producers that were not marked since the endpoint ended. They have no token, so endAll
// does not find them, and their consumers would wait for ever.
func (o *outbox) endRest() {
	gone := o.ep.gone.Load()
	if gone == nil {
		return
	}
	for s := range o.wheel.All() {
		s.requestEnd(gone)
		o.end(s, s.end.Load())
	}
}

// announce announces that the outbox is about to sleep, and reports whether it has no work. From the announcement on, a
// visitor may own the fields of the outbox, so they are read before.
func (o *outbox) announce() (idle bool) {
	held, sawLeaving := len(o.waitingUntilUp) > 0, o.sawLeaving
	o.park.Announce()
	return o.queue.Load() == nil && o.placed.Load() == nil && o.inbound.Empty() && !o.ep.ticker.Due() && !o.hellos.due.Load() && !o.hasOutOfStream() && !o.stopping.Load() &&
		o.leaving.Load() == sawLeaving && (!held || !o.up.Load())
}

// finish lets the outbox finish all marked work, and returns when that is done.
func (o *outbox) finish() {
	o.stopping.Store(true)
	o.park.Wake()
	<-o.done
}

// doLater queues work outside any session for the outbox. It neither blocks for long nor calls NATS.
func (o *outbox) doLater(a outOfStream) {
	o.mu.Lock()
	full := len(o.outOfStream) >= maxOutOfStream || a.sought != "" && len(o.outOfStream) >= maxSought || o.outOfStreamBytes+len(a.subject) > maxOutOfStreamBytes
	full = full && !a.drains && a.silenced == nil // which concern all streams, and peers cannot cause
	if !full {
		o.outOfStream = append(o.outOfStream, a)
		o.outOfStreamBytes += len(a.subject)
	}
	o.mu.Unlock()
	if full {
		o.ep.counters.overrun.Add(1)
	}
	o.park.Wake()
}

// hasOutOfStream reports whether there is work outside sessions that can be done now.
func (o *outbox) hasOutOfStream() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.outOfStream) > 0 && o.up.Load()
}

// doOutOfStream does the next work outside sessions, at most outOfStreamTurn pieces.
func (o *outbox) doOutOfStream() bool {
	if !o.hasOutOfStream() {
		return false
	}
	var turn [outOfStreamTurn]outOfStream
	o.mu.Lock()
	n := copy(turn[:], o.outOfStream)
	clear(o.outOfStream[:n])
	if o.outOfStream = o.outOfStream[n:]; len(o.outOfStream) == 0 {
		o.outOfStream = nil
	}
	for _, a := range turn[:n] {
		o.outOfStreamBytes -= len(a.subject)
	}
	o.mu.Unlock()
	for _, a := range turn[:n] {
		switch {
		case a.looked != nil:
			o.ep.lookAtMaxPayload()
			close(a.looked)
		case a.silenced != nil:
			if o.ep.inbox.refused.Load() == a.silenced {
				for s := range o.wheel.All() {
					s.requestEnd(a.silenced)
				}
			}
		case a.drains:
			o.endDrained()
		case a.sought != "":
			o.sought(a.sought, a.subject)
		case a.denied != nil:
			o.endDenied(a.subject, a.denied)
		case a.json:
			o.ep.publish(a.subject, "", jsonwire.AppendClose(nil, jsonwire.Close(*a.refuse)))
		default:
			f := Frame{Type: FrameReset, Code: uint16(a.refuse.Code), Payload: []byte(a.refuse.Text)}
			o.ep.publish(a.subject, "", AppendPacket(o.scratch[:0], PacketHeader{Sender: newSender(false)}, f))
		}
	}
	return true
}

// endDenied ends the streams that need to publish to subject, because NATS does not permit it.
func (o *outbox) endDenied(subject string, err error) {
	if o.envelopeDenied(subject) {
		return
	}
	found := false
	o.peers.take(subject, func(s *session) {
		found = true
		err := fmt.Errorf("stream: may not publish to %s; allow it (docs/PROTOCOL.md section 15): %w", subject, err)
		s.requestEnd(&ending{kind: endFault, err: err})
	})
	if !found {
		o.denials.add(subject, err, o.ep.now(), o.ep.times.Ack)
	}
}

// hold defers work for s until the connection is up.
func (o *outbox) hold(s *session, work uint32) {
	if s.out.deferredUntilUp == 0 {
		o.waitingUntilUp = append(o.waitingUntilUp, s)
	}
	s.out.deferredUntilUp |= work
}

// serveHeld does the work that was deferred until the connection is up.
func (o *outbox) serveHeld() {
	held := o.waitingUntilUp
	o.waitingUntilUp = nil
	o.alone = len(held) == 1
	for _, s := range held {
		work := s.out.deferredUntilUp
		s.out.deferredUntilUp = 0
		o.serve(s, work)
		o.settleRetained()
		o.receive() // the streams may have ended meanwhile
	}
}

// serve does the given work for s. It publishes one of its packets, or those of one write.
func (o *outbox) serve(s *session, work uint32) {
	if s.out.life.upSince == 0 {
		o.firstLook(s)
	}
	if o.serveEnd(s, work) {
		return
	}
	if !o.connected() {
		o.hold(s, work)
		return
	}
	if work&workRequest != 0 && !o.publishRequest(s) {
		return
	}
	if work&workNews != 0 {
		o.takeNews(s, work)
	}
	if work&workControl != 0 {
		o.serveControl(s, work)
	}
	if work&workPackets != 0 && s.out.peer != "" {
		o.servePackets(s)
	}
	if work&workBegin != 0 && s.wantsHello() {
		o.hellos.expect(s)
	}
	if work&workSettle != 0 {
		o.settle(s)
	}
}

// firstLook puts a session that is served for the first time on the wheel and in the outbox's tables.
func (o *outbox) firstLook(s *session) {
	if o.up.Load() {
		o.ep.lookAtMaxPayload() // the ticker may have slept
	}
	s.out.life.upSince = o.ep.now()
	look := s.out.life.upSince
	if s.role != lifecycle.Consumer { // the first look sends a hello, which is not needed if the producer writes soon
		look += int64(tickLength(&o.ep.times))
	}
	o.lookAt(s, look)
	o.peers.add(s)
	if s.out.peer != "" {
		o.joinRemote(s)
	}
}

// serveEnd acts on the end of s or of all streams. It reports whether there is one.
func (o *outbox) serveEnd(s *session, work uint32) bool {
	end := s.end.Load()
	if e := o.ep.barred(); end == nil && e != nil {
		s.requestEnd(e)
		end = s.end.Load()
	}
	if end == nil {
		return false
	}
	o.end(s, end)
	if work&workCredit != 0 && end.reset.Code == 0 && s.out.state.Phase == lifecycle.Gone {
		o.sendCredit(s, 0) // the acknowledgement of CLOSE was lost
	}
	return true
}

// publishRequest publishes the request of s, and ends the stream if that fails. It reports whether it was published.
func (o *outbox) publishRequest(s *session) bool {
	msg := &s.out.request.msg
	msg.Reply = s.reply()
	setTimeout(msg.Header, s.recv.parent)
	s.out.life.upSince, s.out.life.took = o.ep.now(), o.connection.Load()+1 // before it may be lost with the connection
	o.denials.publishes(s.out.subject, s.out.life.upSince, denialWindow*o.ep.times.Ack)
	if err := o.ep.conn.PublishMsg(msg); err != nil {
		if errors.Is(err, nats.ErrMaxPayload) { // the server takes less than it did when Open looked
			o.ep.lookAtMaxPayload()
			err = fmt.Errorf("stream: %w", tooLarge("request", requestSize(msg), o.ep.maxPayload.Load()))
		}
		s.requestEnd(&ending{kind: endFault, err: err})
		return false
	}
	s.dropOpening()
	return true
}

// takeNews records the work that the users of both halves and the mux marked for s.
func (o *outbox) takeNews(s *session, work uint32) {
	if work&workClose != 0 {
		q := &s.send.Load().unacked
		q.closeAt = o.ep.now() + int64(closeDelay)
		o.lookAt(s, q.closeAt)
	}
	if work&workBind != 0 {
		o.bind(s)
	}
	if work&workPatience != 0 {
		o.setPatience(s)
	}
}

// serveControl sends the control packets for s that are due: at most two CREDITs and a PING.
func (o *outbox) serveControl(s *session, work uint32) {
	resume := work&workResume != 0 && s.out.peer != ""
	if l := &s.out.life; work&workResume != 0 {
		s.observe(eventReconnected)
		o.schedule(s, o.time()) // checks that were due while the connection was down are due now
		if !resume && s.out.peer == "" && l.took != 0 && l.took <= o.connection.Load() {
			l.took, l.pinged = tookLost, o.time() // the request or its answer may be lost
		}
		resume = resume && o.mayResume(s)
	}
	if work&workRefusal != 0 {
		o.sendRefusal(s)
	}
	if work&workGap != 0 || resume {
		o.sendCredit(s, FlagGap)
	} else if work&workCredit != 0 {
		o.sendCredit(s, 0)
	}
	ended := work&workCredit != 0 && s.unheard()
	hello := work&workHello != 0 && s.wantsHello()
	if s.out.peer != "" && !s.peerTakesJSON() && (hello || resume || ended || work&workProbe != 0) {
		o.ping(s)
		if resume {
			o.seekNow(s)
		}
	}
}

// servePackets publishes the next packet of s. While the packet waits for others that share its write, and no other
// session waits for its turn, servePackets goes on with the sealed packets of s.
func (o *outbox) servePackets(s *session) {
	for gathers := true; gathers; {
		gathers = o.servePacket(s)
	}
}

// servePacket publishes the next packet of s, unless too much is on its way to the peer. It reports whether the packet
// waits for the next one of s.
func (o *outbox) servePacket(s *session) (gathers bool) {
	snd := s.send.Load()
	if !s.peerTakesJSON() && !o.mayPublish(s) {
		return false
	}
	o.introduce(s)
	o.lent = false
	next := snd.publishNext()
	if next == placedFirst {
		o.takePlaced()
		next = snd.publishNext()
	}
	switch next {
	case noPacket:
		s.out.places.clear(steady)
	case heldByLoss:
		o.ping(s)
	case tryAgain, placedFirst:
		s.mark(workPackets)
	case askAndTryAgain:
		o.askProgress(snd)
		s.mark(workPackets)
	case packetPublished:
		o.watchAck(s)
		if snd.unacked.bytes >= proveFrom {
			o.prove(s)
		}
		if gathers = o.lent && snd.hasReady() && o.alone && o.queue.Load() == nil; !gathers {
			s.mark(workPackets)
		}
	case closePublished:
		o.watchAck(s)
		o.closed(snd)
	}
	if l := s.out.line; l != nil {
		o.nextTurn(l)
		o.fitPlaces(s)
	}
	return gathers
}

// watchAck schedules a check of s for when the acknowledgement of the packet published just now is overdue.
func (o *outbox) watchAck(s *session) {
	l, ack := &s.out.life, o.ep.times.Ack
	if s.peerTakesJSON() || o.dueBy(s, l.sent+2*ack) {
		return
	}
	l.sent = o.time() // the stream was idle
	o.schedule(s, l.sent+ack)
}

// watchPlaced is watchAck for placed packets.
func (o *outbox) watchPlaced() {
	for i, s := range o.envelopes.unwatched {
		if s.out.state.Phase == lifecycle.Live {
			o.watchAck(s)
		}
		o.envelopes.unwatched[i] = nil
	}
	o.envelopes.unwatched = o.envelopes.unwatched[:0]
}

// closed handles the publish of CLOSE: it raises the event, and schedules a check of the acknowledgement.
func (o *outbox) closed(snd *sender) {
	s := snd.session
	o.step(s, lifecycle.ClosePublished)
	if s.peerTakesJSON() {
		o.step(s, lifecycle.CloseAcked)
		return
	}
	snd.unacked.closed = o.time()
	snd.unacked.closeSent = snd.unacked.closed
	o.schedule(s, snd.unacked.closed+min(o.ep.times.Ack, o.ep.times.Resume))
}

// connected reports whether the connection is up, so that a message published now is sent. nats.go buffers messages
// while it reconnects. These can be lost, or close the connection if the next server has a smaller max_payload.
func (o *outbox) connected() bool {
	if !o.up.Load() {
		return false
	}
	if isUp(o.ep.conn.Status()) {
		return true
	}
	o.up.Store(false)
	if isUp(o.ep.conn.Status()) { // the watcher may have stored true just before
		o.up.Store(true)
		return true
	}
	o.ep.ticker.Arm()
	return false
}
