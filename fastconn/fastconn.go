// Package fastconn makes streams faster on a connection of nats.go, by one more option:
//
//	nc, err := nats.Connect(url, fastconn.Enable())
//
// Clients and servers of package stream on this connection send and receive their packets past nats.go. They receive into buffers
// that are used again, while nats.go allocates memory for every message. All other work stays with nats.go: subscriptions, requests,
// reconnects, authentication, errors, and all messages of the program that do not belong to streams. The wire protocol is the same, so
// the peers of the streams may have ordinary connections.
//
// Use [github.com/natsstream/stream.Stream.Next], Read, WriteTo, RecvObject or io.Copy for the full gain. Recv and All copy each
// packet once, because their records may be kept.
//
// # Where it works
//
// It works over TCP, with TLS, and over a dialer of your own. It cannot work over WebSocket or with [nats.InProcessServer]: all
// messages go the ordinary way there. [github.com/natsstream/stream.Stats].Fast says which way the messages take.
//
// # Differences
//
//   - The option replaces the dialer of the connection. Give [nats.SetCustomDialer] and [nats.Dialer] before it.
//   - [nats.Conn.TLSConnectionState] returns [nats.ErrConnectionNotTLS], because nats.go does not make TLS itself.
//   - OutMsgs and OutBytes of [nats.Conn.Stats] do not count packets.
//   - The process keeps up to 4 MiB of receive buffers. It uses up to 32 MiB while readers are slow; beyond that, packets are copied.
package fastconn

import (
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/tap"
)

// Enable returns an option for [nats.Connect]. Give it after [nats.SetCustomDialer]: it uses the dialer that the connection has. Use
// a new option for each connection.
func Enable() nats.Option { return tap.Use }
