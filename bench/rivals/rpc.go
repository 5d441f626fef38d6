package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// gRPC and connect carry protobuf messages with one field of bytes, as generated stubs would.

type bytesValue = wrapperspb.BytesValue

const (
	grpcService  = "rivals.Records"
	streamMethod = "/" + grpcService + "/Stream"
	unaryMethod  = "/" + grpcService + "/Unary"
)

// listenTCP opens a listener on loopback.
func listenTCP() (net.Listener, error) { return net.Listen("tcp", "127.0.0.1:0") }

// newGRPC starts a server with the stream handler h, and connects a client to it.
func newGRPC(h func(question []byte, ss grpc.ServerStream) error) (*grpc.ClientConn, func(), error) {
	l, err := listenTCP()
	if err != nil {
		return nil, nil, err
	}
	s := grpc.NewServer()
	s.RegisterService(&grpc.ServiceDesc{
		ServiceName: grpcService,
		HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{
			MethodName: "Unary",
			Handler: func(_ any, _ context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
				m := new(bytesValue)
				return m, decode(m)
			},
		}},
		Streams: []grpc.StreamDesc{{
			StreamName:    "Stream",
			ServerStreams: true,
			Handler: func(_ any, ss grpc.ServerStream) error {
				m := new(bytesValue)
				if err := ss.RecvMsg(m); err != nil {
					return err
				}
				return h(m.GetValue(), ss)
			},
		}},
	}, struct{}{})
	go func() { _ = s.Serve(l) }()
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		s.Stop()
		return nil, nil, err
	}
	return conn, func() { _ = conn.Close(); s.Stop() }, nil
}

var serverStreams = grpc.StreamDesc{StreamName: "Stream", ServerStreams: true}

// openGRPC opens a server stream with a question.
func openGRPC(conn *grpc.ClientConn, question []byte) (grpc.ClientStream, error) {
	cs, err := conn.NewStream(context.Background(), &serverStreams, streamMethod)
	if err != nil {
		return nil, err
	}
	if err := cs.SendMsg(wrapperspb.Bytes(question)); err != nil {
		return nil, err
	}
	return cs, cs.CloseSend()
}

func grpcRival() rival {
	return rival{
		name: "grpc-go", settings: "server streaming over loopback TCP, no TLS, defaults",
		open: func(_ *env, streams int) ([]lane, func(), error) {
			g := newGatherer[grpc.ServerStream](streams)
			conn, stop, err := newGRPC(func(q []byte, ss grpc.ServerStream) error { return g.hold(q, ss) })
			if err != nil {
				return nil, nil, err
			}
			closer := func() { close(g.done); stop() }
			lanes := make([]lane, streams)
			for i := range lanes {
				cs, err := openGRPC(conn, question(i))
				if err != nil {
					closer()
					return nil, nil, err
				}
				lanes[i] = &grpcLane{reader: cs}
			}
			senders, err := g.wait(streams)
			if err != nil {
				closer()
				return nil, nil, err
			}
			for i, sender := range senders {
				lanes[i].(*grpcLane).sender = sender
			}
			return lanes, closer, nil
		},
	}
}

type grpcLane struct {
	sender grpc.ServerStream
	reader grpc.ClientStream
}

func (l *grpcLane) send(rec []byte) error { return l.sender.SendMsg(wrapperspb.Bytes(rec)) }
func (l *grpcLane) flush() error          { return nil }
func (l *grpcLane) receive(take func([]byte)) error {
	for {
		m := new(bytesValue)
		if err := l.reader.RecvMsg(m); err != nil {
			return err
		}
		take(m.GetValue())
	}
}

func grpcUnaryAsker() asker {
	return asker{"grpc-go unary", func(*env) (func([]byte) error, func(), error) {
		conn, stop, err := newGRPC(nil)
		if err != nil {
			return nil, nil, err
		}
		return func(question []byte) error {
			return conn.Invoke(context.Background(), unaryMethod, wrapperspb.Bytes(question), new(bytesValue))
		}, stop, nil
	}}
}

func grpcStreamAsker() asker {
	return asker{"grpc-go server stream", func(*env) (func([]byte) error, func(), error) {
		conn, stop, err := newGRPC(func(q []byte, ss grpc.ServerStream) error { return ss.SendMsg(wrapperspb.Bytes(q)) })
		if err != nil {
			return nil, nil, err
		}
		return func(question []byte) error {
			cs, err := openGRPC(conn, question)
			if err != nil {
				return err
			}
			if err := cs.RecvMsg(new(bytesValue)); err != nil {
				return err
			}
			if err := cs.RecvMsg(new(bytesValue)); err != io.EOF {
				return errors.Join(errors.New("the end is missing"), err)
			}
			return nil
		}, stop, nil
	}}
}

