package main

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/big"
	"slices"
	"strings"
)

// Vectors are language-neutral: bytes are lower-case hexadecimal and 64-bit numbers are decimal strings, because many
// JSON readers cannot hold them. An invalid vector breaks one rule only, so that the order in which an implementation
// looks for errors does not matter.

type vectorFile struct {
	Version uint64            `json:"version"`
	About   string            `json:"about"`
	Errors  map[string]string `json:"errors"`
	Vectors []vector          `json:"vectors"`
}

type vector struct {
	Name     string          `json:"name"`
	Kind     string          `json:"kind"`
	Hex      *string         `json:"hex,omitempty"`  // packet, packet_header, frame, credit, fragment, envelope
	Text     *string         `json:"text,omitempty"` // token, offer
	Header   *headerJSON     `json:"header,omitempty"`
	Frames   []frameJSON     `json:"frames,omitempty"` // packet
	Frame    *frameJSON      `json:"frame,omitempty"`
	Rest     string          `json:"rest,omitempty"` // packet_header, frame: the bytes that follow
	Credit   *creditJSON     `json:"credit,omitempty"`
	Fragment *fragmentJSON   `json:"fragment,omitempty"`
	Token    *tokenJSON      `json:"token,omitempty"`   // token, offer
	Packets  []envelopedJSON `json:"packets,omitempty"` // envelope
	Error    string          `json:"error,omitempty"`
}

type headerJSON struct {
	Flags  uint64 `json:"flags"`
	Sender uint64 `json:"sender"`
	Seq    uint64 `json:"seq"`
	Length uint64 `json:"length"`
}

type frameJSON struct {
	Type    uint64 `json:"type"`
	Flags   uint64 `json:"flags"`
	Code    uint64 `json:"code"`
	Payload string `json:"payload"`
}

type creditJSON struct {
	Ack     uint64 `json:"ack"`
	Packets uint64 `json:"packets"`
	Bytes   string `json:"bytes"`
}

type fragmentJSON struct {
	Packet   uint64 `json:"packet"`
	Offset   uint64 `json:"offset"`
	Length   uint64 `json:"length"`
	Question uint64 `json:"question"`
}

type envelopedJSON struct {
	Token string `json:"token"`
	Hex   string `json:"hex"` // of the packet
}

type tokenJSON struct {
	Codec      string `json:"codec"`
	LogPackets uint64 `json:"log_packets"`
	LogBytes   uint64 `json:"log_bytes"`
	ID         string `json:"id,omitempty"` // tokens only
}

// values are the fields of a layout by name. Constants may be given to get them wrong.
type values map[string]uint64

// encode lays v out bit by bit, as the description says. It is slow and simple on purpose.
func encode(l layout, v values) []byte {
	out := make([]byte, l.size())
	pos := 0
	for _, f := range l.fields {
		x, given := v[f.name]
		if f.fixed && !given {
			x = f.value
		}
		if f.bits < 64 && x>>f.bits != 0 {
			panic(fmt.Sprintf("framegen: %s.%s: %#x does not fit", l.name, f.name, x))
		}
		for i := range f.bits {
			if x>>(f.bits-1-i)&1 != 0 {
				out[pos/8] |= 0x80 >> (pos % 8)
			}
			pos++
		}
	}
	for name := range v {
		l.shift(name) // panics if there is no such field
	}
	return out
}

// number62 writes x as so many base-62 digits.
func number62(x *big.Int, digits int) string {
	out := make([]byte, digits)
	q, r := new(big.Int).Set(x), new(big.Int)
	for i := range out {
		q.QuoRem(q, big.NewInt(62), r)
		out[digits-1-i] = base62[r.Int64()]
	}
	if q.Sign() != 0 {
		panic("framegen: " + x.String() + " does not fit")
	}
	return string(out)
}

type vectors struct{ list []vector }

func (vs *vectors) add(v vector) { vs.list = append(vs.list, v) }

func hexOf(b []byte) *string {
	s := hex.EncodeToString(b)
	return &s
}

// packet returns the bytes of a packet with header v and the frames in body. If v has no length, it writes the true
// one.
func packet(v values, body []byte) []byte {
	if _, given := v["length"]; !given {
		v["length"] = uint64(packetHeader.size() + len(body))
	}
	return append(encode(packetHeader, v), body...)
}

func (vs *vectors) header(name string, flags, sender, seq uint64, rest string) {
	b := packet(values{"flags": flags, "sender": sender, "seq": seq}, []byte(rest))
	vs.add(vector{Name: "packet_header/" + name, Kind: "packet_header", Hex: hexOf(b),
		Header: &headerJSON{flags, sender, seq, uint64(len(b))}, Rest: hex.EncodeToString([]byte(rest))})
}

