// Command joblog follows the log of a running job from another machine, as tail -f does. Each line travels when the job
// writes it. The producer stops reading the file when the consumer cancels.
//
//	go run ./examples/joblog
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"time"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/examples/internal/local"
)

// pollEvery is the interval at which the end of a log is read again.
const pollEvery = 20 * time.Millisecond

func main() {
	if err := run(context.Background(), os.Stdout); err != nil {
		log.Fatal(err)
	}
}

// logs serves the logs of jobs.
type logs struct {
	files map[string]string // path by the name of the job; no other file is ever opened
	left  chan error        // the cause of the end of each stream
}

// follow is the handler. It sends the present and later lines of a log, until the consumer leaves or the server drains.
func (l *logs) follow(w *stream.Writer, r *stream.Request) error {
	// Input from the network is used as a key, never as a path or a part of one.
	path, ok := l.files[string(r.Data)]
	if !ok {
		return &stream.CloseError{Code: stream.CloseBadRequest, Text: fmt.Sprintf("no job named %.60q", r.Data)}
	}
	f, err := os.Open(path)
	if err != nil {
		log.Print(err) // not in the close reason, because the consumer must not see paths
		return errors.New("the log cannot be opened")
	}
	defer f.Close()

	err = sendLines(r, w, f)
	l.left <- context.Cause(r.Context())
	return err
}

// sendLines writes each line of f as one record, and waits for more at the end of the file.
func sendLines(r *stream.Request, w io.Writer, f io.Reader) error {
	lines := bufio.NewReader(f)
	var line []byte // the part of the line that the job has written
	for {
		part, err := lines.ReadBytes('\n')
		line = append(line, part...)
		switch {
		case err == nil:
			if _, err := w.Write(line); err != nil {
				return err // the consumer left
			}
			line = line[:0]
		case err != io.EOF:
			return err
		default:
			select {
			case <-time.After(pollEvery):
			case <-r.Context().Done():
				return context.Cause(r.Context())
			case <-r.Draining(): // otherwise Drain waits until its own context ends
				return &stream.CloseError{Code: stream.CloseGoingAway, Text: "the log goes on, this server does not"}
			}
		}
	}
}

func run(ctx context.Context, out io.Writer) error {
	producer, consumer, stop, err := local.Connect()
	if err != nil {
		return err
	}
	defer stop()
	dir, err := os.MkdirTemp("", "joblog")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	job, err := os.Create(filepath.Join(dir, "build.log"))
	if err != nil {
		return err
	}
	defer job.Close()

	server, err := stream.NewServer(stream.ServerParams{Conn: producer})
	if err != nil {
		return err
	}
	defer server.Close()
	l := &logs{files: map[string]string{"build": job.Name()}, left: make(chan error, 1)}
	if _, err := server.Handle("logs", l.follow); err != nil {
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

	// A name that is not on the list opens no file.
	refused, err := client.Open(ctx, "logs", []byte("../build.log"))
	if err != nil {
		return err
	}
	_, err = refused.Recv()
	fmt.Fprintln(out, "consumer:", err)

	tailing, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := client.Open(tailing, "logs", []byte("build"))
	if err != nil {
		return err
	}
	for _, step := range []string{"fetch", "compile", "test"} {
		if _, err := fmt.Fprintln(job, step); err != nil { // the job writes its next line
			return err
		}
		line, err := s.Recv()
		if err != nil {
			return err
		}
		fmt.Fprintf(out, "consumer: %s", line)
	}
	cancel() // ends the stream at both ends
	_, err = s.Recv()
	fmt.Fprintln(out, "consumer:", err)
	fmt.Fprintln(out, "producer:", <-l.left)
	return server.Drain(ctx)
}
