package main

// This file is the description: every number of the wire format stands here once. The other files of this package turn
// it into Go code, documentation tables and test vectors.

// field is a run of bits of a fixed-size layout, most significant bit first. Fields stand in wire order without gaps.
type field struct {
	name  string // in tables and vectors
	goVar string // the field of the Go struct, or the Go constant if fixed
	typ   string // Go type; empty for constants
	bits  int
	fixed bool // the value is always constant
	value uint64
	doc   string
}

// masked reports whether the field is narrower than its Go type: bits that do not fit must not spill into its
// neighbour.
func (f field) masked() bool {
	switch f.typ {
	case "uint64":
		return f.bits < 64
	case "uint32":
		return f.bits < 32
	case "uint16":
		return f.bits < 16
	}
	return f.bits < 8
}

// layout is a fixed-size block of fields: 64-bit words.
type layout struct {
	name   string // in error messages of the generator
	goName string
	goSize string // Go constant holding the size in bytes
	doc    string // comment of that constant
	fields []field
}

func (l layout) size() int {
	n := 0
	for _, f := range l.fields {
		n += f.bits
	}
	if n%64 != 0 {
		panic("framegen: " + l.name + " is not a whole number of words")
	}
	return n / 8
}

// bitsOf returns the width of field name.
func (l layout) bitsOf(name string) int {
	for _, f := range l.fields {
		if f.name == name {
			return f.bits
		}
	}
	panic("framegen: no field " + name + " in " + l.name)
}

// shift returns the word that f lies in and how far f is shifted left there.
func (l layout) shift(name string) (word, left int) {
	pos := 0
	for _, f := range l.fields {
		if f.name == name {
			return pos / 64, 64 - pos%64 - f.bits
		}
		pos += f.bits
	}
	panic("framegen: no field " + name + " in " + l.name)
}

var packetHeader = layout{
	name: "packet header", goName: "PacketHeader", goSize: "PacketHeaderSize",
	doc: "bytes in front of the frames of a packet",
	fields: []field{
		{name: "magic", goVar: "PacketMagic", bits: 8, fixed: true, value: 0xF5, doc: "tells a packet from the JSON fallback"},
		{name: "version", goVar: "ProtocolVersion", bits: 4, fixed: true, value: 1, doc: "version of this protocol"},
		{name: "flags", goVar: "Flags", typ: "PacketFlags", bits: 4, doc: "packet flags"},
		{name: "sender", goVar: "Sender", typ: "uint64", bits: 48, doc: "random number of the send half this packet comes from"},
		{name: "seq", goVar: "Seq", typ: "uint32", bits: 32, doc: "with SEQ the number of this packet, without it the number the sender will use next"},
		{name: "length", goVar: "Length", typ: "uint32", bits: 32, doc: "length of the whole packet in bytes, this header included"},
	},
}

var frameHeader = layout{
	name: "frame header", goName: "Frame", goSize: "FrameHeaderSize",
	doc: "bytes in front of the payload of a frame",
	fields: []field{
		{name: "type", goVar: "t", typ: "FrameType", bits: 8, doc: "frame type"},
		{name: "flags", goVar: "fl", typ: "FrameFlags", bits: 8, doc: "frame flags; their meaning depends on the type"},
		{name: "code", goVar: "code", typ: "uint16", bits: 16, doc: "close code; 0 where the type has none"},
		{name: "length", goVar: "n", typ: "uint32", bits: 32, doc: "length of the payload in bytes, without this header"},
	},
}

var credit = layout{
	name: "credit", goName: "Credit", goSize: "creditSize",
	doc: "bytes of the payload of a CREDIT frame",
	fields: []field{
		{name: "ack", goVar: "Ack", typ: "uint32", bits: 32, doc: "number of the next packet the receiver expects; all before it arrived"},
		{name: "packets", goVar: "Packets", typ: "uint32", bits: 32, doc: "packet limit: the first sequence number the sender may not use yet"},
		{name: "bytes", goVar: "Bytes", typ: "uint64", bits: 64, doc: "byte limit: total of sequenced packets' lengths from which on no packet may be opened"},
	},
}

