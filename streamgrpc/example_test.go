package streamgrpc_test

import (
	"context"
	"fmt"
	"log"

	"google.golang.org/grpc/health"
	healthgrpc "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamgrpc"
	"github.com/natsstream/stream/streamtest"
)

// A service moves from a listener to NATS. Its implementation, the generated code and the calls stay as they are.
func Example() {
	nats, err := streamtest.Start() // your NATS server
	if err != nil {
		log.Fatal(err)
	}
	defer nats.Shutdown()

	// Before: s := grpc.NewServer(); lis, err := net.Listen("tcp", ":50051"); go s.Serve(lis)
	producer, err := nats.Dial()
	if err != nil {
		log.Fatal(err)
	}
	defer producer.Close()
	server, err := stream.NewServer(stream.ServerParams{Conn: producer})
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()
	s := streamgrpc.NewServer(server)
	healthgrpc.RegisterHealthServer(s, health.NewServer())
	if err := producer.Flush(); err != nil { // the NATS server knows the service from here on
		log.Fatal(err)
	}
	if err := s.Err(); err != nil {
		log.Fatal(err)
	}

	// Before: cc, err := grpc.NewClient("dns:///greeter:50051", …)
	consumer, err := nats.Dial()
	if err != nil {
		log.Fatal(err)
	}
	defer consumer.Close()
	client, err := stream.NewClient(stream.ClientParams{Conn: consumer})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	cc := streamgrpc.NewClientConn(client)
	answer, err := healthgrpc.NewHealthClient(cc).Check(context.Background(), &healthgrpc.HealthCheckRequest{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(answer.GetStatus())
	// Output: SERVING
}
