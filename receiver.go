package stream

import (
	"bytes"
	"context"
	"io"
	"sync/atomic"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/poison"
	"github.com/natsstream/stream/internal/slab"
)

// receiver is the receive half of a session as its user sees it: the position of the user in the stream. The bucket
// holds the packets that arrived and were not read. Consumers use it through Stream, and handlers through Request. The
// reader owns it, except the atomic fields, and runs the functions of this file.
type receiver struct {
	parent    context.Context // ends the stream when it ends, also for records that arrived before
	maxRecord uint64
	held      atomic.Int64 // bytes of the endpoint's budget that packets of this stream have

	// readLock has gateReading while a read is on its slow path, where it may wait. Another read then always gets an
	// error. Two reads that both have a record at hand are detected by busy, a plain flag, as Go's maps detect
	// concurrent writes. Exact detection costs a locked instruction (Attiya et al., "Laws of Order", POPL 2011), more
	// than the rest of Recv. Race builds pay for it. When the user leaves, gateLeft is set: reads return ErrClosed from
	// then on. gateDropping is set while packets that nobody reads are dropped. gatePeeking is set while Ready reads,
	// and waits for nothing. The other gates keep reads off the fast path: the read deadline has passed (gateLate),
	// Ready has read a record ahead (gateAhead), a hook waits for the first record (gateFirst), Read has left a rest
	// (gateRest), or the current packet is lent (gateLent). gateLent stops only reads whose user keeps the record.
	// gateDone and gateUnread are here because there is room: see readDone and nobodyReads.
	readLock atomic.Uint32

	published atomic.Uint32 // of records, modulo 2^32: see publishCount

	// Owned by the reader.
	busy      bool
	ackWanted bool       // the sender of the current packet asked for credit
	kept      bool       // the user may keep a record of the current packet; used by builds that overwrite memory
	off       uint32     // offset of the next frame in data; 0 in a message of the fallback that was not read yet
	data      []byte     // the current packet
	lent      *slab.Slab // that data lies in, or nil
	records   tally      // that reads returned. Both stand before done, because the outbox writes to the cache line of those
	bytes     tally      // of these records
	done      error      // the result of every further read
}

// Bits of receiver.readLock.
const (
	gateReading = uint32(1) << iota
	gateLeft
	gateDropping
	gateLate
	gateAhead
	gatePeeking
	gateFirst
	gateRest
	gateLent
	gateDone
	gateUnread
)

// A use is what the user of a read may do with its record. It is the set of gates that stop the fast path of the read.
type use uint32

const (
	forever   = ^use(0)                  // refer to it for ever
	untilNext = forever &^ use(gateLent) // refer to it until the next read
)

// nextGated returns the next record for a read that has the lock.
func (s *session) nextGated(u use) ([]byte, FrameFlags, error) {
	if x := s.extras.Load(); x != nil {
		if x.partial.Load() != nil || s.recv.readLock.Load()&gateAhead != 0 {
			rec, flags, err := s.nextKept(x, u)
			return s.ownPart(rec, u), flags, err
		}
		s.returnJoined()
	}
	f, err := s.nextData(false)
	switch {
	case err != nil:
		return nil, 0, err
	case uint64(len(f.Payload)) > s.recv.maxRecord:
		return nil, 0, s.tooBig()
	case f.Flags&FlagMore != 0:
		return s.assemble(partial{flags: f.Flags & FlagCodecMask, assembly: assembly{rest: f.Payload}}, u)
	}
	if u == forever {
		return s.own(f.Payload), f.Flags & FlagCodecMask, nil
	}
	return f.Payload, f.Flags & FlagCodecMask, nil
}

// own returns a record that was just taken from the current packet, in memory that the user may keep.
func (s *session) own(record []byte) []byte {
	s.recv.kept = true
	if s.recv.lent == nil {
		return record
	}
	return s.ownPacket(len(record))
}

// ownPacket moves the current packet out of lent memory, and returns the record of n bytes that was just taken from it.
// The rest of the packet probably has more records.
func (s *session) ownPacket(n int) []byte {
	r := &s.recv
	r.data = bytes.Clone(r.data)
	s.returnLent()
	return r.data[int(r.off)-n : r.off : r.off]
}

