package object

import (
	"encoding/binary"
	"fmt"
	"math"
	"reflect"
	"time"

	"github.com/vmihailenco/msgpack/v5/msgpcode"
)

// This file reads single MessagePack elements from the decoder. The goroutine that calls Decode runs it, and owns the
// decoder.

// code returns the first byte of the next object and leaves it.
func (d *decoder) code() (byte, error) {
	if d.off == len(d.p) {
		return 0, errMsgPack
	}
	return d.p[d.off], nil
}

// take returns the next n bytes.
func (d *decoder) take(n uint64) ([]byte, error) {
	if n > uint64(len(d.p)-d.off) {
		return nil, errMsgPack
	}
	b := d.p[d.off : d.off+int(n) : d.off+int(n)]
	d.off += int(n)
	return b, nil
}

// number takes a big-endian number of size bytes.
func (d *decoder) number(size int) (uint64, error) {
	b, err := d.take(uint64(size))
	if err != nil {
		return 0, err
	}
	switch size {
	case 1:
		return uint64(b[0]), nil
	case 2:
		return uint64(binary.BigEndian.Uint16(b)), nil
	case 4:
		return uint64(binary.BigEndian.Uint32(b)), nil
	}
	return binary.BigEndian.Uint64(b), nil
}

// isNil takes the next object if that is nil, and reports it.
func (d *decoder) isNil() (bool, error) {
	c, err := d.code()
	if err != nil || c != msgpcode.Nil {
		return false, err
	}
	d.off++
	return true, nil
}

// skip takes the next object and returns its bytes.
func (d *decoder) skip() ([]byte, error) {
	p := d.p[d.off:]
	rest, err := check(p, MaxDepth-d.depth, len(p), nil)
	if err != nil {
		return nil, err
	}
	return d.take(uint64(len(p) - len(rest)))
}

func (d *decoder) enter() error {
	if d.depth++; d.depth > MaxDepth {
		return errMsgPack
	}
	return nil
}

// mismatch is the error of an object that cannot become a t.
func (d *decoder) mismatch(c byte, t reflect.Type) error {
	return fmt.Errorf("%s cannot become %v: decode into a type that fits", kindOf(c), t)
}

func kindOf(c byte) string {
	switch {
	case msgpcode.IsFixedNum(c), c >= msgpcode.Uint8 && c <= msgpcode.Int64:
		return "an integer"
	case c == msgpcode.Float, c == msgpcode.Double:
		return "a float"
	case msgpcode.IsString(c):
		return "a string"
	case msgpcode.IsBin(c):
		return "bytes"
	case msgpcode.IsFixedMap(c), c == msgpcode.Map16, c == msgpcode.Map32:
		return "a map"
	case msgpcode.IsFixedArray(c), c == msgpcode.Array16, c == msgpcode.Array32:
		return "an array"
	case c == msgpcode.True, c == msgpcode.False:
		return "a bool"
	case isExtension(c):
		return "an extension"
	case c == msgpcode.Nil:
		return "nil"
	}
	return fmt.Sprintf("the unknown byte 0x%x", c)
}

// integer takes an integer: its bits, and whether it is below zero. ok is false for any other object, which stays.
func (d *decoder) integer(c byte) (n uint64, negative, ok bool, err error) {
	if msgpcode.IsFixedNum(c) {
		d.off++
		return uint64(int8(c)), int8(c) < 0, true, nil
	}
	if c < msgpcode.Uint8 || c > msgpcode.Int64 {
		return 0, false, false, nil
	}
	d.off++
	size := 1 << (c & 3)
	if n, err = d.number(size); err != nil || c < msgpcode.Int8 {
		return n, false, true, err
	}
	unused := 64 - 8*size
	signed := int64(n<<unused) >> unused
	return uint64(signed), signed < 0, true, nil
}

// float takes a float. ok is false for any other object, which stays.
func (d *decoder) float(c byte) (f float64, ok bool, err error) {
	switch c {
	case msgpcode.Float:
		d.off++
		n, err := d.number(4)
		return float64(math.Float32frombits(uint32(n))), true, err
	case msgpcode.Double:
		d.off++
		n, err := d.number(8)
		return math.Float64frombits(n), true, err
	}
	return 0, false, nil
}

