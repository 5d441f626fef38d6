package fuzz

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"
	"unicode/utf8"

	"github.com/natsstream/stream"
)

// seedFrames are one good frame of every kind and some that are nearly good.
func seedFrames() []stream.Frame {
	credit := stream.AppendCredit(nil, stream.Credit{Ack: 3, Packets: 35, Bytes: 1 << 18})
	place := stream.AppendFragment(nil, stream.Fragment{Packet: 3, Offset: 4056, Length: 16408, Question: 9})
	return []stream.Frame{
		{Type: stream.FrameData, Payload: []byte("record")},
		{Type: stream.FrameData, Flags: stream.FlagMore | stream.FlagMsgPack, Payload: []byte{0x81}},
		{Type: stream.FrameData, Flags: stream.FlagMore},
		{Type: stream.FrameData, Flags: stream.FlagCodecMask, Payload: []byte("x")},
		{Type: stream.FrameClose, Code: 1000},
		{Type: stream.FrameClose, Flags: stream.FlagHalf, Code: 1000},
		{Type: stream.FrameClose, Code: 999},
		{Type: stream.FrameReset, Code: 4001, Payload: []byte("größer")},
		{Type: stream.FrameReset, Code: 5999, Payload: []byte{0xFF}},
		{Type: stream.FrameCredit, Flags: stream.FlagGap, Payload: credit},
		{Type: stream.FrameCredit, Payload: credit[:15]},
		{Type: stream.FramePing},
		{Type: stream.FrameMeta, Flags: stream.FlagTrailer, Payload: []byte("NATS/1.0\r\nA: b\r\n\r\n")},
		{Type: stream.FrameMeta, Flags: 2},
		{Type: stream.FrameMeta, Payload: []byte("NATS/1.0\r\nA: b\r\n\r\n")},
		{Type: stream.FrameFragment, Payload: append(place, "bytes"...)},
		{Type: stream.FrameFragment, Payload: place[:15]},
		{Type: stream.FrameProgress, Payload: place},
		{Type: stream.FrameProgress, Payload: append(place, 0)},
		{Type: 0x7F},
		{Type: 0x80, Flags: 0xFF, Code: 0xFFFF, Payload: []byte("skipped")},
	}
}

// FuzzFrame: whatever the bytes are, ParseFrame does not panic, returns only bytes of its input, and what it accepts
// is appended again just as it was.
func FuzzFrame(f *testing.F) {
	var all []byte
	for _, s := range seedFrames() {
		b := stream.AppendFrame(nil, s)
		f.Add(b)
		f.Add(b[:len(b)-1])
		all = append(all, b...)
	}
	f.Add(all)
	f.Add([]byte{1, 0, 0, 0, 0x80, 0, 0, 0})
	f.Add([]byte{0xFF, 0, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 'x'})
	f.Fuzz(func(t *testing.T, b []byte) {
		whole, before := b, bytes.Clone(b)
		for len(b) > 0 {
			fr, rest, err := stream.ParseFrame(b)
			if err != nil {
				if rest != nil || fr.Payload != nil {
					t.Fatalf("%+v and %d bytes beside error %v", fr, len(rest), err)
				}
				break
			}
			size := stream.FrameHeaderSize + len(fr.Payload)
			if size+len(rest) != len(b) || cap(fr.Payload) != len(fr.Payload) {
				t.Fatalf("payload of %d (capacity %d) and rest of %d out of %d bytes", len(fr.Payload), cap(fr.Payload), len(rest), len(b))
			}
			// A sub-slice of the input, not a copy of it.
			if len(fr.Payload) > 0 && &fr.Payload[0] != &b[stream.FrameHeaderSize] || len(rest) > 0 && &rest[0] != &b[size] {
				t.Fatal("payload or rest lie elsewhere than in the input")
			}
			if again := stream.AppendFrame(nil, fr); !bytes.Equal(again, b[:size]) {
				t.Fatalf("appended again: % x, was % x", again, b[:size])
			}
			b = rest
		}
		if !bytes.Equal(whole, before) {
			t.Fatal("the input was changed")
		}
	})
}

