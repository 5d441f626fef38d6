package streamgrpc

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	testgrpc "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"github.com/natsstream/stream"
)

type tagKey struct{}

// recorder is a stats.Handler that notes the events of calls. It passes a header, as tracing does.
type recorder struct {
	mu     sync.Mutex
	events []string
	ended  chan struct{} // gets a value for each End
}

func newRecorder() *recorder { return &recorder{ended: make(chan struct{}, 100)} }

func (r *recorder) TagRPC(ctx context.Context, i *stats.RPCTagInfo) context.Context {
	ctx = metadata.AppendToOutgoingContext(ctx, "trace", "of "+i.FullMethodName)
	return context.WithValue(ctx, tagKey{}, i.FullMethodName)
}

func (r *recorder) HandleRPC(ctx context.Context, s stats.RPCStats) {
	method, _ := ctx.Value(tagKey{}).(string)
	var event string
	switch s := s.(type) {
	case *stats.Begin:
		event = fmt.Sprintf("Begin client %v, streams %v %v, fail fast %v", s.Client, s.IsClientStream, s.IsServerStream, s.FailFast)
	case *stats.OutHeader:
		event = fmt.Sprintf("OutHeader client %v, own %q, trace %q", s.Client, s.Header.Get("own"), s.Header.Get("trace"))
	case *stats.InHeader:
		event = fmt.Sprintf("InHeader client %v, own %q, trace %q", s.Client, s.Header.Get("own"), s.Header.Get("trace"))
	case *stats.OutPayload:
		event = fmt.Sprintf("OutPayload client %v, %d bytes of %T", s.Client, s.Length, s.Payload)
	case *stats.InPayload:
		event = fmt.Sprintf("InPayload client %v, %d bytes of %T", s.Client, s.Length, s.Payload)
	case *stats.InTrailer:
		event = fmt.Sprintf("InTrailer client %v, last %q", s.Client, s.Trailer.Get("last"))
	case *stats.OutTrailer:
		event = fmt.Sprintf("OutTrailer client %v, last %q", s.Client, s.Trailer.Get("last"))
	case *stats.End:
		event = fmt.Sprintf("End client %v, %v, ordered %v", s.Client, s.Error, !s.EndTime.Before(s.BeginTime))
	default:
		return // of name resolution and connections
	}
	r.mu.Lock()
	r.events = append(r.events, method+": "+event)
	r.mu.Unlock()
	if _, ok := s.(*stats.End); ok {
		r.ended <- struct{}{}
	}
}

func (*recorder) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (*recorder) HandleConn(context.Context, stats.ConnStats)                       {}

// take returns the events of a call that has ended, and forgets them.
func (r *recorder) take() (events []string) {
	<-r.ended
	r.mu.Lock()
	defer r.mu.Unlock()
	events, r.events = r.events, nil
	return events
}

// statsService sets headers and trailers, and fails if a request says so.
var statsService = &functions{
	unary: func(ctx context.Context, r *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
		if ctx.Value(tagKey{}) == nil {
			return nil, status.Error(codes.Internal, "the context is not that of the handler")
		}
		if r.GetResponseStatus() != nil {
			return nil, status.Error(codes.Code(r.GetResponseStatus().GetCode()), "as asked")
		}
		if err := grpc.SetHeader(ctx, metadata.Pairs("own", "1")); err != nil {
			return nil, err
		}
		return &testgrpc.SimpleResponse{Payload: &testgrpc.Payload{Body: make([]byte, 100)}}, grpc.SetTrailer(ctx, metadata.Pairs("last", "2"))
	},
	duplex: func(s testgrpc.TestService_FullDuplexCallServer) error {
		for {
			r, err := s.Recv()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			if err := s.Send(&testgrpc.StreamingOutputCallResponse{Payload: r.GetPayload()}); err != nil {
				return err
			}
		}
	},
}

