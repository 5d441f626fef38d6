package object

import (
	"encoding"
	"fmt"
	"math"
	"reflect"
	"time"

	"github.com/vmihailenco/msgpack/v5/msgpcode"
)

// This file encodes Go values as MessagePack. The goroutine that calls Encode runs it. Decode may run the methods of
// maker, too. They run with plans.mu locked. struct.go has structs.

// encodeMsgPack encodes v as one MessagePack object.
func (e *Encoder) encodeMsgPack(v any) error {
	e.depth, e.hops, e.foreign = 0, 0, false
	if err := e.any(v); err != nil {
		return err
	}
	if e.foreign { // a method wrote bytes of its own
		if err := checkAll(e.buf, nil); err != nil {
			return fmt.Errorf("a method of the value or of a part of it wrote bytes that RecvObject refuses; correct its "+
				"EncodeMsgpack or MarshalMsgpack: %w", err)
		}
	}
	return nil
}

// any encodes the value in an interface. Common types need no plan.
func (e *Encoder) any(v any) error {
	switch v := v.(type) {
	case nil:
		e.byte(msgpcode.Nil)
	case string:
		e.string(v)
	case []byte:
		e.bytes(v)
	case int:
		e.int(int64(v))
	case int64:
		e.sized(msgpcode.Int64, uint64(v))
	case float64:
		e.sized(msgpcode.Double, math.Float64bits(v))
	case bool:
		e.bool(v)
	case map[string]any:
		return e.stringMap(v)
	case []any:
		return e.list(v)
	default:
		t := reflect.TypeOf(v)
		if t != e.last {
			e.last, e.plan = t, planOf(t)
		}
		return e.plan.encode(e, reflect.ValueOf(v))
	}
	return nil
}

func (e *Encoder) stringMap(m map[string]any) error {
	if m == nil {
		e.byte(msgpcode.Nil)
		return nil
	}
	if err := e.enter(); err != nil {
		return err
	}
	e.length(msgpcode.FixedMapLow, 16, msgpcode.Map16, len(m))
	for k, v := range m {
		e.string(k)
		if err := e.any(v); err != nil {
			return err
		}
	}
	e.depth--
	return nil
}

func (e *Encoder) list(s []any) error {
	if s == nil {
		e.byte(msgpcode.Nil)
		return nil
	}
	if err := e.enter(); err != nil {
		return err
	}
	e.length(msgpcode.FixedArrayLow, 16, msgpcode.Array16, len(s))
	for _, v := range s {
		if err := e.any(v); err != nil {
			return err
		}
	}
	e.depth--
	return nil
}

// enter begins a map or an array.
func (e *Encoder) enter() error {
	if e.depth++; e.depth > MaxDepth {
		return errDepth
	}
	return nil
}

// hop follows a pointer or an interface. A chain of these may have no end without any map or array.
func (e *Encoder) hop() error {
	if e.hops++; e.hops > maxHops {
		return errDepth
	}
	return nil
}

// partError names the part of an object that an error is about. Its path has the innermost names.
type partError struct {
	path  string
	names int
	err   error
}

const maxPath = 8

func (e *partError) Error() string { return e.path + ": " + e.err.Error() }
func (e *partError) Unwrap() error { return e.err }

// within adds the name of a field to err.
func within(name string, err error) error {
	part, ok := err.(*partError)
	if !ok {
		return &partError{name, 1, err}
	}
	if part.names++; part.names <= maxPath {
		part.path = name + "." + part.path
	}
	return part
}

// makeEncoder chooses how values of type t are written. Methods come first.
func (m maker) makeEncoder(t reflect.Type, p *plan) {
	switch {
	case t == timeType:
		p.encode = func(e *Encoder, v reflect.Value) error {
			e.time(v.Interface().(time.Time))
			return nil
		}
	case hasMethods(t, customEncoderType), hasMethods(t, marshalerType):
		p.encode = nilOr(t, func(e *Encoder, v reflect.Value) error {
			e.foreign = true
			e.msgpack.Reset(e) // removes options that the last method set
			e.msgpack.SetCustomStructTag("json")
			return e.msgpack.EncodeValue(addressed(v))
		})
	case hasMethods(t, binaryMarshalerType):
		p.encode = nilOr(t, func(e *Encoder, v reflect.Value) error {
			b, err := addressed(v).Interface().(encoding.BinaryMarshaler).MarshalBinary()
			e.bytes(b)
			return err
		})
	case hasMethods(t, textMarshalerType):
		p.encode = nilOr(t, func(e *Encoder, v reflect.Value) error {
			b, err := addressed(v).Interface().(encoding.TextMarshaler).MarshalText()
			e.bytes(b)
			return err
		})
	case isProtobuf(t):
		err := protobufError(t)
		p.encode = func(*Encoder, reflect.Value) error { return err }
	default:
		p.encode = m.encoderOfKind(t)
	}
}

// nilOr writes nil for a nil value of t, and calls encode for all other values.
func nilOr(t reflect.Type, encode func(*Encoder, reflect.Value) error) func(*Encoder, reflect.Value) error {
	switch t.Kind() {
	case reflect.Map, reflect.Slice, reflect.Chan, reflect.Func:
		return func(e *Encoder, v reflect.Value) error {
			if v.IsNil() {
				e.byte(msgpcode.Nil)
				return nil
			}
			return encode(e, v)
		}
	}
	return encode
}

