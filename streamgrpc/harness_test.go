package streamgrpc

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// patience bounds what should happen soon.
const patience = 20 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair is a client and a server on connections of their own.
type pair struct {
	client *stream.Client
	server *stream.Server
	conn   *ClientConn
	srv    *Server
	nc     *nats.Conn // of the server
}

func newPair(tb testing.TB, client, server *nats.Conn, params stream.ServerParams, options ...any) *pair {
	tb.Helper()
	p := &pair{nc: server}
	var err error
	if p.client, err = stream.NewClient(stream.ClientParams{Conn: client}); err != nil {
		tb.Fatal(err)
	}
	params.Conn = server
	if p.server, err = stream.NewServer(params); err != nil {
		tb.Fatal(err)
	}
	var clientOptions []ClientOption
	var serverOptions []ServerOption
	for _, o := range options {
		if o, ok := o.(ClientOption); ok {
			clientOptions = append(clientOptions, o)
		}
		if o, ok := o.(ServerOption); ok {
			serverOptions = append(serverOptions, o)
		}
	}
	p.conn, p.srv = NewClientConn(p.client, clientOptions...), NewServer(p.server, serverOptions...)
	tb.Cleanup(func() {
		_ = p.conn.Close()
		_ = p.client.Close()
		_ = p.server.Close()
	})
	return p
}

// run returns a pair on an embedded server.
func run(tb testing.TB, options ...any) *pair {
	tb.Helper()
	s := streamtest.Run(tb)
	return newPair(tb, s.Connect(tb), s.Connect(tb), stream.ServerParams{}, options...)
}

// limited returns a context for a call that should end soon.
func limited(tb testing.TB) context.Context {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	tb.Cleanup(cancel)
	return ctx
}

// reachable returns when the NATS server knows all services of p.
func (p *pair) reachable(tb testing.TB) {
	tb.Helper()
	if err := p.nc.FlushTimeout(patience); err != nil {
		tb.Fatal(err)
	}
	if err := p.srv.Err(); err != nil {
		tb.Fatal(err)
	}
}

// with returns a pair of the client and another server on the connection of p's, below a prefix of its own.
func (p *pair) with(tb testing.TB, params stream.ServerParams, below string) *pair {
	tb.Helper()
	params.Conn = p.nc
	server, err := stream.NewServer(params)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = server.Close() })
	return &pair{nc: p.nc, client: p.client, server: server, conn: NewClientConn(p.client, WithPrefix(below)), srv: NewServer(server, WithPrefix(below))}
}
