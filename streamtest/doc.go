// Package streamtest provides NATS servers for tests of streams, connections to them, and faults of the network in
// between. The servers choose their own ports and need no files, no parsing of logs and no installed binary.
//
//	func TestTail(t *testing.T) {
//		srv := streamtest.Run(t)
//		client, err := stream.NewClient(stream.ClientParams{Conn: srv.Connect(t)})
//		...
//	}
//
// Everything that a function named Run… starts ends with the test; the Start… of the same name is for programs.
//
// # Servers
//
// [Run] starts a server in the test's process, in a few milliseconds. [RunProcess] starts one in a process of its own, which
// can crash, stand still, leave in order, and come back at the same address, perhaps with other limits:
//
//	srv := streamtest.RunProcess(t)
//	nc := srv.Connect(t)
//	srv.Kill()
//	err := srv.Restart(streamtest.WithMaxPayload(64 << 10))
//
// Both take the same options. [WithConfig] is NATS configuration as it is documented, for instance a recipe for permissions.
//
// [RunCluster] starts several such processes with routes between them, and can put these far apart:
//
//	c := streamtest.RunCluster(t, 3)
//	c.DelayRoutes(20 * time.Millisecond)
//	nc := c.Connect(t, 0) // moves to nodes 1 and 2
//	c.Node(0).Kill()
//
// # Networks
//
// [RunProxy] stands between a client and its server, or between any two ends of a TCP connection. It delays, throttles,
// holds, cuts and resets:
//
//	p := streamtest.RunProxy(t, srv.URL())
//	nc, err := nats.Connect(p.URL(), nats.IgnoreDiscoveredServers())
//	p.BlackHole(streamtest.ToServer)
//	...
//	p.Heal()
//
// # Messages
//
// [RunInterceptor] stands in the same place, parses the protocol of NATS clients, and applies rules to each message. Rules
// are ready-made, such as [Drop], [Duplicate], [Reorder] and [Corrupt], or functions of the test. It can also forge messages.
//
//	rng := rand.New(rand.NewPCG(1, 2))
//	i := streamtest.RunInterceptor(t, srv.URL(),
//		streamtest.Only(streamtest.HasPrefix(0xF5), // the packets of streams
//			streamtest.Drop(0.01, rng), streamtest.Reorder(0.1, 3, rng)))
//	nc, err := nats.Connect(i.URL(), nats.IgnoreDiscoveredServers())
//
// It is the only package of the module outside its tests, examples and benchmarks that links the NATS server.
package streamtest
