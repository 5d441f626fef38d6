package stream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// over drops messages of more than size bytes, of either direction.
func over(size int) streamtest.Rule {
	return func(m *streamtest.Message) streamtest.Verdict {
		return streamtest.Verdict{Drop: len(m.Data) > size}
	}
}

// Short times, since each try takes an AckTimeout.
const (
	passingAck    = 50 * time.Millisecond
	passingResume = 4 * time.Second
)

// passingPair is a client and a server with a device between them that has rules.
type passingPair struct {
	device *streamtest.Interceptor
	client *stream.Client
	server *stream.Server
	sc     *nats.Conn // of server
}

func newPassingPair(t *testing.T, rules ...streamtest.Rule) *passingPair {
	t.Helper()
	checkLeaks(t)
	srv := streamtest.Run(t)
	p := &passingPair{device: streamtest.RunInterceptor(t, srv.URL())}
	cc, err := nats.Connect(p.device.URL(), nats.IgnoreDiscoveredServers())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cc.Close)
	sc, err := srv.Dial()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(sc.Close)
	p.sc = sc
	if p.client, err = stream.NewClient(stream.ClientParams{Conn: cc, AckTimeout: passingAck, ResumeTimeout: passingResume}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.client.Close() })
	if p.server, err = stream.NewServer(stream.ServerParams{Conn: sc, AckTimeout: passingAck, ResumeTimeout: passingResume}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.server.Close() })
	p.device.SetRules(rules...)
	return p
}

func (p *passingPair) handle(t *testing.T, subject string, h stream.Handler) {
	t.Helper()
	if _, err := p.server.Handle(subject, h); err != nil {
		t.Fatal(err)
	}
	if err := p.sc.Flush(); err != nil {
		t.Fatal(err)
	}
}

func TestRecordsPassADeviceThatDropsLargeMessages(t *testing.T) {
	for _, size := range []int{40_000, 16_000, 5000, 2500, 1024} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			p := newPassingPair(t, over(size))
			records := [][]byte{testRecord(0, 100), testRecord(1, 500_000), testRecord(2, 3000), testRecord(3, 100_000), testRecord(4, 7)}
			send := func(w io.Writer) error {
				for _, r := range records {
					if _, err := w.Write(r); err != nil {
						return err
					}
				}
				return nil
			}
			receive := func(recv func() ([]byte, error)) error {
				for i, want := range records {
					if got, err := recv(); err != nil || string(got) != string(want) {
						return fmt.Errorf("record %d: %d bytes, %w", i, len(got), err)
					}
				}
				if _, err := recv(); err != io.EOF {
					return fmt.Errorf("at the end: %w", err)
				}
				return nil
			}
			p.handle(t, "down", func(w *stream.Writer, _ *stream.Request) error { return send(w) })
			p.handle(t, "up", func(_ *stream.Writer, r *stream.Request) error { return receive(r.Recv) })
			down := open(t, p.client, "down")
			if err := receive(down.Recv); err != nil {
				t.Errorf("down: %v", err)
			}
			up := open(t, p.client, "up")
			if err := errors.Join(send(up), up.CloseSend()); err != nil {
				t.Errorf("up: %v", err)
			}
			if _, err := up.Recv(); err != io.EOF {
				t.Errorf("up: %v", err)
			}
		})
	}
}

func TestAPacketThatNeverPassesEndsItsStreamAtBothEnds(t *testing.T) {
	for _, size := range []int{1000, 150} {
		for _, record := range []int{900, 3000, 200_000} {
			if record <= size {
				continue
			}
			t.Run(fmt.Sprintf("%d over %d", record, size), func(t *testing.T) {
				t.Parallel() // it waits for timeouts
				p := newPassingPair(t, over(size))
				ends := make(chan error, 1)
				p.handle(t, "down", func(w *stream.Writer, _ *stream.Request) error {
					_, err := w.Write(testRecord(0, record))
					if err == nil {
						err = w.Sync(context.Background())
					}
					ends <- err
					return err
				})
				p.handle(t, "up", func(_ *stream.Writer, r *stream.Request) error {
					_, err := r.Recv()
					ends <- err
					return err
				})
				check := func(way string, sent, received error) {
					t.Helper()
					if !errors.Is(sent, &stream.CloseError{Code: stream.CloseInternalServerErr}) || !errors.Is(sent, nats.ErrMaxPayload) || !strings.Contains(sent.Error(), " bytes does not pass") {
						t.Errorf("%s, sender: %v", way, sent)
					}
					if !errors.Is(received, &stream.CloseError{Code: stream.CloseInternalServerErr}) || !strings.Contains(received.Error(), " bytes does not pass") {
						t.Errorf("%s, receiver: %v", way, received)
					}
				}
				_, err := open(t, p.client, "down").Recv()
				check("down", <-ends, err)
				up := open(t, p.client, "up")
				_, err = up.Write(testRecord(0, record))
				if err == nil {
					err = up.Sync(t.Context())
				}
				check("up", err, <-ends)
			})
		}
	}
}

// Streams pass servers with a max_payload near the size of full packets.
func TestMaxPayloadNearTheSizeOfFullPackets(t *testing.T) {
	for _, most := range []int32{31_000, 31_500, 32_000, 32_600, 32_768, 33_000} {
		t.Run(fmt.Sprint(most), func(t *testing.T) {
			p := newPair(t, pairOptions{server: []streamtest.Option{streamtest.WithMaxPayload(most)}})
			for _, size := range []int{100, 1000, int(most) - 400, 70_000} {
				sendAndCompare(t, p, slices.Repeat([]int{size}, scaled(4<<20)/size+3))
			}
		})
	}
}
