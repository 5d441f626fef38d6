package stream_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// Bytes from a stranger. Anybody who may publish to a reply subject can send anything: random bytes, packets of another
// stream, JSON of every wrong shape. The stream that they hit ends with an error that has a close code, or the mux
// drops and counts them. Nothing panics, a length field takes no memory, and no other stream notices.

// rawLength writes into the header of b, where it is there as a whole, how long b is.
func rawLength(b []byte) []byte {
	if len(b) >= stream.PacketHeaderSize {
		binary.BigEndian.PutUint32(b[12:], uint32(len(b)))
	}
	return b
}

// rawBytes returns a packet with the bytes of frames behind whole ones, and its true length in the header.
func rawBytes(packet []byte, frames ...byte) []byte { return rawLength(append(packet, frames...)) }

// outcome is the effect of a stranger's message.
type outcome struct {
	code    int                          // the stream ends with this close code; 0 if it goes on
	records []string                     // delivered from the message
	count   func(*stream.Stats) *uint64  // counted here; nil if not dropped
	seq     uint32                       // sequence numbers it used up, where the stream goes on
	end     *stream.CloseError           // instead of code
	check   func(*testing.T, error) bool // instead of code
}

func foreign(s *stream.Stats) *uint64 { return &s.DroppedForeign }

func duplicate(s *stream.Stats) *uint64 { return &s.DroppedDuplicate }

func earlyCount(s *stream.Stats) *uint64 { return &s.DroppedEarly }
func malformed(s *stream.Stats) *uint64  { return &s.DroppedMalformed }

var (
	ends1003 = &outcome{code: stream.CloseUnsupportedData}
	ends1002 = &outcome{code: stream.CloseProtocolError}
	early    = &outcome{count: earlyCount}
	// A message whose header cannot be read.
	headerFirst, headerBound = ends1003, &outcome{count: malformed}
	// A message of the fallback.
	jsonBound = &outcome{count: foreign}
)

// stranger is one message to a stream's reply subject.
type stranger struct {
	name    string
	message func(seq uint32) []byte // seq is the number that is next
	first   *outcome                // where it is the first message of the stream; nil: not tried
	bound   *outcome                // where a packet of sender 7 came before
}

func fixed(b []byte) func(uint32) []byte { return func(uint32) []byte { return b } }

// framesOf returns a packet of sender 7 with the bytes of frames behind a whole record.
func framesOf(frames ...byte) func(uint32) []byte {
	return func(seq uint32) []byte { return rawBytes(rawPacket(stream.PacketSeq, 7, seq, rawData("b")), frames...) }
}

