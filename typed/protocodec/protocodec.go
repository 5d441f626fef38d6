// Package protocodec is a codec of package typed for Protocol Buffers.
//
//	typed.Open[*pb.Query, *pb.Price](ctx, client, "prices", query, typed.WithCodecs(protocodec.Codec))
//
// The types of records are pointers to generated messages.
package protocodec

import (
	"fmt"
	"reflect"

	"google.golang.org/protobuf/proto"

	"github.com/natsstream/stream/typed"
)

// Codec encodes messages as Protocol Buffers. Its name is protobuf.
var Codec typed.Codec = codec{}

type codec struct{}

func (codec) Name() string { return "protobuf" }

// Append appends the encoding of v, a message.
func (codec) Append(dst []byte, v any) ([]byte, error) {
	m, ok := v.(proto.Message)
	if !ok || !m.ProtoReflect().IsValid() {
		return dst, fmt.Errorf("a %T is no message, or nil: use a pointer to a generated type", v)
	}
	return proto.MarshalOptions{}.MarshalAppend(dst, m)
}

// Decode decodes data into v, a message or a pointer to a pointer to one. It makes the message if that pointer is nil.
func (codec) Decode(data []byte, v any) error {
	m, ok := v.(proto.Message)
	if !ok {
		p := reflect.ValueOf(v)
		if p.Kind() != reflect.Pointer || p.IsNil() || p.Elem().Kind() != reflect.Pointer {
			return fmt.Errorf("a %T is no message: use a pointer to a generated type", v)
		}
		target := p.Elem()
		if target.IsNil() {
			target.Set(reflect.New(target.Type().Elem()))
		}
		if m, ok = target.Interface().(proto.Message); !ok {
			return fmt.Errorf("a %T is no message: use a pointer to a generated type", v)
		}
	}
	return proto.Unmarshal(data, m)
}
