// Command resume uploads a file that survives the death of either end. The server says how much of the file is on its
// disk, before the upload and during it. A client that starts again sends the rest only.
//
//	go run ./examples/resume -serve DIR -url nats://127.0.0.1:4222
//	go run ./examples/resume -url nats://127.0.0.1:4222 FILE
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

func main() {
	url := flag.String("url", nats.DefaultURL, "address of the NATS server")
	dir := flag.String("serve", "", "receive files into this `folder`")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx, *url, *dir, flag.Args(), os.Stdout); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context, url, dir string, files []string, out io.Writer) error {
	if (dir == "") == (len(files) == 0) {
		return errors.New("name a folder to serve, or files to upload")
	}
	nc, err := nats.Connect(url, nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond))
	if err != nil {
		return err
	}
	defer nc.Close()
	if dir != "" {
		return serve(ctx, nc, dir, out)
	}
	client, err := stream.NewClient(stream.ClientParams{Conn: nc})
	if err != nil {
		return err
	}
	defer client.Close()
	for _, file := range files {
		sent, err := upload(ctx, client, file, func(p progress) { fmt.Fprintf(out, "%s: %d bytes are stored\n", filepath.Base(file), p.Stored) })
		if err != nil {
			return fmt.Errorf("%s: %w; run the command again to send the rest", file, err)
		}
		fmt.Fprintf(out, "%s: whole, %d bytes were sent\n", filepath.Base(file), sent)
	}
	return nil
}

const subject = "files.put"

// announcement is the request.
type announcement struct {
	Name string
	Size int64
}

// progress is a record of the server: first what it has, then what it has on its disk meanwhile, and at the end that
// the file is whole.
type progress struct {
	Stored int64
	Whole  bool
}

// upload sends the part of a file that the server does not have, and calls report for each progress. It returns how
// many bytes it sent.
func upload(ctx context.Context, client *stream.Client, file string, report func(progress)) (sent int64, err error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	request, err := json.Marshal(announcement{filepath.Base(file), info.Size()})
	if err != nil {
		return 0, err
	}
	s, err := client.Open(ctx, subject, request)
	if err != nil {
		return 0, err
	}
	defer s.Close() // an upload that was not completed ends with an error at the server
	var p progress
	if err := s.RecvObject(&p); err != nil {
		return 0, err
	}
	if _, err := f.Seek(p.Stored, io.SeekStart); err != nil {
		return 0, err
	}
	copied := make(chan error, 1)
	go func() { // the progress comes back while the file is sent
		var err error
		if sent, err = io.Copy(s, f); err == nil {
			err = s.CloseSend()
		}
		copied <- err
	}()
	for err == nil && !p.Whole {
		report(p)
		p = progress{}
		err = s.RecvObject(&p)
	}
	_ = s.Close() // ends the copy, if it goes on
	if copyErr := <-copied; err == nil {
		err = copyErr
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF // the server left out the last progress
	}
	return sent, err
}

// serve receives files until ctx ends.
func serve(ctx context.Context, nc *nats.Conn, dir string, out io.Writer) error {
	server, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		return err
	}
	defer server.Close()
	d := &store{dir: dir, busy: make(chan map[string]bool, 1)}
	d.busy <- map[string]bool{}
	if _, err := server.Handle(subject, d.put); err != nil {
		return err
	}
	if err := nc.Flush(); err != nil { // returns when NATS knows the subscription
		return err
	}
	fmt.Fprintln(out, "ready")
	<-ctx.Done()
	draining, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return server.Drain(draining)
}

// store keeps files in a folder. A file that is not whole has the suffix .part.
type store struct {
	dir  string
	busy chan map[string]bool // the names of uploads that run; holds one value
}

// begin reports whether no other upload of the name runs.
func (d *store) begin(name string) bool {
	busy := <-d.busy
	defer func() { d.busy <- busy }()
	if busy[name] {
		return false
	}
	busy[name] = true
	return true
}

func (d *store) end(name string) {
	busy := <-d.busy
	delete(busy, name)
	d.busy <- busy
}

// synced is how many bytes are received between two progresses.
const synced = 1 << 20

// put is the handler.
func (d *store) put(w *stream.Writer, r *stream.Request) error {
	var a announcement
	if err := json.Unmarshal(r.Data, &a); err != nil || a.Name == "" || a.Name == "." || a.Name != filepath.Base(a.Name) || !filepath.IsLocal(a.Name) || a.Size < 0 {
		return &stream.CloseError{Code: stream.CloseBadRequest, Text: "send the name of a file without folders, and its size"}
	}
	if !d.begin(a.Name) { // for example a client whose death was not noticed yet
		return &stream.CloseError{Code: stream.CloseTryAgainLater, Text: "another upload of this file runs"}
	}
	defer d.end(a.Name)
	whole := filepath.Join(d.dir, a.Name)
	f, err := os.OpenFile(whole+".part", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		log.Print(err) // not in the close reason, because the client must not see paths
		return errors.New("the file cannot be stored")
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	p := progress{Stored: info.Size()}
	if p.Stored > a.Size { // of another file with the same name
		if err := f.Truncate(0); err != nil {
			return err
		}
		p.Stored = 0
	}
	if _, err := w.WriteObject(p); err != nil {
		return err
	}
	for {
		n, err := io.CopyN(f, r, min(synced, a.Size-p.Stored+1)) // one byte too many is an error below
		p.Stored += n
		if err := f.Sync(); err != nil { // progress is what a crash cannot take back
			return err
		}
		if err == io.EOF {
			break // the client has closed its direction: it sent everything
		}
		if err != nil {
			return err // the client or its connection died: the part stays for the next time
		}
		if _, err := w.WriteObject(p); err != nil {
			return err
		}
	}
	if p.Stored != a.Size {
		return &stream.CloseError{Code: stream.CloseBadRequest, Text: fmt.Sprintf("%d bytes arrived, %d were announced", p.Stored, a.Size)}
	}
	if err := os.Rename(whole+".part", whole); err != nil {
		return err
	}
	p.Whole = true
	_, err = w.WriteObject(p)
	return err
}