func strangers() []stranger {
	var all []stranger
	add := func(name string, message func(uint32) []byte, first, bound *outcome) {
		all = append(all, stranger{name, message, first, bound})
	}

	// Packet headers.
	add("empty", fixed(nil), ends1003, ends1003)
	add("magic alone", fixed([]byte{0xF5}), headerFirst, headerBound)
	for name, first := range map[string]byte{"version 0": 0x01, "version 2": 0x21, "version 15": 0xF1,
		"envelope": 0x15, "marked envelope": 0x1D, "all flags": 0x1F} {
		for _, control := range []byte{0, 1} {
			add(fmt.Sprintf("%s, control %d", name, control), func(seq uint32) []byte {
				b := rawPacket(stream.PacketSeq, 7, seq, rawData("x"))
				b[1] = first &^ control
				return b
			}, headerFirst, headerBound)
		}
	}
	whole := func(seq uint32) []byte {
		return rawPacket(stream.PacketSeq, 7, seq, rawData("b"), rawData("cc"), stream.Frame{Type: 200, Flags: 255, Code: 9, Payload: []byte("?")})
	}
	const header = stream.PacketHeaderSize
	const endB, endC, endSkip = header + 8 + 1, header + 8 + 1 + 8 + 2, header + 8 + 1 + 8 + 2 + 8 + 1
	for n := 1; n < len(whole(0)); n++ { // wherever a packet is cut, between two frames too
		add(fmt.Sprintf("packet cut after %d bytes", n), func(seq uint32) []byte { return whole(seq)[:n] }, headerFirst, headerBound)
	}
	for _, extra := range [][]byte{{0}, {128, 0, 0, 0, 0, 0, 0, 0}, stream.AppendFrame(nil, rawData("x"))} {
		add(fmt.Sprintf("packet with %d bytes too many", len(extra)), func(seq uint32) []byte { return append(whole(seq), extra...) }, headerFirst, headerBound)
	}
	add("cut packet of another sender", func(seq uint32) []byte { return rawPacket(stream.PacketSeq, 8, seq, rawData("x"))[:header] }, headerFirst, headerBound)
	for n := header; n <= len(whole(0)); n++ {
		cut := func(seq uint32) []byte { return rawLength(whole(seq)[:n]) }
		name := fmt.Sprintf("packet of %d bytes", n)
		var o outcome
		if n >= endB {
			o.records = append(o.records, "b")
		}
		if n >= endC {
			o.records = append(o.records, "cc")
		}
		switch n {
		default:
			o.code = stream.CloseUnsupportedData
		case header: // a packet has at least one frame
			o.code = stream.CloseProtocolError
		case endB, endC, endSkip:
			o.seq = 1
		}
		add(name, cut, &o, &o)
	}

	// Frames.
	bad := &outcome{code: stream.CloseUnsupportedData, records: []string{"b"}}
	broken := &outcome{code: stream.CloseProtocolError, records: []string{"b"}}
	frame := func(name string, o *outcome, frames ...byte) { add(name, framesOf(frames...), o, o) }
	for _, typ := range []byte{1, 2, 3, 4, 5, 6, 7, 127, 0, 128, 255} {
		for _, length := range []uint32{1, 1 << 16, 1 << 30, 1<<31 - 1, 1 << 31, 1<<31 + 1, 1<<32 - 9, 1<<32 - 8, 1<<32 - 1} {
			frame(fmt.Sprintf("type %d of %d bytes that are not there", typ, length), bad,
				typ, 0, 0, 0, byte(length>>24), byte(length>>16), byte(length>>8), byte(length))
		}
		if length := uint32(1 << 31); typ == 2 || typ == 3 {
			frame(fmt.Sprintf("type %d with a code and 2^31 bytes", typ), bad, typ, 0, 0x03, 0xE8, byte(length>>24), 0, 0, 0)
		}
	}
	for _, typ := range []byte{0, 7, 8, 64, 127} {
		frame(fmt.Sprintf("unknown type %d", typ), bad, typ, 0, 0, 0, 0, 0, 0, 0)
	}
	frame("skippable types", &outcome{records: []string{"b"}, seq: 1},
		128, 255, 255, 255, 0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 2, 0xF5, 0xF5)
	for bit := byte(8); bit != 0; bit <<= 1 {
		frame(fmt.Sprintf("DATA with flag %#x", bit), bad, 1, bit, 0, 0, 0, 0, 0, 1, 'x')
	}
	frame("DATA with both codecs", bad, 1, 6, 0, 0, 0, 0, 0, 1, 'x')
	frame("DATA with a code", bad, 1, 0, 3, 0xE8, 0, 0, 0, 1, 'x')
	frame("an empty piece", bad, 1, 1, 0, 0, 0, 0, 0, 0)
	frame("CLOSE with a flag", bad, 2, 2, 3, 0xE8, 0, 0, 0, 0)
	frame("CLOSE 999", bad, 2, 0, 3, 0xE7, 0, 0, 0, 0)
	frame("CLOSE 6000", bad, 2, 0, 0x17, 0x70, 0, 0, 0, 0)
	frame("CLOSE 0", bad, 2, 0, 0, 0, 0, 0, 0, 0)
	frame("CLOSE with a reason that is not UTF-8", bad, 2, 0, 3, 0xE8, 0, 0, 0, 1, 0xFF)
	frame("CLOSE with a long reason", bad, append([]byte{2, 0, 3, 0xE8, 0, 0, 4, 1}, make([]byte, 1025)...)...)
	frame("RESET in sequence", bad, stream.AppendFrame(nil, rawReset(4000))...)
	frame("CREDIT in sequence", bad, stream.AppendFrame(nil, rawCredit(stream.Credit{}))...)
	frame("PING in sequence", bad, stream.AppendFrame(nil, rawPing())...)
	frame("META after the first frame", &outcome{records: []string{"b"}, code: stream.CloseProtocolError}, 6, 0, 0, 0, 0, 0, 0, 1, 'x')
	frame("trailers that are no headers", &outcome{records: []string{"b"}, code: stream.CloseUnsupportedData}, 6, 1, 0, 0, 0, 0, 0, 1, 'x')
	for bit := byte(2); bit != 0; bit <<= 1 {
		frame(fmt.Sprintf("META with flag %#x", bit), bad, 6, bit, 0, 0, 0, 0, 0, 0)
	}
	frame("CLOSE 1000 within a record", broken, 1, 1, 0, 0, 0, 0, 0, 1, 'x', 2, 0, 3, 0xE8, 0, 0, 0, 0)
	frame("CLOSE 4000 within a record", &outcome{records: []string{"b"}, end: &stream.CloseError{Code: 4000}},
		1, 1, 0, 0, 0, 0, 0, 1, 'x', 2, 0, 0x0F, 0xA0, 0, 0, 0, 0)
	frame("META within a record", broken, 1, 1, 0, 0, 0, 0, 0, 1, 'x', 6, 0, 0, 0, 0, 0, 0, 0)
	frame("pieces of two codecs", broken, 1, 1, 0, 0, 0, 0, 0, 1, 'x', 1, 2, 0, 0, 0, 0, 0, 1, 'y')
	frame("a skippable type within a record", &outcome{records: []string{"b", "xy"}, seq: 1},
		1, 1, 0, 0, 0, 0, 0, 1, 'x', 128, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 'y')

	// Packets out of order and of others.
	add("a gap", func(seq uint32) []byte { return rawPacket(stream.PacketSeq, 7, seq+1, rawData("x")) }, early, early)
	add("a gap of 2^31-1", func(seq uint32) []byte { return rawPacket(stream.PacketSeq, 7, seq+math.MaxInt32, rawData("x")) }, early, early)
	add("a duplicate", func(seq uint32) []byte { return rawPacket(stream.PacketSeq, 7, seq-1, rawData("x")) }, nil, &outcome{count: duplicate})
	add("a duplicate of another sender", func(seq uint32) []byte { return rawPacket(stream.PacketSeq, 8, seq-1, rawData("x")) }, nil, &outcome{count: foreign})
	add("another sender", func(seq uint32) []byte { return rawPacket(stream.PacketSeq, 8, seq, rawData("x")) }, nil, &outcome{count: foreign})
	add("a gap of another sender", func(seq uint32) []byte { return rawPacket(stream.PacketSeq, 8, seq+5, rawData("x")) }, nil, &outcome{count: foreign})
	add("another sender's CLOSE", func(seq uint32) []byte { return rawPacket(stream.PacketSeq, 8, seq, rawClose(1000)) }, nil, &outcome{count: foreign})

	// Control packets. One that ends the stream does so beside the sequence.
	control := func(name string, o *outcome, frames ...stream.Frame) {
		add(name, func(seq uint32) []byte { return rawPacket(0, 7, seq, frames...) }, o, o)
		add(name+" of another sender", func(seq uint32) []byte { return rawPacket(0, 8, seq, frames...) }, nil, &outcome{count: foreign})
	}
	control("RESET", &outcome{end: &stream.CloseError{Code: 4000}}, rawReset(4000))
	control("RESET 1000", &outcome{code: stream.CloseAbnormalClosure}, rawReset(1000)) // without a CLOSE it is no normal end
	control("PING", &outcome{}, rawPing())
	control("CREDIT", &outcome{}, rawCredit(stream.Credit{Packets: 1 << 30, Bytes: math.MaxUint64}))
	control("skippable control", &outcome{}, stream.Frame{Type: 200, Payload: []byte("?")})
	control("DATA out of sequence", ends1003, rawData("x"))
	control("CLOSE out of sequence", ends1003, rawClose(1000))
	control("META out of sequence", ends1003, stream.Frame{Type: stream.FrameMeta})
	control("unknown control", ends1003, stream.Frame{Type: 9})
	control("CREDIT of 15 bytes", ends1003, stream.Frame{Type: stream.FrameCredit, Payload: make([]byte, 15)})
	control("PING with a payload", ends1003, stream.Frame{Type: stream.FramePing, Payload: []byte{0}})
	control("RESET 999", ends1003, rawReset(999))
	control("RESET that is not UTF-8", ends1003, stream.Frame{Type: stream.FrameReset, Code: 4000, Payload: []byte{0xFF}})
	control("control beyond its size", nil, stream.Frame{Type: 200, Payload: make([]byte, 4<<10)})
	all[len(all)-2].bound, all[len(all)-1].bound = headerBound, headerBound // its size alone tells
	add("control cut short", func(seq uint32) []byte { return rawBytes(rawPacket(0, 7, seq, rawPing()), 3, 0, 0) }, ends1003, ends1003)
	add("cut control", func(seq uint32) []byte { return rawPacket(0, 7, seq, rawPing(), rawPing())[:header+8] }, headerFirst, headerBound)
	add("control longer than itself", func(seq uint32) []byte {
		return rawBytes(rawPacket(0, 7, seq), 5, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF)
	}, ends1003, ends1003)

	// JSON.
	for _, text := range []string{
		"x", " ", "\n", "\x00", "\xff", "{", "}", "[]", "null", "true", "0", "1", "-1", `""`, `"type"`, "{}", `{"type":}`,
		"1e999999999", strings.Repeat("9", 10_000), strings.Repeat("[", 20_000), strings.Repeat(`{"a":`, 20_000),
		`{"type":0}`, `{"type":3}`, `{"type":-1}`, `{"type":1.5}`, `{"type":1e0}`, `{"type":1e400}`, `{"type":"1"}`,
		`{"type":null}`, `{"type":[1]}`, `{"type":{"type":1}}`, `{"type":18446744073709551617}`, `{"type":9223372036854775807}`,
		`{"type":1,"data":1}`, `{"type":1,"data":{}}`, `{"type":1,"data":true}`, `{"type":1,"data":"*"}`,
		`{"type":1,"data":["a"]}`, `{"type":1,"data":[256]}`, `{"type":1,"data":[-1]}`, `{"type":1,"data":[1e99]}`,
		`{"type":1,"data":"aGVsbG8"}`, `{"type":1,"data":"aGVsbG8=="}`, `{"type":1,"data":"aGVsbG8=a"}`, `{"type":1,"data":"aGVs=bG8"}`,
		`{"type":1,"data":"-_-_"}`, `{"type":1,"data":"aGVs bG8="}`, "{\"type\":1,\"data\":\"aGVs\nbG8=\"}", `{"type":1,"data":"\x"}`,
		`{"type":1,"data":"aGVsbG8="`, `{"type":1,"data":"aGVsbG8="}}`, `{"type":1,"data":"aGVsbG8="}{"type":1}`, `{"type":1,"data":"aGVsbG8=","x"}`,
		`{"type":1,"data":"`, `{"type":1,"data":"}`, `{"type":1,"data":"=`, `{"type":1,"data":"aGVsbG8="}` + "\x00",
		`{"type":1,"closeError":1}`, `{"type":2,"closeError":[]}`, `{"type":2,"closeError":"x"}`, `{"type":2,"closeError":{"Code":"1000"}}`,
		`{"type":2,"closeError":{"Code":1e3}}`, `{"type":2,"closeError":{"Code":1000.5}}`, `{"type":2,"closeError":{"Code":1000,"Text":1}}`,
		`{"type":2,"closeError":{"Code":99999999999999999999}}`, `{"Type":2,"TYPE":7}`,
		"\xef\xbb\xbf" + `{"type":1}`, `{'type':1}`, `{"type":1,}`, `{"type":01}`, `{"type":+1}`, `{"type":1,"data":"aGVsbG8=",}`,
	} {
		add("JSON "+text[:min(len(text), 50)], fixed([]byte(text)), ends1003, jsonBound)
	}
	for n := 1; n < len(`{"type":1,"data":"aGVsbG8="}`); n++ {
		add(fmt.Sprintf("JSON cut after %d bytes", n), fixed([]byte(`{"type":1,"data":"aGVsbG8="}`[:n])), ends1003, jsonBound)
	}
	add("JSON close without closeError", fixed([]byte(`{"type":2}`)), ends1002, jsonBound)
	add("JSON close with null", fixed([]byte(`{"type":2,"closeError":null}`)), ends1002, jsonBound)
	add("JSON close", fixed([]byte(`{"type":2,"closeError":{"Code":1000,"Text":""}}`)), nil, jsonBound)
	add("JSON record", fixed([]byte(`{"type":1,"data":"aGVsbG8="}`)), nil, jsonBound)
	add("JSON of odd codes", fixed([]byte(`{"type":2,"closeError":{"Code":-7,"Text":"x"}}`)), &outcome{end: &stream.CloseError{Code: -7, Text: "x"}}, jsonBound)
	return all
}

