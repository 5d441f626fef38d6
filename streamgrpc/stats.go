package streamgrpc

import (
	"context"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/stats"
)

// This file reports the events of a call to the handlers of package stats, as grpc does. Without handlers it does
// nothing. The goroutines of the call run it. It touches fields that are set before a second one begins.

// watched is a call as its handlers see it. The goroutines of the call use it, as grpc's handlers allow.
type watched struct {
	handlers []stats.Handler
	ctx      context.Context // of the call, with the values that the handlers have added
	client   bool
	method   string
	peer     address
	began    time.Time
}

// watch begins to report a call to handlers.
func watch(ctx context.Context, handlers []stats.Handler, client bool, method string, at address, failFast bool) watched {
	w := watched{handlers: handlers, ctx: ctx, client: client, method: method, peer: at}
	if len(handlers) == 0 {
		return w
	}
	if client { // a server's context has it
		w.ctx = peer.NewContext(w.ctx, &peer.Peer{Addr: at})
	}
	for _, h := range handlers {
		w.ctx = h.TagRPC(w.ctx, &stats.RPCTagInfo{FullMethodName: method, FailFast: failFast})
	}
	return w
}

func (w *watched) report(s stats.RPCStats) {
	for _, h := range w.handlers {
		h.HandleRPC(w.ctx, s)
	}
}

func (w *watched) begin(desc *grpc.StreamDesc, failFast bool) {
	if len(w.handlers) > 0 {
		w.began = time.Now()
		w.report(&stats.Begin{
			Client: w.client, BeginTime: w.began, FailFast: failFast, IsClientStream: desc.ClientStreams, IsServerStream: desc.ServerStreams,
		})
	}
}

// outHeader and inHeader report the metadata of a client, or the header of a server.
func (w *watched) outHeader(md metadata.MD) {
	if len(w.handlers) > 0 {
		w.report(&stats.OutHeader{Client: w.client, Header: md, FullMethod: w.method, RemoteAddr: w.peer, LocalAddr: w.peer})
	}
}

func (w *watched) inHeader(md metadata.MD) {
	if len(w.handlers) > 0 {
		w.report(&stats.InHeader{Client: w.client, Header: md, FullMethod: w.method, RemoteAddr: w.peer, LocalAddr: w.peer})
	}
}

// outPayload and inPayload report a message m of n bytes. Its record has one byte more.
func (w *watched) outPayload(m any, n int) {
	if len(w.handlers) > 0 {
		w.report(&stats.OutPayload{Client: w.client, Payload: m, Length: n, CompressedLength: n, WireLength: n + 1, SentTime: time.Now()})
	}
}

func (w *watched) inPayload(m any, n int) {
	if len(w.handlers) > 0 {
		w.report(&stats.InPayload{Client: w.client, Payload: m, Length: n, CompressedLength: n, WireLength: n + 1, RecvTime: time.Now()})
	}
}

// trailer reports the trailer of the server, at either end.
func (w *watched) trailer(md metadata.MD) {
	switch {
	case len(w.handlers) == 0:
	case w.client:
		w.report(&stats.InTrailer{Client: true, Trailer: md})
	default:
		w.report(&stats.OutTrailer{Trailer: md})
	}
}

// end reports the status of a call that has begun.
func (w *watched) end(trailer metadata.MD, err error) {
	if len(w.handlers) > 0 && !w.began.IsZero() {
		if err == io.EOF {
			err = nil
		}
		w.report(&stats.End{Client: w.client, BeginTime: w.began, EndTime: time.Now(), Trailer: trailer, Error: err})
	}
}
