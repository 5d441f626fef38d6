package object

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/vmihailenco/msgpack/v5"
)

// decodeMsgPack decodes a record that a peer wrote. The decoder was made for bytes that one trusts: what it would take
// too much memory or stack for, or panic on, is an error here.
func decodeMsgPack(p []byte, v any) (err error) {
	bodies, err := checkMsgPack(p)
	if err != nil {
		return err
	}
	defer func() { // a map whose keys are maps, for one
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", errMsgPack, r)
		}
	}()
	if len(bodies) == 0 {
		return msgpack.Unmarshal(p, v)
	}
	r := &extensionGuard{bodies: bodies}
	r.Reset(p)
	return msgpack.NewDecoder(r).Decode(v)
}

// extensionGuard keeps the decoder from taking the body of an extension for an object: where it expects a map it skips
// the head of an extension and goes on inside, where nothing was checked. Extensions proper, times among them, read
// their body in one piece.
type extensionGuard struct {
	bytes.Reader
	bodies []int // where they begin, in order
}

func (g *extensionGuard) ReadByte() (byte, error) {
	if _, inside := slices.BinarySearch(g.bodies, int(g.Size())-g.Len()); inside {
		return 0, errMsgPack
	}
	return g.Reader.ReadByte()
}

// maxMsgPackDepth bounds the nesting of a received object.
const maxMsgPackDepth = 1000

var errMsgPack = errors.New("MessagePack is cut short, nested too deeply or invalid")

// checkMsgPack walks the first object in p, without recursion and without memory that p did not pay for. The decoder
// trusts what it reads: five bytes make it ask for 64 GiB, a long run of 0x91 overflows its stack, and neither can be
// recovered from. So it sees only objects that are there as a whole and are not nested deeper than maxMsgPackDepth.
// It returns where the bodies of extensions begin.
func checkMsgPack(p []byte) (bodies []int, err error) {
	size := len(p)
	var few [16]uint64
	left := append(few[:0], 1) // objects to come, at each depth
	for {
		for left[len(left)-1] == 0 {
			if left = left[:len(left)-1]; len(left) == 0 {
				return bodies, nil
			}
		}
		left[len(left)-1]--
		if len(p) == 0 {
			return nil, errMsgPack
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
			return nil, errMsgPack
		}
		if lenBytes > 0 {
			if len(p) < lenBytes {
				return nil, errMsgPack
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
			return nil, errMsgPack
		}
		if c >= 0xc7 && c <= 0xc9 || c >= 0xd4 && c <= 0xd8 {
			bodies = append(bodies, size-len(p)+1) // behind the type
		}
		p = p[skip:]
		if children > 0 {
			if len(left) == maxMsgPackDepth {
				return nil, errMsgPack
			}
			left = append(left, children)
		}
	}
}
