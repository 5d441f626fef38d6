package tap

import (
	"bytes"
	"strings"
	"sync/atomic"
	"unsafe"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/slab"
)

// This file parses the bytes that the server sends, and hands messages out. The goroutine in Conn.Read runs it, which
// is nats.go's reader.

// incoming is the receive buffer of a connection, and the position in the bytes that the server sends.
type incoming struct {
	conn   *Conn
	read   []byte      // read before the connection was tapped
	opaque atomic.Bool // not understood: nats.go gets all that follows

	slab       *slab.Slab // that buf is; nil if buf is the connection's own or a single message
	single     bool       // buf is for one message, and its handler gets it
	buf        []byte
	start, end int // of the bytes in buf that were read and not consumed

	payload int  // bytes that nats.go gets before the end of the message
	ending  int  // bytes of that end, CR and LF, that nats.go gets
	line    bool // nats.go gets the rest of this line

	want int // length of the message at start, if only a part of it was read; 0 if none is known
	last int // length of the last message that was taken

	own []byte // the connection's own buffer, used while there is no room for slabs
	msg nats.Msg

	held        *Sub   // the subscription of which the handler runs: its lock is held until next returns
	msgs, bytes uint64 // handed to it since then
}

func (in *incoming) init(c *Conn, read []byte) { in.conn, in.read = c, read }

const (
	minRead   = 4 << 10  // a slab with less room is replaced
	alwaysOut = 1 << 10  // shorter messages are copied while slabs are scarce
	cutsFrom  = 4 << 10  // reads end at the end of a message if the last one was at least as long
	ownSize   = 64 << 10 // of the connection's own buffer
)

// next hands messages out, and copies bytes for nats.go to p. It returns how many it copied. A message that comes
// behind them has to wait, so that nats.go sees them first. If next returns 0, more has to be read.
func (in *incoming) next(p []byte) (n int) {
	defer in.hold(nil)
	for in.start < in.end && n < len(p) {
		b := in.buf[in.start:in.end]
		switch {
		case in.opaque.Load():
			n += in.pass(p[n:], b)
			continue
		case in.payload > 0:
			k := in.pass(p[n:], b[:min(len(b), in.payload)])
			in.payload -= k
			n += k
			continue
		case in.ending > 0:
			if b[0] != crlf[len(crlf)-in.ending] {
				in.opaque.Store(true)
				continue
			}
			in.ending--
			n += in.pass(p[n:], b[:1])
			continue
		case in.line:
			if i := bytes.IndexByte(b, '\n'); i >= 0 {
				b = b[:i+1]
			}
			k := in.pass(p[n:], b)
			in.line = k < len(b) || b[k-1] != '\n'
			n += k
			continue
		}
		l, kind := parseLine(b)
		switch kind {
		case partial:
			return n
		case other:
			in.line = true
			continue
		case unknown:
			in.opaque.Store(true)
			continue
		}
		sub := in.conn.takes(l.sid)
		if sub == nil {
			in.payload, in.ending = l.length+l.size, len(crlf)
			continue
		}
		if n > 0 {
			return n
		}
		total := l.length + l.size + len(crlf)
		if len(b) < total {
			in.want = total
			return 0
		}
		if !bytes.Equal(b[total-len(crlf):total], crlf) {
			in.opaque.Store(true)
			continue
		}
		in.hold(sub)
		in.start += total
		in.want, in.last = 0, total
		if !sub.closed.Load() {
			in.hand(sub, l, b[l.length:l.length+l.size:l.length+l.size])
		}
	}
	return n
}

// hold takes the lock of sub, and frees that of the subscription before. It counts the messages of the latter for
// nats.go.
func (in *incoming) hold(sub *Sub) {
	old := in.held
	if old == sub {
		return
	}
	if old != nil {
		old.mu.Unlock()
		atomic.AddUint64(&old.nc.InMsgs, in.msgs)
		atomic.AddUint64(&old.nc.InBytes, in.bytes)
		in.msgs, in.bytes = 0, 0
	}
	if in.held = sub; sub != nil {
		sub.mu.Lock()
	}
}

// pass copies bytes at the front to p, and consumes them.
func (in *incoming) pass(p, b []byte) int {
	n := copy(p, b)
	in.start += n
	return n
}

// hand gives a whole message to its handler.
func (in *incoming) hand(sub *Sub, l line, payload []byte) {
	in.msgs++
	in.bytes += uint64(len(payload))
	m := &in.msg
	m.Subject = unsafe.String(unsafe.SliceData(l.subject), len(l.subject))
	if l.reply != nil {
		m.Reply = string(l.reply)
	}
	if sub.requests != nil {
		in.handRequest(sub, l, payload)
	} else {
		in.handPacket(sub, l, payload)
	}
	*m = nats.Msg{} // it keeps nothing alive
}

