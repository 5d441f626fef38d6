package stream

import "github.com/natsstream/stream/internal/jsonwire"

// This file has the messages of the JSON fallback, the original wire format: one message for each record, no sequence
// numbers, no credit; docs/PROTOCOL.md section 11. Its functions touch no state, and any goroutine may call them.

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

// parseJSON decodes a message of a fallback peer. It returns a record, the end of the stream, or, for an invalid
// message, the error to end the stream with. A record is decoded in place: it is a sub-slice of NATS's buffer, as with
// a binary peer.
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
