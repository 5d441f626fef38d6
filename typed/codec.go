package typed

import (
	"github.com/natsstream/stream/internal/object"
)

// Codec is an encoding of records. Its methods may be called by many goroutines at once.
type Codec interface {
	// Name is the name of the codec on the wire, for example json: letters, digits and dashes.
	Name() string
	// Append appends the encoding of v to dst and returns the longer slice. It keeps neither.
	Append(dst []byte, v any) ([]byte, error)
	// Decode decodes data into v, a pointer. It does not keep data, which is valid only during the call.
	Decode(data []byte, v any) error
}

// JSON and MsgPack are the codecs of the library itself. They encode as [stream.Writer.WriteObject] does, and decode as
// [stream.Stream.RecvObject] does.
var (
	JSON    Codec = codec{"json", object.JSON}
	MsgPack Codec = codec{"msgpack", object.MsgPack}
)

type codec struct {
	name string
	kind object.Codec
}

func (c codec) Name() string { return c.name }

func (c codec) Append(dst []byte, v any) ([]byte, error) {
	e := object.NewEncoder()
	defer e.Free()
	b, err := e.Encode(v, c.kind, dst[len(dst):])
	if err != nil {
		return dst, err
	}
	if e.Spilled() {
		return append(dst, b...), nil
	}
	return dst[:len(dst)+len(b)], nil
}

func (c codec) Decode(data []byte, v any) error { return object.Decode(data, c.kind, v) }
