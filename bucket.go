package stream

import (
	"encoding/binary"
	"fmt"
	"math"
	"sync/atomic"

	"github.com/natsstream/stream/internal/flow"
	"github.com/natsstream/stream/internal/ring"
	"github.com/natsstream/stream/internal/slab"
)

// bucket is the receive half of a stream. It holds the packets that arrived and were not read yet, and the state that
// distinguishes the next packet from a repeated, a missing or a foreign one.
//
// Three goroutines touch it. Their fields lie apart:
//
//   - the mux (the subscription's callback) checks and pushes. It never waits and takes no lock.
//   - the reader (the goroutine in a read of the stream) pops, decodes and decides about credit.
//   - the outbox sends the credit that the reader granted.
//
// The goroutine that makes a session runs init, and bind for a stream of OpenMany. After the user has left or this end
// has ended the stream, any goroutine may drop the packets in the ring, through dropUnwanted.
type bucket struct {
	// The form of the peer's messages. It is stored once: by the mux when a producer's first message arrives, or when a
	// producer's end is made.
	form atomic.Uint32

	// Owned by the mux.
	expect         uint32        // sequence number of the next packet
	dropped        atomic.Bool   // a packet was dropped because it found no room: set by the mux, cleared by the reader, who asks for it
	grantedPackets atomic.Uint32 // of the credit granted to the peer: see grantedBytes
	acceptWord     uint64        // first word of the header of a packet that is accepted at once: magic, version, SEQ, sender; 0 before bind
	received       uint64        // bytes of all packets pushed

	open atomic.Uint64 // received may reach it without more memory: the mux raises it, the reader raises and lowers it

	park ring.Parker                  // the reader waits here; the mux, and the goroutine that ends the stream, wake it
	ring ring.Spaced[arrival, seldom] // mux pushes, reader pops; its Push publishes the packet's bytes to the reader

	// The credit granted to the peer: stored by the reader, read by the mux (to see an overrun) and by the outbox (to
	// send it).
	grantedBytes atomic.Uint64

	// Owned by the reader.
	consumed      consumption
	free          uint64 // open may reach it without memory of the budget
	window        flow.Window
	windowPackets uint16
	limited       bool // the sender asked for credit since the last grant, or with the packet before it
	ranDry        bool // the reader ran out of packets since the last grant
}

// seldom has the fields of a bucket that are seldom written. They lie in the middle of its ring, where they keep the
// words of the mux and those of the reader on different cache lines.
type seldom struct {
	// Owned by the mux.
	last        bool   // the packet with CLOSE came beyond the credit: no packet may follow
	gapAsked    bool   // a CREDIT with GAP asked for packet gapAskedSeq, at gapAskedAt by the endpoint's clock
	gapAskedSeq uint32 // see gapAsked
	gapAskedAt  int64  // see gapAsked
	origin      string // the token in the control subject of the producer that the bucket is bound to

	released      atomic.Bool               // packets of the stream may have no memory of the budget any more. Any goroutine stores it
	fragments     atomic.Pointer[fragments] // the mux stores it; nil until a packet comes in fragments
	consumedBytes atomic.Uint64             // fallback only: stored by the reader so that the mux can bound the queued bytes
}

// arrival is a packet that arrived. The reader gives lent back after it has read the packet.
type arrival struct {
	data []byte
	lent *slab.Slab // that data lies in; nil if the packet has memory of its own
}

// consumption counts the packets that the reader has left, and their bytes.
type consumption struct {
	packets uint32 // modulo 2^32
	limit   uint32 // as grantedPackets, which lies on a cache line of the mux. It is here because there is room
	bytes   uint64
}

// credited is a position in the stream in both units of credit.
type credited struct {
	packets uint32 // modulo 2^32
	bytes   uint64
}

// Values of bucket.form; docs/PROTOCOL.md section 3.
const (
	formUnknown uint32 = iota // the producer has not answered
	formPackets
	formJSON // the fallback
)

