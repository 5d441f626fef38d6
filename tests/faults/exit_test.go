package faults

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// unhurried is for ends that must hear from their peers: without a word from them they would wait for as long as a test
// may take.
var unhurried = stream.ClientParams{KeepAlive: time.Hour, ResumeTimeout: time.Hour}

// leavers are the processes that end with os.Exit right after Close.
var leavers = map[string]func(url string) error{
	"leaving client": leavingClient,
	"leaving server": leavingServer,
	"leaving writer": leavingWriter,
}

// leavingClient leaves streams in every state behind.
func leavingClient(url string) error {
	nc, err := dial(url)
	if err != nil {
		return err
	}
	client, err := stream.NewClient(stream.ClientParams{Conn: nc, AckTimeout: 2 * time.Second})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	open := func(ctx context.Context, subject string, records int) *stream.Stream {
		s, openErr := client.Open(ctx, subject, nil)
		if openErr != nil {
			err = errors.Join(err, openErr)
			return s
		}
		for range records {
			if _, readErr := s.Recv(); readErr != nil {
				err = errors.Join(err, readErr)
			}
		}
		return s
	}
	all := context.Background()
	open(all, "down", 1)  // left open, and unread
	open(ctx, "down", 10) // its context ends
	closed := open(all, "down", 3)
	writing := open(all, "echo", 0)
	if err != nil {
		return err
	}
	if _, err := writing.Write(chance[:1000]); err != nil {
		return err
	}
	open(ctx, "mute", 0)
	unanswered := open(all, "mute", 0)
	open(all, "down", 0)
	open(all, "mute", 0)
	if err != nil {
		return err
	}
	cancel()
	closed.Close()
	unanswered.Close()
	client.Close()
	os.Exit(0)
	return nil
}

// leavingServer leaves handlers that run, one that just returned, and requests that were not served.
func leavingServer(url string) error {
	nc, err := dial(url)
	if err != nil {
		return err
	}
	srv, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		return err
	}
	for subject, h := range map[string]stream.Handler{"down": paced, "echo": echo, "mute": silent, "done": done, "exit": func(*stream.Writer, *stream.Request) error {
		go func() {
			srv.Close()
			os.Exit(0)
		}()
		return nil
	}} {
		if _, err := srv.Handle(subject, h); err != nil {
			return err
		}
	}
	if err := nc.Flush(); err != nil {
		return err
	}
	fmt.Println("ready")
	select {}
}

// silent is a handler that writes nothing.
func silent(_ *stream.Writer, q *stream.Request) error {
	<-q.Context().Done()
	return context.Cause(q.Context())
}

// done is a handler that returns at once.
func done(w *stream.Writer, _ *stream.Request) error {
	_, err := w.Write(chance[:1000])
	return err
}

// leavingWriter leaves writers made of requests: one goes on, and one was closed just before.
func leavingWriter(url string) error {
	nc, err := dial(url)
	if err != nil {
		return err
	}
	client, err := stream.NewClient(stream.ClientParams{Conn: nc})
	if err != nil {
		return err
	}
	requests := make(chan *nats.Msg, 16)
	for _, subject := range []string{"down", "done", "mute", "exit"} {
		if _, err := nc.ChanSubscribe(subject, requests); err != nil {
			return err
		}
	}
	if err := nc.Flush(); err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		r := <-requests
		w := client.NewWriter(r.Reply)
		switch r.Subject {
		case "down":
			go func() { _ = paced(w, nil) }()
		case "done":
			if err := errors.Join(done(w, nil), w.Close()); err != nil {
				return err
			}
		case "exit":
			if err := w.Close(); err != nil {
				return err
			}
			client.Close()
			os.Exit(0)
		}
	}
}

