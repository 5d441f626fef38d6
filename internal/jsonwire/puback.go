package jsonwire

import (
	"bytes"
	"encoding/json"
)

// maxPubAck is more than any acknowledgement of JetStream takes: two names of at most 255 bytes, a description of an
// error, numbers. Longer messages are not looked at, so that the mux spends little on them.
const maxPubAck = 4 << 10

// IsPubAck reports whether b is JetStream's acknowledgement of a message, or its refusal. A JetStream stream on the
// subject of a request sends these to the request's reply subject. They have no type, and messages of the fallback have
// one.
func IsPubAck(b []byte) bool {
	if len(b) > maxPubAck || bytes.HasPrefix(b, []byte(`{"type":`)) || len(b) == 0 || b[0] != '{' {
		return false
	}
	var m struct {
		Type   json.RawMessage `json:"type"`
		Stream *string         `json:"stream"`
		Seq    *uint64         `json:"seq"`
		Error  *struct {
			Code    int `json:"code"`
			ErrCode int `json:"err_code"`
		} `json:"error"`
	}
	if json.Unmarshal(b, &m) != nil || m.Type != nil {
		return false
	}
	return m.Stream != nil && *m.Stream != "" && m.Seq != nil || m.Error != nil && m.Error.Code != 0 && m.Error.ErrCode != 0
}