// Windows, docs/PROTOCOL.md section 8.
const (
	initialPackets     = 32
	maxPackets         = 256
	initialWindow      = 256 << 10
	handlerWindow      = 64 << 10 // the same for records to a handler: most of them get none
	defaultWindow      = 4 << 20
	minWindow          = 4 << 10 // no stream begins with less
	defaultMaxBuffered = 64 << 20
	fallbackOverhead   = 64       // bytes that each queued message counts at least, so that many small ones are bounded
	fallbackMessages   = 1024     // that may be queued in any case
	fallbackLimit      = 64 << 20 // bytes queued for a reader if its peer knows no credit
)

// init prepares the bucket for a peer that was offered the given window.
func (b *bucket) init(packets uint32, bytes uint64) {
	b.ring.Init(maxPackets + 1) // one more for the packet that only closes
	b.windowPackets, b.window.Bytes = uint16(packets), bytes
	b.free = min(bytes, minWindow)
	b.open.Store(b.free)
	b.consumed.limit = packets
	b.grantedPackets.Store(packets)
	b.grantedBytes.Store(bytes)
}

// verdict is the result of checking a packet that the mux offered.
type verdict uint8

const (
	accepted  verdict = iota
	duplicate         // an older sequence number: dropped
	gap               // packets before it are missing: dropped, and retransmitted with them
	noRoom            // within the credit, but there may be no memory for it
	foreign           // another sender, or another kind of peer: dropped
	malformed         // header unreadable while bound: dropped
	violation         // the stream cannot go on; the error has the reason
)

// acceptNext pushes a sequenced packet without rare flags, if it is the next one and there is memory for it. Otherwise
// it does nothing, and accept finds the reason. Only the mux calls it.
func (b *bucket) acceptNext(data []byte, lent *slab.Slab) bool {
	if len(data) < PacketHeaderSize {
		return false
	}
	word, tail := binary.BigEndian.Uint64(data), binary.BigEndian.Uint64(data[8:])
	if word != b.acceptWord || word == 0 || tail != packetTail(b.expect, uint32(len(data))) ||
		int32(b.expect-b.grantedPackets.Load()) >= 0 || b.received+uint64(len(data)) > b.open.Load() {
		return false
	}
	b.push(data, lent)
	return true
}

func (b *bucket) push(data []byte, lent *slab.Slab) {
	b.expect++
	b.received += uint64(len(data))
	b.ring.Push(arrival{data, lent}) // never full: the granted packets are fewer than its limit
	b.park.Wake()
}

// accept checks a sequenced packet of any kind, and pushes it if it is the next one. With room it accepts a packet for
// which memory was taken just now. Only the mux calls it. It allocates only if it fails.
func (b *bucket) accept(data []byte, lent *slab.Slab, room bool) (verdict, *CloseError) {
	h, body, err := ParsePacketHeader(data)
	if err != nil {
		if b.unbound() {
			return violation, protocolError(CloseUnsupportedData, "first packet: %v", err)
		}
		return malformed, nil
	}
	if b.ofAnother(h.Sender) {
		return foreign, nil
	}
	switch d := int32(h.Seq - b.expect); {
	case d < 0:
		return duplicate, nil
	case d > 0:
		if b.unbound() {
			b.bind(h.Sender)
		}
		return gap, nil
	}
	beyond := int32(h.Seq-b.grantedPackets.Load()) >= 0 || b.received >= b.grantedBytes.Load()
	switch {
	case beyond && (b.ring.Between.last || !onlyClose(body)):
		return violation, protocolError(CloseProtocolError, "peer sent packet %d beyond its credit of %d packets, %d bytes",
			h.Seq, b.grantedPackets.Load(), b.grantedBytes.Load())
	case !room && !beyond && b.received+uint64(len(data)) > b.open.Load(): // the place for CLOSE beyond the credit needs no room
		return noRoom, nil
	}
	b.ring.Between.last = b.ring.Between.last || beyond
	if b.unbound() {
		b.bind(h.Sender)
	}
	b.push(data, lent)
	return accepted, nil
}

