package stream

import (
	"bytes"
	"cmp"

	"github.com/natsstream/stream/internal/slab"
)

// This file joins the pieces of a record. The reader runs all of it. holdRecord locks recordRoom.mu.

// assembly gathers the pieces of one record. The reader owns it. A piece that is most of its packet is kept with the
// packet. Other pieces are copied into chunks, so that the packets around them need not be kept. Each byte is copied at
// most twice, into a chunk and into the record, whatever the pieces and packets look like. The memory held stays below
// about twice the bytes that have arrived, and one chunk.
type assembly struct {
	pieces [][]byte // in order: packets' bytes, and parts of chunks
	free   []byte   // the rest of the last chunk
	chunk  int      // size of the last chunk
	open   bool     // free continues the last of pieces
	size   uint64   // bytes of all pieces that were added
	rest   []byte   // of the piece that take refused last: the caller adds it before any other
	held   uint64   // bytes of the budget that take granted

	lent []*slab.Slab // of pieces that are kept with their packets
}

const (
	pieceSize = 48       // bytes for an entry of pieces, and as much again that append may leave free
	minKept   = 1 << 10  // a smaller piece is copied: the entry would cost more than a few bytes in a hundred
	minChunk  = 1 << 10  // of the first chunk; each is twice as large as the one before
	maxChunk  = 64 << 10 // bounds the unused rest of a chunk
)

// keeps reports whether a piece is kept with its packet of the given size.
func keeps(piece []byte, packet int) bool { return len(piece) >= minKept && len(piece) >= packet/2 }

// hold keeps lent memory until the record is complete. If it never is, the memory is left to the garbage collector.
func (a *assembly) hold(lent *slab.Slab) {
	if lent != nil {
		lent.Share(1)
		a.lent = append(a.lent, lent)
	}
}

// add takes the next piece, which came in a packet of the given size. It reports false if take refuses the memory. The
// caller gives up then, or adds rest later.
func (a *assembly) add(piece []byte, packet int, take func(uint64) bool) bool {
	grow := func(n uint64) bool {
		if !take(n) {
			return false
		}
		a.held += n
		return true
	}
	a.rest = piece
	if keeps(piece, packet) {
		if !grow(uint64(packet) + pieceSize) {
			return false
		}
		a.open = false
		a.pieces = append(a.pieces, piece)
		a.size += uint64(len(piece))
		a.rest = nil
		return true
	}
	for len(a.rest) > 0 {
		if len(a.free) == 0 {
			n := min(max(2*a.chunk, minChunk), maxChunk)
			if !grow(uint64(n)) {
				return false
			}
			a.free, a.chunk, a.open = make([]byte, n), n, false
		}
		if !a.open {
			if !grow(pieceSize) {
				return false
			}
			a.pieces, a.open = append(a.pieces, a.free[:0]), true
		}
		n := copy(a.free, a.rest)
		last := &a.pieces[len(a.pieces)-1]
		*last = (*last)[:len(*last)+n]
		a.free, a.rest = a.free[n:], a.rest[n:]
		a.size += uint64(n)
	}
	a.rest = nil
	return true
}

// record returns the record that last completes, in memory that begins at into, or in new memory if into is nil.
func (a *assembly) record(into, last []byte) []byte {
	pieces := append(a.pieces, last)
	if into == nil {
		into = bytes.Join(pieces, nil)
	} else {
		for _, piece := range pieces {
			into = append(into, piece...)
		}
	}
	for _, s := range a.lent {
		s.Release()
	}
	return into
}

// minJoined is the size from which on a record in pieces is lent to its reader, if that suffices. For a smaller one,
// memory that is used again costs as much as it saves.
const minJoined = 32 << 10

// joined returns the record that last completes, for use u. It leaves the second half of all slabs to fast connections.
func (s *session) joined(a *assembly, last []byte, u use) []byte {
	n := int(a.size) + len(last)
	s.returnJoined()
	if u == forever || n < minJoined || slab.Crowded() {
		return a.record(nil, last)
	}
	lent := slab.Get(n)
	if lent == nil {
		return a.record(nil, last)
	}
	lent.Lend()
	lent.Retire()
	s.extra().joined = lent
	return a.record(lent.Buf[:0:n], last)
}

// returnJoined gives back the memory of the last large record, because its user needs it no more or has begun another
// read.
func (s *session) returnJoined() {
	if x := s.extras.Load(); x != nil && x.joined != nil {
		x.joined.Release()
		x.joined = nil
	}
}

// hasJoined reports whether the last large record was lent.
func (s *session) hasJoined() bool {
	x := s.extras.Load()
	return x != nil && x.joined != nil
}

// partial is a record in pieces of which the last was not read yet.
type partial struct {
	assembly
	flags FrameFlags
}

// assemble returns the record that begins with p. The pieces count in the endpoint's budget until the last one was
// read. Without room assemble waits, and the peer gets no credit meanwhile. At the read deadline it keeps the pieces
// for the next read. The returned record is for use u.
func (s *session) assemble(p partial, u use) (record []byte, flags FrameFlags, err error) {
	defer func() {
		if err == errReadDeadline {
			kept := p // a copy, so that p is not allocated if no read has a deadline
			s.extra().partial.Store(&kept)
		} else {
			s.recordDone()
		}
	}()
	for {
		if len(p.rest) != 0 {
			keeps := keeps(p.rest, len(s.recv.data))
			if !p.add(p.rest, len(s.recv.data), s.holdRecord) {
				return nil, 0, cmp.Or(s.endedNow(), errReadDeadline)
			}
			if keeps { // until record has copied the piece
				s.recv.kept = true
				p.hold(s.recv.lent)
			}
		}
		if err := s.endedNow(); err != nil {
			return nil, 0, err
		}
		f, err := s.nextData(true)
		switch {
		case err != nil:
			return nil, 0, err
		case f.Flags&FlagCodecMask != p.flags:
			return nil, 0, s.fail(protocolError(CloseProtocolError, "pieces of one record in two codecs"))
		case p.size+uint64(len(f.Payload)) > s.recv.maxRecord:
			return nil, 0, s.tooBig()
		case f.Flags&FlagMore == 0:
			return s.joined(&p.assembly, f.Payload, u), p.flags, nil
		}
		p.rest = f.Payload
	}
}

// holdRecord takes n bytes for the record that the reader of s assembles, and waits until there is room. It reports
// false if the stream ended meanwhile, or if the read deadline passed. The reader calls it.
func (s *session) holdRecord(n uint64) bool {
	r := &s.ep.room
	r.mu.Lock()
	took := r.records.Take(s, s.remote.Load(), int64(n), s.ep.clock.Load())
	r.mu.Unlock()
	for !took {
		if s.endedNow() != nil {
			return false
		}
		if s.mayNotWait() {
			return r.withdraw(s)
		}
		park := &s.bucket.park
		park.Announce()
		if took = !r.waits(s); took || s.userLeft() || s.mayNotWait() {
			park.Retract()
		} else {
			park.Wait()
		}
	}
	return true
}

// userLeft reports whether the user reads no more of the records that arrived.
func (s *session) userLeft() bool {
	return s.unwanted() || s.recv.parent.Err() != nil
}
