package streamgrpc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"github.com/natsstream/stream"
)

// Server runs the methods of services for calls that arrive as streams. It takes the place of a *grpc.Server for the
// registration of services. It is safe for use by many goroutines at once. Each call runs in the goroutine of its
// stream's handler.
type Server struct {
	streams *stream.Server
	prefix  string
	unary   []grpc.UnaryServerInterceptor
	around  []grpc.StreamServerInterceptor
	stats   []stats.Handler
	maxRecv int

	mu            sync.Mutex // guards the fields below
	services      map[string]*service
	registrations []*stream.Registration
	failed        error
	stopped       bool
}

// service is a registered service.
type service struct {
	impl    any
	methods map[string]grpc.MethodDesc
	streams map[string]grpc.StreamDesc
	info    grpc.ServiceInfo
}

var _ grpc.ServiceRegistrar = (*Server)(nil)

// NewServer returns a Server that handles streams of s. The caller keeps s, and drains and closes it.
func NewServer(s *stream.Server, options ...ServerOption) *Server {
	srv := &Server{streams: s, prefix: DefaultPrefix, maxRecv: defaultMaxRecv, services: map[string]*service{}}
	for _, o := range options {
		o.server(srv)
	}
	return srv
}

// RegisterService makes a service reachable. Generated code calls it. It panics if the service is registered already,
// if impl does not implement it, or if its name is no subject, because these are errors of the program. [Server.Err]
// reports errors of NATS.
func (s *Server) RegisterService(desc *grpc.ServiceDesc, impl any) {
	if impl != nil {
		if want := reflect.TypeOf(desc.HandlerType).Elem(); !reflect.TypeOf(impl).Implements(want) {
			panic(fmt.Sprintf("streamgrpc: %T does not implement %v, the interface of the service %s", impl, want, desc.ServiceName))
		}
	}
	if !validName(desc.ServiceName) {
		panic(fmt.Sprintf("streamgrpc: %q is no name of a service", desc.ServiceName))
	}
	svc := &service{impl: impl, methods: map[string]grpc.MethodDesc{}, streams: map[string]grpc.StreamDesc{}, info: grpc.ServiceInfo{Metadata: desc.Metadata}}
	for _, m := range desc.Methods {
		svc.methods[m.MethodName] = m
		svc.info.Methods = append(svc.info.Methods, grpc.MethodInfo{Name: m.MethodName})
	}
	for _, d := range desc.Streams {
		svc.streams[d.StreamName] = d
		svc.info.Methods = append(svc.info.Methods, grpc.MethodInfo{Name: d.StreamName, IsClientStream: d.ClientStreams, IsServerStream: d.ServerStreams})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.services[desc.ServiceName] != nil {
		panic(fmt.Sprintf("streamgrpc: the service %s is registered already", desc.ServiceName))
	}
	if len(s.services) == 0 {
		s.handleLocked(serversToken, func(*stream.Writer, *stream.Request) error { return nil })
	}
	s.services[desc.ServiceName] = svc
	s.handleLocked(desc.ServiceName+".*", func(w *stream.Writer, r *stream.Request) error { return s.serve(desc.ServiceName, svc, w, r) })
}

// handleLocked serves a subject below the prefix.
func (s *Server) handleLocked(subject string, h stream.Handler) {
	if s.stopped {
		s.failed = errors.Join(s.failed, fmt.Errorf("streamgrpc: %s was registered after Stop", subject))
		return
	}
	r, err := s.streams.HandleQueue(s.prefix+"."+subject, s.prefix, h)
	if err != nil {
		s.failed = errors.Join(s.failed, fmt.Errorf("streamgrpc: serving %s.%s: %w", s.prefix, subject, err))
		return
	}
	s.registrations = append(s.registrations, r)
}

// Err returns an error if a registered service is not reachable: the server was closed, or NATS refuses its subject.
func (s *Server) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.failed
	for _, r := range s.registrations {
		err = errors.Join(err, r.Err())
	}
	return err
}

