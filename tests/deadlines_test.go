package stream_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/natsstream/stream"
)

// timed is one direction of a stream, with a deadline.
type timed struct {
	write       func([]byte) (int, error)
	try         func([]byte) (bool, error)
	setDeadline func(time.Time) error
}

// soon returns a deadline that is about to pass, has passed, or is none.
func soon(r *rand.Rand) time.Time {
	if r.IntN(10) == 0 {
		return time.Time{}
	}
	return time.Now().Add(time.Duration(r.IntN(1500)-200) * time.Microsecond)
}

// sendTimed writes records with their numbers in them, in spite of deadlines that pass.
func sendTimed(r *rand.Rand, w timed, records, most int) error {
	buf := make([]byte, most)
	for i := range records {
		p := buf[:8+r.IntN(most-7)]
		copy(p, bytes.Repeat([]byte{byte(i)}, len(p)))
		binary.BigEndian.PutUint64(p, uint64(i))
		for sent := false; !sent; {
			var err error
			if r.IntN(3) == 0 {
				sent, err = w.try(p)
			} else {
				if err := w.setDeadline(soon(r)); err != nil {
					return err
				}
				var n int
				n, err = w.write(p)
				if n != 0 && n != len(p) {
					return fmt.Errorf("record %d: %d of %d bytes were written", i, n, len(p))
				}
				sent = n == len(p)
			}
			if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
				return fmt.Errorf("record %d: %w", i, err)
			}
		}
		clear(p) // its memory is the test's again
	}
	return w.setDeadline(time.Time{})
}

// recvTimed reads the records of sendTimed until the end of the stream.
func recvTimed(r *rand.Rand, recv func() ([]byte, error), ready func() bool, setDeadline func(time.Time) error, records int) error {
	for i := 0; ; {
		if r.IntN(2) == 0 {
			if err := setDeadline(soon(r)); err != nil {
				return err
			}
		}
		isReady := r.IntN(2) == 0 && ready()
		if isReady {
			_ = setDeadline(time.Time{})
		}
		rec, err := recv()
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded) && !isReady:
			continue
		case err == io.EOF && i == records:
			return nil
		case err != nil:
			return fmt.Errorf("record %d of %d: %w", i, records, err)
		case len(rec) < 8 || binary.BigEndian.Uint64(rec) != uint64(i) || bytes.Count(rec[8:], []byte{byte(i)}) != len(rec)-8:
			return fmt.Errorf("record %d is not the one that was written: %d bytes", i, len(rec))
		}
		i++
	}
}

// Deadlines that pass at any moment lose no record and repeat none, of any size, in both directions, with little
// memory, and while another goroutine changes them.
func TestDeadlinesLoseNoRecord(t *testing.T) {
	records, most := scaled(100), singleLimit/2
	p := newPair(t, pairOptions{consumer: stream.ClientParams{MaxBuffered: 2 << 20, MaxRecordSize: 1 << 20}})
	s := newService(t, p, stream.ServerParams{MaxBuffered: 2 << 20, MaxRecordSize: 1 << 20})
	both := func(r *rand.Rand, w timed, closeSend func() error, recv func() ([]byte, error), ready func() bool, setRead func(time.Time) error) error {
		var all sync.WaitGroup
		var sent, received error
		own := rand.New(rand.NewPCG(r.Uint64(), r.Uint64()))
		all.Go(func() {
			if sent = sendTimed(own, w, records, most); sent == nil {
				sent = closeSend()
			}
		})
		received = recvTimed(r, recv, ready, setRead, records)
		all.Wait()
		return errors.Join(sent, received)
	}
	s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
		return both(rand.New(rand.NewPCG(1, binary.BigEndian.Uint64(r.Data))), timed{w.Write, w.TryWrite, w.SetWriteDeadline}, func() error { return nil },
			r.Recv, r.Ready, r.SetReadDeadline)
	})
	inParallel(t, 4, func(i int, r *rand.Rand) {
		st, err := p.consumer.Open(testContext(t), "svc", binary.BigEndian.AppendUint64(nil, uint64(i)))
		if err != nil {
			t.Error(err)
			return
		}
		defer st.Close()
		if err := both(r, timed{st.Write, st.TryWrite, st.SetWriteDeadline}, st.CloseSend, st.Recv, st.Ready, st.SetReadDeadline); err != nil {
			t.Errorf("stream %d: %v", i, err)
		}
	})
}

