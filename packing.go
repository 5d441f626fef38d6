package stream

import (
	"bytes"
	"context"
	"sync"
	"sync/atomic"

	"github.com/natsstream/stream/internal/flow"
	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/lifecycle"
)

// packer is the part of a send half that its writers and the outbox share. It holds the open packet, the credit, and
// the queue of sealed packets. The writers fill packets. The outbox seals the open packet when no sealed one is left.
// Methods with the suffix Locked need mu. Any goroutine may call publishHeld, closeToLeave and shut, which take it. No
// method of packer waits: the waits are those of Writer.
type packer struct {
	// Set once.
	session *session

	ctx lazyContext // of the writers: see context

	waiting atomic.Bool // wake is not nil; stored with the lock held

	// mu guards these three fields as well. They lie above it, so that a cache line begins with mu.
	size         int32   // of the packet sealed last, in bytes
	written      counted // by writers, without the open packet
	acknowledged counted // the part of written that the peer acknowledged

	mu sync.Mutex // guards the fields down to closing

	// Each Write uses the fields from mu to open, which lie in one cache line.
	records  uint32 // in the open packet, those that end in it
	queued   bool   // the session is marked with workPackets
	encoding bool   // the turn's owner encodes into the rest of the open packet, without the lock
	turn     bool   // one goroutine writes a record in several steps: others wait
	half     bool   // CLOSE has the flag HALF: the handler goes on reading
	// The open packet and how much of it is written. fast is the part of its buffer that Write may fill, and empty
	// whenever Write must take the slow path: no open packet, a writer has the turn, closed, ended.
	n    int
	fast []byte
	open *packet

	sealed      uint32   // sequence number of the open packet, or of the next to be opened
	placedIn    uint32   // number of the envelope that has the last placed packet. It lies in a gap
	sealedBytes uint64   // of all packets before it
	shifted     uint32   // by how much sealed grew because packets were cut; the outbox stores it with the lock, and reads it without
	acked       uint32   // number of packets that the peer acknowledged
	granted     credited // by the peer
	kept        uint64   // bytes of the buffers of packets that are open, sealed, or published and not acknowledged

	wake         chan struct{} // closed when anything under the lock, or the credit, changes; nil while nobody waits
	publishError error         // the last publish failed; its packet is kept and published again by the next call
	subject      string        // the first address of the peer; empty while a consumer does not know it
	trailer      []byte        // the headers of SetTrailer, in META form
	closing      CloseError    // the code and reason in CLOSE. After CLOSE was sealed, the outbox reads it, half and soon without the lock

	// held is set while a handler has closed the stream and CLOSE is not written yet: the handler may still fail.
	// Stored with the lock held.
	held   atomic.Bool
	closed atomic.Bool // CLOSE was written: no records after it. Stored with the lock held
	soon   bool        // CLOSE asks for its acknowledgement at once; guarded by the lock

	place place // of the next record

	packetSize atomic.Int32 // bytes that a packet should hold at most, 0 before the outbox stored it

	ready readyPackets
}

// context returns the context of the writers.
func (pk *packer) context() context.Context {
	s := pk.session
	if s.role == lifecycle.Consumer {
		return pk.ctx.get(s.ctx.get(s.recv.parent))
	}
	return pk.ctx.get(s.recv.parent)
}

// cancel ends the context of the writers, unless it has ended.
func (pk *packer) cancel(cause error) { pk.ctx.end(cause) }

// canceled returns why the context of the writers has ended, nil before its end. It does not look at the context that
// the user gave.
func (pk *packer) canceled() error {
	if cause := pk.ctx.endCause(); cause != nil || pk.session.role != lifecycle.Consumer {
		return cause
	}
	return pk.session.ctx.endCause()
}

// coalesceLimit returns the size up to which a packet gathers records.
func (pk *packer) coalesceLimit() int {
	return min(coalesceMost, pk.packetLimit())
}

