// Package streamgrpc carries gRPC calls over streams. Generated stubs and service implementations run unchanged: a
// client gets a [ClientConn] in place of a grpc.ClientConn, and services register with a [Server] in place of a
// grpc.Server.
//
//	conn := streamgrpc.NewClientConn(client)      // client is a *stream.Client
//	greeter := pb.NewGreeterClient(conn)
//
//	srv := streamgrpc.NewServer(server)           // server is a *stream.Server
//	pb.RegisterGreeterServer(srv, &greeterService{})
//
// NATS takes the place of addresses, name resolution and load balancing. Each service has a subject, and the servers
// that have registered it share its calls as a queue group. Flush the server's connection after you have registered
// services. When Flush has returned, the NATS server knows the services.
//
// # As with gRPC
//
// All four kinds of calls; metadata, also of keys that end in -bin; headers and trailers; status with details;
// deadlines and cancellation; interceptors and stats handlers of grpc at both ends; health and reflection, whose
// packages take the Server; codecs that are registered with package encoding. Trailers and details have no limit but
// that of a record, MaxRecordSize of the peer.
//
// These call options have their effect: Header, Trailer, Peer, OnFinish, WaitForReady, MaxCallRecvMsgSize,
// MaxCallSendMsgSize, PerRPCCredentials, CallContentSubtype, ForceCodec and ForceCodecV2.
//
// # Differences
//
//   - A service must be registered for its calls to reach the server, and is reachable from then on. There is no Serve.
//   - A call has no connection of its own. The address of the peer is a subject, at both ends, and the peer has no
//     AuthInfo. Metadata at the server have no :authority, user-agent and content-type. The options CallAuthority,
//     StaticMethod and MaxRetryRPCBufferSize do nothing, and stats handlers get the events of calls but none of
//     connections.
//   - Credentials of calls travel as metadata. They are refused if they demand transport security, unless
//     [WithTransportSecurity] says that the connections to NATS have it.
//   - There is no compression. A call with [grpc.UseCompressor] fails with codes.Unimplemented, and
//     [grpc.SetSendCompressor] fails at the server. A call with the deprecated option CallCustomCodec fails in the same
//     way: use ForceCodec.
//   - There are no service configs, so nothing is retried. WaitForReady repeats calls that reached no server until
//     their context ends. [stream.Retryable] tells if a failed call surely did not run.
//   - The metadata of a client must fit into a NATS message: max_payload of the NATS server, 1 MiB by default.
//
// # Codes
//
// A call ends with the status that the service returned. If the stream under it ends otherwise, the status is:
//
//   - codes.Unavailable if no server has the prefix, the server had no room, or the server or the connection was lost.
//     [stream.Retryable] reports whether the service surely did not run. The status wraps the error of the stream.
//   - codes.Unimplemented if servers have the prefix, but none the service
//   - codes.Canceled and codes.DeadlineExceeded if the context of the call ended
//   - codes.ResourceExhausted if a message was too large
//   - codes.Internal if the service panicked, or the peer broke the rules of README.md
package streamgrpc
