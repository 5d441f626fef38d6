// Package cborcodec is a codec of package typed for CBOR (RFC 8949).
//
//	typed.Open[Query, Price](ctx, client, "prices", query, typed.WithCodecs(cborcodec.Codec))
//
// Names of fields are those of cbor tags, or of json tags. The limits are those of package cbor: 32 levels of nesting
// and 131,072 elements of an array or a map.
package cborcodec

import (
	"bytes"

	"github.com/fxamacker/cbor/v2"

	"github.com/natsstream/stream/typed"
)

// Codec encodes values as CBOR. Its name is cbor.
var Codec typed.Codec = codec{}

type codec struct{}

func (codec) Name() string { return "cbor" }

// Append appends the encoding of v.
func (codec) Append(dst []byte, v any) ([]byte, error) {
	b := bytes.NewBuffer(dst)
	err := encoding.MarshalToBuffer(v, b)
	if err != nil {
		return dst, err
	}
	return b.Bytes(), nil
}

// Decode decodes data into v. Bytes behind the value are an error.
func (codec) Decode(data []byte, v any) error { return cbor.Unmarshal(data, v) }

var encoding = func() cbor.UserBufferEncMode {
	m, err := cbor.EncOptions{}.UserBufferEncMode()
	if err != nil {
		panic(err) // the options are constant
	}
	return m
}()