// handPacket gives in.msg, without its data, to the handler of an inbox.
func (in *incoming) handPacket(sub *Sub, l line, payload []byte) {
	m := &in.msg
	if l.header > 0 {
		m.Header, _ = nats.DecodeHeadersMsg(payload[:l.header]) // nats.go hands a message with bad headers out as well
	}
	m.Data = payload[l.header:]
	lent := in.slab
	switch {
	case in.single:
		in.single, in.buf, in.start, in.end = false, nil, 0, 0
	case lent == nil, len(payload) < alwaysOut && slab.Crowded():
		lent = nil
		m.Data = bytes.Clone(m.Data)
	default:
		lent.Lend()
	}
	sub.handler(m, lent)
}

// handRequest gives in.msg, without its data, to the handler of requests. Its data does not stay in the buffer, because
// users keep requests.
func (in *incoming) handRequest(sub *Sub, l line, payload []byte) {
	m, header := &in.msg, payload[:l.header]
	if m.Subject == sub.subject {
		m.Subject = sub.subject
	} else {
		m.Subject = strings.Clone(m.Subject) // a wildcard has matched it
	}
	if len(header) == 0 {
		header = nil
	}
	if m.Data = payload[l.header:]; in.single {
		in.single, in.buf, in.start, in.end = false, nil, 0, 0
	} else {
		m.Data = bytes.Clone(m.Data)
	}
	sub.requests(m, header)
}

// fill reads more bytes.
func (in *incoming) fill() error {
	in.makeRoom()
	if len(in.read) > 0 {
		n := copy(in.buf[in.end:], in.read)
		in.end += n
		in.read = in.read[n:]
		return nil
	}
	n, err := in.conn.Conn.Read(in.buf[in.end:in.limit()])
	in.end += n
	if n > 0 {
		return nil // an error comes again
	}
	return err
}

// abandon leaves a message that was read in part to nats.go after the connection failed. It reports false if there is
// none.
func (in *incoming) abandon() bool {
	in.opaque.Store(true)
	return in.start < in.end
}

// limit returns where in buf the next read ends. With long messages, that is the end of a message of the same length as
// the last one, so that the end of buf cuts none.
func (in *incoming) limit() int {
	if in.opaque.Load() || in.last < cutsFrom {
		return len(in.buf)
	}
	at := in.start + in.last
	if in.want != 0 {
		at = in.start + in.want
	}
	if at <= in.end || at > len(in.buf) {
		return len(in.buf)
	}
	return at + (len(in.buf)-at)/in.last*in.last
}

// makeRoom makes room in buf for the next read: for the rest of a message that was read in part, or for one like the
// last.
func (in *incoming) makeRoom() {
	pending := in.end - in.start
	if in.single {
		if pending > 0 {
			return // it has the length of its message
		}
		in.single, in.buf = false, nil
	}
	need := max(in.want, pending+minRead)
	like := need
	if pending == 0 {
		if in.last >= cutsFrom && in.last <= slab.LargeSize {
			like = max(need, in.last)
		}
		if in.slab == nil || in.slab.Restart(nil) {
			in.start, in.end = 0, 0
		}
	}
	if in.slab != nil {
		fits := len(in.buf) == slab.Size || like > slab.Size || pending > 0 // a large slab is for large messages
		if fits && in.start+like <= len(in.buf) {
			return
		}
		if need <= len(in.buf) && in.slab.Restart(in.buf[in.start:in.end]) {
			in.start, in.end = 0, pending
			return
		}
	}
	if s := slab.Get(like); s != nil {
		in.moveTo(s, s.Buf)
		return
	}
	switch {
	case need > ownSize:
		in.moveTo(nil, make([]byte, need))
		in.single = true
	case in.slab != nil || in.start+need > len(in.buf):
		if in.own == nil {
			in.own = make([]byte, ownSize)
		}
		in.moveTo(nil, in.own)
	}
}

// moveTo makes buf the receive buffer, and moves the bytes that were not consumed to its start. s is the slab that buf
// is.
func (in *incoming) moveTo(s *slab.Slab, buf []byte) {
	in.start, in.end = 0, copy(buf, in.buf[in.start:in.end])
	if in.slab != nil {
		in.slab.Retire()
	}
	in.slab, in.buf = s, buf
}
