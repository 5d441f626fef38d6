package object

import (
	"encoding/binary"
	"math"
	"slices"
	"time"

	"github.com/vmihailenco/msgpack/v5/msgpcode"
)

// This file writes single MessagePack elements to the encoder. The goroutine that calls Encode runs it, and owns the
// encoder.

// room makes room for n more bytes.
func (e *Encoder) room(n int) {
	if n <= cap(e.buf)-len(e.buf) {
		return
	}
	if !e.spilled {
		e.spilled = true
		e.buf = append(slices.Grow(e.spill[:0], len(e.buf)+n), e.buf...)
		return
	}
	e.buf = slices.Grow(e.buf, n)
}

func (e *Encoder) byte(c byte) {
	e.room(1)
	e.buf = append(e.buf, c)
}

func (e *Encoder) bool(v bool) {
	if v {
		e.byte(msgpcode.True)
	} else {
		e.byte(msgpcode.False)
	}
}

// sized writes code and the bytes of n that belong to it: the codes of one family stand for 1, 2, 4 and 8 bytes.
func (e *Encoder) sized(code byte, n uint64) {
	e.room(9)
	b := append(e.buf, code)
	switch code {
	case msgpcode.Uint8, msgpcode.Int8, msgpcode.Bin8, msgpcode.Str8:
		b = append(b, byte(n))
	case msgpcode.Uint16, msgpcode.Int16, msgpcode.Bin16, msgpcode.Str16, msgpcode.Array16, msgpcode.Map16:
		b = binary.BigEndian.AppendUint16(b, uint16(n))
	case msgpcode.Uint64, msgpcode.Int64, msgpcode.Double:
		b = binary.BigEndian.AppendUint64(b, n)
	default:
		b = binary.BigEndian.AppendUint32(b, uint32(n))
	}
	e.buf = b
}

// int writes n in the fewest bytes.
func (e *Encoder) int(n int64) {
	switch {
	case n >= 0:
		e.uint(uint64(n))
	case n >= -32:
		e.byte(byte(n))
	case n >= math.MinInt8:
		e.sized(msgpcode.Int8, uint64(n))
	case n >= math.MinInt16:
		e.sized(msgpcode.Int16, uint64(n))
	case n >= math.MinInt32:
		e.sized(msgpcode.Int32, uint64(n))
	default:
		e.sized(msgpcode.Int64, uint64(n))
	}
}

func (e *Encoder) uint(n uint64) {
	switch {
	case n <= math.MaxInt8:
		e.byte(byte(n))
	case n <= math.MaxUint8:
		e.sized(msgpcode.Uint8, n)
	case n <= math.MaxUint16:
		e.sized(msgpcode.Uint16, n)
	case n <= math.MaxUint32:
		e.sized(msgpcode.Uint32, n)
	default:
		e.sized(msgpcode.Uint64, n)
	}
}

// length writes the length of a map or an array: in its first byte if it is below few, otherwise behind code16 or the
// code after it.
func (e *Encoder) length(fixed byte, few int, code16 byte, n int) {
	switch {
	case n < few:
		e.byte(fixed | byte(n))
	case n <= math.MaxUint16:
		e.sized(code16, uint64(n))
	default:
		e.sized(code16+1, uint64(n))
	}
}

func (e *Encoder) string(s string) {
	switch n := len(s); {
	case n < 32:
		e.byte(msgpcode.FixedStrLow | byte(n))
	case n <= math.MaxUint8:
		e.sized(msgpcode.Str8, uint64(n))
	default:
		e.length(0, 0, msgpcode.Str16, n)
	}
	e.room(len(s))
	e.buf = append(e.buf, s...)
}

func (e *Encoder) bytes(b []byte) {
	if b == nil {
		e.byte(msgpcode.Nil)
		return
	}
	e.bytesLen(len(b))
	e.room(len(b))
	e.buf = append(e.buf, b...)
}

func (e *Encoder) bytesLen(n int) {
	if n <= math.MaxUint8 {
		e.sized(msgpcode.Bin8, uint64(n))
	} else {
		e.length(0, 0, msgpcode.Bin16, n)
	}
}

// time writes the extension that the MessagePack specification has for times, in its shortest form.
func (e *Encoder) time(t time.Time) {
	e.room(15)
	secs, nanos := uint64(t.Unix()), uint64(t.Nanosecond())
	switch {
	case secs>>34 != 0:
		e.buf = append(e.buf, msgpcode.Ext8, 12, extTime)
		e.buf = binary.BigEndian.AppendUint32(e.buf, uint32(nanos))
		e.buf = binary.BigEndian.AppendUint64(e.buf, secs)
	case nanos == 0 && secs>>32 == 0:
		e.buf = append(e.buf, msgpcode.FixExt4, extTime)
		e.buf = binary.BigEndian.AppendUint32(e.buf, uint32(secs))
	default:
		e.buf = append(e.buf, msgpcode.FixExt8, extTime)
		e.buf = binary.BigEndian.AppendUint64(e.buf, nanos<<34|secs)
	}
}

// extTime is the type of the extension for times, -1.
const extTime = 0xff
