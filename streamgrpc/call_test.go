package streamgrpc

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection"
	reflectiongrpc "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/natsstream/stream"
)

// functions is a service whose methods a test sets.
type functions struct {
	testgrpc.UnimplementedTestServiceServer
	unary  func(context.Context, *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error)
	output func(*testgrpc.StreamingOutputCallRequest, testgrpc.TestService_StreamingOutputCallServer) error
	input  func(testgrpc.TestService_StreamingInputCallServer) error
	duplex func(testgrpc.TestService_FullDuplexCallServer) error
}

func (f *functions) UnaryCall(ctx context.Context, r *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
	return f.unary(ctx, r)
}

func (f *functions) StreamingOutputCall(r *testgrpc.StreamingOutputCallRequest, s testgrpc.TestService_StreamingOutputCallServer) error {
	return f.output(r, s)
}

func (f *functions) StreamingInputCall(s testgrpc.TestService_StreamingInputCallServer) error {
	return f.input(s)
}

func (f *functions) FullDuplexCall(s testgrpc.TestService_FullDuplexCallServer) error {
	return f.duplex(s)
}

func serveFunctions(tb testing.TB, f *functions, options ...any) (*pair, testgrpc.TestServiceClient) {
	tb.Helper()
	p := run(tb, options...)
	testgrpc.RegisterTestServiceServer(p.srv, f)
	p.reachable(tb)
	return p, testgrpc.NewTestServiceClient(p.conn)
}

func TestStatusCarriesDetailsAndLargeTrailers(t *testing.T) {
	large := strings.Repeat("x", 1<<20)
	_, c := serveFunctions(t, &functions{unary: func(ctx context.Context, _ *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
		if err := grpc.SetTrailer(ctx, metadata.Pairs("large", large, "raw-bin", "\x00\xff\n")); err != nil {
			return nil, err
		}
		st, err := status.New(codes.FailedPrecondition, "not ready: \"ü\"\n").WithDetails(&errdetails.ErrorInfo{Reason: "WARMUP"})
		if err != nil {
			return nil, err
		}
		return nil, st.Err()
	}})
	var trailer metadata.MD
	_, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}, grpc.Trailer(&trailer))
	st := status.Convert(err)
	if st.Code() != codes.FailedPrecondition || st.Message() != "not ready: \"ü\"\n" {
		t.Errorf("%v", err)
	}
	if d := st.Details(); len(d) != 1 || d[0].(*errdetails.ErrorInfo).GetReason() != "WARMUP" {
		t.Errorf("details %v", d)
	}
	if got := trailer.Get("large"); len(got) != 1 || got[0] != large {
		t.Errorf("a trailer of %d values", len(got))
	}
	if got := trailer.Get("raw-bin"); len(got) != 1 || got[0] != "\x00\xff\n" {
		t.Errorf("%q", got)
	}
}

func TestMetadataBothWays(t *testing.T) {
	_, c := serveFunctions(t, &functions{unary: func(ctx context.Context, _ *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		if !slices.Equal(md.Get("list"), []string{"a", "b"}) || !slices.Equal(md.Get("raw-bin"), []string{"\x00\n"}) {
			return nil, status.Errorf(codes.InvalidArgument, "%v", md)
		}
		p, _ := peer.FromContext(ctx)
		if p == nil || !strings.HasSuffix(p.Addr.String(), "UnaryCall") {
			return nil, status.Errorf(codes.InvalidArgument, "peer %v", p)
		}
		return &testgrpc.SimpleResponse{}, errors.Join(grpc.SetHeader(ctx, metadata.Pairs("a", "1")), grpc.SendHeader(ctx, metadata.Pairs("b", "2")))
	}})
	var header metadata.MD
	var at peer.Peer
	finished := make(chan error, 1)
	ctx := metadata.AppendToOutgoingContext(limited(t), "list", "a", "list", "b", "raw-bin", "\x00\n")
	_, err := c.UnaryCall(ctx, &testgrpc.SimpleRequest{}, grpc.Header(&header), grpc.Peer(&at), grpc.OnFinish(func(err error) { finished <- err }))
	if err != nil || !slices.Equal(header.Get("a"), []string{"1"}) || !slices.Equal(header.Get("b"), []string{"2"}) {
		t.Errorf("%v, %v", header, err)
	}
	if at.Addr == nil || at.Addr.Network() != "nats" {
		t.Errorf("peer %v", at)
	}
	if err := <-finished; err != nil {
		t.Error(err)
	}
}

