// Package jsonwire encodes and decodes the messages of the original protocol, the JSON fallback of docs/PROTOCOL.md
// section 11: {"type":1,"data":"<base64>"} for a record, {"type":2,"closeError":{"Code":1000,"Text":""}} for the end of
// a stream. It writes the same bytes as encoding/json and accepts the same messages. Records do not pass through
// encoding/json.
//
// The functions keep nothing. Any goroutine may call them.
package jsonwire

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
)

// Types of messages.
const (
	typeData  = 1
	typeClose = 2
)

// message is the form of both messages for encoding/json.
type message struct {
	Type       int    `json:"type"`
	Data       []byte `json:"data,omitempty"`
	CloseError *Close `json:"closeError,omitempty"`
}

// Close is the end of a stream as a message states it.
type Close struct {
	Code int
	Text string
}

const (
	dataHead = `{"type":1,"data":"`
	dataTail = `"}`
	empty    = `{"type":1}` // encoding/json omits a record of no bytes
)

// AppendData appends the message for one record to dst. It allocates nothing if dst has room for [DataSize] bytes.
func AppendData(dst, record []byte) []byte {
	if len(record) == 0 {
		return append(dst, empty...)
	}
	dst = append(dst, dataHead...)
	dst = base64.StdEncoding.AppendEncode(dst, record)
	return append(dst, dataTail...)
}

// DataSize returns how many bytes the message for a record of n bytes takes at most.
func DataSize(n int) int {
	return len(dataHead) + base64.StdEncoding.EncodedLen(n) + len(dataTail)
}

// MaxRecord returns the length of the largest record that makes a message of at most size bytes. It is not positive if
// not even a record of one byte fits.
func MaxRecord(size int) int { return (size - DataSize(0)) / 4 * 3 }

// AppendClose appends the message for the end of a stream to dst.
func AppendClose(dst []byte, c Close) []byte {
	m, err := json.Marshal(message{Type: typeClose, CloseError: &c})
	if err != nil {
		panic(err) // impossible for a number and a string
	}
	return append(dst, m...)
}

// ErrNoCloseError is the error of [Parse] for a message that ends the stream without a close error.
var ErrNoCloseError = errors.New("close message without closeError")

// Parse decodes one message. For a record it returns record, for the end of a stream it returns end. Any other error
// than [ErrNoCloseError] means that b is no message of the protocol.
//
// A record as this package encodes it is decoded in place: it overwrites the message, and lies in b. It allocates
// nothing. All other messages go through encoding/json. b is not to be used after Parse.
func Parse(b []byte) (record []byte, end *Close, err error) {
	if data, ok := bytes.CutPrefix(b, []byte(dataHead)); ok {
		if data, ok := bytes.CutSuffix(data, []byte(dataTail)); ok && bytes.IndexByte(data, '\\') < 0 && bytes.IndexByte(data, '"') < 0 {
			// The decoder writes at b[0:] and reads from b[len(dataHead):], always ahead of itself. The input that it
			// rejects is an error for encoding/json as well, so nothing needs the bytes it overwrote. It skips line
			// breaks, which no JSON string may hold.
			n, err := base64.StdEncoding.Decode(b, data)
			if err != nil || base64.StdEncoding.EncodedLen(n) != len(data) {
				return nil, nil, errNotBase64
			}
			return b[:n:n], nil, nil
		}
	}
	var m message
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, nil, fmt.Errorf("message is neither a packet nor JSON: %w", err)
	}
	switch {
	case m.Type == typeData:
		return m.Data, nil, nil
	case m.Type == typeClose && m.CloseError != nil:
		return nil, m.CloseError, nil
	case m.Type == typeClose:
		return nil, nil, ErrNoCloseError
	}
	return nil, nil, fmt.Errorf("unknown message type %d", m.Type)
}

var errNotBase64 = errors.New("record of the JSON fallback is not base64")
