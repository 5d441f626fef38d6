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
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// serveLogs answers every request on the subject "logs" with a stream of records.
func serveLogs(server *stream.Server) error {
	_, err := server.Handle("logs", func(w *stream.Writer, r *stream.Request) error {
		for line := range 3 {
			if _, err := fmt.Fprintf(w, "%s: line %d", r.Data, line); err != nil {
				return err // the consumer left
			}
		}
		return nil // the stream ends: the consumer has everything
	})
	return err
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
			return err // the stream broke off: the records are incomplete
		}
		fmt.Printf("%s\n", record)
	}
	return nil
}

// connect makes both ends of streams on one connection. The function that it returns closes them.
func connect() (*stream.Client, *stream.Server, func()) {
	nc, err := nats.Connect(nats.DefaultURL)
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
	}
}

// Both ends of a stream. Here they share one connection; elsewhere each has its own.
func Example() {
	client, server, stop := connect()
	defer stop()
	if err := serveLogs(server); err != nil {
		log.Fatal(err)
	}
	if err := printLog(context.Background(), client, "job 17"); err != nil {
		log.Fatal(err)
	}
	// Prints:
	// job 17: line 0
	// job 17: line 1
	// job 17: line 2
}

// The error of the last read tells how the stream ended: the reader gets the code and text that the handler returned.
func ExampleCloseError() {
	client, server, stop := connect()
	defer stop()
	_, err := server.Handle("logs", func(*stream.Writer, *stream.Request) error {
		return &stream.CloseError{Code: stream.CloseBadRequest, Text: "no such job"}
	})
	if err != nil {
		log.Fatal(err)
	}
	err = printLog(context.Background(), client, "job 18")
	fmt.Println(err)
	if closed, ok := errors.AsType[*stream.CloseError](err); ok {
		fmt.Println(closed.Code, closed.Text)
	}
	// Prints:
	// nats stream: close 4000 (bad request): no such job
	// 4000 no such job
}

// Records in both directions: the consumer sends numbers, the handler answers with their sum so far. Each side closes
// its own direction.
func ExampleStream_Write() {
	client, server, stop := connect()
	defer stop()
	_, err := server.Handle("sum", func(w *stream.Writer, r *stream.Request) error {
		sum := 0
		for {
			var n int
			if err := r.RecvObject(&n); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
			sum += n
			if _, err := w.WriteObject(sum); err != nil {
				return err
			}
		}
	})
	if err != nil {
		log.Fatal(err)
	}
	s, err := client.Open(context.Background(), "sum", nil)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	for _, n := range []int{1, 20, 300} {
		if _, err := s.WriteObject(n); err != nil {
			log.Fatal(err)
		}
	}
	if err := s.CloseSend(); err != nil {
		log.Fatal(err)
	}
	for {
		var sum int
		if err := s.RecvObject(&sum); err == io.EOF {
			break
		} else if err != nil {
			log.Fatal(err)
		}
		fmt.Println(sum)
	}
	// Prints:
	// 1
	// 21
	// 321
}

// The original API: a writer made from the reply subject of a request that the program received itself.
func ExampleNewWriter() {
	client, _, stop := connect()
	defer stop()
	_, err := client.Conn.Subscribe("logs", func(request *nats.Msg) {
		w := stream.NewWriter(client, request.Reply)
		go func() { // a callback must not wait for a consumer
			if _, err := fmt.Fprintf(w, "%s: done", request.Data); err != nil {
				return // the consumer left
			}
			w.Close()
		}()
	})
	if err != nil {
		log.Fatal(err)
	}
	if err := printLog(context.Background(), client, "job 19"); err != nil {
		log.Fatal(err)
	}
	// Prints: job 19: done
}

// A subject that nobody serves is noticed at once, without a timeout.
func ExampleClient_Open_noResponders() {
	client, _, stop := connect()
	defer stop()
	s, err := client.Open(context.Background(), "nobody.listens", []byte("hello"))
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	_, err = s.Recv()
	fmt.Println(errors.Is(err, nats.ErrNoResponders))
	// Prints: true
}

// Each server that handles a subject outside a queue group answers with a stream of its own. All answer here, so the
// third one ends the wait for more. The minimum makes it an error if one is missing.
func ExampleClient_OpenMany() {
	client, server, stop := connect()
	defer stop()
	for _, stock := range []string{"Bern: 3", "Oslo: 8", "Rome: 5"} { // in one program here; most often there are many
		if _, err := server.Handle("stock", func(w *stream.Writer, r *stream.Request) error {
			_, err := fmt.Fprintf(w, "%s %s", stock, r.Data)
			return err
		}); err != nil {
			log.Fatal(err)
		}
	}

	r, err := client.OpenMany(context.Background(), "stock", []byte("bicycles"),
		stream.WithMinResponders(3), stream.WithMaxResponders(3), stream.WithStallTimeout(10*time.Second))
	if err != nil {
		log.Fatal(err)
	}
	defer r.Close()
	for s, err := range r.All() {
		if err != nil {
			log.Fatal(err) // too few have answered
		}
		for record, err := range s.All() {
			if err != nil {
				log.Fatal(err) // this one broke off, and the others go on
			}
			fmt.Printf("%s\n", record)
		}
	}
	// Prints in any order:
	// Bern: 3 bicycles
	// Oslo: 8 bicycles
	// Rome: 5 bicycles
}

