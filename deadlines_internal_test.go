package stream

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/natsstream/stream/internal/natsconn/fake"
)

// wantDeadline fails the test unless err is the error of a deadline, as a net.Conn returns it.
func wantDeadline(t *testing.T, what string, err error) {
	t.Helper()
	if ne, ok := errors.AsType[net.Error](err); !errors.Is(err, os.ErrDeadlineExceeded) || !ok || !ne.Timeout() {
		t.Errorf("%s: %v, want os.ErrDeadlineExceeded with Timeout", what, err)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%s: %v also matches the deadline of a context", what, err)
	}
}

// held is a stream with a handler that waits: the test gives it each write and each read.
type held struct {
	*Stream
	w    *Writer
	r    *Request
	done chan struct{} // closed to let the handler return
}

func openHeld(t *testing.T, m *memoryPair) *held {
	t.Helper()
	h := &held{done: make(chan struct{})}
	ready := make(chan struct{})
	m.handle(t, "held", func(w *Writer, r *Request) error {
		h.w, h.r = w, r
		close(ready)
		<-h.done
		return nil
	})
	h.Stream = openForAnHour(t, m, "held")
	<-ready
	return h
}

// finish ends the stream, and fails the test unless the rest of its records are want.
func (h *held) finish(t *testing.T, want ...[]byte) {
	t.Helper()
	close(h.done)
	for i, rec := range want {
		if got, err := h.Recv(); err != nil || !bytes.Equal(got, rec) {
			t.Errorf("record %d of the rest: %d bytes, %v, want %d bytes", i, len(got), err, len(rec))
		}
	}
	if _, err := h.Recv(); err != io.EOF {
		t.Errorf("end: %v", err)
	}
	_ = h.Close()
}

// Every read fails at its deadline and not before, and the stream goes on.
func TestReadDeadlineEndsEachRead(t *testing.T) {
	for name, read := range map[string]func(s *Stream) error{
		"Recv":       func(s *Stream) error { _, err := s.Recv(); return err },
		"Next":       func(s *Stream) error { _, err := s.Next(); return err },
		"RecvObject": func(s *Stream) error { var v any; return s.RecvObject(&v) },
		"Read":       func(s *Stream) error { _, err := s.Read(make([]byte, 1)); return err },
		"WriteTo":    func(s *Stream) error { _, err := s.WriteTo(io.Discard); return err },
		"Header":     func(s *Stream) error { _, err := s.Header(); return err },
		"All": func(s *Stream) (err error) {
			for _, err = range s.All() {
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				h := openHeld(t, m)
				start := time.Now()
				if err := h.SetReadDeadline(start.Add(time.Minute)); err != nil {
					t.Fatal(err)
				}
				wantDeadline(t, "at the deadline", read(h.Stream))
				took(t, "the read", start, time.Minute, time.Minute)
				wantDeadline(t, "after the deadline", read(h.Stream))
				_, _ = h.w.Write([]byte("late"))
				synctest.Wait()
				wantDeadline(t, "after the deadline, with a record at hand", read(h.Stream))
				if err := h.SetReadDeadline(time.Time{}); err != nil {
					t.Fatal(err)
				}
				h.finish(t, []byte("late"))
				m.nothingLeft(t)
			})
		})
	}
}

