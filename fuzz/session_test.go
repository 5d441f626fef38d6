package fuzz

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// Limits of the client under test: small, so that programs reach them.
const (
	sessionWindow   = 4 << 10
	sessionPackets  = 32 // the protocol's initial window
	sessionRecord   = 300
	sessionFallback = 1000
)

// FuzzSession takes its input for a program that makes messages: packets in and out of order, of the right and of
// other senders, whole, cut and bent, and JSON. They are published to the reply subject of an open stream, through a
// real server, and what its reader sees is compared with what a plain model says after docs/PROTOCOL.md.
//
// The first byte chooses how the stream is read, the rest is the program: see program.next.
func FuzzSession(f *testing.F) {
	for _, seed := range sessionSeeds() {
		f.Add(seed)
	}
	l := newLab(f, stream.ClientParams{Window: sessionWindow, MaxRecordSize: sessionRecord, FallbackBuffer: sessionFallback})
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) == 0 || len(input) > 4000 {
			return
		}
		m := &receiver{window: sessionWindow, packets: sessionPackets, maxRecord: sessionRecord, fallback: sessionFallback}
		p := program{in: input[1:], m: m}
		var messages []message
		for len(p.in) > 0 && len(messages) < 100 {
			msg := p.next()
			m.feed(msg)
			messages = append(messages, msg)
		}
		open := m.end == nil && len(m.aside) == 0
		want := m.counts
		messages = append(messages, m.terminator())
		m.feed(messages[len(messages)-1])

		problem := l.play(t, m, messages, int(input[0]), open, want)
		if problem != "" && m.reset {
			// A RESET that carries the stream's own number is heard whoever is bound, and that number is random.
			problem = l.play(t, m, messages, int(input[0]), open, want)
		}
		if problem != "" {
			for i, msg := range messages {
				t.Logf("message %d: status %v, %x", i, msg.status, msg.data)
			}
			t.Fatal(problem)
		}
	})
}

// message is what the producer publishes: bytes, or the server's word that nobody is there.
type message struct {
	data   []byte
	status bool // with the header Status: 503
}

// lab is what all executions of one process share: a server, a client of the library and a raw connection.
type lab struct {
	client   *stream.Client
	raw      *nats.Conn
	subject  string
	requests chan *nats.Msg
	marker   string // reply subject of a stream that stays open
	answers  chan *nats.Msg
	timer    *time.Timer
}

// patience is how long an execution waits for what must happen.
const patience = 20 * time.Second

func newLab(f *testing.F, params stream.ClientParams) *lab {
	srv, err := streamtest.Start()
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(srv.Shutdown)
	dial := func() *nats.Conn {
		nc, err := srv.Dial()
		if err != nil {
			f.Fatal(err)
		}
		f.Cleanup(nc.Close)
		return nc
	}
	l := &lab{raw: dial(), subject: "requests", requests: make(chan *nats.Msg, 100), answers: make(chan *nats.Msg, 100)}
	l.timer = time.NewTimer(patience)
	params.Conn = dial()
	if l.client, err = stream.NewClient(params); err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = l.client.Close() })
	if _, err := l.raw.ChanSubscribe(l.subject, l.requests); err != nil {
		f.Fatal(err)
	}
	if _, err := l.raw.ChanSubscribe("answers", l.answers); err != nil {
		f.Fatal(err)
	}
	if err := l.raw.Flush(); err != nil {
		f.Fatal(err)
	}
	if _, err := l.client.Open(context.Background(), l.subject, nil); err != nil {
		f.Fatal(err)
	}
	l.marker = l.wait(f, l.requests).Reply
	l.ping(f)
	return l
}

// wait receives from c in time.
func (l *lab) wait(t testing.TB, c chan *nats.Msg) *nats.Msg {
	l.timer.Reset(patience)
	select {
	case m := <-c:
		return m
	case <-l.timer.C:
		buf := make([]byte, 1<<20)
		t.Fatalf("the client hangs\n%s", buf[:runtime.Stack(buf, true)])
		return nil
	}
}

