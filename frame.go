package stream

import (
	"encoding/binary"
	"errors"
	"math"
	"math/bits"
	"strconv"
	"strings"
)

//go:generate go run ./internal/framegen

// This file is the codec of the wire protocol, docs/PROTOCOL.md sections 2, 4, 5 and 8: functions over bytes that any
// goroutine may call. It knows no connection, stream or clock. Appending does not check its arguments. Parsing checks
// everything that one header or frame alone shows, and allocates nothing. It never takes memory or trusts an offset
// because of a length field.

// FrameType is the type of a frame. A receiver skips frames of unknown types from 0x80 on.
type FrameType uint8

// Skippable reports whether a receiver that does not know t skips the frame. Any other unknown type is an error.
func (t FrameType) Skippable() bool { return t >= frameSkippable }

// FrameFlags are the flags of a frame. The meaning of a bit depends on the frame's type.
type FrameFlags uint8

// PacketFlags are the flags of a packet, four bits.
type PacketFlags uint8

// Frame is one record, a piece of a record, or one control message.
type Frame struct {
	Type    FrameType
	Flags   FrameFlags
	Code    uint16 // close code of CLOSE and RESET, 1000 to 5999; 0 in the other frames
	Payload []byte
}

// PacketHeader is the head of a packet: of the payload of one NATS message.
type PacketHeader struct {
	Flags  PacketFlags
	Sender uint64 // random number of the send half that made the packet, of 48 bits
	Seq    uint32 // with PacketSeq the number of this packet, otherwise the next number that the sender will use
	Length uint32 // bytes of the whole packet, this header included
}

// Allows reports whether a packet with header h may contain a frame of type t. A packet with [PacketSeq] may contain
// DATA, CLOSE and META. A packet without it may contain RESET, CREDIT, PING, CHALLENGE, RESPONSE, RESUME, FRAGMENT and
// PROGRESS. Both may contain skippable types.
func (h PacketHeader) Allows(t FrameType) bool {
	set := uint32(controlTypes)
	if h.Flags&PacketSeq != 0 {
		set = sequencedTypes
	}
	return set>>t&1 != 0 || t.Skippable() // a shift by 32 or more leaves nothing
}

// Credit is the payload of a CREDIT frame. Its limits are absolute, counted from the start of the stream.
type Credit struct {
	Ack     uint32 // number of the next packet the receiver expects; all before it arrived
	Packets uint32 // packet limit: the first sequence number that may not be used yet
	Bytes   uint64 // byte limit: once the sequenced packets have this total length, no further packet may be opened
}

// Fragment states which bytes of a packet follow it in a FRAGMENT frame. It is the whole payload of a PROGRESS frame,
// which answers a FRAGMENT frame without bytes.
type Fragment struct {
	Packet   uint32 // number of the packet
	Offset   uint32 // of the first of the bytes; in PROGRESS how many bytes of the packet arrived
	Length   uint32 // of the whole packet; 0 in PROGRESS
	Question uint32 // repeated by the answer
}

// Codec is an encoding of objects. The zero value, CodecDefault, selects the default of the parameter that it is used
// for.
type Codec uint8

const (
	CodecDefault Codec = iota // the default that the documentation of the parameter names
	JSON                      // encoding/json
	MsgPack                   // MessagePack
)

// String returns "default", "json", "msgpack", or "Codec(7)".
func (c Codec) String() string {
	switch c {
	case CodecDefault:
		return "default"
	case JSON:
		return "json"
	case MsgPack:
		return "msgpack"
	}
	return "Codec(" + strconv.Itoa(int(c)) + ")"
}

// Token is the last element of a reply subject. To the mux of the peer that made it, it names the stream of a message.
// To the other end, it states the protocol version, the codec and the initial window of that peer.
type Token struct {
	Codec      Codec  // how the peer wants objects: JSON or MsgPack
	LogPackets uint8  // the initial window is 1<<LogPackets packets, at most 31
	LogBytes   uint8  // and 1<<LogBytes bytes, at most 61
	ID         uint64 // random; zero in an offer
}

