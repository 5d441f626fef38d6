package object

import (
	"reflect"
	"sync"
)

// This file guards encoding/json: it refuses values that would overflow the stack, and values that could not be
// decoded. The goroutine that calls Encode runs it. Goroutines share finished shapes, and make them with shapes.mu
// locked.

// encodeJSON encodes v with encoding/json. It refuses values for which that package would overflow the stack, and
// values that it would write but could not read.
func (e *Encoder) encodeJSON(v any) error {
	t := reflect.TypeOf(v)
	if t != e.lastJSON {
		e.lastJSON, e.shape = t, nil
		if t != nil {
			e.shape = shapeOf(t)
		}
	}
	s := e.shape
	if s != nil && s.look {
		if err := walk(v, 0, 0); err != nil {
			return err
		}
	}
	if err := e.json.Encode(v); err != nil {
		return err
	}
	e.buf = e.buf[:len(e.buf)-1] // the newline that json.Marshal does not write
	if s != nil && (s.look || s.raw) && jsonDepth(e.buf) > MaxDepth {
		return errDepth
	}
	return nil
}

// jsonDepth returns how deep valid JSON is nested. It does not scan input that is too short to be nested too deeply.
func jsonDepth(b []byte) int {
	if len(b) <= 2*MaxDepth {
		return 0
	}
	depth, deepest := 0, 0
	for i := 0; i < len(b); i++ {
		switch b[i] {
		case '"':
			for i++; b[i] != '"'; i++ {
				if b[i] == '\\' {
					i++
				}
			}
		case '[', '{':
			depth++
			deepest = max(deepest, depth)
		case ']', '}':
			depth--
		}
	}
	return deepest
}

// shape states the checks for values of a type before encoding/json encodes them.
type shape struct {
	look    bool // the type does not bound the nesting, or JSON cannot hold a part of it: walk checks the values
	raw     bool // a method writes a part
	methods bool // values encode themselves
	pointer bool // values that have an address encode themselves
	refuse  error
	elem    *shape // of pointers, lists and maps
	fields  []shapeField
}

type shapeField struct {
	index int
	*shape
}

var shapes struct {
	made sync.Map // reflect.Type → *shape
	mu   sync.Mutex
}

func shapeOf(t reflect.Type) *shape {
	if s, ok := shapes.made.Load(t); ok {
		return s.(*shape)
	}
	shapes.mu.Lock()
	defer shapes.mu.Unlock()
	m := map[reflect.Type]*shape{}
	s := makeShape(t, m)
	for t, s := range m {
		shapes.made.Store(t, s)
	}
	return s
}

// makeShape makes the shape of t. look is true in it until it is complete, so values of a type that contains itself are
// checked.
func makeShape(t reflect.Type, made map[reflect.Type]*shape) *shape {
	if s, ok := shapes.made.Load(t); ok {
		return s.(*shape)
	}
	if s := made[t]; s != nil {
		return s
	}
	s := &shape{look: true}
	made[t] = s
	look := false
	kind := t.Kind()
	marshals := t.Implements(jsonMarshalerType) || t.Implements(textMarshalerType)
	switch {
	case kind == reflect.Interface:
		look = true
	case marshals && kind != reflect.Pointer:
		s.methods, s.raw = true, true
	case isProtobuf(t) && !hasMethods(t, jsonMarshalerType):
		s.refuse, look = protobufError(t), true
	case kind == reflect.Pointer, kind == reflect.Slice, kind == reflect.Array, kind == reflect.Map:
		s.elem = makeShape(t.Elem(), made)
		look, s.raw = s.elem.look, s.elem.raw
	case kind == reflect.Struct:
		for i := range t.NumField() {
			f := t.Field(i)
			if !takesPart(f) || f.Tag.Get("json") == "-" {
				continue
			}
			fs := makeShape(f.Type, made)
			s.raw = s.raw || fs.raw
			if fs.look {
				look = true
				s.fields = append(s.fields, shapeField{i, fs})
			}
		}
	}
	if !s.methods && kind != reflect.Pointer && (hasMethods(t, jsonMarshalerType) || hasMethods(t, textMarshalerType)) {
		s.pointer, s.raw = true, true
	}
	s.look = look
	return s
}

// walk checks the value in an interface. Common types need no shape.
func walk(v any, depth, hops int) error {
	switch v := v.(type) {
	case nil, string, bool, int, int64, float64:
		return nil
	case map[string]any:
		if depth == MaxDepth {
			return errDepth
		}
		for _, elem := range v {
			if err := walk(elem, depth+1, hops); err != nil {
				return err
			}
		}
		return nil
	case []any:
		if depth == MaxDepth {
			return errDepth
		}
		for _, elem := range v {
			if err := walk(elem, depth+1, hops); err != nil {
				return err
			}
		}
		return nil
	}
	return shapeOf(reflect.TypeOf(v)).walk(reflect.ValueOf(v), depth, hops+1)
}

// walk looks at a value if its type alone does not decide. depth counts maps and arrays, hops all other steps on the
// way.
func (s *shape) walk(v reflect.Value, depth, hops int) error {
	if hops > maxHops {
		return errDepth
	}
	if !s.look || s.methods || s.pointer && v.CanAddr() {
		return nil
	}
	if s.refuse != nil {
		return s.refuse
	}
	kind := v.Kind()
	switch kind {
	case reflect.Interface:
		return walk(v.Interface(), depth, hops+1)
	case reflect.Pointer:
		if v.IsNil() {
			return nil
		}
		return s.elem.walk(v.Elem(), depth, hops+1)
	}
	if depth++; depth > MaxDepth {
		return errDepth
	}
	switch kind {
	case reflect.Slice, reflect.Array:
		for i := range v.Len() {
			if err := s.elem.walk(v.Index(i), depth, hops); err != nil {
				return err
			}
		}
	case reflect.Map:
		for i := v.MapRange(); i.Next(); {
			if err := s.elem.walk(i.Value(), depth, hops); err != nil {
				return err
			}
		}
	case reflect.Struct:
		for _, f := range s.fields {
			if err := f.walk(v.Field(f.index), depth, hops); err != nil {
				return err
			}
		}
	}
	return nil
}