func (vs *vectors) badHeader(name, err string, b []byte) {
	vs.add(vector{Name: "packet_header/" + name, Kind: "packet_header", Hex: hexOf(b), Error: err})
}

// frame returns the bytes and the JSON form of a frame, which may break any rule.
func frame(t, flags, code uint64, payload string) ([]byte, frameJSON) {
	b := encode(frameHeader, values{"type": t, "flags": flags, "code": code, "length": uint64(len(payload))})
	return append(b, payload...), frameJSON{t, flags, code, hex.EncodeToString([]byte(payload))}
}

func (vs *vectors) frame(name string, t, flags, code uint64, payload, rest string) {
	b, f := frame(t, flags, code, payload)
	vs.add(vector{Name: "frame/" + name, Kind: "frame", Hex: hexOf(append(b, rest...)), Frame: &f, Rest: hex.EncodeToString([]byte(rest))})
}

func (vs *vectors) badFrame(name, err string, t, flags, code uint64, payload string) {
	b, _ := frame(t, flags, code, payload)
	vs.rawFrame(name, err, b)
}

func (vs *vectors) rawFrame(name, err string, b []byte) {
	vs.add(vector{Name: "frame/" + name, Kind: "frame", Hex: hexOf(b), Error: err})
}

type frameArgs struct {
	t, flags, code uint64
	payload        string
}

func (vs *vectors) packet(name, err string, flags, sender, seq uint64, frames ...frameArgs) {
	v := vector{Name: "packet/" + name, Kind: "packet", Error: err}
	var body []byte
	for _, a := range frames {
		fb, f := frame(a.t, a.flags, a.code, a.payload)
		body = append(body, fb...)
		v.Frames = append(v.Frames, f)
	}
	b := packet(values{"flags": flags, "sender": sender, "seq": seq}, body)
	v.Hex = hexOf(b)
	if err != "" {
		v.Frames = nil
	} else {
		v.Header = &headerJSON{flags, sender, seq, uint64(len(b))}
	}
	vs.add(v)
}

func (vs *vectors) credit(name string, ack, packets, byteLimit uint64) {
	b := encode(credit, values{"ack": ack, "packets": packets, "bytes": byteLimit})
	vs.add(vector{Name: "credit/" + name, Kind: "credit", Hex: hexOf(b), Credit: &creditJSON{ack, packets, fmt.Sprint(byteLimit)}})
}

func (vs *vectors) fragment(name string, packet, offset, length, question uint64) {
	b := encode(fragment, values{"packet": packet, "offset": offset, "length": length, "question": question})
	vs.add(vector{Name: "fragment/" + name, Kind: "fragment", Hex: hexOf(b), Fragment: &fragmentJSON{packet, offset, length, question}})
}

// enveloped is a packet and the token of its stream.
type enveloped struct {
	token  string
	packet []byte
}

// envelope returns the bytes of an envelope with header v and the packets. If v has no length, it writes the true one.
func envelope(v values, packets ...enveloped) []byte {
	var body []byte
	for _, p := range packets {
		body = append(append(body, p.token...), p.packet...)
	}
	if _, given := v["flags"]; !given {
		v["flags"] = pEnv
	}
	return packet(v, body)
}

func (vs *vectors) envelope(name string, packets ...enveloped) {
	v := vector{Name: "envelope/" + name, Kind: "envelope", Hex: hexOf(envelope(values{}, packets...))}
	for _, p := range packets {
		v.Packets = append(v.Packets, envelopedJSON{p.token, hex.EncodeToString(p.packet)})
	}
	vs.add(v)
}

func (vs *vectors) badEnvelope(name, err string, b []byte) {
	vs.add(vector{Name: "envelope/" + name, Kind: "envelope", Hex: hexOf(b), Error: err})
}

// offerText writes the offer, whatever its parts are worth.
func offerText(codec byte, logPackets, logBytes uint64) string {
	return partMark.fixed + partVersion.fixed + string(codec) + base62[logPackets:logPackets+1] + base62[logBytes:logBytes+1]
}

func (vs *vectors) token(name string, codec int, logPackets, logBytes, id uint64) {
	c := tokenCodecs[codec]
	s := offerText(c.letter, logPackets, logBytes) + number62(new(big.Int).SetUint64(id), partID.chars)
	vs.add(vector{Name: "token/" + name, Kind: "token", Text: &s,
		Token: &tokenJSON{c.name, logPackets, logBytes, fmt.Sprint(id)}})
}

