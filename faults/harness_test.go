package faults

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/natsstream/stream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	flows    = 3 // streams of each kind
	patience = 20 * time.Second
)

// runs is how often a fault is tried.
func runs(reduced, full int) int {
	switch {
	case os.Getenv("STREAM_FAULTS") == "full":
		return full
	case testing.Short():
		return 1
	}
	return reduced
}

// rig is a server and a client of the library, each on a connection of its own.
type rig struct {
	server *stream.Server
	client *stream.Client
}

func connect(t *testing.T, url string) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect(url, nats.DontRandomize(), nats.IgnoreDiscoveredServers(), nats.MaxReconnects(-1),
		nats.ReconnectWait(50*time.Millisecond), nats.ReconnectJitter(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	return nc
}

// run sends n numbered records on each stream, calls fault in mid-stream, and checks that everything arrived once and in
// order and that nothing is left.
func run(t *testing.T, serverURL, clientURL string, n int, pace time.Duration, fault func()) {
	t.Helper()
	sc, cc := connect(t, serverURL), connect(t, clientURL)
	defer sc.Close()
	defer cc.Close()
	const ack = 50 * time.Millisecond
	server, err := stream.NewServer(stream.ServerParams{Conn: sc, AckTimeout: ack})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	client, err := stream.NewClient(stream.ClientParams{Conn: cc, AckTimeout: ack})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	r := &rig{server, client}
	if err := errors.Join(
		server.Handle("down", func(w *stream.Writer, _ *stream.Request) error { return send(w, n, pace) }),
		server.Handle("echo", func(w *stream.Writer, q *stream.Request) error {
			for rec, err := range q.All() {
				if err != nil {
					return err
				}
				if _, err := w.Write(rec); err != nil {
					return err
				}
			}
			return nil
		}), sc.FlushTimeout(patience)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for { // interest takes its time to another node
		err := r.flow(ctx, "echo", 1, 0)
		if err == nil {
			break
		}
		if !errors.Is(err, nats.ErrNoResponders) {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	var wg sync.WaitGroup
	for i := range 2 * flows {
		wg.Go(func() {
			subject := [...]string{"down", "echo"}[i%2]
			if err := r.flow(ctx, subject, n, pace); err != nil {
				t.Errorf("%s: %v", subject, err)
			}
		})
	}
	fault()
	wg.Wait()
	r.idle(t)
}

func send(w io.Writer, n int, pace time.Duration) error {
	for i := range n {
		if _, err := w.Write(record(i)); err != nil {
			return err
		}
		if i%16 == 0 {
			time.Sleep(pace)
		}
	}
	return nil
}

func record(i int) []byte {
	b := make([]byte, 64+i%997)
	binary.BigEndian.PutUint64(b, uint64(i))
	return b
}

func (r *rig) flow(ctx context.Context, subject string, n int, pace time.Duration) error {
	s, err := r.client.Open(ctx, subject, nil)
	if err != nil {
		return err
	}
	defer s.Close()
	sent := make(chan error, 1)
	go func() {
		if subject != "echo" {
			sent <- nil
			return
		}
		sent <- errors.Join(send(s, n, pace), s.CloseSend())
	}()
	for i := 0; ; i++ {
		rec, err := s.Recv()
		switch {
		case err == io.EOF && i == n:
			return <-sent
		case err != nil:
			_ = s.Close() // or the sender might wait
			return fmt.Errorf("after record %d of %d: %w; sender: %w", i, n, err, <-sent)
		case len(rec) != len(record(i)) || binary.BigEndian.Uint64(rec) != uint64(i):
			return fmt.Errorf("record %d is number %d, %d bytes", i, binary.BigEndian.Uint64(rec), len(rec))
		}
	}
}

// idle fails the test unless everything is given back within a second.
func (r *rig) idle(t *testing.T) {
	t.Helper()
	for end := time.Now().Add(time.Second); ; time.Sleep(5 * time.Millisecond) {
		a, b := r.server.Stats(), r.client.Stats()
		if a.Streams == 0 && b.Streams == 0 && a.Reserved == 0 && b.Reserved == 0 {
			return
		}
		if time.Now().After(end) {
			t.Errorf("not given back: server %d streams, %d bytes; client %d streams, %d bytes", a.Streams, a.Reserved, b.Streams, b.Reserved)
			return
		}
	}
}
