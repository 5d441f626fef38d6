// Package stream carries streams of records over core NATS. A consumer opens a stream with a request; from then on both ends
// send any number of records, until each closes its direction.
//
// # Terms
//
// A record is a slice of bytes, or an object that the library encodes. The consumer is the end that sends the request, and
// reads a [Stream]. The producer is the end that answers it, and writes to a [Writer]. A [Client] opens streams for
// consumers, a [Server] calls a [Handler] for each request, and a [Request] is the request together with the records that the
// consumer sends after it. Each Client and Server uses one NATS connection, and one subscription for the packets of all its
// streams. They may share the connection.
//
// # A first stream
//
// The producer:
//
//	server, err := stream.NewServer(stream.ServerParams{Conn: nc})
//	...
//	_, err = server.Handle("logs", func(w *stream.Writer, r *stream.Request) error {
//		_, err := fmt.Fprintf(w, "log of %s", r.Data) // one record
//		return err                                    // nil: the stream ends, the consumer has everything
//	})
//
// The consumer:
//
//	client, err := stream.NewClient(stream.ClientParams{Conn: nc})
//	...
//	s, err := client.Open(ctx, "logs", []byte("job 17"))
//	...
//	defer s.Close()
//	for record, err := range s.All() {
//		...
//	}
//
// Use a Server to produce. [NewWriter] is for programs that receive requests in a subscription of their own, as the original
// API did: its streams take no records from the consumer.
//
// # Ends and errors
//
// Each direction ends once. A reader gets [io.EOF] if the peer closed normally, and a [*CloseError] with its code and text
// otherwise. EOF says that every record arrived, once and in order: a stream that lost anything ends with another error. A
// Handler's return value is the end of its stream. The context of a Writer or Request ends if the consumer leaves, and
// [context.Cause] tells why. A consumer reads to the end, calls [Stream.Close], or ends the context that it gave to
// [Client.Open]; otherwise the stream stays open.
//
// # Flow control and limits
//
// A writer waits if its reader is behind by more than a window of bytes. Windows begin small, grow for readers that keep up,
// and are limited for each stream and for all together by Window and MaxBuffered of [ClientParams] and [ServerParams]. A slow
// reader holds back its own stream and no other. A record has at most MaxRecordSize bytes, and a server runs at most
// MaxStreams handlers.
//
// # Reconnects
//
// Packets are kept until the peer acknowledges them and are sent again if they are lost, so a stream survives a reconnect,
// also to another server of a cluster. A stream ends with [CloseAbnormalClosure] if its peer stays away for PeerTimeout or
// its own connection for DisconnectTimeout. A request is sent only once, because a handler may have run: [Retryable] tells the
// errors after which it surely did not, and [Client.OpenRetry] repeats those requests.
//
// # The original API
//
// [NewWriter], [Client.OpenStream] and package [github.com/natsstream/stream/concurrency] keep programs of the original library
// working. Peers that speak only its JSON protocol are served in both directions, without acknowledgements and without credit.
//
// # For implementers
//
// docs/PROTOCOL.md specifies the wire format. The functions named Append… and Parse… of this package encode and decode it, and
// testdata/vectors.json tests another implementation.
package stream