// ping returns when the client has dealt with everything that was published before: its mux passed the PING on after
// all that, and its outbox answered it after all that.
func (l *lab) ping(t testing.TB) {
	ping := frame(header(0, 1, 0), 5, 0, 0, nil)
	if err := l.raw.PublishRequest(l.marker, "answers", ping); err != nil {
		t.Fatal(err)
	}
	l.wait(t, l.answers)
}

// open opens a stream and returns it with its reply subject.
func (l *lab) open(t testing.TB) (*stream.Stream, string) {
	s, err := l.client.Open(context.Background(), l.subject, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s, l.wait(t, l.requests).Reply
}

// publish sends messages to reply and returns when the client has them.
func (l *lab) publish(t testing.TB, reply string, messages []message) {
	for _, msg := range messages {
		var err error
		if msg.status {
			err = l.raw.PublishMsg(&nats.Msg{Subject: reply, Header: nats.Header{"Status": {"503"}}})
		} else {
			err = l.raw.Publish(reply, msg.data)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	l.ping(t)
}

// play gives messages to a new stream and returns how what its reader sees differs from what the model expects.
func (l *lab) play(t testing.TB, m *receiver, messages []message, mode int, open bool, want counts) string {
	before := l.counts()
	s, reply := l.open(t)
	defer s.Close()
	l.publish(t, reply, messages)
	guard := time.AfterFunc(patience, func() { s.Close() })
	got, whole, err := read(s, mode)
	if !guard.Stop() {
		return "the reader hangs"
	}
	if d := m.compare(got, whole, err); d != "" {
		return d
	}
	if again, err2 := s.Recv(); again != nil || err2 != err {
		return fmt.Sprintf("after the end with %v: %x, %v", err, again, err2)
	}
	if now := l.counts(); open && (counts{now.duplicate - before.duplicate, now.foreign - before.foreign, now.malformed - before.malformed}) != want {
		return fmt.Sprintf("counted %+v before and %+v after, want %+v more", before, now, want)
	}
	return ""
}

// counts are of messages dropped.
type counts struct{ duplicate, foreign, malformed uint64 }

func (l *lab) counts() counts {
	s := l.client.Stats()
	return counts{s.DroppedDuplicate, s.DroppedForeign, s.DroppedMalformed}
}

// read reads s to its end in one of several ways. whole says that got are records; else it is their bytes.
func read(s *stream.Stream, mode int) (got [][]byte, whole bool, err error) {
	switch mode % 4 {
	case 0: // by Recv
		for {
			rec, err := s.Recv()
			if err != nil {
				return got, true, err
			}
			got = append(got, rec)
		}
	case 1: // by All
		for rec, err := range s.All() {
			if err != nil {
				return got, true, err
			}
			got = append(got, rec)
		}
		return got, true, io.EOF
	case 2: // by Read, with a buffer of any size
		buf := make([]byte, 1+mode/4)
		var all []byte
		for {
			n, err := s.Read(buf)
			all = append(all, buf[:n]...)
			if err != nil {
				return [][]byte{all}, false, err
			}
		}
	default: // by WriteTo
		var all bytes.Buffer
		_, err := s.WriteTo(&all)
		if err == nil {
			err = io.EOF
		}
		return [][]byte{all.Bytes()}, false, err
	}
}

// program makes messages out of bytes. It asks the model what is next in sequence, so that most packets are accepted.
type program struct {
	in        []byte
	m         *receiver
	fragments [][]byte // to send before anything else
}

// byte returns the next byte, 0 when there is none.
func (p *program) byte() byte {
	if len(p.in) == 0 {
		return 0
	}
	b := p.in[0]
	p.in = p.in[1:]
	return b
}

// bytes returns the next bytes, as many as the next byte says, or are left.
func (p *program) bytes(most int) []byte {
	n := min(int(p.byte())%(most+1), len(p.in))
	b := p.in[:n]
	p.in = p.in[n:]
	return b
}

const (
	opNext      = iota // the packet that is next
	opDuplicate        // one before it
	opGap              // one behind it
	opForeign          // of another sender
	opControl          // out of sequence
	opCut              // the next one, cut short, mostly with the length of what is left
	opBent             // the next one, with a byte changed
	opLarge            // the next one, with a large record
	opFlags            // the next one, with other flags
	opJSON             // a message of the fallback
	opBytes            // bytes of the program
	opEmpty            // nothing
	opStatus           // 503
	opMany             // several that are next
	opFragments        // the next one, in fragments, perhaps with others between them
	opCount
)

const ownSender, otherSender = 7, 8

func (p *program) sender() uint64 {
	if p.m.form == formPackets {
		return p.m.sender
	}
	return ownSender
}

// next makes the next message.
func (p *program) next() message {
	if len(p.fragments) > 0 && p.byte()%8 != 7 {
		b := p.fragments[0]
		p.fragments = p.fragments[1:]
		return message{data: b}
	}
	op := p.byte() % opCount
	seq := p.m.expect
	switch op {
	case opFragments:
		bent := p.byte()
		whole := p.packet(1, p.sender(), seq)
		p.fragments = fragments(whole, seq, p.sender(), 1+int(p.byte())%40)
		if bent%4 == 3 { // anything in the heads and the bytes
			b := p.fragments[int(bent)%len(p.fragments)]
			at := headerSize + 8 + int(p.byte())%(len(b)-headerSize-8)
			b[at] ^= p.byte()
		}
		b := p.fragments[0]
		p.fragments = p.fragments[1:]
		return message{data: b}
	case opDuplicate:
		return message{data: p.packet(1, p.sender(), seq-1-uint32(p.byte())%4)}
	case opGap:
		return message{data: p.packet(1, p.sender(), seq+1<<(p.byte()%32))}
	case opForeign:
		return message{data: p.packet(p.byte()%4, otherSender+uint64(p.byte())<<40, seq)}
	case opControl:
		return message{data: p.packet(p.byte()&2, p.sender(), seq)}
	case opCut:
		n, how := int(p.byte()), p.byte()
		b := p.packet(how%4|1, p.sender(), seq)
		if b = b[:min(n, len(b))]; how < 128 {
			setLength(b)
		}
		return message{data: b}
	case opBent:
		at, with := int(p.byte()), p.byte()
		b := p.packet(1, p.sender(), seq)
		b[at%len(b)] ^= with
		return message{data: b}
	case opLarge:
		flags, n := p.byte(), int(p.byte())*20
		b := header(1, p.sender(), seq)
		return message{data: frame(b, 1, flags&7, 0, bytes.Repeat([]byte{flags}, n))}
	case opFlags:
		return message{data: p.packet(p.byte()&15, p.sender(), seq)}
	case opJSON:
		return message{data: p.json()}
	case opBytes:
		return message{data: p.bytes(255)}
	case opEmpty:
		return message{}
	case opStatus:
		return message{status: true}
	}
	return message{data: p.packet(1|p.byte()&2, p.sender(), seq)}
}

// fragments cuts a packet into control packets with n bytes of it each.
func fragments(whole []byte, seq uint32, sender uint64, n int) (out [][]byte) {
	for at := 0; at < len(whole); at += n {
		payload := stream.AppendFragment(nil, stream.Fragment{Packet: seq, Offset: uint32(at), Length: uint32(len(whole))})
		out = append(out, frame(header(0, sender, seq), 10, 0, 0, append(payload, whole[at:min(at+n, len(whole))]...)))
	}
	return out
}

// headerSize is the length of a packet header.
const headerSize = 16

// header returns a packet without frames.
func header(flags byte, sender uint64, seq uint32) []byte {
	b := binary.BigEndian.AppendUint64(nil, 0xF510<<48|uint64(flags&15)<<48|sender)
	b = binary.BigEndian.AppendUint32(b, seq)
	return binary.BigEndian.AppendUint32(b, headerSize)
}

func senderOf(b []byte) uint64 { return binary.BigEndian.Uint64(b) & (1<<48 - 1) }

// setLength writes into the header of b, where it is there as a whole, how long b is.
func setLength(b []byte) {
	if len(b) >= headerSize {
		binary.BigEndian.PutUint32(b[12:], uint32(len(b)))
	}
}

// frame appends a frame to packet b, whose length grows.
func frame(b []byte, typ, flags byte, code uint16, payload []byte) []byte {
	b = append(b, typ, flags)
	b = binary.BigEndian.AppendUint16(b, code)
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	b = append(b, payload...)
	setLength(b)
	return b
}

// packet makes a packet of up to four frames.
func (p *program) packet(flags byte, sender uint64, seq uint32) []byte {
	b := header(flags, sender, seq)
	n := p.byte() % 6
	if n == 5 {
		return b // none
	}
	for range n%4 + 1 {
		kind := p.byte()
		payload := p.bytes(24)
		switch kind % 16 {
		default: // a record
			b = frame(b, 1, 0, 0, payload)
		case 6:
			b = frame(b, 1, 2, 0, payload)
		case 7, 8: // a piece of one
			b = frame(b, 1, 1, 0, payload)
		case 9: // a piece in another codec
			b = frame(b, 1, 5, 0, payload)
		case 10:
			b = frame(b, 2, 0, 1000+uint16(kind/16)*500, payload)
		case 11:
			b = frame(b, 6, kind/16%2, 0, payload)
		case 12:
			b = frame(b, 128+kind, kind, uint16(kind), payload)
		case 13: // control
			switch kind / 16 % 4 {
			case 0:
				b = frame(b, 3, 0, 4000+uint16(kind), payload)
			case 1:
				b = frame(b, 4, 0, 0, binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, uint64(kind)), 1<<40))
			default:
				b = frame(b, 5, 0, 0, nil)
			}
		case 14: // anything
			b = frame(b, p.byte(), p.byte(), uint16(p.byte())<<8|uint16(p.byte()), payload)
		case 15: // a length that is not true
			b = frame(b, 1, kind/16&1, 0, payload)
			at := len(b) - len(payload) - 4
			b[at] ^= p.byte()
			b[at+3] ^= p.byte()
		}
	}
	return b
}

// json makes a message of the fallback, mostly a good one.
func (p *program) json() []byte {
	kind := p.byte()
	payload := p.bytes(255)
	switch kind % 8 {
	default:
		b, _ := json.Marshal(map[string]any{"type": 1, "data": payload})
		return b
	case 3, 4:
		return fmt.Appendf(nil, `{"type":1,"data":"%s"}`, payload)
	case 5:
		b, _ := json.Marshal(map[string]any{"type": 2, "closeError": map[string]any{"Code": 1000 * int(kind/32), "Text": string(payload)}})
		return b
	case 6:
		return fmt.Appendf(nil, `{"type":%s}`, payload)
	case 7:
		return append([]byte{'{'}, payload...)
	}
}

// receiver is the model: a receiver of docs/PROTOCOL.md, written down once more without regard to speed. Nothing is
// read before all has arrived, so no credit is given beyond the first.
type receiver struct {
	window, maxRecord, fallback int
	packets                     uint32

	form     form
	sender   uint64
	expect   uint32
	received int
	closing  bool     // the packet that may go beyond the credit did
	queue    [][]byte // what was accepted
	part     []byte   // of packet partOf, which came in fragments and has partSize bytes
	partOf   uint32
	partSize uint32
	end      *ending  // the stream ended here, whatever comes
	aside    []ending // a control packet ended the stream, at some time: what is in sequence may be faster
	reset    bool     // a control packet began with RESET
	counts   counts
}

type form int

const (
	formNone form = iota
	formPackets
	formJSON
)

// ending is how a reader may see the stream end.
type ending struct {
	codes []int  // one of them
	text  string // exactly so if said is set
	said  bool   // by the peer
	err   error  // instead of a code
}

func endCode(codes ...int) *ending { return &ending{codes: codes} }

func (m *receiver) terminator() message {
	if m.form == formJSON {
		return message{data: []byte(`{"type":2,"closeError":{"Code":1000,"Text":""}}`)}
	}
	sender := m.sender
	if m.form == formNone {
		sender = ownSender
	}
	return message{data: frame(header(1, sender, m.expect), 2, 0, 1000, nil)}
}

// feed gives the model the next message, in the order of sections 3, 4, 7 and 8.
func (m *receiver) feed(msg message) {
	b := msg.data
	switch {
	case m.end != nil:
	case msg.status:
		if m.form == formNone {
			m.end = &ending{err: nats.ErrNoResponders}
		}
	case len(b) == 0:
		m.end = endCode(1003)
	case b[0] != 0xF5:
		m.feedJSON(b)
	case len(b) < headerSize || b[1]>>4 != 1 || b[1]&4 != 0 || binary.BigEndian.Uint32(b[12:]) != uint32(len(b)):
		if m.form == formNone {
			m.end = endCode(1003)
		} else {
			m.counts.malformed++
		}
	case b[1]&1 == 0:
		m.feedControl(b)
	default:
		m.feedPacket(b)
	}
}

func (m *receiver) feedJSON(b []byte) {
	if m.form == formPackets {
		m.counts.foreign++
		return
	}
	m.form = formJSON
	if m.received+len(b) > m.fallback {
		m.end = endCode(4029)
		return
	}
	m.received += len(b)
	m.queue = append(m.queue, b)
}

func (m *receiver) feedControl(b []byte) {
	sender := senderOf(b)
	m.reset = m.reset || len(b) > headerSize && b[headerSize] == 3
	switch {
	case len(b) > 4096:
		m.counts.malformed++
		return
	case m.form == formNone:
		m.form, m.sender = formPackets, sender
	case m.form == formJSON || m.sender != sender:
		m.counts.foreign++
		return
	}
	b = b[headerSize:]
	if typ, _, _, payload, rest, ok := parse(b); ok && typ == 10 && len(payload) > 16 && len(rest) == 0 {
		m.feedFragment(payload)
		return
	}
	if len(b) == 0 {
		m.aside = append(m.aside, *endCode(1002))
	}
	for len(b) > 0 {
		typ, _, code, payload, rest, ok := parse(b)
		b = rest
		switch {
		case !ok || typ == 1 || typ == 2 || typ == 6:
			m.aside = append(m.aside, *endCode(1003))
			return
		case typ == 3:
			m.aside = append(m.aside, ending{codes: []int{code}, text: string(payload), said: true})
			return
		case typ == 10 && len(payload) > 16: // not alone
			m.aside = append(m.aside, *endCode(1002))
			return
		case typ == 4 && binary.BigEndian.Uint32(payload) != 0:
			// An acknowledgement of what was never sent. This end sends nothing, so it may also not look.
			m.aside = append(m.aside, *endCode(1002))
		}
	}
}

// feedFragment puts packets together: section 7.1.
func (m *receiver) feedFragment(payload []byte) {
	packet, offset, size := binary.BigEndian.Uint32(payload), binary.BigEndian.Uint32(payload[4:]), binary.BigEndian.Uint32(payload[8:])
	bytes := payload[16:]
	began := m.part != nil && m.partOf == packet
	switch {
	case int32(packet-m.expect) < 0:
		m.counts.duplicate++
		return
	case packet != m.expect:
		return
	case size <= headerSize || size > 65536 || began && size != m.partSize:
		m.end = endCode(1002)
		return
	case !began:
		m.part, m.partOf, m.partSize = nil, packet, size
		if offset == 0 {
			m.part = []byte{}
		}
	}
	if m.part == nil {
		return
	}
	if offset != uint32(len(m.part)) || len(m.part)+len(bytes) > int(size) {
		return
	}
	if m.part = append(m.part, bytes...); len(m.part) < int(size) {
		return
	}
	whole := m.part
	m.part = nil
	if whole[0] != 0xF5 || whole[1]>>4 != 1 || whole[1]&5 != 1 || binary.BigEndian.Uint32(whole[8:]) != packet || binary.BigEndian.Uint32(whole[12:]) != size {
		m.end = endCode(1003)
		return
	}
	m.feed(message{data: whole})
}

func (m *receiver) feedPacket(b []byte) {
	sender, seq := senderOf(b), binary.BigEndian.Uint32(b[8:])
	if m.form == formJSON || m.form == formPackets && m.sender != sender {
		m.counts.foreign++
		return
	}
	switch d := int32(seq - m.expect); {
	case d < 0:
		m.counts.duplicate++
		return
	case d > 0: // asked for, where the sender said where
		m.form, m.sender = formPackets, sender
		return
	}
	if seq >= m.packets || m.received >= m.window {
		typ, flags, _, _, rest, ok := parse(b[headerSize:])
		if ok && typ == 6 && flags == 1 { // trailers may go with it
			typ, _, _, _, rest, ok = parse(rest)
		}
		if seq > m.packets || m.closing || !ok || typ != 2 || len(rest) > 0 {
			m.end = endCode(1002)
			return
		}
		m.closing = true
	}
	m.form, m.sender = formPackets, sender
	m.expect++
	m.received += len(b)
	m.queue = append(m.queue, b)
}

// parse takes a frame off b. ok says that it is one that a receiver of version 1 takes or skips.
func parse(b []byte) (typ, flags byte, code int, payload, rest []byte, ok bool) {
	if len(b) < 8 {
		return
	}
	typ, flags, code = b[0], b[1], int(b[2])<<8|int(b[3])
	n := uint64(binary.BigEndian.Uint32(b[4:]))
	if b = b[8:]; n > uint64(len(b)) {
		return
	}
	payload, rest = b[:n], b[n:]
	switch typ {
	case 1:
		ok = flags < 8 && flags&6 != 6 && code == 0 && (flags&1 == 0 || n > 0)
	case 2, 3:
		ok = flags == 0 && code >= 1000 && code < 6000 && n <= 1024 && utf8.Valid(payload)
	case 4:
		ok = flags < 2 && code == 0 && n == 16
	case 5:
		ok = flags == 0 && code == 0 && n == 0
	case 6:
		ok = flags < 2 && code == 0
	case 7, 8:
		ok = flags == 0 && code == 0 && n == 8
	case 9, 11:
		ok = flags == 0 && code == 0 && n == 16
	case 10:
		ok = flags == 0 && code == 0 && n >= 16
	default:
		ok = typ >= 128
	}
	return
}

// read returns the records in what was accepted, and the end behind them.
func (m *receiver) read() (records [][]byte, end *ending) {
	if m.form == formJSON {
		records, end = m.readJSON()
	} else {
		records, end = m.readPackets()
	}
	if end == nil {
		end = m.end
	}
	return records, end
}

func (m *receiver) readJSON() (records [][]byte, end *ending) {
	for _, b := range m.queue {
		var msg struct {
			Type       int    `json:"type"`
			Data       []byte `json:"data"`
			CloseError *struct {
				Code int
				Text string
			} `json:"closeError"`
		}
		switch err := json.Unmarshal(b, &msg); {
		case err != nil || msg.Type != 1 && msg.Type != 2:
			return records, endCode(1003)
		case msg.Type == 1 && len(msg.Data) > m.maxRecord:
			return records, endCode(1009)
		case msg.Type == 1:
			records = append(records, msg.Data)
		case msg.CloseError == nil:
			return records, endCode(1002)
		default:
			return records, closing(msg.CloseError.Code, msg.CloseError.Text)
		}
	}
	return records, nil
}

// closing is the end that a peer gave to its direction.
func closing(code int, text string) *ending {
	if code == 1000 {
		return &ending{err: io.EOF}
	}
	return &ending{codes: []int{code}, text: text, said: true}
}

func (m *receiver) readPackets() (records [][]byte, end *ending) {
	var record []byte
	var codec byte
	within, trailers := false, false
	for i, b := range m.queue {
		if b = b[headerSize:]; len(b) == 0 {
			return records, endCode(1002)
		}
		for first := i == 0; len(b) > 0; first = false {
			typ, flags, code, payload, rest, ok := parse(b)
			if !ok || typ == 3 || typ == 4 || typ == 5 || typ == 7 || typ == 8 {
				return records, endCode(1003)
			}
			b = rest
			if trailers && typ != 2 && typ < 128 {
				return records, endCode(1002)
			}
			switch typ {
			case 1:
				var broken []int
				if within && flags&6 != codec {
					broken = append(broken, 1002)
				}
				if len(record)+len(payload) > m.maxRecord {
					broken = append(broken, 1009)
				}
				if broken != nil {
					return records, endCode(broken...)
				}
				record, codec, within = append(record, payload...), flags&6, flags&1 != 0
				if !within {
					records, record = append(records, record), nil
				}
			case 2:
				if within && code == 1000 {
					return records, endCode(1002)
				}
				return records, closing(code, string(payload))
			case 6:
				trailers = flags == 1
				if within || !trailers && !first {
					return records, endCode(1002)
				}
				if _, err := nats.DecodeHeadersMsg(payload); err != nil || len(payload) > 16<<10 {
					return records, endCode(1003)
				}
			}
		}
	}
	return records, nil
}

// compare says how what was read differs from what the model expects.
func (m *receiver) compare(got [][]byte, whole bool, err error) string {
	records, end := m.read()
	if !whole {
		records = [][]byte{bytes.Join(records, nil)}
	}
	if equal(got, records) && end != nil && end.is(err) {
		return ""
	}
	for _, a := range m.aside {
		if a.is(err) && prefix(got, records, whole) {
			return ""
		}
	}
	return fmt.Sprintf("read %x, then %v\nwant %x, then %+v, or a part of it and one of %+v", got, err, records, end, m.aside)
}

func (e *ending) is(err error) bool {
	if e.err != nil {
		return err == e.err || e.err != io.EOF && errors.Is(err, e.err)
	}
	ce, ok := errors.AsType[*stream.CloseError](err)
	if !ok || e.said && ce.Text != e.text || !e.said && ce.Text == "" {
		return false
	}
	for _, code := range e.codes {
		if ce.Code == code {
			return true
		}
	}
	return false
}

func equal(a, b [][]byte) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !bytes.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}