// packetLimit returns the most bytes that a packet may hold: the server's max_payload, or fewer if the line to the peer
// is slow.
func (pk *packer) packetLimit() int {
	p := int(pk.packetSize.Load())
	if p == 0 {
		p = flow.FirstPacket
	}
	return min(int(pk.session.ep.maxPayload.Load()), p)
}

// openLocked opens the packet with number sealed. Its size follows that of the one before: a busy stream soon has
// large packets, an idle one small ones.
func (pk *packer) openLocked(n int) {
	pk.open = getPacket(max(n, min(int(pk.size), coalesceSize)))
	pk.keepLocked(pk.open)
	pk.n = PacketHeaderSize
	pk.resetFastLocked()
}

// growLocked moves the open packet into a buffer of at least n bytes. A stream under load has large packets in few
// steps.
func (pk *packer) growLocked(n int) {
	pk.moveLocked(max(n, min(growthFactor*len(pk.open.buf), coalesceSize)))
	pk.resetFastLocked()
}

// growthFactor is the least factor by which a packet grows.
const growthFactor = 4

// moveLocked moves the open packet into another buffer of at least n bytes.
func (pk *packer) moveLocked(n int) {
	p := getPacket(n)
	copy(p.buf, pk.open.buf[:pk.n])
	pk.keepLocked(p)
	pk.freeLocked(pk.open.memory())
	putPacket(pk.open)
	pk.open = p
}

// keepLocked counts the buffer of p, from when p is opened until it is acknowledged. freeLocked discounts n bytes.
func (pk *packer) keepLocked(p *packet) {
	pk.kept += p.memory()
	pk.session.ep.kept.Add(int64(p.memory()))
}

func (pk *packer) freeLocked(n uint64) {
	if n != 0 { // the endpoint's count is shared with all writers
		pk.kept -= n
		pk.session.ep.kept.Add(-int64(n))
	}
}

// spaceLocked returns the next n bytes of the open packet. If n bytes do not fit, it seals the packet and opens
// another. It returns nil if there is no credit for that.
func (pk *packer) spaceLocked(n int) []byte {
	if pk.open != nil {
		limit := pk.coalesceLimit()
		if pk.n == PacketHeaderSize {
			limit = max(limit, pk.n+n) // a record too large to share a packet has one of its own
		}
		if pk.n+n > limit {
			pk.sealLocked()
			pk.markLocked()
		}
	}
	return pk.takeLocked(n)
}

// takeLocked is spaceLocked for bytes that the open packet, or a new one, has room for.
func (pk *packer) takeLocked(n int) []byte {
	if pk.open == nil {
		if !pk.creditLocked() {
			return nil
		}
		pk.openLocked(PacketHeaderSize + n)
	}
	end := pk.n + n
	if end > len(pk.open.buf) {
		pk.growLocked(end)
	}
	b := pk.open.buf[pk.n:end]
	pk.n = end
	return b
}

// singleLimit returns the largest payload that travels in one frame. It follows the server's max_payload. While most of
// the budget for kept packets is in use, pieces are smaller, because every stream may open one packet.
func (pk *packer) singleLimit() int {
	ep, size := pk.session.ep, singleSize
	if ep.kept.Load() > ep.budget-ep.budget/4 {
		size = coalesceSize
	}
	return max(1, min(size, pk.packetLimit())-PacketHeaderSize-FrameHeaderSize)
}

// appendSomeLocked appends the pieces of p for which there is credit, and returns the rest of p. The caller has the
// turn.
func (pk *packer) appendSomeLocked(p []byte, flags FrameFlags) (rest []byte) {
	for more := FlagMore; len(p) > 0; {
		n := min(len(p), pk.pieceLocked())
		b := pk.takeLocked(FrameHeaderSize + n)
		if b == nil {
			break
		}
		if n == len(p) {
			more = 0
			pk.records++
		} else {
			pk.besideLocked(FrameHeaderSize)
		}
		putFrameHeader(b, FrameData, flags|more, 0, n)
		p = p[copy(b[FrameHeaderSize:], p[:n]):]
		pk.markLocked()
	}
	return p
}