var fragment = layout{
	name: "fragment", goName: "Fragment", goSize: "fragmentSize",
	doc: "bytes in front of those of the packet in a FRAGMENT frame, and of the payload of a PROGRESS frame",
	fields: []field{
		{name: "packet", goVar: "Packet", typ: "uint32", bits: 32, doc: "number of the packet"},
		{name: "offset", goVar: "Offset", typ: "uint32", bits: 32, doc: "FRAGMENT: place of the first byte in the packet; PROGRESS: how many bytes of the packet arrived"},
		{name: "length", goVar: "Length", typ: "uint32", bits: 32, doc: "FRAGMENT: length of the whole packet; PROGRESS: 0"},
		{name: "question", goVar: "Question", typ: "uint32", bits: 32, doc: "number that tells the answer to a question from that to another"},
	},
}

// flagDef is one named value within a byte or nibble of flags.
type flagDef struct {
	name   string
	goName string
	value  uint8
	status string // why a receiver of this version refuses it; empty if it is accepted
	doc    string // table
	goDoc  string // comment in Go code
}

var packetFlags = []flagDef{
	{name: "SEQ", goName: "PacketSeq", value: 1,
		doc:   "the packet is sequenced: it uses up `seq` and is delivered in order",
		goDoc: "sequenced: uses up Seq and is delivered in order; without it the packet carries control frames"},
	{name: "ACK", goName: "PacketAck", value: 2,
		doc:   "the sender asks for a CREDIT at once, because its credit is used up",
		goDoc: "the sender asks for a CREDIT at once, because its credit is used up"},
	{name: "ENV", goName: "PacketEnv", value: 4, status: "an envelope",
		doc:   "the message is an envelope (section 4.3), not a packet",
		goDoc: "the message is an envelope of packets, not a packet: ParsePacketHeader refuses it"},
	{name: "MARK", goName: "PacketMark", value: 8,
		doc:   "the sender asks for a CREDIT at once, to measure how long its packets take",
		goDoc: "the sender asks for a CREDIT at once, to measure how long its packets take"},
}

// Flags of frames, in the order of their declaration in Go. The codec is a field of two bits.
var (
	flagMore      = flagDef{name: "MORE", goName: "FlagMore", value: 0x01, doc: "the record goes on in the next DATA frame", goDoc: "DATA: the record goes on in the next DATA frame"}
	flagRaw       = flagDef{name: "RAW", goName: "FlagRaw", value: 0x00, doc: "codec: the record is the user's bytes", goDoc: "DATA: the record is the user's bytes"}
	flagJSON      = flagDef{name: "JSON", goName: "FlagJSON", value: 0x02, doc: "codec: the record is one JSON text", goDoc: "DATA: the record is one JSON text"}
	flagMsgPack   = flagDef{name: "MSGPACK", goName: "FlagMsgPack", value: 0x04, doc: "codec: the record is one MessagePack object", goDoc: "DATA: the record is one MessagePack object"}
	flagCodecMask = flagDef{name: "codec mask", goName: "FlagCodecMask", value: 0x06, goDoc: "DATA: the bits that name the codec; all of them set is reserved"}
	flagHalf      = flagDef{name: "HALF", goName: "FlagHalf", value: 0x01, doc: "the sender goes on receiving", goDoc: "CLOSE: the sender goes on receiving"}
	flagGap       = flagDef{name: "GAP", goName: "FlagGap", value: 0x01, doc: "packets are missing: retransmit those from `ack` on", goDoc: "CREDIT: packets are missing, retransmit those from Credit.Ack on"}
	flagTrailer   = flagDef{name: "TRAILER", goName: "FlagTrailer", value: 0x01, doc: "the headers are the stream's trailers, not its headers", goDoc: "META: the headers are the stream's trailers, not its headers"}
)

// plainCodecs are the codecs in use, lowest value first.
var plainCodecs = []flagDef{flagRaw, flagJSON, flagMsgPack}

// Rules of a frame type.
type codeRule int

const (
	codeZero codeRule = iota
	codeClose
)

type payloadRule int

const (
	payloadAny    payloadRule = iota
	payloadRecord             // anything, but not empty with MORE
	payloadReason             // UTF-8, at most maxReason bytes
	payloadCredit
	payloadEmpty
	payloadNonce
	payloadToken    // a token, which is looked up and not decoded
	payloadFragment // the layout fragment, and bytes of a packet
	payloadProgress // the layout fragment alone
)

type frameType struct {
	name    string
	goName  string
	value   uint8
	seq     bool // stands in packets with SEQ; otherwise in those without
	flags   []flagDef
	code    codeRule
	payload payloadRule
	doc     string // payload column of the table
	goDoc   string
}

