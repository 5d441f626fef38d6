// Command smoke shows that streams work through given versions of nats-server:
//
//	go run ./tests/smoke [-nats /path/to/nats] /path/to/nats-server ...
//
// It starts each program in turn, opens streams through it, and kills and starts it again in the middle of two of them.
// With -nats it also looks for a service by the command nats of github.com/nats-io/natscli. It prints one line for each
// version, and exits with status 1 at the first that fails.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// patience bounds each step. A step takes milliseconds; the limit is for a busy machine.
const patience = 30 * time.Second

func main() {
	tool := flag.String("nats", "", "`path` of the command nats")
	flag.Parse()
	if flag.NArg() == 0 {
		fmt.Fprintln(os.Stderr, "usage: smoke [-nats nats] nats-server...")
		os.Exit(2)
	}
	for _, program := range flag.Args() {
		version, err := smoke(program, *tool)
		if err != nil {
			fmt.Fprintf(os.Stderr, "smoke: %s: %v\n", program, err)
			os.Exit(1)
		}
		fmt.Printf("nats-server %s: streams down and up, large records, no responders, a restart\n", version)
	}
}

// smoke checks one program and returns the version of the server.
func smoke(program, tool string) (version string, err error) {
	s, err := newServer(program)
	if err != nil {
		return "", err
	}
	defer s.kill()
	if tool != "" {
		if err := find(tool, s.url); err != nil {
			return "", err
		}
	}
	return check(s.url, s.restart)
}

// check opens streams through the server at url and returns its version. restart kills the server and starts it again
// at the same address.
func check(url string, restart func() error) (version string, err error) {
	broken := func(*nats.Conn, *nats.Subscription, error) {} // a write into the connection that a restart broke
	nc, err := nats.Connect(url, nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond), nats.ErrorHandler(broken))
	if err != nil {
		return "", err
	}
	defer nc.Close()
	version = nc.ConnectedServerVersion()
	server, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		return version, err
	}
	defer server.Close()
	client, err := stream.NewClient(stream.ClientParams{Conn: nc})
	if err != nil {
		return version, err
	}
	defer client.Close()
	const records, large = 20_000, 8 << 20
	for subject, h := range map[string]stream.Handler{"down": down, "up": up} {
		if _, err := server.Handle(subject, h); err != nil {
			return version, err
		}
	}
	if err := nc.FlushTimeout(patience); err != nil {
		return version, err
	}
	for _, step := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"records down", func(ctx context.Context) error { return receive(ctx, client, records, 100, nil) }},
		{"records up", func(ctx context.Context) error { return send(ctx, client, records, 100, nil) }},
		{"large record down", func(ctx context.Context) error { return receive(ctx, client, 2, large, nil) }},
		{"large record up", func(ctx context.Context) error { return send(ctx, client, 2, large, nil) }},
		{"request without responders", func(ctx context.Context) error { return nobody(ctx, client) }},
		{"restart, records down", func(ctx context.Context) error { return receive(ctx, client, records, 1000, restart) }},
		{"restart, records up", func(ctx context.Context) error { return send(ctx, client, records, 1000, restart) }},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err := step.do(ctx)
		cancel()
		if err != nil {
			return version, fmt.Errorf("version %s: %s: %w", version, step.name, err)
		}
	}
	return version, nil
}

// record returns the bytes of record i.
func record(i, size int) []byte {
	return bytes.Repeat(strconv.AppendInt(nil, int64(1_000_000+i), 10), size/7+1)[:size]
}

// down is a handler. It sends the number of records, of the size, that the request states.
func down(w *stream.Writer, r *stream.Request) error {
	var n, size int
	if _, err := fmt.Sscan(string(r.Data), &n, &size); err != nil {
		return err
	}
	for i := range n {
		if _, err := w.Write(record(i, size)); err != nil {
			return err
		}
	}
	return nil
}

// up is a handler. It answers with the number of correct records that it received.
func up(w *stream.Writer, r *stream.Request) error {
	n := 0
	for rec, err := range r.All() {
		if err != nil {
			return err
		}
		if !bytes.Equal(rec, record(n, len(rec))) {
			return fmt.Errorf("record %d is not as it was sent", n)
		}
		n++
	}
	_, err := fmt.Fprint(w, n)
	return err
}

// receive reads n records. In the middle it calls restart, if that is not nil.
func receive(ctx context.Context, c *stream.Client, n, size int, restart func() error) error {
	s, err := c.Open(ctx, "down", fmt.Appendf(nil, "%d %d", n, size))
	if err != nil {
		return err
	}
	defer s.Close()
	i := 0
	for rec, err := range s.All() {
		if err != nil {
			return fmt.Errorf("after %d records: %w", i, err)
		}
		if !bytes.Equal(rec, record(i, size)) {
			return fmt.Errorf("record %d is not as it was sent", i)
		}
		if i++; i == n/2 && restart != nil {
			if err := restart(); err != nil {
				return err
			}
		}
	}
	if i != n {
		return fmt.Errorf("%d records of %d, and a normal end", i, n)
	}
	return nil
}

// send writes n records. In the middle it calls restart, if that is not nil.
func send(ctx context.Context, c *stream.Client, n, size int, restart func() error) error {
	s, err := c.Open(ctx, "up", nil)
	if err != nil {
		return err
	}
	defer s.Close()
	for i := range n {
		if _, err := s.Write(record(i, size)); err != nil {
			return fmt.Errorf("after %d records: %w", i, err)
		}
		if i == n/2 && restart != nil {
			if err := restart(); err != nil {
				return err
			}
		}
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	got, err := s.Recv()
	if err != nil {
		return err
	}
	if want := strconv.Itoa(n); string(got) != want {
		return fmt.Errorf("the handler received %s records of %s", got, want)
	}
	return nil
}

// nobody opens a stream on a subject without a subscriber.
func nobody(ctx context.Context, c *stream.Client) error {
	s, err := c.Open(ctx, "nobody", nil)
	if err != nil {
		return err
	}
	defer s.Close()
	if _, err := s.Recv(); !errors.Is(err, nats.ErrNoResponders) {
		return fmt.Errorf("%v, want %w", err, nats.ErrNoResponders)
	}
	return nil
}

// server is a nats-server in a process of its own.
type server struct {
	program, port, url string
	cmd                *exec.Cmd
}

func newServer(program string) (*server, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	ln.Close()
	s := &server{program: program, port: port, url: "nats://127.0.0.1:" + port}
	return s, s.start()
}

// start starts the server and returns when it accepts connections.
func (s *server) start() error {
	s.cmd = exec.Command(s.program, "-a", "127.0.0.1", "-p", s.port)
	var log bytes.Buffer
	s.cmd.Stderr = &log
	if err := s.cmd.Start(); err != nil {
		return err
	}
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		nc, err := nats.Connect(s.url)
		if err == nil {
			nc.Close()
			return nil
		}
		if time.Now().After(end) {
			s.kill()
			return fmt.Errorf("the server does not accept connections: %w; it says:\n%s", err, log.Bytes())
		}
	}
}

func (s *server) kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

func (s *server) restart() error {
	s.kill()
	return s.start()
}