// ownPart is own for the rest of a record that an earlier read left. The rest may lie in the current packet or not.
func (s *session) ownPart(record []byte, u use) []byte {
	if u == forever && (s.recv.lent != nil || s.hasJoined()) {
		return bytes.Clone(record)
	}
	s.recv.kept = s.recv.kept || u == forever
	return record
}

func (s *session) tooBig() error {
	return s.fail(protocolError(CloseMessageTooBig, "record exceeds MaxRecordSize, %d bytes", s.recv.maxRecord))
}

// nextData returns the next DATA frame, and acts on the frames before it. within reports that the frame continues a
// record. The caller has called endedNow just before.
func (s *session) nextData(within bool) (Frame, error) {
	for {
		if int(s.recv.off) == len(s.recv.data) {
			if err := s.nextPacket(); err != nil {
				return Frame{}, err
			}
			if int(s.recv.off) == len(s.recv.data) { // a packet without a frame
				return Frame{}, s.fail(protocolError(CloseProtocolError, "sequenced packet without a frame"))
			}
		}
		if s.json() {
			return s.nextMessage()
		}
		f, rest, err := ParseFrame(s.recv.data[s.recv.off:])
		if err != nil {
			return Frame{}, s.fail(protocolError(CloseUnsupportedData, "%v", err))
		}
		first := s.recv.off == PacketHeaderSize && s.bucket.consumed.packets == 0
		s.recv.off = uint32(len(s.recv.data) - len(rest))
		switch {
		case s.hasTrailer() && f.Type != FrameClose && !f.Type.Skippable():
			return Frame{}, s.fail(protocolError(CloseProtocolError, "%v between the trailers and CLOSE", f.Type))
		case f.Type == FrameData:
			return f, nil
		case f.Type == FrameClose && within && f.Code == CloseNormalClosure:
			return Frame{}, s.fail(protocolError(CloseProtocolError, "closed within a record"))
		case f.Type == FrameClose:
			return Frame{}, s.takeClose(int(f.Code), string(f.Payload), f.Flags&FlagHalf != 0)
		case f.Type == FrameMeta && within:
			return Frame{}, s.fail(protocolError(CloseProtocolError, "META within a record"))
		case f.Type == FrameMeta:
			if err := s.takeMeta(f, first); err != nil {
				return Frame{}, err
			}
		case f.Type.Skippable():
		default:
			return Frame{}, s.fail(protocolError(CloseUnsupportedData, "%v: %v", f.Type, ErrMisplaced))
		}
		if err := s.endedNow(); err != nil {
			return Frame{}, err
		}
	}
}

// takeMeta takes headers or trailers; docs/PROTOCOL.md section 5.6.
func (s *session) takeMeta(f Frame, first bool) error {
	trailer := f.Flags&FlagTrailer != 0
	if !trailer && !first {
		return s.fail(protocolError(CloseProtocolError, "headers after the first frame"))
	}
	h, err := parseMeta(f.Payload)
	if err != nil {
		return s.fail(protocolError(CloseUnsupportedData, "META: %v", err))
	}
	if trailer {
		s.extra().trailer = h
	} else {
		s.extra().header = h
	}
	return nil
}

// header returns the headers that were read, nil if there are none.
func (s *session) header() nats.Header {
	if x := s.extras.Load(); x != nil {
		return x.header
	}
	return nil
}

// hasTrailer reports whether trailers were read.
func (s *session) hasTrailer() bool {
	x := s.extras.Load()
	return x != nil && x.trailer != nil
}

