package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

func TestMain(m *testing.M) {
	if os.Getenv("RUN_SERVICE") != "" { // the process of the service
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

// request opens a stream with a token.
func request(t *testing.T, ctx context.Context, client *stream.Client, token string) *stream.Stream {
	t.Helper()
	s, err := client.OpenMsg(ctx, &nats.Msg{Subject: subject, Header: nats.Header{"Authorization": {"Bearer " + token}}})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A stream that runs at SIGTERM is whole, and the process ends with status 0.
func TestServiceEndsInPeace(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	server := streamtest.Run(t)
	service := exec.CommandContext(ctx, os.Args[0], "-url", server.URL())
	service.Env = append(os.Environ(), "RUN_SERVICE=1", "TOKEN=secret")
	service.Stderr = os.Stderr
	stdout, err := service.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := service.Start(); err != nil {
		t.Fatal(err)
	}
	output := bufio.NewScanner(stdout)
	says := func(want string) {
		t.Helper()
		if !output.Scan() || output.Text() != want {
			t.Fatalf("the service says %q, want %q", output.Text(), want)
		}
	}
	says("ready")
	client, err := stream.NewClient(stream.ClientParams{Conn: server.Connect(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()

	var refused *stream.CloseError
	if _, err := request(t, ctx, client, "guess").Recv(); !errors.As(err, &refused) || refused.Code != codeUnauthorized {
		t.Errorf("with a wrong token: %v", err)
	}
	short, stop := context.WithTimeout(ctx, 20*time.Millisecond)
	defer stop()
	late := request(t, short, client, "secret")
	for err == nil {
		_, err = late.Recv()
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with a short deadline: %v", err)
	}

	s := request(t, ctx, client, "secret")
	for i := range orders {
		if i == 10 {
			if err := service.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
		if record, err := s.Recv(); err != nil || string(record) != fmt.Sprintf("order %d", i) {
			t.Fatalf("order %d: %q, %v", i, record, err)
		}
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Fatalf("%v, want io.EOF", err)
	}
	says("draining 1 streams")
	says("bye")
	if err := service.Wait(); err != nil {
		t.Error(err)
	}
	if _, err := request(t, ctx, client, "secret").Recv(); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("after the end: %v", err)
	}
}

func TestServiceNeedsAToken(t *testing.T) {
	if err := run(t.Context(), "", "", io.Discard); err == nil {
		t.Error("no error")
	}
}