func TestInvalidMetadataIsRefused(t *testing.T) {
	_, c := serveFunctions(t, &functions{unary: func(ctx context.Context, _ *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
		if err := grpc.SetTrailer(ctx, metadata.Pairs("grpc-mine", "x")); status.Code(err) != codes.Internal {
			t.Errorf("%v", err)
		}
		return &testgrpc.SimpleResponse{}, nil
	}, output: func(_ *testgrpc.StreamingOutputCallRequest, s testgrpc.TestService_StreamingOutputCallServer) error {
		s.SetTrailer(metadata.MD{"UPPER": {"x"}})
		return nil
	}})
	for _, md := range []metadata.MD{{"a b": {"x"}}, {"": {"x"}}, {"a": {"line\nbreak"}}, {"a": {"ü"}}, {"grpc-timeout": {"1S"}}} {
		if _, err := c.UnaryCall(metadata.NewOutgoingContext(limited(t), md), &testgrpc.SimpleRequest{}); status.Code(err) != codes.Internal {
			t.Errorf("%v: %v", md, err)
		}
	}
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}); err != nil {
		t.Error(err)
	}
	s, err := c.StreamingOutputCall(limited(t), &testgrpc.StreamingOutputCallRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); status.Code(err) != codes.Internal {
		t.Errorf("a trailer that gRPC does not allow: %v", err)
	}
}

func TestUnavailableDiffersFromUnimplemented(t *testing.T) {
	p := run(t)
	c := testgrpc.NewTestServiceClient(p.conn)
	_, err := c.EmptyCall(limited(t), &testgrpc.Empty{})
	if status.Code(err) != codes.Unavailable || !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("no server: %v", err)
	}
	healthgrpc.RegisterHealthServer(p.srv, health.NewServer())
	p.reachable(t)
	if _, err := c.EmptyCall(limited(t), &testgrpc.Empty{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("a server without the service: %v", err)
	}
	testgrpc.RegisterTestServiceServer(p.srv, &functions{})
	p.reachable(t)
	if _, err := c.EmptyCall(limited(t), &testgrpc.Empty{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("a service without the method: %v", err)
	}
	for _, method := range []string{"", "/", "/a", "/a/", "//b", "/a b/c", "/a.>/b", "/a/b.c", "/*/x"} {
		var in, out testgrpc.Empty
		if err := p.conn.Invoke(limited(t), method, &in, &out); status.Code(err) != codes.Unimplemented {
			t.Errorf("method %q: %v", method, err)
		}
	}
	p.srv.Stop()
	if err := p.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.EmptyCall(limited(t), &testgrpc.Empty{}); status.Code(err) != codes.Unavailable {
		t.Errorf("a stopped server: %v", err)
	}
}

func TestWaitForReadyWaitsForTheServer(t *testing.T) {
	p := run(t)
	c := testgrpc.NewTestServiceClient(p.conn)
	done := make(chan error, 1)
	go func() {
		_, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}, grpc.WaitForReady(true))
		done <- err
	}()
	time.Sleep(50 * time.Millisecond) // some requests find nobody
	testgrpc.RegisterTestServiceServer(p.srv, &functions{unary: func(context.Context, *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
		return &testgrpc.SimpleResponse{}, nil
	}})
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestFullServerIsUnavailable(t *testing.T) {
	small := run(t).with(t, stream.ServerParams{MaxStreams: 1, StayWhenFull: true}, "small")
	running, release := make(chan struct{}), make(chan struct{})
	testgrpc.RegisterTestServiceServer(small.srv, &functions{unary: func(context.Context, *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
		close(running)
		<-release
		return &testgrpc.SimpleResponse{}, nil
	}})
	small.reachable(t)
	c := testgrpc.NewTestServiceClient(small.conn)
	first := make(chan error, 1)
	go func() {
		_, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{})
		first <- err
	}()
	<-running
	_, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{})
	if status.Code(err) != codes.Unavailable || !stream.Retryable(err) {
		t.Errorf("%v, retryable %v", err, stream.Retryable(err))
	}
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
}

func TestDeadlineReachesTheServer(t *testing.T) {
	ended := make(chan error, 2)
	_, c := serveFunctions(t, &functions{unary: func(ctx context.Context, _ *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
		if _, ok := ctx.Deadline(); !ok {
			t.Error("the server knows no deadline")
		}
		<-ctx.Done()
		ended <- ctx.Err()
		return nil, ctx.Err()
	}})
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.UnaryCall(ctx, &testgrpc.SimpleRequest{}); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("%v", err)
	}
	if err := <-ended; err == nil {
		t.Error("the context of the server goes on")
	}
	if _, err := c.UnaryCall(ctx, &testgrpc.SimpleRequest{}); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("a deadline that has passed: %v", err)
	}
}

