package streamgrpc

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // the default codec
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"

	"github.com/natsstream/stream"
)

// defaultMaxRecv is the largest message that is received, if no option says otherwise. It is that of gRPC.
const defaultMaxRecv = 4 << 20

// ClientConn makes calls over the streams of a client. It takes the place of a *grpc.ClientConn in the constructors of
// generated stubs. It is safe for use by many goroutines at once, because its fields are set once.
type ClientConn struct {
	streams  *stream.Client
	prefix   string
	unary    []grpc.UnaryClientInterceptor
	stream   []grpc.StreamClientInterceptor
	defaults []grpc.CallOption
	stats    []stats.Handler
	secure   bool

	invoke grpc.UnaryInvoker // through the interceptors
	open   grpc.Streamer     // through the interceptors
	dummy  *grpc.ClientConn  // for interceptors; nil without them
}

var _ grpc.ClientConnInterface = (*ClientConn)(nil)

// NewClientConn returns a ClientConn that opens streams of c. The caller keeps c, and closes it.
func NewClientConn(c *stream.Client, options ...ClientOption) *ClientConn {
	cc := &ClientConn{streams: c, prefix: DefaultPrefix}
	for _, o := range options {
		o.client(cc)
	}
	if len(cc.unary)+len(cc.stream) > 0 {
		// NewClient fails for invalid options and targets only. It does not connect.
		dummy, err := grpc.NewClient("passthrough:///"+cc.prefix, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			panic("streamgrpc: the prefix " + cc.prefix + " is no target: " + err.Error())
		}
		cc.dummy = dummy
	}
	cc.invoke, cc.open = cc.directInvoke, cc.directOpen
	for i := len(cc.unary) - 1; i >= 0; i-- {
		next, around := cc.invoke, cc.unary[i]
		cc.invoke = func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, opts ...grpc.CallOption) error {
			return around(ctx, method, req, reply, conn, next, opts...)
		}
	}
	for i := len(cc.stream) - 1; i >= 0; i-- {
		next, around := cc.open, cc.stream[i]
		cc.open = func(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return around(ctx, desc, conn, method, next, opts...)
		}
	}
	return cc
}

// Close releases what interceptors needed. It does not close the client, and running calls go on.
func (c *ClientConn) Close() error {
	if c.dummy == nil {
		return nil
	}
	return c.dummy.Close()
}

// Invoke makes a unary call. Generated stubs call it.
func (c *ClientConn) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	return c.invoke(ctx, method, args, reply, c.dummy, c.options(opts)...)
}

// NewStream begins a streaming call. Generated stubs call it. The call ends as one of gRPC does: if ctx ends, or if
// RecvMsg returned an error.
func (c *ClientConn) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	return c.open(ctx, desc, c.dummy, method, c.options(opts)...)
}

func (c *ClientConn) options(opts []grpc.CallOption) []grpc.CallOption {
	if len(c.defaults) == 0 {
		return opts
	}
	return append(c.defaults[:len(c.defaults):len(c.defaults)], opts...)
}

// directInvoke makes a unary call as a stream of one message each way.
func (c *ClientConn) directInvoke(ctx context.Context, method string, args, reply any, _ *grpc.ClientConn, opts ...grpc.CallOption) error {
	s, err := c.newStream(ctx, &unaryDesc, method, opts)
	if err != nil {
		return err
	}
	if err := s.SendMsg(args); err != nil && s.sendErr != nil {
		return s.sendErr
	}
	return s.RecvMsg(reply)
}

var unaryDesc grpc.StreamDesc

func (c *ClientConn) directOpen(ctx context.Context, desc *grpc.StreamDesc, _ *grpc.ClientConn, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := c.newStream(ctx, desc, method, opts)
	if err != nil {
		return nil, err // not a nil *clientStream in an interface
	}
	return s, nil
}