// readHeader waits for the first packet and returns the headers it begins with.
func (s *session) readHeader() (nats.Header, error) {
	if err := s.lockRead(); err != nil {
		return nil, err
	}
	defer s.unlockRead()
	header := s.header()
	if header != nil || s.recv.done != nil || s.bucket.consumed.packets > 0 {
		if s.recv.done != nil && s.recv.done != io.EOF && header == nil {
			return nil, s.recv.done
		}
		return header, nil
	}
	if err := s.refusedNow(); err != nil {
		return nil, err
	}
	if s.recv.data == nil {
		if err := s.nextPacket(); err != nil {
			return nil, err
		}
	}
	if s.json() {
		if _, end, _ := parseJSON(bytes.Clone(s.recv.data)); end != nil && end.Code != CloseNormalClosure {
			_, err := s.nextMessage()
			return nil, err
		}
		return nil, nil
	}
	if s.recv.off == PacketHeaderSize {
		f, rest, err := ParseFrame(s.recv.data[s.recv.off:])
		if err == nil && f.Type == FrameMeta && f.Flags&FlagTrailer == 0 { // reads check all other frames
			s.recv.off = uint32(len(s.recv.data) - len(rest))
			if err := s.takeMeta(f, true); err != nil {
				return nil, err
			}
			return s.header(), nil
		}
	}
	if s.refused() {
		_, err := s.nextData(false)
		return nil, err
	}
	return nil, nil
}

// refused reports whether the rest of the first packet ends the stream with an error, without a record before the end.
func (s *session) refused() bool {
	for b := s.recv.data[s.recv.off:]; len(b) > 0; {
		f, rest, err := ParseFrame(b)
		switch {
		case err != nil || f.Type == FrameData:
			return false
		case f.Type == FrameClose:
			return f.Code != CloseNormalClosure
		}
		b = rest
	}
	return false
}

// refusedNow returns the error of a read that begins, because reads have ended or the read deadline has passed.
func (s *session) refusedNow() error {
	if err := s.endedNow(); err != nil {
		return err
	}
	if s.recv.readLock.Load()&gateLate != 0 {
		return errReadDeadline
	}
	return nil
}

// mayNotWait reports whether the read under way returns errReadDeadline if it had to wait.
func (s *session) mayNotWait() bool { return s.recv.readLock.Load()&(gateLate|gatePeeking) != 0 }

// endedNow returns the error of this and every further read if reads have ended, and nil otherwise.
func (s *session) endedNow() error {
	if s.recv.done != nil {
		return s.recv.done
	}
	if e := s.end.Load(); e != nil && e.kind == endLocal {
		return s.endReads(e)
	}
	if s.recv.readLock.Load()&gateLeft != 0 {
		s.dropUnread(ErrClosed)
		return s.recv.done
	}
	if s.recv.parent.Err() != nil {
		// The context's own callback may not have run yet. It does the same.
		s.canceled()
		e := s.end.Load()
		switch {
		case s.role != lifecycle.Consumer || e != nil && e.kind == endLocal:
		case s.nobodyReads(): // the user has left since the look above, and the stream may not have ended yet
			s.dropUnread(ErrClosed)
			return s.recv.done
		default: // the peer's end came first, but records before it are not read any more
			e = &ending{kind: endLocal, err: contextError(s.recv.parent)}
		}
		return s.endReads(e)
	}
	return nil
}

// nextPacket waits for the next packet and makes it the current one. It gives credit for the one before.
func (s *session) nextPacket() error {
	s.leavePacket()
	for {
		// end is loaded before Pop. Packets that arrived before the end were pushed before it was set. So if end is set
		// and the ring is empty, all of them were read.
		end := s.end.Load()
		if a, ok := s.bucket.ring.Pop(); ok {
			s.enterPacket(a)
			return nil
		}
		if end != nil {
			return s.endReads(end)
		}
		if err := s.awaitPacket(); err != nil {
			return err
		}
	}
}

// leavePacket accounts for the current packet, which was read to its end, and gives it back. A second call does
// nothing.
func (s *session) leavePacket() {
	if len(s.recv.data) > 0 {
		s.consumed()
		if uint32(s.recv.records.load())-s.recv.published.Load() >= publishAfter {
			s.publishCount()
		}
		s.dropPacket()
	}
}

// enterPacket makes a packet the current one.
func (s *session) enterPacket(a arrival) {
	if now := s.ep.clock.Load(); s.lastPop.Load() != now {
		s.lastPop.Store(now)
	}
	s.recv.data, s.recv.lent = a.data, a.lent
	if a.lent != nil {
		s.recv.readLock.Or(gateLent)
	}
	if s.bucket.form.Load() == formPackets {
		s.recv.off = PacketHeaderSize
		s.recv.ackWanted = a.data[1]&byte(PacketAck) != 0
	}
}

