package faults

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// gathering is a request to five servers. Each has a stream, in both directions, while the fault happens.
type gathering struct {
	server       func(i int) string // URLs
	client       string
	sOpts, cOpts []nats.Option
	subject      string
	fault        func(servers []*nats.Conn)
	lost         int // this many streams end with CloseAbnormalClosure
}

const (
	responders = 5
	exchanges  = 300
)

func (x gathering) run(t *testing.T) {
	t.Helper()
	leakless(t, func() {
		ctx, cancel := context.WithTimeout(t.Context(), 3*patience)
		defer cancel()
		var conns []*nats.Conn
		for i := range responders {
			nc, err := dial(x.server(i), x.sOpts...)
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			srv, err := stream.NewServer(stream.ServerParams{Conn: nc})
			if err != nil {
				t.Fatal(err)
			}
			defer srv.Close()
			if _, err := srv.Handle(x.subject, func(w *stream.Writer, q *stream.Request) error {
				for rec, err := range q.All() {
					if err != nil {
						return err
					}
					if _, err := fmt.Fprintf(w, "%d %s", i, rec); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			if err := nc.Flush(); err != nil {
				t.Fatal(err)
			}
			conns = append(conns, nc)
		}
		nc, err := dial(x.client, x.cOpts...)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		client, err := stream.NewClient(stream.ClientParams{Conn: nc})
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		x.gather(ctx, t, client, conns)
	})
}

// gather sends requests until all servers answer one: interest takes time to spread in a cluster.
func (x gathering) gather(ctx context.Context, t *testing.T, client *stream.Client, servers []*nats.Conn) {
	var streams []*stream.Stream
	for len(streams) < responders {
		r, err := client.OpenMany(ctx, x.subject, nil, stream.WithMaxResponders(responders), stream.WithStallTimeout(2*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		streams = nil
		for s, err := range r.All() {
			if err != nil {
				break
			}
			streams = append(streams, s)
		}
		if len(streams) < responders {
			r.Close()
			if ctx.Err() != nil {
				t.Fatalf("%d of %d servers answer", len(streams), responders)
			}
			continue
		}
		defer r.Close()
	}
	var lost atomic.Int32
	var all sync.WaitGroup
	for _, s := range streams {
		all.Go(func() {
			switch err := converse(s); {
			case isCode(stream.CloseAbnormalClosure)(err):
				lost.Add(1)
			case err != nil:
				t.Error(err)
			}
		})
	}
	time.Sleep(100 * time.Millisecond)
	x.fault(servers)
	all.Wait()
	if n := lost.Load(); n != int32(x.lost) {
		t.Errorf("%d streams were lost, want %d", n, x.lost)
	}
}

// converse writes records that its responder alone sends back, and returns why the stream ended before all came, nil if
// all did.
func converse(s *stream.Stream) error {
	name := ""
	for i := range exchanges {
		if _, err := fmt.Fprint(s, i); err != nil {
			return err
		}
		rec, err := s.Recv()
		if err != nil {
			return err
		}
		who, what, _ := strings.Cut(string(rec), " ")
		if name == "" {
			name = who
		}
		if who != name || what != fmt.Sprint(i) {
			return fmt.Errorf("%q is the answer of %q to %d", rec, name, i)
		}
		time.Sleep(2 * time.Millisecond)
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	if _, err := s.Recv(); err != io.EOF {
		return fmt.Errorf("the end: %w", err)
	}
	return nil
}

// TestRespondersOfACluster has responders at all nodes of a cluster, and kills the consumer's node, another one, and a
// responder.
func TestRespondersOfACluster(t *testing.T) {
	c := streamtest.RunCluster(t, 3)
	at := gathering{
		server: func(i int) string { return strings.Join(c.URLs(i%3), ",") }, client: strings.Join(c.URLs(1), ","), subject: "all",
	}
	for name, fault := range map[string]struct {
		node, lost int
		fault      func(servers []*nats.Conn)
	}{
		"consumer's node":  {node: 1, fault: func([]*nats.Conn) { c.Node(1).Kill() }},
		"a responder node": {node: 2, fault: func([]*nats.Conn) { c.Node(2).Kill() }},
		"responder":        {node: -1, lost: 1, fault: func(servers []*nats.Conn) { servers[3].Close() }},
	} {
		t.Run(name, func(t *testing.T) {
			for range runs(2, 50) {
				at.fault, at.lost = fault.fault, fault.lost
				at.run(t)
				if fault.node >= 0 {
					revive(t, c, fault.node)
				}
			}
		})
	}
}

// TestRespondersAcrossAccounts kills the only NATS server and starts it again. All that it had mapped is gone, and each
// stream is found again by its name: each responder gets the question for each stream.
func TestRespondersAcrossAccounts(t *testing.T) {
	p := streamtest.RunProcess(t, accounts(t))
	for range runs(2, 50) {
		gathering{
			server: func(int) string { return p.URL() }, client: p.URL(), sOpts: as("producer", false), cOpts: as("alice", false), subject: "svc.all",
			fault: func([]*nats.Conn) {
				p.Kill()
				time.Sleep(100 * time.Millisecond)
				if err := p.Restart(); err != nil {
					t.Error(err)
				}
			},
		}.run(t)
	}
}