// acceptControl checks the header of a control packet, which may be the first packet of its stream. own is this end's
// sender number: a RESET that answers a packet to an unknown token carries it.
func (b *bucket) acceptControl(data []byte, own uint64) (verdict, *CloseError) {
	h, body, err := ParsePacketHeader(data)
	switch {
	case err != nil && b.unbound():
		return violation, protocolError(CloseUnsupportedData, "first packet: %v", err)
	case err != nil || len(data) > maxControlPacket:
		return malformed, nil
	case len(body) > 0 && FrameType(body[0]) == FrameReset && h.Sender == own:
		return accepted, nil
	case b.ofAnother(h.Sender):
		return foreign, nil
	case b.unbound():
		b.bind(h.Sender)
	}
	if d := int32(h.Seq - b.expect); d > 0 && (len(body) == 0 || FrameType(body[0]) != FrameReset) {
		return gap, nil
	}
	return accepted, nil
}

// shouldAskForGap reports whether to ask for the missing packets now. Packets keep coming for a round trip after one is
// found missing. So there is one request for each missing packet, and a further one only if the first was not answered
// in time.
func (b *bucket) shouldAskForGap(now, patience int64) bool {
	if b.dropped.Load() { // the reader asks, when there is room
		return false
	}
	x := &b.ring.Between
	if x.gapAsked && x.gapAskedSeq == b.expect && now-x.gapAskedAt < patience {
		return false
	}
	x.gapAsked, x.gapAskedSeq, x.gapAskedAt = true, b.expect, now
	return true
}

// bind makes sender the only accepted sender number; docs/PROTOCOL.md section 4.1.
func (b *bucket) bind(sender uint64) {
	b.form.Store(formPackets)
	b.acceptWord = packetWord(PacketSeq, sender)
}

// unbound reports whether no packet of the peer has arrived, and may still.
func (b *bucket) unbound() bool { return b.acceptWord == 0 && b.form.Load() != formJSON }

// ofAnother reports whether sender is not the number of the peer that the bucket is bound to.
func (b *bucket) ofAnother(sender uint64) bool {
	return !b.unbound() && (b.acceptWord == 0 || sender != b.sender())
}

// sender returns the sender number that the bucket is bound to.
func (b *bucket) sender() uint64 { return b.acceptWord & maxSender }

// impostor reports whether a packet with a reply subject comes from a second producer, which has drawn the same sender
// number as the producer that the bucket is bound to. The first packet of every producer names its control subject, and
// each has its own. A subject that was mapped between accounts proves nothing.
func (b *bucket) impostor(data []byte, reply string) bool {
	h, _, err := ParsePacketHeader(data)
	if err != nil || b.ofAnother(h.Sender) {
		return false // refused for another reason
	}
	token := lastToken(reply)
	if _, err := ParseToken(token); err != nil {
		return false
	}
	if b.ring.Between.origin == "" {
		b.ring.Between.origin = token
	}
	return token != b.ring.Between.origin
}

// onlyClose reports whether a packet carries nothing but a CLOSE, and trailers, which needs no credit.
func onlyClose(body []byte) bool {
	f, rest, err := ParseFrame(body)
	if err == nil && f.Type == FrameMeta && f.Flags&FlagTrailer != 0 {
		f, rest, err = ParseFrame(rest)
	}
	return err == nil && f.Type == FrameClose && len(rest) == 0
}

// acceptJSON queues a message of a peer that speaks only the fallback. Such a peer knows no flow control. So the queue
// has a limit, and the stream ends with CloseTooSlow if the peer exceeds it.
func (b *bucket) acceptJSON(data []byte, limit uint64) (verdict, *CloseError) {
	switch b.form.Load() {
	case formPackets:
		return foreign, nil
	case formUnknown:
		b.form.Store(formJSON)
		b.ring.SetLimit(math.MaxInt32)
	}
	queued, n := b.received-b.ring.Between.consumedBytes.Load(), b.ring.Len()
	if queued+uint64(len(data)) > limit || uint64(n) >= max(limit/fallbackOverhead, fallbackMessages) {
		return violation, &CloseError{Code: CloseTooSlow, Text: fmt.Sprintf("reader is %d messages, %d bytes behind a peer that knows no credit", n, queued)}
	}
	b.push(data, nil)
	return accepted, nil
}

