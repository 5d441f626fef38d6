package object

import (
	"errors"
	"math"
	"reflect"

	"github.com/vmihailenco/msgpack/v5"
	"github.com/vmihailenco/msgpack/v5/msgpcode"
)

// This file decodes MessagePack into targets without a type, such as an any. The goroutine that calls Decode runs it,
// and owns the decoder.

// value decodes the next object into a value of the type that fits it best.
func (d *decoder) value() (any, error) {
	c, err := d.code()
	if err != nil {
		return nil, err
	}
	if msgpcode.IsFixedNum(c) {
		d.off++
		return int8(c), nil
	}
	if b, ok, err := d.text(c); ok {
		if msgpcode.IsBin(c) {
			return append([]byte{}, b...), err
		}
		return string(b), err
	}
	if n, ok, err := d.array(c); ok {
		if err != nil {
			return nil, err
		}
		return d.list(n)
	}
	if n, ok, err := d.mapping(c); ok {
		if err != nil {
			return nil, err
		}
		return d.anyMap(n)
	}
	if isExtension(c) {
		if d.isTime(c) {
			_, size, _ := d.extension(c)
			return d.time(size)
		}
		var v any
		err := d.delegate(func(m *msgpack.Decoder) (err error) { v, err = m.DecodeInterface(); return err })
		return v, err
	}
	d.off++
	switch c {
	case msgpcode.Nil:
		return nil, nil
	case msgpcode.False, msgpcode.True:
		return c == msgpcode.True, nil
	case msgpcode.Float:
		n, err := d.number(4)
		return math.Float32frombits(uint32(n)), err
	case msgpcode.Double:
		n, err := d.number(8)
		return math.Float64frombits(n), err
	case msgpcode.Uint8, msgpcode.Uint16, msgpcode.Uint32, msgpcode.Uint64, msgpcode.Int8, msgpcode.Int16, msgpcode.Int32, msgpcode.Int64:
		n, err := d.number(1 << (c & 3))
		switch c {
		case msgpcode.Uint8:
			return uint8(n), err
		case msgpcode.Uint16:
			return uint16(n), err
		case msgpcode.Uint32:
			return uint32(n), err
		case msgpcode.Uint64:
			return n, err
		case msgpcode.Int8:
			return int8(n), err
		case msgpcode.Int16:
			return int16(n), err
		case msgpcode.Int32:
			return int32(n), err
		}
		return int64(n), err
	}
	return nil, errMsgPack
}

func (d *decoder) list(n int) (any, error) {
	if err := d.enter(); err != nil {
		return nil, err
	}
	s := make([]any, 0, n)
	for range n {
		d.promised--
		v, err := d.value()
		if err != nil {
			return nil, err
		}
		s = append(s, v)
	}
	d.depth--
	return s, nil
}

// anyMap makes a map[string]any, or a map[any]any if a key is no string.
func (d *decoder) anyMap(n int) (any, error) {
	if err := d.enter(); err != nil {
		return nil, err
	}
	m := make(map[string]any, n)
	var mixed map[any]any
	for i := range n {
		d.promised -= 2
		c, err := d.code()
		if err != nil {
			return nil, err
		}
		name, isText, err := d.text(c)
		if err != nil {
			return nil, err
		}
		var k any
		if !isText {
			if k, err = d.value(); err != nil {
				return nil, err
			}
			if k != nil && !reflect.TypeOf(k).Comparable() {
				return nil, errKey
			}
		}
		v, err := d.value()
		if err != nil {
			return nil, err
		}
		if !isText && mixed == nil {
			mixed = make(map[any]any, n-i)
			for k, v := range m {
				mixed[k] = v
			}
		}
		switch {
		case mixed == nil:
			m[string(name)] = v
		case isText:
			mixed[string(name)] = v
		default:
			mixed[k] = v
		}
	}
	d.depth--
	if mixed != nil {
		return mixed, nil
	}
	return m, nil
}

var errKey = errors.New("a map has a list or a map as key, which Go cannot have: let the producer use another key")
