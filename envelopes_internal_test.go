package stream

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn/fake"
	"github.com/natsstream/stream/internal/race"
	"github.com/natsstream/stream/internal/slab"
)

// envelopedPeer has the writers of one client, and plays the one peer of all of them. The peer announces that it
// receives envelopes. It answers trials and acknowledges packets.
type envelopedPeer struct {
	t       *testing.T
	c       *Client
	conn    *recorder
	held    holder
	writers []*Writer
	seen    int // messages
}

const envelopedInbox = "_SINBOX.peer"

func (p *envelopedPeer) subject(i int) string {
	return envelopedInbox + "." + string(AppendToken(nil, Token{Codec: MsgPack, LogPackets: 8, LogBytes: 30, ID: uint64(i)}))
}

// newEnvelopedPeer makes n writers that have sent one record each. It must be called in a bubble.
func newEnvelopedPeer(t *testing.T, n int) *envelopedPeer {
	t.Helper()
	p := &envelopedPeer{t: t, conn: newRecorder(nil)}
	p.held = holding(p.conn.Conn)
	p.c = fakeClient(t, p.conn.Conn, ClientParams{})
	for i := range n {
		p.writers = append(p.writers, p.c.NewWriter(p.subject(i)))
	}
	p.write("first")
	p.news()
	for i := range n {
		frames := []Frame{p.acks(1)}
		if i == 0 {
			frames = append(frames, Frame{Type: frameEnvelopes})
		}
		p.tell(i, frames...)
	}
	p.write("second") // causes the trial
	for _, m := range p.news() {
		if m.Subject != envelopedInbox+".e" {
			continue
		}
		for _, packet := range packetsOf(m.Data) {
			for _, f := range controlFrames(packet) {
				if f.Type == FrameChallenge {
					p.tell(0, Frame{Type: FrameResponse, Payload: f.Payload})
				}
			}
		}
	}
	for i := range n {
		p.tell(i, p.acks(2))
	}
	if e := p.writers[0].session.remote.Load().envelopes; !e.arrives {
		t.Fatalf("no trial was answered: %+v", e)
	}
	return p
}

// acks returns a CREDIT that acknowledges n packets.
func (p *envelopedPeer) acks(n uint32) Frame {
	return Frame{Type: FrameCredit, Payload: AppendCredit(nil, Credit{Ack: n, Packets: n + 200, Bytes: 1 << 30})}
}

// tell sends a control packet of consumer i.
func (p *envelopedPeer) tell(i int, frames ...Frame) {
	p.conn.Deliver(&nats.Msg{Subject: p.writers[i].session.reply(), Data: AppendPacket(nil, PacketHeader{Sender: uint64(2*i + 1)}, frames...)})
	synctest.Wait()
}

// holder keeps an outbox busy while a test marks sessions, so that the outbox finds all of them at once.
type holder chan struct{}

// holding makes the outbox of a connection wait in publishes to the subject "held".
func holding(conn *fake.Conn) holder {
	h, before := make(holder), conn.Published
	conn.Published = func(subject, reply string, data []byte) error {
		if subject == "held" {
			<-h
			return nil
		}
		return before(subject, reply, data)
	}
	return h
}

// together calls f while the outbox of ep waits.
func (h holder) together(ep *endpoint, f func()) {
	ep.outbox.doLater(outOfStream{subject: "held", refuse: &CloseError{Code: CloseTryAgainLater}})
	synctest.Wait()
	f()
	h <- struct{}{}
	synctest.Wait()
}

// together calls f while the outbox waits.
func (p *envelopedPeer) together(f func()) { p.held.together(p.c.ep, f) }

// loseEnvelopes calls f, and loses the envelopes that are published meanwhile.
func (p *envelopedPeer) loseEnvelopes(f func()) {
	p.conn.fail = func(_ int, data []byte) error {
		if data[1]&byte(PacketEnv) != 0 {
			return nats.ErrReconnectBufExceeded
		}
		return nil
	}
	f()
	p.conn.fail = nil
}

// write writes a record to each stream.
func (p *envelopedPeer) write(record string) {
	p.t.Helper()
	p.together(func() {
		for i, w := range p.writers {
			if _, err := fmt.Fprintf(w, "%s %d", record, i); err != nil {
				p.t.Fatal(err)
			}
		}
	})
}

