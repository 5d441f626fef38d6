package streamgrpc

import (
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
)

// oldCodec adapts a codec of the first version to the interface of the second. Codecs run in the goroutine that sends
// or receives a message.
type oldCodec struct{ encoding.Codec }

func (c oldCodec) Marshal(v any) (mem.BufferSlice, error) {
	b, err := c.Codec.Marshal(v)
	if err != nil {
		return nil, err
	}
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

func (c oldCodec) Unmarshal(b mem.BufferSlice, v any) error {
	return c.Codec.Unmarshal(b.Materialize(), v)
}

// appendMessage appends the encoding of m to b.
func appendMessage(b []byte, codec encoding.CodecV2, m any) ([]byte, error) {
	encoded, err := codec.Marshal(m)
	if err != nil {
		return b, status.Errorf(codes.Internal, "encoding a %T: %v", m, err)
	}
	for _, part := range encoded {
		b = append(b, part.ReadOnlyData()...)
	}
	encoded.Free()
	return b, nil
}

// decode decodes an encoded message of at most limit bytes into m.
func decode(b []byte, limit int, codec encoding.CodecV2, m any) error {
	if len(b) > limit {
		return status.Errorf(codes.ResourceExhausted, "received a message of %d bytes, and at most %d are allowed: raise the limit of this end", len(b), limit)
	}
	if err := codec.Unmarshal(mem.BufferSlice{mem.SliceBuffer(b)}, m); err != nil {
		return status.Errorf(codes.Internal, "decoding a %T: %v", m, err)
	}
	return nil
}
