package stream

import (
	"encoding/binary"
	"errors"
)

// maxMsgPackDepth bounds the nesting of a received object.
const maxMsgPackDepth = 1000

var errMsgPack = errors.New("MessagePack is cut short, nested too deeply or invalid")

// checkMsgPack walks the first object in p, without recursion and without memory that p did not pay for. The decoder
// trusts what it reads: five bytes make it ask for 64 GiB, a long run of 0x91 overflows its stack, and neither can be
// recovered from. So it sees only objects that are there as a whole and are not nested deeper than maxMsgPackDepth.
func checkMsgPack(p []byte) error {
	var few [16]uint64
	left := append(few[:0], 1) // objects to come, at each depth
	for {
		for left[len(left)-1] == 0 {
			if left = left[:len(left)-1]; len(left) == 0 {
				return nil
			}
		}
		left[len(left)-1]--
		if len(p) == 0 {
			return errMsgPack
		}
		c := p[0]
		p = p[1:]
		var lenBytes int
		var skip, children uint64
		switch {
		case c <= 0x7f || c >= 0xe0:
		case c <= 0x8f:
			children = 2 * uint64(c&15)
		case c <= 0x9f:
			children = uint64(c & 15)
		case c <= 0xbf:
			skip = uint64(c & 31)
		case c == 0xc0, c == 0xc2, c == 0xc3:
		case c >= 0xc4 && c <= 0xc6:
			lenBytes = 1 << (c - 0xc4)
		case c >= 0xc7 && c <= 0xc9:
			lenBytes, skip = 1<<(c-0xc7), 1
		case c == 0xca:
			skip = 4
		case c == 0xcb:
			skip = 8
		case c >= 0xcc && c <= 0xcf:
			skip = 1 << (c - 0xcc)
		case c >= 0xd0 && c <= 0xd3:
			skip = 1 << (c - 0xd0)
		case c >= 0xd4 && c <= 0xd8:
			skip = 1 + 1<<(c-0xd4)
		case c >= 0xd9 && c <= 0xdb:
			lenBytes = 1 << (c - 0xd9)
		case c == 0xdc, c == 0xdd:
			lenBytes = 2 << (c - 0xdc)
		case c == 0xde, c == 0xdf:
			lenBytes = 2 << (c - 0xde)
		default:
			return errMsgPack
		}
		if lenBytes > 0 {
			if len(p) < lenBytes {
				return errMsgPack
			}
			var n uint64
			switch lenBytes {
			case 1:
				n = uint64(p[0])
			case 2:
				n = uint64(binary.BigEndian.Uint16(p))
			default:
				n = uint64(binary.BigEndian.Uint32(p))
			}
			p = p[lenBytes:]
			switch c {
			case 0xdc, 0xdd:
				children = n
			case 0xde, 0xdf:
				children = 2 * n
			default:
				skip += n
			}
		}
		if skip > uint64(len(p)) || children > uint64(len(p)) {
			return errMsgPack
		}
		p = p[skip:]
		if children > 0 {
			if len(left) == maxMsgPackDepth {
				return errMsgPack
			}
			left = append(left, children)
		}
	}
}