// exercise makes the calls of which the events are compared.
var exercise = map[string]func(t *testing.T, c testgrpc.TestServiceClient){
	"unary": func(t *testing.T, c testgrpc.TestServiceClient) {
		if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{Payload: &testgrpc.Payload{Body: make([]byte, 10)}}); err != nil {
			t.Error(err)
		}
	},
	"failure": func(t *testing.T, c testgrpc.TestServiceClient) {
		_, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{ResponseStatus: &testgrpc.EchoStatus{Code: int32(codes.Aborted)}}, grpc.WaitForReady(true))
		if status.Code(err) != codes.Aborted {
			t.Error(err)
		}
	},
	"duplex": func(t *testing.T, c testgrpc.TestServiceClient) {
		s, err := c.FullDuplexCall(limited(t))
		if err != nil {
			t.Fatal(err)
		}
		for i := range 3 {
			if err := s.Send(&testgrpc.StreamingOutputCallRequest{Payload: &testgrpc.Payload{Body: make([]byte, i)}}); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.CloseSend(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != io.EOF {
			t.Error(err)
		}
	},
}

// The handlers get the events that they get of grpc over TCP, at both ends.
func TestStatsHandlersGetTheEventsOfGRPC(t *testing.T) {
	client, server := newRecorder(), newRecorder()
	_, ours := serveFunctions(t, statsService, WithStatsHandlers(client), StatsHandlers(server))

	tcpClient, tcpServer := newRecorder(), newRecorder()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpc.StatsHandler(tcpServer))
	testgrpc.RegisterTestServiceServer(srv, statsService)
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(srv.Stop)
	cc, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithStatsHandler(tcpClient))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	theirs := testgrpc.NewTestServiceClient(cc)

	for name, call := range exercise {
		t.Run(name, func(t *testing.T) {
			call(t, ours)
			call(t, theirs)
			for _, end := range []struct{ ours, theirs *recorder }{{client, tcpClient}, {server, tcpServer}} {
				got, want := end.ours.take(), end.theirs.take()
				for _, events := range [][]string{got, want} {
					slices.Sort(events[1 : len(events)-1]) // grpc reports a trailer as it arrives, also before a message that was not read yet
				}
				if !slices.Equal(got, want) {
					t.Errorf("\n got %q\nwant %q", got, want)
				}
			}
		})
	}
}

// Each call that began has an end: one that reached no server, one that nobody reads any longer, and one whose service
// panicked.
func TestStatsHandlersGetTheEndOfEachCall(t *testing.T) {
	client, server := newRecorder(), newRecorder()
	p := run(t, WithStatsHandlers(client), WithPrefix("end"))
	quiet := p.with(t, stream.ServerParams{Logger: slog.New(slog.DiscardHandler)}, "end")
	quiet.srv = NewServer(quiet.server, WithPrefix("end"), StatsHandlers(server))
	c := testgrpc.NewTestServiceClient(p.conn)
	last := func(r *recorder) string {
		events := r.take()
		return events[len(events)-1]
	}
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}); status.Code(err) != codes.Unavailable {
		t.Error(err)
	}
	if got := last(client); !strings.Contains(got, "code = Unavailable") {
		t.Errorf("%q", got)
	}
	testgrpc.RegisterTestServiceServer(quiet.srv, &functions{
		unary: func(context.Context, *testgrpc.SimpleRequest) (*testgrpc.SimpleResponse, error) {
			panic("broken service")
		},
		duplex: func(s testgrpc.TestService_FullDuplexCallServer) error {
			<-s.Context().Done()
			return s.Context().Err()
		},
	})
	quiet.reachable(t)
	const method = "/grpc.testing.TestService/"
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}); status.Code(err) != codes.Internal {
		t.Error(err)
	}
	_ = client.take()
	if got, want := last(server), method+"UnaryCall: End client false, rpc error: code = Internal desc = the service panicked, ordered true"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	ctx, cancel := context.WithCancel(limited(t))
	finished := make(chan error, 1)
	if _, err := c.FullDuplexCall(ctx, grpc.OnFinish(func(err error) { finished <- err })); err != nil {
		t.Fatal(err)
	}
	cancel() // and no read
	if err := <-finished; status.Code(err) != codes.Canceled {
		t.Errorf("OnFinish got %v", err)
	}
	if got, want := last(client), method+"FullDuplexCall: End client true, rpc error: code = Canceled desc = the call was canceled: context canceled, ordered true"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if _, err := c.UnaryCall(limited(t), &testgrpc.SimpleRequest{}, grpc.PerRPCCredentials(token{secure: true})); status.Code(err) != codes.Unauthenticated {
		t.Error(err)
	}
	_ = client.take()
}