// stats are those counters of c that messages move which are dropped.
func stats(c *stream.Client) stream.Stats {
	s := c.Stats()
	return stream.Stats{DroppedUnknown: s.DroppedUnknown, DroppedDuplicate: s.DroppedDuplicate, DroppedForeign: s.DroppedForeign, DroppedEarly: s.DroppedEarly,
		DroppedMalformed: s.DroppedMalformed, DroppedControl: s.DroppedControl}
}

// Each message is sent to an open stream, as its first and as its second one, between two halves of another stream.
func TestStrangersMessageToAConsumerHarmsOneStream(t *testing.T) {
	p := newPair(t)
	for _, c := range strangers() {
		for _, bound := range []bool{false, true} {
			want := c.first
			if bound {
				want = c.bound
			}
			if want == nil {
				continue
			}
			t.Run(fmt.Sprintf("%s/bound=%v", c.name, bound), func(t *testing.T) {
				w, other := newWriterStream(t, p)
				victim, reply, nc := rawStream(t, p)
				expected := stats(p.consumer)
				write(t, w, []byte("one"), []byte("two"))
				var records []string
				var seq uint32
				if bound {
					rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 7, 0, rawData("a")))
					records, seq = append(records, "a"), 1
				}
				rawPublish(t, nc, reply, c.message(seq))
				records = append(records, want.records...)
				goesOn := want.code == 0 && want.end == nil
				if goesOn {
					rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 7, seq+want.seq, rawData("z"), rawClose(1000)))
					records = append(records, "z")
				}
				write(t, w, []byte("three"))
				closeWriter(t, w)

				got, err := readAll(victim)
				// A message that ends a stream beside its sequence may be faster than a record.
				ahead := want.end != nil && len(want.records) == 0 && len(got) == 0
				if g, w := fmt.Sprintf("%q", got), fmt.Sprintf("%q", records); g != w && !ahead {
					t.Errorf("records %s, want %s", g, w)
				}
				ce, _ := errors.AsType[*stream.CloseError](err)
				switch {
				case goesOn && err != io.EOF:
					t.Errorf("ended with %v, want io.EOF", err)
				case want.end != nil && !equalClose(err, want.end):
					t.Errorf("ended with %v, want %v", err, want.end)
				case want.code != 0 && (ce == nil || ce.Code != want.code || ce.Text == ""):
					t.Errorf("ended with %v, want close %d and a reason", err, want.code)
				}
				if want.count != nil {
					*want.count(&expected)++
				}
				if got := stats(p.consumer); got != expected {
					t.Errorf("counted\n%+v, want\n%+v", got, expected)
				}
				if got, err := readAll(other); err != io.EOF || fmt.Sprintf("%q", got) != `["one" "two" "three"]` {
					t.Errorf("the other stream: %q, %v", got, err)
				}
			})
		}
	}
}

