package stream

import "fmt"

// This file cuts packets that are too large for the server, or for another one on the way. The outbox runs it. recut
// takes the lock of the packer.

// recut cuts p into packets of at most limit bytes, and renumbers the sealed packets behind it. The result may be one
// packet, without padding. p has not left this end, so the peer has seen none of these packets. recut reports false,
// and changes nothing, if p holds a frame that is too large and must not be cut.
func (snd *sender) recut(p *packet, limit int) bool {
	pk := snd.packer
	pieces, ok := cutPacket(p.buf, limit)
	if snd.session.peerTakesJSON() || !ok || len(pieces) < 2 && len(pieces[0]) == len(p.buf) {
		return false
	}
	pk.mu.Lock()
	defer pk.mu.Unlock()
	pk.sealedBytes -= uint64(len(p.buf))
	all := make([]*packet, 0, len(pieces))
	for i, piece := range pieces {
		pk.sealedBytes += uint64(len(piece))
		all = append(all, &packet{buf: piece, class: unpooled, last: p.last && i == len(pieces)-1})
		if i == len(pieces)-1 {
			all[i].through = p.through
		}
		pk.keepLocked(all[i])
	}
	pk.freeLocked(p.memory())
	putPacket(p)
	extra := uint32(len(pieces) - 1)
	pk.sealed += extra
	pk.shifted += extra
	for next := snd.nextReady(); next != nil; next = snd.nextReady() {
		all = append(all, next)
	}
	for i, packet := range all {
		if h, _, err := ParsePacketHeader(packet.buf); err == nil { // this end has made it
			putPacketHeader(packet.buf, h.Flags, h.Sender, snd.unacked.Next()+uint32(i), len(packet.buf))
		}
	}
	snd.unacked.queue = link(all)
	return true
}

// cutPacket distributes the frames of a packet over packets of at most limit bytes. It cuts DATA frames that are too
// large, and reports false if another frame is.
func cutPacket(p []byte, limit int) (pieces [][]byte, ok bool) {
	h, body, err := ParsePacketHeader(p)
	room := limit - PacketHeaderSize - FrameHeaderSize
	if err != nil || room < 1 {
		return nil, false
	}
	var frames []Frame
	size := PacketHeaderSize
	flush := func(flags PacketFlags) {
		pieces = append(pieces, AppendPacket(make([]byte, 0, size), PacketHeader{Flags: flags, Sender: h.Sender, Seq: h.Seq}, frames...))
		frames, size = nil, PacketHeaderSize
	}
	add := func(f Frame) {
		n := FrameHeaderSize + len(f.Payload)
		if size+n > limit && len(frames) > 0 {
			flush(PacketSeq)
		}
		frames = append(frames, f)
		size += n
	}
	for len(body) > 0 {
		var f Frame
		f, body, err = ParseFrame(body)
		if f.Type == framePadding {
			continue
		}
		if err != nil || f.Type != FrameData && len(f.Payload) > room {
			return nil, false
		}
		rest := f.Payload
		for len(rest) > room {
			piece := f
			piece.Flags |= FlagMore
			piece.Payload, rest = rest[:room], rest[room:]
			add(piece)
		}
		f.Payload = rest
		add(f)
	}
	flush(h.Flags)
	return pieces, true
}

// exceeds returns the end of a stream whose packet p is too large for the server and cannot be cut.
func (ep *endpoint) exceeds(p *packet) *ending {
	err := tooLarge("packet", int64(len(p.buf)), ep.maxPayload.Load())
	return &ending{
		kind:  endFault,
		err:   fmt.Errorf("stream: max_payload shrank under a stream: %w", err),
		reset: CloseError{CloseInternalServerErr, cutReason(err.Error(), ep.reasonLimit())},
	}
}