// consume accounts for a packet read to its end and reports whether the peer should be granted more. Reader only.
func (b *bucket) consume(n int, ack bool) bool {
	b.consumed.packets++
	b.consumed.bytes += uint64(n)
	if b.form.Load() == formJSON {
		b.ring.Between.consumedBytes.Store(b.consumed.bytes)
		return false
	}
	b.limited = b.limited || ack
	b.window.Packet = max(b.window.Packet, uint32(n))
	// The rest of the grant, as the reader sees it. If a quarter is consumed, three quarters are left.
	leftPackets := int32(b.consumed.limit - b.consumed.packets)
	leftBytes := int64(b.grantedBytes.Load() - b.consumed.bytes)
	return leftPackets <= int32(b.windowPackets-b.windowPackets/4) || leftBytes <= int64(b.window.Bytes-b.window.Bytes/4)
}

// resize changes the windows if they limited the sender since the last grant: the sender asked for credit. They grow
// only if the reader ran dry as well, because a window that grew because of a slow reader would only cost memory. If
// the last packet of the credit arrives with all the others, the reader consumes it, which is a grant, and runs dry
// afterwards. So limited outlives the grant. largest is the most bytes of the window, and free the memory left for
// packets. Reader only.
func (b *bucket) resize(windows *flow.Windows, largest uint64, free int64) {
	windows.Resize(&b.window, b.ranDry, largest, free)
	if b.ranDry && b.windowPackets < maxPackets {
		b.windowPackets *= 2
	}
}

// grant grants the peer a window beyond the consumed packets. ack reports that the packet consumed last used up the
// credit. A limit never goes back, so a window that shrank takes effect when the peer has used its credit. Reader only.
func (b *bucket) grant(ack bool) {
	b.limited, b.ranDry, b.window.Packet = ack, false, 0
	if next := b.consumed.packets + uint32(b.windowPackets); int32(next-b.consumed.limit) > 0 {
		b.consumed.limit = next
	}
	b.grantedBytes.Store(max(b.grantedBytes.Load(), b.consumed.bytes+b.window.Bytes))
	b.grantedPackets.Store(b.consumed.limit)
}

// nextFree returns how far the peer may send without memory of the budget: minWindow beyond the consumed packets, but
// within its credit.
func (b *bucket) nextFree() uint64 { return min(b.consumed.bytes+minWindow, b.grantedBytes.Load()) }

// unsettled returns by how much free lags behind. Reader only.
func (b *bucket) unsettled() uint64 { return b.nextFree() - b.free }

// settle raises free. It returns how much of the budget the stream no longer uses. A stream that had little keeps it:
// then open rises with free, and the mux need not take memory for the next packets. If the reader is dry, open falls
// back to free, because no unread packet needs memory. If the mux accepts a packet at the same time, that packet has no
// memory in the budget until the mux next takes some. Reader only.
func (b *bucket) settle(dry bool) (unused uint64) {
	free := b.nextFree()
	for {
		open := b.open.Load()
		next := max(open, free)
		switch held := open - b.free; {
		case dry:
			next = free
		case held <= roomStep:
			next = max(open, min(free+held, b.grantedBytes.Load()))
		}
		if next == open || b.open.CompareAndSwap(open, next) {
			unused = (open - b.free) - (next - free)
			b.free = free
			return unused
		}
	}
}

// credit returns the CREDIT to send now. It refuses packets while there is no room for the next one. Called by the
// outbox.
func (b *bucket) credit() Credit {
	c := Credit{Ack: b.ring.Pushed(), Packets: b.grantedPackets.Load(), Bytes: b.grantedBytes.Load()}
	if b.dropped.Load() {
		return c.refusing()
	}
	return c
}

// refusing returns c with the packet limit by which a receiver reports that it has no room for the next packet.
func (c Credit) refusing() Credit {
	c.Packets = c.Ack - 1
	return c
}

// refuses reports whether c has that packet limit. Only a refusal and the acknowledgement of CLOSE have a packet limit
// before the acknowledgement.
func (c Credit) refuses() bool { return c.Packets == c.Ack-1 }
