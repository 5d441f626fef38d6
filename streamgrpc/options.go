package streamgrpc

import (
	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"
)

// This file has the options. NewClientConn and NewServer run them, before other goroutines know the result.

// Option configures a [ClientConn] or a [Server].
type Option interface {
	ClientOption
	ServerOption
}

// ClientOption configures a [ClientConn].
type ClientOption interface{ client(*ClientConn) }

// ServerOption configures a [Server].
type ServerOption interface{ server(*Server) }

type prefix string

func (p prefix) client(c *ClientConn) { c.prefix = string(p) }
func (p prefix) server(s *Server)     { s.prefix = string(p) }

// WithPrefix sets the subject below which services are: [DefaultPrefix] by default. The subject of a method is the
// prefix, the full name of the service, and the name of the method, with dots between them.
func WithPrefix(subject string) Option { return prefix(subject) }

type clientOption func(*ClientConn)

func (f clientOption) client(c *ClientConn) { f(c) }

// WithUnaryInterceptors adds interceptors of unary calls. The first one is the outermost. The *grpc.ClientConn that
// they get is not connected: it only has a target.
func WithUnaryInterceptors(i ...grpc.UnaryClientInterceptor) ClientOption {
	return clientOption(func(c *ClientConn) { c.unary = append(c.unary, i...) })
}

// WithStreamInterceptors adds interceptors of streaming calls, as [WithUnaryInterceptors] does for unary ones.
func WithStreamInterceptors(i ...grpc.StreamClientInterceptor) ClientOption {
	return clientOption(func(c *ClientConn) { c.stream = append(c.stream, i...) })
}

// WithStatsHandlers adds handlers that get the events of each call, such as those of OpenTelemetry. They are told of
// calls only: TagConn and HandleConn are not called, because a call has no connection of its own.
func WithStatsHandlers(h ...stats.Handler) ClientOption {
	return clientOption(func(c *ClientConn) { c.stats = append(c.stats, h...) })
}

// WithDefaultCallOptions sets call options that come before those of each call.
func WithDefaultCallOptions(o ...grpc.CallOption) ClientOption {
	return clientOption(func(c *ClientConn) { c.defaults = append(c.defaults, o...) })
}

// WithTransportSecurity states that the connections of clients and servers to NATS, and those between NATS servers, are
// encrypted. Credentials of calls that demand it are refused otherwise.
func WithTransportSecurity() ClientOption {
	return clientOption(func(c *ClientConn) { c.secure = true })
}

type serverOption func(*Server)

func (f serverOption) server(s *Server) { f(s) }

// UnaryInterceptors adds interceptors of unary calls. The first one is the outermost.
func UnaryInterceptors(i ...grpc.UnaryServerInterceptor) ServerOption {
	return serverOption(func(s *Server) { s.unary = append(s.unary, i...) })
}

// StreamInterceptors adds interceptors of streaming calls. The first one is the outermost.
func StreamInterceptors(i ...grpc.StreamServerInterceptor) ServerOption {
	return serverOption(func(s *Server) { s.around = append(s.around, i...) })
}

// StatsHandlers adds handlers that get the events of each call at its server, as [WithStatsHandlers] does at its
// client.
func StatsHandlers(h ...stats.Handler) ServerOption {
	return serverOption(func(s *Server) { s.stats = append(s.stats, h...) })
}

// MaxRecvMsgSize sets the largest message in bytes that a server takes: 4 MiB by default, as in gRPC. MaxRecordSize of
// the stream.Server bounds it as well.
func MaxRecvMsgSize(n int) ServerOption { return serverOption(func(s *Server) { s.maxRecv = n }) }