// keepRestLocked keeps a copy of the rest of a record, because its writer does not wait. The turn goes on until
// sendRestLocked has appended all of it.
func (pk *packer) keepRestLocked(rest []byte, flags FrameFlags) {
	x := pk.session.extra()
	x.rest, x.restFlags = bytes.Clone(rest), flags
}

// sendRestLocked appends as much of the rest of a record as credit allows. The outbox calls it when credit arrives.
func (pk *packer) sendRestLocked() {
	if !pk.turn {
		return
	}
	x := pk.session.extras.Load()
	if x == nil || x.rest == nil || pk.over() {
		return
	}
	if x.rest = pk.appendSomeLocked(x.rest, x.restFlags); len(x.rest) == 0 {
		x.rest = nil
		pk.endTurnLocked()
	}
}

// endTurnLocked ends the turn. Other goroutines may write, and the outbox may seal the open packet.
func (pk *packer) endTurnLocked() {
	pk.turn = false
	pk.resetFastLocked()
	if pk.open != nil && pk.n > PacketHeaderSize {
		pk.markLocked()
	}
	pk.wakeLocked()
}

// markLocked marks the session for the outbox, unless that was done.
func (pk *packer) markLocked() {
	if !pk.queued {
		pk.queued = true
		pk.session.mark(workPackets)
	}
}

// wakeLocked wakes the writers that wait.
func (pk *packer) wakeLocked() {
	if pk.wake != nil {
		close(pk.wake)
		pk.wake = nil
		pk.waiting.Store(false)
	}
}

// over reports whether the stream or its context ended. The context that the user gave ends first; those below it
// follow.
func (pk *packer) over() bool {
	return pk.session.end.Load() != nil || pk.session.recv.parent.Err() != nil || pk.canceled() != nil
}

// shut makes Write take its slow path, which sees that the stream has ended.
func (pk *packer) shut() {
	pk.mu.Lock()
	pk.fast, pk.place.at = nil, nil
	pk.mu.Unlock()
}

// resetFastLocked lets Write use the open packet, unless a goroutine has the turn.
func (pk *packer) resetFastLocked() {
	pk.fast = nil
	if pk.open != nil && !pk.turn && !pk.closed.Load() && !pk.held.Load() && !pk.over() && !pk.session.late() &&
		pk.session.ep.maxRecord >= coalesceSize { // otherwise Write must check
		pk.fast = pk.open.buf[:min(len(pk.open.buf), pk.coalesceLimit())]
	}
}

// sealLocked ends the open packet: it takes no more records, and belongs to the outbox from here on. A packet that uses
// up the credit gets ACK.
func (pk *packer) sealLocked() {
	pk.padLocked()
	if n := len(pk.open.buf); n >= wasteful*pk.n && n > packetClasses[0] { // the whole buffer is kept until the acknowledgement
		pk.moveLocked(pk.n)
	}
	p := pk.open
	p.buf = p.buf[:pk.n]
	p.last = pk.closed.Load()
	seq := pk.sealed
	pk.sealed++
	pk.sealedBytes += uint64(pk.n)
	pk.size = int32(pk.n)
	pk.countLocked()
	p.through = pk.written
	pk.open, pk.n, pk.fast = nil, 0, nil
	if !pk.session.peerTakesJSON() {
		flags := PacketSeq
		pk.soon = pk.soon || p.last && pk.closeSoon()
		if p.last && pk.soon || !pk.creditLocked() {
			flags |= PacketAck
		}
		putPacketHeader(p.buf, flags, pk.session.senderNumber, seq, len(p.buf))
	}
	pk.ready.push(p) // credit bounds the packets that are sealed and not acknowledged
}

// wasteful times the size of its packet is the size from which on a buffer is exchanged for a smaller one.
const wasteful = 2

