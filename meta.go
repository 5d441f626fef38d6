package stream

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go"
)

// This file is the codec of the headers in META frames; docs/PROTOCOL.md section 5.6. Writers encode, and the reader
// decodes. Its functions touch no state.

// maxMeta is the longest META payload in bytes.
const maxMeta = 16 << 10

const (
	metaHead = "NATS/1.0\r\n"
	metaEOL  = "\r\n"
)

// ErrHeader is returned by SetHeader and SetTrailer for headers that cannot be sent. The text of the error gives the
// reason. Nothing was sent, and the writer stays usable.
var ErrHeader = errors.New("stream: headers cannot be sent")

// appendMeta appends h to dst.
func appendMeta(dst []byte, h nats.Header) ([]byte, error) {
	dst = append(dst, metaHead...)
	for key, values := range h {
		if key == "" || strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r == ':' || r >= 0x7f }) {
			return nil, fmt.Errorf("%w: %q is not the name of a header", ErrHeader, key)
		}
		for _, v := range values {
			if strings.ContainsAny(v, metaEOL) {
				return nil, fmt.Errorf("%w: the value of %s has a line break", ErrHeader, key)
			}
			dst = append(append(append(append(dst, key...), ": "...), v...), metaEOL...)
		}
	}
	return append(dst, metaEOL...), nil
}

// parseMeta is the reverse of appendMeta.
func parseMeta(b []byte) (nats.Header, error) {
	if len(b) > maxMeta {
		return nil, fmt.Errorf("%d bytes of headers, at most %d are taken", len(b), maxMeta)
	}
	if !bytes.HasPrefix(b, []byte(metaHead)) || !bytes.HasSuffix(b, []byte(metaEOL+metaEOL)) {
		return nil, errors.New("headers that do not begin with NATS/1.0 or do not end with an empty line")
	}
	return nats.DecodeHeadersMsg(b)
}
