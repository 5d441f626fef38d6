package stream

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
)

// joined returns the frames of packets, with those of one record put together.
func joined(t *testing.T, packets ...[]byte) (frames []Frame) {
	t.Helper()
	for _, p := range packets {
		_, body, err := ParsePacketHeader(p)
		for len(body) > 0 && err == nil {
			var f Frame
			if f, body, err = ParseFrame(body); err == nil {
				if n := len(frames); n > 0 && frames[n-1].Flags&FlagMore != 0 {
					f.Payload = append(bytes.Clone(frames[n-1].Payload), f.Payload...)
					frames = frames[:n-1]
				}
				frames = append(frames, f)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return frames
}

// A packet that is cut carries the same records in packets that fit.
func TestCutKeepsTheRecords(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		limit := PacketHeaderSize + FrameHeaderSize + 1 + rng.IntN(200)
		var frames []Frame
		for range 1 + rng.IntN(6) {
			f := testData(strings.Repeat("r", rng.IntN(400)))
			if rng.IntN(4) == 0 {
				f.Flags |= FlagMsgPack
			}
			frames = append(frames, f)
		}
		if rng.IntN(3) == 0 {
			frames[len(frames)-1].Flags |= FlagMore // goes on in the next packet
		} else if rng.IntN(3) == 0 {
			frames = append(frames, Frame{Type: FrameClose, Code: 1000})
		}
		p := AppendPacket(nil, PacketHeader{Flags: PacketSeq | PacketAck, Sender: 7, Seq: 9}, frames...)
		pieces, ok := cutPacket(bytes.Clone(p), limit)
		if !ok {
			t.Fatalf("a packet of %v was not cut for %d bytes", frames, limit)
		}
		for i, piece := range pieces {
			h, _, err := ParsePacketHeader(piece)
			want := PacketSeq
			if i == len(pieces)-1 {
				want |= PacketAck
			}
			if err != nil || len(piece) > limit || h.Flags != want || h.Sender != 7 {
				t.Fatalf("piece %d of %d has %d bytes, limit %d, header %+v, %v", i, len(pieces), len(piece), limit, h, err)
			}
		}
		got, want := joined(t, pieces...), joined(t, p)
		if !slices.EqualFunc(got, want, func(a, b Frame) bool {
			return a.Type == b.Type && a.Flags == b.Flags && a.Code == b.Code && bytes.Equal(a.Payload, b.Payload)
		}) {
			t.Fatalf("cut for %d bytes, %v became %v", limit, want, got)
		}
	}
}

// Headers, trailers and reasons of a CLOSE stay whole.
func TestCutLeavesOtherFramesWhole(t *testing.T) {
	reason := []byte(strings.Repeat("x", 100))
	p := AppendPacket(nil, PacketHeader{Flags: PacketSeq, Sender: 7}, testData("a"), Frame{Type: FrameClose, Code: 4000, Payload: reason})
	if pieces, ok := cutPacket(p, PacketHeaderSize+FrameHeaderSize+100); !ok || len(pieces) != 2 {
		t.Errorf("%d pieces, %v", len(pieces), ok)
	}
	if pieces, ok := cutPacket(p, PacketHeaderSize+FrameHeaderSize+99); ok {
		t.Errorf("%q", pieces)
	}
	if _, ok := cutPacket(p, PacketHeaderSize+FrameHeaderSize); ok {
		t.Error("cut for packets that have room for nothing")
	}
}

// The server's max_payload changes under streams whose packets are sealed already. Nothing is lost, also if the smaller packets are
// more than the peer has granted.
func TestMaxPayloadChangesUnderStreams(t *testing.T) {
	for _, window := range []int{4 << 10, 64 << 10, 4 << 20} {
		for _, size := range []int{10, 3000, 100_000} {
			t.Run(fmt.Sprintf("window=%d/size=%d", window, size), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					m := memoryTest(t, ClientParams{Window: window})
					m.bus.Delay = time.Millisecond
					n := max(20, min(3000, 2<<20/size))
					record := func(i int) []byte { return bytes.Repeat([]byte{byte(i), byte(i >> 8)}, size/2) }
					m.handle(t, "x", func(w *Writer, r *Request) error {
						for i := range n {
							if _, err := w.Write(record(i)); err != nil {
								return err
							}
							if i%50 == 49 {
								if err := w.Flush(); err != nil {
									return err
								}
							}
						}
						return w.Sync(r.Context())
					})
					st := m.open(t, "x")
					rng := rand.New(rand.NewPCG(uint64(window), uint64(size)))
					done := make(chan struct{})
					go func() {
						for {
							select {
							case <-done:
								return
							case <-time.After(5 * time.Millisecond):
							}
							// Packets under way are not sent again here, so none is ever too large: nothing is lost.
							m.back.SetMaxPayload(int64(200 + rng.IntN(100_000)))
						}
					}()
					defer close(done)
					for i := range n {
						rec, err := st.Recv()
						if err != nil || !bytes.Equal(rec, record(i)) {
							t.Fatalf("record %d of %d: %d bytes, %v", i, n, len(rec), err)
						}
					}
					if _, err := st.Recv(); err != io.EOF {
						t.Error(err)
					}
				})
			})
		}
	}
}