// A deadline in the past wakes a call that waits, one in the future that was moved does not, and the zero time clears
// it.
func TestDeadlineChangesForWaitingCalls(t *testing.T) {
	for _, write := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			m := memoryTest(t, ClientParams{})
			h := openHeld(t, m)
			set, wait := h.SetReadDeadline, func() error { _, err := h.Recv(); return err }
			if write {
				if err := h.w.SetWriteDeadline(time.Now()); err != nil {
					t.Fatal(err)
				}
				if n, err := h.w.Write(make([]byte, 1000)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) { // although there is credit
					t.Fatal(n, err)
				}
				_ = h.w.SetWriteDeadline(time.Time{})
				fill(t, h.w)
				set, wait = h.w.SetWriteDeadline, func() error { _, err := h.w.Write(make([]byte, 1000)); return err }
			}
			begin := func() <-chan error {
				c := make(chan error, 1)
				go func() { c <- wait() }()
				synctest.Wait()
				return c
			}
			start := time.Now()
			c := begin()
			_ = set(time.Now().Add(-time.Hour))
			wantDeadline(t, "a time in the past", <-c)
			took(t, "a time in the past", start, 0, 0)

			_ = set(start.Add(time.Second))
			c = begin()
			_ = set(start.Add(3 * time.Second))
			wantDeadline(t, "a later time", <-c)
			took(t, "a later time", start, 3*time.Second, 3*time.Second)

			start = time.Now()
			_ = set(start.Add(time.Hour))
			c = begin()
			_ = set(start.Add(time.Second))
			wantDeadline(t, "an earlier time", <-c)
			took(t, "an earlier time", start, time.Second, time.Second)

			_ = set(time.Now().Add(time.Second))
			c = begin()
			_ = set(time.Time{})
			time.Sleep(time.Minute)
			select {
			case err := <-c:
				t.Error("without a deadline:", err)
			default:
			}
			_ = set(time.Now())
			wantDeadline(t, "now", <-c)
			_ = set(time.Time{})
			_ = h.Close()
			close(h.done)
			m.nothingLeft(t)
		})
	}
}

// fill uses up the credit of w.
func fill(t *testing.T, w *Writer) {
	t.Helper()
	for n := 0; ; n++ {
		ok, err := w.TryWrite(make([]byte, 1000))
		if err != nil || n > 1<<16 {
			t.Fatal("no end of credit", n, err)
		}
		if !ok {
			return
		}
		synctest.Wait() // the outbox publishes it
	}
}

// A stream of a million deadlines has one timer, and none after its end.
func TestDeadlinesLeaveNothingBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		h := openHeld(t, m)
		at := time.Now().Add(time.Hour)
		if err := h.SetDeadline(at); err != nil {
			t.Fatal(err)
		}
		if n := testing.AllocsPerRun(100, func() {
			at = at.Add(time.Second)
			_ = h.SetDeadline(at)
		}); n != 0 {
			t.Errorf("a repeated SetDeadline allocates %v times", n)
		}
		x := h.session.extras.Load()
		h.finish(t)
		m.nothingLeft(t)
		for _, d := range []*deadline{&x.read, &x.write} {
			if d.timer.Stop() {
				t.Error("a timer runs after the end of the stream")
			}
		}
		if err := h.SetDeadline(time.Now()); err != ErrClosed {
			t.Errorf("after Close: %v", err)
		}
		if _, err := h.Recv(); err != io.EOF {
			t.Errorf("the end after an expired deadline: %v", err)
		}
	})
}

// A read of a record in pieces that ends at its deadline keeps the pieces: the next read returns the whole record. The
// bytes go back to the budget, also if no read follows.
func TestReadDeadlineKeepsPiecesOfARecord(t *testing.T) {
	for _, last := range []string{"read", "Close", "reset"} {
		t.Run(last, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				h := openHeld(t, m)
				record := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
				sent := make(chan error, 1)
				go func() { _, err := h.w.Write(record); sent <- err }()
				synctest.Wait()
				if h.Ready() { // it takes the pieces that arrived, and grants more
					t.Fatal("a part of a record is ready")
				}
				m.bus.SetFilter(lose(-1, sequencedOf(m.back)))
				for range 3 {
					start := time.Now()
					_ = h.SetReadDeadline(start.Add(10 * time.Millisecond))
					n, err := h.Read(make([]byte, 10))
					wantDeadline(t, "Read within a record", err)
					if n != 0 {
						t.Error("a part of a record was read", n)
					}
					took(t, "Read", start, 10*time.Millisecond, 10*time.Millisecond)
				}
				m.bus.SetFilter(nil)
				if h.session.extras.Load().partial.Load() == nil {
					t.Fatal("no piece is kept")
				}
				switch last {
				case "read":
					_ = h.SetReadDeadline(time.Time{})
					h.finish(t, record)
				case "Close":
					_ = h.Close()
					close(h.done)
				case "reset":
					_ = h.w.CloseWithCode(CloseBadRequest)
					close(h.done)
				}
				<-sent
				until := time.Now().Add(time.Minute)
				for m.client.ep.memory() != 0 && time.Now().Before(until) {
					time.Sleep(time.Second)
				}
				if last == "reset" {
					_ = h.SetReadDeadline(time.Time{})
					if err := drain(h.Recv); err == nil {
						t.Error("a record without an end was read to its end")
					}
				}
				m.nothingLeft(t)
			})
		})
	}
}

