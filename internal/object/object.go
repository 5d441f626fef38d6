// Package object encodes Go values as records and decodes records into Go values. It knows bytes, codecs and values only.
package object

import (
	"encoding/json"
	"sync"

	"github.com/vmihailenco/msgpack/v5"
)

// Codec names an encoding of objects.
type Codec uint8

const (
	JSON Codec = iota
	MsgPack
)

// Encoder encodes one object into dst, as long as it has room, and moves it to spill when it has not. Encoders are
// reused: making one costs more than encoding most objects. It is for one goroutine at a time.
type Encoder struct {
	dst     []byte // what was encoded; it never grows beyond its capacity
	spill   []byte
	spilled bool
	json    *json.Encoder
	msgpack *msgpack.Encoder
}

// maxSpill is the largest spill buffer that an idle encoder keeps.
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

// Write appends; it never fails.
func (e *Encoder) Write(p []byte) (int, error) {
	switch {
	case e.spilled:
		e.spill = append(e.spill, p...)
	case len(p) <= cap(e.dst)-len(e.dst):
		e.dst = append(e.dst, p...)
	default:
		e.spilled = true
		e.spill = append(append(e.spill[:0], e.dst...), p...)
	}
	return len(p), nil
}

// WriteByte spares the msgpack encoder a wrapper.
func (e *Encoder) WriteByte(c byte) error {
	if !e.spilled && len(e.dst) < cap(e.dst) {
		e.dst = append(e.dst, c)
		return nil
	}
	_, err := e.Write([]byte{c})
	return err
}

// Encode encodes v into dst, or into a buffer of its own if dst has no room; Spilled tells. The result belongs to the
// encoder until Free or the next Encode.
func (e *Encoder) Encode(v any, codec Codec, dst []byte) ([]byte, error) {
	e.dst, e.spilled = dst[:0], false
	var err error
	if codec == JSON {
		err = e.json.Encode(v)
	} else {
		e.msgpack.Reset(e) // options that a type's own EncodeMsgpack set are not the next object's
		err = e.msgpack.Encode(v)
	}
	b := e.dst
	if e.spilled {
		b = e.spill
	}
	if err == nil && codec == JSON {
		b = b[:len(b)-1] // the newline that json.Marshal does not write
	}
	return b, err
}

// Spilled reports whether the last object did not fit into dst.
func (e *Encoder) Spilled() bool { return e.spilled }

// Free gives e back.
func (e *Encoder) Free() {
	e.dst = nil
	if cap(e.spill) > maxSpill {
		e.spill = nil
	}
	encoders.Put(e)
}

// Decode decodes the record p into v.
func Decode(p []byte, codec Codec, v any) error {
	if codec == JSON {
		return json.Unmarshal(p, v)
	}
	if v, ok := v.(*any); ok && v != nil {
		*v = nil // else the decoder tries to fill the value of the record before
	}
	return decodeMsgPack(p, v)
}
