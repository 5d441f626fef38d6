package object

import (
	"fmt"
	"reflect"
	"strings"

	"github.com/vmihailenco/msgpack/v5/msgpcode"
)

// This file encodes and decodes structs as MessagePack, as a map or as an array. The goroutine that calls Encode or
// Decode runs it. The methods of maker run with plans.mu locked.

// fieldPlan is how one field of a struct is written and read.
type fieldPlan struct {
	field
	*plan
	head    []byte // its name, encoded
	present func(reflect.Value) bool
}

// value returns the field of v, and false if an embedded pointer before it is nil.
func (f *fieldPlan) value(v reflect.Value) (reflect.Value, bool) {
	v = v.Field(f.index[0])
	for _, i := range f.index[1:] {
		if v.Kind() == reflect.Pointer {
			if v.IsNil() {
				return v, false
			}
			v = v.Elem()
		}
		v = v.Field(i)
	}
	return v, true
}

func (m maker) encodeStruct(t reflect.Type) func(*Encoder, reflect.Value) error {
	fields, asArray := structFields(t)
	if len(fields) == 0 && t.NumField() > 0 && hasMethods(t, jsonMarshalerType) {
		err := fmt.Errorf("%v has no exported fields and encodes itself as JSON only: give it EncodeMsgpack and DecodeMsgpack or "+
			"MarshalBinary and UnmarshalBinary, or let the consumer ask for JSON", t)
		return func(*Encoder, reflect.Value) error { return err }
	}
	list := make([]fieldPlan, len(fields))
	always := true // all fields are written
	for i, f := range fields {
		name := new(Encoder)
		name.string(f.name)
		list[i] = fieldPlan{field: f, plan: m.plan(f.typ), head: name.buf, present: presence(f)}
		always = always && list[i].present == nil && len(f.index) == 1
	}
	switch {
	case asArray:
		return encodeArray(list)
	case always:
		return encodeAll(list)
	}
	return encodePresent(list)
}

// encodeArray writes the values of a struct as an array, with nil for fields that are absent.
func encodeArray(list []fieldPlan) func(*Encoder, reflect.Value) error {
	return func(e *Encoder, v reflect.Value) error {
		if err := e.enter(); err != nil {
			return err
		}
		e.length(msgpcode.FixedArrayLow, 16, msgpcode.Array16, len(list))
		for i := range list {
			f := &list[i]
			if fv, ok := f.value(v); !ok {
				e.byte(msgpcode.Nil)
			} else if err := f.encode(e, fv); err != nil {
				return within(f.name, err)
			}
		}
		e.depth--
		return nil
	}
}

// encodeAll writes a struct that always has all of its fields.
func encodeAll(list []fieldPlan) func(*Encoder, reflect.Value) error {
	return func(e *Encoder, v reflect.Value) error {
		if err := e.enter(); err != nil {
			return err
		}
		e.length(msgpcode.FixedMapLow, 16, msgpcode.Map16, len(list))
		for i := range list {
			f := &list[i]
			e.room(len(f.head))
			e.buf = append(e.buf, f.head...)
			if err := f.encode(e, v.Field(f.index[0])); err != nil {
				return within(f.name, err)
			}
		}
		e.depth--
		return nil
	}
}

// encodePresent writes a struct without the fields that are absent or left out.
func encodePresent(list []fieldPlan) func(*Encoder, reflect.Value) error {
	return func(e *Encoder, v reflect.Value) error {
		if err := e.enter(); err != nil {
			return err
		}
		n := 0
		for i := range list {
			if fv, ok := list[i].value(v); ok && (list[i].present == nil || list[i].present(fv)) {
				n++
			}
		}
		e.length(msgpcode.FixedMapLow, 16, msgpcode.Map16, n)
		for i := range list {
			f := &list[i]
			fv, ok := f.value(v)
			if !ok || f.present != nil && !f.present(fv) {
				continue
			}
			e.room(len(f.head))
			e.buf = append(e.buf, f.head...)
			if err := f.encode(e, fv); err != nil {
				return within(f.name, err)
			}
		}
		e.depth--
		return nil
	}
}

// presence returns the function that decides whether a field is written, nil if the field is always written.
func presence(f field) func(reflect.Value) bool {
	zero := isZero(f.typ)
	switch {
	case f.omitEmpty && f.omitZero:
		return func(v reflect.Value) bool { return !isEmpty(v) && !zero(v) }
	case f.omitEmpty:
		return func(v reflect.Value) bool { return !isEmpty(v) }
	case f.omitZero:
		return func(v reflect.Value) bool { return !zero(v) }
	}
	return nil
}

