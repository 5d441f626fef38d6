package stream

import (
	"github.com/natsstream/stream/internal/flow"
)

// This file is the writers' half of a Writer: how records get into the open packet, and how a packet is opened and sealed as
// credit allows. Writers run it with the lock held.

// frameLocked returns the next n bytes of the open packet. It seals the packet and opens another where n bytes do not
// fit, and waits for credit where none is left. mine says that the caller has the turn.
func (w *Writer) frameLocked(n int, mine bool) ([]byte, error) {
	for {
		if w.open != nil {
			end := w.n + n
			limit := w.coalesceLimit()
			if w.n == PacketHeaderSize {
				limit = max(limit, end) // a record too large to share a packet has one of its own
			}
			if end <= limit {
				if end > len(w.open.buf) {
					w.growLocked(end)
				}
				b := w.open.buf[w.n:end]
				w.n = end
				return b, nil
			}
			w.sealLocked()
			w.markLocked()
		}
		if w.creditLocked() {
			w.openLocked(PacketHeaderSize + n)
			continue
		}
		if err := w.waitCreditLocked(mine); err != nil {
			return nil, err
		}
	}
}

// waitCreditLocked waits until something changes that may be credit, and until the caller may write again: meanwhile
// anything may have happened, another goroutine's Close, its turn, the end of the stream.
func (w *Writer) waitCreditLocked(mine bool) error {
	if err := w.waitLocked(); err != nil {
		return err
	}
	if mine {
		return w.failedLocked()
	}
	return w.awaitTurnLocked()
}

// appendCloseLocked writes the last frame. It needs no credit: one packet beyond it is reserved for it.
func (w *Writer) appendCloseLocked(code int, reason string) error {
	if w.json {
		return w.appendCloseJSONLocked(code, reason)
	}
	reason = cutReason(reason, w.session.ep.reasonLimit())
	n := FrameHeaderSize + len(reason)
	if w.trailer != nil {
		n += FrameHeaderSize + len(w.trailer)
	}
	if w.open != nil && w.n+n > w.coalesceLimit() {
		w.sealLocked()
	}
	if w.open == nil {
		w.openLocked(PacketHeaderSize + n)
	}
	if w.n+n > len(w.open.buf) {
		w.growLocked(w.n + n)
	}
	b := w.open.buf[w.n : w.n+n]
	if w.trailer != nil {
		putFrameHeader(b, FrameMeta, FlagTrailer, 0, len(w.trailer))
		b = b[FrameHeaderSize+copy(b[FrameHeaderSize:], w.trailer):]
	}
	var flags FrameFlags
	if w.half {
		flags = FlagHalf
	}
	putFrameHeader(b, FrameClose, flags, uint16(code), len(reason))
	copy(b[FrameHeaderSize:], reason)
	w.n += n
	w.closed.Store(true)
	w.closing = CloseError{code, reason}
	w.fast = nil
	return nil
}

// coalesceLimit is the size up to which a packet gathers records.
func (w *Writer) coalesceLimit() int {
	return min(coalesceSize, w.packetLimit())
}

// packetLimit returns the most bytes that a packet may hold: the server's max_payload, or fewer if the line to the peer is slow.
func (w *Writer) packetLimit() int {
	p := int(w.packetSize.Load())
	if p == 0 {
		p = flow.FirstPacket
	}
	return min(int(w.session.ep.maxPayload.Load()), p)
}

// openLocked opens the packet with number sealed. Its size follows that of the one before: a busy stream soon has
// large packets, an idle one small ones.
func (w *Writer) openLocked(n int) {
	w.open = getPacket(max(n, min(w.size, coalesceSize)))
	w.keepLocked(w.open)
	w.n = PacketHeaderSize
	w.resetFastLocked()
}

// growLocked moves the open packet into a buffer of at least n bytes. A stream under load has large packets in few steps.
func (w *Writer) growLocked(n int) {
	w.moveLocked(max(n, min(growthFactor*len(w.open.buf), coalesceSize)))
	w.resetFastLocked()
}

