// Package interop has no code. Its tests run protocols over connections of package streamnet: HTTP/1.1 and HTTP/2 of
// net/http, connect-go, and the interoperability cases of gRPC with grpc-go. They run them on a sound network, while
// packets are lost, and while the NATS server is killed. It is a module of its own, so that streamnet does not depend
// on these protocols.
package interop
