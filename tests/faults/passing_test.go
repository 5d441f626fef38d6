package faults

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// passing is a producer and a consumer, with servers or devices between them that do not let large messages through.
type passing struct {
	t      *testing.T
	client *stream.Client
	server *stream.Server
}

// newPassing connects both ends. The consumer may use handlers "down" and "up", which send and take records, and
// "echo".
func newPassing(t *testing.T, producer, consumer string, records [][]byte) *passing {
	t.Helper()
	sc, cc := connect(t, producer), connect(t, consumer)
	t.Cleanup(sc.Close)
	t.Cleanup(cc.Close)
	server, err := stream.NewServer(stream.ServerParams{Conn: sc})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	client, err := stream.NewClient(stream.ClientParams{Conn: cc})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	for subject, h := range map[string]stream.Handler{
		"down": func(w *stream.Writer, _ *stream.Request) error { return sendAll(w, records) },
		"up":   func(_ *stream.Writer, q *stream.Request) error { return receiveAll(q.Recv, records) },
		"echo": echo,
	} {
		if _, err := server.Handle(subject, h); err != nil {
			t.Fatal(err)
		}
	}
	if err := sc.Flush(); err != nil {
		t.Fatal(err)
	}
	x := &passing{t: t, client: client, server: server}
	if !within(patience, func() bool { return x.ping() == nil }) { // interest takes its time to another node
		t.Fatal("requests do not reach the handlers")
	}
	return x
}

func (x *passing) ping() error {
	ctx, cancel := context.WithTimeout(x.t.Context(), patience)
	defer cancel()
	s, err := x.client.Open(ctx, "echo", nil)
	if err != nil {
		return err
	}
	defer s.Close()
	if _, err := s.Write([]byte("here")); err != nil {
		return err
	}
	_, err = s.Recv()
	return err
}

func sendAll(w io.Writer, records [][]byte) error {
	for _, r := range records {
		if _, err := w.Write(r); err != nil {
			return err
		}
	}
	return nil
}

// receiveAll takes the records, in their order, and the end.
func receiveAll(recv func() ([]byte, error), records [][]byte) error {
	for i, want := range records {
		got, err := recv()
		if err != nil {
			return fmt.Errorf("record %d: %w", i, err)
		}
		if string(got) != string(want) {
			return fmt.Errorf("%w: record %d has %d bytes, want %d", errWrong, i, len(got), len(want))
		}
	}
	if _, err := recv(); err != io.EOF {
		return fmt.Errorf("after the last record: %w", err)
	}
	return nil
}

// run sends the records one way, and fails the test unless they arrive.
func (x *passing) run(way string, records [][]byte) error {
	ctx, cancel := context.WithTimeout(x.t.Context(), 2*patience)
	defer cancel()
	s, err := x.client.Open(ctx, way, nil)
	if err != nil {
		return err
	}
	defer s.Close()
	if way == "down" {
		return receiveAll(s.Recv, records)
	}
	if err := errors.Join(sendAll(s, records), s.CloseSend()); err != nil {
		return err
	}
	return receiveAll(s.Recv, nil)
}