var (
	typeData = frameType{name: "DATA", goName: "FrameData", value: 1, seq: true,
		flags: []flagDef{flagMore, flagRaw, flagJSON, flagMsgPack}, payload: payloadRecord,
		doc: "a record or a piece of one; not empty with MORE", goDoc: "a record, or a piece of one"}
	typeClose = frameType{name: "CLOSE", goName: "FrameClose", value: 2, seq: true,
		flags: []flagDef{flagHalf}, code: codeClose, payload: payloadReason,
		doc: "reason: UTF-8, at most 1024 bytes. Ends this direction, after everything before it", goDoc: "ends this direction, after everything before it; the payload is the reason"}
	typeReset = frameType{name: "RESET", goName: "FrameReset", value: 3,
		code: codeClose, payload: payloadReason,
		doc: "reason: UTF-8, at most 1024 bytes. Ends both directions now", goDoc: "ends both directions now; the payload is the reason"}
	typeCredit = frameType{name: "CREDIT", goName: "FrameCredit", value: 4,
		flags: []flagDef{flagGap}, payload: payloadCredit,
		doc: "exactly 16 bytes: acknowledgement and limits", goDoc: "acknowledges packets and grants more; the payload is a Credit"}
	typePing = frameType{name: "PING", goName: "FramePing", value: 5,
		payload: payloadEmpty,
		doc:     "empty. The answer is a CREDIT", goDoc: "asks for a CREDIT; no payload"}
	typeMeta = frameType{name: "META", goName: "FrameMeta", value: 6, seq: true,
		flags: []flagDef{flagTrailer}, payload: payloadAny,
		doc: "headers in NATS header form, before the first DATA, or with TRAILER immediately before CLOSE", goDoc: "headers, or with FlagTrailer trailers, in NATS header form"}

	typeChallenge = frameType{name: "CHALLENGE", goName: "FrameChallenge", value: 7,
		payload: payloadNonce,
		doc:     "exactly 8 bytes, random. The answer is a RESPONSE", goDoc: "asks whether the peer receives at a subject that it moved to; the payload is a nonce of 8 bytes"}
	typeResponse = frameType{name: "RESPONSE", goName: "FrameResponse", value: 8,
		payload: payloadNonce,
		doc:     "exactly 8 bytes: those of the CHALLENGE", goDoc: "answers a CHALLENGE with its payload"}
	typeResume = frameType{name: "RESUME", goName: "FrameResume", value: 9,
		payload: payloadToken,
		doc:     "exactly 16 bytes: the producer's control token. It names the stream, across accounts", goDoc: "names a stream across accounts, so that its consumer can ask for it again; the payload is the producer's token"}

	typeFragment = frameType{name: "FRAGMENT", goName: "FrameFragment", value: 10,
		payload: payloadFragment,
		doc:     "16 bytes: place in a packet, and the packet's bytes from there. Without any of them it is a question, and the answer a PROGRESS", goDoc: "bytes of a packet that does not pass as a whole; the payload is a Fragment and the bytes, without any it is a question"}
	typeProgress = frameType{name: "PROGRESS", goName: "FrameProgress", value: 11,
		payload: payloadProgress,
		doc:     "exactly 16 bytes: how much arrived in fragments", goDoc: "answers a FRAGMENT without bytes; the payload is a Fragment that says how much arrived"}

	frameTypes = []frameType{typeData, typeClose, typeReset, typeCredit, typePing, typeMeta, typeChallenge, typeResponse, typeResume, typeFragment, typeProgress}
)

// skippable is the bit of a frame type that lets a receiver skip frames it does not know.
const skippable = 0x80

// typeEnvelopes is a type that receivers without envelopes skip. So no receiver checks more of it than of an unknown
// type.
var typeEnvelopes = frameType{name: "ENVELOPES", goName: "frameEnvelopes", value: skippable,
	doc: "empty. The sender receives envelopes", goDoc: "its sender receives envelopes; no payload"}

// typePadding is a type that all receivers skip.
var typePadding = frameType{name: "PADDING", goName: "framePadding", value: skippable + 1,
	doc: "zero bytes. They make the packet longer", goDoc: "makes its packet longer; the payload is zero bytes"}

// Limits.
const (
	minCloseCode = 1000
	maxCloseCode = 5999
	maxReason    = 1024
	nonceSize    = 8
)

