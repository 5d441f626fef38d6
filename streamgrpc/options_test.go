package streamgrpc

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// jsonCodec is a codec of the second version, under a name of its own.
type jsonCodec struct{ name string }

func (c jsonCodec) Name() string { return c.name }

func (jsonCodec) Marshal(v any) (mem.BufferSlice, error) {
	b, err := protojson.Marshal(v.(proto.Message))
	return mem.BufferSlice{mem.SliceBuffer(b)}, err
}

func (jsonCodec) Unmarshal(data mem.BufferSlice, v any) error {
	b := data.Materialize()
	if !json.Valid(b) {
		return fmt.Errorf("%q is no JSON", b)
	}
	return protojson.Unmarshal(b, v.(proto.Message))
}

// oldJSON is the same as a codec of the first version.
type oldJSON struct{ name string }

func (c oldJSON) Name() string                { return c.name }
func (oldJSON) Marshal(v any) ([]byte, error) { return protojson.Marshal(v.(proto.Message)) }
func (oldJSON) Unmarshal(data []byte, v any) error {
	return protojson.Unmarshal(data, v.(proto.Message))
}
func (c oldJSON) String() string { return c.name }

func init() {
	encoding.RegisterCodecV2(jsonCodec{"test-json"})
	encoding.RegisterCodec(oldJSON{"test-old"})
}

func echoBody(_ context.Context, r *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
	return &testgrpc.SimpleResponse{Payload: r.GetPayload()}, nil
}

// A codec is chosen by its name, or given to the call. The server takes the registered codec of that name.
func TestCodecsOfCalls(t *testing.T) {
	_, c := serveFunctions(t, &functions{unary: echoBody})
	for name, option := range map[string]grpc.CallOption{
		"subtype":         grpc.CallContentSubtype("test-json"),
		"old subtype":     grpc.CallContentSubtype("test-old"),
		"mixed case":      grpc.CallContentSubtype("Test-JSON"),
		"forced":          grpc.ForceCodecV2(jsonCodec{"test-json"}),
		"forced old":      grpc.ForceCodec(oldJSON{"test-json"}),
		"subtype of gRPC": grpc.CallContentSubtype("proto"),
	} {
		r, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{Payload: &testgrpc.Payload{Body: []byte(name)}}, option)
		if err != nil || string(r.GetPayload().GetBody()) != name {
			t.Errorf("%s: %v, %v", name, r, err)
		}
	}
	for name, option := range map[string]grpc.CallOption{
		"not registered at the client": grpc.CallContentSubtype("nonsense"),
		"not registered at the server": grpc.ForceCodecV2(jsonCodec{"nonsense"}),
	} {
		if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}, option); status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "nonsense") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Options that mean nothing here do no harm, and those that would change a message are refused.
func TestOptionsWithoutMeaning(t *testing.T) {
	_, c := serveFunctions(t, &functions{unary: func(ctx context.Context, r *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
		if err := grpc.SetSendCompressor(ctx, "gzip"); err == nil {
			t.Error("SetSendCompressor has no effect and does not fail")
		}
		return echoBody(ctx, r)
	}})
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}, grpc.StaticMethod(), grpc.CallAuthority("greeter"), grpc.MaxRetryRPCBufferSize(1), grpc.EmptyCallOption{}); err != nil {
		t.Error(err)
	}
	for name, option := range map[string]grpc.CallOption{
		"compressor": grpc.UseCompressor("gzip"),
		"codec":      grpc.CustomCodecCallOption{Codec: oldJSON{"test-old"}},
	} {
		if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}, option); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := c.FullDuplexCall(limited(t), option); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Header and trailer reach the options and methods of each kind of call, also of one that fails, with any bytes in keys
