package object

import (
	"bytes"
	"encoding/binary"
	"errors"
	"runtime"
	"slices"
)

// This file checks MessagePack from peers and from methods of the user before the msgpack package decodes it. The
// goroutine that calls Encode or Decode runs it. It touches no shared state.

// MaxDepth is the deepest nesting of maps and arrays in an object. It is that of encoding/json, for both codecs and
// both ends: an object that can be written can be read.
const MaxDepth = 10_000

// maxHops bounds the pointers and interfaces on the way to a value. Between two levels of an object there may be
// several.
const maxHops = 4 * MaxDepth

var (
	errMsgPack = errors.New("the record is not valid MessagePack: it is cut short, nested too deeply or made of unknown bytes; " +
		"look at how its producer writes it")
	errDepth = errors.New("the value is nested deeper than 10,000 levels: break its cycle, or send it in parts")
)

// checkAll checks that p is a sequence of complete objects and nothing more. If bodies is not nil, it appends the
// offsets at which bodies of extensions begin.
func checkAll(p []byte, bodies *[]int) error {
	size := len(p)
	for {
		rest, err := check(p, MaxDepth, size, bodies)
		if err != nil {
			return err
		}
		if p = rest; len(p) == 0 {
			return nil
		}
	}
}

// check walks the first object in p and returns the rest. It needs no recursion and no memory that p did not pay for.
// The decoder of the msgpack package trusts its input: five bytes make it ask for 64 GiB, a long run of 0x91 overflows
// its stack, and neither can be recovered from. So it decodes only objects that are complete and are not nested deeper
// than depth. bodies, if not nil, gets the offsets at which bodies of extensions begin, in a record of size bytes that
// ends with p.
func check(p []byte, depth, size int, bodies *[]int) (rest []byte, err error) {
	var few [16]uint64
	left := append(few[:0], 1) // objects to come, at each depth
	for {
		for left[len(left)-1] == 0 {
			if left = left[:len(left)-1]; len(left) == 0 {
				return p, nil
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
		if bodies != nil && isExtension(c) {
			*bodies = append(*bodies, size-len(p)+1) // behind the type
		}
		p = p[skip:]
		if isContainer(c) && len(left) > depth {
			return nil, errMsgPack
		}
		if children > 0 {
			left = append(left, children)
		}
	}
}

func isExtension(c byte) bool { return c >= 0xc7 && c <= 0xc9 || c >= 0xd4 && c <= 0xd8 }

func isContainer(c byte) bool { return c >= 0x80 && c <= 0x9f || c >= 0xdc && c <= 0xdf }

// stackWatch counts the bytes that methods of the user read or write. These methods may follow a cycle, and a program
// cannot recover from an overflow of the stack. So now and then stackWatch measures how deep the stack is.
type stackWatch int

const (
	watchEvery = 1 << 16
	maxFrames  = 10 * MaxDepth
)

func (w *stackWatch) tooDeep() bool {
	if *w++; *w%watchEvery != 0 {
		return false
	}
	var pc [1]uintptr
	return runtime.Callers(maxFrames, pc[:]) > 0
}

// extensionGuard keeps the decoder of the msgpack package from taking the body of an extension for an object. If that
// decoder expects a map, it skips the head of an extension and decodes the body, which was not checked. Real
// extensions, such as times, read their body in one piece.
type extensionGuard struct {
	bytes.Reader
	bodies []int // offsets of the bodies, in order
	stack  stackWatch
}

func (g *extensionGuard) ReadByte() (byte, error) {
	if _, inside := slices.BinarySearch(g.bodies, int(g.Size())-g.Len()); inside || g.stack.tooDeep() {
		return 0, errMsgPack
	}
	return g.Reader.ReadByte()
}
