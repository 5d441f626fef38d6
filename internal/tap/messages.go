package tap

import (
	"bytes"
)

// This file parses the lines of messages as NATS servers send them. It is stricter than nats.go: it leaves a line that
// it does not understand to nats.go, with all that follows. The goroutine in Conn.Read runs it.

// line is the parsed control line of a message. The slices are parts of the line.
type line struct {
	length  int // of the control line, with its end
	subject []byte
	sid     int64
	reply   []byte // nil if there is none
	header  int    // bytes of headers, at the front of the payload; 0 if there are none
	size    int    // bytes of the payload, with headers
}

// kind is the meaning of the bytes at the front.
type kind uint8

const (
	partial kind = iota // more bytes are needed
	message             // the control line of a message
	other               // another line
	unknown             // a line like that of a message, which nats.go has to judge
)

// maxLine bounds the control line of a message. A server sends less than 5 KiB, unless its max_control_line was raised.
const maxLine = 16 << 10

var (
	msgVerb  = []byte("MSG ")
	hmsgVerb = []byte("HMSG ")
)

// parseLine parses the line at the front of b, which is not empty.
func parseLine(b []byte) (l line, k kind) {
	switch b[0] {
	case 'M', 'H':
	case 'm', 'h':
		return l, unknown
	default:
		return l, other
	}
	end := bytes.IndexByte(b[:min(len(b), maxLine)], '\n')
	if end < 0 {
		if len(b) >= maxLine {
			return l, unknown
		}
		return l, partial
	}
	args, ok := bytes.CutSuffix(b[:end+1], crlf)
	l.length = end + 1
	headers := false
	if rest, is := bytes.CutPrefix(args, msgVerb); is {
		args = rest
	} else if rest, is := bytes.CutPrefix(args, hmsgVerb); is {
		args, headers = rest, true
	} else {
		return l, unknown
	}
	if !ok || !l.parse(args, headers) {
		return l, unknown
	}
	return l, message
}

// parse parses the arguments of a message: its subject, the number of its subscription, perhaps a reply subject, the
// size of its headers if it has any, and its size.
func (l *line) parse(args []byte, headers bool) bool {
	var ok bool
	if l.subject, args, ok = cutField(args); !ok {
		return false
	}
	var f []byte
	if f, args, ok = cutField(args); !ok {
		return false
	}
	sid, ok := number(f)
	if !ok {
		return false
	}
	l.sid = int64(sid)
	numbers := 1
	if headers {
		numbers = 2
	}
	if bytes.Count(args, []byte{' '}) == numbers {
		if l.reply, args, ok = cutField(args); !ok {
			return false
		}
	}
	if headers {
		if f, args, ok = cutField(args); !ok {
			return false
		}
		if l.header, ok = number(f); !ok {
			return false
		}
	}
	if l.size, ok = number(args); !ok {
		return false
	}
	return l.header <= l.size && l.size <= maxMessage
}

// maxMessage bounds the payload of a message: servers accept no larger max_payload.
const maxMessage = 64 << 20

// cutField returns the bytes before the first space, and those behind it. ok is false if either is missing, or if there
// is other white space.
func cutField(b []byte) (field, rest []byte, ok bool) {
	field, rest, ok = bytes.Cut(b, []byte{' '})
	return field, rest, ok && len(field) > 0 && !bytes.ContainsAny(field, "\t\r")
}
