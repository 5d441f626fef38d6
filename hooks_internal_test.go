package stream

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
)

// A hook that blocks holds no stream, and Close of the client waits for it for a while. Events that find no room are
// counted. A stream whose Opened was dropped is not reported at all, and every other one is reported closed once.
func TestHooksThatBlockHoldNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		open, closed := make(map[uint64]bool), 0 // of the goroutine of the hooks
		m := memoryTest(t, ClientParams{Hooks: Hooks{
			Opened: func(i StreamInfo) {
				<-release
				open[i.ID] = true
			},
			Closed: func(i StreamInfo, _ Totals, _ error) {
				if !open[i.ID] {
					t.Errorf("stream %d was closed and not opened", i.ID)
				}
				delete(open, i.ID)
				closed++
			},
		}})
		const most, beyond = 500, 50
		m.client.ep.observer.most = most   // before there is a stream
		for i := range 1 + most + beyond { // the hook has the first
			m.client.NewWriter(fmt.Sprint("inbox.", i))
			if i == 0 {
				synctest.Wait()
			}
		}
		if n := m.client.Stats().DroppedEvents; n != beyond {
			t.Errorf("%d events were dropped, want %d", n, beyond)
		}
		m.handle(t, "svc", func(*Writer, *Request) error { return nil })
		if err := drain(m.open(t, "svc").Recv); err != nil {
			t.Error(err)
		}
		start := time.Now()
		_ = m.client.Close()
		took(t, "Close", start, hooksEnd, hooksEnd+time.Second)
		close(release)
		<-m.client.ep.observer.done
		if closed != 1+most || len(open) != 0 {
			t.Errorf("%d streams were reported closed, %d were not; want %d and 0", closed, len(open), 1+most)
		}
	})
}

// Packets that are published again are reported, with their number.
func TestHooksReportRetransmissions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		packets := 0
		done := make(chan struct{})
		m := memoryTest(t, ClientParams{Hooks: Hooks{
			Retransmitted: func(i StreamInfo, n int) {
				if i.Subject != "svc" || i.Producer {
					t.Errorf("%+v", i)
				}
				packets += n
			},
			Closed: func(StreamInfo, Totals, error) { close(done) },
		}})
		m.handle(t, "svc", func(w *Writer, r *Request) error { return drain(r.Recv) })
		s := m.open(t, "svc")
		synctest.Wait()
		m.bus.SetFilter(lose(2, sequencedOf(m.conn)))
		for range 3 {
			if _, err := s.Write([]byte("record")); err != nil {
				t.Fatal(err)
			}
			if err := s.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		finish(t, []*Stream{s})
		<-done
		if n := m.client.Stats().PacketsResent; packets == 0 || uint64(packets) != n {
			t.Errorf("%d packets were reported, %d were published again", packets, n)
		}
		m.nothingLeft(t)
	})
}
