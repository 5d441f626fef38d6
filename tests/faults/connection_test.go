package faults

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// TestServerKilled kills the NATS server and starts it again: streams go on within a second.
func TestServerKilled(t *testing.T) {
	p := streamtest.RunProcess(t)
	for range runs(5, 100) {
		trial{server: p.URL(), client: p.URL(), goesOn: time.Second, fault: func(*rig) {
			p.Kill()
			time.Sleep(200 * time.Millisecond)
			if err := p.Restart(); err != nil {
				t.Error(err)
			}
		}}.run(t)
	}
}

// TestServerStopped ends the NATS server in the two orderly ways and starts it again.
func TestServerStopped(t *testing.T) {
	p := streamtest.RunProcess(t)
	for name, stop := range map[string]func() error{
		"shutdown":  func() error { p.Stop(); return nil },
		"lame duck": func() error { err := p.LameDuck(); p.Wait(); return err },
	} {
		t.Run(name, func(t *testing.T) {
			for range runs(3, 50) {
				trial{server: p.URL(), client: p.URL(), fault: func(*rig) {
					if err := errors.Join(stop(), p.Restart()); err != nil {
						t.Error(err)
					}
				}}.run(t)
			}
		})
	}
}

// TestConnectionReset resets the connection of each side in turn.
func TestConnectionReset(t *testing.T) {
	srv := streamtest.Run(t)
	a, b := streamtest.RunProxy(t, srv.URL()), streamtest.RunProxy(t, srv.URL())
	for name, proxy := range map[string]*streamtest.Proxy{"producer": a, "consumer": b} {
		t.Run(name, func(t *testing.T) {
			for range runs(5, 100) {
				trial{server: a.URL(), client: b.URL(), fault: func(*rig) {
					time.Sleep(20 * time.Millisecond)
					proxy.Reset()
				}}.run(t)
			}
		})
	}
}

// hasty is for trials in which a peer goes without a word.
var hasty = stream.ClientParams{KeepAlive: 300 * time.Millisecond, AckTimeout: 50 * time.Millisecond, ResumeTimeout: 300 * time.Millisecond}

// TestConnectionEnded closes or drains the connection of one side under open streams. All of them end with an error.
func TestConnectionEnded(t *testing.T) {
	srv := streamtest.Run(t)
	for name, end := range map[string]func(*rig) error{
		"producer closes": func(r *rig) error { r.sc.Close(); return nil },
		"consumer closes": func(r *rig) error { r.cc.Close(); return nil },
		"producer drains": func(r *rig) error { return r.sc.Drain() },
		"consumer drains": func(r *rig) error { return r.cc.Drain() },
	} {
		t.Run(name, func(t *testing.T) {
			for range runs(5, 100) {
				trial{server: srv.URL(), client: srv.URL(), times: hasty, ends: hasty.KeepAlive + hasty.ResumeTimeout + slack,
					named: func(err error) bool {
						return isCode(stream.CloseAbnormalClosure, stream.CloseGoingAway)(err) || errors.Is(err, nats.ErrConnectionClosed)
					},
					fault: func(r *rig) {
						if err := end(r); err != nil {
							t.Error(err)
						}
						// One that comes too late. Its request may be lost; then only its context ends it.
						ctx, cancel := context.WithTimeout(context.Background(), hasty.KeepAlive)
						defer cancel()
						end := watch(ctx)
						s, err := r.cl.Open(ctx, "echo", nil)
						if err == nil {
							_, err = s.Recv()
							s.Close()
						}
						r.onTime(end, "a late stream", err)
					}}.run(t)
			}
		})
	}
}