// news returns the messages since the last call.
func (p *envelopedPeer) news() []nats.Msg {
	all := p.conn.sent()
	news := all[p.seen:]
	p.seen = len(all)
	return news
}

// carried is a packet of a record, and how it was sent.
type carried struct {
	stream   string // subject
	seq      uint32
	envelope bool
}

// carry returns the packets of records since the last call of news, in order.
func (p *envelopedPeer) carry() (all []carried, messages int) {
	for _, m := range p.news() {
		messages++
		body, n, err := openEnvelope(m.Data)
		if err != nil {
			if h, _, err := ParsePacketHeader(m.Data); err == nil && h.Flags&PacketSeq != 0 {
				all = append(all, carried{m.Subject, h.Seq, false})
			}
			continue
		}
		for range n {
			var token, packet []byte
			token, packet, body = nextEnveloped(body)
			if h, _, err := ParsePacketHeader(packet); err == nil && h.Flags&PacketSeq != 0 {
				all = append(all, carried{envelopedInbox + "." + string(token), h.Seq, true})
			}
		}
	}
	return all, messages
}

// Sessions that wait together share a message. One that waits alone has its own, on its own subject.
func TestPacketsThatWaitTogetherShareAMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newEnvelopedPeer(t, 10)
		p.news()
		p.write("third")
		all, messages := p.carry()
		if len(all) != 10 || messages != 1 {
			t.Errorf("%d packets in %d messages", len(all), messages)
		}
		if _, err := p.writers[3].Write([]byte("alone")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if all, _ := p.carry(); len(all) != 1 || all[0] != (carried{p.subject(3), 3, false}) {
			t.Errorf("a packet alone: %+v", all)
		}
		other := p.c.NewWriter("elsewhere" + consumerSubject(5))
		p.together(func() {
			for _, w := range []*Writer{p.writers[4], other} {
				if _, err := w.Write([]byte("to two peers")); err != nil {
					t.Fatal(err)
				}
			}
		})
		if all, _ := p.carry(); len(all) != 2 || all[0].envelope || all[1].envelope {
			t.Errorf("packets to two peers: %+v", all)
		}
		if n := p.c.Stats().EnvelopesSent; n != 1 {
			t.Errorf("%d envelopes are counted", n)
		}
	})
}

// No packet overtakes another one of its stream, in envelopes and beside them. Large packets go alone, and so does
// CLOSE.
func TestEnvelopesKeepTheOrderOfEachStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const streams = 8
		p := newEnvelopedPeer(t, streams)
		p.news()
		p.together(func() {
			for i, w := range p.writers {
				for k := range 12 {
					if _, err := w.Write(make([]byte, []int{10, 500, 5000, 40_000}[(i+k)%4])); err != nil {
						t.Fatal(err)
					}
					w.mu.Lock()
					if w.open != nil && w.n > PacketHeaderSize {
						w.sealLocked()
					}
					w.mu.Unlock()
				}
			}
		})
		all, _ := p.carry()
		for i := range p.writers {
			go p.writers[i].Close()
		}
		synctest.Wait()
		closing, _ := p.carry()
		next, enveloped := map[string]uint32{}, 0
		for _, c := range append(all, closing...) {
			if want, ok := next[c.stream]; ok && c.seq != want {
				t.Errorf("%s: packet %d after %d", c.stream, c.seq, want-1)
			}
			next[c.stream] = c.seq + 1
			if c.envelope {
				enveloped++
			}
		}
		if enveloped == 0 || enveloped == len(all) || len(next) != streams {
			t.Errorf("%d of %d packets of %d streams were in envelopes", enveloped, len(all), len(next))
		}
		for _, c := range closing {
			if c.envelope {
				t.Errorf("the last packet of %s is in an envelope", c.stream)
			}
		}
	})
}

// If the peer of a stream moves, the outbox sends the open envelope first, because later packets go to another subject.
func TestStreamsThatMoveSendTheEnvelope(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newEnvelopedPeer(t, 3)
		p.news()
		o, s := &p.c.ep.outbox, p.writers[1].session
		o.envelopes.more = true
		packet := testPacket(2, 0, testData("enclosed"))
		if end, err := o.send(s, nil, "", packet, false); end == 0 || err != nil {
			t.Fatalf("%d, %v", end, err)
		}
		if n := len(p.news()); n != 0 {
			t.Fatalf("%d messages", n)
		}
		o.follow(s, "elsewhere"+consumerSubject(5))
		if all, _ := p.carry(); len(all) != 1 || all[0] != (carried{p.subject(1), 0, false}) {
			t.Errorf("%+v", all)
		}
		o.envelopes.more = false
	})
}