func (vs *vectors) offer(name string, codec int, logPackets, logBytes uint64) {
	c := tokenCodecs[codec]
	s := offerText(c.letter, logPackets, logBytes)
	vs.add(vector{Name: "offer/" + name, Kind: "offer", Text: &s, Token: &tokenJSON{Codec: c.name, LogPackets: logPackets, LogBytes: logBytes}})
}

func (vs *vectors) badText(kind, name, err, text string) {
	vs.add(vector{Name: kind + "/" + name, Kind: kind, Text: &text, Error: err})
}

// Short names for the tables below.
var (
	tData, tClose, tReset   = uint64(typeData.value), uint64(typeClose.value), uint64(typeReset.value)
	tCredit, tPing, tMeta   = uint64(typeCredit.value), uint64(typePing.value), uint64(typeMeta.value)
	fMore, fJSON, fMsgPack  = uint64(flagMore.value), uint64(flagJSON.value), uint64(flagMsgPack.value)
	fCodecMask, fGap        = uint64(flagCodecMask.value), uint64(flagGap.value)
	fTrailer                = uint64(flagTrailer.value)
	tChallenge, tResponse   = uint64(typeChallenge.value), uint64(typeResponse.value)
	tResume                 = uint64(typeResume.value)
	tFragment, tProgress    = uint64(typeFragment.value), uint64(typeProgress.value)
	pSeq, pAck, pEnv, pMark = uint64(packetFlags[0].value), uint64(packetFlags[1].value), uint64(packetFlags[2].value), uint64(packetFlags[3].value)
)

func headerVectors(vs *vectors) {
	vs.header("zero", 0, 0, 0, "")
	vs.header("seq", pSeq, 0x123456789ABC, 0x89ABCDEF, "")
	vs.header("ack", pAck, 1, 2, "")
	vs.header("seq_ack", pSeq|pAck, 0xFFFFFFFFFFFF, 0xFFFFFFFF, "")
	vs.header("mark", pMark, 1, 2, "")
	vs.header("seq_ack_mark", pSeq|pAck|pMark, 1, 2, "")
	vs.header("with_rest", pSeq, 0xF5F5F5F5F5F5, 0xF5F5F5F5, "rest")

	whole := packet(values{"flags": pSeq, "sender": 0x1234, "seq": 7}, nil)
	for n := range whole {
		vs.badHeader(fmt.Sprintf("truncated_%d", n), "truncated", whole[:n])
	}
	for _, m := range []uint64{0x00, 0xF4, 0xFF} {
		vs.badHeader(fmt.Sprintf("magic_%02x", m), "magic", packet(values{"magic": m, "flags": pSeq}, nil))
	}
	vs.badHeader("json_fallback", "magic", []byte(`{"type":1,"data":"aGk="}`))
	for _, v := range []uint64{0, 2, 15} {
		vs.badHeader(fmt.Sprintf("version_%d", v), "version", packet(values{"version": v, "flags": pSeq}, nil))
	}
	vs.badHeader("envelope", "flags", packet(values{"flags": pEnv}, nil))
	vs.badHeader("envelope_seq", "flags", packet(values{"flags": pEnv | pSeq}, nil))
	vs.badHeader("envelope_mark", "flags", packet(values{"flags": pEnv | pMark}, nil))
	vs.badHeader("all_flags", "flags", packet(values{"flags": 15}, nil))

	size := uint64(packetHeader.size())
	for _, n := range []uint64{0, size - 1, size + 1, size << 8, 1<<31 | size, 1<<32 - 1} {
		vs.badHeader(fmt.Sprintf("length_%d", n), "length", packet(values{"flags": pSeq, "length": n}, nil))
	}
	vs.badHeader("length_without_header", "length", packet(values{"flags": pSeq, "length": 4}, []byte("rest")))
}

