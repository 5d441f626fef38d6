package stream

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/natsconn"
	"github.com/natsstream/stream/internal/natsconn/fake"
	"github.com/natsstream/stream/internal/object"
	"github.com/natsstream/stream/internal/ring"
)

// The parts of a record's path, each alone: no server, no socket. Package bench measures the whole path.

var benchSizes = []int{16, 128, 1024, 16384}

// benchRecords times f, which handles n records, and reports allocations of the whole process per record.
func benchRecords(b *testing.B, f func(n int)) {
	b.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	b.ResetTimer()
	f(b.N)
	b.StopTimer()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.Mallocs-before.Mallocs)/float64(b.N), "mallocs/rec")
}

// benchConn returns a connection that swallows all messages. If a writer publishes a packet and acks is set, it plays
// the consumer: it grants credit, through the mux, every 16 packets and for marks.
func benchConn(acks bool) *fake.Conn {
	conn := fake.New()
	var (
		msg     nats.Msg
		buf     []byte
		payload [16]byte
		marked  bool // the packet before was a mark
	)
	conn.Requested = func(*nats.Msg) error { return nil }
	conn.Published = func(_, reply string, data []byte) error {
		if reply != "" {
			msg.Subject = reply
		}
		if !acks || len(data) < PacketHeaderSize || data[0] != PacketMagic {
			return nil
		}
		h, _, err := ParsePacketHeader(data)
		if err != nil {
			return err
		}
		if marked || h.Seq%16 == 0 {
			// The packet itself counts as sent only when publish returns. The message can be used again for the next
			// credit, because the outbox acts on it before it publishes another packet.
			credit := Credit{Ack: h.Seq, Packets: h.Seq + maxPackets, Bytes: math.MaxInt64}
			buf = AppendPacket(buf[:0], PacketHeader{Sender: 1}, Frame{Type: FrameCredit, Payload: AppendCredit(payload[:0], credit)})
			msg.Data = buf
			conn.Deliver(&msg)
		}
		marked = h.Flags&PacketMark != 0
		return nil
	}
	return conn
}

// benchTransport is a connection of this file: a *fake.Conn, or one that embeds it.
type benchTransport interface {
	natsconn.Conn
	Set(nats.Status)
}

// benchEndpoint returns an endpoint that the end of b closes. The connection closes first, because close waits for the
// producers of unanswered requests while it is up, and benchConn answers none.
//
// The two collections free the memory of the trial before. Without them, streams of this trial lie between those of the
// last one, and BenchmarkMux with 10,000 streams takes up to 1.5 times as long.
func benchEndpoint(b *testing.B, t benchTransport) *endpoint {
	b.Helper()
	runtime.GC()
	runtime.GC()
	params, err := ClientParams{}.withDefaults()
	if err != nil {
		b.Fatal(err)
	}
	ep, err := newEndpoint(t, "", params)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		t.Set(nats.CLOSED)
		ep.close(testClosed)
	})
	return ep
}

// benchPacket returns a packet of as many records as fit a coalescing one, or as records says, and the number of them.
func benchPacket(size, records int) ([]byte, int) {
	if most := max(1, (coalesceMost-PacketHeaderSize)/(FrameHeaderSize+size)); records == 0 || records > most {
		records = most
	}
	frames := make([]Frame, records)
	for i := range frames {
		frames[i] = Frame{Type: FrameData, Payload: make([]byte, size)}
	}
	return AppendPacket(nil, PacketHeader{Flags: PacketSeq, Sender: 1}, frames...), records
}

// setPacketSeq writes the whole second word of the header at once: a word that is read as a whole and was just written
// in parts waits for both.
func setPacketSeq(p []byte, seq uint32) {
	binary.BigEndian.PutUint64(p[8:], packetTail(seq, uint32(len(p))))
}