// Flush returns after the envelope was published, not when the packet was put into it.
func TestFlushWaitsForTheEnvelope(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newEnvelopedPeer(t, 5)
		p.news()
		var flushed atomic.Int32
		p.together(func() {
			for _, w := range p.writers {
				if _, err := w.Write([]byte("flushed")); err != nil {
					t.Fatal(err)
				}
				go func() {
					if err := w.Flush(); err != nil {
						t.Error(err)
					}
					for _, m := range p.conn.sent()[p.seen:] {
						if bytes.Contains(m.Data, []byte("flushed")) {
							flushed.Add(1)
							return
						}
					}
					t.Error("Flush returned before the publish")
				}()
			}
			synctest.Wait()
		})
		if all, messages := p.carry(); flushed.Load() != 5 || messages != 1 || !all[0].envelope {
			t.Errorf("%d of 5 flushed, %d messages", flushed.Load(), messages)
		}
	})
}

// Envelopes are no larger than the server takes. If it takes less than when they began, the packets go alone.
func TestEnvelopesHeedMaxPayload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newEnvelopedPeer(t, 20)
		p.news()
		p.conn.SetMaxPayload(500)
		p.write("third")
		p.c.ep.lookAtMaxPayload()
		p.write("fourth")
		all, _ := p.carry()
		if len(all) != 40 {
			t.Errorf("%d packets, want 40", len(all))
		}
		var first, second int
		for _, m := range p.conn.sent() {
			if len(m.Data) > 500 && bytes.Contains(m.Data, []byte("third")) {
				t.Errorf("message of %d bytes", len(m.Data))
			}
		}
		for _, c := range all {
			switch {
			case c.seq == 2 && !c.envelope:
				first++
			case c.seq == 3 && c.envelope:
				second++
			}
		}
		if first != 20 || second < 15 { // one that is left over goes alone
			t.Errorf("%d packets of a refused envelope went alone, %d of 20 later ones in small envelopes", first, second)
		}
	})
}

// An envelope that cannot be published is lost, and each stream repairs its own packets, which go alone then.
func TestLostEnvelopesAreRepaired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newEnvelopedPeer(t, 6)
		p.news()
		p.loseEnvelopes(func() { p.write("third") })
		if all, _ := p.carry(); len(all) != 0 {
			t.Errorf("%+v", all)
		}
		for i := range p.writers {
			p.tell(i, Frame{Type: FrameCredit, Flags: FlagGap, Payload: AppendCredit(nil, Credit{Ack: 2, Packets: 200, Bytes: 1 << 30})})
		}
		all, _ := p.carry()
		for i, c := range all {
			if c != (carried{p.subject(i), 2, false}) {
				t.Errorf("%+v", c)
			}
		}
		if len(all) != 6 {
			t.Errorf("%d packets were repaired", len(all))
		}
		if n := p.c.Stats().PacketsResent; n != 6 {
			t.Errorf("%d packets are counted", n)
		}
	})
}

// A trial that is lost is repeated, and only then are envelopes used.
func TestTrialsAreRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		held := holding(m.back)
		trials := 0
		m.bus.SetFilter(func(from, _ *fake.Conn, msg *nats.Msg) bool {
			if from == m.back && isFrame(msg.Data, FrameChallenge) {
				trials++
				return trials > 2
			}
			return true
		})
		var writers []*Writer
		m.handle(t, "down", func(w *Writer, r *Request) error {
			writers = append(writers, w)
			<-r.Context().Done()
			return nil
		})
		var streams []*Stream
		for range 20 {
			streams = append(streams, m.open(t, "down"))
			synctest.Wait()
		}
		for k := 0; m.server.Stats().EnvelopesSent == 0 && k < 100; k++ {
			held.together(m.server.ep, func() {
				for _, w := range writers {
					if _, err := w.Write(make([]byte, 100)); err != nil {
						t.Fatal(err)
					}
				}
			})
			for _, s := range streams {
				if _, err := s.Recv(); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(time.Second)
		}
		if n := m.server.Stats().EnvelopesSent; n == 0 || trials != 3 {
			t.Errorf("%d envelopes after %d trials", n, trials)
		}
		for _, s := range streams {
			s.Close()
		}
		m.nothingLeft(t)
	})
}

