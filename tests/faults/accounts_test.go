package faults

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// accounts returns the recipe for streams across accounts, as docs/PROTOCOL.md has it.
func accounts(t *testing.T) streamtest.Option {
	t.Helper()
	for _, user := range []string{"producer", "alice", "bob"} {
		t.Setenv(strings.ToUpper(user)+"_PASSWORD", secret(user))
	}
	doc, err := os.ReadFile("../../docs/PROTOCOL.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?ms)^```text\n(# permissions: across accounts\n.*?)^```$").FindSubmatch(doc)
	if block == nil {
		t.Fatal("docs/PROTOCOL.md has no recipe for accounts")
	}
	return streamtest.WithConfig(string(block[1]))
}

func secret(user string) string { return "secret-of-" + user }

// as is how a user of the recipe connects. Behind a leaf node, which has the user's name and password, a prefix is
// enough.
func as(user string, leaf bool) []nats.Option {
	opts := []nats.Option{nats.CustomInboxPrefix("_SINBOX." + user)}
	if !leaf {
		opts = append(opts, nats.UserInfo(user, secret(user)))
	}
	return opts
}

// acrossAccounts is a trial in which the two ends are users of two accounts.
func acrossAccounts(server, client string, fault func(*rig)) trial {
	return trial{server: server, client: client, sOpts: as("producer", false), cOpts: as("alice", false), under: "svc.", queue: "workers",
		kinds: []string{"down", "up", "echo", "idle"}, calm: true, fault: fault}
}

// settle waits until the streams are well under way.
func (r *rig) settle() { time.Sleep(100 * time.Millisecond) }

// TestAccountsServerRestarted kills the only NATS server and starts it again. What it had mapped is gone.
func TestAccountsServerRestarted(t *testing.T) {
	p := streamtest.RunProcess(t, accounts(t))
	for range runs(3, 100) {
		acrossAccounts(p.URL(), p.URL(), func(r *rig) {
			r.settle()
			p.Kill()
			time.Sleep(100 * time.Millisecond)
			if err := p.Restart(); err != nil {
				t.Error(err)
			}
		}).run(t)
	}
}

// TestAccountsNodeLost kills the consumer's node of a cluster, the producer's, and the third.
func TestAccountsNodeLost(t *testing.T) {
	c := streamtest.RunCluster(t, 3, accounts(t))
	for _, k := range []struct {
		name string
		node int
	}{{"producer", 0}, {"consumer", 1}, {"third", 2}} {
		t.Run(k.name, func(t *testing.T) {
			for range runs(2, 50) {
				acrossAccounts(strings.Join(c.URLs(0), ","), strings.Join(c.URLs(1), ","), func(r *rig) {
					r.settle()
					c.Node(k.node).Kill()
				}).one(t)
				revive(t, c, k.node)
			}
		})
	}
}

func revive(t *testing.T, c *streamtest.Cluster, node int) {
	t.Helper()
	if err := c.Node(node).Restart(); err != nil {
		t.Fatal(err)
	}
	if err := c.Await(); err != nil {
		t.Fatal(err)
	}
}