func TestCancellationReachesTheServer(t *testing.T) {
	ended := make(chan error, 1)
	_, c := serveFunctions(t, &functions{duplex: func(s testgrpc.TestService_FullDuplexCallServer) error {
		_, err := s.Recv()
		if err != nil {
			return err
		}
		if err := s.Send(&testgrpc.StreamingOutputCallResponse{}); err != nil {
			return err
		}
		_, err = s.Recv()
		ended <- err
		return err
	}})
	ctx, cancel := context.WithCancel(limited(t))
	s, err := c.FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&testgrpc.StreamingOutputCallRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-ended; status.Code(err) != codes.Canceled {
		t.Errorf("the server's read: %v", err)
	}
	if _, err := s.Recv(); status.Code(err) != codes.Canceled {
		t.Errorf("the client's read: %v", err)
	}
	if err := s.Send(&testgrpc.StreamingOutputCallRequest{}); err == nil {
		t.Error("a message was sent after the end")
	}
}

// A service may answer before its client has sent everything. The client's next message fails with io.EOF then, and the
// status is that of the service.
func TestServiceMayEndFirst(t *testing.T) {
	_, c := serveFunctions(t, &functions{input: func(s testgrpc.TestService_StreamingInputCallServer) error {
		if _, err := s.Recv(); err != nil {
			return err
		}
		return status.Error(codes.AlreadyExists, "known")
	}})
	s, err := c.StreamingInputCall(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		err = s.Send(&testgrpc.StreamingInputCallRequest{Payload: &testgrpc.Payload{Body: make([]byte, 1000)}})
	}
	if err != io.EOF {
		t.Errorf("Send: %v, want io.EOF", err)
	}
	if _, err := s.CloseAndRecv(); status.Code(err) != codes.AlreadyExists {
		t.Errorf("%v", err)
	}
}

func TestMessagesHaveLimits(t *testing.T) {
	_, c := serveFunctions(t, &functions{unary: func(ctx context.Context, r *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
		if r.GetFillUsername() {
			return nil, grpc.SetTrailer(ctx, metadata.Pairs("large", strings.Repeat("x", 20<<20)))
		}
		return &testgrpc.SimpleResponse{Payload: &testgrpc.Payload{Body: make([]byte, r.GetResponseSize())}}, nil
	}}, MaxRecvMsgSize(100_000))
	body := func(n int) *testgrpc.SimpleRequest {
		return &testgrpc.SimpleRequest{Payload: &testgrpc.Payload{Body: make([]byte, n)}}
	}
	for name, call := range map[string]func() error{
		"server's limit": func() error { _, err := c.UnaryCall(limited(t), body(200_000)); return err },
		"client's limit": func() error {
			_, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{ResponseSize: 5 << 20})
			return err
		},
		"option for received": func() error {
			_, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{ResponseSize: 1000}, grpc.MaxCallRecvMsgSize(999))
			return err
		},
		"option for sent": func() error {
			_, err := c.UnaryCall(limited(t), body(1000), grpc.MaxCallSendMsgSize(999))
			return err
		},
		"record": func() error { _, err := c.UnaryCall(limited(t), body(20<<20)); return err },
		"trailer": func() error {
			_, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{FillUsername: true})
			return err
		},
		"metadata": func() error {
			_, err := c.UnaryCall(metadata.AppendToOutgoingContext(limited(t), "large", strings.Repeat("x", 2<<20)), &testgrpc.SimpleRequest{})
			return err
		},
	} {
		if err := call(); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("%s: %v", name, err)
		}
	}
	if r, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{ResponseSize: 10 << 20}, grpc.MaxCallRecvMsgSize(11<<20)); err != nil || len(r.GetPayload().GetBody()) != 10<<20 {
		t.Errorf("a large answer: %v", err)
	}
}

func TestPanicEndsTheCallOnly(t *testing.T) {
	p := run(t).with(t, stream.ServerParams{Logger: slog.New(slog.DiscardHandler)}, "panics")
	testgrpc.RegisterTestServiceServer(p.srv, &functions{unary: func(context.Context, *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
		panic("broken service")
	}})
	p.reachable(t)
	c := testgrpc.NewTestServiceClient(p.conn)
	for range 3 {
		if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}); status.Code(err) != codes.Internal {
			t.Errorf("%v", err)
		}
	}
}