// A hostile producer that names the inbox of another program as its own cannot have envelopes sent there: it does not
// know the answer to the trial.
func TestStatementOfAnotherIsNoProof(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newEnvelopedPeer(t, 4)
		e := p.writers[0].session.remote.Load().envelopes
		e.arrives, e.tried = false, 0
		p.tell(1, p.acks(2), Frame{Type: frameEnvelopes}, Frame{Type: FrameResponse, Payload: make([]byte, nonceSize)})
		p.news()
		p.write("third")
		p.tell(1, Frame{Type: FrameResponse, Payload: []byte("12345678")})
		p.write("fourth")
		if all, _ := p.carry(); len(all) != 8 {
			t.Errorf("%d packets", len(all))
		} else {
			for _, c := range all {
				if c.envelope {
					t.Errorf("%+v", c)
				}
			}
		}
	})
}

// envelopeOf returns an envelope with packet seq of each stream. The sender numbers are those of testPacket.
func envelopeOf(streams []*Stream, seq uint32, size int) []byte {
	b := make([]byte, PacketHeaderSize)
	for _, s := range streams {
		b = append(b, s.session.token[:]...)
		b = append(b, testPacket(2, seq, Frame{Type: FrameData, Payload: make([]byte, size)})...)
	}
	putEnvelopeHeader(b, len(b))
	return b
}

// A packet that waits for its reader does not keep its envelope in memory. The budget of its stream counts the packet.
// On a fast connection the packet keeps a slab until the reader goes on. Slabs have a bound of their own.
func TestWaitingPacketsDoNotKeepEnvelopes(t *testing.T) {
	conn := fake.New()
	conn.Requested = func(*nats.Msg) error { return nil }
	c := fakeClient(t, conn, ClientParams{})
	var streams []*Stream
	for range 20 {
		s, _ := muxStream(t, conn, c)
		streams = append(streams, s)
	}
	whole := envelopeOf(streams, 0, 100)
	within := func(data []byte) bool {
		at, from := uintptr(unsafe.Pointer(unsafe.SliceData(data))), uintptr(unsafe.Pointer(unsafe.SliceData(whole)))
		return at >= from && at < from+uintptr(len(whole))
	}
	c.ep.receive(&nats.Msg{Subject: c.ep.prefix + envelopeToken, Data: whole}, nil)
	for _, s := range streams {
		a, ok := s.session.bucket.ring.Pop()
		if !ok || a.lent != nil || within(a.data) || cap(a.data) > 2*len(a.data) {
			t.Fatalf("packet %v, capacity %d of %d, in the envelope: %v", ok, cap(a.data), len(a.data), within(a.data))
		}
	}

	lent := slab.Get(len(whole))
	whole = append(lent.Buf[:0], envelopeOf(streams, 1, 100)...)
	lent.Lend()
	c.ep.receive(&nats.Msg{Subject: c.ep.prefix + envelopeToken, Data: whole}, lent)
	if lent.Restart(nil) {
		t.Error("the slab is used again before its packets are read")
	}
	for _, s := range streams {
		a, ok := s.session.bucket.ring.Pop()
		if !ok || a.lent != lent || !within(a.data) || cap(a.data) != len(a.data) {
			t.Fatalf("packet %v, lent %v", ok, a.lent)
		}
		a.lent.Release()
	}
	if !lent.Restart(nil) {
		t.Error("packets that were read keep the slab")
	}
}

// Control packets and packets for streams that are gone leave a slab at once.
func TestEnvelopesGiveSlabsBack(t *testing.T) {
	conn := fake.New()
	conn.Requested = func(*nats.Msg) error { return nil }
	c := fakeClient(t, conn, ClientParams{})
	s, _ := muxStream(t, conn, c)
	b := make([]byte, PacketHeaderSize)
	for _, packet := range [][]byte{
		testPacketFlags(0, 2, 0, Frame{Type: FrameCredit, Payload: AppendCredit(nil, Credit{})}),
		testPacket(2, 5, testData("early")),
	} {
		b = append(append(b, s.session.token[:]...), packet...)
	}
	b = append(append(b, "nobody's token--"...), testPacket(2, 0, testData("lost"))...)
	putEnvelopeHeader(b, len(b))
	for _, cut := range []int{0, 1} { // the second one is broken
		lent := slab.Get(len(b))
		data := append(lent.Buf[:0], b[:len(b)-cut]...)
		lent.Lend()
		c.ep.receive(&nats.Msg{Subject: c.ep.prefix + envelopeToken, Data: data}, lent)
		if !lent.Restart(nil) {
			t.Errorf("cut by %d bytes: the slab is not given back", cut)
		}
	}
	if st := c.Stats(); st.DroppedMalformed != 1 || st.DroppedEarly != 1 || st.DroppedUnknown != 1 || st.EnvelopesReceived != 1 {
		t.Errorf("%+v", st)
	}
}