// wantReset waits for a RESET with the given code.
func wantReset(t testing.TB, sub *nats.Subscription, code int) {
	t.Helper()
	for {
		m, err := sub.NextMsg(patience)
		if err != nil {
			t.Fatalf("waiting for RESET %d: %v", code, err)
		}
		h, rest, err := stream.ParsePacketHeader(m.Data)
		if err != nil {
			t.Fatal(err)
		}
		if h.Flags&stream.PacketSeq != 0 {
			continue
		}
		f, _, err := stream.ParseFrame(rest)
		if err != nil {
			t.Fatal(err)
		}
		if f.Type != stream.FrameReset {
			continue
		}
		if int(f.Code) != code {
			t.Fatalf("RESET %d %q, want %d", f.Code, f.Payload, code)
		}
		return
	}
}

// rawConsumer makes a writer whose consumer is the test. It returns what the writer publishes, and the subject on which
// it listens.
func rawConsumer(t testing.TB, p *pair) (w *stream.Writer, packets *nats.Subscription, control string) {
	t.Helper()
	inbox := rawInbox()
	packets, err := p.consumer.Conn.SubscribeSync(inbox)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = packets.Unsubscribe() })
	if err := p.consumer.Conn.Flush(); err != nil {
		t.Fatal(err)
	}
	w = p.producer.NewWriter(inbox)
	write(t, w, []byte("a"))
	m, err := packets.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	if m.Reply == "" || !bytes.Equal(m.Data[stream.PacketHeaderSize:], stream.AppendFrame(nil, rawData("a"))) {
		t.Fatalf("first packet %q with reply %q", m.Data, m.Reply)
	}
	return w, packets, m.Reply
}

// Each message is sent to the control subject of a writer, before and after its consumer sent one.
func TestStrangersMessageToAProducerHarmsOneStream(t *testing.T) {
	p := newPair(t, hasty)
	credit := rawCredit(stream.Credit{Ack: 1, Packets: 33, Bytes: 1 << 20})
	control := func(sender uint64, frames ...stream.Frame) []byte { return rawPacket(0, sender, 0, frames...) }
	dropped := &outcome{count: malformed}
	from8 := &outcome{count: foreign}
	fine := &outcome{}
	endsClosed := &outcome{check: func(_ *testing.T, err error) bool { return errors.Is(err, stream.ErrClosed) }}
	noResponders := &outcome{check: func(t *testing.T, err error) bool { return errors.Is(err, nats.ErrNoResponders) }}
	for _, c := range []struct {
		name    string
		message []byte
		header  nats.Header
		first   *outcome
		bound   *outcome // sender 9 granted credit before
	}{
		{name: "empty", first: ends1003, bound: ends1003},
		{name: "no responders", header: nats.Header{"Status": {"503"}}, first: noResponders, bound: fine},
		{name: "magic alone", message: []byte{0xF5}, first: ends1003, bound: dropped},
		{name: "most of a header", message: control(9)[:stream.PacketHeaderSize-1], first: ends1003, bound: dropped},
		{name: "version 2", message: []byte{0xF5, 0x20, 0, 9, 0, 0, 0, 0, 0, 0, 0, 20, 5, 0, 0, 0, 0, 0, 0, 0}, first: ends1003, bound: dropped},
		{name: "envelope", message: rawPacket(stream.PacketEnv, 9, 0, rawPing()), first: ends1003, bound: dropped},
		{name: "marked envelope", message: rawPacket(stream.PacketEnv|stream.PacketMark, 9, 0, rawPing()), first: ends1003, bound: dropped},
		{name: "large", message: control(9, stream.Frame{Type: 200, Payload: make([]byte, 4<<10)}), first: dropped, bound: dropped},
		// A consumer that is sent packets answers in packets. JSON comes from another end and binds nothing.
		{name: "JSON close", message: []byte(`{"type":2,"closeError":{"Code":1000,"Text":""}}`), first: from8, bound: from8},
		{name: "JSON record", message: []byte(`{"type":1,"data":"aGVsbG8="}`), first: from8, bound: from8},
		{name: "text", message: []byte("hello"), first: from8, bound: from8},

		{name: "no frame", message: control(9), first: ends1002, bound: ends1002},
		{name: "DATA", message: control(9, rawData("x")), first: ends1003, bound: ends1003},
		{name: "CLOSE", message: control(9, rawClose(1000)), first: ends1003, bound: ends1003},
		{name: "unknown type", message: control(9, stream.Frame{Type: 77}), first: ends1003, bound: ends1003},
		{name: "skippable type", message: control(9, stream.Frame{Type: 177, Flags: 255, Code: 1, Payload: []byte("?")}), first: fine, bound: fine},
		{name: "cut frame", message: rawLength(control(9, credit)[:24]), first: ends1003, bound: ends1003},
		{name: "cut packet", message: control(9, credit)[:24], first: ends1003, bound: dropped},
		{name: "packet cut between frames", message: control(9, rawPing(), rawPing())[:20], first: ends1003, bound: dropped},
		{name: "length 2^32-1", message: rawBytes(control(9), 4, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF), first: ends1003, bound: ends1003},
		{name: "PING", message: control(9, rawPing()), first: fine, bound: fine},
		{name: "CREDIT for what was not sent", message: control(9, rawCredit(stream.Credit{Ack: 2, Packets: 34, Bytes: 1 << 20})), first: ends1002, bound: ends1002},
		{name: "CREDIT for 2^31-1", message: control(9, rawCredit(stream.Credit{Ack: math.MaxInt32, Packets: 34, Bytes: 1 << 20})), first: ends1002, bound: ends1002},
		{name: "CREDIT of long ago", message: control(9, rawCredit(stream.Credit{})), first: fine, bound: fine},
		{name: "CREDIT from before the start", message: control(9, rawCredit(stream.Credit{Ack: 1<<32 - 5, Packets: 1<<32 - 1})), first: fine, bound: fine},
		{name: "CREDIT with GAP", message: control(9, stream.Frame{Type: stream.FrameCredit, Flags: stream.FlagGap, Payload: credit.Payload}), first: fine, bound: fine},
		{name: "CREDIT of 17 bytes", message: control(9, stream.Frame{Type: stream.FrameCredit, Payload: make([]byte, 17)}), first: ends1003, bound: ends1003},
		{name: "RESET", message: control(9, rawReset(4000)), first: &outcome{end: &stream.CloseError{Code: 4000}}, bound: &outcome{end: &stream.CloseError{Code: 4000}}},
		{name: "RESET 1000", message: control(9, rawReset(1000)), first: endsClosed, bound: endsClosed},
		{name: "RESET of another sender", message: control(8, rawReset(4000)), bound: from8},
		{name: "CREDIT of another sender", message: control(8, rawCredit(stream.Credit{Ack: 77})), bound: from8},
		{name: "DATA of another sender", message: rawPacket(stream.PacketSeq, 8, 0, rawData("x")), bound: from8},
		{name: "first packet", message: rawPacket(stream.PacketSeq, 9, 0, rawData("x")), first: ends1002, bound: ends1002},
	} {
		for _, bound := range []bool{false, true} {
			want := c.first
			if bound {
				want = c.bound
			}
			if want == nil {
				continue
			}
			t.Run(fmt.Sprintf("%s/bound=%v", c.name, bound), func(t *testing.T) {
				other, s := newWriterStream(t, p)
				write(t, other, []byte("one"))
				w, packets, subject := rawConsumer(t, p)
				nc := p.consumer.Conn
				expected := stats(p.producer)
				if bound {
					rawPublish(t, nc, subject, control(9, credit))
				}
				if err := nc.PublishMsg(&nats.Msg{Subject: subject, Data: c.message, Header: c.header}); err != nil {
					t.Fatal(err)
				}
				if want.count != nil {
					*want.count(&expected)++
				}
				if want.code == 0 && want.end == nil && want.check == nil {
					// The consumer goes on to be heard, and ends the stream.
					rawPublish(t, nc, subject, control(9, rawReset(4321)))
					want = &outcome{end: &stream.CloseError{Code: 4321}}
				}
				waitFor(t, "the writer's end", func() { <-w.Context().Done() })
				for range 2 {
					n, err := w.Write([]byte("more"))
					ce, _ := errors.AsType[*stream.CloseError](err)
					switch {
					case n != 0 || err == nil:
						t.Errorf("Write after the end: %d, %v", n, err)
					case want.check != nil && !want.check(t, err):
						t.Errorf("the writer ended with %v", err)
					case want.end != nil && !equalClose(err, want.end):
						t.Errorf("the writer ended with %v, want %v", err, want.end)
					case want.code != 0 && (ce == nil || ce.Code != want.code || ce.Text == ""):
						t.Errorf("the writer ended with %v, want close %d and a reason", err, want.code)
					}
				}
				if err := w.Close(); err == nil {
					t.Error("Close after the end says that all was sent")
				}
				if want.code != 0 {
					wantReset(t, packets, want.code)
				}
				if got := stats(p.producer); got != expected {
					t.Errorf("counted\n%+v, want\n%+v", got, expected)
				}
				write(t, other, []byte("two"))
				closeWriter(t, other)
				if got, err := readAll(s); err != io.EOF || fmt.Sprintf("%q", got) != `["one" "two"]` {
					t.Errorf("the other stream: %q, %v", got, err)
				}
			})
		}
	}
}