// Setting deadlines of both directions from several goroutines, while others read, write, look ahead and close, is no
// race and leaves nothing.
func TestDeadlinesMayBeSetAtAnyTime(t *testing.T) {
	p, _ := newServed(t, stream.ServerParams{}, echo)
	inParallel(t, 4, func(i int, r *rand.Rand) {
		for range scaled(40) {
			st := open(t, p.consumer, "svc")
			var all sync.WaitGroup
			for range 2 {
				seed := r.Uint64()
				all.Go(func() {
					r := rand.New(rand.NewPCG(seed, 0))
					for range 50 {
						switch r.IntN(3) {
						case 0:
							_ = st.SetReadDeadline(soon(r))
						case 1:
							_ = st.SetWriteDeadline(soon(r))
						default:
							_ = st.SetDeadline(soon(r))
						}
					}
				})
			}
			all.Go(func() {
				for range 20 {
					if _, err := st.Write([]byte("record")); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, stream.ErrClosed) {
						t.Error(err)
					}
				}
			})
			read := make(chan struct{})
			go func() {
				defer close(read)
				for err := error(nil); err != io.EOF && !errors.Is(err, stream.ErrClosed); _, err = st.Recv() {
					if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
						t.Error(err)
						return
					}
				}
			}()
			if r.IntN(2) == 0 {
				_ = st.Close()
			}
			all.Wait()
			_ = st.Close() // without a deadline, the reader may wait for a record that was not written
			<-read
		}
	})
}

// Against a producer of the original library, reads have deadlines as well, and a write says that it takes no records.
func TestDeadlinesWithAFallbackPeer(t *testing.T) {
	p := newPair(t)
	st, tell := oldProducer(t, p)
	_ = st.SetDeadline(time.Now().Add(-time.Second))
	if _, err := st.Recv(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	_ = st.SetDeadline(time.Time{})
	tell([]byte(`{"type":1,"data":"cmVjb3Jk"}`))
	eventually(t, "a record is ready", st.Ready)
	if rec, err := st.Recv(); err != nil || string(rec) != "record" {
		t.Errorf("got %q, %v", rec, err)
	}
	eventually(t, "a write fails", func() bool {
		ok, err := st.TryWrite([]byte("x"))
		if ok || err != nil && !errors.Is(err, stream.ErrOneWay) {
			t.Fatal(ok, err)
		}
		return err != nil
	})
	_ = st.Close()
}

// A Writer that can never write returns its own error, not that of a deadline.
func TestDeadlinesOfAnUnusableWriter(t *testing.T) {
	w := stream.NewWriter(nil, "inbox")
	if err := w.SetWriteDeadline(time.Now()); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	if ok, err := w.TryWrite([]byte("x")); ok || err == nil {
		t.Error(ok, err)
	}
}

// TryWrite refuses what Write refuses.
func TestTryWriteRefusesWhatWriteRefuses(t *testing.T) {
	tried := make(chan error, 3)
	p, _ := newServed(t, stream.ServerParams{MaxRecordSize: 1000}, func(w *stream.Writer, r *stream.Request) error {
		_, err := w.TryWrite(make([]byte, 1001))
		tried <- err
		_ = w.Close()
		_, err = w.TryWrite(nil)
		tried <- err
		return nil
	})
	st := open(t, p.consumer, "svc")
	wantEOF(t, st)
	if err := <-tried; !errors.Is(err, stream.ErrRecordTooLarge) {
		t.Error(err)
	}
	if err := <-tried; !errors.Is(err, stream.ErrClosed) {
		t.Error(err)
	}
	_ = st.Close()
	if ok, err := st.TryWrite(nil); ok || !errors.Is(err, stream.ErrClosed) {
		t.Error(ok, err)
	}
}
