package stream

import (
	"fmt"

	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/object"
)

// This file encodes the objects of a Writer, and makes the messages for a fallback consumer. Writers run it, with the
// lock held or with the turn.

// WriteObject sends v as one record in the codec that the consumer requested, JSON or MessagePack. It returns the length of the
// encoding. It blocks and fails as [Writer.Write] does. An error of the encoder does not change the stream, and matches
// neither [ErrClosed] nor a [*CloseError]. WriteObject does not recover panics of methods of v. Methods that encode v must not
// write to the same Writer.
//
// Names, embedding and omission follow the json tags for both codecs, as encoding/json has them. A msgpack tag stands in for
// the json tag. MessagePack knows no ",string": it carries the number. It takes a value's form from the first of its
// methods EncodeMsgpack, MarshalMsgpack, MarshalBinary and MarshalText, and ignores MarshalJSON.
//
// These are errors: a value that is nested deeper than 10,000 levels or contains itself, for JSON also by an embedded pointer, a
// Protocol Buffers message (send the bytes of proto.Marshal with Write), and, for MessagePack, a struct without exported fields
// that only encodes itself as JSON.
func (w *Writer) WriteObject(v any) (n int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.awaitTurnLocked(true); err != nil {
		return 0, err
	}
	if w.session.peerTakesJSON() {
		return w.writeObjectJSONLocked(v)
	}
	return w.writeObjectLocked(v)
}

// writeObjectLocked encodes straight into the open packet. An object that does not fit is moved to a larger packet.
func (w *Writer) writeObjectLocked(v any) (n int, err error) {
	// The last object's size is the best guess at this one's.
	guess := FrameHeaderSize + int(w.object) // kept: another object may change it while this one waits for credit
	if _, err := w.frameLocked(guess, false); err != nil {
		return 0, err
	}
	w.n -= guess // room, not written yet
	w.turn, w.fast = true, nil
	defer func() {
		if err != errRestFollows { // otherwise the rest of the record has the turn
			w.endTurnLocked()
		}
	}()

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
	n = len(record)
	w.object = int32(min(n, coalesceSize/8))
	switch max := w.session.ep.maxRecord; {
	case n > max:
		return 0, fmt.Errorf("%w: %T of %d bytes, MaxRecordSize is %d", ErrRecordTooLarge, v, n, max)
	case !e.Spilled() && w.open == packet:
		putFrameHeader(p[w.n:], FrameData, w.codec, 0, n)
		w.n = start + n
		w.records++
	case n <= w.singleLimit():
		err = w.appendLocked(record, w.codec, true)
	default:
		err = w.appendPiecesLocked(record, w.codec)
	}
	if err != nil {
		return lengthSent(n, err), err
	}
	return n, nil
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

func (w *Writer) writeObjectJSONLocked(v any) (int, error) {
	e := object.NewEncoder()
	defer e.Free()
	w.turn = true
	defer w.endTurnLocked()
	record, err := w.encodeUnlocked(e, v, nil)
	if err != nil {
		return 0, err
	}
	if err := w.failedLocked(); err != nil {
		return 0, err
	}
	if max := w.session.ep.maxRecord; len(record) > max {
		return 0, fmt.Errorf("%w: %T of %d bytes, MaxRecordSize is %d", ErrRecordTooLarge, v, len(record), max)
	}
	if err := w.appendJSONLocked(record, true); err != nil {
		return 0, err
	}
	return len(record), nil
}

// appendJSONLocked queues the message for one record. A fallback peer grants no credit, so this end sets the window itself.
func (w *Writer) appendJSONLocked(p []byte, mine bool) error {
	if err := w.fitsJSON(len(p)); err != nil {
		return err
	}
	for !w.creditLocked() {
		if err := w.waitCreditLocked(mine); err != nil {
			return err
		}
	}
	w.putJSONLocked(p)
	return nil
}

// fitsJSON returns the error for a record of n bytes that fits no message of the fallback.
func (w *Writer) fitsJSON(n int) error {
	size := jsonwire.DataSize(n)
	if max := int(w.session.ep.maxPayload.Load()); size > max {
		return fmt.Errorf("%w: %d bytes make a message of %d, the server takes %d (max_payload) and the consumer knows no pieces",
			ErrRecordTooLarge, n, size, max)
	}
	return nil
}

// putJSONLocked queues the message for one record.
func (w *Writer) putJSONLocked(p []byte) {
	w.open = getPacket(jsonwire.DataSize(len(p)))
	w.keepLocked(w.open)
	w.n = len(jsonwire.AppendData(w.open.buf[:0], p))
	w.records++
	w.besideLocked(w.n - PacketHeaderSize - FrameHeaderSize - len(p))
	w.sealLocked()
	w.markLocked()
}