// TestRandomBytesAreDropped sends random bytes, and packets with some bytes changed, into one open stream. As long as
// the sender's number differs they are all dropped and counted.
func TestRandomBytesAreDropped(t *testing.T) {
	p := newPair(t)
	w, other := newWriterStream(t, p)
	victim, reply, nc := rawStream(t, p)
	rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 7, 0, rawData("a")))
	before := stats(p.consumer)
	r := rand.New(rand.NewPCG(1, 2))
	count := scaled(5000)
	for i := range count {
		b := make([]byte, 1+r.IntN(200))
		for i := range b {
			b[i] = byte(r.Uint32())
		}
		switch r.IntN(3) {
		case 1:
			b[0] = stream.PacketMagic
		case 2:
			b = rawBytes(rawPacket(stream.PacketFlags(r.IntN(4)), 0, r.Uint32()), b...)
		}
		if len(b) >= stream.PacketHeaderSize {
			b[2] |= 0x80 // not sender 7
		}
		if err := nc.Publish(reply, b); err != nil {
			t.Fatal(err)
		}
		if i%100 == 0 {
			write(t, w, testRecord(i, 50))
		}
	}
	rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 7, 1, rawData("z"), rawClose(1000)))
	closeWriter(t, w)
	if got, err := readAll(victim); err != io.EOF || fmt.Sprintf("%q", got) != `["a" "z"]` {
		t.Errorf("records %q, %v", got, err)
	}
	got, err := readAll(other)
	if len(got) != (count+99)/100 || err != io.EOF {
		t.Errorf("the other stream: %d records, %v", len(got), err)
	}
	after := stats(p.consumer)
	if n := after.DroppedForeign + after.DroppedMalformed - before.DroppedForeign - before.DroppedMalformed; n != uint64(count) {
		t.Errorf("%d messages counted, want %d", n, count)
	}
}

func rawMore(s string) stream.Frame {
	return stream.Frame{Type: stream.FrameData, Flags: stream.FlagMore, Payload: []byte(s)}
}

// A peer of the right number that sends packets in order with nonsense in them. The stream
// ends with a close code, whatever the bytes, and all others are open still.
func TestRandomFramesEndTheirStreamAlone(t *testing.T) {
	p := newPair(t)
	w, other := newWriterStream(t, p)
	r := rand.New(rand.NewPCG(3, 4))
	for i := range scaled(500) {
		victim, reply, nc := rawStream(t, p)
		for seq := range uint32(5) {
			flags := stream.PacketFlags(r.IntN(4))
			b := rawPacket(flags, 7, seq, rawData("a"), rawMore("b"))
			if flags&stream.PacketSeq == 0 {
				b = rawPacket(flags, 7, seq, rawPing(), rawCredit(stream.Credit{}))
			}
			const header = stream.PacketHeaderSize
			for range r.IntN(4) {
				b[header+r.IntN(len(b)-header)] = byte(r.Uint32())
			}
			if r.IntN(4) == 0 {
				b = rawLength(b[:header+r.IntN(len(b)-header)])
			}
			if err := nc.Publish(reply, b); err != nil {
				t.Fatal(err)
			}
		}
		rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 7, 5, rawClose(4000)), rawPacket(0, 7, 5, rawReset(4001)))
		_, err := readAll(victim)
		if ce, _ := errors.AsType[*stream.CloseError](err); ce == nil && err != io.EOF {
			t.Fatalf("round %d: ended with %v, which has no close code", i, err)
		}
	}
	write(t, w, []byte("still here"))
	closeWriter(t, w)
	if got, err := readAll(other); err != io.EOF || len(got) != 1 {
		t.Errorf("the other stream: %q, %v", got, err)
	}
}

