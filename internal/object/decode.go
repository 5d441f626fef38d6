package object

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"math"
	"reflect"
	"sync"
	"time"

	"github.com/vmihailenco/msgpack/v5"
	"github.com/vmihailenco/msgpack/v5/msgpcode"
)

// This file decodes MessagePack into Go values, in the goroutine that calls Decode. Encode may run the methods of
// maker, too. They run with plans.mu locked. struct.go has structs, loose.go targets without a type.

// decoder reads one record. No record can exhaust its stack or its memory: it compares lengths with the bytes that are
// present, and bounds nesting.
type decoder struct {
	p        []byte
	off      int
	promised int // elements that maps and arrays announced and that were not read yet: each takes at least a byte
	depth    int
	hops     int

	foreign *msgpack.Decoder // for values that have methods of that package
	guard   extensionGuard
	checked bool // the whole record is a row of whole objects
}

var decoders = sync.Pool{New: func() any { return new(decoder) }}

// decodeMsgPack decodes the one object that p holds into v, as encoding/json does with a JSON text: a map keeps its
// entries, a slice its memory, a struct the fields that the object does not name, a pointer its target. Interfaces and
// byte slices get new values.
func decodeMsgPack(p []byte, v any) (err error) {
	target := reflect.ValueOf(v)
	if target.Kind() != reflect.Pointer || target.IsNil() {
		return fmt.Errorf("%T is no place to decode into: give a pointer that is not nil", v)
	}
	d := decoders.Get().(*decoder)
	defer func() {
		d.free()
		if r := recover(); r != nil { // a method trusted the bytes of a peer
			err = fmt.Errorf("%w: %v", errPanic, r)
		}
	}()
	d.p, d.off, d.promised, d.depth, d.hops, d.checked = p, 0, 0, 0, 0, false
	if err := planOf(target.Type()).decode(d, target); err != nil {
		return err
	}
	if rest := len(p) - d.off; rest > 0 {
		return fmt.Errorf("%d bytes follow the MessagePack object, which has %d: write one object as one record, and let both ends use "+
			"the same codec", rest, d.off)
	}
	return nil
}

var errPanic = errors.New("a method of the value panicked while it was decoded; let it check what it reads")

func (d *decoder) free() {
	d.p, d.guard.bodies = nil, d.guard.bodies[:0]
	d.guard.Reset(nil)
	decoders.Put(d)
}

// delegate lets the msgpack package decode the next object. The decoder of that package trusts its input, so the record
// is checked first.
func (d *decoder) delegate(decode func(*msgpack.Decoder) error) error {
	if !d.checked {
		if err := checkAll(d.p, &d.guard.bodies); err != nil {
			return err
		}
		d.checked = true
	}
	if d.foreign == nil {
		d.foreign = msgpack.NewDecoder(nil)
	}
	d.guard.Reset(d.p)
	d.guard.Seek(int64(d.off), io.SeekStart)
	d.foreign.Reset(&d.guard) // removes options that the last method set
	d.foreign.SetCustomStructTag("json")
	err := decode(d.foreign)
	d.off = len(d.p) - d.guard.Len()
	return err
}

// makeDecoder chooses how values of type t are read. Methods come first.
func (m maker) makeDecoder(t reflect.Type, p *plan) {
	switch {
	case t == timeType:
		p.decode = (*decoder).decodeTime
	case hasMethods(t, customDecoderType), hasMethods(t, unmarshalerType):
		p.decode = zeroOr(func(d *decoder, v reflect.Value) error {
			return d.delegate(func(m *msgpack.Decoder) error { return m.DecodeValue(v.Addr()) })
		})
	case hasMethods(t, binaryUnmarshalerType):
		p.decode = zeroOr(decodeText(func(p reflect.Value, b []byte) error {
			return p.Interface().(encoding.BinaryUnmarshaler).UnmarshalBinary(b)
		}))
	case hasMethods(t, textUnmarshalerType):
		p.decode = zeroOr(decodeText(func(p reflect.Value, b []byte) error {
			return p.Interface().(encoding.TextUnmarshaler).UnmarshalText(b)
		}))
	default:
		decode := m.decoderOfKind(t)
		p.decode = func(d *decoder, v reflect.Value) error {
			c, err := d.code()
			switch {
			case err != nil:
				return err
			case t.Kind() == reflect.Interface, t.Kind() == reflect.Pointer, !isExtension(c):
			case d.isTime(c):
				return fmt.Errorf("a time cannot become %v: decode into a time.Time", t)
			default: // perhaps a registered one
				return d.delegate(func(m *msgpack.Decoder) error { return m.DecodeValue(v) })
			}
			return decode(d, v, c)
		}
	}
}