func protobufError(t reflect.Type) error {
	return fmt.Errorf("%v is a Protocol Buffers message, which this codec cannot carry: send the bytes of proto.Marshal with Write, "+
		"and read them with Recv and proto.Unmarshal", t)
}

func (m maker) encoderOfKind(t reflect.Type) func(*Encoder, reflect.Value) error {
	switch t.Kind() {
	case reflect.Bool:
		return func(e *Encoder, v reflect.Value) error { e.bool(v.Bool()); return nil }
	case reflect.Int:
		return func(e *Encoder, v reflect.Value) error { e.int(v.Int()); return nil }
	case reflect.Uint, reflect.Uintptr:
		return func(e *Encoder, v reflect.Value) error { e.uint(v.Uint()); return nil }
	case reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		code := msgpcode.Int8 + byte(t.Kind()-reflect.Int8)
		return func(e *Encoder, v reflect.Value) error { e.sized(code, uint64(v.Int())); return nil }
	case reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		code := msgpcode.Uint8 + byte(t.Kind()-reflect.Uint8)
		return func(e *Encoder, v reflect.Value) error { e.sized(code, v.Uint()); return nil }
	case reflect.Float32:
		return func(e *Encoder, v reflect.Value) error {
			e.sized(msgpcode.Float, uint64(math.Float32bits(float32(v.Float()))))
			return nil
		}
	case reflect.Float64:
		return func(e *Encoder, v reflect.Value) error {
			e.sized(msgpcode.Double, math.Float64bits(v.Float()))
			return nil
		}
	case reflect.String:
		return func(e *Encoder, v reflect.Value) error { e.string(v.String()); return nil }
	case reflect.Interface:
		return encodeInterface(t)
	case reflect.Pointer:
		return m.encodePointer(t)
	case reflect.Slice, reflect.Array:
		return m.encodeList(t)
	case reflect.Map:
		return m.encodeMap(t)
	case reflect.Struct:
		return m.encodeStruct(t)
	}
	err := fmt.Errorf("%v has no encoding: leave it out, for a field with the tag `json:\"-\"`", t)
	return func(*Encoder, reflect.Value) error { return err }
}

func encodeInterface(t reflect.Type) func(*Encoder, reflect.Value) error {
	return func(e *Encoder, v reflect.Value) error {
		if v.IsNil() {
			e.byte(msgpcode.Nil)
			return nil
		}
		if t == errorType {
			e.string(v.Interface().(error).Error())
			return nil
		}
		if err := e.hop(); err != nil {
			return err
		}
		if err := e.any(v.Interface()); err != nil {
			return err
		}
		e.hops--
		return nil
	}
}

func (m maker) encodePointer(t reflect.Type) func(*Encoder, reflect.Value) error {
	elem := m.plan(t.Elem())
	return func(e *Encoder, v reflect.Value) error {
		if v.IsNil() {
			e.byte(msgpcode.Nil)
			return nil
		}
		if err := e.hop(); err != nil {
			return err
		}
		if err := elem.encode(e, v.Elem()); err != nil {
			return err
		}
		e.hops--
		return nil
	}
}

func (m maker) encodeList(t reflect.Type) func(*Encoder, reflect.Value) error {
	if isByte(t.Elem()) {
		if t.Kind() == reflect.Slice {
			return func(e *Encoder, v reflect.Value) error { e.bytes(v.Bytes()); return nil }
		}
		return func(e *Encoder, v reflect.Value) error { e.bytes(addressed(v).Elem().Bytes()); return nil }
	}
	elem := m.plan(t.Elem())
	return nilOr(t, func(e *Encoder, v reflect.Value) error {
		if err := e.enter(); err != nil {
			return err
		}
		n := v.Len()
		e.length(msgpcode.FixedArrayLow, 16, msgpcode.Array16, n)
		for i := range n {
			if err := elem.encode(e, v.Index(i)); err != nil {
				return err
			}
		}
		e.depth--
		return nil
	})
}

// isByte reports whether lists of t are written as bytes: the kind is that of byte, whatever methods it has.
func isByte(t reflect.Type) bool { return t.Kind() == reflect.Uint8 }

func (m maker) encodeMap(t reflect.Type) func(*Encoder, reflect.Value) error {
	if t == reflect.TypeFor[map[string]any]() {
		return func(e *Encoder, v reflect.Value) error { return e.stringMap(v.Interface().(map[string]any)) }
	}
	key, elem := m.plan(t.Key()), m.plan(t.Elem())
	return nilOr(t, func(e *Encoder, v reflect.Value) error {
		if err := e.enter(); err != nil {
			return err
		}
		e.length(msgpcode.FixedMapLow, 16, msgpcode.Map16, v.Len())
		k, x := reflect.New(t.Key()).Elem(), reflect.New(t.Elem()).Elem()
		for i := v.MapRange(); i.Next(); {
			k.SetIterKey(i)
			x.SetIterValue(i)
			if err := key.encode(e, k); err != nil {
				return err
			}
			if err := elem.encode(e, x); err != nil {
				return err
			}
		}
		e.depth--
		return nil
	})
}