// Ready looks ahead and takes nothing away: the record that it found is read next, by any read.
func TestReadyLooksAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		h := openHeld(t, m)
		if h.Ready() || h.r.Ready() {
			t.Error("ready without a record")
		}
		reading := make(chan error, 1)
		go func() { _, err := h.Recv(); reading <- err }()
		synctest.Wait()
		if h.Ready() {
			t.Error("ready while another goroutine waits")
		}
		_ = h.SetReadDeadline(time.Now())
		wantDeadline(t, "Recv", <-reading)

		large := bytes.Repeat([]byte("x"), 100<<10)
		for _, rec := range [][]byte{[]byte("one"), {}, []byte("three"), large, []byte("last")} {
			if _, err := h.w.Write(rec); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := h.w.WriteObject("object"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if !h.Ready() {
			t.Error("a record is at hand, and the deadline has passed")
		}
		_ = h.SetReadDeadline(time.Time{})
		for _, want := range []string{"one", ""} {
			for range 2 {
				if !h.Ready() {
					t.Errorf("%q is not ready", want)
				}
			}
			if rec, err := h.Recv(); err != nil || string(rec) != want {
				t.Errorf("got %q, %v, want %q", rec, err, want)
			}
		}
		if p := make([]byte, 3); !h.Ready() {
			t.Error("three is not ready")
		} else if n, err := h.Read(p); n != 3 || err != nil || string(p) != "thr" {
			t.Errorf("Read: %q, %v", p[:n], err)
		} else if !h.Ready() {
			t.Error("the rest of a record is not ready")
		} else if rec, err := h.Recv(); err != nil || string(rec) != "ee" {
			t.Errorf("the rest: %q, %v", rec, err)
		}
		if rec, err := h.Recv(); err != nil || !bytes.Equal(rec, large) {
			t.Error(len(rec), err)
		}
		if rec, err := h.Recv(); err != nil || string(rec) != "last" {
			t.Error(string(rec), err)
		}
		var v string
		if !h.Ready() {
			t.Error("the object is not ready")
		} else if err := h.RecvObject(&v); err != nil || v != "object" {
			t.Error(v, err)
		}
		if h.Ready() {
			t.Error("ready after the last record")
		}
		close(h.done)
		synctest.Wait()
		if !h.Ready() {
			t.Error("the end is not ready")
		}
		if _, err := h.Recv(); err != io.EOF {
			t.Error(err)
		}
		if !h.Ready() {
			t.Error("the end is not ready for a second read")
		}
		_ = h.Close()
		m.nothingLeft(t)
	})
}

// If the deadline passes when a part of a record was sent, Write returns the length of the record together with the
// error. The rest of the record is sent before any other record.
func TestWriteDeadlineWithinARecordSendsAllOfIt(t *testing.T) {
	for _, object := range []bool{false, true} {
		for _, try := range []bool{false, true} {
			if object && try {
				continue
			}
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				h := openHeld(t, m)
				record := bytes.Repeat([]byte("0123456789abcdef"), 1<<17)
				start := time.Now()
				_ = h.w.SetWriteDeadline(start.Add(time.Second))
				switch {
				case try:
					if ok, err := h.w.TryWrite(record); !ok || err != nil {
						t.Fatal(ok, err)
					}
				case object:
					n, err := h.w.WriteObject(record)
					wantDeadline(t, "WriteObject", err)
					if n < len(record) {
						t.Errorf("WriteObject returned %d of %d", n, len(record))
					}
				default:
					n, err := h.w.Write(record)
					wantDeadline(t, "Write", err)
					if n != len(record) {
						t.Errorf("Write returned %d of %d", n, len(record))
					}
				}
				clear(record) // the caller may use its memory again
				if ok, err := h.w.TryWrite([]byte("small")); ok || err != nil {
					t.Error("a record comes between the pieces of another", ok, err)
				}
				time.Sleep(time.Second)
				if n, err := h.w.Write([]byte("small")); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Error(n, err)
				}
				wantDeadline(t, "Flush", h.w.Flush())
				_ = h.w.SetWriteDeadline(time.Time{})
				next := make(chan error, 1)
				go func() { _, err := h.w.Write([]byte("next")); next <- err }()
				var got []byte
				var err error
				if object {
					err = h.RecvObject(&got)
				} else {
					got, err = h.Recv()
				}
				if want := bytes.Repeat([]byte("0123456789abcdef"), 1<<17); err != nil || !bytes.Equal(got, want) {
					t.Errorf("got %d bytes, %v, want %d", len(got), err, len(want))
				}
				if err := errors.Join(<-next, h.w.Flush()); err != nil {
					t.Error(err)
				}
				h.finish(t, []byte("next"))
				m.nothingLeft(t)
			})
		}
	}
}

