// Package object encodes Go values as records and decodes records into Go values. It knows bytes, codecs and values
// only. The goroutine that calls Encode or Decode runs all of it. Goroutines share nothing but the plans, shapes
// and detachers of types.
//
// JSON is that of encoding/json. MessagePack acts like it:
//
//   - Names, embedding, hiding, "-", omitempty and omitzero of json tags hold for both codecs. A msgpack tag stands in
//     for the json tag; there are as_array, for a field _msgpack, alias:name and noinline as well. The option string of
//     a json tag is JSON's alone: MessagePack carries the number.
//   - Decoding into a value that is not empty has the same result as with json.Unmarshal.
//   - A number that the target cannot hold is an error. So are bytes behind the object.
//
// Types choose their form in MessagePack by methods, the first of: EncodeMsgpack, MarshalMsgpack, MarshalBinary,
// MarshalText. Functions registered with msgpack.Register are not called. A json.RawMessage travels as bytes, a
// json.Number as a string.
package object

import (
	"encoding/json"
	"reflect"
	"sync"

	"github.com/vmihailenco/msgpack/v5"
)

// Codec names an encoding of objects.
type Codec uint8

const (
	JSON Codec = iota
	MsgPack
)

// Encoder encodes one object into a given buffer. If that has no room, the encoder moves the object to a buffer of its
// own. Encoders are reused, because making one costs more than encoding most objects. One goroutine at a time may use
// an Encoder.
type Encoder struct {
	buf     []byte // the encoded bytes
	spilled bool   // buf is the encoder's own
	spill   []byte // its own, between objects

	// MessagePack.
	depth   int
	hops    int
	foreign bool // a method of the msgpack package wrote some of it
	stack   stackWatch
	last    reflect.Type
	plan    *plan // of last
	msgpack *msgpack.Encoder

	// JSON.
	lastJSON reflect.Type
	shape    *shape // of lastJSON
	json     *json.Encoder
}

// maxSpill is the largest buffer that an idle encoder keeps.
const maxSpill = 64 << 10

var encoders = sync.Pool{New: func() any { return newEncoder() }}

func newEncoder() *Encoder {
	e := new(Encoder)
	e.json = json.NewEncoder(e)
	e.msgpack = msgpack.NewEncoder(e)
	return e
}

// NewEncoder returns an encoder. Free gives it back.
func NewEncoder() *Encoder { return encoders.Get().(*Encoder) }

// Write appends the output of encoding/json or of a method of the user. It fails if the writer recurses too deeply.
func (e *Encoder) Write(p []byte) (int, error) {
	if e.stack.tooDeep() {
		return 0, errDepth
	}
	e.room(len(p))
	e.buf = append(e.buf, p...)
	return len(p), nil
}

// WriteByte is Write for one byte. It spares the encoder of the msgpack package a wrapper.
func (e *Encoder) WriteByte(c byte) error {
	if e.stack.tooDeep() {
		return errDepth
	}
	e.byte(c)
	return nil
}

// Encode encodes v into dst, or into a buffer of its own if dst has no room; see Spilled. The result belongs to the
// encoder until Free or the next Encode. A panic of a method of v passes through.
func (e *Encoder) Encode(v any, codec Codec, dst []byte) (b []byte, err error) {
	if e.spilled {
		e.spill = e.buf
	}
	e.buf, e.spilled = dst[:0], false
	if codec == JSON {
		err = e.encodeJSON(v)
	} else {
		err = e.encodeMsgPack(v)
	}
	return e.buf, err
}

// Spilled reports whether the last object did not fit into dst.
func (e *Encoder) Spilled() bool { return e.spilled }

// Free returns e to the pool of encoders.
func (e *Encoder) Free() {
	if e.spilled {
		e.spill = e.buf
	}
	e.buf, e.spilled = nil, false
	if cap(e.spill) > maxSpill {
		e.spill = nil
	}
	encoders.Put(e)
}

// Decode decodes the record p into v, a pointer that is not nil.
func Decode(p []byte, codec Codec, v any) error {
	if codec == JSON {
		return decodeJSON(p, v)
	}
	return decodeMsgPack(p, v)
}