// zeroOr sets the value to zero for nil, and calls decode for all other objects.
func zeroOr(decode func(*decoder, reflect.Value) error) func(*decoder, reflect.Value) error {
	return func(d *decoder, v reflect.Value) error {
		null, err := d.isNil()
		switch {
		case err != nil:
			return err
		case null:
			v.SetZero()
			return nil
		}
		return decode(d, v)
	}
}

func decodeText(unmarshal func(p reflect.Value, b []byte) error) func(*decoder, reflect.Value) error {
	return func(d *decoder, v reflect.Value) error {
		c, err := d.code()
		if err != nil {
			return err
		}
		b, ok, err := d.text(c)
		switch {
		case err != nil:
			return err
		case !ok:
			return d.mismatch(c, v.Type())
		}
		return unmarshal(v.Addr(), bytes.Clone(b))
	}
}

// decodeTime reads the extension for times, a string, or a pair of seconds and nanoseconds.
func (d *decoder) decodeTime(v reflect.Value) error {
	c, err := d.code()
	if err != nil {
		return err
	}
	var t time.Time
	switch b, ok, err := d.text(c); {
	case err != nil:
		return err
	case ok:
		if t, err = time.Parse(time.RFC3339Nano, string(b)); err != nil {
			return err
		}
	case c == msgpcode.Nil:
		d.off++
		return nil
	case isExtension(c):
		kind, size, err := d.extension(c)
		if err != nil {
			return err
		}
		if kind != extTime && kind != 13 { // 13 is in use in JavaScript
			return fmt.Errorf("an extension of type %d is no time: look at how the producer writes it", int8(kind))
		}
		if t, err = d.time(size); err != nil {
			return err
		}
	case c == msgpcode.FixedArrayLow|2:
		var pair [2]int64
		if err := planOf(reflect.TypeFor[[2]int64]()).decode(d, reflect.ValueOf(&pair).Elem()); err != nil {
			return err
		}
		t = time.Unix(pair[0], pair[1])
	default:
		return d.mismatch(c, timeType)
	}
	*v.Addr().Interface().(*time.Time) = t
	return nil
}

// kindDecoder decodes the object that begins with c. A nil object leaves a value unchanged that cannot be nil.
type kindDecoder func(d *decoder, v reflect.Value, c byte) error

func (m maker) decoderOfKind(t reflect.Type) kindDecoder {
	switch t.Kind() {
	case reflect.Bool:
		return decodeBool
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return decodeInt
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Uintptr:
		return decodeUint
	case reflect.Float32, reflect.Float64:
		return decodeFloat
	case reflect.String:
		return decodeString
	case reflect.Interface:
		return decodeInterface
	case reflect.Pointer:
		return m.decodePointer(t)
	case reflect.Slice, reflect.Array:
		return m.decodeList(t)
	case reflect.Map:
		return m.decodeMap(t)
	case reflect.Struct:
		return m.decodeStruct(t)
	}
	return func(d *decoder, v reflect.Value, c byte) error { return d.mismatch(c, t) }
}

func decodeBool(d *decoder, v reflect.Value, c byte) error {
	switch c {
	case msgpcode.Nil:
	case msgpcode.True, msgpcode.False:
		v.SetBool(c == msgpcode.True)
	default:
		return d.mismatch(c, v.Type())
	}
	d.off++
	return nil
}