// The end of a stream drops the rest of a record, ends the wait for it, and the consumer does not take the part for a
// record.
func TestStreamEndsWithinTheRestOfARecord(t *testing.T) {
	for _, end := range []string{"consumer closes", "handler returns", "server closes"} {
		t.Run(end, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				h := openHeld(t, m)
				record := make([]byte, 2<<20)
				if ok, err := h.w.TryWrite(record); !ok || err != nil {
					t.Fatal(ok, err)
				}
				waiting := make(chan error, 1)
				go func() { _, err := h.w.Write([]byte("next")); waiting <- err }()
				synctest.Wait()
				switch end {
				case "consumer closes":
					_ = h.Close()
					if err := <-waiting; err == nil {
						t.Error("a record was written after the end")
					}
					close(h.done)
				case "handler returns": // which waits for the rest, as for a Write
					close(h.done)
					if rec, err := h.Recv(); err != nil || len(rec) != len(record) {
						t.Error(len(rec), err)
					}
					<-waiting
					if err := drain(h.Recv); err != nil {
						t.Error(err)
					}
				case "server closes":
					go m.server.Close()
					if err := <-waiting; !errors.Is(err, ErrServerClosed) {
						t.Error(err)
					}
					close(h.done)
					if rec, err := h.Recv(); err == nil {
						t.Errorf("%d bytes of a record were read as one", len(rec))
					}
				}
				_ = h.Close()
				m.nothingLeft(t)
			})
		})
	}
}

// Before the producer has answered, nothing can be sent. A deadline ends that wait as any other, and makes no send
// half.
func TestWriteDeadlineBeforeTheFirstPacket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		h := openHeld(t, m)
		if err := h.SetWriteDeadline(time.Now().Add(time.Hour)); err != nil || h.session.send.Load() != nil {
			t.Error("a deadline made a send half", err)
		}
		close(h.done)
		if err := drain(h.Recv); err != nil {
			t.Error(err)
		}
		_ = h.Close()
		m.nothingLeft(t)

		m.bus.SetFilter(fake.BlackHole(nil, nil))
		silent := m.open(t, "held")
		if ok, err := silent.TryWrite([]byte("record")); ok || err != nil {
			t.Error("sent to a producer that is not known", ok, err)
		}
		start := time.Now()
		_ = silent.SetWriteDeadline(start.Add(time.Second))
		n, err := silent.Write([]byte("record"))
		wantDeadline(t, "Write", err)
		if n != 0 {
			t.Error(n)
		}
		took(t, "Write", start, time.Second, time.Second)
		_ = silent.Close()
		m.bus.SetFilter(nil)
		m.nothingLeft(t)
	})
}

// Close does not heed the write deadline: it ends the stream normally.
func TestCloseIgnoresTheWriteDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		h := openHeld(t, m)
		if _, err := h.Write([]byte("record")); err != nil {
			t.Fatal(err)
		}
		_ = h.SetWriteDeadline(time.Now())
		if err := h.CloseSend(); err != nil {
			t.Error(err)
		}
		if rec, err := h.r.Recv(); err != nil || string(rec) != "record" {
			t.Error(string(rec), err)
		}
		if err := drain(h.r.Recv); err != nil {
			t.Error(err)
		}
		_ = h.w.SetWriteDeadline(time.Now())
		if err := h.w.Close(); err != nil {
			t.Error(err)
		}
		h.finish(t)
		m.nothingLeft(t)
	})
}
