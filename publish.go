package stream

import (
	"fmt"

	"github.com/nats-io/nats.go"
)

// This file is the way to NATS. Only the outbox publishes, with the exceptions that the functions here name.

// publish publishes a message that is not a stream's data. A failure is counted and does not end the stream: credit is sent
// again after a reconnect, and a connection that accepts no more bytes is noticed otherwise.
func (ep *endpoint) publish(subject, reply string, data []byte) error {
	err := ep.send(subject, reply, data)
	if err != nil {
		ep.counters.unsent.Add(1)
	}
	return err
}

// send publishes data to a subject that a peer named. All publishing does, except for requests
// and the questions to NATS in the fallback.
func (ep *endpoint) send(subject, reply string, data []byte) error {
	if most := ep.longestPeer(); len(subject) > most {
		return fmt.Errorf("subject of %d bytes, which may be longer than this connection's NATS server takes (max_control_line); "+
			"use an inbox prefix that makes it %d at most: %w", len(subject), most, nats.ErrBadSubject)
	}
	return ep.conn.Publish(subject, reply, data)
}

// Peers on other nodes of a cluster name subjects that their own node takes. This connection's node may take less, and closes
// the connection, with all its streams, over a control line that is too long. It does not say how much it takes: INFO
// has no max_control_line. Servers take 4,096 bytes by default.
const (
	safeControlLine = 512 - len(" 1048576 1048576 ") // for subject and reply subject, of any server that is in use
	ordinaryPeer    = 128                            // an inbox without a prefix of its own has about 50
)

// longestPeer is how long the subject of a peer may be. The line also has this end's own subject, because the first packet and
// each PING carry it. Its length is this connection's own choice, so it always leaves room for an ordinary peer.
func (ep *endpoint) longestPeer() int {
	return max(safeControlLine-len(ep.prefix)-TokenSize, ordinaryPeer)
}

// unwritable returns the end of a stream after its peer named a subject that cannot be published to.
func unwritable(err error) *ending {
	return &ending{kind: endFault, err: fmt.Errorf("stream: the peer cannot be written to: %w", err)}
}

// isUp reports whether a connection with status s sends published messages. A draining connection does.
func isUp(s nats.Status) bool {
	return s == nats.CONNECTED || s == nats.DRAINING_SUBS || s == nats.DRAINING_PUBS
}
