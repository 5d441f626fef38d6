// Package streamtest provides what a test of streams needs around it: a real NATS server inside the test's process and
// connections to it, without ports to choose, files, log lines or signal handlers.
//
//	func TestTail(t *testing.T) {
//		srv := streamtest.Run(t)
//		client, err := stream.NewClient(stream.ClientParams{Conn: srv.Connect(t)})
//		...
//	}
//
// It is the only package of the module outside its tests, examples and benchmarks that links the NATS server.
package streamtest
