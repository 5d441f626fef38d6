package stream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn/fake"
)

// The last words of a stream may be lost, as often as they like within ResumeTimeout: both ends end normally all the same.
func TestLastWordsLost(t *testing.T) {
	for _, lost := range []int{1, 2, 3, 5, 10} { // of what the silent end says after its peer closed
		for _, c := range []struct {
			name     string
			consumer bool // whose words are lost
			handler  func(w *Writer, r *Request) error
			writes   bool // the consumer does
		}{
			{"handler reads", false, func(_ *Writer, r *Request) error { return drain(r.Recv) }, true},
			{"handler reads and closes", false, func(w *Writer, r *Request) error { return errors.Join(drain(r.Recv), w.Close()) }, true},
			{"handler does not read", false, func(w *Writer, r *Request) error { return nil }, true},
			{"consumer reads", true, func(w *Writer, _ *Request) error { _, err := w.Write([]byte("x")); return err }, false},
			{"consumer reads and writes", true, func(w *Writer, r *Request) error { _, err := r.WriteTo(w); return err }, true},
		} {
			t.Run(fmt.Sprintf("%s/lost=%d", c.name, lost), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := memoryTest(t, ClientParams{})
					silent := m.back
					if c.consumer {
						silent = m.conn
					}
					n, closed := lost, false
					m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
						closed = closed || from != silent && hasClose(msg.Data)
						if closed && from == silent && isControl(msg.Data) && n > 0 {
							n--
							return false
						}
						return true
					})
					m.handle(t, "last", c.handler)
					s := openForAnHour(t, m, "last")
					if c.writes {
						if _, err := s.Write([]byte("x")); err != nil {
							t.Error(err)
						}
						if err := s.CloseSend(); err != nil {
							t.Error(err)
						}
					}
					if err := drain(s.Recv); err != nil {
						t.Errorf("the consumer: %v", err)
					}
					if c.writes && c.name != "handler does not read" {
						if err := s.Sync(t.Context()); err != nil {
							t.Errorf("the consumer's Sync: %v", err)
						}
					}
					<-s.Context().Done()
					if cause := context.Cause(s.Context()); cause != io.EOF && c.name != "handler does not read" {
						t.Errorf("the consumer's context ended with %v", cause)
					}
					time.Sleep(m.times.ResumeTimeout)
					m.nothingLeft(t)
				})
			})
		}
	}
}

// drain reads until the end, and returns what is wrong with it.
func drain(recv func() ([]byte, error)) error {
	for {
		if _, err := recv(); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// A handler that closes with an error and goes on reading hears soon that its consumer has left, also if the consumer's words
// after the CLOSE are lost.
func TestHandlerReadsAfterItsError(t *testing.T) {
	for lost := range 4 {
		for _, first := range []string{"", "a record"} {
			t.Run(fmt.Sprintf("lost=%d/first=%s", lost, first), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := memoryTest(t, ClientParams{})
					n, closed := lost, false
					m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
						closed = closed || from == m.back && hasClose(msg.Data)
						if closed && from == m.conn && n > 0 {
							n--
							return false
						}
						return true
					})
					read := make(chan error, 1)
					m.handle(t, "fails", func(w *Writer, r *Request) error {
						if first != "" {
							if _, err := w.Write([]byte(first)); err != nil {
								return err
							}
						}
						if err := w.CloseWithCode(4321); err != nil {
							return err
						}
						_, err := r.Recv()
						read <- err
						return nil
					})
					s := openForAnHour(t, m, "fails")
					if err := drain(s.Recv); !errors.Is(err, &CloseError{Code: 4321}) {
						t.Errorf("the consumer: %v", err)
					}
					time.Sleep(time.Duration(lost+1) * m.times.AckTimeout)
					synctest.Wait()
					if len(read) == 0 {
						t.Error("the handler still reads")
					} else if err := <-read; !errors.Is(err, &CloseError{Code: CloseCanceled}) {
						t.Errorf("the handler read %v", err)
					}
					m.nothingLeft(t)
				})
			})
		}
	}
}

// An endpoint remembers streams for their time, a bounded number of them, and takes no memory before one has ended.
func TestEndedStreams(t *testing.T) {
	const now, until = 1000, 2000
	token := func(i int) (b [TokenSize]byte) { copy(b[:], fmt.Sprintf("%016d", i)); return b }
	var table endedStreams
	if table.find("0000000000000001", now) != nil {
		t.Error("an empty table knows a stream")
	}
	held := func(n int, now int64) (found int) {
		for i := range n {
			b := token(i)
			if e := table.find(string(b[:]), now); e != nil {
				found++
				if e.code != uint16(i) {
					t.Errorf("stream %d has the word of %d", i, e.code)
				}
			}
		}
		return found
	}
	for i := range 200 {
		table.add(endedStream{token: token(i), until: until, code: uint16(i)}, now)
	}
	if n := held(200, now); n != 200 {
		t.Errorf("%d of 200 streams are remembered", n)
	}
	if n := held(200, until); n != 0 {
		t.Errorf("%d streams are remembered when their time is over", n)
	}
	for i := range 4 * maxEnded {
		table.add(endedStream{token: token(i), until: until}, now)
	}
	if n := len(table.places); n != maxEnded {
		t.Errorf("%d places, want %d", n, maxEnded)
	}
	places := len(table.places)
	for i := range 4 * maxEnded { // all others are over
		table.add(endedStream{token: token(i), until: 2 * until}, until)
	}
	if n := len(table.places); n != places {
		t.Errorf("%d places, want %d", n, places)
	}
}

// An ended stream is answered for to its peer alone.
func TestEndedStreamAnswersItsPeer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "one", func(w *Writer, _ *Request) error { _, err := w.Write([]byte("x")); return err })
		m.handle(t, "wait", waits(make(chan error, 1)))
		other := openForAnHour(t, m, "wait") // the clock runs while a stream is open
		s := openForAnHour(t, m, "one")
		if err := drain(s.Recv); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * maxTick)
		peer := s.session.bucket.sender()
		answers := make(chan []byte, 10)
		stop, err := m.back.Subscribe("asker", "", func(msg *nats.Msg) { answers <- msg.Data })
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		ask := func(sender uint64) Frame {
			_ = m.back.Publish(s.session.reply, "asker", AppendPacket(nil, PacketHeader{Sender: sender}, Frame{Type: FramePing}))
			frames := controlFrames(<-answers)
			if len(frames) != 1 {
				t.Fatalf("%d frames", len(frames))
			}
			return frames[0]
		}
		if f := ask(peer + 2); f.Type != FrameReset || f.Code != CloseCanceled {
			t.Errorf("a stranger got %v %d", f.Type, f.Code)
		}
		f := ask(peer)
		if c, err := ParseCredit(f.Payload); f.Type != FrameCredit || err != nil || c.Ack != 1 {
			t.Errorf("the peer got %v %+v, %v", f.Type, c, err)
		}
		time.Sleep(m.times.DisconnectTimeout)
		if f := ask(peer); f.Type != FrameReset {
			t.Errorf("after its time the peer got %v", f.Type)
		}
		_ = other.Close()
		m.nothingLeft(t)
	})
}
