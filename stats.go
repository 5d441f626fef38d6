package stream

import "sync/atomic"

// This file has the counters of an endpoint. They are atomics, or tallies of the mux. The goroutine in which an event
// happens counts it. Any goroutine may read them.

// Stats are counters of one Client or Server since it was made, and gauges of its present use. Dropped messages are
// counted by reason. No drop loses a record of a stream without an error on that stream. In JSON the names are in snake
// case, such as packets_sent.
type Stats struct {
	Streams  int   `json:"streams"`  // streams and writers that the peer can reach now. A request of OpenMany is one more until its last stream has ended
	Reserved int64 `json:"reserved"` // bytes of packets that arrived and were not read, beyond 4 KiB for each stream, and of records being assembled from pieces
	Kept     int64 `json:"kept"`     // bytes of the buffers of packets that are written and that peers have not acknowledged
	Fast     bool  `json:"fast"`     // packets travel past nats.go; see package fastconn. False while the connection is down

	PacketsSent uint64 `json:"packets_sent"` // packets of records and fallback messages published, each once: requests and control packets are not counted
	BytesSent   uint64 `json:"bytes_sent"`   // their bytes

	PacketsReceived uint64 `json:"packets_received"` // packets of records and fallback messages accepted, each once
	BytesReceived   uint64 `json:"bytes_received"`   // their bytes
	RecordsReceived uint64 `json:"records_received"` // records that reads returned; may lack up to 1,024 records and one packet of each stream that is being read

	EnvelopesSent     uint64 `json:"envelopes_sent"`     // messages with packets of several streams to one peer
	EnvelopesReceived uint64 `json:"envelopes_received"` // the same

	PacketsResent    uint64 `json:"packets_resent"`    // packets retransmitted because the peer missed them
	DroppedNoRoom    uint64 `json:"dropped_no_room"`   // packets that arrived while MaxBuffered was in use; they are retransmitted
	DroppedEarly     uint64 `json:"dropped_early"`     // packets that arrived while an earlier one was missing; they are retransmitted
	UnreportedErrors uint64 `json:"unreported_errors"` // failures of handlers that came after the normal end was published; each is logged
	DroppedRequest   uint64 `json:"dropped_request"`   // requests to a Server with another version of the protocol, or without a reply subject that may be published to
	DroppedStray     uint64 `json:"dropped_stray"`     // messages at a Server's handlers that are no requests, such as packets of streams at a wildcard

	DroppedUnknown   uint64 `json:"dropped_unknown"`   // messages for a token that is not, or no longer, in use
	DroppedDuplicate uint64 `json:"dropped_duplicate"` // packets that arrived before
	DroppedForeign   uint64 `json:"dropped_foreign"`   // packets of a sender that the stream is not bound to
	DroppedMalformed uint64 `json:"dropped_malformed"` // packets with an unreadable header, and broken envelopes
	DroppedPubAck    uint64 `json:"dropped_pub_ack"`   // acknowledgements of a JetStream stream that stores the requests; the library does not use them
	DroppedControl   uint64 `json:"dropped_control"`   // control packets that arrived faster than the outbox could process them
	UnsentControl    uint64 `json:"unsent_control"`    // control packets that NATS did not accept
	DroppedEvents    uint64 `json:"dropped_events"`    // events that found no room, because hooks did not return in time
}

type counters struct {
	packets, bytes                                  atomic.Uint64 // stored by the outbox alone
	unknown, duplicate, foreign, malformed, overrun atomic.Uint64
	unsent, resent, early, requests, strays         atomic.Uint64
	unreported, pubAcks, noRoom                     atomic.Uint64
	records, events, envelopesSent                  atomic.Uint64

	_                                                 [64]byte // the mux counts each packet: its counts have a cache line of their own
	packetsReceived, bytesReceived, envelopesReceived tally
	_                                                 [64]byte
}

// received counts a packet of n bytes that was accepted. Called by the mux.
func (c *counters) received(n int) {
	c.packetsReceived.add(1)
	c.bytesReceived.add(uint64(n))
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
	in := ep.inbox.subscribed.Load()
	return Stats{
		Streams:           ep.sessions.Size(),
		Reserved:          ep.memory(),
		Kept:              ep.kept.Load(),
		Fast:              in != nil && in.Fast(),
		PacketsSent:       n.packets.Load(),
		BytesSent:         n.bytes.Load(),
		PacketsReceived:   n.packetsReceived.load(),
		BytesReceived:     n.bytesReceived.load(),
		RecordsReceived:   n.records.Load(),
		EnvelopesSent:     n.envelopesSent.Load(),
		EnvelopesReceived: n.envelopesReceived.load(),
		PacketsResent:     n.resent.Load(),
		DroppedNoRoom:     n.noRoom.Load(),
		DroppedEarly:      n.early.Load(),
		UnreportedErrors:  n.unreported.Load(),
		DroppedRequest:    n.requests.Load(),
		DroppedStray:      n.strays.Load(),
		DroppedUnknown:    n.unknown.Load(),
		DroppedDuplicate:  n.duplicate.Load(),
		DroppedForeign:    n.foreign.Load(),
		DroppedMalformed:  n.malformed.Load(),
		DroppedPubAck:     n.pubAcks.Load(),
		DroppedControl:    n.overrun.Load(),
		UnsentControl:     n.unsent.Load(),
		DroppedEvents:     n.events.Load(),
	}
}
