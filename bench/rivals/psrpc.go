package main

import (
	"context"
	"time"

	"github.com/livekit/psrpc"
	"github.com/livekit/psrpc/pkg/bus/natsbus"
	"github.com/livekit/psrpc/pkg/client"
	"github.com/livekit/psrpc/pkg/info"
	"github.com/livekit/psrpc/pkg/rand"
	"github.com/livekit/psrpc/pkg/server"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// These timeouts are longer than the default of 3 s, which a busy machine may exceed. A send may lose its
// acknowledgement, and then fails before the run counts as one that stands still.
const (
	psrpcOpenTimeout = 30 * time.Second
	psrpcSendTimeout = patience - time.Second
)

// psrpcRival streams protobuf messages over NATS. Each is acknowledged before the next is sent.
func psrpcRival() rival {
	const rpc = "records"
	type bytesValue = wrapperspb.BytesValue
	return rival{
		name: "psrpc", settings: "defaults but for longer timeouts, NATS as its bus", stalls: true, maxStreams: 100,
		open: func(e *env, streams int) ([]lane, func(), error) {
			conns, err := e.dialPair()
			if err != nil {
				return nil, nil, err
			}
			name := rand.NewString()
			g := newGatherer[psrpc.ServerStream[*bytesValue, *bytesValue]](streams)
			s := server.NewRPCServer(&info.ServiceDefinition{Name: name, ID: rand.NewString()}, natsbus.New(conns.producer))
			closer := func() { close(g.done); s.Close(true); conns.close() }
			s.RegisterMethod(rpc, false, false, true, false)
			if err := server.RegisterStreamHandler(s, rpc, nil, func(ss psrpc.ServerStream[*bytesValue, *bytesValue]) error {
				return g.hold((<-ss.Channel()).GetValue(), ss)
			}, nil); err != nil {
				closer()
				return nil, nil, err
			}
			if err := conns.producer.Flush(); err != nil {
				closer()
				return nil, nil, err
			}
			c, err := client.NewRPCClientWithStreams(&info.ServiceDefinition{Name: name, ID: rand.NewString()}, natsbus.New(conns.consumer),
				psrpc.WithClientTimeout(psrpcOpenTimeout))
			if err != nil {
				closer()
				return nil, nil, err
			}
			c.RegisterMethod(rpc, false, false, true, false)
			closer = func() { close(g.done); c.Close(); s.Close(true); conns.close() }
			lanes := make([]lane, streams)
			for i := range lanes {
				cs, err := client.OpenStream[*bytesValue, *bytesValue](context.Background(), c, rpc, nil)
				if err == nil {
					err = cs.Send(wrapperspb.Bytes(question(i)), psrpc.WithTimeout(psrpcOpenTimeout))
				}
				if err != nil {
					closer()
					return nil, nil, err
				}
				lanes[i] = &psrpcLane{reader: cs}
			}
			senders, err := g.wait(streams)
			if err != nil {
				closer()
				return nil, nil, err
			}
			for i, sender := range senders {
				lanes[i].(*psrpcLane).sender = sender
			}
			return lanes, closer, nil
		},
	}
}

type psrpcLane struct {
	sender psrpc.ServerStream[*wrapperspb.BytesValue, *wrapperspb.BytesValue]
	reader psrpc.ClientStream[*wrapperspb.BytesValue, *wrapperspb.BytesValue]
}

func (l *psrpcLane) send(rec []byte) error {
	return l.sender.Send(wrapperspb.Bytes(rec), psrpc.WithTimeout(psrpcSendTimeout))
}
func (l *psrpcLane) flush() error { return nil }
func (l *psrpcLane) receive(take func([]byte)) error {
	for m := range l.reader.Channel() {
		take(m.GetValue())
	}
	return l.reader.Err()
}