// No memory is taken because a length field, or a record without end, says so.
func TestLengthFieldsTakeNoMemory(t *testing.T) {
	p := newPair(t, pairOptions{consumer: stream.ClientParams{MaxRecordSize: 100_000}})
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	rounds := uint64(scaled(200))
	for i := range rounds {
		victim, reply, nc := rawStream(t, p)
		length := []uint32{1 << 24, 1 << 31, 1<<32 - 1}[i%3]
		flags := byte(i / 3 % 2) // a whole record, or a piece of one
		rawPublish(t, nc, reply, rawBytes(rawPacket(stream.PacketSeq, 7, 0),
			1, flags, 0, 0, byte(length>>24), byte(length>>16), byte(length>>8), byte(length), 'x'))
		_, err := readAll(victim)
		if ce, _ := errors.AsType[*stream.CloseError](err); ce == nil || ce.Code != stream.CloseUnsupportedData {
			t.Fatalf("length %d: %v", length, err)
		}
	}
	runtime.ReadMemStats(&after)
	if n := (after.TotalAlloc - before.TotalAlloc) / rounds; n > 1<<20 {
		t.Errorf("%d bytes allocated for each stream", n)
	}

	t.Run("pieces", func(t *testing.T) {
		victim, reply, nc := rawStream(t, p)
		piece := rawMore(string(make([]byte, 30_000)))
		rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 7, 0, rawData("a")))
		for seq := range uint32(4) {
			rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 7, seq+1, piece))
		}
		got, err := readAll(victim)
		ce, _ := errors.AsType[*stream.CloseError](err)
		if fmt.Sprintf("%q", got) != `["a"]` || ce == nil || ce.Code != stream.CloseMessageTooBig {
			t.Errorf("%d records, %v; want one and close %d", len(got), err, stream.CloseMessageTooBig)
		}
	})
	t.Run("at the limit", func(t *testing.T) {
		for _, n := range []int{100_000, 100_001} {
			victim, reply, nc := rawStream(t, p)
			rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 7, 0, rawMore(string(make([]byte, 50_000))), rawData(string(make([]byte, n-50_000)))),
				rawPacket(stream.PacketSeq, 7, 1, rawData(string(make([]byte, n))), rawClose(1000)))
			got, err := readAll(victim)
			if n == 100_000 && (len(got) != 2 || err != io.EOF) {
				t.Errorf("%d bytes: %d records, %v", n, len(got), err)
			}
			ce, _ := errors.AsType[*stream.CloseError](err)
			if n > 100_000 && (len(got) != 0 || ce == nil || ce.Code != stream.CloseMessageTooBig) {
				t.Errorf("%d bytes: %d records, %v", n, len(got), err)
			}
		}
	})
	t.Run("fallback", func(t *testing.T) {
		victim, publish := oldProducer(t, p)
		publish([]byte(`{"type":1,"data":"` + strings.Repeat("AAAA", 33_334) + `"}`)) // 100,002 bytes
		got, err := readAll(victim)
		ce, _ := errors.AsType[*stream.CloseError](err)
		if len(got) != 0 || ce == nil || ce.Code != stream.CloseMessageTooBig {
			t.Errorf("%d records, %v; want close %d", len(got), err, stream.CloseMessageTooBig)
		}
	})
}

