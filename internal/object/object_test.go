package object

import (
	"bytes"
	"testing"

	"github.com/vmihailenco/msgpack/v5"
)

// arrayOptions is an object whose encoding changes the encoder's options.
type arrayOptions struct{}

func (arrayOptions) EncodeMsgpack(e *msgpack.Encoder) error {
	e.UseArrayEncodedStructs(true)
	e.UseCompactInts(true)
	e.UseCompactFloats(true)
	e.SetSortMapKeys(true)
	e.SetOmitEmpty(true)
	e.SetCustomStructTag("other")
	return e.EncodeInt(1)
}

// An encoder serves one object after the other. What one sets is not the next one's.
func TestEncoderOptionsEndWithObject(t *testing.T) {
	object := struct {
		X     int `other:"Y"`
		Empty string
		Float float64
	}{X: 1, Float: 2}
	want, err := msgpack.Marshal(object)
	if err != nil {
		t.Fatal(err)
	}
	e := newEncoder()
	for round := range 2 {
		if got, err := e.Encode(object, MsgPack, nil); err != nil || !bytes.Equal(got, want) {
			t.Errorf("round %d: %x, %v; want %x", round, got, err, want)
		}
		if _, err := e.Encode(arrayOptions{}, MsgPack, nil); err != nil {
			t.Error(err)
		}
	}
}

// What one record was decoded into is no template for the next.
func TestDecodeIntoTheSameInterface(t *testing.T) {
	var v any
	for i := range 3 {
		p, err := msgpack.Marshal(map[string]any{"i": int8(i)})
		if err != nil {
			t.Fatal(err)
		}
		if err := Decode(p, MsgPack, &v); err != nil {
			t.Fatal(err)
		}
		if m, ok := v.(map[string]any); !ok || m["i"] != int8(i) {
			t.Errorf("record %d: %v", i, v)
		}
	}
}
