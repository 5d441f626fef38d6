package stream_test

import (
	"errors"
	"io"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// A stream has one producer. Its packets carry a sender number of 47 random bits, and its first packet and its questions name a
// control subject that no other producer has. Packets of two producers never become one stream, not even if both have drawn
// the same number.

// controlSubject returns a producer's control subject whose token has the given id.
func controlSubject(id uint64) string {
	token := stream.Token{Codec: stream.MsgPack, LogPackets: 5, LogBytes: 16, ID: id}
	return string(stream.AppendToken([]byte("_SINBOX.producer."), token))
}

func TestProducersWithOneSenderNumberNeverMix(t *testing.T) {
	p := newPair(t)
	const number = 0xC0FFEE00BEEE
	a, b := controlSubject(1), controlSubject(2)
	packet := func(reply string, seq uint32, frames ...stream.Frame) *nats.Msg {
		return &nats.Msg{Reply: reply, Data: rawPacket(stream.PacketSeq, number, seq, frames...)}
	}
	hello := func(reply string, seq uint32) *nats.Msg {
		return &nats.Msg{Reply: reply, Data: rawPacket(0, number, seq, rawPing())}
	}
	for _, c := range []struct {
		name     string
		messages []*nats.Msg
		records  int
		mixed    bool
	}{
		{"one producer", []*nats.Msg{packet(a, 0, rawData("A0")), packet("", 1, rawData("A1"), rawClose(1000))}, 2, false},
		{"one producer repeats its first packet and asks", []*nats.Msg{packet(a, 0, rawData("A0")), packet(a, 0, rawData("A0")), hello(a, 1),
			packet("", 1, rawData("A1"), rawClose(1000))}, 2, false},
		{"a second first packet", []*nats.Msg{packet(a, 0, rawData("A0")), packet(b, 0, rawData("B0")), packet("", 1, rawData("B1"), rawClose(1000))}, 1, true},
		{"a second first packet after many", []*nats.Msg{packet(a, 0, rawData("A0")), packet("", 1, rawData("A1")), packet("", 2, rawData("A2")),
			packet(b, 0, rawData("B0")), packet("", 3, rawData("B3"), rawClose(1000))}, 3, true},
		{"a first packet after another's hello", []*nats.Msg{hello(a, 0), packet(b, 0, rawData("B0"), rawClose(1000))}, 0, true},
		{"a hello after another's first packet", []*nats.Msg{packet(a, 0, rawData("A0")), hello(b, 0), packet("", 1, rawData("B1"), rawClose(1000))}, 1, true},
		{"a hello that shows a gap", []*nats.Msg{packet(a, 0, rawData("A0")), hello(b, 7)}, 1, true},
		{"a producer across accounts", []*nats.Msg{packet("mapped.x.1", 0, rawData("A0")), hello("mapped.x.2", 1), packet("", 1, rawData("A1"), rawClose(1000))}, 2, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, reply, nc := rawStream(t, p)
			for _, m := range c.messages {
				m.Subject = reply
				if err := nc.PublishMsg(m); err != nil {
					t.Fatal(err)
				}
			}
			records, err := readAll(s)
			if ce, _ := errors.AsType[*stream.CloseError](err); c.mixed != (ce != nil && ce.Code == stream.CloseProtocolError) || !c.mixed && err != io.EOF {
				t.Errorf("the stream ended with %v", err)
			}
			for _, rec := range records {
				if rec[0] != 'A' {
					t.Errorf("record %q is of another producer", rec)
				}
			}
			if len(records) != c.records {
				t.Errorf("records %q, want %d", records, c.records)
			}
		})
	}
}

// Another producer's packets, under a number of its own, never count, and it hears that nobody listens.
func TestSecondProducerIsToldToStop(t *testing.T) {
	p := newPair(t)
	s, reply, nc := rawStream(t, p)
	other, err := nc.SubscribeSync(controlSubject(2))
	if err != nil {
		t.Fatal(err)
	}
	first := &nats.Msg{Subject: reply, Reply: controlSubject(1), Data: rawPacket(stream.PacketSeq, 2, 0, rawData("A0"))}
	second := &nats.Msg{Subject: reply, Reply: controlSubject(2), Data: rawPacket(stream.PacketSeq, 4, 0, rawData("B0"))}
	for _, m := range []*nats.Msg{first, second} {
		if err := nc.PublishMsg(m); err != nil {
			t.Fatal(err)
		}
	}
	rawPublish(t, nc, reply, rawPacket(stream.PacketSeq, 4, 1, rawData("B1"), rawClose(1000)), rawPacket(stream.PacketSeq, 2, 1, rawData("A1"), rawClose(1000)))
	if records, err := readAll(s); err != io.EOF || len(records) != 2 || string(records[0]) != "A0" || string(records[1]) != "A1" {
		t.Errorf("records %q, %v", records, err)
	}
	m, err := other.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	h, body, err := stream.ParsePacketHeader(m.Data)
	if f, _, ferr := stream.ParseFrame(body); err != nil || ferr != nil || f.Type != stream.FrameReset || h.Sender != 4 {
		t.Errorf("the second producer got %v of sender %d, %v, %v", f.Type, h.Sender, err, ferr)
	}
}
