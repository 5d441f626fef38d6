package stream

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/big"
	"math/rand/v2"
	"os"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

// errorIDs are the errors by their identifiers in testdata/vectors.json.
var errorIDs = map[string]error{
	"truncated": ErrTruncated,
	"magic":     ErrMagic,
	"version":   ErrVersion,
	"flags":     ErrFlags,
	"type":      ErrFrameType,
	"length":    ErrLength,
	"code":      ErrCode,
	"payload":   ErrPayload,
	"misplaced": ErrMisplaced,
	"token":     ErrToken,
}

type vectorHeader struct {
	Flags  PacketFlags
	Sender uint64
	Seq    uint32
	Length uint32
}

type vectorFrame struct {
	Type    FrameType
	Flags   FrameFlags
	Code    uint16
	Payload string
}

func (v vectorFrame) frame(t *testing.T) Frame {
	return Frame{v.Type, v.Flags, v.Code, unhex(t, v.Payload)}
}

type vector struct {
	Name, Kind, Hex, Text, Rest, Error string
	Header                             vectorHeader
	Frames                             []vectorFrame
	Frame                              vectorFrame
	Credit                             struct {
		Ack, Packets uint32
		Bytes        uint64 `json:",string"`
	}
	Fragment Fragment
	Packets  []struct{ Token, Hex string }
	Token    struct {
		Codec      string
		LogPackets uint8 `json:"log_packets"`
		LogBytes   uint8 `json:"log_bytes"`
		ID         string
	}
}

