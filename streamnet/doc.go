// Package streamnet carries connections over NATS: a [net.Conn] is a stream, and a [net.Listener] is a subject of a
// server. Programs that speak over connections, such as net/http, gRPC or TLS, run over NATS without a change of their
// own.
//
//	listener, err := streamnet.Listen(server, "web") // server is a *stream.Server
//	go http.Serve(listener, handler)
//
//	conn, err := streamnet.Dial(ctx, client, "web") // client is a *stream.Client
//
// # What a connection is
//
// A connection carries bytes in both directions, without boundaries. It survives a reconnect and a lost server of a
// cluster, as its stream does. Deadlines, half-close and concurrent use are those of package net. A peer that is gone
// is noticed as on any stream, within 3.9 s by default. Reads and writes then return the error of the stream.
//
// Reads and writes use the records of the stream directly: no goroutine copies them. An accepted connection has one
// goroutine, in which its server waits for Close.
//
// # Ends
//
// Read returns [io.EOF] after the other end has called Close or CloseWrite, when all its bytes were read. It never does
// so if bytes are missing. If the other end goes away in any other manner, Read returns an error that wraps the error
// of the stream.
//
// Close sends all written bytes, as with TCP. At the dialing end it returns at once. Packets of the accepting end are
// kept until the other end has acknowledged them, or for ResumeTimeout.
package streamnet