// model is a packet as the specification describes it, read field by field.
type model struct {
	flags  byte
	sender uint64
	seq    uint32
	frames []modelFrame
}

type modelFrame struct {
	Type, Flags byte
	Code        uint16
	Length      uint32
	payload     []byte
}

// readModel reads a packet the slow way: docs/PROTOCOL.md sections 4 and 5, one rule a line. It reports what follows
// the packet header as far as it is good.
func readModel(b []byte) (m model, err error) {
	var h struct {
		Magic, Version byte
		Sender         [6]byte
		Seq, Length    uint32
	}
	r := bytes.NewReader(b)
	if binary.Read(r, binary.BigEndian, &h) != nil {
		return m, stream.ErrTruncated
	}
	if h.Magic != 0xF5 {
		return m, stream.ErrMagic
	}
	if h.Version/16 != 1 {
		return m, stream.ErrVersion
	}
	if h.Version&4 != 0 {
		return m, stream.ErrFlags
	}
	if uint64(h.Length) != uint64(len(b)) {
		return m, stream.ErrLength
	}
	m.flags, m.seq = h.Version%16, h.Seq
	for _, c := range h.Sender {
		m.sender = m.sender<<8 | uint64(c)
	}
	for r.Len() > 0 {
		f, err := readModelFrame(r)
		if err != nil {
			return m, err
		}
		sequenced := f.Type == 1 || f.Type == 2 || f.Type == 6
		if f.Type < 128 && sequenced != (m.flags%2 == 1) {
			return m, stream.ErrMisplaced
		}
		m.frames = append(m.frames, f)
	}
	return m, nil
}

func readModelFrame(r *bytes.Reader) (f modelFrame, err error) {
	var h struct {
		Type, Flags byte
		Code        uint16
		Length      uint32
	}
	if binary.Read(r, binary.BigEndian, &h) != nil {
		return f, stream.ErrTruncated
	}
	f = modelFrame{h.Type, h.Flags, h.Code, h.Length, nil}
	if uint64(h.Length) > uint64(r.Len()) {
		return f, stream.ErrLength
	}
	f.payload = make([]byte, h.Length)
	if _, err := io.ReadFull(r, f.payload); err != nil {
		return f, err
	}
	if h.Type >= 128 {
		return f, nil
	}
	if h.Type == 0 || h.Type > 11 {
		return f, stream.ErrFrameType
	}
	maxFlags := [...]byte{1: 5, 2: 1, 4: 1, 6: 1, 11: 0}
	if h.Flags > maxFlags[h.Type] {
		return f, stream.ErrFlags
	}
	switch h.Type {
	case 2, 3:
		if h.Code < 1000 || h.Code >= 6000 {
			return f, stream.ErrCode
		}
		if h.Length > 1024 || !utf8.Valid(f.payload) {
			return f, stream.ErrPayload
		}
	default:
		if h.Code != 0 {
			return f, stream.ErrCode
		}
	}
	if h.Type == 1 && h.Flags%2 == 1 && h.Length == 0 || h.Type == 4 && h.Length != 16 || h.Type == 5 && h.Length != 0 || (h.Type == 7 || h.Type == 8) && h.Length != 8 || (h.Type == 9 || h.Type == 11) && h.Length != 16 || h.Type == 10 && h.Length < 16 {
		return f, stream.ErrPayload
	}
	return f, nil
}

