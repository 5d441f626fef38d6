package streamtest

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
)

// This file parses the part of the NATS client protocol that an Interceptor needs:
//
//	PUB subject [reply] size          MSG subject sid [reply] size
//	HPUB subject [reply] header total HMSG subject sid [reply] header total
//	SUB subject [queue] sid           UNSUB sid [max]
//
// After a line of the first two rows come as many bytes as it states, and CR LF.

// maxMessage is the largest message that any NATS server accepts, in bytes.
const maxMessage = 64 << 20

// errProtocol ends a connection on which the interceptor cannot parse the protocol.
var errProtocol = errors.New("streamtest: not the NATS protocol")

// flusher is a connection that forwards all bytes it has read before it waits for more.
type flusher struct {
	net.Conn
	t *tap
}

func (f flusher) Read(b []byte) (int, error) {
	f.t.flush()
	return f.Conn.Read(b)
}

// run forwards the bytes of src until src ends, and returns the error that ended it.
func (t *tap) run(src net.Conn, i *Interceptor) error {
	in := bufio.NewReaderSize(flusher{src, t}, 64<<10)
	m := &Message{}
	var body []byte
	for {
		line, err := in.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) { // INFO has no bound
			line = bytes.Clone(line)
			var rest []byte
			rest, err = in.ReadBytes('\n')
			line = append(line, rest...)
		}
		if err != nil {
			t.raw(line)
			return err
		}
		*m = Message{Dir: t.dir, Conn: t.conn}
		header, total, ok := t.parse(line, m)
		if !ok {
			t.raw(line)
			continue
		}
		if header < 0 || header > total || total > maxMessage {
			return errProtocol
		}
		if cap(body) < total+2 {
			body = make([]byte, total+2)
		}
		body = body[:total+2]
		if _, err := io.ReadFull(in, body); err != nil {
			return err
		}
		// The capacities end with the slices, so that a rule that appends to one does not overwrite the next bytes.
		m.Header, m.Data = body[:header:header], body[header:total:total]
		switch v := i.verdict(m); {
		case v.Drop:
			i.count(Counts{Dropped: 1})
		default:
			t.message(m, v)
			c := Counts{Passed: 1, Duplicated: v.Copies}
			if v.Hold > 0 {
				c.Held = 1
			}
			i.count(c)
		}
	}
}

// parse reads a control line. It returns false if no message follows the line. It records the subscriptions that SUB
// and UNSUB change. A size that is not a number is returned as -1.
func (t *tap) parse(line []byte, m *Message) (header, total int, ok bool) {
	var fields [6][]byte
	f := fields[:0]
	for field := range bytes.FieldsSeq(line) {
		if len(f) == cap(f) {
			return 0, 0, false // INFO or CONNECT with spaces
		}
		f = append(f, field)
	}
	if len(f) < 2 {
		return 0, 0, false
	}
	op, f := f[0], f[1:]
	sizes := 1
	switch {
	case t.dir == ToServer && is(op, "PUB"), t.dir == ToClient && is(op, "MSG"):
	case t.dir == ToServer && is(op, "HPUB"), t.dir == ToClient && is(op, "HMSG"):
		sizes = 2
	case t.dir == ToServer && is(op, "SUB"):
		t.subs.add(string(f[len(f)-1]), string(f[0]))
		return 0, 0, false
	case t.dir == ToServer && is(op, "UNSUB") && len(f) == 1: // with a maximum the subscription goes on for a while
		t.subs.remove(string(f[0]))
		return 0, 0, false
	default:
		return 0, 0, false
	}
	names := len(f) - sizes
	sid := int(t.dir) // 1 in the direction that has a sid
	if names < 1+sid || names > 2+sid {
		return -1, 0, true
	}
	m.Subject = string(f[0])
	if sid == 1 {
		m.sid = string(f[1])
	}
	if names == 2+sid {
		m.Reply = string(f[1+sid])
	}
	total = size(f[len(f)-1])
	if sizes == 2 {
		header = size(f[len(f)-2])
	}
	return header, total, true
}

func is(op []byte, name string) bool { return bytes.EqualFold(op, []byte(name)) }

func size(b []byte) int {
	n, err := strconv.Atoi(string(b))
	if err != nil {
		return -1
	}
	return n
}

// append appends m in the form of the protocol.
func (m *Message) append(b []byte) []byte {
	if len(m.Header) > 0 {
		b = append(b, 'H')
	}
	if m.Dir == ToServer {
		b = append(append(b, "PUB "...), m.Subject...)
	} else {
		b = append(append(b, "MSG "...), m.Subject...)
		b = append(append(b, ' '), m.sid...)
	}
	if m.Reply != "" {
		b = append(append(b, ' '), m.Reply...)
	}
	if len(m.Header) > 0 {
		b = strconv.AppendInt(append(b, ' '), int64(len(m.Header)), 10)
	}
	b = strconv.AppendInt(append(b, ' '), int64(len(m.Header)+len(m.Data)), 10)
	b = append(append(b, "\r\n"...), m.Header...)
	return append(append(b, m.Data...), "\r\n"...)
}

// subscriptions are the subscriptions of one client.
type subscriptions struct {
	mu sync.Mutex
	m  map[string]string // subject by sid
}

func (s *subscriptions) add(sid, subject string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.m == nil {
		s.m = map[string]string{}
	}
	s.m[sid] = subject
}

func (s *subscriptions) remove(sid string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.m, sid)
}

// match returns the ids of the subscriptions to subject.
func (s *subscriptions) match(subject string) (sids []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for sid, pattern := range s.m {
		if matches(pattern, subject) {
			sids = append(sids, sid)
		}
	}
	return sids
}

// matches reports whether subject matches pattern, which may have the wildcards * and >.
func matches(pattern, subject string) bool {
	for {
		p, moreP, okP := strings.Cut(pattern, ".")
		s, moreS, okS := strings.Cut(subject, ".")
		if p == ">" {
			return true
		}
		if p != "*" && p != s || okP != okS {
			return false
		}
		if !okP {
			return true
		}
		pattern, subject = moreP, moreS
	}
}