// An error that is no status has codes.Unknown, as with gRPC.
func TestPlainErrorIsUnknown(t *testing.T) {
	_, c := serveFunctions(t, &functions{unary: func(context.Context, *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
		return nil, errors.New("plain")
	}, output: func(*testgrpc.StreamingOutputCallRequest, testgrpc.TestService_StreamingOutputCallServer) error {
		return io.EOF // must not look like the normal end
	}})
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}); status.Code(err) != codes.Unknown || status.Convert(err).Message() != "plain" {
		t.Errorf("%v", err)
	}
	s, err := c.StreamingOutputCall(limited(t), &testgrpc.StreamingOutputCallRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); status.Code(err) != codes.Unknown {
		t.Errorf("io.EOF of a service: %v", err)
	}
}

func TestInterceptorsRunInOrder(t *testing.T) {
	var mu sync.Mutex
	var order []string
	note := func(s string) {
		mu.Lock()
		defer mu.Unlock()
		order = append(order, s)
	}
	unaryClient := func(name string) grpc.UnaryClientInterceptor {
		return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			note(name + " " + cc.Target())
			return next(ctx, method, req, reply, cc, opts...)
		}
	}
	streamClient := func(name string) grpc.StreamClientInterceptor {
		return func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			note(name)
			return next(ctx, d, cc, method, opts...)
		}
	}
	unaryServer := func(name string) grpc.UnaryServerInterceptor {
		return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			note(name + " " + info.FullMethod)
			return next(ctx, req)
		}
	}
	streamServer := func(name string) grpc.StreamServerInterceptor {
		return func(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
			note(name)
			return next(srv, s)
		}
	}
	_, c := serveFunctions(t, &functions{unary: func(context.Context, *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
		return &testgrpc.SimpleResponse{}, nil
	}, output: func(*testgrpc.StreamingOutputCallRequest, testgrpc.TestService_StreamingOutputCallServer) error {
		return nil
	}},
		WithUnaryInterceptors(unaryClient("c1"), unaryClient("c2")), WithStreamInterceptors(streamClient("c1"), streamClient("c2")),
		UnaryInterceptors(unaryServer("s1"), unaryServer("s2")), StreamInterceptors(streamServer("s1"), streamServer("s2")))
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}); err != nil {
		t.Fatal(err)
	}
	method := " /grpc.testing.TestService/UnaryCall"
	target := " passthrough:///grpc"
	if want := []string{"c1" + target, "c2" + target, "s1" + method, "s2" + method}; !slices.Equal(order, want) {
		t.Errorf("%q, want %q", order, want)
	}
	order = nil
	s, err := c.StreamingOutputCall(limited(t), &testgrpc.StreamingOutputCallRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Fatal(err)
	}
	if want := []string{"c1", "c2", "s1", "s2"}; !slices.Equal(order, want) {
		t.Errorf("%q, want %q", order, want)
	}
}