// A request that surely reached no handler, because nobody serves its subject or all servers are full, can be sent
// again.
func ExampleWithRetry() {
	client, server, stop := connect()
	defer stop()
	go func() { // a server that starts late
		time.Sleep(100 * time.Millisecond)
		if err := serveLogs(server); err != nil {
			log.Fatal(err)
		}
	}()
	s, err := client.Open(context.Background(), "logs", []byte("job 20"), stream.WithRetry(stream.Retry{Attempts: 100}))
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	line, err := s.Recv()
	fmt.Printf("%s %v\n", line, err)
	// Prints: job 20: line 0 <nil>
}

// Interceptors run code around every handler and around every Open: here they carry the name of a user.
func Example_interceptors() {
	type userKey struct{}
	identify := func(next stream.Handler) stream.Handler {
		return func(w *stream.Writer, r *stream.Request) error {
			user := r.Header.Get("User")
			if user == "" {
				return &stream.CloseError{Code: stream.CloseBadRequest, Text: "say who you are"}
			}
			return next(w, r.WithContext(context.WithValue(r.Context(), userKey{}, user)))
		}
	}
	introduce := func(next stream.OpenFunc) stream.OpenFunc {
		return func(ctx context.Context, msg *nats.Msg, opts ...stream.OpenOption) (*stream.Stream, error) {
			msg.Header.Set("User", "gopher")
			return next(ctx, msg, opts...)
		}
	}
	other, _, stop := connect()
	defer stop()
	nc := other.Conn
	server, err := stream.NewServer(stream.ServerParams{Conn: nc, Interceptors: []func(stream.Handler) stream.Handler{identify}})
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()
	client, err := stream.NewClient(stream.ClientParams{Conn: nc, Interceptors: []func(stream.OpenFunc) stream.OpenFunc{introduce}})
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	_, err = server.Handle("greeting", func(w *stream.Writer, r *stream.Request) error {
		_, err := fmt.Fprintf(w, "hello, %s", r.Context().Value(userKey{}))
		return err
	})
	if err != nil {
		log.Fatal(err)
	}
	s, err := client.Open(context.Background(), "greeting", nil)
	if err != nil {
		log.Fatal(err)
	}
	for record, err := range s.All() {
		fmt.Printf("%s %v\n", record, err)
	}
	// Prints: hello, gopher <nil>
}

// Hooks see every stream of a client or server, here for an access log.
func ExampleHooks() {
	other, _, stop := connect()
	defer stop()
	server, err := stream.NewServer(stream.ServerParams{Conn: other.Conn, Hooks: stream.Hooks{
		Closed: func(info stream.StreamInfo, totals stream.Totals, err error) {
			fmt.Println(info.Subject, "records:", totals.RecordsOut, "error:", err)
		},
	}})
	if err != nil {
		log.Fatal(err)
	}
	if err := serveLogs(server); err != nil {
		log.Fatal(err)
	}
	if err := printLog(context.Background(), other, "job 21"); err != nil {
		log.Fatal(err)
	}
	server.Drain(context.Background())
	// Prints:
	// job 21: line 0
	// job 21: line 1
	// job 21: line 2
	// logs records: 3 error: <nil>
}