// closeCode is a close code with a meaning. Codes of RFC 6455 section 7.4 keep their meaning.
type closeCode struct {
	value  uint16
	goName string
	name   string // in the text of errors and in the table
	doc    string
	goDoc  string // text that the Go constant adds to doc
}

var closeCodes = []closeCode{
	{1000, "CloseNormalClosure", "normal", "everything was sent", "; the reader sees io.EOF"},
	{1001, "CloseGoingAway", "going away", "the peer is shutting down", ", or this client is"},
	{1002, "CloseProtocolError", "protocol error", "the peer broke a rule of the protocol", ""},
	{1003, "CloseUnsupportedData", "unsupported data", "bytes that are no packet, frame or message of the protocol", ""},
	{1006, "CloseAbnormalClosure", "abnormal closure", "the connection or the peer was lost before the stream ended", ""},
	{1009, "CloseMessageTooBig", "message too big", "a record larger than the receiver takes", ": see MaxRecordSize"},
	{1013, "CloseTryAgainLater", "try again later", "the peer has no room for another stream, or for a record in pieces", ""},
	{4000, "CloseBadRequest", "bad request", "the producer does not understand the request", ""},
	{4001, "CloseCanceled", "canceled", "the consumer stopped before the end", ""},
	{4008, "CloseDeadlineExceeded", "deadline exceeded", "the consumer's deadline passed", ""},
	{4029, "CloseTooSlow", "too slow", "a reader fell behind a producer that cannot be told to wait", ""},
	{5000, "CloseInternalServerErr", "internal server error", "the producer failed", ""},
}

// tokenPart is a run of characters of a reply token.
type tokenPart struct {
	name  string
	chars int
	fixed string // the only text allowed, or empty
	max   uint64 // largest value of a base-62 number
	offer bool   // belongs to the offer, the part that also travels alone
	doc   string
}

const base62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

var (
	partMark       = tokenPart{name: "mark", chars: 1, fixed: "~", offer: true, doc: "`~`: tells the token from that of a fallback peer"}
	partVersion    = tokenPart{name: "version", chars: 1, fixed: "1", offer: true, doc: "`1`: protocol version, base 62"}
	partCodec      = tokenPart{name: "codec", chars: 1, offer: true, doc: "how the consumer wants objects: `j` JSON, `m` MessagePack"}
	partLogPackets = tokenPart{name: "log2 packets", chars: 1, max: 31, offer: true, doc: "base 62, 0–31: the initial window is 2 to this power packets"}
	partLogBytes   = tokenPart{name: "log2 bytes", chars: 1, max: 61, offer: true, doc: "base 62, 0–61: the initial window is 2 to this power bytes"}
	partID         = tokenPart{name: "id", chars: 11, max: 1<<64 - 1, doc: "a random 64-bit number, eleven base-62 digits, most significant first"}

	token = []tokenPart{partMark, partVersion, partCodec, partLogPackets, partLogBytes, partID}
)

// tokenCodecs are the codec letters, with the names used in vectors.
var tokenCodecs = []struct {
	letter byte
	name   string
	goName string
}{
	{'j', "json", "JSON"},
	{'m', "msgpack", "MsgPack"},
}

func tokenSize(offerOnly bool) int {
	n := 0
	for _, p := range token {
		if p.offer || !offerOnly {
			n += p.chars
		}
	}
	return n
}

// errorKind is a way in which input can be wrong. The identifiers name them in vectors.json.
type errorKind struct {
	id, goName, doc string
}

var errorKinds = []errorKind{
	{"truncated", "ErrTruncated", "fewer bytes than a header has"},
	{"magic", "ErrMagic", "the first byte is not the magic of a packet"},
	{"version", "ErrVersion", "a packet or token of another protocol version"},
	{"flags", "ErrFlags", "a reserved flag is set"},
	{"type", "ErrFrameType", "a frame of unknown type that may not be skipped"},
	{"length", "ErrLength", "a packet that is not as long as its header says, or a frame longer than the bytes left in its packet"},
	{"code", "ErrCode", "a close code out of range, or a code where none belongs"},
	{"payload", "ErrPayload", "a payload its frame type does not allow"},
	{"misplaced", "ErrMisplaced", "a frame in the wrong kind of packet"},
	{"token", "ErrToken", "not a token or offer"},
}
