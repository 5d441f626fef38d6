package streamgrpc

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/interop"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// cases are gRPC's interoperability cases that need neither TLS nor credentials of a cloud. Each ends the program if it
// fails.
var cases = []struct {
	name string
	run  func(ctx context.Context, c *ClientConn) error
}{
	{"empty_unary", stub(func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoEmptyUnaryCall(ctx, c) })},
	{"large_unary", stub(func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoLargeUnaryCall(ctx, c) })},
	{"client_streaming", stub(func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoClientStreaming(ctx, c) })},
	{"server_streaming", stub(func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoServerStreaming(ctx, c) })},
	{"ping_pong", stub(func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoPingPong(ctx, c) })},
	{"empty_stream", stub(func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoEmptyStream(ctx, c) })},
	{"timeout_on_sleeping_server", stub(func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoTimeoutOnSleepingServer(ctx, c) })},
	{"cancel_after_begin", stub(func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoCancelAfterBegin(ctx, c) })},
	{"cancel_after_first_response", stub(func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoCancelAfterFirstResponse(ctx, c) })},
	{"custom_metadata", stub(func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoCustomMetadata(ctx, c) })},
	{"status_code_and_message", stub(func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoStatusCodeAndMessage(ctx, c) })},
	{"special_status_message", stub(func(ctx context.Context, c testgrpc.TestServiceClient) { interop.DoSpecialStatusMessage(ctx, c) })},
	{"unimplemented_service", func(ctx context.Context, c *ClientConn) error {
		interop.DoUnimplementedService(ctx, testgrpc.NewUnimplementedServiceClient(c))
		return nil
	}},
	{"unimplemented_method", func(ctx context.Context, c *ClientConn) error {
		var in, out testgrpc.Empty
		if err := c.Invoke(ctx, "/grpc.testing.TestService/UnimplementedCall", &in, &out); status.Code(err) != codes.Unimplemented {
			return fmt.Errorf("%v, want codes.Unimplemented", err)
		}
		return nil
	}},
}

func stub(f func(context.Context, testgrpc.TestServiceClient)) func(context.Context, *ClientConn) error {
	return func(ctx context.Context, c *ClientConn) error {
		f(ctx, testgrpc.NewTestServiceClient(c))
		return nil
	}
}

// interoperate runs all cases, each many times, some of them at the same time.
func interoperate(t *testing.T, p *pair, rounds int) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			var all sync.WaitGroup
			for range 4 {
				all.Go(func() {
					for range rounds {
						if err := c.run(limited(t), p.conn); err != nil {
							t.Error(err)
						}
					}
				})
			}
			all.Wait()
		})
	}
}

func rounds() int {
	if testing.Short() {
		return 2
	}
	return 10
}

func TestInteroperability(t *testing.T) {
	p := run(t)
	testgrpc.RegisterTestServiceServer(p.srv, interop.NewTestServer())
	p.reachable(t)
	interoperate(t, p, rounds())
}

// Packets of streams are lost, repeated and reordered at both ends.
func TestInteroperabilityUnderLoss(t *testing.T) {
	s := streamtest.Run(t)
	faults := func(seed uint64) *nats.Conn {
		rng := rand.New(rand.NewPCG(seed, 1))
		i := streamtest.RunInterceptor(t, s.URL(), streamtest.Only(streamtest.HasPrefix(0xF5),
			streamtest.Drop(0.01, rng), streamtest.Duplicate(0.02, rng), streamtest.Reorder(0.05, 3, rng)))
		nc, err := nats.Connect(i.URL(), nats.IgnoreDiscoveredServers())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	p := newPair(t, faults(1), faults(2), stream.ServerParams{})
	testgrpc.RegisterTestServiceServer(p.srv, interop.NewTestServer())
	p.reachable(t)
	interoperate(t, p, rounds())
}

// A call of 20,000 messages outlives two deaths of the NATS server.
func TestCallOutlivesKilledServer(t *testing.T) {
	s := streamtest.RunProcess(t)
	dial := func() *nats.Conn {
		return s.Connect(t, nats.ReconnectWait(20*time.Millisecond), nats.MaxReconnects(-1))
	}
	p := newPair(t, dial(), dial(), stream.ServerParams{})
	testgrpc.RegisterTestServiceServer(p.srv, interop.NewTestServer())
	p.reachable(t)
	const messages = 20_000
	req := &testgrpc.StreamingOutputCallRequest{}
	for range messages {
		req.ResponseParameters = append(req.ResponseParameters, &testgrpc.ResponseParameters{Size: 100})
	}
	calls, err := testgrpc.NewTestServiceClient(p.conn).StreamingOutputCall(limited(t), req)
	if err != nil {
		t.Fatal(err)
	}
	for i := range messages {
		if i == messages/3 || i == messages*2/3 {
			s.Kill()
			if err := s.Restart(); err != nil {
				t.Fatal(err)
			}
		}
		m, err := calls.Recv()
		if err != nil || len(m.GetPayload().GetBody()) != 100 {
			t.Fatalf("message %d: %v", i, err)
		}
	}
	if _, err := calls.Recv(); err == nil || err.Error() != "EOF" {
		t.Errorf("%v, want io.EOF", err)
	}
}
