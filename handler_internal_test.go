package stream

import (
	"fmt"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Handlers that wait for each other all run, however many there are. Of their goroutines few rest afterwards, and none
// when the server has no stream.
func TestManyHandlersRunAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		var arrived sync.WaitGroup
		m.handle(t, "x", func(w *Writer, _ *Request) error {
			arrived.Done()
			arrived.Wait()
			_, err := w.Write([]byte("a"))
			return err
		})
		for _, n := range []int{1, 3 * maxResting, 2, 3 * maxResting} {
			arrived.Add(n)
			var readers sync.WaitGroup
			for range n {
				s := m.open(t, "x")
				readers.Go(func() {
					if rec, err := s.Recv(); err != nil || string(rec) != "a" {
						t.Errorf("%q, %v", rec, err)
					}
					_ = s.Close()
				})
			}
			readers.Wait()
			synctest.Wait()
			if resting := m.server.resting.count(); resting != min(n, maxResting) {
				t.Errorf("%d goroutines rest after %d handlers", resting, n)
			}
			time.Sleep(time.Second) // the server has no stream
			if n := m.server.resting.count(); n != 0 {
				t.Errorf("%d goroutines rest at an idle server", n)
			}
		}
		arrived.Add(1)
		m.open(t, "x")
		m.close()
		synctest.Wait()
		if n := m.server.resting.count(); n != 0 {
			t.Errorf("%d goroutines rest at a server that is closed", n)
		}
	})
}

func (r *resting) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.waiting)
}

// A handler that ends its goroutine, or panics, ends its own stream and keeps no later one from a handler.
func TestHandlersThatEndTheirGoroutine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "x", func(w *Writer, r *Request) error {
			switch string(r.Data) {
			case "exit":
				runtime.Goexit()
			case "panic":
				panic("a handler's")
			}
			_, err := w.Write(r.Data)
			return err
		})
		for i := range 12 {
			data := []string{"exit", "panic", fmt.Sprint(i)}[i%3]
			s, err := m.client.Open(t.Context(), "x", []byte(data))
			if err != nil {
				t.Fatal(err)
			}
			rec, err := s.Recv()
			if good := i%3 == 2; good != (err == nil) || good && string(rec) != data {
				t.Errorf("request %q: %q, %v", data, rec, err)
			}
			_ = s.Close()
		}
		m.nothingLeft(t)
	})
}
