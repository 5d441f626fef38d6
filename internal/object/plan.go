package object

import (
	"encoding"
	"encoding/json"
	"reflect"
	"sync"
	"time"

	"github.com/vmihailenco/msgpack/v5"
)

// This file makes a plan for each type: the functions that encode and decode its values. The goroutine that calls
// Encode or Decode runs it. The methods of maker run with plans.mu locked. Goroutines share finished plans.

// plan is how values of one type are written and read as MessagePack.
type plan struct {
	encode func(e *Encoder, v reflect.Value) error
	decode func(d *decoder, v reflect.Value) error
}

var plans struct {
	made sync.Map   // reflect.Type → *plan
	mu   sync.Mutex // one goroutine makes plans
}

// planOf returns the plan of t.
func planOf(t reflect.Type) *plan {
	if p, ok := plans.made.Load(t); ok {
		return p.(*plan)
	}
	plans.mu.Lock()
	defer plans.mu.Unlock()
	m := maker{}
	p := m.plan(t)
	for t, p := range m { // all of them are complete now
		plans.made.Store(t, p)
	}
	return p
}

// maker makes plans. Types may refer to themselves, so a plan is known before it is complete.
type maker map[reflect.Type]*plan

func (m maker) plan(t reflect.Type) *plan {
	if p, ok := plans.made.Load(t); ok {
		return p.(*plan)
	}
	if p := m[t]; p != nil {
		return p
	}
	p := new(plan)
	m[t] = p
	m.makeEncoder(t, p)
	m.makeDecoder(t, p)
	return p
}

var (
	timeType              = reflect.TypeFor[time.Time]()
	errorType             = reflect.TypeFor[error]()
	customEncoderType     = reflect.TypeFor[msgpack.CustomEncoder]()
	marshalerType         = reflect.TypeFor[msgpack.Marshaler]()
	binaryMarshalerType   = reflect.TypeFor[encoding.BinaryMarshaler]()
	textMarshalerType     = reflect.TypeFor[encoding.TextMarshaler]()
	jsonMarshalerType     = reflect.TypeFor[json.Marshaler]()
	customDecoderType     = reflect.TypeFor[msgpack.CustomDecoder]()
	unmarshalerType       = reflect.TypeFor[msgpack.Unmarshaler]()
	binaryUnmarshalerType = reflect.TypeFor[encoding.BinaryUnmarshaler]()
	textUnmarshalerType   = reflect.TypeFor[encoding.TextUnmarshaler]()
)

// hasMethods reports whether t, or a pointer to it, implements iface. It is false for an interface, because its values
// decide.
func hasMethods(t, iface reflect.Type) bool {
	return t.Kind() != reflect.Interface && t.Kind() != reflect.Pointer && reflect.PointerTo(t).Implements(iface)
}

// addressed returns a pointer to v, or to a copy if v has no address.
func addressed(v reflect.Value) reflect.Value {
	if v.CanAddr() {
		return v.Addr()
	}
	p := reflect.New(v.Type())
	p.Elem().Set(v)
	return p
}

// isProtobuf reports whether t is the struct of a Protocol Buffers message.
func isProtobuf(t reflect.Type) bool {
	if t.Kind() != reflect.Struct {
		return false
	}
	_, ok := reflect.PointerTo(t).MethodByName("ProtoReflect")
	return ok
}
