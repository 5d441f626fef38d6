// Package streamtest provides NATS servers for tests of streams, connections to them, and faults of the network between
// them. The servers choose their own ports. They need no files and no installed binary. The package is a module of its
// own, so that only tests that use it require the NATS server.
//
//	func TestTail(t *testing.T) {
//		srv := streamtest.Run(t)
//		client, err := stream.NewClient(stream.ClientParams{Conn: srv.Connect(t)})
//		...
//	}
//
// A server, cluster, proxy or interceptor that a function Run… starts ends with the test. The function Start… of the
// same name is for programs.
//
// # Servers
//
// [Run] starts a server in the test's process, in a few milliseconds. [RunProcess] starts one in a process of its own,
// which can be killed, paused, shut down, and started again at the same address, also with other limits:
//
//	srv := streamtest.RunProcess(t)
//	nc := srv.Connect(t)
//	srv.Kill()
//	err := srv.Restart(streamtest.WithMaxPayload(64 << 10))
//
// Both take the same options. [WithConfig] takes the text of a NATS configuration, such as one for permissions.
//
// [RunCluster] starts several such processes with routes between them, and can delay the routes:
//
//	c := streamtest.RunCluster(t, 3)
//	c.DelayRoutes(20 * time.Millisecond)
//	nc := c.Connect(t, 0) // moves to nodes 1 and 2
//	c.Node(0).Kill()
//
// # Networks
//
// [RunProxy] starts a proxy between a client and its server, or between any two ends of a TCP connection. It delays,
// throttles, holds, cuts and resets connections:
//
//	p := streamtest.RunProxy(t, srv.URL())
//	nc, err := nats.Connect(p.URL(), nats.IgnoreDiscoveredServers())
//	p.BlackHole(streamtest.ToServer)
//	...
//	p.Heal()
//
// # Messages
//
// [RunInterceptor] starts a proxy that parses the protocol of NATS clients, and applies rules to each message. A rule
// is ready-made, such as [Drop], [Duplicate], [Reorder] and [Corrupt], or a function of the test. An interceptor can
// also forge messages.
//
//	rng := rand.New(rand.NewPCG(1, 2))
//	i := streamtest.RunInterceptor(t, srv.URL(),
//		streamtest.Only(streamtest.HasPrefix(0xF5), // the packets of streams
//			streamtest.Drop(0.01, rng), streamtest.Reorder(0.1, 3, rng)))
//	nc, err := nats.Connect(i.URL(), nats.IgnoreDiscoveredServers())
//
// Of all packages for users, only streamtest links the NATS server.
package streamtest