// tooLarge is the error of a number that t cannot hold.
func tooLarge(n any, t reflect.Type) error {
	return fmt.Errorf("%v does not fit into %v: decode into a type that can hold it", n, t)
}

func decodeInt(d *decoder, v reflect.Value, c byte) error {
	n, negative, ok, err := d.integer(c)
	if err != nil {
		return err
	}
	if ok {
		if !negative && n > math.MaxInt64 || v.OverflowInt(int64(n)) {
			if negative {
				return tooLarge(int64(n), v.Type())
			}
			return tooLarge(n, v.Type())
		}
		v.SetInt(int64(n))
		return nil
	}
	f, ok, err := d.float(c)
	switch {
	case err != nil:
		return err
	case ok:
		if f != math.Trunc(f) || f < -(1<<63) || f >= 1<<63 || v.OverflowInt(int64(f)) {
			return tooLarge(f, v.Type())
		}
		v.SetInt(int64(f))
		return nil
	case c == msgpcode.Nil:
		d.off++
		return nil
	}
	return d.mismatch(c, v.Type())
}

func decodeUint(d *decoder, v reflect.Value, c byte) error {
	n, negative, ok, err := d.integer(c)
	if err != nil {
		return err
	}
	if ok {
		if negative {
			return tooLarge(int64(n), v.Type())
		}
		if v.OverflowUint(n) {
			return tooLarge(n, v.Type())
		}
		v.SetUint(n)
		return nil
	}
	f, ok, err := d.float(c)
	switch {
	case err != nil:
		return err
	case ok:
		if f != math.Trunc(f) || f < 0 || f >= 1<<64 || v.OverflowUint(uint64(f)) {
			return tooLarge(f, v.Type())
		}
		v.SetUint(uint64(f))
		return nil
	case c == msgpcode.Nil:
		d.off++
		return nil
	}
	return d.mismatch(c, v.Type())
}

func decodeFloat(d *decoder, v reflect.Value, c byte) error {
	f, ok, err := d.float(c)
	if err != nil {
		return err
	}
	if !ok {
		n, negative, isInteger, err := d.integer(c)
		switch {
		case err != nil:
			return err
		case isInteger && negative:
			f = float64(int64(n))
		case isInteger:
			f = float64(n)
		case c == msgpcode.Nil:
			d.off++
			return nil
		default:
			return d.mismatch(c, v.Type())
		}
	}
	if v.OverflowFloat(f) {
		return tooLarge(f, v.Type())
	}
	v.SetFloat(f)
	return nil
}

func decodeString(d *decoder, v reflect.Value, c byte) error {
	b, ok, err := d.text(c)
	switch {
	case err != nil:
		return err
	case ok:
		v.SetString(string(b))
		return nil
	case c == msgpcode.Nil:
		d.off++
		return nil
	}
	return d.mismatch(c, v.Type())
}

// decodeInterface decodes into the target of a pointer that the interface holds. Any other value is replaced.
func decodeInterface(d *decoder, v reflect.Value, c byte) error {
	if !v.IsNil() {
		p := v.Elem()
		if p.Kind() == reflect.Pointer && !p.IsNil() && (c != msgpcode.Nil || p.Elem().Kind() == reflect.Pointer) &&
			!(p.Elem().Kind() == reflect.Interface && p.Elem().Elem().Equal(p)) { // an interface that holds p points to itself
			if err := d.hop(); err != nil {
				return err
			}
			err := planOf(p.Type().Elem()).decode(d, p.Elem())
			d.hops--
			return err
		}
	}
	t := v.Type()
	x, err := d.value()
	switch text, ok := x.(string); {
	case err != nil:
		return err
	case x == nil:
		v.SetZero()
	case t.NumMethod() == 0:
		v.Set(reflect.ValueOf(x))
	case ok && t == errorType:
		v.Set(reflect.ValueOf(errors.New(text)))
	case reflect.TypeOf(x).Implements(t): // a registered extension
		v.Set(reflect.ValueOf(x))
	default:
		return fmt.Errorf("%s cannot become %v, an interface: decode into a type that fits, or set the interface to a pointer first",
			kindOf(c), t)
	}
	return nil
}

