package tap

import (
	"bytes"
)

// This file follows the commands that nats.go writes: it finds the subscriptions, and the ends of commands, between
// which other messages may be written. nats.go's writers run it. The goroutine that publishes runs boundary. Both hold
// outgoing.mu.

// maxCommand bounds the line of a command that a write has cut. A CONNECT may hold a token of several kilobytes.
const maxCommand = 1 << 20

// commands is the position in the bytes that nats.go writes.
type commands struct {
	line   []byte // the beginning of a line that a write has cut
	skip   int    // bytes of a payload that are still to come
	opaque bool   // not understood: the rest is not followed
}

// boundary reports whether the position is between two commands.
func (c *commands) boundary() bool { return len(c.line) == 0 && c.skip == 0 && !c.opaque }

// write follows p, and calls subscribe for each subscription in it.
func (c *commands) write(p []byte, subscribe func(subject, queue []byte, sid int64)) {
	for len(p) > 0 && !c.opaque {
		if c.skip > 0 {
			n := min(c.skip, len(p))
			c.skip -= n
			p = p[n:]
			continue
		}
		end := bytes.IndexByte(p, '\n')
		if end < 0 {
			c.line = append(c.line, p...)
			c.opaque = len(c.line) > maxCommand
			return
		}
		line := p[:end+1]
		p = p[end+1:]
		if len(c.line) > 0 {
			line = append(c.line, line...)
			c.line = line[:0]
		}
		c.command(line, subscribe)
	}
}

// command acts on a whole line.
func (c *commands) command(line []byte, subscribe func(subject, queue []byte, sid int64)) {
	line, ok := bytes.CutSuffix(line, crlf)
	if !ok {
		c.opaque = true
		return
	}
	switch {
	case bytes.HasPrefix(line, []byte("PUB ")), bytes.HasPrefix(line, []byte("HPUB ")):
		size, ok := number(line[bytes.LastIndexByte(line, ' ')+1:])
		if !ok {
			c.opaque = true
			return
		}
		c.skip = size + len(crlf)
	case bytes.HasPrefix(line, []byte("SUB ")):
		fields := bytes.Split(line[len("SUB "):], []byte{' '}) // nats.go writes the queue group also if it is empty
		if len(fields) != 3 {
			return
		}
		if sid, ok := number(fields[2]); ok {
			subscribe(fields[0], fields[1], int64(sid))
		}
	}
}

var crlf = []byte("\r\n")

// maxNumber bounds the numbers of both directions: sizes of messages, and numbers of subscriptions.
const maxNumber = 1 << 30

// number parses a decimal number without sign.
func number(b []byte) (n int, ok bool) {
	if len(b) == 0 || len(b) > 10 {
		return 0, false
	}
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		if n = 10*n + int(c-'0'); n > maxNumber {
			return 0, false
		}
	}
	return n, true
}
