// Command sse is a gateway from HTTP to a language model: each POST opens a stream, and its records become server-sent
// events. An error before the first token becomes a status of HTTP. A browser that goes away stops the model.
//
//	go run ./examples/sse
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/examples/internal/local"
)

const (
	subject    = "model.chat"
	maxPrompt  = 64 << 10             // bytes of the body of a POST
	firstToken = 30 * time.Second     // time for the model to begin
	thinking   = 2 * time.Millisecond // time for each token
)

func main() {
	if err := run(context.Background(), os.Stdout); err != nil {
		log.Fatal(err)
	}
}

// gateway is an http.Handler.
type gateway struct{ client *stream.Client }

func (g *gateway) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		http.Error(w, "POST a prompt", http.StatusMethodNotAllowed)
		return
	}
	prompt, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxPrompt))
	if err != nil {
		http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
		return
	}
	// The context of the request ends when the browser goes away, and takes the stream and the producer's context with
	// it.
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	begin := time.AfterFunc(firstToken, cancel)
	s, err := g.client.Open(ctx, subject, prompt)
	if err != nil {
		fail(w, err)
		return
	}
	defer s.Close()
	// Nothing is sent before the first record: until then, a status of HTTP can tell the failure.
	record, err := s.Recv()
	if !begin.Stop() && r.Context().Err() == nil {
		err = context.DeadlineExceeded
	}
	if err != nil && err != io.EOF {
		fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	flush := http.NewResponseController(w)
	for ; err == nil; record, err = s.Recv() {
		if _, err := fmt.Fprintf(w, "data: %s\n\n", record); err != nil {
			return // the browser went away
		}
		if err := flush.Flush(); err != nil {
			return
		}
	}
	// The answer is whole only with this last event.
	if err == io.EOF {
		fmt.Fprint(w, "event: done\ndata: {}\n\n")
		return
	}
	fmt.Fprintf(w, "event: error\ndata: {\"status\":%d}\n\n", statusOf(err))
}

// fail answers with the status for err. Texts of producers may name internals, so they are logged and not sent.
func fail(w http.ResponseWriter, err error) {
	status := statusOf(err)
	if status == http.StatusTooManyRequests {
		w.Header().Set("Retry-After", "1")
	}
	http.Error(w, http.StatusText(status), status)
}

// statusOf returns the status of HTTP for the error of a stream.
func statusOf(err error) int {
	switch {
	case errors.Is(err, nats.ErrNoResponders):
		return http.StatusServiceUnavailable
	case errors.Is(err, context.DeadlineExceeded):
		return http.StatusGatewayTimeout
	}
	end, ok := errors.AsType[*stream.CloseError](err)
	if !ok {
		return http.StatusBadGateway
	}
	switch end.Code {
	case stream.CloseBadRequest:
		return http.StatusBadRequest
	case stream.CloseMessageTooBig:
		return http.StatusRequestEntityTooLarge
	case stream.CloseTryAgainLater:
		return http.StatusTooManyRequests
	case stream.CloseGoingAway:
		return http.StatusServiceUnavailable
	case stream.CloseDeadlineExceeded:
		return http.StatusGatewayTimeout
	case stream.CloseInternalServerErr:
		return http.StatusInternalServerError
	}
	return http.StatusBadGateway
}

// token is one record.
type token struct {
	Index int    `json:"index"`
	Text  string `json:"text"`
}

// model answers prompts. It sends the cause on stopped if an answer is stopped.
type model struct{ stopped chan error }

// answer is the handler. Records are JSON, because the gateway passes them on unchanged.
func (m *model) answer(w *stream.Writer, r *stream.Request) error {
	var prompt struct {
		Tokens int `json:"tokens"`
	}
	if err := json.Unmarshal(r.Data, &prompt); err != nil || prompt.Tokens < 1 {
		return &stream.CloseError{Code: stream.CloseBadRequest, Text: `send {"tokens":10}`}
	}
	for i := range prompt.Tokens {
		select {
		case <-time.After(thinking):
		case <-r.Context().Done(): // compute no token that nobody reads
			m.stopped <- context.Cause(r.Context())
			return context.Cause(r.Context())
		}
		record, err := json.Marshal(token{i, fmt.Sprintf("word%d ", i)})
		if err != nil {
			return err
		}
		if _, err := w.Write(record); err != nil {
			m.stopped <- err
			return err
		}
	}
	return nil
}

func run(ctx context.Context, out io.Writer) error {
	producer, consumer, stop, err := local.Connect()
	if err != nil {
		return err
	}
	defer stop()
	client, err := stream.NewClient(stream.ClientParams{Conn: consumer})
	if err != nil {
		return err
	}
	defer client.Close()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	web := &http.Server{Handler: &gateway{client}}
	go func() { _ = web.Serve(listener) }()
	defer web.Close()
	url := "http://" + listener.Addr().String()

	status, _, err := post(ctx, url, `{"tokens":3}`)
	if err != nil {
		return err
	}
	fmt.Fprintln(out, "without a model:", status)

	server, err := stream.NewServer(stream.ServerParams{Conn: producer})
	if err != nil {
		return err
	}
	defer server.Close()
	m := &model{stopped: make(chan error, 1)}
	if _, err := server.HandleQueue(subject, "models", m.answer); err != nil {
		return err
	}
	if err := producer.Flush(); err != nil { // returns when NATS knows the subscription
		return err
	}
	for _, prompt := range []string{"nonsense", `{"tokens":3}`} {
		status, body, err := post(ctx, url, prompt)
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "%s: %s, events %q\n", prompt, status, events(body))
	}

	// A browser that reads two events of an endless answer and goes away.
	leaving, leave := context.WithCancel(ctx)
	defer leave()
	request, err := http.NewRequestWithContext(leaving, http.MethodPost, url, strings.NewReader(`{"tokens":1000000}`))
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	lines := bufio.NewScanner(response.Body)
	for n := 0; n < 2 && lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "data:") {
			n++
		}
	}
	leave()
	fmt.Fprintln(out, "the browser left; the model heard:", <-m.stopped)
	http.DefaultClient.CloseIdleConnections()
	return server.Drain(ctx)
}

// post returns the status and the body of an answer.
func post(ctx context.Context, url, prompt string) (status, body string, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(prompt))
	if err != nil {
		return "", "", err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", "", err
	}
	defer response.Body.Close()
	b, err := io.ReadAll(response.Body)
	return response.Status, string(b), err
}

// events returns the data of the events in a body, and the names of those that have one.
func events(body string) (all []string) {
	for line := range strings.Lines(body) {
		if field, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ": "); ok && (field == "event" || field == "data") {
			all = append(all, value)
		}
	}
	return all
}