// To put packets into envelopes, and to take envelopes apart, allocates nothing but the copies of packets.
func TestEnvelopesAllocateNothing(t *testing.T) {
	const streams = 100
	conn := fake.New()
	conn.Requested = func(*nats.Msg) error { return nil }
	c := fakeClient(t, conn, ClientParams{})
	var all []*Stream
	for range streams {
		s, _ := muxStream(t, conn, c)
		s.session.bucket.grantedBytes.Store(1 << 40)
		s.session.bucket.grantedPackets.Store(1 << 30)
		s.session.bucket.open.Store(1 << 40)
		all = append(all, s)
	}
	seq := uint32(0)
	whole := envelopeOf(all, 0, 100)
	lent := slab.Get(len(whole))
	receive := func(lent *slab.Slab) float64 {
		return testing.AllocsPerRun(50, func() {
			for body := whole[PacketHeaderSize:]; len(body) > 0; {
				_, packet, rest := nextEnveloped(body)
				binary.BigEndian.PutUint32(packet[8:], seq)
				body = rest
			}
			seq++
			data := whole
			if lent != nil {
				data = append(lent.Buf[:0], whole...)
				lent.Lend()
			}
			c.ep.receive(&nats.Msg{Subject: c.ep.prefix + envelopeToken, Data: data}, lent)
			for _, s := range all {
				a, ok := s.session.bucket.ring.Pop()
				if !ok {
					t.Fatalf("packet %d is missing: %v", seq-1, s.session.end.Load())
				}
				a.lent.Release()
			}
		})
	}
	// The subject of the message that the test makes is one allocation.
	if n := receive(nil); n > streams+2 && !race.Enabled {
		t.Errorf("%.0f allocations for an envelope of %d packets, want a copy of each", n, streams)
	}
	if n := receive(lent); n > 2 && !race.Enabled {
		t.Errorf("%.0f allocations for an envelope of %d packets on a fast connection", n, streams)
	}

	o := &outbox{ep: c.ep}
	o.up.Store(true)
	p := &remote{name: envelopedInbox}
	e := p.enveloping()
	e.known, e.arrives = true, true
	e.sizes.Passed(coalesceSize, 1)
	sessions := make([]*session, streams)
	for i := range sessions {
		sessions[i] = unopenedStream(c.ep)
		sessions[i].out.peer = envelopedInbox + "." + string(AppendToken(nil, Token{ID: uint64(i)}))
		sessions[i].remote.Store(p)
	}
	packet := testPacket(2, 0, Frame{Type: FrameData, Payload: make([]byte, 100)})
	before := c.Stats().EnvelopesSent
	if n := testing.AllocsPerRun(50, func() {
		o.envelopes.more = true
		for _, s := range sessions {
			if end, err := o.send(s, nil, "", packet, false); end == 0 || err != nil {
				t.Fatalf("%d, %v", end, err)
			}
		}
		o.sendEnvelopes()
	}); n > 0 && !race.Enabled { // with the race detector, pools forget
		t.Errorf("%.2f allocations to enclose %d packets", n, streams)
	}
	if c.Stats().EnvelopesSent == before {
		t.Error("no envelope was sent")
	}
}

