package streamtest

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
)

// Cluster is a NATS cluster of processes. Each node has a route to each other node. All routes pass through proxies, so
// that their latency can be set. The methods of a Cluster may be called concurrently.
type Cluster struct {
	nodes  []*Process
	routes []*Proxy // one for each node; the other nodes connect to it through its proxy
}

// clusterTimeout is how long Await waits for the routes. A route that failed is tried again after about a second.
const clusterTimeout = 20 * time.Second

// StartCluster starts n nodes, at least one, with the same options and returns when all routes between them are up. The
// caller ends it with [Cluster.Close]. Options are those of [StartProcess], except options of the cluster.
func StartCluster(n int, opts ...Option) (*Cluster, error) {
	if n < 1 {
		return nil, fmt.Errorf("streamtest: a cluster of %d nodes: it takes at least one", n)
	}
	c := &Cluster{}
	ports := make([]int, n)
	urls := make([]string, n)
	for i := range n {
		var err error
		if ports[i], err = freePort(); err != nil {
			c.Close()
			return nil, err
		}
		p, err := StartProxy(fmt.Sprintf("127.0.0.1:%d", ports[i]))
		if err != nil {
			c.Close()
			return nil, err
		}
		c.routes = append(c.routes, p)
		urls[i] = fmt.Sprintf("%q", p.URL())
	}
	for i := range n {
		// Every node knows all others, so that it finds them after a restart, and they find it.
		others := append(urls[:i:i], urls[i+1:]...)
		config := WithConfig(fmt.Sprintf(`
			server_name: "node%d"
			cluster { name: streamtest, listen: "127.0.0.1:%d", cluster_advertise: %q, routes: [ %s ] }`,
			i, ports[i], c.routes[i].Addr(), strings.Join(others, ", ")))
		p, err := StartProcess(append([]Option{config}, opts...)...)
		if err != nil {
			c.Close()
			return nil, err
		}
		c.nodes = append(c.nodes, p)
	}
	if err := c.Await(); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// RunCluster starts n nodes that are killed at the end of the test. If they cannot start, the test fails at once.
func RunCluster(tb testing.TB, n int, opts ...Option) *Cluster {
	tb.Helper()
	c, err := StartCluster(n, opts...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(c.Close)
	return c
}

// Await returns when all running nodes are connected to each other, for example after a Restart. It returns an error
// after 20 s, or after 1 s for a paused node.
func (c *Cluster) Await() error {
	for end := time.Now().Add(clusterTimeout); ; time.Sleep(5 * time.Millisecond) {
		var missing string
		running := c.running()
		for _, p := range running {
			r, err := p.ask()
			if err != nil {
				return err
			}
			if others := len(running) - 1; r.Remotes != others || r.Routes < others*r.Pool {
				missing = fmt.Sprintf("%s has %d of %d routes", p.URL(), r.Routes, others*r.Pool)
			}
		}
		if missing == "" {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("streamtest: %s", missing)
		}
	}
}

func (c *Cluster) running() (running []*Process) {
	for _, p := range c.nodes {
		if p.running() {
			running = append(running, p)
		}
	}
	return running
}

// Node returns node i, counted from 0.
func (c *Cluster) Node(i int) *Process { return c.nodes[i] }

// Route returns the proxy through which the other nodes connect to node i. The nodes decide which of two nodes connects
// to the other. Cut and Reset break routes, which come back after about a second.
func (c *Cluster) Route(i int) *Proxy { return c.routes[i] }

// DelayRoutes sets the latency of all routes, one way. 20 ms is usual between regions that are not far apart. Zero, the
// default, is the latency of loopback.
func (c *Cluster) DelayRoutes(d time.Duration) {
	for _, p := range c.routes {
		p.Delay(Both, d)
	}
}

// URLs returns the addresses of all nodes in order, beginning with node first.
func (c *Cluster) URLs(first int) []string {
	var urls []string
	for i := range c.nodes {
		urls = append(urls, c.nodes[(first+i)%len(c.nodes)].URL())
	}
	return urls
}

// Dial returns a new connection to node i, or to the next node that accepts one. Options and the duty to close are
// those of [Server.Dial].
func (c *Cluster) Dial(i int, opts ...nats.Option) (*nats.Conn, error) {
	return dial(strings.Join(c.URLs(i), ","), append([]nats.Option{nats.DontRandomize()}, opts...))
}

// Connect is [Cluster.Dial] for a test: the connection is closed at its end; see [Server.Connect].
func (c *Cluster) Connect(tb testing.TB, i int, opts ...nats.Option) *nats.Conn {
	tb.Helper()
	return connect(tb, strings.Join(c.URLs(i), ","), append([]nats.Option{nats.DontRandomize()}, opts...))
}

// Close kills all nodes and returns when they have ended. A second call does nothing.
func (c *Cluster) Close() {
	for _, p := range c.nodes {
		p.Kill()
	}
	for _, p := range c.routes {
		p.Close()
	}
}
