// Command chat is a stream in both directions: each side sends its lines and reads the lines of the other side at the
// same time, until both have half-closed.
//
//	go run ./examples/chat
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log"
	"os"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/examples/internal/local"
)

func main() {
	if err := run(context.Background(), os.Stdout); err != nil {
		log.Fatal(err)
	}
}

// side is one end of a chat. Its methods belong to a [stream.Stream] at one end, and to a [stream.Writer] and a
// [stream.Request] at the other.
type side struct {
	w    io.Writer
	done func() error // half-closes
	all  iter.Seq2[[]byte, error]
}

func consumerSide(s *stream.Stream) side { return side{s, s.CloseSend, s.All()} }

func producerSide(w *stream.Writer, r *stream.Request) side { return side{w, w.Close, r.All()} }

// talk sends all lines and half-closes. Meanwhile it reads the lines of the other side, and returns them when the other
// side has half-closed, too.
func (c side) talk(lines ...string) (heard []string, err error) {
	// The first line goes before the first read: a consumer that has written nothing when it reads the producer's end
	// has no stream left to write to.
	if _, err := io.WriteString(c.w, lines[0]); err != nil {
		return nil, err
	}
	said := make(chan error, 1)
	go func() { said <- c.say(lines[1:]) }()
	for line, err := range c.all {
		if err != nil {
			return heard, errors.Join(err, <-said) // an error that breaks the stream ends the writes as well
		}
		heard = append(heard, string(line))
	}
	return heard, <-said
}

func (c side) say(lines []string) error {
	for _, line := range lines {
		if _, err := io.WriteString(c.w, line); err != nil {
			return err
		}
	}
	return c.done()
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
	heardByBob := make(chan []string, 1)
	_, err = server.Handle("chat.bob", func(w *stream.Writer, r *stream.Request) error {
		heard, err := producerSide(w, r).talk("hello, this is Bob", "the build is green")
		heardByBob <- heard
		return err
	})
	if err != nil {
		return err
	}
	if err := producer.Flush(); err != nil { // returns when NATS knows the subscription
		return err
	}
	client, err := stream.NewClient(stream.ClientParams{Conn: consumer})
	if err != nil {
		return err
	}
	defer client.Close()

	s, err := client.Open(ctx, "chat.bob", nil)
	if err != nil {
		return err
	}
	defer s.Close()
	heardByAlice, err := consumerSide(s).talk("hello, this is Alice", "how is the build?", "bye")
	if err != nil {
		return err
	}
	for _, line := range heardByAlice {
		fmt.Fprintln(out, "Alice hears:", line)
	}
	for _, line := range <-heardByBob {
		fmt.Fprintln(out, "Bob hears:", line)
	}
	return server.Drain(ctx)
}