// prefix reports whether got is what one reads of records until one is stopped.
func prefix(got, records [][]byte, whole bool) bool {
	if !whole {
		return bytes.HasPrefix(records[0], got[0])
	}
	return len(got) <= len(records) && equal(got, records[:len(got)])
}

// sessionSeeds are programs for what matters most.
func sessionSeeds() [][]byte {
	type ops = []byte
	rec := ops{opNext, 0, 0, 0, 3, 'a', 'b', 'c'}                         // a packet with one record
	many := ops{opMany, 2, 3, 0, 1, 'a', 6, 2, '{', '}', 0, 0, 0, 1, 'b'} // four records, one of them JSON, and ACK
	pieces := ops{opNext, 0, 2, 7, 1, 'a', 12, 1, '?', 0, 1, 'b'}         // two pieces and a skippable frame between
	ends := ops{opNext, 0, 0, 10, 0}                                      // CLOSE 1000
	fails := ops{opNext, 0, 0, 10 + 6*16, 2, 'n', 'o'}                    // CLOSE 4000
	ping := ops{opControl, 0, 0, 13 + 2*16, 0}                            //
	reset := ops{opControl, 0, 0, 13, 2, 'n', 'o'}                        //
	credit := ops{opControl, 0, 0, 13 + 16, 0}                            // acknowledges nothing
	text := ops{opJSON, 0, 5, 'h', 'e', 'l', 'l', 'o'}                    // a record in JSON
	over := ops{opJSON, 5 + 128, 2, 'n', 'o'}                             // a close in JSON
	inParts := ops{opFragments, 0, 0, 0, 9, 'f', 'r', 'a', 'g', 'm', 'e', 'n', 't', 's', 11}
	bent := ops{opFragments, 3, 0, 0, 9, 'f', 'r', 'a', 'g', 'm', 'e', 'n', 't', 's', 11, 4, 1}
	join := func(parts ...ops) []byte { return bytes.Join(parts, nil) }
	var seeds [][]byte
	for mode := range byte(4) {
		seeds = append(seeds,
			join(ops{mode}, rec, many, pieces, rec, ends),
			join(ops{mode + 8}, rec, many, ping, credit, fails, rec),
			join(ops{mode}, text, text, over, text))
	}
	seeds = append(seeds,
		join(ops{0}, rec, ops{opDuplicate, 0, 0, 0, 0}, rec, ops{opDuplicate, 3, 0, 0, 0}, ends),
		join(ops{0}, inParts, ops{0, 0, 0, 0}, rec, inParts, ops{0, 7}, rec, ops{0, 0, 0, 0}, inParts, ops{0, 0, 0, 0}, ends),
		join(ops{0}, rec, bent, ops{0, 0, 0, 0}, rec, ends),
		join(ops{0}, rec, ops{opGap, 0, 0, 0, 0}, rec),
		join(ops{0}, rec, ops{opGap, 31, 0, 0, 0}, rec),
		join(ops{0}, rec, ops{opForeign, 1, 1, 0, 0, 0}, ops{opForeign, 0, 0, 0, 13, 0}, rec, ends),
		join(ops{0}, rec, rec, reset, rec),
		join(ops{0}, reset, rec),
		join(ops{0}, ping, rec, ops{opControl, 0, 0, 0, 0}, rec),
		join(ops{0}, rec, ops{opCut, 28, 1, 1, 0, 3, 'a', 'b', 'c', 0, 0}, rec),
		join(ops{0}, rec, ops{opCut, 27, 129, 1, 0, 3, 'a', 'b', 'c', 0, 0}, rec, ends), // between two frames
		join(ops{0}, ops{opCut, 27, 129, 1, 0, 3, 'a', 'b', 'c', 0, 0}, rec),
		join(ops{0}, rec, ops{opCut, headerSize, 1, 0, 0, 0}, rec),
		join(ops{0}, rec, ops{opCut, headerSize, 129, 0, 0, 0}, rec),
		join(ops{0}, ops{opCut, 15, 1, 0, 0, 0}, rec),
		join(ops{0}, rec, ops{opCut, 15, 1, 0, 0, 0}, rec),
		join(ops{0}, rec, ops{opBent, 16, 0x80, 0, 0, 3, 'a', 'b', 'c'}, rec),
		join(ops{0}, rec, ops{opBent, 11, 0x01, 0, 0, 3, 'a', 'b', 'c'}, rec),
		join(ops{0}, rec, ops{opFlags, 5, 0, 0, 0}, ops{opFlags, 9, 0, 0, 0}, rec),
		join(ops{0}, rec, text, over, ops{opBytes, 3, 'x', 'y', 'z'}, rec, ends),
		join(ops{0}, text, rec, reset, ops{opBytes, 3, 0xF5, 0x11, 'z'}, over),
		join(ops{0}, ops{opBytes, 20, 0xF5, 0x11, 0, 7, 0, 0, 0, 0, 0, 0, 0, 20, 1, 0, 0, 0, 255, 255, 255, 255}),
		join(ops{0}, ops{opEmpty}, rec), join(ops{0}, rec, ops{opEmpty}, rec),
		join(ops{0}, ops{opStatus}, rec), join(ops{0}, rec, ops{opStatus}, rec), join(ops{0}, text, ops{opStatus}, text),
		join(ops{0}, bytes.Repeat(rec, 32), rec), join(ops{0}, bytes.Repeat(rec, 32), ends, rec), join(ops{0}, bytes.Repeat(rec, 32), ends, ends),
		join(ops{0}, bytes.Repeat(ops{opLarge, 0, 15}, 14), ends), join(ops{0}, bytes.Repeat(ops{opLarge, 0, 15}, 13), ends, ends),
		join(ops{0}, ops{opLarge, 0, 16}), join(ops{0}, ops{opLarge, 1, 10, opLarge, 1, 10}), join(ops{0}, ops{opLarge, 1, 10, opLarge, 3, 10}),
		join(ops{0}, ops{opLarge, 1, 10}, ends), join(ops{0}, ops{opLarge, 1, 10}, fails), join(ops{0}, ops{opLarge, 1, 10}, ops{opNext, 0, 0, 11, 0}),
		join(ops{0}, ops{opNext, 0, 5}, rec),
		join(ops{0}, bytes.Repeat(text, 40)),
		join(ops{0}, ops{opJSON, 3, 8, 'a', 'G', 'V', 's', 'b', 'G', '8', '=', opJSON, 3, 4, 'A', 'A', '\n', 'A', opJSON, 6, 1, '2'}),
	)
	return seeds
}