func frameVectors(vs *vectors) {
	credit16 := string(encode(credit, values{"ack": 1, "packets": 33, "bytes": 262144}))

	vs.frame("data", tData, 0, 0, "hello", "")
	vs.frame("data_empty", tData, 0, 0, "", "")
	vs.frame("data_json", tData, fJSON, 0, `{"n":1}`, "")
	vs.frame("data_msgpack", tData, fMsgPack, 0, "\x81\xa1n\x01", "")
	vs.frame("data_more", tData, fMore, 0, "a", "")
	vs.frame("data_more_msgpack", tData, fMore|fMsgPack, 0, "\x81", "")
	vs.frame("data_binary", tData, 0, 0, "\x00\xff\xf5\x80", "")
	vs.frame("data_300", tData, 0, 0, strings.Repeat("x", 300), "")
	vs.frame("data_with_rest", tData, 0, 0, "a", "\x01\x00")
	vs.frame("close", tClose, 0, 1000, "", "")
	vs.frame("close_half", tClose, 1, 1000, "", "")
	vs.frame("close_reason", tClose, 0, 4000, "größer als null", "")
	vs.frame("close_largest_code", tClose, 0, maxCloseCode, "", "")
	vs.frame("close_longest_reason", tClose, 0, 5000, strings.Repeat("r", maxReason), "")
	vs.frame("reset", tReset, 0, 4001, "left", "")
	vs.frame("reset_smallest_code", tReset, 0, minCloseCode, "", "")
	vs.frame("credit", tCredit, 0, 0, credit16, "")
	vs.frame("credit_gap", tCredit, fGap, 0, credit16, "")
	vs.frame("ping", tPing, 0, 0, "", "")
	vs.frame("meta", tMeta, 0, 0, "NATS/1.0\r\nA: b\r\n\r\n", "")
	vs.frame("meta_empty", tMeta, 0, 0, "", "")
	vs.frame("meta_trailer", tMeta, fTrailer, 0, "NATS/1.0\r\nA: b\r\n\r\n", "")
	vs.frame("meta_trailer_empty", tMeta, fTrailer, 0, "", "")
	vs.frame("challenge", tChallenge, 0, 0, "\x00\x01\x02\x03\xfc\xfd\xfe\xff", "")
	vs.frame("response", tResponse, 0, 0, "\x00\x01\x02\x03\xfc\xfd\xfe\xff", "")
	vs.frame("resume", tResume, 0, 0, "~1m5G0123456789A", "")
	vs.frame("resume_any_text", tResume, 0, 0, "\x00no token\xff------", "")
	place16 := string(encode(fragment, values{"packet": 3, "offset": 4056, "length": 16408, "question": 9}))
	vs.frame("fragment", tFragment, 0, 0, place16+"bytes", "")
	vs.frame("fragment_question", tFragment, 0, 0, place16, "")
	vs.frame("progress", tProgress, 0, 0, place16, "")
	vs.frame("skippable_first", skippable, 0, 0, "", "")
	vs.frame("skippable_anything", 0xFF, 0xFF, 0xFFFF, "??", "next")

	whole, _ := frame(tData, fJSON, 0, "12")
	for n := range frameHeader.size() {
		vs.rawFrame(fmt.Sprintf("truncated_%d", n), "truncated", whole[:n])
	}
	vs.rawFrame("length_one_short", "length", whole[:len(whole)-1])
	vs.rawFrame("length_no_payload", "length", whole[:frameHeader.size()])
	for _, n := range []uint64{1 << 31, 1<<32 - 1} {
		for _, t := range []uint64{tData, 0xFF} {
			b := encode(frameHeader, values{"type": t, "length": n})
			vs.rawFrame(fmt.Sprintf("length_%d_type_%d", n, t), "length", append(b, "abc"...))
		}
	}
	for _, t := range []uint64{0, uint64(len(frameTypes)) + 1, 0x7F} {
		vs.badFrame(fmt.Sprintf("type_%d", t), "type", t, 0, 0, "")
	}
	vs.badFrame("data_codec_reserved", "flags", tData, fCodecMask, 0, "a")
	vs.badFrame("data_more_codec_reserved", "flags", tData, fCodecMask|fMore, 0, "a")
	vs.badFrame("data_flag_08", "flags", tData, 0x08, 0, "a")
	vs.badFrame("data_flag_80", "flags", tData, 0x80, 0, "a")
	vs.badFrame("data_code", "code", tData, 0, 1000, "a")
	vs.badFrame("data_more_empty", "payload", tData, fMore, 0, "")
	vs.badFrame("close_flag", "flags", tClose, 2, 1000, "")
	vs.badFrame("reset_flag", "flags", tReset, 0x10, 1000, "")
	for _, c := range []uint64{0, 1, minCloseCode - 1, maxCloseCode + 1, 0xFFFF} {
		vs.badFrame(fmt.Sprintf("close_code_%d", c), "code", tClose, 0, c, "")
	}
	vs.badFrame("reset_code_0", "code", tReset, 0, 0, "")
	vs.badFrame("reset_code_6000", "code", tReset, 0, maxCloseCode+1, "")
	vs.badFrame("close_reason_not_utf8", "payload", tClose, 0, 1000, "\xff")
	vs.badFrame("close_reason_surrogate", "payload", tClose, 0, 1000, "\xed\xa0\x80")
	vs.badFrame("close_reason_too_long", "payload", tClose, 0, 1000, strings.Repeat("r", maxReason+1))
	vs.badFrame("reset_reason_cut_rune", "payload", tReset, 0, 1000, "ok\xc3")
	vs.badFrame("credit_empty", "payload", tCredit, 0, 0, "")
	vs.badFrame("credit_15", "payload", tCredit, 0, 0, credit16[:15])
	vs.badFrame("credit_17", "payload", tCredit, 0, 0, credit16+"\x00")
	vs.badFrame("credit_flag_02", "flags", tCredit, 2, 0, credit16)
	vs.badFrame("credit_code", "code", tCredit, 0, 1000, credit16)
	vs.badFrame("ping_payload", "payload", tPing, 0, 0, "?")
	vs.badFrame("ping_flag", "flags", tPing, 1, 0, "")
	vs.badFrame("ping_code", "code", tPing, 0, 1, "")
	for _, t := range []frameType{typeChallenge, typeResponse} {
		name, v := strings.ToLower(t.name), uint64(t.value)
		vs.badFrame(name+"_empty", "payload", v, 0, 0, "")
		vs.badFrame(name+"_7", "payload", v, 0, 0, "1234567")
		vs.badFrame(name+"_9", "payload", v, 0, 0, "123456789")
		vs.badFrame(name+"_flag", "flags", v, 1, 0, "12345678")
		vs.badFrame(name+"_code", "code", v, 0, 1000, "12345678")
	}
	vs.badFrame("resume_empty", "payload", tResume, 0, 0, "")
	vs.badFrame("resume_15", "payload", tResume, 0, 0, "~1m5G0123456789")
	vs.badFrame("resume_17", "payload", tResume, 0, 0, "~1m5G0123456789AB")
	vs.badFrame("resume_flag", "flags", tResume, 1, 0, "~1m5G0123456789A")
	vs.badFrame("resume_code", "code", tResume, 0, 1000, "~1m5G0123456789A")
	vs.badFrame("fragment_empty", "payload", tFragment, 0, 0, "")
	vs.badFrame("fragment_15", "payload", tFragment, 0, 0, place16[:15])
	vs.badFrame("fragment_flag", "flags", tFragment, 1, 0, place16)
	vs.badFrame("fragment_code", "code", tFragment, 0, 1000, place16)
	vs.badFrame("progress_empty", "payload", tProgress, 0, 0, "")
	vs.badFrame("progress_15", "payload", tProgress, 0, 0, place16[:15])
	vs.badFrame("progress_17", "payload", tProgress, 0, 0, place16+"\x00")
	vs.badFrame("progress_flag", "flags", tProgress, 1, 0, place16)
	vs.badFrame("progress_code", "code", tProgress, 0, 1000, place16)
	vs.badFrame("meta_flag_02", "flags", tMeta, 2, 0, "")
	vs.badFrame("meta_trailer_flag_80", "flags", tMeta, fTrailer|0x80, 0, "")
	vs.badFrame("meta_code", "code", tMeta, 0, 1000, "")
}