func TestHealthAndReflection(t *testing.T) {
	p := run(t)
	h := health.NewServer()
	healthgrpc.RegisterHealthServer(p.srv, h)
	testgrpc.RegisterTestServiceServer(p.srv, &functions{})
	reflection.Register(p.srv)
	p.reachable(t)
	r, err := healthgrpc.NewHealthClient(p.conn).Check(limited(t), &healthgrpc.HealthCheckRequest{})
	if err != nil || r.GetStatus() != healthgrpc.HealthCheckResponse_SERVING {
		t.Errorf("%v, %v", r, err)
	}
	watch, err := healthgrpc.NewHealthClient(p.conn).Watch(limited(t), &healthgrpc.HealthCheckRequest{Service: "x"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []healthgrpc.HealthCheckResponse_ServingStatus{
		healthgrpc.HealthCheckResponse_SERVICE_UNKNOWN, healthgrpc.HealthCheckResponse_SERVING, healthgrpc.HealthCheckResponse_NOT_SERVING,
	} {
		if want != healthgrpc.HealthCheckResponse_SERVICE_UNKNOWN {
			h.SetServingStatus("x", want)
		}
		if r, err := watch.Recv(); err != nil || r.GetStatus() != want {
			t.Errorf("%v, %v, want %v", r, err, want)
		}
	}
	info, err := reflectiongrpc.NewServerReflectionClient(p.conn).ServerReflectionInfo(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := info.Send(&reflectiongrpc.ServerReflectionRequest{MessageRequest: &reflectiongrpc.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	answer, err := info.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range answer.GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	if !slices.Contains(names, "grpc.testing.TestService") || !slices.Contains(names, "grpc.health.v1.Health") {
		t.Errorf("services %q", names)
	}
	if err := info.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := info.Recv(); err != io.EOF {
		t.Errorf("%v, want io.EOF", err)
	}
}

// token is the credentials of a call.
type token struct{ secure bool }

func (token) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer x"}, nil
}
func (c token) RequireTransportSecurity() bool { return c.secure }

func TestCredentialsTravelAsMetadata(t *testing.T) {
	f := &functions{unary: func(ctx context.Context, _ *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
		md, _ := metadata.FromIncomingContext(ctx)
		if !slices.Equal(md.Get("authorization"), []string{"Bearer x"}) {
			return nil, status.Error(codes.PermissionDenied, "no token")
		}
		return &testgrpc.SimpleResponse{}, nil
	}}
	_, c := serveFunctions(t, f)
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}, grpc.PerRPCCredentials(token{})); err != nil {
		t.Error(err)
	}
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}, grpc.PerRPCCredentials(token{secure: true})); status.Code(err) != codes.Unauthenticated {
		t.Errorf("without transport security: %v", err)
	}
	_, c = serveFunctions(t, f, WithTransportSecurity(), WithPrefix("secure.grpc"))
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}, grpc.PerRPCCredentials(token{secure: true})); err != nil {
		t.Error(err)
	}
}

func TestCompressionIsRefused(t *testing.T) {
	_, c := serveFunctions(t, &functions{unary: func(context.Context, *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
		return &testgrpc.SimpleResponse{}, nil
	}})
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}, grpc.UseCompressor("gzip")); status.Code(err) != codes.Unimplemented {
		t.Errorf("%v", err)
	}
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}, grpc.UseCompressor("identity")); err != nil {
		t.Error(err)
	}
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}, grpc.CallContentSubtype("nonsense")); status.Code(err) != codes.Internal {
		t.Errorf("an unknown codec: %v", err)
	}
}

// Header returns as soon as the server has sent the header, also while another goroutine waits for a message.
func TestHeaderComesBeforeMessages(t *testing.T) {
	release := make(chan struct{})
	_, c := serveFunctions(t, &functions{duplex: func(s testgrpc.TestService_FullDuplexCallServer) error {
		if err := s.SendHeader(metadata.Pairs("a", "1")); err != nil {
			return err
		}
		<-release
		return s.Send(&testgrpc.StreamingOutputCallResponse{})
	}})
	s, err := c.FullDuplexCall(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	received := make(chan error, 1)
	go func() {
		_, err := s.Recv()
		received <- err
	}()
	header, err := s.Header()
	if err != nil || !slices.Equal(header.Get("a"), []string{"1"}) {
		t.Errorf("%v, %v", header, err)
	}
	close(release)
	if err := <-received; err != nil {
		t.Error(err)
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Error(err)
	}
	if s.Trailer().Len() != 0 {
		t.Error("a trailer")
	}
}

func TestHeaderOfAFailedCall(t *testing.T) {
	p := run(t)
	s, err := testgrpc.NewTestServiceClient(p.conn).FullDuplexCall(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Header(); status.Code(err) != codes.Unavailable {
		t.Errorf("%v", err)
	}
	if _, err := s.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("%v", err)
	}
}

func TestRegistrationErrors(t *testing.T) {
	p := run(t)
	mustPanic := func(name string, f func()) {
		t.Helper()
		defer func() {
			if recover() == nil {
				t.Errorf("%s: no panic", name)
			}
		}()
		f()
	}
	testgrpc.RegisterTestServiceServer(p.srv, &functions{})
	mustPanic("twice", func() { testgrpc.RegisterTestServiceServer(p.srv, &functions{}) })
	mustPanic("wrong type", func() { p.srv.RegisterService(&healthgrpc.Health_ServiceDesc, &functions{}) })
	mustPanic("name", func() { p.srv.RegisterService(&grpc.ServiceDesc{ServiceName: "a b"}, nil) })
	if err := p.srv.Err(); err != nil {
		t.Error(err)
	}
	p.srv.Stop()
	healthgrpc.RegisterHealthServer(p.srv, health.NewServer())
	if err := p.srv.Err(); err == nil || !strings.Contains(err.Error(), "after Stop") {
		t.Errorf("%v", err)
	}
}
