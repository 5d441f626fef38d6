package streamgrpc

import (
	"context"
	"io"
	"slices"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// counted counts the messages of a stream that an interceptor has put its own in place of.
type counted struct {
	grpc.ClientStream
	sent, received *int
}

func (s counted) SendMsg(m any) error { *s.sent++; return s.ClientStream.SendMsg(m) }

func (s counted) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err == nil {
		*s.received++
	}
	return err
}

// withContext is the stream of a service with another context.
type withContext struct {
	grpc.ServerStream
	ctx context.Context
}

func (s withContext) Context() context.Context { return s.ctx }

type userKey struct{}

// authenticate is what services do in interceptors.
func authenticate(ctx context.Context) (context.Context, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	if !slices.Equal(md.Get("user"), []string{"smith"}) {
		return nil, status.Error(codes.Unauthenticated, "no user")
	}
	return context.WithValue(ctx, userKey{}, "smith"), nil
}

// Interceptors change the context, the metadata and the stream of a call, end it without the service, and repeat it.
func TestInterceptorsChangeCalls(t *testing.T) {
	var sent, received, attempts int
	_, c := serveFunctions(t, &functions{
		unary: func(ctx context.Context, r *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
			if attempts++; attempts%2 == 1 {
				return nil, status.Error(codes.Aborted, "again")
			}
			return &testgrpc.SimpleResponse{Username: ctx.Value(userKey{}).(string)}, nil
		},
		duplex: func(s testgrpc.TestService_FullDuplexCallServer) error {
			for {
				if _, err := s.Recv(); err != nil {
					return nil
				}
				if err := s.Send(&testgrpc.StreamingOutputCallResponse{Payload: &testgrpc.Payload{Body: []byte(s.Context().Value(userKey{}).(string))}}); err != nil {
					return err
				}
			}
		},
	}, WithUnaryInterceptors(
		func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if _, ok := metadata.FromOutgoingContext(ctx); !ok {
				return status.Error(codes.PermissionDenied, "ended by the interceptor")
			}
			err := next(ctx, method, req, reply, cc, opts...)
			if status.Code(err) == codes.Aborted {
				err = next(ctx, method, req, reply, cc, opts...)
			}
			return err
		},
	), WithStreamInterceptors(
		func(ctx context.Context, d *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			s, err := next(metadata.AppendToOutgoingContext(ctx, "user", "smith"), d, cc, method, opts...)
			return counted{s, &sent, &received}, err
		},
	), UnaryInterceptors(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		ctx, err := authenticate(ctx)
		if err != nil {
			return nil, err
		}
		return next(ctx, req)
	}), StreamInterceptors(func(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
		ctx, err := authenticate(s.Context())
		if err != nil {
			return err
		}
		if !info.IsClientStream || !info.IsServerStream {
			t.Errorf("%+v", info)
		}
		return next(srv, withContext{s, ctx})
	}))

	ctx := metadata.AppendToOutgoingContext(limited(t), "user", "smith")
	if r, err := c.UnaryCall(ctx, &testgrpc.SimpleRequest{}); err != nil || r.GetUsername() != "smith" || attempts != 2 {
		t.Errorf("%v, %v, %d attempts", r, err, attempts)
	}
	if _, err := c.UnaryCall(metadata.AppendToOutgoingContext(limited(t), "user", "other"), &testgrpc.SimpleRequest{}); status.Code(err) != codes.Unauthenticated {
		t.Error(err)
	}
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}); status.Code(err) != codes.PermissionDenied {
		t.Error(err)
	}
	s, err := c.FullDuplexCall(limited(t))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := s.Send(&testgrpc.StreamingOutputCallRequest{}); err != nil {
			t.Fatal(err)
		}
		if m, err := s.Recv(); err != nil || string(m.GetPayload().GetBody()) != "smith" {
			t.Fatal(m, err)
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != io.EOF || sent != 3 || received != 3 {
		t.Errorf("%v, %d sent, %d received", err, sent, received)
	}
}
