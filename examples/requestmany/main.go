// Command requestmany shows how to replace request-many by a stream. With request-many, one request has many replies on
// an inbox, and a timeout decides that all have arrived. The command fetches the same answer, which pauses once, in
// both ways.
//
//	go run ./examples/requestmany
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/examples/internal/local"
)

const (
	replies = 5                     // of the whole answer
	stall   = 50 * time.Millisecond // time without a reply that request-many takes for the end
)

func main() {
	if err := run(context.Background(), os.Stdout); err != nil {
		log.Fatal(err)
	}
}

// answer sends the replies. It pauses in the middle, as a database or a network may.
func answer(send func(reply string) error, hesitate func()) error {
	for i := range replies {
		if i == 3 {
			hesitate()
		}
		if err := send(fmt.Sprintf("reply %d", i)); err != nil {
			return err
		}
	}
	return nil
}

// serveBefore publishes each reply on the inbox of the request. Nothing holds it back if the requester is slow. If the
// requester has left, it does not notice, and publishes to the end.
func serveBefore(nc *nats.Conn, hesitate func()) error {
	_, err := nc.Subscribe("before", func(m *nats.Msg) {
		if err := answer(func(reply string) error { return m.Respond([]byte(reply)) }, hesitate); err != nil {
			log.Print(err)
		}
	})
	return err
}

// fetchBefore collects replies until none has come for a while, as orbit.go's natsext.RequestMany does with its stall
// option. A nil error does not mean that the answer is complete. The timeout is the only sign of the end, so a slow
// producer, a dead producer and a lost message all look like a complete answer. A longer timeout delays every answer.
func fetchBefore(nc *nats.Conn) (got []string, err error) {
	inbox := nc.NewInbox()
	sub, err := nc.SubscribeSync(inbox)
	if err != nil {
		return nil, err
	}
	defer sub.Unsubscribe()
	if err := nc.PublishRequest("before", inbox, nil); err != nil {
		return nil, err
	}
	for {
		m, err := sub.NextMsg(stall)
		if errors.Is(err, nats.ErrTimeout) {
			return got, nil // perhaps the end
		}
		if err != nil {
			return got, err
		}
		got = append(got, string(m.Data))
	}
}

// serveAfter writes each reply to the stream. Write waits while the requester is slower. It fails when the requester
// has left, and the handler ends. The result of the handler is the end of the stream for the requester.
func serveAfter(server *stream.Server, hesitate func()) error {
	_, err := server.Handle("after", func(w *stream.Writer, _ *stream.Request) error {
		return answer(func(reply string) error { _, err := w.Write([]byte(reply)); return err }, hesitate)
	})
	return err
}

// fetchAfter collects replies until the producer ends the stream. A nil error means that the answer is complete: a lost
// reply is retransmitted, or ends the stream with an error. ctx bounds the time for all replies. fetchAfter returns as
// soon as the last one has arrived.
func fetchAfter(ctx context.Context, client *stream.Client) (got []string, err error) {
	s, err := client.Open(ctx, "after", nil)
	if err != nil {
		return nil, err
	}
	defer s.Close() // an early return cancels the producer
	for reply, err := range s.All() {
		if err != nil {
			return got, err
		}
		got = append(got, string(reply))
	}
	return got, nil
}

func run(ctx context.Context, out io.Writer) error {
	producer, consumer, stop, err := local.Connect()
	if err != nil {
		return err
	}
	defer stop()
	server, err := stream.NewServer(stream.ServerParams{Conn: producer})
	if err != nil {
		return err
	}
	defer server.Close()
	gaveUp := make(chan struct{}) // closed when the requester of the first answer gave up; its producer pauses until then
	if err := serveBefore(producer, func() { <-gaveUp }); err != nil {
		return err
	}
	if err := serveAfter(server, func() { time.Sleep(2 * stall) }); err != nil {
		return err
	}
	if err := producer.Flush(); err != nil { // returns when NATS knows the subscriptions
		return err
	}
	client, err := stream.NewClient(stream.ClientParams{Conn: consumer})
	if err != nil {
		return err
	}
	defer client.Close()

	got, err := fetchBefore(consumer)
	close(gaveUp)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "request-many: %d of %d replies, and no error\n", len(got), replies)
	if got, err = fetchAfter(ctx, client); err != nil {
		return err
	}
	fmt.Fprintf(out, "stream: %d of %d replies, and the end is known\n", len(got), replies)
	return server.Drain(ctx)
}