// Errors of the parsers. A parser returns one of these, or an error with more detail that matches one under
// [errors.Is]. All of them are made once, so that invalid input causes no allocation.
var (
	// ErrTruncated: fewer bytes than a header has.
	ErrTruncated = errors.New("stream: header cut short")
	// ErrMagic: the bytes are not a packet of this protocol. They may be a message of the JSON fallback.
	ErrMagic = errors.New("stream: not a packet: wrong magic")
	// ErrVersion: a packet, token or offer of another version of the protocol.
	ErrVersion = errors.New("stream: unsupported protocol version")
	// ErrFlags: a flag is set that this version reserves.
	ErrFlags = errors.New("stream: reserved flag set")
	// ErrFrameType: a frame of a type that this version does not know and that may not be skipped.
	ErrFrameType = errors.New("stream: unknown frame type")
	// ErrLength: a packet is not as long as its header says, or a frame is longer than the rest of its packet.
	ErrLength = errors.New("stream: wrong length")
	// ErrCode: the code of a CLOSE or RESET is not in 1000 to 5999, or that of another frame is not 0.
	ErrCode = errors.New("stream: frame code out of range")
	// ErrPayload: a payload that the type of its frame does not allow.
	ErrPayload = errors.New("stream: invalid frame payload")
	// ErrMisplaced: a frame in a packet that may not contain it; see PacketHeader.Allows.
	ErrMisplaced = errors.New("stream: frame in the wrong kind of packet")
	// ErrToken: the text is not a token, or not an offer. The reply subject of a peer that speaks the JSON fallback
	// ends with no token.
	ErrToken = errors.New("stream: not a token")
)

// wireError is one case of the errors above.
type wireError struct {
	is   error
	text string
}

func (e *wireError) Error() string { return e.is.Error() + ": " + e.text }
func (e *wireError) Unwrap() error { return e.is }

var (
	errEnvelope         error = &wireError{ErrFlags, "an envelope in the place of a packet"}
	errEnvelopeFlags    error = &wireError{ErrFlags, "not an envelope"}
	errEnvelopedMagic   error = &wireError{ErrMagic, "in an envelope"}
	errEnvelopedLength  error = &wireError{ErrLength, "packet runs past its envelope"}
	errPacketFlags      error = &wireError{ErrFlags, "in the packet header"}
	errFrameFlags       error = &wireError{ErrFlags, "in the frame header"}
	errCodecFlags       error = &wireError{ErrFlags, "reserved codec"}
	errPacketLength     error = &wireError{ErrLength, "packet is not as long as its header says"}
	errFrameLength      error = &wireError{ErrLength, "frame runs past its packet"}
	errCodeWithoutClose error = &wireError{ErrCode, "neither CLOSE nor RESET and not 0"}
	errCloseRange       error = &wireError{ErrCode, "close code not in 1000 to 5999"}
	errEmptyPiece       error = &wireError{ErrPayload, "empty DATA with MORE"}
	errReasonLength     error = &wireError{ErrPayload, "reason longer than 1024 bytes"}
	errReasonUTF8       error = &wireError{ErrPayload, "reason is not UTF-8"}
	errCreditSize       error = &wireError{ErrPayload, "CREDIT is not 16 bytes"}
	errPingPayload      error = &wireError{ErrPayload, "PING is not empty"}
	errNonceSize        error = &wireError{ErrPayload, "CHALLENGE or RESPONSE is not 8 bytes"}
	errFragmentSize     error = &wireError{ErrPayload, "FRAGMENT shorter than 16 bytes"}
	errProgressSize     error = &wireError{ErrPayload, "PROGRESS is not 16 bytes"}
	errResumeSize       error = &wireError{ErrPayload, "RESUME is not 16 bytes"}
	errTokenSize        error = &wireError{ErrToken, "wrong length"}
	errTokenMark        error = &wireError{ErrToken, "does not begin with ~1"}
	errTokenCodec       error = &wireError{ErrToken, "unknown codec letter"}
	errTokenWindow      error = &wireError{ErrToken, "window out of range"}
	errTokenID          error = &wireError{ErrToken, "id is not a 64-bit number in base 62"}
)

// AppendPacket appends a whole packet, the header and then the frames, to dst and returns the extended slice. It
// ignores h.Length and writes the length of the packet. It does not check the other fields and the frames, as
// [AppendPacketHeader] and [AppendFrame] do not. No payload may overlap the free capacity of dst. AppendPacket panics
// if the packet is longer than 4,294,967,295 bytes, the largest length the header can hold.
func AppendPacket(dst []byte, h PacketHeader, frames ...Frame) []byte {
	n := uint64(PacketHeaderSize)
	for _, f := range frames {
		n += FrameHeaderSize + uint64(len(f.Payload))
	}
	if n > math.MaxUint32 {
		panic("stream: packet longer than 2^32-1 bytes")
	}
	h.Length = uint32(n)
	dst = AppendPacketHeader(dst, h)
	for _, f := range frames {
		dst = AppendFrame(dst, f)
	}
	return dst
}

