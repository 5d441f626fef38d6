package stream

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go"
)

// This file encodes headers for META frames, in writers, and decodes them, in the reader; docs/PROTOCOL.md section 5.6.

// maxMeta is the longest META payload in bytes.
const maxMeta = 16 << 10

const (
	metaHead = "NATS/1.0\r\n"
	metaEOL  = "\r\n"
)

// ErrHeader is returned by SetHeader and SetTrailer for headers that cannot be sent. The text of the error gives the reason.
// Nothing was sent, and the writer stays usable.
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

// SetHeader sends h to the consumer, at which [Stream.Header] returns it. Call it once, before the first record. The headers
// are sent with the first record, or by [Writer.Flush] or [Writer.Close]. h may be changed afterwards. As in NATS's own
// headers, white space around a value is not kept, and a name without values is not sent. A consumer that speaks only the
// JSON fallback gets no headers.
//
// Errors: [ErrHeader] after the first record or an earlier SetHeader, or if h cannot be sent; those of [Writer.Write].
func (w *Writer) SetHeader(h nats.Header) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.awaitTurnLocked(); err != nil {
		return err
	}
	meta, err := w.meta(h)
	if err != nil || w.session.peerTakesJSON() {
		return err
	}
	if w.sealed > 0 || w.open != nil && w.n > PacketHeaderSize {
		return fmt.Errorf("%w: set it once, before the first record", ErrHeader)
	}
	b, err := w.frameLocked(FrameHeaderSize+len(meta), false)
	if err != nil {
		return err
	}
	putFrameHeader(b, FrameMeta, 0, 0, len(meta))
	copy(b[FrameHeaderSize:], meta)
	return nil
}

// SetTrailer sends h to the consumer with the end of the stream. [Stream.Trailer] returns it there. The last call before
// Close counts. h may be changed afterwards. A consumer that speaks only the JSON fallback gets no trailers.
//
// Errors: [ErrHeader] if h cannot be sent; [ErrClosed] after Close; the error that ended the stream.
func (w *Writer) SetTrailer(h nats.Header) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.awaitTurnLocked(); err != nil {
		return err
	}
	meta, err := w.meta(h)
	if err != nil {
		return err
	}
	w.trailer = meta
	return nil
}

// meta encodes h, if it fits.
func (w *Writer) meta(h nats.Header) ([]byte, error) {
	meta, err := appendMeta(nil, h)
	most := int(w.session.ep.maxPayload.Load()) - PacketHeaderSize - 3*FrameHeaderSize - MaxReason // CLOSE goes with trailers
	if max := min(maxMeta, most); err == nil && len(meta) > max {
		err = fmt.Errorf("%w: %d bytes, at most %d can be sent", ErrHeader, len(meta), max)
	}
	return meta, err
}
