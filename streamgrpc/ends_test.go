package streamgrpc

import (
	"context"
	"errors"
	"io"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/natsstream/stream"
)

// A deadline and a cancellation end both ends of each kind of call, though neither end sends or receives at that time,
// or both do.
func TestContextsEndEachKindOfCall(t *testing.T) {
	ended := make(chan error, 1)
	wait := func(ctx context.Context) error {
		<-ctx.Done()
		ended <- ctx.Err()
		return ctx.Err()
	}
	_, c := serveFunctions(t, &functions{
		unary: func(ctx context.Context, _ *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
			return nil, wait(ctx)
		},
		output: func(_ *testgrpc.StreamingOutputCallRequest, s testgrpc.TestService_StreamingOutputCallServer) error {
			for {
				if err := s.Send(&testgrpc.StreamingOutputCallResponse{}); err != nil {
					return wait(s.Context())
				}
			}
		},
		input: func(s testgrpc.TestService_StreamingInputCallServer) error {
			for {
				if _, err := s.Recv(); err != nil {
					return wait(s.Context())
				}
			}
		},
		duplex: func(s testgrpc.TestService_FullDuplexCallServer) error { return wait(s.Context()) },
	})
	calls := map[string]func(ctx context.Context, begun func()) error{
		"unary": func(ctx context.Context, begun func()) error {
			begun()
			_, err := c.UnaryCall(ctx, &testgrpc.SimpleRequest{})
			return err
		},
		"output": func(ctx context.Context, begun func()) error {
			s, err := c.StreamingOutputCall(ctx, &testgrpc.StreamingOutputCallRequest{})
			for err == nil {
				begun()
				_, err = s.Recv()
			}
			return err
		},
		"input": func(ctx context.Context, begun func()) error {
			s, err := c.StreamingInputCall(ctx)
			for err == nil {
				begun()
				err = s.Send(&testgrpc.StreamingInputCallRequest{})
			}
			if err == io.EOF {
				_, err = s.CloseAndRecv()
			}
			return err
		},
		"duplex": func(ctx context.Context, begun func()) error {
			s, err := c.FullDuplexCall(ctx)
			if err == nil {
				begun()
				_, err = s.Recv()
			}
			return err
		},
	}
	for name, call := range calls {
		t.Run(name+"/deadline", func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
			defer cancel()
			if err := call(ctx, func() {}); status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("the client got %v", err)
			}
			if err := <-ended; !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled) { // the reset may come first
				t.Errorf("the server got %v", err)
			}
		})
		t.Run(name+"/cancellation", func(t *testing.T) {
			ctx, cancel := context.WithCancel(limited(t))
			defer cancel()
			var once sync.Once
			later := func() { once.Do(func() { time.AfterFunc(100*time.Millisecond, cancel) }) }
			if err := call(ctx, later); status.Code(err) != codes.Canceled {
				t.Errorf("the client got %v", err)
			}
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("the server got %v", err)
			}
		})
	}
}

// Stop, and Drain of the stream.Server, are the GracefulStop of a grpc.Server: running calls end with their results,
// and new ones go to another member or fail with codes.Unavailable.
func TestStopAndDrainAreGraceful(t *testing.T) {
	running, release := make(chan struct{}, 2), make(chan struct{})
	p, c := serveFunctions(t, &functions{
		unary: func(context.Context, *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
			running <- struct{}{}
			<-release
			return &testgrpc.SimpleResponse{Username: "first"}, nil
		},
		duplex: func(s testgrpc.TestService_FullDuplexCallServer) error {
			running <- struct{}{}
			for {
				if _, err := s.Recv(); err == io.EOF {
					return nil
				} else if err != nil {
					return err
				}
				if err := s.Send(&testgrpc.StreamingOutputCallResponse{}); err != nil {
					return err
				}
			}
		},
	})
	answered := make(chan error, 1)
	go func() {
		r, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{})
		if err == nil && r.GetUsername() != "first" {
			err = errors.New("not the answer")
		}
		answered <- err
	}()
	calls, err := c.FullDuplexCall(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	<-running
	<-running
	p.srv.Stop() // Drain alone also serves calls that come a moment later
	drained := make(chan error, 1)
	go func() { drained <- p.server.Drain(limited(t)) }()
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}); status.Code(err) != codes.Unavailable || !stream.Retryable(err) {
		t.Errorf("a new call: %v, retryable %v", err, stream.Retryable(err))
	}
	later := make(chan error, 1)
	go func() {
		r, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}, grpc.WaitForReady(true))
		if err == nil && r.GetUsername() != "second" {
			err = errors.New("not the answer of the second server")
		}
		later <- err
	}()
	second, err := stream.NewServer(stream.ServerParams{Conn: p.nc})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = second.Close() })
	testgrpc.RegisterTestServiceServer(NewServer(second), &functions{
		unary: func(context.Context, *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
			return &testgrpc.SimpleResponse{Username: "second"}, nil
		},
	})
	if err := <-later; err != nil {
		t.Errorf("a call that waits for a server: %v", err)
	}
	if err := calls.Send(&testgrpc.StreamingOutputCallRequest{}); err != nil {
		t.Error(err)
	}
	if _, err := calls.Recv(); err != nil {
		t.Error(err)
	}
	select {
	case err := <-drained:
		t.Errorf("Drain has returned before the calls have ended: %v", err)
	default:
	}
	close(release)
	if err := <-answered; err != nil {
		t.Error(err)
	}
	if err := calls.CloseSend(); err != nil {
		t.Error(err)
	}
	if _, err := calls.Recv(); err != io.EOF {
		t.Error(err)
	}
	if err := <-drained; err != nil {
		t.Error(err)
	}
}
