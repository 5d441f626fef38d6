package faults

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// onWay matches the packets of both ends on their way to the server. Both ends publish through the same interceptor, so
// each packet passes once there.
func onWay(m *streamtest.Message) bool {
	return m.Dir == streamtest.ToServer && len(m.Data) > 0 && m.Data[0] == stream.PacketMagic
}

// TestPackets drops, duplicates and reorders packets.
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
				ic, err := streamtest.StartInterceptor(srv.URL(), streamtest.Only(onWay, rule(rng)))
				if err != nil {
					t.Fatal(err)
				}
				trial{server: ic.URL(), client: ic.URL(), records: 300, calm: i%4 != 0, times: stream.ClientParams{AckTimeout: 20 * time.Millisecond},
					fault: func(*rig) {}}.run(t)
				ic.Close()
				if t.Failed() {
					t.Fatalf("in run %d", i)
				}
			}
		})
	}
}

// damage lets packets through until the one with number n, which it changes with f, and all after it.
func damage(n int, f func(*streamtest.Message)) streamtest.Rule {
	var seen atomic.Int64
	return streamtest.Only(onWay, func(m *streamtest.Message) streamtest.Verdict {
		if seen.Add(1) == int64(n+1) {
			f(m)
		}
		return streamtest.Verdict{}
	})
}

// TestDamagedPackets flips every bit of the header of a packet, and cuts packets at every length, wherever in the
// stream they are: the damage is repaired, or there is an error.
func TestDamagedPackets(t *testing.T) {
	srv := streamtest.Run(t)
	ic := streamtest.RunInterceptor(t, srv.URL())
	leakless(t, func() {
		sc, cc := connect(t, ic.URL()), connect(t, ic.URL())
		defer sc.Close()
		defer cc.Close()
		const keepAlive, ack, resume = 60 * time.Millisecond, 10 * time.Millisecond, 60 * time.Millisecond
		server, err := stream.NewServer(stream.ServerParams{Conn: sc, KeepAlive: keepAlive, AckTimeout: ack, ResumeTimeout: resume})
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		client, err := stream.NewClient(stream.ClientParams{Conn: cc, KeepAlive: keepAlive, AckTimeout: ack, ResumeTimeout: resume})
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		if _, err := server.Handle("echo", echo); err != nil {
			t.Fatal(err)
		}
		if err := sc.Flush(); err != nil {
			t.Fatal(err)
		}
		const packets = 8 // of an exchange as below, there and back, with those of control
		repaired, told := 0, 0
		try := func(what string, n int, f func(*streamtest.Message)) {
			ic.SetRules(damage(n, f))
			// Both ends find each other silent, one after the other at worst.
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			switch got, err := exchange(ctx, client); {
			case err == io.EOF && got == exchanged:
				repaired++
			case err == io.EOF || !isNamed(err) || ctx.Err() != nil:
				t.Errorf("packet %d, %s: %d records and then %v", n, what, got, err)
			default:
				told++
			}
		}
		for n := range packets {
			for bit := range 8 * stream.PacketHeaderSize {
				try(fmt.Sprintf("bit %d flipped", bit), n, func(m *streamtest.Message) { m.Data[bit/8] ^= 0x80 >> (bit % 8) })
			}
			for size := range 64 {
				try(fmt.Sprintf("cut to %d bytes", size), n, func(m *streamtest.Message) { m.Data = m.Data[:min(size, len(m.Data)-1)] })
			}
		}
		t.Logf("%d repaired, %d ended with an error", repaired, told)
		ic.SetRules()
		giveBack(t, client.Stats, server.Stats)
	})
}

const exchanged = 5 // records of an exchange

// exchange sends records one at a time and returns how many came back before the error.
func exchange(ctx context.Context, client *stream.Client) (int, error) {
	s, err := client.Open(ctx, "echo", nil)
	if err != nil {
		return 0, err
	}
	defer s.Close()
	for i := range exchanged {
		if _, err := s.Write(chance[i*40 : i*40+40]); err != nil {
			return i, err
		}
		rec, err := s.Recv()
		if err != nil {
			return i, err
		}
		if string(rec) != string(chance[i*40:i*40+40]) {
			return i, fmt.Errorf("%w: %x", errWrong, rec)
		}
	}
	if err := s.CloseSend(); err != nil {
		return exchanged, err
	}
	_, err = s.Recv()
	return exchanged, err
}