// AppendFrame appends f, header and payload, to dst and returns the extended slice. It does not check f: it also
// appends a frame that [ParseFrame] would refuse. f.Payload must not overlap the free capacity of dst. AppendFrame
// panics if the payload is longer than 4,294,967,295 bytes, the largest length the header can hold.
func AppendFrame(dst []byte, f Frame) []byte {
	dst = binary.BigEndian.AppendUint64(dst, frameWord(f.Type, f.Flags, f.Code, frameLen(len(f.Payload))))
	return append(dst, f.Payload...)
}

// frameLen returns the length field for n bytes of payload and panics if they are too many for it.
func frameLen(n int) uint32 {
	if uint64(n) > math.MaxUint32 {
		panic("stream: frame payload longer than 2^32-1 bytes")
	}
	return uint32(n)
}

// ParseFrame takes one frame off the front of b and returns it with the bytes that follow. The payload is a sub-slice
// of b whose capacity ends with it, so that appending to it cannot overwrite the next frame. Frames of unknown
// skippable types are returned as they are, with any flags, code and payload. ParseFrame does not know the packet: use
// [PacketHeader.Allows] to check whether the packet may contain the frame.
//
// The error is [ErrTruncated], [ErrLength], [ErrFrameType], [ErrFlags], [ErrCode] or [ErrPayload], the first in this
// order that applies. With an error, f and rest are zero: a packet cannot be parsed behind a bad frame. ParseFrame
// allocates nothing.
func ParseFrame(b []byte) (f Frame, rest []byte, err error) {
	if len(b) < FrameHeaderSize {
		return Frame{}, nil, ErrTruncated
	}
	h := frameHeader(b)
	b = b[FrameHeaderSize:]
	n := payloadLen(h)
	if n > uint64(len(b)) {
		return Frame{}, nil, errFrameLength
	}
	f.Type, f.Flags, f.Code = splitFrameWord(h)
	f.Payload = b[:n:n]
	if !isPlainData(h) { // nearly every frame is, and a record may hold anything
		if err := checkFrame(f); err != nil {
			return Frame{}, nil, err
		}
	}
	return f, b[n:], nil
}

// packetSeq returns the sequence number in the header of a packet.
func packetSeq(b []byte) uint32 { return binary.BigEndian.Uint32(b[8:]) }

// envelopedHead is the number of bytes that an envelope has in front of each packet: the token of its stream.
const envelopedHead = TokenSize

// putEnvelopeHeader writes the header of an envelope of n bytes, header included, to b[:PacketHeaderSize].
func putEnvelopeHeader(b []byte, n int) { putPacketHeader(b, PacketEnv, 0, 0, n) }

// openEnvelope checks an envelope: its header, and that it consists of whole packets behind tokens. It looks into no
// packet. It returns the part for nextEnveloped, and the number of packets in it, which is at least 1.
func openEnvelope(b []byte) (body []byte, packets int, err error) {
	if len(b) < PacketHeaderSize {
		return nil, 0, ErrTruncated
	}
	v, tail := binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])
	switch {
	case v>>56 != PacketMagic:
		return nil, 0, ErrMagic
	case v>>52&0xf != ProtocolVersion:
		return nil, 0, ErrVersion
	case v>>48&0xf != uint64(PacketEnv):
		return nil, 0, errEnvelopeFlags
	case uint64(uint32(tail)) != uint64(len(b)):
		return nil, 0, errPacketLength
	}
	body = b[PacketHeaderSize:]
	for rest := body; ; {
		if len(rest) < envelopedHead+PacketHeaderSize {
			return nil, 0, ErrTruncated
		}
		if rest = rest[envelopedHead:]; rest[0] != PacketMagic {
			return nil, 0, errEnvelopedMagic
		}
		n := uint64(uint32(binary.BigEndian.Uint64(rest[8:])))
		if n < PacketHeaderSize || n > uint64(len(rest)) {
			return nil, 0, errEnvelopedLength
		}
		packets++
		if rest = rest[n:]; len(rest) == 0 {
			return body, packets, nil
		}
	}
}

