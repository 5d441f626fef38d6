package stream

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/object"
)

// This file sends and receives objects with internal/object. Writers run the encoding, with the turn of the Writer, and the reader
// runs the decoding.

// codecFlag returns the DATA flag of a codec. The caller must replace CodecDefault before.
func codecFlag(c Codec) FrameFlags {
	if c == JSON {
		return FlagJSON
	}
	return FlagMsgPack
}

// objectCodec is the codec that a DATA flag names.
func objectCodec(flag FrameFlags) object.Codec {
	if flag == FlagJSON {
		return object.JSON
	}
	return object.MsgPack
}

// encodeUnlocked encodes v without the lock: methods of v may take long, and the outbox, which serves all streams, must never
// wait for them. The caller has the turn.
func (w *Writer) encodeUnlocked(e *object.Encoder, v any, dst []byte) ([]byte, error) {
	w.mu.Unlock()
	defer func() { // also if the encoder panics
		w.mu.Lock()
		w.encoding = false
	}()
	b, err := e.Encode(v, objectCodec(w.codec), dst)
	if err != nil {
		err = &objectError{fmt.Sprintf("stream: encode %T: ", v), err}
	}
	return b, err
}

// writeObjectLocked encodes straight into the open packet. An object that does not fit is moved to a larger packet.
func (w *Writer) writeObjectLocked(v any) (int, error) {
	// The last object's size is the best guess at this one's.
	guess := FrameHeaderSize + w.object // kept: another object may change it while this one waits for credit
	if _, err := w.frameLocked(guess, false); err != nil {
		return 0, err
	}
	w.n -= guess // room, not written yet
	w.turn, w.fast = true, nil
	defer w.endTurnLocked()

	start, limit := w.n+FrameHeaderSize, min(len(w.open.buf), w.coalesceLimit())
	packet, p := w.open, w.open.buf
	w.encoding = true
	e := object.NewEncoder()
	defer e.Free()
	record, err := w.encodeUnlocked(e, v, p[start:start:max(start, limit)])
	if err != nil {
		return 0, err
	}
	if err := w.failedLocked(); err != nil {
		return 0, err
	}
	n := len(record)
	w.object = min(n, coalesceSize/8)
	switch max := w.session.ep.maxRecord; {
	case n > max:
		return 0, fmt.Errorf("%w: %T of %d bytes, MaxRecordSize is %d", ErrRecordTooLarge, v, n, max)
	case !e.Spilled() && w.open == packet:
		putFrameHeader(p[w.n:], FrameData, w.codec, 0, n)
		w.n = start + n
	case n <= w.singleLimit():
		err = w.appendLocked(record, w.codec, true)
	default:
		err = w.appendPiecesLocked(record, w.codec)
	}
	if err != nil {
		return 0, err
	}
	return n, nil
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

// objectError is the error of an object that cannot be decoded. It wraps an error that methods of the user may have returned. It
// matches the same errors as the wrapped one, except errors that report the end of a stream, because the stream goes on.
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