// BenchmarkMux is the subscription's callback for one message of one record. The messages come in batches that fit the
// rings; preparing a batch and emptying the rings again is not counted.
func BenchmarkMux(b *testing.B) {
	for _, streams := range []int{1, 10_000} {
		b.Run(fmt.Sprintf("size=128/streams=%d", streams), func(b *testing.B) {
			ep := benchEndpoint(b, benchConn(false))
			opened := make([]*Stream, streams)
			for i := range opened {
				s, err := ep.open(b.Context(), &nats.Msg{Subject: "bench"}, openOptions{codec: MsgPack})
				if err != nil {
					b.Fatal(err)
				}
				s.session.bucket.grantedBytes.Store(math.MaxUint64)
				s.session.bucket.open.Store(math.MaxUint64)
				opened[i] = s
			}
			packet, _ := benchPacket(128, 1)
			batch := make([]nats.Msg, max(streams, maxPackets))
			for i := range batch {
				batch[i] = nats.Msg{Subject: opened[i%streams].session.reply(), Data: bytes.Clone(packet)}
			}
			sent := make([]uint32, streams)
			var took time.Duration
			receive := func(n int) {
				for n > 0 {
					msgs := batch[:min(n, len(batch))]
					for i := range msgs {
						j := i % streams
						setPacketSeq(msgs[i].Data, sent[j])
						sent[j]++
						opened[j].session.bucket.grantedPackets.Store(sent[j])
					}
					start := time.Now()
					for i := range msgs {
						ep.receive(&msgs[i], nil)
					}
					took += time.Since(start)
					for i := range msgs {
						s := &opened[i%streams].session
						if _, ok := s.bucket.ring.Pop(); !ok {
							b.Fatalf("a packet was not accepted: %v", s.end.Load())
						}
					}
					n -= len(msgs)
				}
			}
			receive(2 * len(batch))
			took = 0
			benchRecords(b, receive)
			b.ReportMetric(float64(took)/float64(b.N), "ns/op")
		})
	}
}

// BenchmarkRing is a Push and a Pop of an element of the bucket's ring.
func BenchmarkRing(b *testing.B) {
	var r ring.Ring[[]byte]
	r.Init(maxPackets)
	data := make([]byte, 128)
	const depth = 32
	for range depth {
		r.Push(data)
	}
	benchRecords(b, func(n int) {
		for range n {
			r.Push(data)
			r.Pop()
		}
	})
}

// BenchmarkRecv is Recv of records that have arrived, in full packets; the callback that brings a packet is included.
func BenchmarkRecv(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			ep := benchEndpoint(b, benchConn(false))
			s, err := ep.open(b.Context(), &nats.Msg{Subject: "bench"}, openOptions{codec: MsgPack})
			if err != nil {
				b.Fatal(err)
			}
			defer s.Close()
			packet, records := benchPacket(size, 0)
			m := &nats.Msg{Subject: s.session.reply(), Data: packet}
			seq := uint32(0)
			recv := func(n int) {
				for n > 0 {
					setPacketSeq(packet, seq)
					seq++
					ep.receive(m, nil)
					k := min(n, records)
					for range k {
						rec, err := s.Recv()
						if err != nil {
							b.Fatal(err)
						}
						if len(rec) != size {
							b.Fatalf("record of %d bytes, want %d", len(rec), size)
						}
					}
					n -= k
					for range records - k { // whole packets only: the next one arrives at an empty ring
						if _, err := s.Recv(); err != nil {
							b.Fatal(err)
						}
					}
				}
			}
			recv(100 * records)
			benchRecords(b, recv)
		})
	}
}

// benchWriter returns a writer to a consumer that reads as fast as it is written to.
func benchWriter(b *testing.B, t benchTransport, codec Codec) *Writer {
	b.Helper()
	ep := benchEndpoint(b, t)
	token := AppendToken(nil, Token{Codec: codec, LogPackets: 8, LogBytes: 40, ID: 1})
	w := (&Client{ep: ep, codec: codec}).NewWriter("_SINBOX.bench." + string(token))
	b.Cleanup(func() { _ = w.Close() })
	return w
}

// BenchmarkWrite is Write of a record into a coalescing packet. The outbox publishes, into the void, on another core.
func BenchmarkWrite(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			w := benchWriter(b, benchConn(true), MsgPack)
			rec := make([]byte, size)
			write := func(n int) {
				for range n {
					if _, err := w.Write(rec); err != nil {
						b.Fatal(err)
					}
				}
			}
			write(4 << 20 / size)
			benchRecords(b, write)
		})
	}
}

// gate is a connection that takes its time: a publish hands over to the benchmark and waits until it is handed back.
type gate struct {
	*fake.Conn
	turn chan struct{}
}

func newGate() *gate {
	g := &gate{Conn: benchConn(true), turn: make(chan struct{})}
	publish := g.Published
	g.Published = func(subject, reply string, data []byte) error {
		g.turn <- struct{}{}
		<-g.turn
		return publish(subject, reply, data)
	}
	return g
}

// during runs f and lets everything through meanwhile.
func (t *gate) during(f func()) {
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	for {
		select {
		case <-done:
			return
		case <-t.turn:
			t.turn <- struct{}{}
		}
	}
}

