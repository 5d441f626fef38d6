package stream

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/object"
)

// This file connects the codecs of frames with those of internal/object, and has the errors of objects. Its functions
// touch no state, and any goroutine may run them.

// codecFlag returns the DATA flag of a codec, which must not be CodecDefault.
func codecFlag(c Codec) FrameFlags {
	if c == JSON {
		return FlagJSON
	}
	return FlagMsgPack
}

// codecOf returns the codec of a record with these DATA flags.
func codecOf(flags FrameFlags) Codec {
	switch flags & FlagCodecMask {
	case FlagJSON:
		return JSON
	case FlagMsgPack:
		return MsgPack
	}
	return CodecDefault
}

// objectCodec returns the codec that a DATA flag names.
func objectCodec(flag FrameFlags) object.Codec {
	if flag == FlagJSON {
		return object.JSON
	}
	return object.MsgPack
}

// decodeObject decodes a record by its frame's codec. A raw record is decoded by the codec that the stream requested.
func decodeObject(p []byte, flags, asked FrameFlags, v any) error {
	codec := flags & FlagCodecMask
	if codec == FlagRaw {
		codec = asked
	}
	if err := object.Decode(p, objectCodec(codec), v); err != nil {
		return &objectError{fmt.Sprintf("stream: decode record of %d bytes into %T: ", len(p), v), err}
	}
	return nil
}

// objectError is the error of an object that cannot be decoded. It wraps an error that methods of the user may have
// returned. It matches the same errors as the wrapped one, except errors that report the end of a stream, because the
// stream goes on.
type objectError struct {
	text string
	err  error
}

func (e *objectError) Error() string { return e.text + e.err.Error() }

// Is and As replace Unwrap, which would expose every error that err wraps.
func (e *objectError) Is(target error) bool {
	for _, end := range streamEnds {
		if target == end {
			return false
		}
	}
	if _, ok := target.(*CloseError); ok {
		return false
	}
	return errors.Is(e.err, target)
}

func (e *objectError) As(target any) bool {
	if _, ok := target.(**CloseError); ok {
		return false
	}
	return errors.As(e.err, target)
}

// streamEnds are the errors, beside *CloseError, that reads and writes return when a stream is over.
var streamEnds = []error{
	io.EOF, ErrClosed, ErrClientClosed, ErrServerClosed, ErrConcurrentRecv, ErrOneWay, context.Canceled, context.DeadlineExceeded,
	nats.ErrNoResponders, nats.ErrConnectionClosed, nats.ErrConnectionDraining,
}