// FuzzPacket: a packet is read as the naive model reads it: the same header, the same frames, and the same error.
func FuzzPacket(f *testing.F) {
	for _, h := range []stream.PacketHeader{
		{Flags: stream.PacketSeq, Sender: 0xC0FFEE00BEEE, Seq: 7},
		{Flags: stream.PacketAck, Seq: 0xFFFFFFFF},
		{Flags: stream.PacketEnv},
	} {
		f.Add(stream.AppendPacket(nil, h))
		var allowed []stream.Frame
		for _, s := range seedFrames() {
			b := stream.AppendPacket(nil, h, s)
			f.Add(b)
			f.Add(b[:len(b)-1])
			if h.Allows(s.Type) {
				allowed = append(allowed, s)
			}
		}
		all := stream.AppendPacket(nil, h, allowed...)
		f.Add(all)
		f.Add(append(all, 0))
	}
	f.Add([]byte(`{"type":1,"data":"aGk="}`))
	f.Add([]byte{0xF5, 0x21, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, want := readModel(b)
		h, rest, err := stream.ParsePacketHeader(b)
		if err == nil && (byte(h.Flags) != m.flags || h.Sender != m.sender || h.Seq != m.seq || int(h.Length) != len(b)) {
			t.Fatalf("header %+v, want %+v", h, m)
		}
		again := stream.AppendPacketHeader(nil, h)
		n := 0
		for err == nil && len(rest) > 0 {
			var fr stream.Frame
			if fr, rest, err = stream.ParseFrame(rest); err != nil {
				break
			}
			if !h.Allows(fr.Type) {
				err = stream.ErrMisplaced
				break
			}
			if n == len(m.frames) {
				t.Fatalf("frame %d is %+v, the model stopped with %v", n, fr, want)
			}
			w := m.frames[n]
			n++
			if byte(fr.Type) != w.Type || byte(fr.Flags) != w.Flags || fr.Code != w.Code || !bytes.Equal(fr.Payload, w.payload) {
				t.Fatalf("frame %d is %+v, want %+v", n, fr, w)
			}
			if fr.Type == stream.FrameCredit {
				c, err := stream.ParseCredit(fr.Payload)
				if err != nil || !bytes.Equal(stream.AppendCredit(nil, c), fr.Payload) {
					t.Fatalf("credit %+v out of % x: %v", c, fr.Payload, err)
				}
			}
			if fr.Type == stream.FrameProgress {
				p, err := stream.ParseFragment(fr.Payload)
				if err != nil || !bytes.Equal(stream.AppendFragment(nil, p), fr.Payload) {
					t.Fatalf("fragment %+v out of % x: %v", p, fr.Payload, err)
				}
			}
			again = stream.AppendFrame(again, fr)
		}
		switch {
		case n != len(m.frames):
			t.Fatalf("%d frames, want %d", n, len(m.frames))
		case !errors.Is(err, want) || err != nil && want == nil:
			t.Fatalf("error %v, want %v", err, want)
		case err == nil && !bytes.Equal(again, b):
			t.Fatalf("appended again: % x, was % x", again, b)
		}
	})
}