func creditVectors(vs *vectors) {
	vs.credit("zero", 0, 0, 0)
	vs.credit("initial", 0, 32, 262144)
	vs.credit("wrapped", 0xFFFFFFF0, 0x10, 1<<40)
	vs.credit("largest", 0xFFFFFFFF, 0xFFFFFFFF, 1<<64-1)
	vs.credit("byte_order", 0x01020304, 0x05060708, 0x090A0B0C0D0E0F10)
	for _, n := range []int{0, 1, 8, 15, 17, 32} {
		vs.add(vector{Name: fmt.Sprintf("credit/size_%d", n), Kind: "credit", Hex: hexOf(make([]byte, n)), Error: "payload"})
	}
}

func fragmentVectors(vs *vectors) {
	vs.fragment("first", 0, 0, 16408, 0)
	vs.fragment("question", 7, 16408, 16408, 1)
	vs.fragment("largest", 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
	vs.fragment("byte_order", 0x01020304, 0x05060708, 0x090A0B0C, 0x0D0E0F10)
	for _, n := range []int{0, 1, 8, 15, 17} {
		vs.add(vector{Name: fmt.Sprintf("fragment/size_%d", n), Kind: "fragment", Hex: hexOf(make([]byte, n)), Error: "payload"})
	}
}

func packetVectors(vs *vectors) {
	credit16 := string(encode(credit, values{"ack": 4, "packets": 36, "bytes": 300000}))
	data := frameArgs{tData, 0, 0, "one"}
	end := frameArgs{tClose, 0, 1000, ""}
	reset := frameArgs{tReset, 0, 4001, ""}
	grant := frameArgs{tCredit, 0, 0, credit16}
	ping := frameArgs{tPing, 0, 0, ""}
	meta := frameArgs{tMeta, 0, 0, "NATS/1.0\r\n\r\n"}
	trailer := frameArgs{tMeta, fTrailer, 0, "NATS/1.0\r\n\r\n"}
	skip := frameArgs{0xC0, 0, 0, "skip"}

	vs.packet("one_record", "", pSeq, 0xBEEF, 0, data)
	vs.packet("records_and_close", "", pSeq|pAck, 0xBEEF, 1, data, frameArgs{tData, fJSON, 0, `"two"`}, frameArgs{tData, 0, 0, ""}, end)
	vs.packet("pieces", "", pSeq, 1, 5, frameArgs{tData, fMore, 0, "a"}, frameArgs{tData, 0, 0, "b"})
	vs.packet("headers_data_trailers_close", "", pSeq, 1, 0, meta, data, trailer, end)
	vs.packet("headers_close", "", pSeq, 1, 0, meta, end)
	vs.packet("trailers_close", "", pSeq, 1, 0, trailer, end)
	vs.packet("control", "", 0, 7, 9, grant, ping)
	vs.packet("reset", "", 0, 7, 9, reset)
	vs.packet("challenge", "", 0, 7, 9, frameArgs{tChallenge, 0, 0, "12345678"})
	vs.packet("response", "", 0, 7, 9, frameArgs{tResponse, 0, 0, "12345678"})
	vs.packet("ping_resume", "", 0, 7, 9, ping, frameArgs{tResume, 0, 0, "~1m5G0123456789A"})
	vs.packet("fragment", "", 0, 7, 9, frameArgs{tFragment, 0, 0, "0123456789abcdef bytes"})
	vs.packet("progress", "", 0, 7, 9, grant, frameArgs{tProgress, 0, 0, "0123456789abcdef"})
	vs.packet("ping_ack", "", pAck, 7, 0, ping)
	vs.packet("skippable_in_sequenced", "", pSeq, 7, 1, skip, data)
	vs.packet("skippable_in_control", "", 0, 7, 1, skip, ping)
	vs.packet("padding", "", pSeq, 7, 1, data, frameArgs{uint64(typePadding.value), 0, 0, "\x00\x00\x00\x00\x00"})
	vs.packet("credit_envelopes", "", 0, 7, 1, grant, frameArgs{uint64(typeEnvelopes.value), 0, 0, ""})

	vs.packet("data_without_seq", "misplaced", 0, 7, 1, data)
	vs.packet("close_without_seq", "misplaced", pAck, 7, 1, end)
	vs.packet("meta_without_seq", "misplaced", 0, 7, 1, meta)
	vs.packet("reset_with_seq", "misplaced", pSeq, 7, 1, reset)
	vs.packet("credit_with_seq", "misplaced", pSeq, 7, 1, grant)
	vs.packet("ping_with_seq", "misplaced", pSeq, 7, 1, data, ping)
	vs.packet("challenge_with_seq", "misplaced", pSeq, 7, 1, data, frameArgs{tChallenge, 0, 0, "12345678"})
	vs.packet("response_with_seq", "misplaced", pSeq, 7, 1, data, frameArgs{tResponse, 0, 0, "12345678"})
	vs.packet("resume_with_seq", "misplaced", pSeq, 7, 1, data, frameArgs{tResume, 0, 0, "~1m5G0123456789A"})
	vs.packet("fragment_with_seq", "misplaced", pSeq, 7, 1, data, frameArgs{tFragment, 0, 0, "0123456789abcdef"})
	vs.packet("progress_with_seq", "misplaced", pSeq, 7, 1, data, frameArgs{tProgress, 0, 0, "0123456789abcdef"})
	vs.packet("unknown_type_second", "type", pSeq, 7, 1, data, frameArgs{0x40, 0, 0, ""})

	// A good frame, then one with a length past the end of the packet, and then one with a cut header.
	b, _ := frame(tData, 0, 0, "one")
	bad := func(name, err string, v values, body ...[]byte) {
		vs.add(vector{Name: "packet/" + name, Kind: "packet", Hex: hexOf(packet(v, slices.Concat(body...))), Error: err})
	}
	whole := func() values { return values{"flags": pSeq, "sender": 7, "seq": 1} }
	bad("second_frame_cut", "length", whole(), b, b[:len(b)-1])
	bad("second_header_cut", "truncated", whole(), b, b[:3])
	bad("envelope", "flags", values{"flags": pEnv}, b)

	// Packets that do not have the length they began with. Of the first only the length tells.
	two := whole()
	two["length"] = uint64(packetHeader.size() + 2*len(b))
	bad("cut_between_frames", "length", two, b)
	bad("cut_in_frame", "length", two, b, b[:len(b)-1])
	bad("cut_to_header", "length", two)
	bad("a_frame_too_many", "length", two, b, b, b)
	bad("a_byte_too_many", "length", two, b, b, []byte{0})
	bad("wrong_length", "length", values{"flags": pSeq, "sender": 7, "seq": 1, "length": uint64(len(b))}, b) // of the frames alone
}

func envelopeVectors(vs *vectors) {
	record, _ := frame(tData, 0, 0, "one")
	grant, _ := frame(tCredit, 0, 0, string(encode(credit, values{"ack": 4, "packets": 36, "bytes": 300000})))
	trial, _ := frame(tChallenge, 0, 0, "12345678")
	says, _ := frame(uint64(typeEnvelopes.value), 0, 0, "")
	first := enveloped{"~1m5I0123456789A", packet(values{"flags": pSeq, "sender": 7, "seq": 1}, record)}
	second := enveloped{"~1j5I0123456789B", packet(values{"flags": pSeq | pAck, "sender": 9, "seq": 3}, record)}
	control := enveloped{"~1m5G0123456789C", packet(values{"sender": 11, "seq": 2}, grant)}

	vs.envelope("one_packet", first)
	vs.envelope("several_packets", first, second, control)
	vs.envelope("twice_the_same_stream", first, first)
	vs.envelope("trial", enveloped{first.token, packet(values{"sender": 7, "seq": 1}, slices.Concat(trial, says))})
	vs.envelope("any_token", enveloped{"\x00no token-------", first.packet})
	vs.envelope("packet_without_frames", enveloped{first.token, packet(values{"flags": pSeq}, nil)})
	vs.envelope("packet_with_wrong_flags", enveloped{first.token, packet(values{"flags": 15}, record)})

	whole := envelope(values{}, first, second)
	head := packetHeader.size()
	for _, n := range []int{0, 1, head - 1} {
		vs.badEnvelope(fmt.Sprintf("truncated_%d", n), "truncated", whole[:n])
	}
	vs.badEnvelope("magic", "magic", envelope(values{"magic": 0xF4}, first))
	vs.badEnvelope("version", "version", envelope(values{"version": 2}, first))
	for _, flags := range []uint64{0, pSeq, pEnv | pSeq, pEnv | pAck, pEnv | pMark, 15} {
		vs.badEnvelope(fmt.Sprintf("flags_%d", flags), "flags", envelope(values{"flags": flags}, first))
	}
	vs.badEnvelope("cut_between_packets", "length", whole[:head+len(first.token)+len(first.packet)])
	vs.badEnvelope("a_byte_too_many", "length", append(slices.Clone(whole), 0))
	vs.badEnvelope("empty", "truncated", envelope(values{}))
	vs.badEnvelope("token_cut", "truncated", envelope(values{}, first, enveloped{second.token[:5], nil}))
	vs.badEnvelope("packet_header_cut", "truncated", envelope(values{}, first, enveloped{second.token, second.packet[:head-1]}))
	vs.badEnvelope("packet_cut", "length", envelope(values{}, first, enveloped{second.token, second.packet[:len(second.packet)-1]}))
	vs.badEnvelope("packet_magic", "magic", envelope(values{}, enveloped{first.token, packet(values{"magic": 0x7B, "flags": pSeq}, record)}))
	for _, n := range []uint64{0, uint64(head) - 1, 1<<31 | uint64(head), 1<<32 - 1} {
		vs.badEnvelope(fmt.Sprintf("packet_length_%d", n), "length", envelope(values{}, enveloped{first.token, packet(values{"flags": pSeq, "length": n}, record)}))
	}
}

func tokenVectors(vs *vectors) {
	vs.token("default", 1, 5, 18, 0x0123456789ABCDEF)
	vs.token("json", 0, 5, 18, 1)
	vs.token("zero", 0, 0, 0, 0)
	vs.token("largest", 1, partLogPackets.max, partLogBytes.max, 1<<64-1)
	vs.token("alphabet", 1, 10, 36, 61)
	vs.token("carry", 0, 8, 22, 62)
	vs.offer("default", 1, 5, 18)
	vs.offer("largest", 0, partLogPackets.max, partLogBytes.max)

	good := offerText('m', 5, 18) + number62(big.NewInt(12345), partID.chars)
	overflow := new(big.Int).Lsh(big.NewInt(1), 64)
	vs.badText("token", "empty", "token", "")
	vs.badText("token", "fallback_peer", "token", "aB3dE6gH")
	vs.badText("token", "old_style_16", "token", "aB3dE6gHaB3dE6gH")
	vs.badText("token", "offer_only", "token", good[:tokenSize(true)])
	vs.badText("token", "one_short", "token", good[:len(good)-1])
	vs.badText("token", "one_long", "token", good+"0")
	vs.badText("token", "version_2", "version", "~2"+good[2:])
	vs.badText("token", "version_z", "version", "~z"+good[2:])
	vs.badText("token", "version_2_short", "version", "~2m")
	vs.badText("token", "version_not_base62", "token", "~-"+good[2:])
	vs.badText("token", "mark", "token", "!"+good[1:])
	vs.badText("token", "codec", "token", "~1x"+good[3:])
	vs.badText("token", "codec_upper", "token", "~1M"+good[3:])
	vs.badText("token", "log_packets_32", "token", "~1m"+base62[32:33]+good[4:])
	vs.badText("token", "log_packets_digit", "token", "~1m."+good[4:])
	vs.badText("token", "log_bytes_digit", "token", "~1m5_"+good[5:])
	vs.badText("token", "id_digit", "token", good[:len(good)-1]+"*")
	vs.badText("token", "id_not_ascii", "token", good[:len(good)-2]+"é")
	vs.badText("token", "id_2_64", "token", good[:5]+number62(overflow, partID.chars))
	vs.badText("token", "id_largest_digits", "token", good[:5]+strings.Repeat("z", partID.chars))
	vs.badText("offer", "empty", "token", "")
	vs.badText("offer", "whole_token", "token", good)
	vs.badText("offer", "four", "token", good[:4])
	vs.badText("offer", "version_2", "version", "~2m5I")
	vs.badText("offer", "mark", "token", "11m5I")
	vs.badText("offer", "codec", "token", "~1r5I")
	vs.badText("offer", "log_packets", "token", "~1mWI")
}

func vectorsJSON() ([]byte, error) {
	vs := new(vectors)
	headerVectors(vs)
	frameVectors(vs)
	creditVectors(vs)
	fragmentVectors(vs)
	packetVectors(vs)
	envelopeVectors(vs)
	tokenVectors(vs)

	out := vectorFile{
		Version: packetHeader.fields[1].value,
		About:   "Generated by internal/framegen; do not edit. See section 17 of docs/PROTOCOL.md.",
		Errors:  map[string]string{},
		Vectors: vs.list,
	}
	for _, e := range errorKinds {
		out.Errors[e.id] = e.doc
	}
	seen, used := map[string]bool{}, map[string]bool{}
	for _, v := range vs.list {
		if seen[v.Name] {
			return nil, fmt.Errorf("two vectors are named %q", v.Name)
		}
		seen[v.Name] = true
		used[v.Error] = true
		if _, known := out.Errors[v.Error]; v.Error != "" && !known {
			return nil, fmt.Errorf("vector %q: unknown error %q", v.Name, v.Error)
		}
	}
	for _, e := range errorKinds {
		if !used[e.id] {
			return nil, fmt.Errorf("no vector has error %q", e.id)
		}
	}

	// One line for each vector, so that a diff shows the changed vectors alone.
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	head := out
	head.Vectors = nil
	fmt.Fprintf(&b, "{\n\"version\": %d,\n\"about\": %q,\n\"errors\": ", head.Version, head.About)
	if err := enc.Encode(head.Errors); err != nil { // a map is encoded in the order of its keys
		return nil, err
	}
	b.Truncate(b.Len() - 1)
	b.WriteString(",\n\"vectors\": [\n")
	for i, v := range out.Vectors {
		if i > 0 {
			b.WriteString(",\n")
		}
		if err := enc.Encode(v); err != nil {
			return nil, err
		}
		b.Truncate(b.Len() - 1)
	}
	b.WriteString("\n]\n}\n")
	if !json.Valid(b.Bytes()) {
		return nil, fmt.Errorf("vectors are not valid JSON")
	}
	return b.Bytes(), nil
}
