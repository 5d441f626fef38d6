package streamgrpc

import (
	"context"
	"io"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
)

// benchmarkSides runs f over streams and over grpc-go on loopback TCP, with the same service.
func benchmarkSides(b *testing.B, service testgrpc.TestServiceServer, f func(b *testing.B, c testgrpc.TestServiceClient)) {
	b.Run("impl=stream", func(b *testing.B) {
		p := run(b)
		testgrpc.RegisterTestServiceServer(p.srv, service)
		p.reachable(b)
		f(b, testgrpc.NewTestServiceClient(p.conn))
	})
	b.Run("impl=grpc", func(b *testing.B) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		s := grpc.NewServer()
		testgrpc.RegisterTestServiceServer(s, service)
		served := make(chan error, 1)
		go func() { served <- s.Serve(l) }()
		defer func() {
			s.Stop()
			if err := <-served; err != nil {
				b.Error(err)
			}
		}()
		cc, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			b.Fatal(err)
		}
		defer cc.Close()
		f(b, testgrpc.NewTestServiceClient(cc))
	})
}

// BenchmarkServerStream receives messages of 128 bytes of one call. Compare impl=stream with impl=grpc.
func BenchmarkServerStream(b *testing.B) {
	message := &testgrpc.StreamingOutputCallResponse{Payload: &testgrpc.Payload{Body: make([]byte, 128)}}
	service := &functions{output: func(r *testgrpc.StreamingOutputCallRequest, s testgrpc.TestService_StreamingOutputCallServer) error {
		for range r.GetResponseParameters()[0].GetSize() {
			if err := s.Send(message); err != nil {
				return err
			}
		}
		return nil
	}}
	benchmarkSides(b, service, func(b *testing.B, c testgrpc.TestServiceClient) {
		b.ReportAllocs()
		b.ResetTimer()
		s, err := c.StreamingOutputCall(context.Background(), &testgrpc.StreamingOutputCallRequest{
			ResponseParameters: []*testgrpc.ResponseParameters{{Size: int32(b.N)}}})
		if err != nil {
			b.Fatal(err)
		}
		for range b.N {
			if m, err := s.Recv(); err != nil || len(m.GetPayload().GetBody()) != 128 {
				b.Fatal(err)
			}
		}
		if _, err := s.Recv(); err != io.EOF {
			b.Fatal(err)
		}
	})
}

// BenchmarkUnary makes one call after the other, with 128 bytes each way.
func BenchmarkUnary(b *testing.B) {
	service := &functions{unary: func(_ context.Context, r *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
		return &testgrpc.SimpleResponse{Payload: r.GetPayload()}, nil
	}}
	benchmarkSides(b, service, func(b *testing.B, c testgrpc.TestServiceClient) {
		request := &testgrpc.SimpleRequest{Payload: &testgrpc.Payload{Body: make([]byte, 128)}}
		b.ReportAllocs()
		b.ResetTimer()
		for range b.N {
			if r, err := c.UnaryCall(context.Background(), request); err != nil || len(r.GetPayload().GetBody()) != 128 {
				b.Fatal(err)
			}
		}
	})
}