// TestAccountsRouteReset resets all routes of a cluster. The ends stay connected.
func TestAccountsRouteReset(t *testing.T) {
	c := streamtest.RunCluster(t, 2, accounts(t))
	for range runs(2, 50) {
		acrossAccounts(c.URLs(0)[0], c.URLs(1)[0], func(r *rig) {
			r.settle()
			c.Route(0).Reset()
			c.Route(1).Reset()
		}).one(t)
		if err := c.Await(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAccountsLeafLinkReset resets the link of a leaf node, behind which one of the two ends is.
func TestAccountsLeafLinkReset(t *testing.T) {
	port := freePort(t)
	hub := streamtest.Run(t, accounts(t), streamtest.WithConfig(fmt.Sprintf(`leafnodes { listen: "127.0.0.1:%d" }`, port)))
	for _, user := range []string{"alice", "producer"} {
		t.Run(user, func(t *testing.T) {
			link := streamtest.RunProxy(t, fmt.Sprintf("nats://127.0.0.1:%d", port))
			leaf := streamtest.Run(t, streamtest.WithConfig(fmt.Sprintf(`leafnodes { reconnect: "100ms", remotes: [ { url: "nats://%s:%s@%s" } ] }`,
				user, secret(user), link.Addr())))
			for range runs(2, 50) {
				if !within(patience, func() bool { return leaf.Raw().NumLeafNodes() == 1 }) {
					t.Fatal("the leaf node has no link")
				}
				x := acrossAccounts(hub.URL(), leaf.URL(), func(r *rig) {
					r.settle()
					link.Reset()
				})
				x.cOpts = as("alice", true)
				if user == "producer" {
					x.server, x.client = leaf.URL(), hub.URL()
					x.sOpts, x.cOpts = as("producer", true), as("alice", false)
				}
				x.one(t)
			}
		})
	}
}

// twoClusters starts two clusters of one node each, and returns the nodes and a function that resets the connections
// between them.
func twoClusters(t *testing.T) (nodes [2]*streamtest.Process, reset func()) {
	config, ports := accounts(t), [2]int{freePort(t), freePort(t)}
	var gates [2]*streamtest.Proxy
	for i, port := range ports {
		gates[i] = streamtest.RunProxy(t, fmt.Sprintf("nats://127.0.0.1:%d", port))
	}
	for i, port := range ports {
		nodes[i] = streamtest.RunProcess(t, config, streamtest.WithConfig(fmt.Sprintf(`
			server_name: "node%d"
			gateway { name: "%c", listen: "127.0.0.1:%d", advertise: %q, gateways: [ { name: A, url: %q }, { name: B, url: %q } ] }`,
			i, 'A'+i, port, gates[i].Addr(), gates[0].URL(), gates[1].URL())))
	}
	return nodes, func() {
		gates[0].Reset()
		gates[1].Reset()
	}
}

// TestAccountsGateway has the ends in two clusters, and resets the connections between these, or restarts the server of
// one end.
func TestAccountsGateway(t *testing.T) {
	nodes, reset := twoClusters(t)
	for name, fault := range map[string]func() error{
		"reset":    func() error { reset(); return nil },
		"consumer": func() error { return nodes[1].Restart() },
		"producer": func() error { return nodes[0].Restart() },
	} {
		t.Run(name, func(t *testing.T) {
			for range runs(2, 50) {
				acrossAccounts(nodes[0].URL(), nodes[1].URL(), func(r *rig) {
					r.settle()
					if err := fault(); err != nil {
						t.Error(err)
					}
				}).one(t)
			}
		})
	}
}

// TestAccountsNearerMember restarts the consumer's cluster, in which another member of the queue group is by then. NATS
// gives everything to that one which the cluster's clients send to the group.
func TestAccountsNearerMember(t *testing.T) {
	nodes, _ := twoClusters(t)
	for range runs(2, 50) {
		var nearer *stream.Server
		var nc *nats.Conn
		x := acrossAccounts(nodes[0].URL(), nodes[1].URL(), func(r *rig) {
			var err error
			if nc, err = dial(nodes[1].URL(), as("producer", false)...); err != nil {
				t.Fatal(err)
			}
			if nearer, err = stream.NewServer(stream.ServerParams{Conn: nc}); err != nil {
				t.Fatal(err)
			}
			for _, subject := range r.kinds {
				if _, err := nearer.HandleQueue(r.under+subject, r.queue, func(w *stream.Writer, q *stream.Request) error {
					t.Errorf("a handler of %s was called", q.Subject)
					return nil
				}); err != nil {
					t.Fatal(err)
				}
			}
			if err := nc.Flush(); err != nil {
				t.Fatal(err)
			}
			r.settle()
			if err := nodes[1].Restart(); err != nil {
				t.Error(err)
			}
		})
		x.heal = func() {
			nearer.Close()
			nc.Close()
		}
		x.one(t)
	}
}

// freePort returns a free port below those that systems give to outgoing connections. Otherwise such a connection could
// take it before the server does.
func freePort(t *testing.T) int {
	t.Helper()
	var err error
	for range 100 {
		port := 10000 + rand.IntN(10000)
		var ln net.Listener
		if ln, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			ln.Close()
			return port
		}
	}
	t.Fatal(err)
	return 0
}