// closeSoon reports whether CLOSE asks for an acknowledgement at once. A consumer that still sends gets a RESET, and
// the RESET must come after the acknowledgement.
func (pk *packer) closeSoon() bool {
	s := pk.session
	return s.role == lifecycle.Handler && !s.readDone() && s.bucket.ring.Pushed() > 0
}

// publishHeld publishes a CLOSE that was held back, because the handler goes on.
func (pk *packer) publishHeld() {
	if pk.held.Load() {
		pk.mu.Lock()
		pk.publishHeldLocked()
		pk.mu.Unlock()
	}
}

func (pk *packer) publishHeldLocked() {
	if !pk.held.Load() || pk.over() {
		return
	}
	pk.held.Store(false)
	pk.half = !pk.session.peerTakesJSON()
	pk.appendCloseLocked(pk.closing.Code, pk.closing.Text)
	pk.markLocked()
}

// closeToLeave closes the direction of a consumer that leaves. It does not wait. It reports false if some written
// records cannot be sent: the stream has ended, the producer is not known yet, or another goroutine is in the middle of
// a record.
func (pk *packer) closeToLeave(reason string) bool {
	pk.mu.Lock()
	defer pk.mu.Unlock()
	switch {
	case pk.turn || pk.subject == "" || pk.session.end.Load() != nil || pk.canceled() != nil && !pk.closed.Load():
		return false
	case pk.closed.Load():
		pk.closing.Text = reason // for the RESET
		pk.session.mark(workProbe)
		return true
	}
	pk.soon = true
	pk.appendCloseLocked(CloseNormalClosure, reason)
	pk.markLocked()
	pk.wakeLocked()
	return true
}

// appendCloseLocked writes the last frame. It needs no credit: one packet beyond it is reserved for it.
func (pk *packer) appendCloseLocked(code int, reason string) {
	if pk.session.peerTakesJSON() {
		pk.appendCloseJSONLocked(code, reason)
		return
	}
	reason = cutReason(reason, pk.session.ep.reasonLimit())
	n := FrameHeaderSize + len(reason)
	if pk.trailer != nil {
		n += FrameHeaderSize + len(pk.trailer)
	}
	if pk.open != nil && pk.n+n > pk.coalesceLimit() {
		pk.sealLocked()
	}
	if pk.open == nil {
		pk.openLocked(PacketHeaderSize + n)
	}
	if pk.n+n > len(pk.open.buf) {
		pk.growLocked(pk.n + n)
	}
	b := pk.open.buf[pk.n : pk.n+n]
	if pk.trailer != nil {
		putFrameHeader(b, FrameMeta, FlagTrailer, 0, len(pk.trailer))
		b = b[FrameHeaderSize+copy(b[FrameHeaderSize:], pk.trailer):]
	}
	var flags FrameFlags
	if pk.half {
		flags = FlagHalf
	}
	putFrameHeader(b, FrameClose, flags, uint16(code), len(reason))
	copy(b[FrameHeaderSize:], reason)
	pk.n += n
	pk.besideLocked(n)
	pk.closed.Store(true)
	pk.closing = CloseError{code, reason}
	pk.fast = nil
}

func (pk *packer) appendCloseJSONLocked(code int, reason string) {
	m := jsonwire.AppendClose(nil, jsonwire.Close{Code: code, Text: cutReason(reason, pk.session.ep.reasonLimit())})
	pk.open = getPacket(len(m))
	pk.keepLocked(pk.open)
	pk.n = copy(pk.open.buf, m)
	pk.besideLocked(pk.n - PacketHeaderSize)
	pk.closed.Store(true)
	pk.closing = CloseError{code, reason}
	pk.sealLocked()
}

// hasOpenLocked reports whether the open packet holds complete records.
func (pk *packer) hasOpenLocked() bool {
	return pk.open != nil && (!pk.turn || pk.encoding) && pk.n != PacketHeaderSize
}