// Stop ends the registration of the services: new calls go to other servers. Running calls go on. To wait for them,
// drain the stream.Server. Drain also ends the registration of the services.
func (s *Server) Stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped = true
	for _, r := range s.registrations {
		r.Stop()
	}
	s.registrations = nil
}

// GetServiceInfo returns the registered services, as that of a *grpc.Server does. Reflection uses it.
func (s *Server) GetServiceInfo() map[string]grpc.ServiceInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make(map[string]grpc.ServiceInfo, len(s.services))
	for name, svc := range s.services {
		all[name] = svc.info
	}
	return all
}

// serve runs a call. The status of the service is its last record, so the stream itself ends normally.
func (s *Server) serve(name string, svc *service, w *stream.Writer, r *stream.Request) error {
	c, err := parseCall(r.Data)
	if err != nil {
		return &stream.CloseError{Code: stream.CloseBadRequest, Text: err.Error()}
	}
	method := r.Subject[strings.LastIndexByte(r.Subject, '.')+1:]
	call := &serverStream{server: s, writer: w, request: r, method: "/" + name + "/" + method, call: c}
	ctx := r.Context()
	if c.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.timeout)
		defer cancel()
	}
	ctx = metadata.NewIncomingContext(ctx, c.md)
	ctx = peer.NewContext(ctx, &peer.Peer{Addr: address(r.Subject), LocalAddr: address(r.Subject)})
	call.watched = watch(ctx, s.stats, false, call.method, address(r.Subject), false)
	call.watched.inHeader(c.md)
	call.ctx = grpc.NewContextWithServerTransportStream(call.watched.ctx, transportStream{call})
	return call.end(s.run(call, svc, method))
}

// run runs the method of a call, and returns the error of the service.
func (s *Server) run(call *serverStream, svc *service, method string) error {
	unary, isUnary := svc.methods[method]
	desc, isStream := svc.streams[method]
	call.watched.begin(&desc, false)
	returned := false
	defer func() {
		if !returned { // the service panicked, and the stream.Server ends the call
			call.watched.end(call.trailer, status.Error(codes.Internal, "the service panicked"))
		}
	}()
	var err error
	switch call.codec = codecOf(cmp.Or(call.call.codec, "proto")); {
	case call.codec == nil:
		err = status.Errorf(codes.Internal, "the server has no codec for content subtype %q: import its package", call.call.codec)
	case isUnary:
		err = s.runUnary(call, svc, unary)
	case isStream:
		err = s.runStream(call, svc, desc)
	default:
		service, _, _ := strings.Cut(call.method[1:], "/")
		err = status.Errorf(codes.Unimplemented, "unknown method %s for service %s", method, service)
	}
	returned = true
	return err
}

// runUnary runs a method that takes a message and returns one.
func (s *Server) runUnary(call *serverStream, svc *service, m grpc.MethodDesc) error {
	var around grpc.UnaryServerInterceptor
	if len(s.unary) > 0 {
		around = chainUnary(s.unary)
	}
	reply, err := m.Handler(svc.impl, call.ctx, call.RecvMsg, around)
	if err != nil {
		return err
	}
	return call.SendMsg(reply)
}

// runStream runs a streaming method.
func (s *Server) runStream(call *serverStream, svc *service, d grpc.StreamDesc) error {
	call.streaming = d.ClientStreams
	run := d.Handler
	info := &grpc.StreamServerInfo{FullMethod: call.method, IsClientStream: d.ClientStreams, IsServerStream: d.ServerStreams}
	for i := len(s.around) - 1; i >= 0; i-- {
		next, around := run, s.around[i]
		run = func(srv any, ss grpc.ServerStream) error { return around(srv, ss, info, next) }
	}
	return run(svc.impl, call)
}

// chainUnary makes one interceptor of several. The first is the outermost.
func chainUnary(all []grpc.UnaryServerInterceptor) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
		for i := len(all) - 1; i >= 0; i-- {
			next, around := h, all[i]
			h = func(ctx context.Context, req any) (any, error) { return around(ctx, req, info, next) }
		}
		return h(ctx, req)
	}
}
