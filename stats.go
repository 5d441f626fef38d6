package stream

import "sync/atomic"

// This file has the counters of an endpoint. They are atomics, and any goroutine may use them.

// Stats are counters of one Client or Server since it was made, and gauges of its present use. Dropped messages are counted
// by reason. No drop loses a record of a stream without an error on that stream.
type Stats struct {
	Streams  int   // streams and writers that the peer can reach now
	Reserved int64 // bytes of all windows granted now, the most that peers may send unread, and of records being assembled from pieces
	Kept     int64 // bytes of the buffers of packets that are written and that peers have not acknowledged

	PacketsSent uint64 // packets of records and fallback messages published, each once: requests and control packets are not counted
	BytesSent   uint64 // their bytes

	PacketsResent    uint64 // packets retransmitted because the peer missed them
	DroppedEarly     uint64 // packets that arrived while an earlier one was missing; they are retransmitted
	UnreportedErrors uint64 // failures of handlers that came after the normal end was published; each is logged
	DroppedRequest   uint64 // requests to a Server with another version of the protocol, without a reply subject, or with one that must not be written to
	DroppedStray     uint64 // messages at a Server's handlers that are no requests, such as packets of streams at a wildcard

	DroppedUnknown   uint64 // messages for a token that is not, or no longer, in use
	DroppedDuplicate uint64 // packets that arrived before
	DroppedForeign   uint64 // packets of a sender that the stream is not bound to
	DroppedMalformed uint64 // packets with an unreadable header
	DroppedPubAck    uint64 // acknowledgements of a JetStream stream that stores the requests; the library does not use them
	DroppedControl   uint64 // control packets that arrived faster than the outbox could process them
	UnsentControl    uint64 // control packets that NATS did not accept
}

type counters struct {
	packets, bytes                                  atomic.Uint64 // stored by the outbox alone
	unknown, duplicate, foreign, malformed, overrun atomic.Uint64
	unsent, resent, early, requests, strays         atomic.Uint64
	unreported, pubAcks                             atomic.Uint64
}

func (c *counters) sent(n int) {
	c.packets.Add(1)
	c.bytes.Add(uint64(n))
}

// Stats returns a snapshot. It may be called at any time, by any goroutine.
func (c *Client) Stats() Stats { return c.ep.stats() }

// Stats returns a snapshot. It may be called at any time, by any goroutine.
func (s *Server) Stats() Stats { return s.ep.stats() }

func (ep *endpoint) stats() Stats {
	n := &ep.counters
	return Stats{
		Streams:          ep.sessions.Size(),
		Reserved:         ep.reserved.Load(),
		Kept:             ep.kept.Load(),
		PacketsSent:      n.packets.Load(),
		BytesSent:        n.bytes.Load(),
		PacketsResent:    n.resent.Load(),
		DroppedEarly:     n.early.Load(),
		UnreportedErrors: n.unreported.Load(),
		DroppedRequest:   n.requests.Load(),
		DroppedStray:     n.strays.Load(),
		DroppedUnknown:   n.unknown.Load(),
		DroppedDuplicate: n.duplicate.Load(),
		DroppedForeign:   n.foreign.Load(),
		DroppedMalformed: n.malformed.Load(),
		DroppedPubAck:    n.pubAcks.Load(),
		DroppedControl:   n.overrun.Load(),
		UnsentControl:    n.unsent.Load(),
	}
}