// FuzzEnvelope compares the decoder of envelopes with a naive model. Encoding the decoded packets gives the same bytes.
// Each stream gets its own packets, and no input causes a panic.
func FuzzEnvelope(f *testing.F) {
	conn := fake.New()
	conn.Requested = func(*nats.Msg) error { return nil }
	params, err := ClientParams{}.withDefaults()
	if err != nil {
		f.Fatal(err)
	}
	ep, err := newEndpoint(conn, "", params)
	if err != nil {
		f.Fatal(err)
	}
	c := &Client{ep: ep, codec: MsgPack}
	f.Cleanup(func() { _ = c.Close() })
	for _, v := range readVectors(f) {
		if v.Kind == "envelope" {
			f.Add(unhex(f, v.Hex))
		}
	}
	f.Add([]byte(strings.Repeat("\xf5\x14", 200)))
	f.Fuzz(func(t *testing.T, b []byte) {
		want, wantErr := naiveEnvelope(b)
		n := 0
		again, err := reopened(t, b, func(i int, token, packet []byte) {
			n++
			if i >= len(want) || string(token) != want[i].token || !bytes.Equal(packet, want[i].packet) {
				t.Errorf("packet %d: %q, % x; the model has %d packets", i, token, packet, len(want))
			}
		})
		if !errors.Is(err, wantErr) || err == nil && n != len(want) {
			t.Errorf("%d packets, %v; the model has %d, %v", n, err, len(want), wantErr)
		}
		if err == nil && !bytes.Equal(again[PacketHeaderSize:], b[PacketHeaderSize:]) {
			t.Errorf("made again: % x, was % x", again, b)
		}
		s, err := c.Open(t.Context(), "subject", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		before := c.Stats()
		data := bytes.Clone(b)
		for i := range want { // the first of two streams is there
			if i%2 == 0 {
				at := PacketHeaderSize
				for _, p := range want[:i] {
					at += TokenSize + len(p.packet)
				}
				copy(data[at:], s.session.token[:])
			}
		}
		copied := bytes.Clone(data)
		ep.receive(&nats.Msg{Subject: ep.prefix + envelopeToken, Data: data}, nil)
		if !bytes.Equal(data, copied) {
			t.Error("the envelope was changed")
		}
		after := c.Stats()
		if wantErr != nil && (after.DroppedMalformed != before.DroppedMalformed+1 || after.EnvelopesReceived != before.EnvelopesReceived || after.PacketsReceived != before.PacketsReceived) {
			t.Errorf("a broken envelope: %+v, before %+v", after, before)
		}
		if wantErr == nil && after.EnvelopesReceived != before.EnvelopesReceived+1 {
			t.Errorf("an envelope: %+v, before %+v", after, before)
		}
	})
}

// modelEnveloped is a packet in an envelope, and the token of its stream.
type modelEnveloped struct {
	token  string
	packet []byte
}

// naiveEnvelope reads an envelope the slow way: docs/PROTOCOL.md section 4.3.
func naiveEnvelope(b []byte) (all []modelEnveloped, err error) {
	number := func(b []byte) uint64 { return uint64(b[0])<<24 | uint64(b[1])<<16 | uint64(b[2])<<8 | uint64(b[3]) }
	switch {
	case len(b) < 16:
		return nil, ErrTruncated
	case b[0] != 0xF5:
		return nil, ErrMagic
	case b[1]/16 != 1:
		return nil, ErrVersion
	case b[1]%16 != 4:
		return nil, ErrFlags
	case number(b[12:]) != uint64(len(b)):
		return nil, ErrLength
	}
	for b = b[16:]; ; {
		if len(b) < 32 {
			return nil, ErrTruncated
		}
		if b[16] != 0xF5 {
			return nil, ErrMagic
		}
		n := number(b[28:])
		if n < 16 || n > uint64(len(b)-16) {
			return nil, ErrLength
		}
		all = append(all, modelEnveloped{string(b[:16]), b[16 : 16+n]})
		if b = b[16+n:]; len(b) == 0 {
			return all, nil
		}
	}
}

// closedDuringTrial closes a writer while the peer owes the answer to a trial. It returns the peer, the session of the
// writer, and the state of envelopes to the peer.
func closedDuringTrial(t *testing.T) (*envelopedPeer, *session, *enveloping) {
	t.Helper()
	p := newEnvelopedPeer(t, 2)
	s := p.writers[0].session
	e := s.remote.Load().envelopes
	e.arrives = false // the outbox is at rest
	if err := p.writers[0].Close(); err != nil {
		t.Fatal(err)
	}
	p.news()
	return p, s, e
}

// The acknowledgement of CLOSE follows a trial at once, so the answer comes after the end of a short stream.
func TestTrialsMayBeAnsweredAfterTheEndOfTheirStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, s, e := closedDuringTrial(t)
		defer p.c.Close()
		p.tell(0, p.acks(s.send.Load().unacked.Next()))
		if s.end.Load() == nil {
			t.Fatal("the stream has not ended")
		}
		nonce := bytes.Clone(e.trial[:])
		other := bytes.Clone(nonce)
		other[0]++
		credit := p.acks(1)
		for name, frames := range map[string][]Frame{
			"another nonce": {{Type: FrameResponse, Payload: other}}, "half a nonce": {{Type: FrameResponse, Payload: nonce[:4]}},
			"a longer nonce": {{Type: FrameResponse, Payload: append(bytes.Clone(nonce), 0)}}, "no answer": {credit},
		} {
			if p.tell(0, frames...); e.arrives {
				t.Errorf("%s counts as the answer to a trial", name)
			}
		}
		dropped := p.c.Stats().DroppedUnknown
		if p.tell(0, Frame{Type: FrameResponse, Payload: nonce}); !e.arrives {
			t.Error("the answer to the trial was dropped")
		}
		if n := p.c.Stats().DroppedUnknown - dropped; n != 0 {
			t.Errorf("%d messages count as dropped", n)
		}
	})
}

