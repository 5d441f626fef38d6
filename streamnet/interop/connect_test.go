package interop

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"connectrpc.com/connect"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
)

// The procedures of a service, as generated code names them.
const (
	unary  = "/grpc.testing.TestService/UnaryCall"
	output = "/grpc.testing.TestService/StreamingOutputCall"
	input  = "/grpc.testing.TestService/StreamingInputCall"
	duplex = "/grpc.testing.TestService/FullDuplexCall"
)

// payload returns a message of n bytes.
func payload(n int) *testgrpc.Payload { return &testgrpc.Payload{Body: make([]byte, n)} }

// answers returns a service of connect. Its streams strike before each message whose size is odd.
func answers(n network) http.Handler {
	mux := http.NewServeMux()
	mux.Handle(unary, connect.NewUnaryHandler(unary, func(_ context.Context, r *connect.Request[testgrpc.SimpleRequest]) (*connect.Response[testgrpc.SimpleResponse], error) {
		if status := r.Msg.GetResponseStatus(); status != nil {
			return nil, connect.NewError(connect.Code(status.GetCode()), errors.New(status.GetMessage()))
		}
		resp := connect.NewResponse(&testgrpc.SimpleResponse{Payload: payload(int(r.Msg.GetResponseSize()))})
		resp.Header().Set("Given", r.Header().Get("Given"))
		resp.Trailer().Set("Last", "1")
		return resp, nil
	}))
	mux.Handle(output, connect.NewServerStreamHandler(output, func(_ context.Context, r *connect.Request[testgrpc.StreamingOutputCallRequest], s *connect.ServerStream[testgrpc.StreamingOutputCallResponse]) error {
		for _, p := range r.Msg.GetResponseParameters() {
			if p.GetSize()%2 == 1 {
				n.strike()
			}
			if err := s.Send(&testgrpc.StreamingOutputCallResponse{Payload: payload(int(p.GetSize()))}); err != nil {
				return err
			}
		}
		return nil
	}))
	mux.Handle(input, connect.NewClientStreamHandler(input, func(_ context.Context, s *connect.ClientStream[testgrpc.StreamingInputCallRequest]) (*connect.Response[testgrpc.StreamingInputCallResponse], error) {
		var sum int32
		for s.Receive() {
			sum += int32(len(s.Msg().GetPayload().GetBody()))
		}
		return connect.NewResponse(&testgrpc.StreamingInputCallResponse{AggregatedPayloadSize: sum}), s.Err()
	}))
	mux.Handle(duplex, connect.NewBidiStreamHandler(duplex, func(_ context.Context, s *connect.BidiStream[testgrpc.StreamingOutputCallRequest, testgrpc.StreamingOutputCallResponse]) error {
		for {
			r, err := s.Receive()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			if err := s.Send(&testgrpc.StreamingOutputCallResponse{Payload: r.GetPayload()}); err != nil {
				return err
			}
		}
	}))
	return mux
}

// All four kinds of calls of connect-go work, in each of its protocols.
func TestConnectCalls(t *testing.T) {
	onHTTP(t, answers, func(t *testing.T, _ network, web *httptest.Server, major int) {
		for name, options := range map[string][]connect.ClientOption{"Connect": nil, "gRPC": {connect.WithGRPC()}, "gRPC-Web": {connect.WithGRPCWeb()}} {
			if major == 1 && name == "gRPC" {
				continue // it needs the trailers of HTTP/2
			}
			t.Run("calls="+name, func(t *testing.T) {
				callUnary(t, web, options)
				callOutput(t, web, options)
				callInput(t, web, options)
				if major == 2 { // both directions at once
					callDuplex(t, web, options)
				}
			})
		}
	})
}

func callUnary(t *testing.T, web *httptest.Server, options []connect.ClientOption) {
	c := connect.NewClient[testgrpc.SimpleRequest, testgrpc.SimpleResponse](web.Client(), web.URL+unary, options...)
	for i := range scaled(20, 3) {
		req := connect.NewRequest(&testgrpc.SimpleRequest{ResponseSize: int32(i * 50_000), Payload: payload(100_000 - i)})
		req.Header().Set("Given", "x")
		resp, err := c.CallUnary(limited(t), req)
		if err != nil {
			t.Fatal(err)
		}
		if n := len(resp.Msg.GetPayload().GetBody()); n != i*50_000 || resp.Header().Get("Given") != "x" || resp.Trailer().Get("Last") != "1" {
			t.Errorf("%d bytes, %v, %v", n, resp.Header(), resp.Trailer())
		}
	}
	_, err := c.CallUnary(limited(t), connect.NewRequest(&testgrpc.SimpleRequest{
		ResponseStatus: &testgrpc.EchoStatus{Code: int32(connect.CodeAborted), Message: "busy"},
	}))
	if connect.CodeOf(err) != connect.CodeAborted {
		t.Errorf("%v, want the code of the service", err)
	}
}

func callOutput(t *testing.T, web *httptest.Server, options []connect.ClientOption) {
	c := connect.NewClient[testgrpc.StreamingOutputCallRequest, testgrpc.StreamingOutputCallResponse](web.Client(), web.URL+output, options...)
	req := &testgrpc.StreamingOutputCallRequest{}
	const messages = 200
	for i := range messages {
		size := int32(i * 10)
		if i == messages/2 {
			size++ // the network strikes
		}
		req.ResponseParameters = append(req.ResponseParameters, &testgrpc.ResponseParameters{Size: size})
	}
	s, err := c.CallServerStream(limited(t), connect.NewRequest(req))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	n := 0
	for ; s.Receive(); n++ {
		if got := len(s.Msg().GetPayload().GetBody()); got != int(req.ResponseParameters[n].Size) {
			t.Errorf("message %d has %d bytes", n, got)
		}
	}
	if s.Err() != nil || n != messages {
		t.Errorf("%d messages, %v", n, s.Err())
	}
}

func callInput(t *testing.T, web *httptest.Server, options []connect.ClientOption) {
	c := connect.NewClient[testgrpc.StreamingInputCallRequest, testgrpc.StreamingInputCallResponse](web.Client(), web.URL+input, options...)
	s := c.CallClientStream(limited(t))
	for i := range 100 {
		if err := s.Send(&testgrpc.StreamingInputCallRequest{Payload: payload(i * 20)}); err != nil {
			t.Fatal(err)
		}
	}
	resp, err := s.CloseAndReceive()
	if err != nil || resp.Msg.GetAggregatedPayloadSize() != 100*99/2*20 {
		t.Errorf("%v, %v", resp, err)
	}
}

func callDuplex(t *testing.T, web *httptest.Server, options []connect.ClientOption) {
	c := connect.NewClient[testgrpc.StreamingOutputCallRequest, testgrpc.StreamingOutputCallResponse](web.Client(), web.URL+duplex, options...)
	s := c.CallBidiStream(limited(t))
	for i := range scaled(100, 10) {
		if err := s.Send(&testgrpc.StreamingOutputCallRequest{Payload: payload(i)}); err != nil {
			t.Fatal(err)
		}
		resp, err := s.Receive()
		if err != nil || len(resp.GetPayload().GetBody()) != i {
			t.Fatalf("%v, %v", resp, err)
		}
	}
	if err := s.CloseRequest(); err != nil {
		t.Error(err)
	}
	if _, err := s.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("%v, want io.EOF", err)
	}
	if err := s.CloseResponse(); err != nil {
		t.Error(err)
	}
}