// BenchmarkWriteAhead is Write while the outbox waits in a publish, packets that fill included. Unlike BenchmarkWrite
// it does not depend on when the outbox comes for a packet, which is another at each run.
func BenchmarkWriteAhead(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			t := newGate()
			w := benchWriter(b, t, MsgPack)
			rec := make([]byte, size)
			write := func(n int) {
				for range n {
					if _, err := w.Write(rec); err != nil {
						b.Fatal(err)
					}
				}
			}
			batch := (1 << 20) / (FrameHeaderSize + size) // far from where it would wait for credit
			var took time.Duration
			ahead := func(n int) {
				for ; n > 0; n -= batch {
					write(1)
					<-t.turn // the outbox publishes this one
					start := time.Now()
					write(min(n, batch))
					took += time.Since(start)
					t.turn <- struct{}{}
					t.during(func() { _ = w.Flush() })
				}
			}
			ahead(4 * batch)
			took = 0
			benchRecords(b, ahead)
			b.ReportMetric(float64(took)/float64(b.N), "ns/op")
			t.during(func() { _ = w.Close() })
		})
	}
}

type benchObject struct {
	ID   int     `json:"id" msgpack:"id"`
	Rate float64 `json:"rate" msgpack:"rate"`
	Text string  `json:"text" msgpack:"text"`
}

// BenchmarkWriteObject writes an object of roughly the size named.
func BenchmarkWriteObject(b *testing.B) {
	for _, codec := range []Codec{JSON, MsgPack} {
		for _, size := range []int{128, 1024} {
			b.Run(fmt.Sprintf("codec=%v/size=%d", codec, size), func(b *testing.B) {
				w := benchWriter(b, benchConn(true), codec)
				v := &benchObject{ID: 12345, Rate: 0.25, Text: strings.Repeat("x", size-32)}
				write := func(n int) {
					for range n {
						if _, err := w.WriteObject(v); err != nil {
							b.Fatal(err)
						}
					}
				}
				write(1000)
				benchRecords(b, write)
			})
		}
	}
}

// BenchmarkDecodeObject decodes an object of roughly the size named, as RecvObject does with a record.
func BenchmarkDecodeObject(b *testing.B) {
	for _, codec := range []Codec{JSON, MsgPack} {
		for _, size := range []int{128, 1024} {
			b.Run(fmt.Sprintf("codec=%v/size=%d", codec, size), func(b *testing.B) {
				v := &benchObject{ID: 12345, Rate: 0.25, Text: strings.Repeat("x", size-32)}
				e := object.NewEncoder()
				rec, err := e.Encode(v, objectCodec(codecFlag(codec)), nil)
				if err != nil {
					b.Fatal(err)
				}
				var got benchObject
				benchRecords(b, func(n int) {
					for range n {
						if err := decodeObject(rec, codecFlag(codec), FlagRaw, &got); err != nil {
							b.Fatal(err)
						}
					}
				})
			})
		}
	}
}

// BenchmarkAppendFrame appends a frame to a buffer that has room.
func BenchmarkAppendFrame(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			f := Frame{Type: FrameData, Payload: make([]byte, size)}
			buf := make([]byte, 0, FrameHeaderSize+size)
			benchRecords(b, func(n int) {
				for range n {
					buf = AppendFrame(buf[:0], f)
				}
			})
		})
	}
}

// BenchmarkParseFrame takes the frames off a full packet, one per operation.
func BenchmarkParseFrame(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			packet, _ := benchPacket(size, 0)
			body := packet[PacketHeaderSize:]
			rest := body
			benchRecords(b, func(n int) {
				for range n {
					f, next, err := ParseFrame(rest)
					if err != nil || len(f.Payload) != size {
						b.Fatal(len(f.Payload), err)
					}
					if rest = next; len(rest) == 0 {
						rest = body
					}
				}
			})
		})
	}
}

// BenchmarkFallbackAppend encodes a record for a peer that speaks only the JSON fallback.
func BenchmarkFallbackAppend(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			rec := make([]byte, size)
			buf := make([]byte, 0, jsonwire.DataSize(size))
			benchRecords(b, func(n int) {
				for range n {
					buf = jsonwire.AppendData(buf[:0], rec)
				}
			})
		})
	}
}

// BenchmarkFallbackParse decodes such a message. It is decoded in place, so each operation begins with a copy.
func BenchmarkFallbackParse(b *testing.B) {
	for _, size := range benchSizes {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			msg := jsonwire.AppendData(nil, make([]byte, size))
			buf := make([]byte, len(msg))
			benchRecords(b, func(n int) {
				for range n {
					copy(buf, msg)
					rec, end, err := parseJSON(buf)
					if err != nil || end != nil || len(rec) != size {
						b.Fatal(len(rec), end, err)
					}
				}
			})
		})
	}
}

// BenchmarkOpen is Open and Close of a stream that nothing came of.
func BenchmarkOpen(b *testing.B) {
	ep := benchEndpoint(b, benchConn(false))
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	benchRecords(b, func(n int) {
		for range n {
			s, err := ep.open(ctx, &nats.Msg{Subject: "bench"}, openOptions{codec: MsgPack})
			if err != nil {
				b.Fatal(err)
			}
			_ = s.Close()
		}
	})
}