// nextEnveloped takes the next packet off the front of a part that openEnvelope returned. The packet has no more
// capacity.
func nextEnveloped(body []byte) (token, packet, rest []byte) {
	packet = body[envelopedHead:]
	n := uint32(binary.BigEndian.Uint64(packet[8:]))
	return body[:envelopedHead], packet[:n:n], packet[n:]
}

// AppendToken appends the [TokenSize] characters of t to dst and returns the extended slice. It writes every codec
// other than JSON as MsgPack, and a window beyond the largest value as that value.
func AppendToken(dst []byte, t Token) []byte {
	dst = AppendOffer(dst, t)
	var id [TokenSize - OfferSize]byte
	for i := len(id) - 1; i >= 0; i-- {
		id[i] = base62Digits[t.ID%62]
		t.ID /= 62
	}
	return append(dst, id[:]...)
}

// AppendOffer appends the first [OfferSize] characters of t, all but its ID, to dst and returns the extended slice. The
// offer also travels in the header Stream-Open, because a NATS server may rewrite a reply subject. See [AppendToken].
func AppendOffer(dst []byte, t Token) []byte {
	codec := byte(tokenMsgPack)
	if t.Codec == JSON {
		codec = tokenJSON
	}
	return append(dst, tokenMark, tokenVersion, codec,
		base62Digits[min(t.LogPackets, maxLogPackets)], base62Digits[min(t.LogBytes, maxLogBytes)])
}

// ParseToken parses a token. [AppendToken] writes the result back to exactly the text that ParseToken accepted. The
// error is [ErrVersion] for a token of another version of the protocol, of any length, and [ErrToken] for any other
// text that is not a token. ParseToken allocates nothing.
func ParseToken(s string) (Token, error) {
	t, err := parseOffer(s, TokenSize)
	if err != nil {
		return Token{}, err
	}
	for i := OfferSize; i < TokenSize; i++ {
		d := base62Value(s[i])
		hi, lo := bits.Mul64(t.ID, 62)
		sum, carry := bits.Add64(lo, d, 0)
		if d >= 62 || hi|carry != 0 {
			return Token{}, errTokenID
		}
		t.ID = sum
	}
	return t, nil
}

// ParseOffer reads an offer: the first [OfferSize] characters of a token and nothing behind them. The ID of the result
// is zero. Errors are those of [ParseToken].
func ParseOffer(s string) (Token, error) { return parseOffer(s, OfferSize) }

// parseOffer reads the offer at the front of s, which must be size characters long.
func parseOffer(s string, size int) (Token, error) {
	// The version is checked first: other versions may have tokens of other lengths.
	if len(s) >= 2 && s[0] == tokenMark && s[1] != tokenVersion && base62Value(s[1]) < 62 {
		return Token{}, ErrVersion
	}
	if len(s) != size {
		return Token{}, errTokenSize
	}
	if s[0] != tokenMark || s[1] != tokenVersion {
		return Token{}, errTokenMark
	}
	var t Token
	switch s[2] {
	case tokenJSON:
		t.Codec = JSON
	case tokenMsgPack:
		t.Codec = MsgPack
	default:
		return Token{}, errTokenCodec
	}
	p, b := base62Value(s[3]), base62Value(s[4])
	if p > maxLogPackets || b > maxLogBytes {
		return Token{}, errTokenWindow
	}
	t.LogPackets, t.LogBytes = uint8(p), uint8(b)
	return t, nil
}

// base62Value returns the value of digit c, or 62 if it is none.
func base62Value(c byte) uint64 { return uint64(base62Values[c]) }

// base62Values is a table, because branches over the random digits of a token are mispredicted.
var base62Values = func() (t [256]uint8) {
	for c := range t {
		t[c] = uint8(strings.IndexByte(base62Digits, byte(c)))
		if t[c] > 62 { // IndexByte returned -1
			t[c] = 62
		}
	}
	return t
}()

// flagNames joins the names of the bits set in v.
func flagNames(v uint8, names *[8]string) string {
	if v == 0 {
		return "0"
	}
	var s []byte
	for i, name := range names {
		bit := uint64(v) & (1 << i)
		if bit == 0 {
			continue
		}
		if len(s) > 0 {
			s = append(s, '|')
		}
		if name == "" {
			s = append(s, "0x"...)
			s = strconv.AppendUint(s, bit, 16)
			continue
		}
		s = append(s, name...)
	}
	return string(s)
}