func (d *decoder) hop() error {
	if d.hops++; d.hops > maxHops {
		return errDepth
	}
	return nil
}

func (m maker) decodePointer(t reflect.Type) kindDecoder {
	elem := m.plan(t.Elem())
	return func(d *decoder, v reflect.Value, c byte) error {
		if c == msgpcode.Nil && v.CanSet() {
			d.off++
			v.SetZero()
			return nil
		}
		if err := d.hop(); err != nil {
			return err
		}
		if v.IsNil() {
			v.Set(reflect.New(t.Elem()))
		}
		err := elem.decode(d, v.Elem())
		d.hops--
		return err
	}
}

func (m maker) decodeList(t reflect.Type) kindDecoder {
	elem := m.plan(t.Elem())
	return func(d *decoder, v reflect.Value, c byte) error {
		if c == msgpcode.Nil {
			d.off++
			if t.Kind() == reflect.Slice {
				v.SetZero()
			}
			return nil
		}
		if isByte(t.Elem()) {
			if b, ok, err := d.text(c); err != nil {
				return err
			} else if ok {
				setBytes(v, b)
				return nil
			}
		}
		n, ok, err := d.array(c)
		switch {
		case err != nil:
			return err
		case !ok:
			return d.mismatch(c, t)
		}
		if err := d.enter(); err != nil {
			return err
		}
		for i := range n {
			d.promised--
			if t.Kind() == reflect.Slice {
				if i == v.Cap() {
					v.Grow(min(n-i, i+firstElements))
				}
				if i >= v.Len() {
					v.SetLen(i + 1)
				}
			} else if i == v.Len() { // as for JSON, an array takes as many as it can hold
				d.promised -= n - i - 1
				for range n - i {
					if _, err := d.skip(); err != nil {
						return err
					}
				}
				break
			}
			if err := elem.decode(d, v.Index(i)); err != nil {
				return err
			}
		}
		d.depth--
		switch {
		case t.Kind() == reflect.Array:
			for i := n; i < v.Len(); i++ {
				v.Index(i).SetZero()
			}
		case n == 0:
			v.Set(reflect.MakeSlice(t, 0, 0))
		default:
			v.SetLen(n)
		}
		return nil
	}
}

// firstElements is how many elements of a list get memory before the first one was read.
const firstElements = 4

// setBytes sets a list of bytes. A slice never shares memory with the record, nor with the slice's previous value.
func setBytes(v reflect.Value, b []byte) {
	if v.Kind() == reflect.Slice {
		v.SetBytes(append([]byte{}, b...))
		return
	}
	list := v.Slice(0, v.Len()).Bytes()
	clear(list[copy(list, b):])
}

// maxMapHint bounds the memory that is allocated because of a map's stated length.
const maxMapHint = 1024

func (m maker) decodeMap(t reflect.Type) kindDecoder {
	key, elem := m.plan(t.Key()), m.plan(t.Elem())
	return func(d *decoder, v reflect.Value, c byte) error {
		if c == msgpcode.Nil {
			d.off++
			v.SetZero()
			return nil
		}
		n, ok, err := d.mapping(c)
		switch {
		case err != nil:
			return err
		case !ok:
			return d.mismatch(c, t)
		}
		if err := d.enter(); err != nil {
			return err
		}
		if v.IsNil() {
			v.Set(reflect.MakeMapWithSize(t, min(n, maxMapHint)))
		}
		k, x := reflect.New(t.Key()).Elem(), reflect.New(t.Elem()).Elem()
		for range n {
			d.promised -= 2
			k.SetZero()
			x.SetZero()
			if err := key.decode(d, k); err != nil {
				return err
			}
			if !k.Comparable() {
				return errKey
			}
			if err := elem.decode(d, x); err != nil {
				return err
			}
			v.SetMapIndex(k, x)
		}
		d.depth--
		return nil
	}
}