// talk sends small records to and fro, and counts them, until stop is closed.
func (x *passing) talk(stop chan struct{}, count *atomic.Int64) error {
	ctx, cancel := context.WithTimeout(x.t.Context(), 3*patience)
	defer cancel()
	s, err := x.client.Open(ctx, "echo", nil)
	if err != nil {
		return err
	}
	defer s.Close()
	for {
		if _, err := s.Write([]byte("small")); err != nil {
			return err
		}
		if _, err := s.Recv(); err != nil {
			return err
		}
		count.Add(1)
		select {
		case <-stop:
			return nil
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// large are records of many sizes.
func large() [][]byte {
	return [][]byte{chance[:100], chance[:120_000], chance[:3000], make([]byte, 1_000_000*runs(1, 4)), chance[:40_000], chance[:1]}
}

// TestLeafNodeWithSmallerMessages streams over the link of a leaf node, where one of the two servers takes smaller
// messages than the other. Each message that is too large for it makes it close the link.
func TestLeafNodeWithSmallerMessages(t *testing.T) {
	type row struct{ hub, leaf int }
	rows := []row{{1 << 20, 10_000}, {1 << 20, 4 << 10}, {1 << 20, 2 << 10}, {10_000, 1 << 20}}
	if runs(1, 2) == 2 {
		rows = append(rows, row{1 << 20, 64 << 10}, row{1 << 20, 32 << 10}, row{1 << 20, 20_000}, row{32 << 10, 1 << 20}, row{2 << 10, 1 << 20})
	}
	for _, r := range rows {
		for _, behind := range []string{"consumer", "producer"} {
			for _, way := range []string{"down", "up"} {
				t.Run(fmt.Sprintf("hub %d, leaf %d, %s behind it, %s", r.hub, r.leaf, behind, way), func(t *testing.T) {
					t.Parallel()
					port := freePort(t)
					hub := streamtest.Run(t, streamtest.WithConfig(fmt.Sprintf(`
						max_payload: %d
						leafnodes { listen: "127.0.0.1:%d", authorization { timeout: %d } }`, r.hub, port, int(patience.Seconds()))))
					leaf := streamtest.Run(t, streamtest.WithConfig(fmt.Sprintf(`
						max_payload: %d
						leafnodes { reconnect: "200ms", remotes: [ { url: "nats://127.0.0.1:%d", first_info_timeout: %q } ] }`, r.leaf, port, patience)))
					violations := new(violations)
					hub.Raw().SetLogger(violations, false, false)
					leaf.Raw().SetLogger(violations, false, false)
					linked := func() bool { return hub.Raw().NumLeafNodes() == 1 && leaf.Raw().NumLeafNodes() == 1 }
					if !within(patience, linked) {
						t.Fatal("the leaf node has no link")
					}
					most := int64(1)
					if min(r.hub, r.leaf) < 4<<10 { // fragments of 4 KiB close it, too, and are sent twice
						most += 2
					}
					producer, consumer := hub.URL(), leaf.URL()
					if behind == "producer" {
						producer, consumer = consumer, producer
					}
					overLeaf(t, newPassing(t, producer, consumer, large()), way, violations, most)
				})
			}
		}
	}
}

// violations counts the messages that were too large for the servers that log to it.
type violations struct{ atomic.Int64 }

func (v *violations) Errorf(format string, args ...any) {
	if strings.Contains(fmt.Sprintf(format, args...), server.ErrMaxPayload.Error()) {
		v.Add(1)
	}
}
func (*violations) Noticef(string, ...any) {}
func (*violations) Warnf(string, ...any)   {}
func (*violations) Fatalf(string, ...any)  {}
func (*violations) Debugf(string, ...any)  {}
func (*violations) Tracef(string, ...any)  {}

// overLeaf sends the records one way beside a quiet stream. The link may be closed most times: nobody tells how much it
// takes.
func overLeaf(t *testing.T, x *passing, way string, closed *violations, most int64) {
	stop, quiet := make(chan struct{}), make(chan error, 1)
	var words atomic.Int64
	go func() { quiet <- x.talk(stop, &words) }()
	if !within(patience, func() bool { return words.Load() > 0 }) { // no request gets through while the link is closed
		t.Error("the quiet stream does not begin")
	}
	err := x.run(way, large())
	before := words.Load()
	if !within(patience, func() bool { return words.Load() > before }) {
		t.Error("the quiet stream stands still")
	}
	close(stop)
	if n := closed.Load(); err != nil || n > most {
		t.Errorf("%v; the link was closed %d times", err, n)
	}
	if err := <-quiet; err != nil {
		t.Errorf("the quiet stream: %v", err)
	}
}

// tooLarge drops the messages of more than size bytes.
func tooLarge(size int) streamtest.Rule {
	return func(m *streamtest.Message) streamtest.Verdict { return streamtest.Verdict{Drop: len(m.Data) > size} }
}

// TestMessagesOverASizeAreDropped has a device between one of the ends and its server that drops large messages. Either
// everything arrives, or both ends get an error with the size in it.
func TestMessagesOverASizeAreDropped(t *testing.T) {
	for _, size := range []int{60_000, 20_000, 8000, 2000, 1024, 1000, 200} {
		for _, way := range []string{"down", "up"} {
			t.Run(fmt.Sprintf("%d, %s", size, way), func(t *testing.T) {
				t.Parallel()
				srv := streamtest.Run(t)
				device := streamtest.RunInterceptor(t, srv.URL())
				x := newPassing(t, srv.URL(), device.URL(), large())
				device.SetRules(tooLarge(size))
				err := x.run(way, large())
				if size >= 1024 {
					if err != nil {
						t.Error(err)
					}
				} else if !isCode(stream.CloseInternalServerErr)(err) || way == "up" && !errors.Is(err, nats.ErrMaxPayload) {
					t.Errorf("the consumer got %v", err)
				}
				if err := x.ping(); err != nil {
					t.Errorf("a stream of small records: %v", err)
				}
			})
		}
	}
}

// TestLostAndTooLarge loses messages at random, beside those that are too large.
func TestLostAndTooLarge(t *testing.T) {
	for i := range runs(2, 50) {
		rng := rand.New(rand.NewPCG(uint64(i), 3))
		size := []int{20_000, 3000}[i%2]
		srv := streamtest.Run(t)
		device := streamtest.RunInterceptor(t, srv.URL())
		x := newPassing(t, srv.URL(), device.URL(), large()[:3])
		device.SetRules(tooLarge(size), streamtest.Only(onWay, streamtest.Drop(0.02, rng)))
		if err := x.run("down", large()[:3]); err != nil {
			t.Errorf("over %d: %v", size, err)
		}
	}
}
