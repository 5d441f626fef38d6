// Command service is a service as it runs in production: it checks a token, heeds the deadlines of its consumers, and
// ends in peace at SIGTERM. Its running streams come to their ends, and new requests go to other instances.
//
//	TOKEN=secret go run ./examples/service -url nats://127.0.0.1:4222
package main

import (
	"context"
	"crypto/subtle"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

const (
	subject = "orders.list"
	orders  = 500
	pace    = time.Millisecond // for each order
	grace   = 20 * time.Second // for running streams after SIGTERM: less than your platform waits before it kills
)

func main() {
	url := flag.String("url", nats.DefaultURL, "address of the NATS server")
	flag.Parse()
	// The context ends at the first signal. A second one ends the program at once.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	context.AfterFunc(ctx, stop)
	if err := run(ctx, *url, os.Getenv("TOKEN"), os.Stdout); err != nil {
		log.Fatal(err)
	}
}

// authorized returns a handler that runs next only for requests with the token.
func authorized(token string, next stream.Handler) stream.Handler {
	return func(w *stream.Writer, r *stream.Request) error {
		if subtle.ConstantTimeCompare([]byte(r.Header.Get("Authorization")), []byte("Bearer "+token)) != 1 {
			return &stream.CloseError{Code: codeUnauthorized, Text: "send the header Authorization: Bearer and your token"}
		}
		return next(w, r)
	}
}

// codeUnauthorized is a close code of this service. Codes from 4100 to 4999 belong to applications.
const codeUnauthorized = 4401

// list is the handler. Its context ends at the deadline of the consumer, which travels with the request, or if the
// consumer leaves.
func list(w *stream.Writer, r *stream.Request) error {
	for i := range orders {
		select {
		case <-time.After(pace):
		case <-r.Context().Done():
			return context.Cause(r.Context())
		}
		if _, err := fmt.Fprintf(w, "order %d", i); err != nil {
			return err
		}
	}
	return nil
}

// run serves until ctx ends, and then ends in peace.
func run(ctx context.Context, url, token string, out io.Writer) error {
	if token == "" {
		return errors.New("set TOKEN to the token of the consumers")
	}
	nc, err := nats.Connect(url, nats.Name("orders"), nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond))
	if err != nil {
		return err
	}
	defer nc.Close()
	server, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		return err
	}
	defer server.Close()
	if _, err := server.HandleQueue(subject, "orders", authorized(token, list)); err != nil {
		return err
	}
	if err := nc.Flush(); err != nil { // returns when NATS knows the subscription
		return err
	}
	fmt.Fprintln(out, "ready")
	select {
	case <-ctx.Done():
	case <-server.Done(): // the connection was closed for good
		return server.Err()
	}

	fmt.Fprintln(out, "draining", server.Stats().Streams, "streams")
	draining, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	if err := server.Drain(draining); err != nil {
		return fmt.Errorf("not all streams came to their ends within %v: %w", grace, err)
	}
	if err := nc.FlushWithContext(draining); err != nil {
		return err
	}
	fmt.Fprintln(out, "bye")
	return nil
}
