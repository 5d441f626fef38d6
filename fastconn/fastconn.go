// Package fastconn makes streams faster on a connection of nats.go, by one more option:
//
//	nc, err := nats.Connect(url, fastconn.Enable())
//
// Clients and servers of package stream on this connection send and receive their packets past nats.go, and most of
// their requests. They receive packets into buffers that are used again, while nats.go allocates memory for every
// message. All other work stays with nats.go: subscriptions, reconnects, authentication, errors, and all messages of
// the program that do not belong to streams. The wire protocol is the same, so the peers of the streams may have
// ordinary connections.
//
// Use [github.com/natsstream/stream.Stream.Next], Read, WriteTo, RecvObject or io.Copy for the full gain. Recv and All
// copy each packet once, because their records may be kept.
//
// # Supported connections
//
// The option works over TCP, with TLS, and over a dialer of your own. It has no effect over WebSocket and with
// [nats.InProcessServer]: nats.go carries all messages of such a connection. [github.com/natsstream/stream.Stats].Fast
// reports whether packets go past nats.go.
//
// # Differences
//
//   - The option replaces the dialer of the connection. Put [nats.SetCustomDialer] and [nats.Dialer] before it in the
//     call of [nats.Connect].
//   - [nats.Conn.TLSConnectionState] returns [nats.ErrConnectionNotTLS], because nats.go does not set up TLS itself.
//   - OutMsgs and OutBytes of [nats.Conn.Stats] do not count packets, and not all requests for streams.
//   - The process keeps up to 8 MiB of free receive buffers, 4 MiB of each of two sizes. It uses up to 32 MiB while
//     readers are slow. Beyond that, connections copy each packet into memory of its own.
package fastconn

import (
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/tap"
)

// Enable returns an option for [nats.Connect]. Put it after [nats.SetCustomDialer], because it wraps the dialer that
// the connection has. Call Enable again for each connection.
func Enable() nats.Option { return tap.Use }
