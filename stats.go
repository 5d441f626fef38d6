package stream

import "sync/atomic"

// Stats are counters of one Client since it was made, and what it holds now. What is dropped is counted by the
// reason; none of these drops loses a record of a stream without an error on that stream.
type Stats struct {
	Streams  int   // streams and writers that the peer can reach now
	Reserved int64 // bytes of all windows granted now: the most that peers may send unread

	PacketsSent uint64 // packets and fallback messages published
	BytesSent   uint64 // their bytes

	DroppedUnknown   uint64 // messages for a token that is not, or no longer, in use
	DroppedDuplicate uint64 // packets that arrived before
	DroppedForeign   uint64 // packets of another sender than the one a stream is bound to
	DroppedMalformed uint64 // packets with an unreadable header
	DroppedControl   uint64 // control packets that came faster than they could be acted on
	UnsentControl    uint64 // control packets that NATS did not take
}

type counters struct {
	packets, bytes                                  atomic.Uint64 // stored by the outbox alone
	unknown, duplicate, foreign, malformed, overrun atomic.Uint64
	unsent                                          atomic.Uint64
}

func (c *counters) sent(n int) {
	c.packets.Add(1)
	c.bytes.Add(uint64(n))
}

// Stats returns a snapshot. It may be called at any time, by any goroutine.
func (c *Client) Stats() Stats {
	n := &c.ep.counters
	return Stats{
		Streams:          c.ep.sessions.Size(),
		Reserved:         c.ep.reserved.Load(),
		PacketsSent:      n.packets.Load(),
		BytesSent:        n.bytes.Load(),
		DroppedUnknown:   n.unknown.Load(),
		DroppedDuplicate: n.duplicate.Load(),
		DroppedForeign:   n.foreign.Load(),
		DroppedMalformed: n.malformed.Load(),
		DroppedControl:   n.overrun.Load(),
		UnsentControl:    n.unsent.Load(),
	}
}
