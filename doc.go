// Package stream carries streams of records over core NATS. A consumer opens a stream with a request. Both ends then
// send any number of records, until each closes its direction.
//
// # Terms
//
// A record is a slice of bytes, or an object that the library encodes. The consumer is the end that sends the request,
// and reads a [Stream]. The producer is the end that answers it, and writes to a [Writer]. A [Client] opens streams for
// consumers, a [Server] calls a [Handler] for each request, and a [Request] is the request together with the records
// that the consumer sends after it. Each Client and Server uses one NATS connection, and one subscription for the
// packets of all its streams. They may share the connection.
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
// If several producers answer one request, [Client.OpenMany] returns a stream for each.
//
// Use a Server to produce. [NewWriter] is for programs that receive requests in a subscription of their own, as in the
// original API. A stream of NewWriter takes no records from the consumer.
//
// # Both directions, and objects
//
// The consumer sends records with [Stream.Write], and half-closes with [Stream.CloseSend]. The handler reads them with
// [Request.Recv] until [io.EOF], while it may write. WriteObject and RecvObject of these types send and receive Go
// values, in the [Codec] that the client chose.
//
// # Ends and errors
//
// Each direction ends once. A reader gets [io.EOF] if the peer closed normally, and a [*CloseError] with its code and
// text otherwise. EOF guarantees that every record arrived, once and in order: an incomplete stream ends with another
// error. The return value of a Handler ends its stream. The context of a Writer or Request ends if the consumer leaves,
// and [context.Cause] returns the reason. A stream stays open until the consumer reads to its end, calls
// [Stream.Close], or ends the context that it gave to [Client.Open]. Give that context a deadline: NATS does not report
// a request that is lost on its way.
//
// # Flow control and limits
//
// A writer waits if its reader is behind by more than a window of bytes. Windows begin small, and grow for readers that
// keep up. Window of [ClientParams] and [ServerParams] limits the window of each stream, and MaxBuffered limits the
// unread packets of all streams together. A slow reader holds back its own stream and no other. A record has at most
// MaxRecordSize bytes, and a server runs at most MaxStreams handlers.
//
// # Around all streams
//
// Interceptors of [ClientParams] and [ServerParams] run code around every [Client.Open] and every [Handler], for
// authorization or tracing. [Hooks] report what happens to each stream, and [Stats] and [Totals] count it.
//
// # Deadlines
//
// [Stream.SetReadDeadline], [Writer.SetWriteDeadline] and related methods bound how long a read or write waits. A call
// that would have to wait longer fails with an error that matches [os.ErrDeadlineExceeded], and the stream goes on.
// [Stream.Ready] and [Writer.TryWrite] do not wait at all. The context given to [Client.Open] bounds the stream as a
// whole.
//
// # Reconnects
//
// Packets are kept until the peer acknowledges them, and retransmitted if they are lost. So a stream survives a
// reconnect, also to another server of a cluster. A stream ends with [CloseAbnormalClosure] if its peer is silent for
// PeerTimeout, or if the connection of its own end is down for DisconnectTimeout. A request is sent only once, because
// a handler may have run. [Retryable] marks the errors after which no handler ran, and [WithRetry] repeats those
// requests.
//
// # Further packages
//
// These packages belong to this module:
//
//   - [github.com/natsstream/stream/fastconn] makes streams faster by an option of nats.Connect.
//   - [github.com/natsstream/stream/typed] gives streams the types of their records.
//   - [github.com/natsstream/stream/streamslog] logs the opening, the end, retransmissions and reconnects of streams.
//   - [github.com/natsstream/stream/streambench] measures the library against your NATS server.
//
// The folders streamgrpc, streamnet, streamotel and streamprom are modules of their own. They carry gRPC and net.Conn
// over streams, and export traces and metrics. The module [github.com/natsstream/stream/streamtest] has NATS servers
// and network faults for tests. [Server.AddService] shows a server to NATS tools.
//
// # The original API
//
// [NewWriter], [Client.OpenStream] and package [github.com/natsstream/stream/concurrency] keep programs of the original
// library working. Peers that speak only its JSON protocol are served in both directions, without acknowledgements and
// without credit.
//
// # For implementers
//
// docs/PROTOCOL.md specifies the wire format. The functions of this package whose names begin with Append and Parse
// encode and decode it. testdata/vectors.json has test vectors for other implementations.
package stream
