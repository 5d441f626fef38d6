package interop

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
)

// cases are gRPC's interoperability cases that need neither TLS nor credentials of a cloud. Each ends the program if it
// fails.
var cases = []struct {
	name string
	run  func(context.Context, testgrpc.TestServiceClient)
}{
	{"empty_unary", func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoEmptyUnaryCall(ctx, c) }},
	{"large_unary", func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoLargeUnaryCall(ctx, c) }},
	{"client_streaming", func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoClientStreaming(ctx, c) }},
	{"server_streaming", func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoServerStreaming(ctx, c) }},
	{"ping_pong", func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoPingPong(ctx, c) }},
	{"empty_stream", func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoEmptyStream(ctx, c) }},
	{"timeout_on_sleeping_server", func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoTimeoutOnSleepingServer(ctx, c) }},
	{"cancel_after_begin", func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoCancelAfterBegin(ctx, c) }},
	{"cancel_after_first_response", func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoCancelAfterFirstResponse(ctx, c) }},
	{"custom_metadata", func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoCustomMetadata(ctx, c) }},
	{"status_code_and_message", func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoStatusCodeAndMessage(ctx, c) }},
	{"special_status_message", func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoSpecialStatusMessage(ctx, c) }},
}

// onGRPC runs f with a connection of grpc-go to its interoperability service, on each network.
func onGRPC(t *testing.T, f func(t *testing.T, n network, cc *grpc.ClientConn)) {
	onNetworks(t, func(t *testing.T, n network) {
		s := grpc.NewServer()
		testgrpc.RegisterTestServiceServer(s, interop.NewTestServer())
		served := make(chan error, 1)
		go func() { served <- s.Serve(n.listener) }()
		cc, err := grpc.NewClient("passthrough:///service", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return n.dial(ctx, "", "") }))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cc.Close()
			s.GracefulStop()
			if err := <-served; err != nil {
				t.Error(err)
			}
		})
		f(t, n, cc)
	})
}

// The interoperability cases pass, several at once on one connection.
func TestGRPCInteroperability(t *testing.T) {
	onGRPC(t, func(t *testing.T, _ network, cc *grpc.ClientConn) {
		c := testgrpc.NewTestServiceClient(cc)
		for _, k := range cases {
			t.Run("case="+k.name, func(t *testing.T) {
				var all sync.WaitGroup
				for range 2 {
					all.Go(func() {
						for range scaled(5, 1) {
							k.run(limited(t), c)
						}
					})
				}
				all.Wait()
			})
		}
		t.Run("case=unimplemented_method", func(t *testing.T) { interop.DoUnimplementedMethod(limited(t), cc) })
		t.Run("case=unimplemented_service", func(t *testing.T) {
			interop.DoUnimplementedService(limited(t), testgrpc.NewUnimplementedServiceClient(cc))
		})
	})
}

// A call goes on when the network strikes in the middle of it, and so does its connection.
func TestGRPCCallOutlivesTrouble(t *testing.T) {
	const messages = 6000
	req := &testgrpc.StreamingOutputCallRequest{}
	for range messages {
		req.ResponseParameters = append(req.ResponseParameters, &testgrpc.ResponseParameters{Size: 100})
	}
	onGRPC(t, func(t *testing.T, n network, cc *grpc.ClientConn) {
		calls, err := testgrpc.NewTestServiceClient(cc).StreamingOutputCall(limited(t), req)
		if err != nil {
			t.Fatal(err)
		}
		for i := range messages {
			if i == messages/3 || i == messages*2/3 {
				n.strike()
			}
			m, err := calls.Recv()
			if err != nil || len(m.GetPayload().GetBody()) != 100 {
				t.Fatalf("message %d: %v", i, err)
			}
		}
		if _, err := calls.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("%v, want io.EOF", err)
		}
		interop.DoEmptyUnaryCall(limited(t), testgrpc.NewTestServiceClient(cc))
	})
}