// awaitPacket waits until a packet arrives or the stream ends. It may return without either. Its error is that of the
// end of reads, or errReadDeadline if the read may not wait.
func (s *session) awaitPacket() error {
	b := &s.bucket
	if s.role != lifecycle.Consumer && !b.ranDry {
		s.mark(workHello) // the consumer cannot write before it knows the address
	}
	if s.role == lifecycle.Handler {
		s.send.Load().packer.publishHeld() // the consumer may wait for the end before it sends more
	}
	s.ranDry()
	s.publishCount()
	if s.mayNotWait() {
		return errReadDeadline
	}
	b.park.Announce()
	if b.ring.Empty() && !b.dropped.Load() && s.end.Load() == nil && s.recv.parent.Err() == nil && s.recv.readLock.Load()&(gateLeft|gateLate) == 0 {
		b.park.Wait()
	} else {
		b.park.Retract()
	}
	return s.endedNow()
}

// dropPacket gives the current packet back. No reference to a lent packet is left: records of Recv lie in memory of
// their own, and an assembly holds its packets itself.
func (s *session) dropPacket() {
	if poison.Enabled && !s.recv.kept {
		poison.Fill(s.recv.data)
	}
	if s.recv.lent != nil {
		s.returnLent()
	}
	s.recv.data, s.recv.off, s.recv.kept = nil, 0, false
}

// returnLent gives the slab of the current packet back.
func (s *session) returnLent() {
	r := &s.recv
	r.lent.Release()
	r.lent = nil
	r.readLock.And(^gateLent)
}

// setRest keeps the rest of a record for the next read.
func (s *session) setRest(rest []byte) {
	was := s.recv.readLock.Load()&gateRest != 0
	if len(rest) != 0 {
		s.extra().left = rest
		if !was {
			s.recv.readLock.Or(gateRest)
		}
	} else if was {
		s.extras.Load().left = nil
		s.recv.readLock.And(^gateRest)
	}
}

// rest returns the rest of a record that Read has read in part, nil if there is none.
func (s *session) rest() []byte {
	if s.recv.readLock.Load()&gateRest == 0 {
		return nil
	}
	return s.extras.Load().left
}

// nextMessage takes the current message of a peer that speaks the original protocol.
func (s *session) nextMessage() (Frame, error) {
	data := s.recv.data
	s.recv.off = uint32(len(data))
	rec, end, broken := parseJSON(data)
	switch {
	case broken != nil:
		return Frame{}, s.fail(broken)
	case end != nil:
		return Frame{}, s.takeClose(end.Code, end.Text, false)
	}
	return Frame{Type: FrameData, Flags: FlagJSON, Payload: rec}, nil
}

// takeClose ends this direction with the peer's code and text. It ends the stream as well if the other direction is
// unused. half reports that the peer goes on reading.
func (s *session) takeClose(code int, text string, half bool) error {
	switch {
	case code != CloseNormalClosure:
		return s.endReads(&ending{kind: endPeerClosed, err: &CloseError{code, text}})
	case s.send.Load() == nil && !half:
		return s.endReads(&wholeEnd)
	}
	s.dropUnread(io.EOF)
	s.releaseWindow()
	s.recv.readLock.Or(gateDone)
	if e := s.end.Load(); e != nil { // the outbox may have ended the stream before gateDone was set; otherwise it sees gateDone
		s.release(e)
	}
	s.markLater(workSettle)
	return s.recv.done
}

// fail ends the stream because of an invalid packet of the peer, and resets it.
func (s *session) fail(err *CloseError) error {
	return s.endReads(&ending{kind: endLocal, err: err, reset: *err})
}

// endReads ends the stream and makes e the result of this and every later read.
func (s *session) endReads(e *ending) error {
	err := e.err
	if isNormal(err) { // a RESET of the consumer, and no CLOSE before it
		err = &CloseError{CloseCanceled, "the consumer left before it had closed its direction"}
	}
	s.dropUnread(err)
	s.endLocally(e)
	return s.recv.done
}

func (s *session) dropUnread(err error) {
	s.recv.done = err
	s.setRest(nil)
	s.dropPacket()
	s.publishCount()
	if x := s.extras.Load(); x != nil {
		s.dropPartial(x)
		x.ahead = nil
		s.recv.readLock.And(^gateAhead)
	}
}
