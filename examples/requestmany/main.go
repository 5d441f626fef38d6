// Command requestmany shows how to come from request-many, where one request has many replies on an inbox and a timeout
// says that they are all there, to a stream. The same answer, which hesitates once on its way, is fetched both ways.
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
	stall   = 50 * time.Millisecond // without a reply: the old way takes that for the end
)

func main() {
	if err := run(context.Background(), os.Stdout); err != nil {
		log.Fatal(err)
	}
}

// answer sends the replies, and hesitates in the middle, as a database does, or a garbage collector, or a network.
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

// serveBefore publishes each reply on the inbox of the request. Nothing holds it back when the requester is slow, and
// nothing tells it that the requester has gone: it publishes to the end, for nobody.
func serveBefore(nc *nats.Conn, hesitate func()) error {
	_, err := nc.Subscribe("before", func(m *nats.Msg) {
		if err := answer(func(reply string) error { return m.Respond([]byte(reply)) }, hesitate); err != nil {
			log.Print(err)
		}
	})
	return err
}

// fetchBefore collects replies until none has come for a while, as orbit.go's natsext.RequestMany with its stall option
// does. A nil error does not mean that the answer is whole: a timeout is the only end there is, so a slow producer, one that
// died and a message that was lost all look like an answer that is complete. A longer timeout makes every answer wait.
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
			return got, nil // the end? nobody knows
		}
		if err != nil {
			return got, err
		}
		got = append(got, string(m.Data))
	}
}

// serveAfter writes each reply to the stream. Write waits while the requester is slower, and fails when it has gone, and
// then the handler ends. Its return is the end that the requester sees.
func serveAfter(server *stream.Server, hesitate func()) error {
	_, err := server.Handle("after", func(w *stream.Writer, _ *stream.Request) error {
		return answer(func(reply string) error { _, err := w.Write([]byte(reply)); return err }, hesitate)
	})
	return err
}

// fetchAfter collects replies until the producer says that there are no more. A nil error means that the answer is whole; a
// lost reply is retransmitted, or ends the stream with an error. ctx bounds the time for all replies; fetchAfter returns
// as soon as the last one has arrived.
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
	gaveUp := make(chan struct{}) // the first producer hesitates until its requester has lost patience
	if err := serveBefore(producer, func() { <-gaveUp }); err != nil {
		return err
	}
	if err := serveAfter(server, func() { time.Sleep(2 * stall) }); err != nil {
		return err
	}
	if err := producer.Flush(); err != nil { // NATS knows the subscriptions now
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