func grpcHolder() holder {
	return holder{"grpc-go", func(_ *env, n int) (idleStreams, error) {
		g := newGatherer[grpc.ServerStream](n)
		conn, stop, err := newGRPC(func(q []byte, ss grpc.ServerStream) error { return g.hold(q, ss) })
		if err != nil {
			return idleStreams{}, err
		}
		closer := func() { close(g.done); stop() }
		for range n {
			_, err := openGRPC(conn, question(0))
			if err == nil {
				_, err = g.wait(1)
			}
			if err != nil {
				closer()
				return idleStreams{}, err
			}
		}
		return idleStreams{closer: closer}, nil
	}}
}

// newConnect starts a connect server on HTTP/2 without TLS, and a client for it.
func newConnect(h func(question []byte, ss *connect.ServerStream[bytesValue]) error) (*connect.Client[bytesValue, bytesValue], func(), error) {
	l, err := listenTCP()
	if err != nil {
		return nil, nil, err
	}
	mux := http.NewServeMux()
	mux.Handle(streamMethod, connect.NewServerStreamHandler(streamMethod,
		func(_ context.Context, r *connect.Request[bytesValue], ss *connect.ServerStream[bytesValue]) error {
			return h(r.Msg.GetValue(), ss)
		}))
	plain := new(http.Protocols)
	plain.SetUnencryptedHTTP2(true)
	s := &http.Server{
		Handler: mux, Protocols: plain, ReadHeaderTimeout: 10 * time.Second,
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 20_000},
	}
	go func() { _ = s.Serve(l) }()
	transport := &http.Transport{Protocols: plain}
	c := connect.NewClient[bytesValue, bytesValue](&http.Client{Transport: transport}, "http://"+l.Addr().String()+streamMethod)
	return c, func() { _ = s.Close(); transport.CloseIdleConnections() }, nil
}

func connectRival() rival {
	return rival{
		name: "connect-go", settings: "server streaming over HTTP/2 without TLS on loopback, defaults", maxStreams: 100,
		open: func(_ *env, streams int) ([]lane, func(), error) {
			g := newGatherer[*connect.ServerStream[bytesValue]](streams)
			c, stop, err := newConnect(func(q []byte, ss *connect.ServerStream[bytesValue]) error { return g.hold(q, ss) })
			if err != nil {
				return nil, nil, err
			}
			ctx, cancel := context.WithCancel(context.Background())
			closer := func() { close(g.done); cancel(); stop() }
			lanes := make([]lane, streams)
			readers := make(chan arrival[*connect.ServerStreamForClient[bytesValue]], streams)
			failed := make(chan error, streams)
			for i := range lanes {
				lanes[i] = new(connectLane)
				// The call returns with the response's header, which comes with the first record.
				go func() {
					r, err := c.CallServerStream(ctx, connect.NewRequest(wrapperspb.Bytes(question(i))))
					if err != nil {
						failed <- err
						return
					}
					readers <- arrival[*connect.ServerStreamForClient[bytesValue]]{i, r}
				}()
			}
			senders, err := g.wait(streams)
			if err != nil {
				closer()
				return nil, nil, err
			}
			for i, sender := range senders {
				lanes[i].(*connectLane).sender = sender
				if err := sender.Send(wrapperspb.Bytes(nil)); err != nil { // sends the header
					closer()
					return nil, nil, err
				}
			}
			for range senders {
				select {
				case r := <-readers:
					lanes[r.i].(*connectLane).reader = r.sender
					if !r.sender.Receive() {
						err = r.sender.Err()
					}
				case err = <-failed:
				}
				if err != nil {
					closer()
					return nil, nil, err
				}
			}
			return lanes, closer, nil
		},
	}
}

type connectLane struct {
	sender *connect.ServerStream[bytesValue]
	reader *connect.ServerStreamForClient[bytesValue]
}

func (l *connectLane) send(rec []byte) error { return l.sender.Send(wrapperspb.Bytes(rec)) }
func (l *connectLane) flush() error          { return nil }
func (l *connectLane) receive(take func([]byte)) error {
	for l.reader.Receive() {
		take(l.reader.Msg().GetValue())
	}
	return l.reader.Err()
}

func connectAsker() asker {
	return asker{"connect-go server stream", func(*env) (func([]byte) error, func(), error) {
		c, stop, err := newConnect(func(q []byte, ss *connect.ServerStream[bytesValue]) error { return ss.Send(wrapperspb.Bytes(q)) })
		if err != nil {
			return nil, nil, err
		}
		return func(question []byte) error {
			r, err := c.CallServerStream(context.Background(), connect.NewRequest(wrapperspb.Bytes(question)))
			if err != nil {
				return err
			}
			defer r.Close()
			if !r.Receive() {
				return errors.Join(errors.New("the record is missing"), r.Err())
			}
			if r.Receive() {
				return errors.New("a record too many")
			}
			return r.Err()
		}, stop, nil
	}}
}
