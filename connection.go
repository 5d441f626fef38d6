package stream

import (
	"fmt"
	"math"

	"github.com/nats-io/nats.go"
)

// This file holds the limits of the NATS connection, and the functions that publish. Only the outbox runs send and
// publish. The outbox, the watcher and newEndpoint run lookAtMaxPayload. Any goroutine may run the other functions,
// which read atomics and fields that are set once.

// unknownPayload stands for max_payload before the first connect, when no NATS server has announced it. An unknown
// limit refuses and cuts nothing.
const unknownPayload = math.MaxInt32

// lookAtMaxPayload remembers the max_payload of the connection's server. The server may change it with any INFO, and
// nats.go does not report that. lookAtMaxPayload takes the connection's lock, so only the outbox, the watcher and
// newEndpoint call it.
func (ep *endpoint) lookAtMaxPayload() {
	n := ep.conn.MaxPayload()
	if n <= 0 {
		n = unknownPayload
	}
	if ep.maxPayload.Load() != n {
		ep.maxPayload.Store(n)
	}
}

// reasonLimit returns the longest reason that a message has room for.
func (ep *endpoint) reasonLimit() int {
	return max(0, min(MaxReason, int(ep.maxPayload.Load())-PacketHeaderSize-FrameHeaderSize))
}

// send publishes data to a subject that a peer named. All messages pass through send or lend, except requests, the
// probes of the inbox and of the fallback, RESUME, and the answers of a Service.
func (ep *endpoint) send(subject, reply string, data []byte) error {
	if err := ep.checkPeer(subject); err != nil {
		return err
	}
	return ep.conn.Publish(subject, reply, data)
}

// lend is send for a packet that others probably follow at once. If it reports kept, data must not change before
// conn.Recall has returned. Only the outbox calls it.
func (ep *endpoint) lend(subject string, data []byte) (kept bool, err error) {
	if err := ep.checkPeer(subject); err != nil {
		return false, err
	}
	return ep.conn.Lend(subject, data)
}

func (ep *endpoint) checkPeer(subject string) error {
	if most := ep.longestPeer(); len(subject) > most {
		return fmt.Errorf("subject of %d bytes, which may be longer than this connection's NATS server takes (max_control_line); "+
			"use an inbox prefix that makes it %d at most: %w", len(subject), most, nats.ErrBadSubject)
	}
	return nil
}

// publish publishes a message that is not a stream's data. A failure is counted and does not end the stream: credit is
// sent again after a reconnect, and a connection that accepts no more bytes is noticed otherwise.
func (ep *endpoint) publish(subject, reply string, data []byte) error {
	err := ep.send(subject, reply, data)
	if err != nil {
		ep.counters.unsent.Add(1)
	}
	return err
}

// A peer at another node of a cluster may name a subject that its own node accepts. This connection's node may accept
// less, and closes the connection, with all its streams, over a control line that is too long. It does not announce its
// limit: INFO has no max_control_line. The default is 4,096 bytes.
const (
	safeControlLine = 512 - len(" 1048576 1048576 ") // for subject and reply subject: all servers in use accept this
	ordinaryPeer    = 128                            // an inbox without a prefix of its own has about 50
)

// longestPeer returns the largest length of a peer's subject. The control line also has this end's own subject, because
// the first packet and each PING carry it. This end has chosen its own prefix, so there is always room for an ordinary
// peer.
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
