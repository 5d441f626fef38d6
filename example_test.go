package stream_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strings"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// serveLogs answers every request on the subject "logs" with a stream of records.
func serveLogs(client *stream.Client) (*nats.Subscription, error) {
	return client.Conn.Subscribe("logs", func(request *nats.Msg) {
		w := client.NewWriter(request.Reply)
		go func() {
			for line := range 3 {
				if _, err := fmt.Fprintf(w, "%s: line %d", request.Data, line); err != nil {
					return // the consumer left
				}
			}
			w.Close()
		}()
	})
}

// printLog prints the records of one stream.
func printLog(ctx context.Context, client *stream.Client, job string) error {
	s, err := client.Open(ctx, "logs", []byte(job))
	if err != nil {
		return err
	}
	defer s.Close()
	for record, err := range s.All() {
		if err != nil {
			return err // the stream broke off: what came is not all there is
		}
		fmt.Printf("%s\n", record)
	}
	return nil
}

// connect stands for the nats.Connect of a program. The function that it returns ends everything.
func connect() (*stream.Client, func()) {
	server, err := streamtest.Start()
	if err != nil {
		log.Fatal(err)
	}
	nc, err := server.Dial()
	if err != nil {
		log.Fatal(err)
	}
	client, err := stream.NewClient(stream.ClientParams{Conn: nc})
	if err != nil {
		log.Fatal(err)
	}
	return client, func() {
		client.Close()
		nc.Close()
		server.Shutdown()
	}
}

// Both ends of a stream. Here they share one client; elsewhere each has its own.
func Example() {
	client, stop := connect()
	defer stop()
	if _, err := serveLogs(client); err != nil {
		log.Fatal(err)
	}
	if err := printLog(context.Background(), client, "job 17"); err != nil {
		log.Fatal(err)
	}
	// Output:
	// job 17: line 0
	// job 17: line 1
	// job 17: line 2
}

// The end of a stream tells how it ended: a producer that cannot serve a request closes with a code of its choice.
func ExampleCloseError() {
	client, stop := connect()
	defer stop()
	_, err := client.Conn.Subscribe("logs", func(request *nats.Msg) {
		_ = client.NewWriter(request.Reply).CloseWithCode(stream.CloseBadRequest, "no such job")
	})
	if err != nil {
		log.Fatal(err)
	}
	err = printLog(context.Background(), client, "job 18")
	fmt.Println(err)
	if closed, ok := errors.AsType[*stream.CloseError](err); ok {
		fmt.Println(closed.Code, closed.Text)
	}
	// Output:
	// nats stream: close 4000 (bad request): no such job
	// 4000 no such job
}

// A subject that nobody serves is noticed at once, without a timeout.
func ExampleClient_Open_noResponders() {
	client, stop := connect()
	defer stop()
	s, err := client.Open(context.Background(), "nobody.listens", []byte("hello"))
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	_, err = s.Recv()
	fmt.Println(errors.Is(err, nats.ErrNoResponders))
	// Output: true
}

// The records of a stream as one run of bytes: a Stream is an io.Reader and an io.WriterTo, a Writer is an io.Writer and
// an io.ReaderFrom, so io.Copy works at both ends.
func ExampleStream_WriteTo() {
	client, stop := connect()
	defer stop()
	_, err := client.Conn.Subscribe("files", func(request *nats.Msg) {
		w := client.NewWriter(request.Reply)
		go func() {
			if _, err := io.Copy(w, strings.NewReader("what a file holds\n")); err != nil {
				_ = w.CloseWithCode(stream.CloseInternalServerErr, "cannot read the file")
				return
			}
			w.Close()
		}()
	})
	if err != nil {
		log.Fatal(err)
	}
	s, err := client.Open(context.Background(), "files", nil)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	if _, err := io.Copy(os.Stdout, s); err != nil {
		log.Fatal(err)
	}
	// Output: what a file holds
}

type quote struct {
	Symbol string
	Price  float64
}

// serveQuotes writes objects. They travel as MessagePack or as JSON, as the consumer asked.
func serveQuotes(client *stream.Client) (*nats.Subscription, error) {
	return client.Conn.Subscribe("quotes", func(request *nats.Msg) {
		w := client.NewWriter(request.Reply)
		go func() {
			for _, q := range []quote{{"GOPH", 12.5}, {"NATS", 40}} {
				if _, err := w.WriteObject(q); err != nil {
					return
				}
			}
			w.Close()
		}()
	})
}

func ExampleStream_RecvObject() {
	client, stop := connect()
	defer stop()
	if _, err := serveQuotes(client); err != nil {
		log.Fatal(err)
	}
	s, err := client.Open(context.Background(), "quotes", nil)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	for {
		var q quote
		if err := s.RecvObject(&q); err == io.EOF {
			break
		} else if err != nil {
			log.Fatal(err)
		}
		fmt.Println(q.Symbol, q.Price)
	}
	// Output:
	// GOPH 12.5
	// NATS 40
}

// The channel of the original API. Its objects are JSON.
func ExampleClient_OpenStream() {
	client, stop := connect()
	defer stop()
	if _, err := serveQuotes(client); err != nil {
		log.Fatal(err)
	}
	// A consumer that may leave the channel early cancels the context; nothing else ends the stream then.
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	results, err := client.OpenStream(ctx, "quotes", nil)
	if err != nil {
		log.Fatal(err)
	}
	for result := range results {
		record, err := result.ValueOrError()
		if err != nil {
			log.Fatal(err)
		}
		var q quote
		if err := json.Unmarshal(record, &q); err != nil {
			log.Fatal(err)
		}
		fmt.Println(q.Symbol, q.Price)
	}
	// Output:
	// GOPH 12.5
	// NATS 40
}
