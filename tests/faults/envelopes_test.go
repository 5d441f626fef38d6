package faults

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// slow is a trial with many slow streams, whose packets share envelopes.
func slow(server, client string, fault func(*rig)) trial {
	return trial{server: server, client: client, streams: 25, slow: true, calm: true,
		times: stream.ClientParams{AckTimeout: 20 * time.Millisecond}, fault: fault}
}

// isEnvelope matches envelopes on their way to the server.
func isEnvelope(m *streamtest.Message) bool {
	return onWay(m) && len(m.Data) >= stream.PacketHeaderSize && m.Data[1]&byte(stream.PacketEnv) != 0
}

// TestEnvelopes drops, duplicates, reorders and damages envelopes: each stream repairs what was in them.
func TestEnvelopes(t *testing.T) {
	srv := streamtest.Run(t)
	for name, rule := range map[string]func(*rand.Rand) streamtest.Rule{
		"drop":      func(r *rand.Rand) streamtest.Rule { return streamtest.Drop(0.01+0.19*r.Float64(), r) },
		"duplicate": func(r *rand.Rand) streamtest.Rule { return streamtest.Duplicate(0.01+0.19*r.Float64(), r) },
		"reorder":   func(r *rand.Rand) streamtest.Rule { return streamtest.Reorder(0.1, 1+r.IntN(64), r) },
		"cut": func(r *rand.Rand) streamtest.Rule {
			return func(m *streamtest.Message) streamtest.Verdict {
				if r.IntN(8) == 0 {
					m.Data = m.Data[:r.IntN(len(m.Data))]
				}
				return streamtest.Verdict{}
			}
		},
		"bent": func(r *rand.Rand) streamtest.Rule { // in the header, or in the token of the first packet
			return func(m *streamtest.Message) streamtest.Verdict {
				if r.IntN(8) == 0 {
					m.Data[r.IntN(stream.PacketHeaderSize+stream.TokenSize)] ^= 1 << r.IntN(8)
				}
				return streamtest.Verdict{}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			for i := range runs(3, 200) {
				rng := rand.New(rand.NewPCG(uint64(i), 1))
				var seen atomic.Int64
				faulty := rule(rng)
				ic, err := streamtest.StartInterceptor(srv.URL(), streamtest.Only(isEnvelope, func(m *streamtest.Message) streamtest.Verdict {
					seen.Add(1)
					return faulty(m)
				}))
				if err != nil {
					t.Fatal(err)
				}
				slow(ic.URL(), ic.URL(), func(*rig) {
					if !within(patience, func() bool { return seen.Load() > 100 }) {
						t.Errorf("only %d envelopes on the way", seen.Load())
					}
				}).run(t)
				ic.Close()
				if t.Failed() {
					t.Fatalf("in run %d", i)
				}
			}
		})
	}
}

// TestEnvelopesOverReconnects resets the connection of each side in turn, and kills the server.
func TestEnvelopesOverReconnects(t *testing.T) {
	srv := streamtest.Run(t)
	a, b := streamtest.RunProxy(t, srv.URL()), streamtest.RunProxy(t, srv.URL())
	for name, proxies := range map[string][]*streamtest.Proxy{"producer": {a}, "consumer": {b}, "both": {a, b}} {
		t.Run(name, func(t *testing.T) {
			for range runs(3, 50) {
				slow(a.URL(), b.URL(), func(*rig) {
					for range 3 {
						time.Sleep(20 * time.Millisecond)
						for _, p := range proxies {
							p.Reset()
						}
					}
				}).run(t)
			}
		})
	}
	t.Run("killed server", func(t *testing.T) {
		p := streamtest.RunProcess(t)
		for range runs(2, 20) {
			slow(p.URL(), p.URL(), func(*rig) {
				p.Kill()
				if err := p.Restart(); err != nil {
					t.Error(err)
				}
			}).run(t)
		}
	})
}

// TestShortStreamsShareTheirAcknowledgements opens streams of one record, many at once: the acknowledgements of their
// ends travel in envelopes. Meanwhile envelopes are dropped. Then the producer asks, and no stream ends with an error.
func TestShortStreamsShareTheirAcknowledgements(t *testing.T) {
	srv := streamtest.Run(t)
	rng := rand.New(rand.NewPCG(1, 2))
	var seen atomic.Int64
	drop := streamtest.Drop(0.2, rng)
	ic := streamtest.RunInterceptor(t, srv.URL(), streamtest.Only(isEnvelope, func(m *streamtest.Message) streamtest.Verdict {
		seen.Add(1)
		return drop(m)
	}))
	dial := func(url string) *nats.Conn {
		nc, err := nats.Connect(url)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	clientConn, serverConn := dial(ic.URL()), dial(srv.URL())
	client, err := stream.NewClient(stream.ClientParams{Conn: clientConn, AckTimeout: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := stream.NewServer(stream.ServerParams{Conn: serverConn, AckTimeout: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	_, err = server.Handle("short", func(w *stream.Writer, r *stream.Request) error { _, err := w.Write(r.Data); return err })
	if err == nil {
		err = serverConn.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ask := func(data string) error {
		s, err := client.Open(ctx, "short", []byte(data))
		if err != nil {
			return err
		}
		defer s.Close()
		if rec, err := s.Recv(); err != nil || string(rec) != data {
			return fmt.Errorf("record %q, %w", rec, err)
		}
		if _, err := s.Recv(); err != io.EOF {
			return fmt.Errorf("the end is %w", err)
		}
		return nil
	}
	const atOnce = 64
	for seen.Load() < 100 && ctx.Err() == nil && !t.Failed() {
		var asking sync.WaitGroup
		for i := range atOnce {
			asking.Go(func() {
				for j := range 10 {
					if err := ask(fmt.Sprint(i, " ", j)); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		asking.Wait()
	}
	if n := seen.Load(); n < 100 {
		t.Errorf("only %d envelopes on the way", n)
	}
	if err := server.Drain(ctx); err != nil { // it waits for all acknowledgements
		t.Error(err)
	}
}