// FuzzRoundTrip: what is appended is parsed back, in front of any rest, unless the fields break a rule.
func FuzzRoundTrip(f *testing.F) {
	for _, s := range seedFrames() {
		f.Add(byte(stream.PacketSeq), uint64(0xC0FFEE00BEEE), uint32(7), byte(s.Type), byte(s.Flags), s.Code, s.Payload, []byte("rest"), uint64(1)<<40)
	}
	f.Fuzz(func(t *testing.T, pflags byte, sender uint64, seq uint32, typ, flags byte, code uint16, payload, rest []byte, limit uint64) {
		h := stream.PacketHeader{Flags: stream.PacketFlags(pflags & 0x0F), Sender: sender & (1<<48 - 1), Seq: seq}
		fr := stream.Frame{Type: stream.FrameType(typ), Flags: stream.FrameFlags(flags), Code: code, Payload: payload}
		size := stream.PacketHeaderSize + stream.FrameHeaderSize + len(payload)
		packet := stream.AppendPacket([]byte("dst"), h, fr)
		if !bytes.HasPrefix(packet, []byte("dst")) || len(packet) != 3+size {
			t.Fatalf("appended % x", packet)
		}
		packet = packet[3:]
		h.Length = uint32(size + len(rest))
		b := append(stream.AppendFrame(stream.AppendPacketHeader(nil, h), fr), rest...)
		if len(rest) == 0 && !bytes.Equal(packet, b) {
			t.Fatalf("AppendPacket: % x, header and frame: % x", packet, b)
		}

		gotH, body, err := stream.ParsePacketHeader(b)
		if refused := pflags&0x04 != 0; refused != (err != nil) {
			t.Fatalf("%+v: %v", h, err)
		} else if refused {
			if !errors.Is(err, stream.ErrFlags) {
				t.Fatal(err)
			}
			body = b[stream.PacketHeaderSize:]
		} else if gotH != h {
			t.Fatalf("%+v, want %+v", gotH, h)
		} else if _, _, err := stream.ParsePacketHeader(append(packet, rest...)); len(rest) > 0 && !errors.Is(err, stream.ErrLength) {
			t.Fatalf("%d bytes too many: %v", len(rest), err)
		}

		_, want := readModelFrame(bytes.NewReader(body))
		got, left, err := stream.ParseFrame(body)
		if !errors.Is(err, want) || err != nil && want == nil {
			t.Fatalf("%+v: error %v, want %v", fr, err, want)
		}
		if err == nil && (got.Type != fr.Type || got.Flags != fr.Flags || got.Code != fr.Code ||
			!bytes.Equal(got.Payload, payload) || !bytes.Equal(left, rest)) {
			t.Fatalf("%+v and rest % x, want %+v", got, left, fr)
		}

		credit := stream.Credit{Ack: seq, Packets: seq + uint32(code), Bytes: limit}
		if got, err := stream.ParseCredit(stream.AppendCredit(nil, credit)); err != nil || got != credit {
			t.Fatalf("%+v, want %+v: %v", got, credit, err)
		}
		token := stream.Token{Codec: stream.JSON + stream.Codec(typ%2), LogPackets: pflags % 32, LogBytes: flags % 62, ID: limit}
		if got, err := stream.ParseToken(string(stream.AppendToken(nil, token))); err != nil || got != token {
			t.Fatalf("%+v, want %+v: %v", got, token, err)
		}
	})
}

// FuzzToken: a string is a token or an offer, not both; what is accepted is appended again just as it was; what is not
// gets one of two errors.
func FuzzToken(f *testing.F) {
	token := string(stream.AppendToken(nil, stream.Token{Codec: stream.MsgPack, LogPackets: 5, LogBytes: 18, ID: 1<<64 - 1}))
	for _, s := range []string{
		"", "~", "~1", "~2", token, token[:stream.OfferSize], token[:stream.TokenSize-1], token + "0",
		"~1j0000000000000", "~1mVzzzzzzzzzzzz", "~1mVzLygHa16AHYG", "~2m5I0", "aB3dE6gH", "~1mWI00000000000",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := stream.ParseToken(s)
		offer, offerErr := stream.ParseOffer(s)
		for _, e := range []error{err, offerErr} {
			if e != nil && !errors.Is(e, stream.ErrToken) && !errors.Is(e, stream.ErrVersion) {
				t.Fatalf("%q: %v", s, e)
			}
		}
		if err == nil {
			if again := string(stream.AppendToken(nil, tok)); again != s {
				t.Fatalf("%q is %+v and that is %q", s, tok, again)
			}
			head, err := stream.ParseOffer(s[:stream.OfferSize])
			if head.ID = tok.ID; err != nil || head != tok {
				t.Fatalf("%q: offer %+v, token %+v, %v", s, head, tok, err)
			}
		} else if tok != (stream.Token{}) {
			t.Fatalf("%q: %+v beside error %v", s, tok, err)
		}
		if offerErr == nil {
			if again := string(stream.AppendOffer(nil, offer)); again != s || offer.ID != 0 {
				t.Fatalf("%q is %+v and that is %q", s, offer, again)
			}
		}
		if err == nil && offerErr == nil {
			t.Fatalf("%q is both", s)
		}
	})
}