// moveLocked moves the open packet into another buffer of at least n bytes.
func (w *Writer) moveLocked(n int) {
	p := getPacket(n)
	copy(p.buf, w.open.buf[:w.n])
	w.keepLocked(p)
	w.freeLocked(w.open.memory())
	putPacket(w.open)
	w.open = p
}

// growthFactor is by how much a packet grows at least.
const growthFactor = 4

// keepLocked counts the buffer of p from when it is opened until it is acknowledged; freeLocked ends that for n bytes.
func (w *Writer) keepLocked(p *packet) {
	w.kept += p.memory()
	w.session.ep.kept.Add(int64(p.memory()))
}

func (w *Writer) freeLocked(n uint64) {
	if n != 0 { // the endpoint's count is shared with all writers
		w.kept -= n
		w.session.ep.kept.Add(-int64(n))
	}
}

// resetFastLocked lets Write use the open packet, unless somebody has the turn.
func (w *Writer) resetFastLocked() {
	w.fast = nil
	if w.open != nil && !w.turn && !w.closed.Load() && !w.held.Load() && !w.over() && w.session.ep.maxRecord >= coalesceSize { // otherwise Write must check
		w.fast = w.open.buf[:min(len(w.open.buf), w.coalesceLimit())]
	}
}

// sealLocked ends the open packet: no more records go in, and it is the outbox's from here on. A packet that uses up
// the credit asks for more.
func (w *Writer) sealLocked() {
	if n := len(w.open.buf); n >= wasteful*w.n && n > packetClasses[0] { // the whole buffer is kept until the acknowledgement
		w.moveLocked(w.n)
	}
	p := w.open
	p.buf = p.buf[:w.n]
	p.last = w.closed.Load()
	seq := w.sealed
	w.sealed++
	w.sealedBytes += uint64(w.n)
	w.size = w.n
	w.open, w.n, w.fast = nil, 0, nil
	if !w.json {
		flags := PacketSeq
		w.soon = w.soon || p.last && w.closeSoon()
		if p.last && w.soon || !w.creditLocked() {
			flags |= PacketAck
		}
		putPacketHeader(p.buf, flags, w.session.sender, seq, len(p.buf))
	}
	w.ready.Push(p) // never full: credit bounds the packets that are sealed and not acknowledged
}

// closeSoon reports whether the peer is to acknowledge CLOSE at once. A consumer that still sends is told by a RESET that
// nobody reads any longer, and the RESET must come after the acknowledgement.
func (w *Writer) closeSoon() bool {
	s := w.session
	return s.server != nil && !s.recv.readDone.Load() && s.bucket.ring.Pushed() > 0
}

// wasteful is how many times as large as its packet a buffer is that is exchanged for a smaller one.
const wasteful = 2

// creditLocked reports whether another packet may be opened; docs/PROTOCOL.md section 8. Besides the peer's credit, it heeds the
// budget for kept packets, so that a peer that does not acknowledge cannot make this end keep more.
func (w *Writer) creditLocked() bool {
	return int32(w.sealed-w.granted.packets) < 0 && w.sealedBytes < w.granted.bytes &&
		w.sealed-w.acked < maxUnacked && mayKeep(w.kept, w.session.ep.kept.Load(), w.session.ep.window, w.session.ep.budget)
}

// mayKeep reports whether a stream that keeps kept bytes may open another packet, at an endpoint whose streams keep all bytes
// together. Each may keep at most its window and at most the free part of the budget. So a few streams get all they need, the
// budget is never used up, and later streams get as much as present ones (Choudhury and Hahne, "Dynamic queue length thresholds
// for shared-memory packet switches", 1998). Every stream may keep minWindow, so that none stands still.
func mayKeep(kept uint64, all int64, window uint64, budget int64) bool {
	return kept < window && (kept < minWindow || int64(kept) < budget-all)
}

// maxUnacked bounds the packets kept for a peer that grants without end.
const maxUnacked = 4 * maxPackets

// offered is the first credit that a token or offer gives; docs/PROTOCOL.md section 8.
func offered(t Token) credited { return credited{1 << min(t.LogPackets, 30), 1 << t.LogBytes} }