// The progress of an upload is what the other end has acknowledged.
func ExampleStream_Totals() {
	client, server, stop := connect()
	defer stop()
	_, err := server.Handle("upload", func(w *stream.Writer, r *stream.Request) error {
		_, err := io.Copy(io.Discard, r)
		return err
	})
	if err != nil {
		log.Fatal(err)
	}
	s, err := client.Open(context.Background(), "upload", nil)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	for range 10 {
		if _, err := s.Write(make([]byte, 100)); err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println(s.Totals().BytesOut, "bytes written")
	if err := s.Sync(context.Background()); err != nil {
		log.Fatal(err)
	}
	fmt.Println(s.Totals().BytesAcked, "bytes arrived")
	// Prints:
	// 1000 bytes written
	// 1000 bytes arrived
}

// A reader that has to do something else from time to time sets a deadline. The stream goes on afterwards.
func ExampleStream_SetReadDeadline() {
	client, server, stop := connect()
	defer stop()
	asked := make(chan struct{})
	_, err := server.Handle("slow", func(w *stream.Writer, r *stream.Request) error {
		<-asked
		_, err := fmt.Fprint(w, "at last")
		return err
	})
	if err != nil {
		log.Fatal(err)
	}
	s, err := client.Open(context.Background(), "slow", nil)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	_ = s.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	_, err = s.Recv()
	fmt.Println(errors.Is(err, os.ErrDeadlineExceeded))

	close(asked)
	_ = s.SetReadDeadline(time.Time{}) // none
	record, err := s.Recv()
	fmt.Printf("%s %v\n", record, err)
	// Prints:
	// true
	// at last <nil>
}

// A chat room must not wait for its slowest member: who is behind by a whole window misses a message.
func ExampleWriter_TryWrite() {
	client, server, stop := connect()
	defer stop()
	behind := make(chan struct{})
	_, err := server.Handle("room", func(w *stream.Writer, r *stream.Request) error {
		defer close(behind)
		sent := 0
		for {
			ok, err := w.TryWrite(make([]byte, 1000))
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			sent++
		}
		fmt.Println("some were sent:", sent > 0)
		return nil
	})
	if err != nil {
		log.Fatal(err)
	}
	s, err := client.Open(context.Background(), "room", nil)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	<-behind // this member reads nothing until then
	for _, err = range s.All() {
	}
	fmt.Println(err)
	// Prints:
	// some were sent: true
	// <nil>
}

// Records that are at hand are handled together: what they lead to is written out when no further record is at hand.
func ExampleRequest_Ready() {
	client, server, stop := connect()
	defer stop()
	_, err := server.Handle("sum", func(w *stream.Writer, r *stream.Request) error {
		sum := 0
		for record, err := range r.All() {
			if err != nil {
				return err
			}
			sum += len(record)
			if !r.Ready() {
				if err := w.Flush(); err != nil {
					return err
				}
			}
		}
		_, err := fmt.Fprint(w, sum)
		return err
	})
	if err != nil {
		log.Fatal(err)
	}
	s, err := client.Open(context.Background(), "sum", nil)
	if err != nil {
		log.Fatal(err)
	}
	defer s.Close()
	for range 10 {
		if _, err := s.Write([]byte("record")); err != nil {
			log.Fatal(err)
		}
	}
	if err := s.CloseSend(); err != nil {
		log.Fatal(err)
	}
	sum, err := s.Recv()
	fmt.Printf("%s %v\n", sum, err)
	// Prints: 60 <nil>
}

// shutdown ends the streams of a program, and then its connection. The program may exit right after.
func shutdown(ctx context.Context, server *stream.Server, client *stream.Client, nc *nats.Conn) error {
	err := server.Drain(ctx) // until ctx ends, handlers may finish
	client.Close()           // after the handlers, which may use it
	nc.Close()               // last, because streams need it to end
	return err
}

// How to end a program: first the server, then the client, then the connection. A handler without an end of its own
// returns when its server drains.
func Example_shutdown() {
	client, server, stop := connect()
	defer stop()
	_, err := server.Handle("news", func(w *stream.Writer, r *stream.Request) error {
		if _, err := fmt.Fprint(w, "nothing new"); err != nil {
			return err
		}
		select {
		case <-r.Draining():
			return &stream.CloseError{Code: stream.CloseGoingAway, Text: "come back later"}
		case <-r.Context().Done():
			return context.Cause(r.Context())
		}
	})
	if err != nil {
		log.Fatal(err)
	}
	s, err := client.Open(context.Background(), "news", nil)
	if err != nil {
		log.Fatal(err)
	}
	news, err := s.Recv()
	fmt.Printf("%s %v\n", news, err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, err := s.Recv()
		fmt.Println(err)
	}()

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	err = shutdown(ctx, server, client, client.Conn)
	<-ended
	fmt.Println(err)
	// Prints:
	// nothing new <nil>
	// nats stream: close 1001 (going away): come back later
	// <nil>
}

// The records of a stream as one run of bytes: a Stream is an io.Reader and an io.WriterTo, a Writer is an io.Writer
// and an io.ReaderFrom, so io.Copy works at both ends.
func ExampleStream_WriteTo() {
	client, server, stop := connect()
	defer stop()
	_, err := server.Handle("files", func(w *stream.Writer, _ *stream.Request) error {
		_, err := io.Copy(w, strings.NewReader("what a file holds\n"))
		return err
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
	// Prints: what a file holds
}

type quote struct {
	Symbol string
	Price  float64
}

// serveQuotes writes objects. They travel as MessagePack or as JSON, as the consumer asked.
func serveQuotes(server *stream.Server) error {
	_, err := server.Handle("quotes", func(w *stream.Writer, _ *stream.Request) error {
		for _, q := range []quote{{"GOPH", 12.5}, {"NATS", 40}} {
			if _, err := w.WriteObject(q); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

func ExampleStream_RecvObject() {
	client, server, stop := connect()
	defer stop()
	if err := serveQuotes(server); err != nil {
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
	// Prints:
	// GOPH 12.5
	// NATS 40
}

// A service that "nats service ls" shows.
func ExampleServer_AddService() {
	_ = func(server *stream.Server, quotes stream.Handler) error {
		service, err := server.AddService("prices", "1.0.0", "tells prices", nil)
		if err != nil {
			return err
		}
		_, err = service.Handle("quotes", "prices.quotes", quotes)
		return err
	}
}

// The channel of the original API. Its objects are JSON.
func ExampleClient_OpenStream() {
	client, server, stop := connect()
	defer stop()
	if err := serveQuotes(server); err != nil {
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
	// Prints:
	// GOPH 12.5
	// NATS 40
}