// What was published once keeps its number. If it is missed when the server does not take it any more, the stream ends with an error
// that names both sizes.
func TestMaxPayloadShrinksUnderALostPacket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		cause := make(chan error, 1)
		m.handle(t, "x", func(w *Writer, r *Request) error {
			m.bus.SetFilter(lose(1, sequencedOf(m.back)))
			if _, err := w.Write(make([]byte, 10_000)); err != nil {
				return err
			}
			if err := w.Flush(); err != nil {
				return err
			}
			m.back.SetMaxPayload(5000)
			<-r.Context().Done()
			_, err := w.Write(nil)
			cause <- err
			return err
		})
		size := fmt.Sprint(PacketHeaderSize + FrameHeaderSize + 10_000)
		_, err := m.open(t, "x").Recv()
		if ce, ok := errors.AsType[*CloseError](err); !ok || ce.Code != CloseInternalServerErr || !strings.Contains(ce.Text, size) || !strings.Contains(ce.Text, "5000") {
			t.Errorf("consumer: %v", err)
		}
		if err := <-cause; !errors.Is(err, nats.ErrMaxPayload) || !strings.Contains(err.Error(), size) || !strings.Contains(err.Error(), "5000") {
			t.Errorf("handler: %v", err)
		}
		m.nothingLeft(t)
	})
}

// A request is measured against what the server takes now, in both directions.
func TestOpenAfterMaxPayloadChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "x", func(w *Writer, r *Request) error { return nil })
		try := func(size int) error {
			st, err := m.client.Open(t.Context(), "x", make([]byte, size))
			if err != nil {
				return fmt.Errorf("Open: %w", err)
			}
			defer st.Close()
			_, err = st.Recv()
			return err
		}
		m.conn.SetMaxPayload(1000)
		for _, step := range []struct {
			max  int64
			size int
			ok   bool
		}{{1000, 2000, false}, {4000, 2000, true}, {1000, 2000, false}, {1000, 100, true}, {0, 5 << 20, true}} {
			m.conn.SetMaxPayload(step.max)
			err := try(step.size)
			if step.ok && err != io.EOF || !step.ok && !errors.Is(err, nats.ErrMaxPayload) {
				t.Errorf("request of %d bytes, the server takes %d: %v", step.size, step.max, err)
			}
			if !step.ok && err != nil && !strings.Contains(err.Error(), fmt.Sprint(step.max)) {
				t.Errorf("the error does not say that the server takes %d: %v", step.max, err)
			}
		}
		m.nothingLeft(t)
		m.conn.Set(nats.RECONNECTING) // nobody can be asked
		m.conn.SetMaxPayload(1000)
		time.Sleep(time.Second)
		st, err := m.client.Open(t.Context(), "x", make([]byte, 2000))
		if err != nil {
			t.Fatal(err)
		}
		_ = st.Close()
		m.conn.Set(nats.CONNECTED)
		m.nothingLeft(t)
	})
}

// Before the first connect nobody knows what the server takes. Nothing is refused, and records travel together.
func TestBeforeTheFirstConnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "x", func(w *Writer, r *Request) error {
			_, err := w.Write(r.Data)
			return err
		})
		conn := m.bus.Connect("early")
		conn.Set(nats.RECONNECTING)
		conn.SetMaxPayload(0)
		c := fakeClient(t, conn, ClientParams{})
		st, err := c.Open(t.Context(), "x", make([]byte, 1000))
		if err != nil {
			t.Fatal(err)
		}
		var sizes []int
		conn.Published = func(_, _ string, data []byte) error {
			if isSequenced(data) {
				sizes = append(sizes, len(data))
			}
			return nil
		}
		w := c.NewWriter(consumerSubject(5))
		for range 1000 {
			if n, err := w.Write(make([]byte, 10)); n != 10 || err != nil {
				t.Fatal(n, err)
			}
		}
		synctest.Wait()
		conn.SetMaxPayload(4000)
		conn.Set(nats.CONNECTED)
		if rec, err := st.Recv(); len(rec) != 1000 || err != nil {
			t.Errorf("%d bytes, %v", len(rec), err)
		}
		if err := w.Flush(); err != nil {
			t.Error(err)
		}
		if len(sizes) != 6 || slices.Max(sizes) > 4000 { // of two packets, four and two pieces
			t.Errorf("18 KB in packets of %v", sizes)
		}
	})
}
