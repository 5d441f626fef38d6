package stream

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"

	"github.com/natsstream/stream/internal/object"
)

// The JSON fallback is the original wire format, byte for byte: one message a record, no sequence numbers, no credit.
// docs/PROTOCOL.md section 11.

// StreamingMsgType says what a StreamingMsg carries.
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

const (
	jsonDataHead = `{"type":1,"data":"`
	jsonDataTail = `"}`
	jsonEmpty    = `{"type":1}` // what encoding/json makes of a record of no bytes
)

// appendJSONData appends the message for one record, as encoding/json would write it.
func appendJSONData(dst, record []byte) []byte {
	if len(record) == 0 {
		return append(dst, jsonEmpty...)
	}
	dst = append(dst, jsonDataHead...)
	dst = base64.StdEncoding.AppendEncode(dst, record)
	return append(dst, jsonDataTail...)
}

// appendJSONClose appends the message for the end of a stream.
func appendJSONClose(dst []byte, e CloseError) []byte {
	m, err := json.Marshal(StreamingMsg{Type: StreamingMsgTypeClose, CloseError: &e})
	if err != nil {
		panic(err) // a number and a string: there is nothing to go wrong
	}
	return append(dst, m...)
}

func jsonDataSize(n int) int {
	return len(jsonDataHead) + base64.StdEncoding.EncodedLen(n) + len(jsonDataTail)
}

// fallbackRecord is the largest record whose message fits into maxPayload bytes.
func fallbackRecord(maxPayload int) int {
	return min(coalesceSize, max(1, (maxPayload-jsonDataSize(0))/4*3))
}

// parseJSON decodes a message of a fallback peer. A record is decoded in place, over the message it came in: the
// reader's record is a sub-slice of NATS's buffer here too.
func parseJSON(b []byte) (record []byte, end, broken *CloseError) {
	if data, ok := bytes.CutPrefix(b, []byte(jsonDataHead)); ok {
		if data, ok := bytes.CutSuffix(data, []byte(jsonDataTail)); ok && bytes.IndexByte(data, '\\') < 0 && bytes.IndexByte(data, '"') < 0 {
			// The decoder writes at b[0:] and reads from b[len(jsonDataHead):], always ahead of itself. What it
			// rejects is an error for encoding/json as well, so nothing needs the bytes it overwrote. It skips line
			// breaks, which no JSON string may hold.
			n, err := base64.StdEncoding.Decode(b, data)
			if err != nil || base64.StdEncoding.EncodedLen(n) != len(data) {
				return nil, nil, protocolError(CloseUnsupportedData, "record of the JSON fallback is not base64")
			}
			return b[:n:n], nil, nil
		}
	}
	var m StreamingMsg
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, nil, protocolError(CloseUnsupportedData, "message is neither a packet nor JSON: %v", err)
	}
	switch {
	case m.Type == StreamingMsgTypeData:
		return m.Data, nil, nil
	case m.Type == StreamingMsgTypeClose && m.CloseError != nil:
		return nil, m.CloseError, nil
	case m.Type == StreamingMsgTypeClose:
		return nil, nil, protocolError(CloseProtocolError, "close message without closeError")
	}
	return nil, nil, protocolError(CloseUnsupportedData, "unknown message type %d", m.Type)
}

// appendJSONLocked queues the message for one record. The window toward a fallback peer is this end's own.
func (w *Writer) appendJSONLocked(p []byte, mine bool) error {
	size := jsonDataSize(len(p))
	if max := int(w.session.ep.maxPayload.Load()); size > max {
		return fmt.Errorf("%w: %d bytes make a message of %d, the server takes %d and the consumer knows no pieces",
			ErrRecordTooLarge, len(p), size, max)
	}
	for !w.creditLocked() {
		if err := w.waitCreditLocked(mine); err != nil {
			return err
		}
	}
	w.open = getPacket(size)
	w.n = len(appendJSONData(w.open.buf[:0], p))
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

func (w *Writer) appendCloseJSONLocked(code int, reason string) error {
	m := appendJSONClose(nil, CloseError{code, cutReason(reason, w.session.ep.reasonLimit())})
	w.open = getPacket(len(m))
	w.n = copy(w.open.buf, m)
	w.closed.Store(true)
	w.closing = CloseError{code, reason}
	w.sealLocked()
	return nil
}