// newStream prepares a call. A call whose client sends one message is opened with it, the others at once.
func (c *ClientConn) newStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts []grpc.CallOption) (*clientStream, error) {
	at, err := subject(c.prefix, method)
	if err != nil {
		return nil, status.Error(codes.Unimplemented, err.Error())
	}
	s := &clientStream{conn: c, subject: at, desc: desc, maxRecv: defaultMaxRecv, reading: make(chan struct{}, 1), headerRead: make(chan struct{})}
	if err := s.apply(opts); err != nil {
		return nil, err
	}
	if s.codec == nil {
		name := s.header.codec
		if name == "" {
			name = "proto"
		}
		if s.codec = codecOf(name); s.codec == nil {
			return nil, status.Errorf(codes.Internal, "no codec is registered for content subtype %q: import its package", name)
		}
	}
	s.watched = watch(ctx, c.stats, true, method, address(at), !s.waitForReady)
	s.ctx, s.cancel = context.WithCancel(s.watched.ctx)
	s.watched.begin(desc, !s.waitForReady)
	md, _ := metadata.FromOutgoingContext(s.ctx)
	if s.header.md, err = s.withCredentials(s.ctx, md); err != nil {
		return nil, s.neverOpened(err)
	}
	if desc.ClientStreams {
		if err := s.start(nil); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// codecOf returns the registered codec of a content subtype, or nil.
func codecOf(name string) encoding.CodecV2 {
	if c := encoding.GetCodecV2(name); c != nil {
		return c
	}
	if c := encoding.GetCodec(name); c != nil {
		return oldCodec{c}
	}
	return nil
}

// serversPatience is how long a call that nobody answered waits to hear if there are servers.
const serversPatience = 2 * time.Second

// noResponders returns the status of a call that reached no server: servers that do not have the service answer on a
// subject of their own.
func (c *ClientConn) noResponders(ctx context.Context, cause error) error {
	ctx, cancel := context.WithTimeout(ctx, serversPatience)
	defer cancel()
	s, err := c.streams.Open(ctx, c.prefix+"."+serversToken, nil)
	if err == nil {
		defer s.Close()
		for err == nil {
			_, err = s.Recv()
		}
	}
	if errors.Is(err, nats.ErrNoResponders) || ctx.Err() != nil {
		return wrap(codes.Unavailable, "no server answers below the subject "+c.prefix, cause)
	}
	return wrap(codes.Unimplemented, "no server has registered the service", cause)
}

// streamError is a status that wraps the error of a stream.
type streamError struct {
	status *status.Status
	cause  error
}

func (e *streamError) Error() string              { return e.status.Err().Error() }
func (e *streamError) GRPCStatus() *status.Status { return e.status }
func (e *streamError) Unwrap() error              { return e.cause }

func wrap(code codes.Code, text string, cause error) error {
	return &streamError{status.New(code, fmt.Sprintf("%s: %v", text, cause)), cause}
}

// statusOf returns the status of a call whose stream ended with err before the record of the status.
func statusOf(ctx context.Context, err error) error {
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded) || errors.Is(err, context.DeadlineExceeded):
		return wrap(codes.DeadlineExceeded, "the deadline passed", err)
	case ctx.Err() != nil || errors.Is(err, context.Canceled):
		return wrap(codes.Canceled, "the call was canceled", err)
	case errors.Is(err, stream.ErrRecordTooLarge) || errors.Is(err, nats.ErrMaxPayload):
		return wrap(codes.ResourceExhausted, "a message is too large", err)
	}
	code := codes.Unavailable
	if end, ok := errors.AsType[*stream.CloseError](err); ok {
		code = codeOf(end.Code)
	}
	return wrap(code, "the stream ended", err)
}

// codeOf returns the code of gRPC for the close code of a stream.
func codeOf(code int) codes.Code {
	switch code {
	case stream.CloseGoingAway, stream.CloseAbnormalClosure, stream.CloseTryAgainLater:
		return codes.Unavailable
	case stream.CloseMessageTooBig:
		return codes.ResourceExhausted
	case stream.CloseCanceled:
		return codes.Canceled
	case stream.CloseDeadlineExceeded:
		return codes.DeadlineExceeded
	}
	return codes.Internal
}