// startLeaver starts one of leavers. wait returns when it has ended, and fails the test if it did not do so by itself.
func startLeaver(t *testing.T, role, url string) (out *bufio.Reader, wait func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), peerEnv+"="+role, peerURL+"="+url, "GORACE=atexit_sleep_ms=0") // a race build would sleep
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe() // held open, or it would end by itself
	if err != nil {
		t.Fatal(err)
	}
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out = bufio.NewReader(pipe)
	return out, func() {
		kill := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
		defer kill.Stop()
		text, _ := io.ReadAll(out)
		if err := cmd.Wait(); err != nil {
			t.Errorf("the %s ended with %v: %s", role, err, text)
		}
		_ = in.Close()
	}
}

// exits is how often a process ends.
func exits() int { return max(10, runs(100, 1000)) }

// TestExitAfterClientClose: every handler hears that its consumer is gone, though the process ends right after
// Client.Close.
func TestExitAfterClientClose(t *testing.T) {
	broker := streamtest.Run(t)
	nc := connect(t, broker.URL())
	defer nc.Close()
	srv, err := stream.NewServer(stream.ServerParams{Conn: nc, KeepAlive: unhurried.KeepAlive, ResumeTimeout: unhurried.ResumeTimeout})
	if err != nil {
		t.Fatal(err)
	}
	defer srv.Close()
	for subject, h := range map[string]stream.Handler{"down": paced, "echo": echo, "mute": silent} {
		if _, err := srv.Handle(subject, h); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	const atOnce = 2
	var wg sync.WaitGroup
	for range atOnce {
		wg.Go(func() {
			for range exits() / atOnce {
				_, wait := startLeaver(t, "leaving client", broker.URL())
				wait()
			}
		})
	}
	wg.Wait()
	// Drain takes the requests that have come, and waits for all handlers and for what they wrote.
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := srv.Drain(ctx); err != nil {
		t.Errorf("handlers were not told that their consumers left: %v", err)
	}
}

// TestExitAfterServerClose: every consumer hears that its producer is gone, though the process ends right after
// Server.Close.
func TestExitAfterServerClose(t *testing.T) {
	exitOfProducer(t, "leaving server", "down", "echo", "mute")
}

// TestExitAfterCloseOfWriters is the same for the client that writers were made from.
func TestExitAfterCloseOfWriters(t *testing.T) { exitOfProducer(t, "leaving writer", "down", "mute") }

func exitOfProducer(t *testing.T, role string, subjects ...string) {
	t.Helper()
	broker := streamtest.Run(t)
	nc := connect(t, broker.URL())
	defer nc.Close()
	p := unhurried
	p.Conn = nc
	client, err := stream.NewClient(p)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for range exits() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		out, wait := startLeaver(t, role, broker.URL())
		if line, err := out.ReadString('\n'); err != nil || line != "ready\n" {
			t.Fatalf("the %s says %q, %v", role, line, err)
		}
		open := func(subject string) *stream.Stream {
			s, err := client.Open(ctx, subject, nil)
			if err != nil {
				t.Fatal(err)
			}
			return s
		}
		var streams []*stream.Stream
		for _, subject := range subjects {
			streams = append(streams, open(subject))
		}
		if _, err := streams[0].Recv(); err != nil {
			t.Error(err)
		}
		whole, exit := open("done"), open("exit")
		var late *stream.Stream
		if role == "leaving server" { // else nobody takes the request
			late = open("mute") // it may come before Close, while it is under way, and after
			streams = append(streams, late)
		}
		for i, s := range append(streams, whole) {
			var err error
			records := -1
			for ; err == nil; records++ {
				_, err = s.Recv()
			}
			switch {
			case s == whole && err == io.EOF && records == 1: // it was done before Close
			case s == late && errors.Is(err, nats.ErrNoResponders):
			case !isCode(stream.CloseGoingAway)(err) || s == whole && role == "leaving writer":
				t.Errorf("stream %d of %d ended with %v after %d records", i, len(streams), err, records)
			}
			s.Close()
		}
		exit.Close()
		wait()
		cancel()
		if t.Failed() {
			return
		}
	}
}
