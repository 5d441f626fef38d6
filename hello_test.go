package stream

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A handler that answers soon, or not before its consumer, costs no message beside its packets.
func TestHelloIsSparedIfTheHandlerAnswers(t *testing.T) {
	for name, handle := range map[string]Handler{
		"at once": func(w *Writer, _ *Request) error { _, err := w.Write([]byte("a")); return err },
		"soon": func(w *Writer, _ *Request) error {
			time.Sleep(helloWait / 2)
			_, err := w.Write([]byte("a"))
			return err
		},
		"nothing":  func(*Writer, *Request) error { return nil },
		"with EOF": func(_ *Writer, r *Request) error { time.Sleep(helloWait / 2); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.handle(t, "x", handle)
				for range 20 {
					s := m.open(t, "x")
					for {
						if _, err := s.Recv(); err != nil {
							break
						}
					}
				}
				time.Sleep(time.Second)
				// The control packets of a stream are its consumer's: the acknowledgement of its end.
				if _, control := m.sentBack.take(); control != 0 {
					t.Errorf("%d control packets of the producer", control)
				}
				m.nothingLeft(t)
			})
		})
	}
}

// Each of many silent handlers is announced, in time, whatever the others do; and the timer rests then.
func TestHelloOfManyHandlers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "silent", func(_ *Writer, r *Request) error { <-r.Context().Done(); return nil })
		m.handle(t, "quick", func(w *Writer, _ *Request) error { _, err := w.Write([]byte("a")); return err })
		var wg sync.WaitGroup
		for i := range 200 {
			time.Sleep(helloWait / 7)
			if i%3 == 0 {
				s := m.open(t, "quick")
				wg.Go(func() {
					if _, err := s.Recv(); err != nil {
						t.Error(err)
					}
					_ = s.Close()
				})
				continue
			}
			s, start := m.open(t, "silent"), time.Now()
			wg.Go(func() {
				_, err := s.Write([]byte("x"))
				outcome{err, time.Now()}.expect(t, "Write", nil, start, 0, 2*helloWait)
				_ = s.Close()
			})
		}
		wg.Wait()
		time.Sleep(time.Second)
		if h := &m.server.ep.outbox.hellos; h.armed.Load() || len(h.waiting) != 0 {
			t.Error("the timer runs for nothing")
		}
		m.nothingLeft(t)
	})
}
