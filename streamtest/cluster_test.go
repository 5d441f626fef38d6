package streamtest_test

import (
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/streamtest"
)

// roundTrip measures a request between two connections.
func roundTrip(t *testing.T, asker, answerer *nats.Conn) time.Duration {
	t.Helper()
	subject := nats.NewInbox()
	sub, err := answerer.Subscribe(subject, func(m *nats.Msg) { _ = m.Respond(m.Data) })
	if err != nil || answerer.Flush() != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	// Interest takes its time to the other node, hence the first.
	await(t, "an answer through the cluster", func() bool {
		_, err := asker.Request(subject, nil, limit)
		return err == nil
	})
	start := time.Now()
	if _, err := asker.Request(subject, nil, limit); err != nil {
		t.Fatal(err)
	}
	return time.Since(start)
}

func TestCluster(t *testing.T) {
	c := streamtest.RunCluster(t, 3, streamtest.WithMaxPayload(1<<16))
	var conns []*nats.Conn
	moved := make(chan struct{}, 8)
	for i := range 3 {
		nc := c.Connect(t, i, nats.ReconnectHandler(func(*nats.Conn) { moved <- struct{}{} }))
		if nc.ConnectedUrl() != c.Node(i).URL() || nc.MaxPayload() != 1<<16 {
			t.Errorf("connected to %s with a payload of %d, want node %d", nc.ConnectedUrl(), nc.MaxPayload(), i)
		}
		conns = append(conns, nc)
	}
	if urls := c.URLs(1); !slices.Equal(urls, []string{c.Node(1).URL(), c.Node(2).URL(), c.Node(0).URL()}) {
		t.Errorf("URLs(1) = %v", urls)
	}
	const d = 20 * time.Millisecond
	c.DelayRoutes(d)
	for i := range 3 {
		if took := roundTrip(t, conns[i], conns[(i+1)%3]); took < 2*d {
			t.Errorf("a request from node %d took %v, want at least %v", i, took, 2*d)
		}
	}
	c.DelayRoutes(0)
	fastest := time.Hour // of several: a busy machine delays some
	for range 20 {
		fastest = min(fastest, roundTrip(t, conns[0], conns[1]))
	}
	if fastest >= 2*d {
		t.Errorf("a request without delay took %v", fastest)
	}

	c.Node(0).Kill()
	receive(t, "the move to another node", moved)
	if nc := c.Connect(t, 0); nc.ConnectedUrl() != c.Node(1).URL() {
		t.Errorf("connected to %s, want node 1", nc.ConnectedUrl())
	}
	if err := c.Node(0).Restart(); err != nil {
		t.Fatal(err)
	}
	if err := c.Await(); err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c.Connect(t, 0), conns[2])
	if err := c.Node(2).Pause(); err != nil {
		t.Fatal(err)
	}
	if err := c.Await(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Await with a paused node: %v, want ErrDeadlineExceeded", err)
	}
}

func TestClusterOfNothing(t *testing.T) {
	for _, n := range []int{-1, 0} {
		if c, err := streamtest.StartCluster(n); err == nil {
			c.Close()
			t.Errorf("a cluster of %d nodes was started", n)
		}
	}
}
