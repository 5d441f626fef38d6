package stream

import "bytes"

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
	held   uint64   // bytes that take granted
}

const (
	pieceSize = 48       // bytes for an entry of pieces, and as much again that append may leave free
	minKept   = 1 << 10  // a smaller piece is copied: the entry would cost more than a few bytes in a hundred
	minChunk  = 1 << 10  // of the first chunk; each is twice as large as the one before
	maxChunk  = 64 << 10 // bounds the unused rest of a chunk
)

// add takes the next piece, which came in a packet of the given size. It reports false if take refuses the memory, and is
// not to be used further then.
func (a *assembly) add(piece []byte, packet int, take func(uint64) bool) bool {
	grow := func(n uint64) bool {
		if !take(n) {
			return false
		}
		a.held += n
		return true
	}
	a.size += uint64(len(piece))
	if len(piece) >= minKept && len(piece) >= packet/2 {
		a.open = false
		a.pieces = append(a.pieces, piece)
		return grow(uint64(packet) + pieceSize)
	}
	for len(piece) > 0 {
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
		n := copy(a.free, piece)
		last := &a.pieces[len(a.pieces)-1]
		*last = (*last)[:len(*last)+n]
		a.free, piece = a.free[n:], piece[n:]
	}
	return true
}

// record returns the record that last completes.
func (a *assembly) record(last []byte) []byte {
	return bytes.Join(append(a.pieces, last), nil)
}
