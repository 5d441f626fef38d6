package stream

import (
	"encoding/json"
	"fmt"
	"sync"

	"github.com/vmihailenco/msgpack/v5"
)

// codecFlag is the DATA flag of a codec. The default is the caller's to resolve.
func codecFlag(c Codec) FrameFlags {
	if c == JSON {
		return FlagJSON
	}
	return FlagMsgPack
}

// encoder encodes one object into dst, as long as it has room, and moves it to spill when it has not. Encoders are
// reused: making one costs more than encoding most objects.
type encoder struct {
	dst     []byte // what was encoded; it never grows beyond its capacity
	spill   []byte
	spilled bool
	json    *json.Encoder
	msgpack *msgpack.Encoder
}

// maxSpill is the largest spill buffer that an idle encoder keeps.
const maxSpill = 64 << 10

var encoders = sync.Pool{New: func() any {
	e := new(encoder)
	e.json = json.NewEncoder(e)
	e.msgpack = msgpack.NewEncoder(e)
	return e
}}

// Write appends; it never fails.
func (e *encoder) Write(p []byte) (int, error) {
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
func (e *encoder) WriteByte(c byte) error {
	if !e.spilled && len(e.dst) < cap(e.dst) {
		e.dst = append(e.dst, c)
		return nil
	}
	_, err := e.Write([]byte{c})
	return err
}

// encode encodes v into dst, or into spill. What it returns is one of both and belongs to the encoder.
func (e *encoder) encode(v any, codec FrameFlags, dst []byte) ([]byte, error) {
	e.dst, e.spilled = dst[:0], false
	var err error
	if codec == FlagJSON {
		err = e.json.Encode(v)
	} else {
		e.msgpack.Reset(e) // options that a type's own EncodeMsgpack set are not the next object's
		err = e.msgpack.Encode(v)
	}
	b := e.dst
	if e.spilled {
		b = e.spill
	}
	if err == nil && codec == FlagJSON {
		b = b[:len(b)-1] // the newline that json.Marshal does not write
	}
	return b, err
}

// free gives e back.
func (e *encoder) free() {
	e.dst = nil
	if cap(e.spill) > maxSpill {
		e.spill = nil
	}
	encoders.Put(e)
}

// encodeUnlocked encodes v. It gives the lock up meanwhile: v's own methods may take their time, and the outbox, which
// serves all streams, must never wait for them. The caller has the turn.
func (w *Writer) encodeUnlocked(e *encoder, v any, dst []byte) ([]byte, error) {
	w.mu.Unlock()
	defer func() { // also where the encoder panics
		w.mu.Lock()
		w.encoding = false
	}()
	b, err := e.encode(v, w.codec, dst)
	if err != nil {
		err = fmt.Errorf("stream: encode %T: %w", v, err)
	}
	return b, err
}

// writeObjectLocked encodes straight into the open packet. What does not fit there is moved to a packet that it fits.
func (w *Writer) writeObjectLocked(v any) (int, error) {
	// The last object's size is the best guess at this one's.
	guess := FrameHeaderSize + w.object // kept: another object may change it while this one waits for credit
	if _, err := w.frameLocked(guess, false); err != nil {
		return 0, err
	}
	w.n -= guess // room, not written yet
	w.turn, w.room = true, nil
	defer w.endTurnLocked()

	start, limit := w.n+FrameHeaderSize, min(len(w.open.buf), w.coalesceLimit())
	packet, p := w.open, w.open.buf
	w.encoding = true
	e := encoders.Get().(*encoder)
	defer e.free()
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
	case !e.spilled && w.open == packet:
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

// decodeObject decodes a record by its frame's codec; a raw one by what the stream asked for.
func decodeObject(p []byte, flags, asked FrameFlags, v any) error {
	codec := flags & FlagCodecMask
	if codec == FlagRaw {
		codec = asked
	}
	var err error
	if codec == FlagJSON {
		err = json.Unmarshal(p, v)
	} else {
		if v, ok := v.(*any); ok && v != nil {
			*v = nil // else the decoder tries to fill the value of the record before
		}
		err = decodeMsgPack(p, v)
	}
	if err != nil {
		return fmt.Errorf("stream: decode record of %d bytes into %T: %w", len(p), v, err)
	}
	return nil
}