// text takes a string or bytes, in place. ok is false for any other object, which stays.
func (d *decoder) text(c byte) (b []byte, ok bool, err error) {
	var n uint64
	switch {
	case msgpcode.IsFixedString(c):
		d.off++
		n = uint64(c & msgpcode.FixedStrMask)
	case c >= msgpcode.Str8 && c <= msgpcode.Str32:
		d.off++
		n, err = d.number(1 << (c - msgpcode.Str8))
	case msgpcode.IsBin(c):
		d.off++
		n, err = d.number(1 << (c - msgpcode.Bin8))
	default:
		return nil, false, nil
	}
	if err != nil {
		return nil, true, err
	}
	b, err = d.take(n)
	return b, true, err
}

// array takes the head of an array. ok is false for any other object, which stays. The caller reads n elements and
// counts promised down before each.
func (d *decoder) array(c byte) (n int, ok bool, err error) {
	size := 0
	switch {
	case msgpcode.IsFixedArray(c):
		n = int(c & msgpcode.FixedArrayMask)
	case c == msgpcode.Array16, c == msgpcode.Array32:
		size = 2 << (c - msgpcode.Array16)
	default:
		return 0, false, nil
	}
	n, err = d.promise(n, size, 1)
	return n, true, err
}

// mapping takes the head of a map. ok is false for any other object, which stays. The caller reads n keys and values
// and counts promised down by two before each.
func (d *decoder) mapping(c byte) (n int, ok bool, err error) {
	size := 0
	switch {
	case msgpcode.IsFixedMap(c):
		n = int(c & msgpcode.FixedMapMask)
	case c == msgpcode.Map16, c == msgpcode.Map32:
		size = 2 << (c - msgpcode.Map16)
	default:
		return 0, false, nil
	}
	n, err = d.promise(n, size, 2)
	return n, true, err
}

// promise takes a head with a number of size bytes, if size is not zero. It fails if the record is too short for n
// elements of so many objects: no memory is allocated for elements that are absent.
func (d *decoder) promise(n, size, objects int) (int, error) {
	d.off++
	count := uint64(n)
	if size > 0 {
		var err error
		if count, err = d.number(size); err != nil {
			return 0, err
		}
	}
	if left := len(d.p) - d.off - d.promised; left < 0 || count > uint64(left/objects) {
		return 0, errMsgPack
	}
	d.promised += int(count) * objects
	return int(count), nil
}

// time takes the body of a time, of one of the three forms that the specification has.
func (d *decoder) time(size uint64) (time.Time, error) {
	b, err := d.take(size)
	if err != nil {
		return time.Time{}, err
	}
	var t time.Time
	switch len(b) {
	case 4:
		t = time.Unix(int64(binary.BigEndian.Uint32(b)), 0)
	case 8:
		n := binary.BigEndian.Uint64(b)
		t = time.Unix(int64(n&(1<<34-1)), int64(n>>34))
	case 12:
		t = time.Unix(int64(binary.BigEndian.Uint64(b[4:])), int64(binary.BigEndian.Uint32(b)))
	default:
		return t, fmt.Errorf("a time of %d bytes is none: look at how the producer writes it", len(b))
	}
	if t.IsZero() { // it has no zone
		t = t.UTC()
	}
	return t, nil
}

// extension takes the head of an extension.
func (d *decoder) extension(c byte) (kind byte, size uint64, err error) {
	d.off++
	if c >= msgpcode.FixExt1 && c <= msgpcode.FixExt16 {
		size = 1 << (c - msgpcode.FixExt1)
	} else if size, err = d.number(1 << (c - msgpcode.Ext8)); err != nil {
		return 0, 0, err
	}
	n, err := d.number(1)
	return byte(n), size, err
}

// isTime reports whether the next object is a time. c is its first byte.
func (d *decoder) isTime(c byte) bool {
	if !isExtension(c) {
		return false
	}
	at := d.off
	kind, _, err := d.extension(c)
	d.off = at
	return err == nil && kind == extTime
}
