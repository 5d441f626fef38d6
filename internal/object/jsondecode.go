package object

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"sync"
)

// This file guards the decoder of encoding/json, in the goroutine that calls Decode. Since Go 1.27 that decoder
// overwrites byte slices of the target, and follows a pointer to itself until the stack overflows. Goroutines share
// finished detachers.

var jsonUnmarshalerType = reflect.TypeFor[json.Unmarshaler]()

// jsonOverwrites says that this version of encoding/json writes into the memory of byte slices that the target holds.
// Programs keep such slices of earlier records.
var jsonOverwrites = func() bool {
	kept := []byte{1}
	b := kept
	return json.Unmarshal([]byte(`"Ag=="`), &b) == nil && kept[0] != 1
}()

// decodeJSON decodes p into v with encoding/json. Byte slices get new memory.
func decodeJSON(p []byte, v any) error {
	if jsonOverwrites {
		target := reflect.ValueOf(v)
		hops := 0
		for t := target; (t.Kind() == reflect.Pointer || t.Kind() == reflect.Interface) && !t.IsNil(); t = t.Elem() {
			if hops++; hops > maxHops {
				return fmt.Errorf("%T points to itself: give a pointer to a value", v)
			}
		}
		if target.Kind() == reflect.Pointer && !target.IsNil() {
			if detach := detacherOf(target.Type().Elem()); detach != nil {
				detach(target.Elem())
			}
		}
	}
	return json.Unmarshal(p, v)
}

// A detacher replaces the byte slices in a value by copies. It is nil for a type that holds none. It follows no pointer
// and looks into no list or map, because copies of the value share their elements anyway.
type detacher func(v reflect.Value)

var detachers sync.Map // reflect.Type → detacher

func detacherOf(t reflect.Type) detacher {
	if d, ok := detachers.Load(t); ok {
		return d.(detacher)
	}
	d := makeDetacher(t)
	detachers.Store(t, d)
	return d
}

func makeDetacher(t reflect.Type) detacher {
	switch {
	case hasMethods(t, jsonUnmarshalerType), hasMethods(t, textUnmarshalerType):
		return nil // the method chooses the memory
	case t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Uint8:
		return func(v reflect.Value) {
			if v.Cap() > 0 {
				v.SetBytes(bytes.Clone(v.Bytes()))
			}
		}
	case t.Kind() == reflect.Array:
		elem := detacherOf(t.Elem())
		if elem == nil {
			return nil
		}
		return func(v reflect.Value) {
			for i := range v.Len() {
				elem(v.Index(i))
			}
		}
	case t.Kind() == reflect.Struct:
		var fields []int
		var detach []detacher
		for i := range t.NumField() {
			if f := t.Field(i); takesPart(f) {
				if d := detacherOf(f.Type); d != nil {
					fields, detach = append(fields, i), append(detach, d)
				}
			}
		}
		if fields == nil {
			return nil
		}
		return func(v reflect.Value) {
			for i, d := range detach {
				d(v.Field(fields[i]))
			}
		}
	}
	return nil
}
