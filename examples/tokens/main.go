// Command tokens is a gateway to a language model. It has many slow streams of small objects open at the same time,
// through one client. It stops one of them in the middle while the others go on.
//
//	go run ./examples/tokens
package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/examples/internal/local"
)

const (
	prompts  = 50
	tokens   = 20 // of each answer
	enough   = 3  // tokens after which the user of one prompt presses stop
	endless  = "count to infinity"
	thinking = 2 * time.Millisecond // time for each token
)

func main() {
	if err := run(context.Background(), os.Stdout); err != nil {
		log.Fatal(err)
	}
}

// token is one record. It travels as MessagePack, or as JSON if the client requests that.
type token struct {
	Index int
	Text  string
}

// model answers prompts. It sends the cause on stopped if a consumer stops an answer.
type model struct{ stopped chan error }

// answer is the handler.
func (m *model) answer(w *stream.Writer, r *stream.Request) error {
	err := generate(r.Context(), w, string(r.Data))
	if r.Context().Err() != nil {
		m.stopped <- context.Cause(r.Context())
	}
	return err
}

// generate writes an answer, one token after the other.
func generate(ctx context.Context, w *stream.Writer, prompt string) error {
	for i := 0; i < tokens || prompt == endless; i++ {
		select {
		case <-time.After(thinking):
		case <-ctx.Done(): // compute no token that is not read
			return context.Cause(ctx)
		}
		if _, err := w.WriteObject(token{i, fmt.Sprintf("word%d ", i)}); err != nil {
			return err
		}
	}
	return nil
}

// ask returns how many tokens an answer has. It stops the answer after limit of them; 0 is no limit.
func ask(ctx context.Context, client *stream.Client, prompt string, limit int) (n int, err error) {
	s, err := client.Open(ctx, "model", []byte(prompt))
	if err != nil {
		return 0, err
	}
	defer s.Close() // before the end of the stream, this stops the producer
	for ; limit == 0 || n < limit; n++ {
		var t token
		if err := s.RecvObject(&t); err == io.EOF {
			return n, nil // the whole answer
		} else if err != nil {
			return n, err
		}
		if t.Index != n {
			return n, fmt.Errorf("%q: token %d came as number %d", prompt, t.Index, n)
		}
	}
	return n, nil
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
	m := &model{stopped: make(chan error, prompts+1)}
	if _, err := server.Handle("model", m.answer); err != nil {
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

	counts, errs := make([]int, prompts), make([]error, prompts)
	var asking sync.WaitGroup
	for i := range prompts {
		asking.Go(func() { counts[i], errs[i] = ask(ctx, client, "prompt "+strconv.Itoa(i), 0) })
	}
	n, err := ask(ctx, client, endless, enough)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "one answer stopped after %d tokens; the model heard: %v\n", n, <-m.stopped)

	asking.Wait()
	total := 0
	for i, err := range errs {
		if err != nil {
			return err
		}
		total += counts[i]
	}
	fmt.Fprintf(out, "%d answers came whole, %d tokens\n", prompts, total)
	return server.Drain(ctx)
}
