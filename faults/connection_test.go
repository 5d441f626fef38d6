package faults

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// TestServerKilled kills the NATS server and starts it again.
func TestServerKilled(t *testing.T) {
	p := streamtest.RunProcess(t)
	for range runs(5, 100) {
		run(t, p.URL(), p.URL(), 1500, time.Millisecond, func() {
			time.Sleep(30 * time.Millisecond)
			p.Kill()
			time.Sleep(200 * time.Millisecond)
			if err := p.Restart(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestConnectionReset resets the connection of each side in turn.
func TestConnectionReset(t *testing.T) {
	srv := streamtest.Run(t)
	a, b := streamtest.RunProxy(t, srv.URL()), streamtest.RunProxy(t, srv.URL())
	for i := range runs(5, 100) {
		run(t, a.URL(), b.URL(), 1500, time.Millisecond, func() {
			time.Sleep(30 * time.Millisecond)
			[]*streamtest.Proxy{a, b}[i%2].Reset()
		})
	}
}

// TestPackets drops, duplicates and reorders packets on their way to the server.
func TestPackets(t *testing.T) {
	srv := streamtest.Run(t)
	for name, rule := range map[string]func(*rand.Rand) streamtest.Rule{
		"drop":      func(r *rand.Rand) streamtest.Rule { return streamtest.Drop(0.01+0.19*r.Float64(), r) },
		"duplicate": func(r *rand.Rand) streamtest.Rule { return streamtest.Duplicate(0.01+0.19*r.Float64(), r) },
		"reorder":   func(r *rand.Rand) streamtest.Rule { return streamtest.Reorder(0.1, 1+r.IntN(64), r) },
	} {
		t.Run(name, func(t *testing.T) {
			for i := range runs(20, 1000) {
				rng := rand.New(rand.NewPCG(uint64(i), 1))
				only := func(m *streamtest.Message) bool {
					return m.Dir == streamtest.ToServer && len(m.Data) > 0 && m.Data[0] == stream.PacketMagic
				}
				ic, err := streamtest.StartInterceptor(srv.URL(), streamtest.Only(only, rule(rng)))
				if err != nil {
					t.Fatal(err)
				}
				run(t, ic.URL(), ic.URL(), 300, 0, func() {})
				ic.Close()
				if t.Failed() {
					t.Fatalf("in run %d", i)
				}
			}
		})
	}
}