// Messages that wait to be read are counted by their data, so their headers must not wait with them.
func TestUnreadHeadersTakeNoMemory(t *testing.T) {
	const messages, size = 30, 512 << 10
	p := newPair(t)
	s, reply, nc := rawStream(t, p)
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	header := nats.Header{"Large": {strings.Repeat("x", size)}}
	for i := range messages {
		if err := nc.PublishMsg(&nats.Msg{Subject: reply, Header: header, Data: rawPacket(stream.PacketSeq, 9, uint32(i), rawData("x"))}); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	// The last one has arrived when the first one after it, a PING, is answered; nothing is read yet.
	answers, err := nc.SubscribeSync(nats.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.PublishRequest(reply, answers.Subject, rawPacket(0, 9, messages, stream.Frame{Type: stream.FramePing})); err != nil {
		t.Fatal(err)
	}
	if _, err := answers.NextMsg(patience); err != nil {
		t.Fatal(err)
	}
	header = nil
	var held int64
	if !poll(func() bool { held = heap() - before; return held < messages*size/2 }) {
		t.Errorf("%d MiB are held for %d records of one byte", held>>20, messages)
	}
	for range messages {
		if rec, err := s.Recv(); string(rec) != "x" || err != nil {
			t.Fatalf("%q, %v", rec, err)
		}
	}
}

// Packets for another stream, for none, and for a subject without a token.
func TestPacketsForNoStreamAreDropped(t *testing.T) {
	p := newPair(t)
	a, replyA, nc := rawStream(t, p)
	b, replyB, _ := rawStream(t, p)
	rawPublish(t, nc, replyA, rawPacket(stream.PacketSeq, 7, 0, rawData("a")))
	rawPublish(t, nc, replyB, rawPacket(stream.PacketSeq, 8, 0, rawData("b")))
	want := stats(p.consumer)
	rawPublish(t, nc, replyB, rawPacket(stream.PacketSeq, 7, 1, rawData("x")), rawPacket(stream.PacketSeq, 7, 0, rawData("x"), rawClose(1000)))
	rawPublish(t, nc, replyA, rawPacket(0, 8, 1, rawReset(4000)))
	want.DroppedForeign += 3
	prefix := replyA[:strings.LastIndexByte(replyA, '.')+1]
	for _, token := range []string{"~1m5I00000000000", "~1m5I", "Ab3dEf9Z", "~", "ä", strings.Repeat("x", 500), "~2" + strings.Repeat("x", 30)} {
		rawPublish(t, nc, prefix+token, rawPacket(stream.PacketSeq, 7, 1, rawData("x")), []byte("{}"), nil)
		want.DroppedUnknown += 3
	}
	rawPublish(t, nc, replyA, rawPacket(stream.PacketSeq, 7, 1, rawClose(1000)))
	rawPublish(t, nc, replyB, rawPacket(stream.PacketSeq, 8, 1, rawClose(1000)))
	for s, rec := range map[*stream.Stream]string{a: "a", b: "b"} {
		if got, err := readAll(s); len(got) != 1 || string(got[0]) != rec || err != io.EOF {
			t.Errorf("%q, %v; want %q", got, err, rec)
		}
	}
	if got := stats(p.consumer); got != want {
		t.Errorf("counted\n%+v, want\n%+v", got, want)
	}
}

// A missing packet is an error after the records before it, and nothing behind it is delivered;
// a repeated one is dropped and counted.
func TestGapIsAnErrorAndDuplicatesAreDropped(t *testing.T) {
	p := newPair(t)
	packet := func(seq int) []byte {
		return rawPacket(stream.PacketSeq, 7, uint32(seq), rawData(fmt.Sprint(seq)))
	}
	for name, c := range map[string]struct {
		order      []int
		missing    []int // asked for in turn, and sent again from there on to the last
		duplicates uint64
	}{
		"in order":             {order: []int{0, 1, 2}},
		"each twice":           {order: []int{0, 0, 1, 1, 2, 2}, duplicates: 3},
		"all again":            {order: []int{0, 1, 2, 0, 1, 2}, duplicates: 3},
		"the first is missing": {order: []int{1, 2}, missing: []int{0}},
		"one is missing":       {order: []int{0, 1, 3}, missing: []int{2}},
		"one is late":          {order: []int{0, 2, 1}, missing: []int{1}, duplicates: 1},
		"many are missing":     {order: []int{0, 1, 2, 20, 3}, missing: []int{3}, duplicates: 1},
	} {
		t.Run(name, func(t *testing.T) {
			s, reply, nc := rawStream(t, p)
			control, err := nc.SubscribeSync(nats.NewInbox())
			if err != nil {
				t.Fatal(err)
			}
			if err := nc.PublishRequest(reply, control.Subject, rawPacket(0, 7, 0, rawPing())); err != nil {
				t.Fatal(err)
			}
			before := stats(p.consumer)
			last := 0
			for _, seq := range c.order {
				rawPublish(t, nc, reply, packet(seq))
				last = max(last, seq)
			}
			for _, seq := range c.missing {
				for {
					m, err := control.NextMsg(patience)
					if err != nil {
						t.Fatalf("packet %d was not asked for: %v", seq, err)
					}
					_, b, _ := stream.ParsePacketHeader(m.Data)
					f, _, err := stream.ParseFrame(b)
					if err != nil || f.Type != stream.FrameCredit {
						t.Fatalf("%v, %v; want CREDIT", f.Type, err)
					}
					if credit, _ := stream.ParseCredit(f.Payload); f.Flags&stream.FlagGap != 0 && credit.Ack >= uint32(seq) {
						break
					}
				}
				for again := seq; again <= last; again++ {
					rawPublish(t, nc, reply, packet(again))
				}
			}
			rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 7, uint32(last+1), rawClose(1000)))
			got, err := readAll(s)
			if len(got) != last+1 || err != io.EOF {
				t.Errorf("%d records, want %d; %v", len(got), last+1, err)
			}
			for i, rec := range got {
				if string(rec) != fmt.Sprint(i) {
					t.Errorf("record %d is %q", i, rec)
				}
			}
			if n := stats(p.consumer).DroppedDuplicate - before.DroppedDuplicate; n != c.duplicates {
				t.Errorf("%d duplicates counted, want %d", n, c.duplicates)
			}
		})
	}
}

// A peer that sends more than it was granted is told and cut off; the granted packets arrive.
func TestOverrunningPeerIsCutOff(t *testing.T) {
	p := newPair(t)
	victim, reply, nc := rawStream(t, p)
	control, err := nc.SubscribeSync(nats.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.PublishRequest(reply, control.Subject, rawPacket(stream.PacketSeq, 7, 0, rawData("0"))); err != nil {
		t.Fatal(err)
	}
	for seq := range uint32(40) {
		rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 7, seq+1, rawData(fmt.Sprint(seq+1))))
	}
	wantReset(t, control, stream.CloseProtocolError) // before anything was read
	got, err := readAll(victim)
	ce, _ := errors.AsType[*stream.CloseError](err)
	if len(got) != 32 || ce == nil || ce.Code != stream.CloseProtocolError {
		t.Errorf("%d records, %v; want 32 and close %d", len(got), err, stream.CloseProtocolError)
	}
}

// A consumer that grants everything and acknowledges nothing does not make its producer keep more
// than a window.
func TestGenerousPeerMakesNobodyKeepMoreThanAWindow(t *testing.T) {
	const window = 256 << 10
	p := newPair(t, pairOptions{producer: stream.ClientParams{Window: window}})
	for _, size := range []int{0, 100, 30_000} {
		w, _, subject := rawConsumer(t, p)
		rawPublish(t, p.consumer.Conn, subject, rawPacket(0, 9, 0, rawCredit(stream.Credit{Packets: 1 << 30, Bytes: math.MaxUint64})))
		var written atomic.Int64
		returned := make(chan error, 1)
		p.handlers.Go(func() {
			for {
				if _, err := w.Write(make([]byte, size)); err != nil || written.Load() > 10*window {
					returned <- err
					return
				}
				written.Add(int64(size) + stream.FrameHeaderSize)
			}
		})
		for last, same := int64(-1), 0; same < 10; same++ { // until nothing moves
			time.Sleep(5 * time.Millisecond)
			if n := written.Load(); n != last {
				last, same = n, 0
			}
		}
		rawPublish(t, p.consumer.Conn, subject, rawPacket(0, 9, 0, rawReset(4000)))
		waitFor(t, "Write to return", func() {
			if err := <-returned; !equalClose(err, &stream.CloseError{Code: 4000}) {
				t.Errorf("records of %d bytes: Write returned %v", size, err)
			}
		})
		if n := written.Load(); n > window+64<<10 || n < window/2 {
			t.Errorf("records of %d bytes: %d bytes taken, the window is %d", size, n, window)
		}
	}
}