// that end in -bin.
func TestHeadersAndTrailersOfEachKind(t *testing.T) {
	sent := func(where string) metadata.MD {
		return metadata.MD{"where": {where}, "some-bin": {"", "\x00\x01\xfe\xff", strings.Repeat("\n", 1000)}, "empty": {""}}
	}
	failure := status.Error(codes.DataLoss, "as asked")
	stream := func(s grpc.ServerStream) error {
		s.SetTrailer(sent("trailer"))
		return s.SetHeader(sent("header"))
	}
	_, c := serveFunctions(t, &functions{
		unary: func(ctx context.Context, r *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
			if err := grpc.SetHeader(ctx, sent("header")); err != nil {
				return nil, err
			}
			if err := grpc.SetTrailer(ctx, sent("trailer")); err != nil {
				return nil, err
			}
			if r.GetResponseSize() < 0 {
				return nil, failure
			}
			return &testgrpc.SimpleResponse{}, nil
		},
		output: func(r *testgrpc.StreamingOutputCallRequest, s testgrpc.TestService_StreamingOutputCallServer) error {
			if err := stream(s); err != nil {
				return err
			}
			return failure
		},
		input: func(s testgrpc.TestService_StreamingInputCallServer) error {
			if err := stream(s); err != nil {
				return err
			}
			return s.SendAndClose(&testgrpc.StreamingInputCallResponse{})
		},
		duplex: func(s testgrpc.TestService_FullDuplexCallServer) error { return stream(s) },
	})
	check := func(name string, got metadata.MD, where string) {
		t.Helper()
		for k, want := range sent(where) {
			if !slices.Equal(got[k], want) {
				t.Errorf("%s: %s %s is %q, want %q", name, where, k, got[k], want)
			}
		}
	}
	var header, trailer metadata.MD
	to := []grpc.CallOption{grpc.Header(&header), grpc.Trailer(&trailer)}
	verify := func(name string, err error, code codes.Code) {
		t.Helper()
		if status.Code(err) != code {
			t.Errorf("%s: %v", name, err)
		}
		check(name, header, "header")
		check(name, trailer, "trailer")
		header, trailer = nil, nil
	}
	_, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}, to...)
	verify("unary", err, codes.OK)
	_, err = c.UnaryCall(limited(t), &testgrpc.SimpleRequest{ResponseSize: -1}, to...)
	verify("failed unary", err, codes.DataLoss)
	out, err := c.StreamingOutputCall(limited(t), &testgrpc.StreamingOutputCallRequest{}, to...)
	if err != nil {
		t.Fatal(err)
	}
	_, err = out.Recv()
	check("server stream, method", out.Trailer(), "trailer")
	verify("failed server stream", err, codes.DataLoss)
	in, err := c.StreamingInputCall(limited(t), to...)
	if err != nil {
		t.Fatal(err)
	}
	_, err = in.CloseAndRecv()
	verify("client stream", err, codes.OK)
	both, err := c.FullDuplexCall(limited(t), to...)
	if err != nil {
		t.Fatal(err)
	}
	got, err := both.Header()
	if err != nil {
		t.Error(err)
	}
	check("both, method", got, "header")
	if _, err := both.Recv(); err != io.EOF {
		t.Error(err)
	}
	verify("both", nil, codes.OK)
}

// A limit on received messages ends a streaming call at both ends.
func TestLimitOfReceivedMessagesEndsTheCall(t *testing.T) {
	ended := make(chan error, 1)
	_, c := serveFunctions(t, &functions{output: func(_ *testgrpc.StreamingOutputCallRequest, s testgrpc.TestService_StreamingOutputCallServer) error {
		for _, n := range []int{10, 1000} {
			if err := s.Send(&testgrpc.StreamingOutputCallResponse{Payload: &testgrpc.Payload{Body: make([]byte, n)}}); err != nil {
				return err
			}
		}
		<-s.Context().Done()
		ended <- s.Context().Err()
		return s.Context().Err()
	}})
	s, err := c.StreamingOutputCall(limited(t), &testgrpc.StreamingOutputCallRequest{}, grpc.MaxCallRecvMsgSize(500))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := s.Recv(); status.Code(err) != codes.ResourceExhausted {
			t.Error(err)
		}
	}
	if err := <-ended; err != context.Canceled {
		t.Errorf("the server's context: %v", err)
	}
}
