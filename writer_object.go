package stream

import (
	"fmt"

	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/object"
)

// This file encodes the objects of a Writer, and makes the messages for a fallback consumer. Writers run it, with the
// lock of the packer or with the turn.

// WriteObject sends v as one record in the codec that the consumer requested, JSON or MessagePack. It returns the
// length of the encoding. It blocks and fails as [Writer.Write] does. An error of the encoder does not change the
// stream, and matches neither [ErrClosed] nor a [*CloseError]. WriteObject does not recover panics of methods of v.
// Methods that encode v must not write to the same Writer.
//
// In both codecs, the json tags set the names, embedding and omission of fields, as in encoding/json. A msgpack tag
// replaces the json tag. MessagePack ignores the option ",string", and carries the number. It encodes a value by the
// first of these methods that the value has: EncodeMsgpack, MarshalMsgpack, MarshalBinary and MarshalText. It ignores
// MarshalJSON.
//
// These values are errors:
//
//   - a value that is nested deeper than 10,000 levels
//   - a value that contains itself, for JSON also by an embedded pointer
//   - a Protocol Buffers message: send the bytes of proto.Marshal with Write
//   - for MessagePack, a struct without exported fields that only encodes itself as JSON
func (w *Writer) WriteObject(v any) (n int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.awaitTurnLocked(true); err != nil {
		return 0, err
	}
	e := object.NewEncoder()
	defer e.Free()
	return w.encodeLocked(v, w.codec, func(dst []byte) (record []byte, spilled bool, err error) {
		if record, err = e.Encode(v, objectCodec(w.codec), dst); err != nil {
			err = &objectError{fmt.Sprintf("stream: encode %T: ", v), err}
		}
		return record, e.Spilled(), err
	})
}

// WriteAppend sends one record that encode appends to dst, without a copy: dst is the rest of a packet. encode returns
// dst with the record behind it, as the Append functions of the standard library do. If the record does not fit, encode
// returns a longer slice, as append does, and WriteAppend copies the record. WriteAppend returns the length of the
// record. It blocks and fails as [Writer.Write] does. An error of encode does not change the stream, and WriteAppend
// returns it as it is. encode must not write to the same Writer, and must not keep dst.
func (w *Writer) WriteAppend(encode func(dst []byte) ([]byte, error)) (n int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.awaitTurnLocked(true); err != nil {
		return 0, err
	}
	return w.encodeLocked(nil, FlagRaw, func(dst []byte) (record []byte, spilled bool, err error) {
		record, err = encode(dst)
		return record, len(record) > 0 && (cap(dst) == 0 || &record[0] != &dst[:1][0]), err
	})
}

// encodeLocked writes the record that encode makes of v. encode gets room for a record. If the record does not fit,
// encode returns it in memory of its own, and reports spilled.
func (w *Writer) encodeLocked(v any, codec FrameFlags, encode func(dst []byte) (record []byte, spilled bool, err error)) (n int, err error) {
	if w.session.peerTakesJSON() {
		return w.encodeJSONLocked(v, encode)
	}
	return w.encodePacketLocked(v, codec, encode)
}

// encodePacketLocked encodes straight into the open packet. A record that does not fit is moved to a larger packet.
func (w *Writer) encodePacketLocked(v any, codec FrameFlags, encode func(dst []byte) (record []byte, spilled bool, err error)) (n int, err error) {
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
	record, spilled, err := w.encodeUnlocked(encode, p[start:start:max(start, limit)])
	if err != nil {
		return 0, err
	}
	if err := w.failedLocked(); err != nil {
		return 0, err
	}
	n = len(record)
	w.object = int32(min(n, coalesceSize/8))
	switch {
	case n > w.session.ep.maxRecord:
		return 0, w.tooLarge(v, n)
	case !spilled && w.open == packet:
		putFrameHeader(p[w.n:], FrameData, codec, 0, n)
		w.n = start + n
		w.records++
	case n <= w.singleLimit():
		err = w.appendLocked(record, codec, true)
	default:
		err = w.appendPiecesLocked(record, codec)
	}
	if err != nil {
		return lengthSent(n, err), err
	}
	return n, nil
}

// tooLarge returns the error for a record of n bytes that was made of v, or by a function of the user if v is nil.
func (w *Writer) tooLarge(v any, n int) error {
	name := "a record"
	if v != nil {
		name = fmt.Sprintf("%T", v)
	}
	return fmt.Errorf("%w: %s of %d bytes, MaxRecordSize is %d", ErrRecordTooLarge, name, n, w.session.ep.maxRecord)
}

// encodeUnlocked runs encode without the lock: methods of the user may take long, and the outbox, which serves all
// streams, must never wait for them. The caller has the turn.
func (w *Writer) encodeUnlocked(encode func(dst []byte) (record []byte, spilled bool, err error), dst []byte) ([]byte, bool, error) {
	w.mu.Unlock()
	defer func() { // also if the encoder panics
		w.mu.Lock()
		w.encoding = false
	}()
	return encode(dst)
}

func (w *Writer) encodeJSONLocked(v any, encode func(dst []byte) (record []byte, spilled bool, err error)) (int, error) {
	w.turn = true
	defer w.endTurnLocked()
	record, _, err := w.encodeUnlocked(encode, nil)
	if err != nil {
		return 0, err
	}
	if err := w.failedLocked(); err != nil {
		return 0, err
	}
	if len(record) > w.session.ep.maxRecord {
		return 0, w.tooLarge(v, len(record))
	}
	if err := w.appendJSONLocked(record, true); err != nil {
		return 0, err
	}
	return len(record), nil
}

// appendJSONLocked queues the message for one record. A fallback peer grants no credit, so this end sets the window
// itself.
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