// The outbox may act on the answer to a trial after it has ended the stream.
func TestTrialsMayBeAnsweredWhileTheirStreamEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, s, e := closedDuringTrial(t)
		defer p.c.Close()
		p.together(func() {
			for _, f := range []Frame{p.acks(s.send.Load().unacked.Next()), {Type: FrameResponse, Payload: bytes.Clone(e.trial[:])}} {
				p.conn.Deliver(&nats.Msg{Subject: s.reply(), Data: AppendPacket(nil, PacketHeader{Sender: 1}, f)})
			}
		})
		if s.end.Load() == nil || !e.arrives {
			t.Errorf("end %v, the answer to the trial was taken: %v", s.end.Load(), e.arrives)
		}
	})
}

// NATS may refuse a trial after the last stream to its peer has ended. That concerns no stream to another subject.
func TestRefusedTrialOfAForgottenPeerEndsNoStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newEnvelopedPeer(t, 2)
		defer p.c.Close()
		o := &p.c.ep.outbox
		st, err := p.c.Open(t.Context(), "answers.late", nil)
		if err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for i, w := range p.writers {
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			p.tell(i, p.acks(w.session.send.Load().unacked.Next()))
		}
		time.Sleep(2 * time.Duration(o.ep.times.KeepAlive))
		synctest.Wait()
		if o.remotes[envelopedInbox] != nil {
			t.Fatal("the peer is not forgotten")
		}
		o.doLater(outOfStream{subject: envelopedInbox + "." + envelopeToken, denied: nats.ErrPermissionViolation})
		time.Sleep(2 * time.Duration(o.ep.times.Ack))
		synctest.Wait()
		if e := st.session.end.Load(); e != nil {
			t.Errorf("a stream to another subject has ended: %v", e.err)
		}
		if o.envelopes.refused == 0 {
			t.Error("the refusal was not noted")
		}
	})
}

// An envelope is sent at the end of its round, also if packets of other streams wait for others that share their write.
func TestEnvelopesDoNotWaitForPacketsToOtherPeers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newEnvelopedPeer(t, 2)
		var large []*Writer
		for i := range 2 {
			token := AppendToken(nil, Token{Codec: MsgPack, LogPackets: 8, LogBytes: 30, ID: uint64(100 + i)})
			w := p.c.NewWriter(fmt.Sprintf("_SINBOX.large%d.%s", i, token))
			if _, err := w.Write(nil); err != nil { // a first packet has a reply subject, and waits for no other
				t.Fatal(err)
			}
			large = append(large, w)
		}
		synctest.Wait()
		p.news()
		var others sync.WaitGroup
		p.together(func() {
			for i, w := range p.writers {
				fmt.Fprintf(w, "record %d", i)
			}
			for _, w := range large {
				others.Go(func() {
					for range 4 { // no more goes to an address that is not proved
						if _, err := w.Write(make([]byte, 14<<10)); err != nil {
							t.Error(err)
						}
					}
				})
				synctest.Wait()
			}
		})
		others.Wait()
		at := slices.IndexFunc(p.news(), func(m nats.Msg) bool { return m.Subject == envelopedInbox+"."+envelopeToken })
		if at < 0 || at > len(large) {
			t.Errorf("the envelope was message %d, should be sent in its first round", at)
		}
	})
}