func readVectors(t testing.TB) []vector {
	t.Helper()
	b, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var f struct {
		Version int
		Errors  map[string]string
		Vectors []vector
	}
	if err := json.Unmarshal(b, &f); err != nil {
		t.Fatal(err)
	}
	if f.Version != ProtocolVersion {
		t.Fatalf("vectors are of version %d", f.Version)
	}
	for id := range f.Errors {
		if errorIDs[id] == nil {
			t.Errorf("no Go error for identifier %q", id)
		}
	}
	return f.Vectors
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// parsePacket decodes a whole packet as a reader of a stream does.
func parsePacket(b []byte) (h PacketHeader, frames []Frame, err error) {
	h, b, err = ParsePacketHeader(b)
	for err == nil && len(b) > 0 {
		var f Frame
		if f, b, err = ParseFrame(b); err == nil && !h.Allows(f.Type) {
			err = ErrMisplaced
		}
		frames = append(frames, f)
	}
	return h, frames, err
}

func equalFrames(a, b Frame) bool {
	return a.Type == b.Type && a.Flags == b.Flags && a.Code == b.Code && bytes.Equal(a.Payload, b.Payload)
}

func TestVectorsAreEncodedAndDecoded(t *testing.T) {
	vectors := readVectors(t)
	if len(vectors) < 60 {
		t.Fatalf("only %d vectors", len(vectors))
	}
	for _, v := range vectors {
		t.Run(v.Name, func(t *testing.T) {
			in := unhex(t, v.Hex)
			var again []byte // what the decoded value encodes to
			var err error
			switch v.Kind {
			case "packet_header":
				var h PacketHeader
				var rest []byte
				h, rest, err = ParsePacketHeader(in)
				if err == nil && (h != PacketHeader(v.Header) || !bytes.Equal(rest, unhex(t, v.Rest))) {
					t.Errorf("got %+v, rest %x", h, rest)
				}
				again = append(AppendPacketHeader(nil, h), rest...)
			case "frame":
				var f Frame
				var rest []byte
				f, rest, err = ParseFrame(in)
				if err == nil && (!equalFrames(f, v.Frame.frame(t)) || !bytes.Equal(rest, unhex(t, v.Rest))) {
					t.Errorf("got %+v, rest %x", f, rest)
				}
				again = append(AppendFrame(nil, f), rest...)
			case "packet":
				var h PacketHeader
				var frames []Frame
				h, frames, err = parsePacket(in)
				again = AppendPacketHeader(nil, h)
				if err == nil && (h != PacketHeader(v.Header) || len(frames) != len(v.Frames)) {
					t.Fatalf("got %+v and %d frames", h, len(frames))
				}
				for i, f := range frames {
					if err == nil && !equalFrames(f, v.Frames[i].frame(t)) {
						t.Errorf("frame %d is %+v", i, f)
					}
					again = AppendFrame(again, f)
				}
			case "credit":
				var c Credit
				c, err = ParseCredit(in)
				if err == nil && c != Credit(v.Credit) {
					t.Errorf("got %+v", c)
				}
				again = AppendCredit(nil, c)
			case "fragment":
				var f Fragment
				f, err = ParseFragment(in)
				if err == nil && f != v.Fragment {
					t.Errorf("got %+v", f)
				}
				again = AppendFragment(nil, f)
			case "envelope":
				again, err = reopened(t, in, func(i int, token, packet []byte) {
					if string(token) != v.Packets[i].Token || !bytes.Equal(packet, unhex(t, v.Packets[i].Hex)) {
						t.Errorf("packet %d: %x of stream %q", i, packet, token)
					}
				})
			case "token", "offer":
				in = []byte(v.Text)
				var tok Token
				if v.Kind == "token" {
					tok, err = ParseToken(v.Text)
					again = AppendToken(nil, tok)
				} else {
					tok, err = ParseOffer(v.Text)
					again = AppendOffer(nil, tok)
				}
				want := v.Token
				if v.Kind == "offer" {
					want.ID = "0"
				}
				if err == nil && (tok.Codec.String() != want.Codec || tok.LogPackets != want.LogPackets ||
					tok.LogBytes != want.LogBytes || strconv.FormatUint(tok.ID, 10) != want.ID) {
					t.Errorf("got %+v", tok)
				}
				if err != nil && tok != (Token{}) {
					t.Errorf("%+v returned beside the error", tok)
				}
			default:
				t.Fatalf("unknown kind %q", v.Kind)
			}
			switch {
			case v.Error == "" && err != nil:
				t.Errorf("error %v", err)
			case v.Error == "" && !bytes.Equal(again, in):
				t.Errorf("encoded again:\n%x, want\n%x", again, in)
			case v.Error != "" && !errors.Is(err, errorIDs[v.Error]):
				t.Errorf("error %v, want %v", err, errorIDs[v.Error])
			}
		})
	}
}

// naiveFrame decodes a frame the slow and obvious way, docs/PROTOCOL.md section 5, and returns its total length. It is
// the oracle for the codec and must share nothing with it.
func naiveFrame(b []byte) (typ, flags byte, code int, payload []byte, size int, err error) {
	number := func(digits []byte) int {
		n := new(big.Int).SetBytes(digits)
		return int(min(n.Int64(), int64(math.MaxInt))) // the largest length does not fit an int of 32 bits
	}
	fail := func(err error) (byte, byte, int, []byte, int, error) { return 0, 0, 0, nil, 0, err }
	if len(b) < 8 {
		return fail(ErrTruncated)
	}
	typ, flags, code = b[0], b[1], number(b[2:4])
	n := number(b[4:8])
	if n > len(b)-8 {
		return fail(ErrLength)
	}
	payload, size = b[8:8+n], 8+n
	if typ >= 128 {
		return typ, flags, code, payload, size, nil
	}
	allowed := map[byte][]byte{
		1: {0, 1, 2, 3, 4, 5}, 2: {0, 1}, 3: {0}, 4: {0, 1}, 5: {0}, 6: {0, 1}, 7: {0}, 8: {0}, 9: {0}, 10: {0}, 11: {0},
	}[typ]
	if allowed == nil {
		return fail(ErrFrameType)
	}
	if bytes.IndexByte(allowed, flags) < 0 {
		return fail(ErrFlags)
	}
	closes := typ == 2 || typ == 3
	if closes && (code < 1000 || code > 5999) || !closes && code != 0 {
		return fail(ErrCode)
	}
	switch {
	case typ == 1 && flags%2 == 1 && n == 0,
		closes && (n > 1024 || !utf8.ValidString(string(payload))),
		typ == 4 && n != 16,
		typ == 5 && n != 0,
		(typ == 7 || typ == 8) && n != 8 || (typ == 9 || typ == 11) && n != 16, typ == 10 && n < 16:
		return fail(ErrPayload)
	}
	return typ, flags, code, payload, size, nil
}

// randomFrame returns bytes that are a frame, or nearly one: uniform bytes would hardly ever get past the type.
func randomFrame(r *rand.Rand) []byte {
	pick := func(from ...int) int { return from[r.IntN(len(from))] }
	n := pick(0, 1, 7, 8, 9, 15, 16, 17, r.IntN(64), 1024, 1025)
	b := make([]byte, 8+n)
	b[0] = byte(pick(r.IntN(13), r.IntN(13), 1, 128+r.IntN(128), r.IntN(256)))
	b[1] = byte(pick(0, 0, 0, r.IntN(8), r.IntN(256)))
	binary.BigEndian.PutUint16(b[2:], uint16(pick(0, 0, 1000, 999, 5999, 6000, r.IntN(65536))))
	binary.BigEndian.PutUint32(b[4:], uint32(pick(n, n, n, n, n, n-1, n+1, math.MaxInt32, -1, r.IntN(65))))
	for i := range b[8:] {
		b[8+i] = byte(pick('a', 'a', 'a', 'a', 'a', 'a', 'a', r.IntN(256)))
		if n > 64 || r.IntN(2) == 0 {
			b[8+i] = 'b'
		}
	}
	return append(b, make([]byte, pick(0, 0, 3))...)[:max(0, len(b)-pick(0, 0, 0, 0, 0, 1, 8, r.IntN(9)))]
}

func TestParseFrameAgreesWithOracle(t *testing.T) {
	rounds := 1_000_000
	if testing.Short() {
		rounds = 50_000
	}
	r := rand.New(rand.NewPCG(1, 2))
	seen := map[error]int{}
	for range rounds {
		b := randomFrame(r)
		typ, flags, code, payload, size, want := naiveFrame(b)
		f, rest, err := ParseFrame(b)
		seen[want]++
		if !errors.Is(err, want) {
			t.Fatalf("% x: error %v, want %v", b, err, want)
		}
		if err != nil {
			if rest != nil || f.Payload != nil || f.Type != 0 || f.Flags != 0 || f.Code != 0 {
				t.Fatalf("% x: %+v, rest %x beside error %v", b, f, rest, err)
			}
			continue
		}
		if f.Type != FrameType(typ) || f.Flags != FrameFlags(flags) || int(f.Code) != code || !bytes.Equal(f.Payload, payload) {
			t.Fatalf("% x: got %+v", b, f)
		}
		if len(rest) != len(b)-size || cap(f.Payload) != len(f.Payload) {
			t.Fatalf("% x: rest of %d bytes, payload of %d with capacity %d", b, len(rest), len(f.Payload), cap(f.Payload))
		}
		if again := AppendFrame(nil, f); !bytes.Equal(again, b[:size]) {
			t.Fatalf("% x: encoded again: % x", b, again)
		}
	}
	for _, err := range []error{nil, ErrTruncated, ErrLength, ErrFrameType, ErrFlags, ErrCode, ErrPayload} {
		if seen[err] < rounds/1000 {
			t.Errorf("the random frames hit %v only %d times", err, seen[err])
		}
	}
}

// Every header whose upper half has at most the bits that matter, against the rules.
func TestIsPlainDataAgreesWithTheRules(t *testing.T) {
	check := func(typ, flags byte, code uint16) {
		h := uint64(typ)<<56 | uint64(flags)<<48 | uint64(code)<<32 | 0xDEADBEEF
		want := typ == 1 && code == 0 && (flags == 0 || flags == 2 || flags == 4)
		if got := isPlainData(h); got != want {
			t.Fatalf("type %d, flags %#x, code %d: %v", typ, flags, code, got)
		}
		masked := h&dataHeaderMask == dataHeaderWant
		if masked != (want || typ == 1 && code == 0 && flags == 6) {
			t.Fatalf("type %d, flags %#x, code %d: mask says %v", typ, flags, code, masked)
		}
	}
	codes := []uint16{0, 1, 2, 4, 6, 0x7FFF, 0x8000, 0xFFFF}
	for i := range 16 {
		codes = append(codes, 1<<i)
	}
	for typ := range 256 {
		for flags := range 256 {
			for _, code := range codes {
				check(byte(typ), byte(flags), code)
			}
		}
	}
	for code := range 1 << 16 {
		check(1, 0, uint16(code))
	}
}

func TestPacketHeaderFieldsAreRead(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 10_000 {
		h := PacketHeader{PacketFlags(r.IntN(4)), r.Uint64() & maxSender, r.Uint32(), uint32(PacketHeaderSize + r.IntN(100))}
		b := bytes.Repeat([]byte{0xAA}, int(h.Length))
		putPacketHeader(b, h.Flags, h.Sender, h.Seq, len(b))
		if !bytes.Equal(b[:PacketHeaderSize], AppendPacketHeader(nil, h)) || bytes.Count(b[PacketHeaderSize:], []byte{0xAA}) != len(b)-PacketHeaderSize {
			t.Fatalf("putPacketHeader %+v: % x", h, b)
		}
		if got, rest, err := ParsePacketHeader(b); err != nil || got != h || len(rest) != len(b)-PacketHeaderSize {
			t.Fatalf("ParsePacketHeader(% x) = %+v, % x, %v", b, got, rest, err)
		}
		b = bytes.Repeat([]byte{0xAA}, FrameHeaderSize+1)
		typ, fl, code, n := FrameType(r.Uint32()), FrameFlags(r.Uint32()), uint16(r.Uint32()), r.IntN(math.MaxInt32)
		putFrameHeader(b, typ, fl, code, n)
		if b[0] != byte(typ) || b[1] != byte(fl) || binary.BigEndian.Uint16(b[2:]) != code ||
			binary.BigEndian.Uint32(b[4:]) != uint32(n) || b[8] != 0xAA {
			t.Fatalf("putFrameHeader(%d, %#x, %d, %d): % x", typ, uint8(fl), code, n, b)
		}
		if payloadLen(frameHeader(b)) != uint64(n) {
			t.Fatalf("payloadLen of % x is %d", b, payloadLen(frameHeader(b)))
		}
	}
	if got := AppendPacketHeader(nil, PacketHeader{Flags: 0xFF}); got[1] != 0x1F {
		t.Errorf("flags spill into the version: % x", got)
	}
	if got := AppendPacketHeader(nil, PacketHeader{Flags: PacketSeq, Sender: math.MaxUint64}); got[0] != PacketMagic || got[1] != 0x11 {
		t.Errorf("the sender spills into the flags: % x", got)
	}
}

// All 65,536 first two bytes of a packet header.
func TestParsePacketHeaderAcceptsValidHeadersOnly(t *testing.T) {
	b := AppendPacket(nil, PacketHeader{})
	for v := range 1 << 16 {
		binary.BigEndian.PutUint16(b, uint16(v))
		var want error
		switch {
		case v>>8 != 0xF5:
			want = ErrMagic
		case v>>4&0xF != 1:
			want = ErrVersion
		case v&int(PacketEnv) != 0:
			want = ErrFlags
		}
		if _, _, err := ParsePacketHeader(b); !errors.Is(err, want) {
			t.Fatalf("% x: error %v, want %v", b, err, want)
		}
	}
}

// A packet that lost or gained bytes anywhere is none, above all one cut exactly between two frames.
func TestParsePacketHeaderRefusesWrongLength(t *testing.T) {
	records := []Frame{{Type: FrameData, Payload: []byte("one")}, {Type: FrameData, Payload: []byte("two")}}
	whole := AppendPacket(nil, PacketHeader{Flags: PacketSeq, Sender: 1, Seq: 2}, records...)
	if _, frames, err := parsePacket(whole); err != nil || len(frames) != 2 {
		t.Fatalf("%d frames, %v", len(frames), err)
	}
	long := append(bytes.Clone(whole), whole...)
	for n := range len(long) + 1 {
		want := ErrLength
		switch {
		case n < PacketHeaderSize:
			want = ErrTruncated
		case n == len(whole):
			continue
		}
		if h, rest, err := ParsePacketHeader(long[:n]); !errors.Is(err, want) || h != (PacketHeader{}) || rest != nil {
			t.Errorf("%d of %d bytes: %+v, % x, %v; want %v", n, len(whole), h, rest, err, want)
		}
	}
}

func TestAppendPacketRoundTrip(t *testing.T) {
	frames := []Frame{{Type: FrameData, Flags: FlagJSON, Payload: []byte("12")}, {Type: 0xFF}, {Type: FrameClose, Code: 1000, Payload: []byte("x")}}
	for n := range len(frames) + 1 {
		h := PacketHeader{PacketSeq | PacketAck, 0xBEEF, 7, 99} // the length is ignored
		dst := append(make([]byte, 0, 128), "before"...)
		got := AppendPacket(dst, h, frames[:n]...)
		h.Length = uint32(len(got) - len(dst))
		want := AppendPacketHeader([]byte("before"), h)
		for _, f := range frames[:n] {
			want = AppendFrame(want, f)
		}
		if &got[0] != &dst[0] || !bytes.Equal(got, want) {
			t.Errorf("%d frames: % x, want % x", n, got, want)
		}
		if parsed, _, err := ParsePacketHeader(got[len(dst):]); err != nil || parsed != h {
			t.Errorf("%d frames: %+v, %v; want %+v", n, parsed, err, h)
		}
	}
}

func TestFramesAreAllowedByKindOfPacket(t *testing.T) {
	for typ := range 256 {
		seq := typ == 1 || typ == 2 || typ == 6 || typ >= 128
		control := typ == 3 || typ == 4 || typ == 5 || typ == 7 || typ == 8 || typ == 9 || typ == 10 || typ == 11 || typ >= 128
		for flags := range PacketFlags(16) {
			want := control
			if flags&1 != 0 {
				want = seq
			}
			if got := (PacketHeader{Flags: flags}).Allows(FrameType(typ)); got != want {
				t.Errorf("type %d in packet with %v: %v", typ, flags, got)
			}
		}
	}
}

func TestAppendFrameKeepsPrefix(t *testing.T) {
	dst := append(make([]byte, 0, 64), "before"...)
	got := AppendFrame(dst, Frame{Type: FrameData, Payload: []byte("x")})
	if &got[0] != &dst[0] || string(got[:6]) != "before" || len(got) != 6+9 {
		t.Errorf("got %q", got)
	}
	// Input that parsing refuses is appended all the same.
	bad := AppendFrame(nil, Frame{Type: 0, Flags: 0xFF, Code: 1})
	if want := []byte{0, 0xFF, 0, 1, 0, 0, 0, 0}; !bytes.Equal(bad, want) {
		t.Errorf("got % x", bad)
	}
}

func TestFrameLenRefusesTooLong(t *testing.T) {
	longest := uint64(math.MaxUint32)
	if math.MaxInt == math.MaxInt32 {
		return // no slice is too long
	}
	if got := frameLen(int(longest)); uint64(got) != longest {
		t.Errorf("got %d", got)
	}
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	frameLen(int(longest + 1))
}

func TestPayloadCannotReachNextFrame(t *testing.T) {
	b := AppendFrame(nil, Frame{Type: FrameData, Payload: []byte("one")})
	b = AppendFrame(b, Frame{Type: FrameData, Payload: []byte("two")})
	f, rest, err := ParseFrame(b)
	if err != nil {
		t.Fatal(err)
	}
	_ = append(f.Payload, "overwrites?!"...)
	if f, _, err := ParseFrame(rest); err != nil || string(f.Payload) != "two" {
		t.Errorf("second frame is now %q, %v", f.Payload, err)
	}
}

func TestTokenRoundTrip(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for range 20_000 {
		want := Token{JSON + Codec(r.IntN(2)), uint8(r.IntN(32)), uint8(r.IntN(62)), r.Uint64() >> r.IntN(64)}
		s := string(AppendToken(nil, want))
		if got, err := ParseToken(s); err != nil || got != want || len(s) != TokenSize {
			t.Fatalf("%+v: %q, %+v, %v", want, s, got, err)
		}
		// math/big has the letters the other way round.
		digits := new(big.Int).SetUint64(want.ID).Text(62)
		swap := func(c rune) rune {
			switch {
			case 'a' <= c && c <= 'z':
				return c - 'a' + 'A'
			case 'A' <= c && c <= 'Z':
				return c - 'A' + 'a'
			}
			return c
		}
		if id := strings.Repeat("0", 11-len(digits)) + strings.Map(swap, digits); s[OfferSize:] != id {
			t.Fatalf("id %d is %q, want %q", want.ID, s[OfferSize:], id)
		}
		offer := string(AppendOffer(nil, want))
		want.ID = 0
		if got, err := ParseOffer(offer); err != nil || got != want || offer != s[:OfferSize] {
			t.Fatalf("%+v: offer %q, %+v, %v", want, offer, got, err)
		}
	}
}

// One character of a good token changed to every other byte: it is another token, or an error, and never the same one.
func TestMutatedTokenIsNeverTheSame(t *testing.T) {
	good := string(AppendToken(nil, Token{MsgPack, 5, 18, math.MaxUint64}))
	want, _ := ParseToken(good)
	for i := range good {
		for c := range 256 {
			s := good[:i] + string([]byte{byte(c)}) + good[i+1:]
			got, err := ParseToken(s)
			switch {
			case s == good:
			case err == nil && (got == want || string(AppendToken(nil, got)) != s):
				t.Errorf("%q reads as %+v", s, got)
			case err != nil && !errors.Is(err, ErrToken) && !errors.Is(err, ErrVersion):
				t.Errorf("%q: %v", s, err)
			}
		}
	}
}

func TestAppendTokenClamps(t *testing.T) {
	got := string(AppendToken(nil, Token{Codec: CodecDefault, LogPackets: 255, LogBytes: 255, ID: math.MaxUint64}))
	if want := "~1mVzLygHa16AHYF"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestStringsNameValues(t *testing.T) {
	for _, c := range []struct {
		v    fmt.Stringer
		want string
	}{
		{FrameData, "DATA"}, {FrameMeta, "META"}, {FrameResume, "RESUME"}, {FrameFragment, "FRAGMENT"}, {FrameProgress, "PROGRESS"}, {FrameType(12), "FrameType(12)"}, {FrameType(200), "FrameType(200)"},
		{PacketFlags(0), "0"}, {PacketSeq | PacketAck, "SEQ|ACK"}, {PacketEnv, "ENV"}, {PacketMark, "MARK"},
		{FlagRaw, "0"}, {FlagMore | FlagJSON, "MORE/HALF/GAP/TRAILER|JSON"}, {FlagMsgPack | 0x40, "MSGPACK|0x40"},
		{CodecDefault, "default"}, {JSON, "json"}, {MsgPack, "msgpack"}, {Codec(9), "Codec(9)"},
	} {
		if got := c.v.String(); got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

func TestCodecErrorsNameTheReason(t *testing.T) {
	_, err := ParseCredit(nil)
	if got, want := err.Error(), "stream: invalid frame payload: CREDIT is not 16 bytes"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for id, err := range errorIDs {
		if !strings.HasPrefix(err.Error(), "stream: ") {
			t.Errorf("%s: %q has no prefix", id, err)
		}
		for other, e := range errorIDs {
			if id != other && errors.Is(err, e) {
				t.Errorf("%s is %s", id, other)
			}
		}
	}
}

// Frames are passed by value on the reader's way, so their size is part of its cost.
func TestFrameStaysSmall(t *testing.T) {
	if strconv.IntSize != 64 {
		return
	}
	for _, c := range []struct {
		typ  reflect.Type
		want uintptr
	}{
		{reflect.TypeFor[Frame](), 32},
		{reflect.TypeFor[PacketHeader](), 24},
		{reflect.TypeFor[Credit](), 16},
		{reflect.TypeFor[Token](), 16},
	} {
		if got := c.typ.Size(); got != c.want {
			t.Errorf("%v has %d bytes, want %d", c.typ, got, c.want)
		}
	}
}

// mallocsPerRun returns the mean number of heap allocations of f. Other goroutines of the test binary may allocate
// meanwhile, so the smallest of a few measurements counts.
func mallocsPerRun(f func()) float64 {
	const runs = 2000
	least := math.Inf(1)
	f()
	for range 5 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for range runs {
			f()
		}
		runtime.ReadMemStats(&after)
		least = min(least, float64(after.Mallocs-before.Mallocs)/runs)
	}
	return least
}

// Neither good nor bad input costs an allocation.
func TestCodecAllocatesNothing(t *testing.T) {
	var (
		sink error
		buf  = make([]byte, 0, 4096)
	)
	check := func(name string, f func()) {
		t.Helper()
		if got := mallocsPerRun(f); got >= 0.01 {
			t.Errorf("%s: %.3f allocations", name, got)
		}
	}
	for _, v := range readVectors(t) {
		in := unhex(t, v.Hex)
		text := v.Text
		var f func()
		switch v.Kind {
		case "packet_header":
			f = func() { _, _, sink = ParsePacketHeader(in) }
		case "frame":
			f = func() { _, _, sink = ParseFrame(in) }
		case "credit":
			f = func() { _, sink = ParseCredit(in) }
		case "envelope":
			f = func() { _, _, sink = openEnvelope(in) }
		case "token":
			f = func() { _, sink = ParseToken(text) }
		case "offer":
			f = func() { _, sink = ParseOffer(text) }
		default:
			continue
		}
		check(v.Name, f)
		if id := v.Error; id != "" {
			check(v.Name+" errors.Is", func() {
				if !errors.Is(sink, errorIDs[id]) {
					t.Error(sink)
				}
			})
		}
	}
	payload := []byte("payload")
	check("append", func() {
		buf = AppendPacketHeader(buf[:0], PacketHeader{PacketSeq, 1, 2, 3})
		buf = AppendPacket(buf, PacketHeader{PacketSeq, 1, 2, 3}, Frame{Type: FrameData, Payload: payload})
		buf = AppendFrame(buf, Frame{Type: FrameData, Payload: payload})
		buf = AppendCredit(buf, Credit{1, 2, 3})
		buf = AppendToken(buf, Token{MsgPack, 5, 18, math.MaxUint64})
	})
}

// The content of META is well formed from its first byte to its last, or refused.
func TestMetaIsCheckedToItsLastByte(t *testing.T) {
	for in, good := range map[string]bool{
		"NATS/1.0\r\n\r\n":                  true,
		"NATS/1.0\r\nA: b\r\n\r\n":          true,
		"NATS/1.0\r\nA:  b \r\nA:c\r\n\r\n": true,
		"":                                  false,
		"NATS/1.0 503\r\n\r\n":              false,
		"NATS/1.0\r\nA: b\r\n":              false,
		"NATS/1.0\r\n":                      false,
		"NATS/1.0\r\nA\r\n\r\n":             false,
		"HTTP/1.1\r\nA: b\r\n\r\n":          false,
	} {
		if h, err := parseMeta([]byte(in)); (err == nil) != good {
			t.Errorf("%q: %v, %v", in, h, err)
		}
	}
}

// reopened opens an envelope, calls see for each packet in it, and makes an envelope of the same packets.
func reopened(t *testing.T, b []byte, see func(i int, token, packet []byte)) (again []byte, err error) {
	t.Helper()
	body, n, err := openEnvelope(b)
	if err != nil {
		if body != nil || n != 0 {
			t.Errorf("%d bytes, %d packets beside error %v", len(body), n, err)
		}
		return nil, err
	}
	again = make([]byte, PacketHeaderSize)
	for i := range n {
		token, packet, rest := nextEnveloped(body)
		if len(token) != TokenSize || cap(packet) != len(packet) {
			t.Errorf("token of %d bytes, packet of %d with capacity %d", len(token), len(packet), cap(packet))
		}
		see(i, token, packet)
		again, body = append(append(again, token...), packet...), rest
	}
	if len(body) != 0 {
		t.Errorf("%d bytes behind %d packets", len(body), n)
	}
	putEnvelopeHeader(again, len(again))
	return again, nil
}