// Whatever the consumer reads, it answers a PING, at the subject that the PING or a packet before it named.
func TestPingIsAnswered(t *testing.T) {
	p := newPair(t)
	victim, reply, nc := rawStream(t, p)
	control, err := nc.SubscribeSync(nats.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	for seq, to := range []string{control.Subject, "", ""} {
		if err := nc.PublishMsg(&nats.Msg{Subject: reply, Reply: to, Data: rawPacket(0, 7, uint32(seq), rawPing())}); err != nil {
			t.Fatal(err)
		}
		m, err := control.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		_, rest, err := stream.ParsePacketHeader(m.Data)
		if err != nil {
			t.Fatal(err)
		}
		f, _, err := stream.ParseFrame(rest)
		if err != nil {
			t.Fatal(err)
		}
		c, err := stream.ParseCredit(f.Payload)
		if f.Type != stream.FrameCredit || err != nil || c.Ack != uint32(seq) || c.Packets != 32 || c.Bytes != 256<<10 {
			t.Errorf("answer %d: %v, %+v, %v", seq, f.Type, c, err)
		}
		rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 7, uint32(seq), rawData("x")))
	}
	rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 7, 3, rawClose(1000)))
	if got, err := readAll(victim); len(got) != 3 || err != io.EOF {
		t.Errorf("%q, %v", got, err)
	}
}

// A request may name a reply subject as long as the control lines that the server takes. The stream may fail, but the
// endpoint serves the next one.
func TestReplySubjectsOfAnyLength(t *testing.T) {
	p := newPair(t, pairOptions{server: []streamtest.Option{func(o *server.Options) { o.MaxControlLine = 64 << 10 }}})
	svc := newService(t, p, stream.ServerParams{})
	returned := make(chan struct{}, 1)
	svc.handle(t, "long", func(w *stream.Writer, r *stream.Request) error {
		defer func() { returned <- struct{}{} }()
		_, err := w.Write(make([]byte, len(r.Data)))
		return errors.Join(err, w.Flush())
	})
	token := string(stream.AppendToken(nil, stream.Token{LogPackets: 8, LogBytes: 24, ID: 1}))
	for _, length := range []int{100, 1300, 1400, 4000, 15_900, 33_000} {
		for _, size := range []int{0, 15_600, 17_000, 31_000, 100_000} {
			m := nats.NewMsg("long")
			m.Reply = "_SINBOX." + strings.Repeat("a", length) + "." + token
			m.Header.Set("Stream-Open", token[:5])
			m.Data = make([]byte, size)
			if err := p.consumer.Conn.PublishMsg(m); err != nil {
				t.Fatal(err)
			}
			select {
			case <-returned:
			case <-time.After(patience):
				t.Fatalf("a handler that writes %d bytes to a subject of %d does not return", size, length)
			}
			s, err := p.consumer.Open(testContext(t), "long", make([]byte, size))
			if err != nil {
				t.Fatal(err)
			}
			if rec, err := s.Recv(); err != nil || len(rec) != size {
				t.Errorf("after a subject of %d bytes: %d of %d bytes, %v", length, len(rec), size, err)
			}
			s.Close()
			<-returned
		}
	}
}

// A stranger may choose a reply subject that is the name of an end with streams: their subjects without the tokens. Its
// stream shares no message with theirs.
func TestAReplySubjectWithTheNameOfAnEnd(t *testing.T) {
	const name = "_X.Y"
	p := newPair(t)
	svc := newService(t, p, stream.ServerParams{})
	var stop atomic.Bool
	svc.handle(t, "chatter", func(w *stream.Writer, _ *stream.Request) error {
		for !stop.Load() {
			if _, err := w.Write([]byte("hello")); err != nil {
				return err
			}
			if err := w.Flush(); err != nil {
				return err
			}
			time.Sleep(50 * time.Microsecond)
		}
		return nil
	})
	nc := p.consumer.Conn
	var enveloped, bare atomic.Int64
	var mu sync.Mutex                  // each subscription has a goroutine
	answers := make(map[string]string) // the subjects of the producers, by those of the streams
	next := make(map[string]uint32)    // numbers of packets
	answer := func(subject string, frames ...stream.Frame) {
		if to := answers[subject]; to != "" {
			if err := nc.Publish(to, rawPacket(0, 7, 0, frames...)); err != nil {
				t.Error(err)
			}
		}
	}
	take := func(subject string, packet []byte) { // as a consumer that takes all, and envelopes as well
		h, body, err := stream.ParsePacketHeader(packet)
		if err != nil {
			t.Errorf("a packet to %s: %v", subject, err)
			return
		}
		if h.Flags&stream.PacketSeq != 0 {
			next[subject] = max(next[subject], h.Seq+1)
		}
		if f, _, err := stream.ParseFrame(body); err == nil && f.Type == stream.FrameChallenge {
			answer(subject, rawResponse(f.Payload))
		}
		n := next[subject]
		answer(subject, rawCredit(stream.Credit{Ack: n, Packets: n + 1000, Bytes: 1 << 40}), stream.Frame{Type: 0x80})
	}
	message := func(m *nats.Msg) {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case m.Subject == name+".e":
			const token = stream.TokenSize
			packets := 0
			for rest := m.Data[stream.PacketHeaderSize:]; len(rest) > token+stream.PacketHeaderSize; packets++ {
				n := token + int(binary.BigEndian.Uint32(rest[token+12:]))
				take(name+"."+string(rest[:token]), rest[token:n])
				rest = rest[n:]
			}
			if packets > 1 {
				enveloped.Add(1)
			}
		default:
			if m.Reply != "" {
				answers[m.Subject] = m.Reply
			}
			if m.Subject == name {
				bare.Add(1)
			}
			take(m.Subject, m.Data)
		}
	}
	for _, subject := range []string{name, name + ".*"} {
		if _, err := nc.Subscribe(subject, message); err != nil {
			t.Fatal(err)
		}
	}
	request := func(reply string) {
		t.Helper()
		if err := nc.PublishMsg(&nats.Msg{Subject: "chatter", Reply: reply, Header: nats.Header{"Stream-Open": {"~1m5I"}}}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 8 {
		request(name + "." + string(stream.AppendToken(nil, stream.Token{Codec: stream.MsgPack, LogPackets: 5, LogBytes: 18, ID: uint64(i + 1)})))
	}
	eventually(t, "streams share envelopes", func() bool { return enveloped.Load() > 0 })
	request(name)
	eventually(t, "the stream to the name has records", func() bool { return bare.Load() > 100 })
	before := enveloped.Load()
	eventually(t, "the others still share envelopes", func() bool { return enveloped.Load() > before+10 })
	stop.Store(true) // the streams end, because the stranger acknowledges all
}
