package faults

import (
	"sync"
	"testing"
	"time"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// holes calls f for each direction of each side, at the same time: nearly all of these tests is waiting.
func holes(t *testing.T, f func(a, b, bad *streamtest.Proxy, dir streamtest.Direction)) {
	type hole struct {
		a, b, bad *streamtest.Proxy
		dir       streamtest.Direction
	}
	var all []hole
	for _, dir := range []streamtest.Direction{streamtest.ToServer, streamtest.ToClient} {
		for i := range 2 {
			srv := streamtest.Run(t)
			h := hole{a: streamtest.RunProxy(t, srv.URL()), b: streamtest.RunProxy(t, srv.URL()), dir: dir}
			h.bad = []*streamtest.Proxy{h.a, h.b}[i]
			all = append(all, h)
		}
	}
	for range runs(3, 20) {
		leakless(t, func() {
			var wg sync.WaitGroup
			for _, h := range all {
				wg.Go(func() {
					f(h.a, h.b, h.bad, h.dir)
				})
			}
			wg.Wait()
		})
	}
}

// TestBlackHoleHeals lets nothing through in one direction of one side for three seconds.
func TestBlackHoleHeals(t *testing.T) {
	holes(t, func(a, b, bad *streamtest.Proxy, dir streamtest.Direction) {
		trial{server: a.URL(), client: b.URL(), streams: 1, calm: true, fault: func(*rig) {
			bad.BlackHole(dir)
			time.Sleep(3 * time.Second)
			bad.Heal()
		}}.one(t)
	})
}

// TestBlackHole lets nothing through any more in one direction of one side. The three questions that make a silent peer
// suspect come after KeepAlive. There is more on its way than the system's buffers hold, so an end may be held up in a
// write.
func TestBlackHole(t *testing.T) {
	holes(t, func(a, b, bad *streamtest.Proxy, dir streamtest.Direction) {
		trial{server: a.URL(), client: b.URL(), large: true, streams: 6, times: hasty, ends: hasty.KeepAlive + 3*hasty.AckTimeout + hasty.ResumeTimeout + slack,
			named: isCode(stream.CloseAbnormalClosure),
			fault: func(r *rig) {
				time.Sleep(time.Second) // until windows are large
				r.begin()
				bad.BlackHole(dir)
			},
			heal: bad.Heal}.one(t)
	})
}
