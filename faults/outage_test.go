package faults

import (
	"testing"
	"time"

	"github.com/natsstream/stream/streamtest"
)

// TestServerStopped ends the NATS server in the two orderly ways and starts it again.
func TestServerStopped(t *testing.T) {
	p := streamtest.RunProcess(t)
	for name, stop := range map[string]func() error{
		"shutdown":  func() error { p.Stop(); return nil },
		"lame duck": func() error { err := p.LameDuck(); p.Wait(); return err },
	} {
		t.Run(name, func(t *testing.T) {
			for range runs(3, 50) {
				run(t, p.URL(), p.URL(), 1500, time.Millisecond, func() {
					time.Sleep(30 * time.Millisecond)
					if err := stop(); err != nil {
						t.Error(err)
					}
					if err := p.Restart(); err != nil {
						t.Error(err)
					}
				})
			}
		})
	}
}

// TestBlackHoleHeals lets nothing through in one direction of one side for a while.
func TestBlackHoleHeals(t *testing.T) {
	srv := streamtest.Run(t)
	a, b := streamtest.RunProxy(t, srv.URL()), streamtest.RunProxy(t, srv.URL())
	for i := range runs(4, 20) {
		proxy := []*streamtest.Proxy{a, b}[i/2%2]
		dir := []streamtest.Direction{streamtest.ToServer, streamtest.ToClient}[i%2]
		run(t, a.URL(), b.URL(), 1500, time.Millisecond, func() {
			time.Sleep(30 * time.Millisecond)
			proxy.BlackHole(dir)
			time.Sleep(time.Second)
			proxy.Heal()
		})
	}
}
