package streamnet_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamnet"
	"github.com/natsstream/stream/streamtest"
)

// both returns a client and a server of streams. Here they share a connection; elsewhere each has its own.
func both() (*stream.Client, *stream.Server, func()) {
	broker, err := streamtest.Start()
	if err != nil {
		log.Fatal(err)
	}
	nc, err := broker.Dial()
	if err != nil {
		log.Fatal(err)
	}
	client, err := stream.NewClient(stream.ClientParams{Conn: nc})
	if err != nil {
		log.Fatal(err)
	}
	server, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		log.Fatal(err)
	}
	return client, server, func() {
		client.Close()
		server.Close()
		nc.Close()
		broker.Shutdown()
	}
}

// A web server on a NATS subject, and a client of it.
func ExampleListen() {
	client, server, stop := both()
	defer stop()
	listener, err := streamnet.Listen(server, "web")
	if err != nil {
		log.Fatal(err)
	}
	defer listener.Close()
	go http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "hello from %s", r.URL.Path)
	}))

	web := &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return streamnet.Dial(ctx, client, "web") },
	}}
	defer web.CloseIdleConnections()
	resp, err := web.Get("http://web/subject")
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	fmt.Println(string(body), err)
	// Output: hello from /subject <nil>
}

// A connection is a net.Conn at both ends.
func ExampleDial() {
	client, server, stop := both()
	defer stop()
	listener, err := streamnet.Listen(server, "echo")
	if err != nil {
		log.Fatal(err)
	}
	defer listener.Close()
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		defer conn.Close()
		io.Copy(conn, conn)
	}()

	conn, err := streamnet.Dial(context.Background(), client, "echo")
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "hello")
	conn.CloseWrite()
	answer, err := io.ReadAll(conn)
	fmt.Println(string(answer), err)
	// Output: hello <nil>
}