// isEmpty decides the option omitempty as encoding/json does.
func isEmpty(v reflect.Value) bool {
	switch v.Kind() {
	case reflect.Array, reflect.Map, reflect.Slice, reflect.String:
		return v.Len() == 0
	case reflect.Struct:
		return false
	}
	return v.IsZero()
}

// isZero decides the option omitzero as encoding/json does.
func isZero(t reflect.Type) func(reflect.Value) bool {
	type zeroer interface{ IsZero() bool }
	iface := reflect.TypeFor[zeroer]()
	switch {
	case t.Kind() == reflect.Interface && t.Implements(iface), t.Kind() == reflect.Pointer && t.Implements(iface):
		return func(v reflect.Value) bool {
			if v.IsNil() || v.Kind() == reflect.Interface && v.Elem().Kind() == reflect.Pointer && v.Elem().IsNil() {
				return true
			}
			return v.Interface().(zeroer).IsZero()
		}
	case hasMethods(t, iface):
		return func(v reflect.Value) bool { return addressed(v).Interface().(zeroer).IsZero() }
	}
	return reflect.Value.IsZero
}

// name takes the name of a field, in place.
func (d *decoder) name() ([]byte, error) {
	c, err := d.code()
	if err != nil {
		return nil, err
	}
	b, ok, err := d.text(c)
	if err == nil && !ok {
		_, err = d.skip() // names no field
	}
	return b, err
}

func (m maker) decodeStruct(t reflect.Type) kindDecoder {
	fields, asArray := structFields(t)
	list := make([]fieldPlan, len(fields))
	byName, byFold := map[string]*fieldPlan{}, map[string]*fieldPlan{}
	for i, f := range fields {
		list[i] = fieldPlan{field: f, plan: m.plan(f.typ)}
		for _, name := range append([]string{f.name}, f.aliases...) {
			byName[name] = &list[i]
		}
		if fold := strings.ToLower(f.name); byFold[fold] == nil {
			byFold[fold] = &list[i]
		}
	}
	return func(d *decoder, v reflect.Value, c byte) error {
		if c == msgpcode.Nil {
			d.off++
			return nil
		}
		n, ok, err := d.array(c)
		if err != nil {
			return err
		}
		if ok {
			return d.fieldsInOrder(v, n, list, asArray)
		}
		n, ok, err = d.mapping(c)
		switch {
		case err != nil:
			return err
		case !ok:
			return d.mismatch(c, t)
		}
		if err := d.enter(); err != nil {
			return err
		}
		for range n {
			d.promised -= 2
			name, err := d.name()
			if err != nil {
				return err
			}
			f := byName[string(name)]
			if f == nil && name != nil {
				f = byFold[strings.ToLower(string(name))]
			}
			if f == nil {
				if _, err := d.skip(); err != nil {
					return err
				}
				continue
			}
			if err := d.field(v, f); err != nil {
				return within(f.name, err)
			}
		}
		d.depth--
		return nil
	}
}

// fieldsInOrder decodes a struct that was written as an array.
func (d *decoder) fieldsInOrder(v reflect.Value, n int, list []fieldPlan, asArray bool) error {
	if !asArray && n != 0 || asArray && n != len(list) {
		return fmt.Errorf("an array of %d cannot become %v with %d fields: let both ends use the same type", n, v.Type(), len(list))
	}
	if err := d.enter(); err != nil {
		return err
	}
	for i := range n {
		d.promised--
		if err := d.field(v, &list[i]); err != nil {
			return within(list[i].name, err)
		}
	}
	d.depth--
	return nil
}

// field decodes into the field f of v and makes the embedded pointers on the way.
func (d *decoder) field(v reflect.Value, f *fieldPlan) error {
	v = v.Field(f.index[0])
	for _, i := range f.index[1:] {
		if v.Kind() == reflect.Pointer {
			if v.IsNil() {
				if !v.CanSet() {
					return fmt.Errorf("%v is embedded, unexported and nil: set it before, or embed it exported", v.Type())
				}
				v.Set(reflect.New(v.Type().Elem()))
			}
			v = v.Elem()
		}
		v = v.Field(i)
	}
	return f.decode(d, v)
}
