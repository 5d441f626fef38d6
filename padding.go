package stream

// This file gives packets the size of a NATS server's reads. The goroutine that holds the lock of the packer runs it: a
// writer, the outbox, or a goroutine that ends the stream for its user.

// A NATS server reads up to 64 KiB at once. It copies a message that the end of a read has cut into fresh memory. No
// read cuts messages of exactly alignedSize bytes, with their commands, that come one after the other. So the pieces of
// large records have this size, and a packet that lacks at most maxPadding bytes gets them.
const (
	alignedSize = 32 << 10
	maxPadding  = alignedSize / 25 // a full packet of records of up to 1 KiB lacks less
)

// alignedLocked returns the size of a packet whose message has alignedSize bytes. A subject longer than maxPadding does
// not count, so the result stays near alignedSize.
func (pk *packer) alignedLocked() int {
	if len(pk.subject) > maxPadding {
		return alignedSize
	}
	return alignedSize - len("PUB  12345\r\n\r\n") - len(pk.subject)
}

// padLocked ends a packet of nearly aligned size with PADDING, if a packet may be that large. The rest of the buffer
// behind a packet may be a user's, who encodes an object there.
func (pk *packer) padLocked() {
	aligned := pk.alignedLocked()
	lacks := aligned - pk.n
	switch {
	case lacks < FrameHeaderSize, lacks > maxPadding, aligned > pk.packetLimit():
		return
	case pk.encoding, pk.closed.Load(), pk.session.peerTakesJSON():
		return
	}
	b := pk.open.buf[pk.n : pk.n+lacks]
	putFrameHeader(b, framePadding, 0, 0, lacks-FrameHeaderSize)
	clear(b[FrameHeaderSize:]) // bytes of another stream
	pk.n += lacks
	pk.besideLocked(lacks)
}

// pieceLocked returns the size of the next piece of a large record, which fills its packet. The piece follows the last
// one of the record before, unless it would be the smaller part of the packet: a reader copies such pieces once more.
func (pk *packer) pieceLocked() int {
	limit := min(pk.alignedLocked(), pk.singleLimit()+PacketHeaderSize+FrameHeaderSize)
	n := PacketHeaderSize
	switch {
	case pk.open == nil || pk.n == n:
	case pk.n > limit/2-FrameHeaderSize:
		pk.sealLocked()
		pk.markLocked()
	default:
		n = pk.n
	}
	return limit - n - FrameHeaderSize
}
