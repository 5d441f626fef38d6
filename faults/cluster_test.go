package faults

import (
	"strings"
	"testing"
	"time"

	"github.com/natsstream/stream/streamtest"
)

// TestNodeKilled kills the producer's node of a cluster, the consumer's, and the third.
func TestNodeKilled(t *testing.T) {
	c := streamtest.RunCluster(t, 3)
	urls := func(i int) string { return strings.Join(c.URLs(i), ",") }
	for _, k := range []struct {
		name string
		node int
	}{{"producer", 0}, {"consumer", 1}, {"third", 2}} {
		t.Run(k.name, func(t *testing.T) {
			for range runs(3, 50) {
				run(t, urls(0), urls(1), 1500, time.Millisecond, func() {
					time.Sleep(30 * time.Millisecond)
					c.Node(k.node).Kill()
				})
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
