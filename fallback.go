package stream

import (
	"fmt"

	"github.com/natsstream/stream/internal/jsonwire"
	"github.com/natsstream/stream/internal/object"
)

// This file writes and reads the JSON fallback, the original wire format: one message for each record, no sequence
// numbers, no credit; docs/PROTOCOL.md section 11. Writers run the append functions with the lock held, and the reader
// runs parseJSON.

// StreamingMsgType is the kind of a [StreamingMsg]: a record or the end of the stream.
type StreamingMsgType int

const (
	StreamingMsgTypeData  StreamingMsgType = 1
	StreamingMsgTypeClose StreamingMsgType = 2
)

// StreamingMsg is one message of the original protocol: {"type":1,"data":"<base64>"} or
// {"type":2,"closeError":{"Code":1000,"Text":""}}.
type StreamingMsg struct {
	Type       StreamingMsgType `json:"type"`
	Data       []byte           `json:"data,omitempty"`
	CloseError *CloseError      `json:"closeError,omitempty"`
}

// fallbackRecord returns the size of the largest record that makes a message of at most maxPayload bytes.
func fallbackRecord(maxPayload int) int {
	return min(coalesceSize, max(1, jsonwire.MaxRecord(maxPayload)))
}

// parseJSON decodes a message of a fallback peer. It returns a record, the end of the stream, or, for an invalid message, the
// error to end the stream with. A record is decoded in place: it is a sub-slice of NATS's buffer, as with a binary peer.
func parseJSON(b []byte) (record []byte, end, broken *CloseError) {
	record, c, err := jsonwire.Parse(b)
	switch {
	case err == jsonwire.ErrNoCloseError:
		return nil, nil, protocolError(CloseProtocolError, "%v", err)
	case err != nil:
		return nil, nil, protocolError(CloseUnsupportedData, "%v", err)
	}
	return record, (*CloseError)(c), nil
}

// appendJSONLocked queues the message for one record. A fallback peer grants no credit, so this end sets the window itself.
func (w *Writer) appendJSONLocked(p []byte, mine bool) error {
	size := jsonwire.DataSize(len(p))
	if max := int(w.session.ep.maxPayload.Load()); size > max {
		return fmt.Errorf("%w: %d bytes make a message of %d, the server takes %d (max_payload) and the consumer knows no pieces",
			ErrRecordTooLarge, len(p), size, max)
	}
	for !w.creditLocked() {
		if err := w.waitCreditLocked(mine); err != nil {
			return err
		}
	}
	w.open = getPacket(size)
	w.keepLocked(w.open)
	w.n = len(jsonwire.AppendData(w.open.buf[:0], p))
	w.sealLocked()
	w.markLocked()
	return nil
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

func (pk *packer) appendCloseJSONLocked(code int, reason string) {
	m := jsonwire.AppendClose(nil, jsonwire.Close{Code: code, Text: cutReason(reason, pk.session.ep.reasonLimit())})
	pk.open = getPacket(len(m))
	pk.keepLocked(pk.open)
	pk.n = copy(pk.open.buf, m)
	pk.closed.Store(true)
	pk.closing = CloseError{code, reason}
	pk.sealLocked()
}
