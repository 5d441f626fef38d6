package faults

import (
	"strings"
	"testing"
	"time"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// TestNodeKilled kills the producer's node of a cluster, the consumer's, and the third.
func TestNodeKilled(t *testing.T) {
	c := streamtest.RunCluster(t, 3)
	for _, k := range []struct {
		name string
		node int
	}{{"producer", 0}, {"consumer", 1}, {"third", 2}} {
		t.Run(k.name, func(t *testing.T) {
			for range runs(3, 50) {
				trial{server: strings.Join(c.URLs(0), ","), client: strings.Join(c.URLs(1), ","), fault: func(*rig) {
					time.Sleep(20 * time.Millisecond)
					c.Node(k.node).Kill()
				}}.run(t)
				if err := c.Node(k.node).Restart(); err != nil {
					t.Fatal(err)
				}
				if err := c.Await(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestProducerMoves moves the producer from node to node of a cluster whose routes are slow: what it sends through the
// consumer's own node overtakes what it sent through another.
func TestProducerMoves(t *testing.T) {
	c := streamtest.RunCluster(t, 3)
	c.DelayRoutes(20 * time.Millisecond)
	for range runs(3, 50) {
		trial{server: strings.Join(c.URLs(0), ","), client: strings.Join(c.URLs(1), ","),
			times: stream.ClientParams{AckTimeout: 150 * time.Millisecond},
			fault: func(r *rig) {
				for range 3 {
					time.Sleep(50 * time.Millisecond)
					was := r.sc.ConnectedUrl()
					if err := r.sc.ForceReconnect(); err != nil {
						t.Error(err)
					}
					if !within(patience, func() bool { is := r.sc.ConnectedUrl(); return is != "" && is != was }) {
						t.Errorf("still at %q", was)
					}
				}
			}}.run(t)
	}
}