// sealOpenLocked seals the open packet for the outbox, which has published all sealed ones: while the outbox is busy,
// the packet fills. If there is no record to publish, the next one marks the session again.
func (pk *packer) sealOpenLocked() {
	if !pk.hasOpenLocked() {
		pk.queued = false
		return
	}
	if pk.encoding { // complete records do not wait; the rest of the buffer is the encoder's, so it is not pooled
		pk.open = &packet{buf: pk.open.buf, class: unpooled}
	}
	pk.sealLocked()
}

// creditLocked reports whether another packet may be opened; docs/PROTOCOL.md section 8. It checks the peer's credit
// and the budget for kept packets, so that a peer that does not acknowledge cannot make this end keep more.
func (pk *packer) creditLocked() bool {
	return int32(pk.sealed-pk.granted.packets) < 0 && pk.sealedBytes < pk.granted.bytes &&
		pk.sealed-pk.acked < maxUnacked && mayKeep(pk.kept, pk.session.ep.kept.Load(), pk.session.ep.window, pk.session.ep.budget)
}

// maxUnacked bounds the packets that are kept for a peer that grants without end and never acknowledges.
const maxUnacked = 4 * maxPackets

// mayKeep reports whether a stream may open another packet. The stream keeps kept bytes, and all streams of the
// endpoint together keep all bytes. Each may keep at most its window and at most the free part of the budget. So a few
// streams get all they need, the budget is never used up, and later streams get as much as present ones (Choudhury and
// Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998). Every stream may keep minWindow,
// so that none stands still.
func mayKeep(kept uint64, all int64, window uint64, budget int64) bool {
	return kept < window && (kept < minWindow || int64(kept) < budget-all)
}

// offered returns the first credit of a token or offer; docs/PROTOCOL.md section 8.
func offered(t Token) credited {
	return credited{1 << min(t.LogPackets, halfLogPackets), 1 << t.LogBytes}
}

// halfLogPackets keeps a first credit below half of the sequence numbers, which are compared by their distance.
const halfLogPackets = 30

// grantLocked takes a grant of the consumer, which acknowledged n more packets with buffers of memory bytes. Grants are
// absolute, so an old or repeated one changes nothing.
func (pk *packer) grantLocked(n uint32, memory uint64, granted credited) {
	pk.acked += n
	pk.freeLocked(memory)
	if int32(granted.packets-pk.granted.packets) > 0 {
		pk.granted.packets = granted.packets
	}
	pk.granted.bytes = max(pk.granted.bytes, granted.bytes)
	pk.sendRestLocked()
	pk.wakeLocked()
}

// stalled reports whether writes wait for the peer's credit.
func (pk *packer) stalled() bool {
	if pk.session.peerTakesJSON() || !pk.waiting.Load() {
		return false
	}
	pk.mu.Lock()
	defer pk.mu.Unlock()
	return pk.wake != nil && !pk.creditLocked()
}

// bind lets the send half of a consumer begin, because the address of its producer is known. Called by the outbox.
func (pk *packer) bind(subject string, first credited) {
	pk.mu.Lock()
	defer pk.mu.Unlock()
	if pk.subject != "" {
		return
	}
	pk.subject, pk.granted = subject, first
	pk.wakeLocked()
}

// dropOpen drops the open packet and discounts all kept buffers, because the stream has ended. Called by the outbox.
func (pk *packer) dropOpen() {
	pk.mu.Lock()
	defer pk.mu.Unlock()
	if pk.open != nil && !pk.turn { // while a goroutine has the turn, an encoder may write into it: then the garbage collector frees it
		putPacket(pk.open)
	}
	if pk.open != nil && pk.n > PacketHeaderSize {
		pk.sealed++ // dropped records are never acknowledged
		pk.countLocked()
	}
	pk.open, pk.n, pk.fast = nil, 0, nil
	if x := pk.session.extras.Load(); x != nil {
		x.rest = nil
	}
	pk.freeLocked(pk.kept)
	pk.wakeLocked()
}
