package stream_test

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// A peer says by the reply subjects of its packets where it receives. It may move, and then proves that it receives at
// the new subject before anything but a challenge goes there.

// rawPeer is an end of a stream that the test plays: the bytes that a library's end sends to it, and where to answer.
type rawPeer struct {
	t      *testing.T
	nc     *nats.Conn
	number uint64 // of the sender that the test is
	to     string // the library's end
	in     *nats.Subscription
}

// send sends a packet with the given reply subject.
func (r *rawPeer) send(reply string, flags stream.PacketFlags, seq uint32, frames ...stream.Frame) {
	r.t.Helper()
	if err := r.nc.PublishMsg(&nats.Msg{Subject: r.to, Reply: reply, Data: rawPacket(flags, r.number, seq, frames...)}); err != nil {
		r.t.Fatal(err)
	}
}

// frame returns the first frame of type typ that comes to sub.
func (r *rawPeer) frame(sub *nats.Subscription, typ stream.FrameType) stream.Frame {
	r.t.Helper()
	for {
		_, body, err := stream.ParsePacketHeader(nextRequest(r.t, sub).Data)
		if err != nil {
			r.t.Fatal(err)
		}
		for len(body) > 0 {
			var f stream.Frame
			if f, body, err = stream.ParseFrame(body); err != nil {
				r.t.Fatal(err)
			}
			if f.Type == typ {
				return f
			}
		}
	}
}

func subscribe(t *testing.T, nc *nats.Conn, subject string) *nats.Subscription {
	t.Helper()
	sub, err := nc.SubscribeSync(subject)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	return sub
}

// consumerByHand opens a stream on "svc" by hand and returns when the producer has said where it is.
func consumerByHand(t *testing.T, p *pair) *rawPeer {
	t.Helper()
	nc, inbox := p.consumer.Conn, rawInbox()
	r := &rawPeer{t: t, nc: nc, number: 7, in: subscribe(t, nc, inbox)}
	if err := nc.PublishMsg(&nats.Msg{Subject: "svc", Reply: inbox, Header: nats.Header{"Stream-Open": {"~1m5I"}}}); err != nil {
		t.Fatal(err)
	}
	for r.to == "" {
		r.to = nextRequest(t, r.in).Reply
	}
	return r
}

// producerByHand answers a stream of p's consumer by hand, which knows then where it is.
func producerByHand(t *testing.T, p *pair) (*rawPeer, *stream.Stream) {
	t.Helper()
	s, reply, nc := rawStream(t, p)
	inbox := rawInbox()
	r := &rawPeer{t: t, nc: nc, number: 8, to: reply, in: subscribe(t, nc, inbox)}
	r.send(inbox, 0, 0, rawPing())
	return r, s
}

// serveChatter serves "svc" with handlers that send without end and read all records.
func serveChatter(t *testing.T, p *pair, params stream.ServerParams) *service {
	t.Helper()
	s := newService(t, p, params)
	s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
		record := make([]byte, 10_000)
		for {
			if _, err := w.Write(record); err != nil {
				return err
			}
		}
	})
	return s
}

// victims are given to library ends by peers that acknowledge without end. Each gets a few challenges and no other
// message.
func TestPeerCannotRedirectItsStream(t *testing.T) {
	const packets = 2000
	flood := func(t *testing.T, r *rawPeer, acked func() uint32) {
		victim := "victim." + nats.NewInbox()
		got := subscribe(t, r.nc, victim)
		start := time.Now()
		for i := range packets {
			ack := acked()
			frames := []stream.Frame{rawCredit(stream.Credit{Ack: ack, Packets: ack + 1000, Bytes: 1 << 40})}
			if i%2 == 1 {
				frames = append(frames, rawPing())
			}
			r.send(victim, 0, 0, frames...)
		}
		if err := r.nc.FlushTimeout(patience); err != nil {
			t.Fatal(err)
		}
		r.frame(got, stream.FrameChallenge) // the flood arrived
		time.Sleep(100 * time.Millisecond)
		n, bytes := 1, 0
		for m, err := got.NextMsg(time.Millisecond); err == nil; m, err = got.NextMsg(time.Millisecond) {
			_, body, perr := stream.ParsePacketHeader(m.Data)
			if f, rest, ferr := stream.ParseFrame(body); perr != nil || ferr != nil || f.Type != stream.FrameChallenge || len(rest) != 0 || m.Reply != "" {
				t.Fatalf("the victim got %q, reply %q", m.Data, m.Reply)
			}
			n, bytes = n+1, bytes+len(m.Data)
		}
		const patient = time.Second // four times AckTimeout
		if most := 1 + int(time.Since(start)/patient); n > most {
			t.Errorf("the victim got %d messages for %d packets in %v, at most %d may be", n, packets, time.Since(start), most)
		}
	}
	t.Run("consumer", func(t *testing.T) {
		p := newPair(t)
		serveChatter(t, p, stream.ServerParams{})
		r := consumerByHand(t, p)
		var seen uint32
		flood(t, r, func() uint32 {
			if m, err := r.in.NextMsg(time.Microsecond); err == nil {
				if h, _, err := stream.ParsePacketHeader(m.Data); err == nil && h.Flags&stream.PacketSeq != 0 {
					seen = h.Seq + 1
				}
			}
			return seen
		})
		r.send("", 0, 0, rawReset(stream.CloseCanceled))
	})
	t.Run("producer", func(t *testing.T) {
		p := newPair(t)
		r, s := producerByHand(t, p)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				if _, err := s.Write(make([]byte, 10_000)); err != nil {
					return
				}
			}
		}()
		r.send("", 0, 0, rawResponse(r.frame(r.in, stream.FrameChallenge).Payload)) // its first address is its own
		flood(t, r, func() uint32 { return 0 })
		s.Close()
		waitFor(t, "the writer to see the end", func() { <-done })
	})
}

func rawResponse(nonce []byte) stream.Frame {
	return stream.Frame{Type: stream.FrameResponse, Payload: nonce}
}

// A request names the subject of its answer. If nobody there acknowledges, little goes there, and nothing twice.
func TestRequestCannotDirectAStreamElsewhere(t *testing.T) {
	const first, packet = 64 << 10, 16 + 8 + 10_000
	p := newPair(t)
	serveChatter(t, p, stream.ServerParams{AckTimeout: 10 * time.Millisecond}) // asks often
	nc, victim := p.consumer.Conn, "_SINBOX.victim.~1mVz00000000001"           // offers all that can be offered
	r := &rawPeer{t: t, nc: nc, number: 7, in: subscribe(t, nc, victim)}
	if err := nc.PublishMsg(&nats.Msg{Subject: "svc", Reply: victim, Header: nats.Header{"Stream-Open": {"~1mVz"}}}); err != nil {
		t.Fatal(err)
	}
	bytes := 0
	for last := time.Now(); time.Since(last) < 500*time.Millisecond; { // packets would be sent again meanwhile
		m, err := r.in.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		if h, _, err := stream.ParsePacketHeader(m.Data); err != nil {
			t.Fatal(err)
		} else if h.Flags&stream.PacketSeq != 0 {
			bytes, last = bytes+len(m.Data), time.Now()
		}
		if m.Reply != "" {
			r.to = m.Reply
		}
	}
	r.send("", 0, 0, rawReset(stream.CloseCanceled))
	if bytes == 0 || bytes > first+32<<10+packet { // the first packets may hold several records
		t.Errorf("%d bytes came, want %d and a packet at most", bytes, first)
	}
}

// A producer names the subject at which it receives. The consumer sends few bytes there until the owner of the subject
// has answered a challenge. More credit and repeated questions of the producer do not change that. After the answer
// everything is sent.
func TestProducerCannotDirectAnUploadElsewhere(t *testing.T) {
	const first, packet = 64 << 10, 16 + 8 + 10_000
	p := newPair(t)
	s, reply, nc := rawStream(t, p)
	victim := "victim." + nats.NewInbox() + ".~1mVz00000000001" // grants all that can be granted
	r := &rawPeer{t: t, nc: nc, number: 8, to: reply, in: subscribe(t, nc, rawInbox())}
	got := subscribe(t, nc, victim)
	r.send(victim, 0, 0, rawPing())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			if _, err := s.Write(make([]byte, 10_000)); err != nil {
				return
			}
		}
	}()
	var next uint32 // after the last packet that arrived
	var nonce []byte
	// arrived returns the bytes of packets of records that came to the victim.
	arrived := func(wait time.Duration) (bytes int) {
		for m, err := got.NextMsg(wait); err == nil; m, err = got.NextMsg(wait) {
			h, body, err := stream.ParsePacketHeader(m.Data)
			if err != nil {
				t.Fatal(err)
			}
			if h.Flags&stream.PacketSeq != 0 {
				bytes += len(m.Data)
				next = max(next, h.Seq+1)
			} else if f, _, err := stream.ParseFrame(body); err == nil && f.Type == stream.FrameChallenge {
				nonce = f.Payload
			}
		}
		return bytes
	}
	bytes := 0
	for i := range 60 {
		ack := next * uint32(i%2)
		c := stream.AppendCredit(nil, stream.Credit{Ack: ack, Packets: ack + 1000, Bytes: 1 << 40})
		r.send("", 0, 0, stream.Frame{Type: stream.FrameCredit, Flags: stream.FlagGap, Payload: c})
		bytes += arrived(10 * time.Millisecond)
	}
	if bytes < first || bytes > first+packet {
		t.Errorf("%d bytes came, want %d and one packet at most", bytes, first)
	}
	if nonce == nil {
		t.Fatal("the subject was not challenged")
	}
	eventually(t, "the rest comes", func() bool {
		r.send("", 0, 0, rawResponse(nonce), rawCredit(stream.Credit{Ack: next, Packets: next + 1000, Bytes: 1 << 40}))
		bytes += arrived(10 * time.Millisecond)
		return bytes > 4*first
	})
	s.Close()
	waitFor(t, "the writer to see the end", func() { <-done })
}

// A peer that moves gets everything at its new subject once it has answered the challenge there. Answers of others to
// it change nothing.
func TestPeerMovesOnceItHasProvedWhere(t *testing.T) {
	p := newPair(t)
	const fast = 5 * time.Millisecond
	serveChatter(t, p, stream.ServerParams{AckTimeout: fast})
	r := consumerByHand(t, p)
	atFirst, atSecond := subscribe(t, r.nc, rawInbox()), subscribe(t, r.nc, rawInbox())
	// isData reports whether a packet of records comes to sub.
	isData := func(sub *nats.Subscription) bool {
		for m, err := sub.NextMsg(50 * time.Millisecond); err == nil; m, err = sub.NextMsg(50 * time.Millisecond) {
			if h, _, err := stream.ParsePacketHeader(m.Data); err == nil && h.Flags&stream.PacketSeq != 0 {
				return true
			}
		}
		return false
	}
	// challenge has the library's end challenge sub, and returns when no challenge is under way any longer.
	challenge := func(sub *nats.Subscription) (nonce []byte) {
		r.send(sub.Subject, 0, 0, rawPing())
		nonce = r.frame(sub, stream.FrameChallenge).Payload
		time.Sleep(8 * fast)
		return nonce
	}
	grant := func(from uint32) {
		r.send("", 0, 0, rawCredit(stream.Credit{Ack: from, Packets: from + 64, Bytes: 1 << 40}))
	}

	nonce := challenge(atFirst)
	r.send("", 0, 0, rawResponse([]byte("12345678")))
	challenge(atSecond) // the first challenge is void now
	r.send("", 0, 0, rawResponse(nonce))
	grant(0)
	if isData(atFirst) {
		t.Fatal("data went to a subject that was not proved")
	}
	r.send("", 0, 0, rawResponse(challenge(atSecond)))
	eventually(t, "data goes to the proved subject", func() bool {
		r.send("", 0, 0, stream.Frame{Type: stream.FrameCredit, Flags: stream.FlagGap, Payload: stream.AppendCredit(nil, stream.Credit{Packets: 64, Bytes: 1 << 40})})
		return isData(atSecond)
	})
	if isData(atFirst) {
		t.Error("data went to the first subject")
	}
	r.send("", 0, 0, rawReset(stream.CloseCanceled))
}

// Both ends answer a challenge at the known subject of their peer, with its content, and once for a packet.
func TestChallengeIsAnswered(t *testing.T) {
	p := newPair(t)
	check := func(t *testing.T, r *rawPeer) {
		var frames []stream.Frame
		for i := range 100 {
			frames = append(frames, stream.Frame{Type: stream.FrameChallenge, Payload: fmt.Appendf(nil, "nonce%03d", i)})
		}
		r.send("", 0, 0, frames...)
		if f := r.frame(r.in, stream.FrameResponse); string(f.Payload) != "nonce099" {
			t.Errorf("the answer is %q", f.Payload)
		}
		r.send("", 0, 0, stream.Frame{Type: stream.FrameChallenge, Payload: []byte("the last")})
		if f := r.frame(r.in, stream.FrameResponse); string(f.Payload) != "the last" {
			t.Errorf("a packet with 100 challenges was answered more than once: %q", f.Payload)
		}
		r.send("", 0, 0, rawReset(stream.CloseCanceled))
	}
	t.Run("producer", func(t *testing.T) {
		serveChatter(t, p, stream.ServerParams{})
		check(t, consumerByHand(t, p))
	})
	t.Run("consumer", func(t *testing.T) {
		r, _ := producerByHand(t, p)
		check(t, r)
	})
}

// Reply subjects of packets that are dropped change nothing: they may be of anybody.
func TestDroppedPacketsNameNoAddress(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
		for range r.All() {
		}
		return nil
	})
	r := consumerByHand(t, p)
	r.send("", stream.PacketSeq, 0, rawData("a"))
	elsewhere := nats.NewInbox()
	got := subscribe(t, r.nc, elsewhere)
	r.send(elsewhere, stream.PacketSeq, 0, rawData("a")) // a duplicate
	r.send(elsewhere, stream.PacketSeq, 9, rawData("j")) // an early one
	r.number += 2
	r.send(elsewhere, stream.PacketSeq, 1, rawData("b")) // of another sender, which is told so
	if f := r.frame(got, stream.FrameReset); f.Code != stream.CloseCanceled {
		t.Errorf("the other sender got %+v", f)
	}
	r.number -= 2
	r.send("", 0, 1, stream.Frame{Type: stream.FrameChallenge, Payload: []byte("the last")})
	r.frame(r.in, stream.FrameResponse)
	if m, err := got.NextMsg(20 * time.Millisecond); err == nil {
		t.Errorf("the subject that dropped packets named got %q", m.Data)
	}
	r.send("", 0, 1, rawReset(stream.CloseCanceled))
}

// ACK on a control packet asks for nothing, PING does.
func TestAckOnControlPacketAsksForNothing(t *testing.T) {
	p := newPair(t)
	check := func(t *testing.T, r *rawPeer) {
		for range 20 {
			r.send("", stream.PacketAck, 0, rawCredit(stream.Credit{Packets: 32, Bytes: 1 << 18}))
		}
		r.send("", stream.PacketAck, 0, rawPing())
		r.frame(r.in, stream.FrameCredit)
		for m, err := r.in.NextMsg(50 * time.Millisecond); err == nil; m, err = r.in.NextMsg(50 * time.Millisecond) {
			if _, body, _ := stream.ParsePacketHeader(m.Data); stream.FrameType(body[0]) == stream.FrameCredit {
				t.Error("a control packet with ACK was answered")
			}
		}
		r.send("", 0, 0, rawReset(stream.CloseCanceled))
	}
	t.Run("producer", func(t *testing.T) {
		s := newService(t, p, stream.ServerParams{})
		s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
			<-r.Context().Done()
			return nil
		})
		check(t, consumerByHand(t, p))
	})
	t.Run("consumer", func(t *testing.T) {
		r, _ := producerByHand(t, p)
		r.frame(r.in, stream.FrameCredit) // the answer to its hello
		check(t, r)
	})
}

// Headers of a packet's message mean nothing, those of a request neither.
func TestHeadersOfPacketsAreIgnored(t *testing.T) {
	p := newPair(t)
	r, s := producerByHand(t, p)
	for i, h := range []nats.Header{{"Any": {"thing"}}, {"Status": {"503"}}, {"Stream-Open": {"~2m5I"}}, {"Stream-Timeout": {"1"}}} {
		if err := r.nc.PublishMsg(&nats.Msg{Subject: r.to, Header: h, Data: rawPacket(stream.PacketSeq, r.number, uint32(i), rawData("x"))}); err != nil {
			t.Fatal(err)
		}
		if rec, err := s.Recv(); err != nil || string(rec) != "x" {
			t.Errorf("headers %v: %q, %v", h, rec, err)
		}
	}
	r.send("", stream.PacketSeq, 4, rawClose(stream.CloseNormalClosure))
	wantEOF(t, s)
}

// A stream across accounts whose mapped subjects are gone is asked for by the subject of its request. Here the test
// plays one end, with subjects that look as if a NATS server had mapped them.

// mapped returns a subject that looks mapped: it ends with no token. NATS does not let a client use _R_ in a reply
// subject.
func mapped(name string) string { return "_M_." + name + "." + nats.NewInbox()[len("_INBOX."):] }

// crossedConsumer opens a stream on "svc" by hand, with a mapped reply subject, and returns the name that the producer
// gives it.
func crossedConsumer(t *testing.T, p *pair) (r *rawPeer, token string) {
	t.Helper()
	nc, inbox := p.consumer.Conn, mapped("first")
	r = &rawPeer{t: t, nc: nc, number: 7, in: subscribe(t, nc, inbox)}
	if err := nc.PublishMsg(&nats.Msg{Subject: "svc", Reply: inbox, Header: nats.Header{"Stream-Open": {"~1m5I"}}}); err != nil {
		t.Fatal(err)
	}
	m := message(t, r.in, stream.FramePing)
	r.to = m.Reply
	for _, f := range frames(t, m) {
		if f.Type == stream.FrameResume {
			token = string(f.Payload)
		}
	}
	if token == "" || !strings.HasSuffix(r.to, "."+token) {
		t.Fatalf("the producer at %s names its stream %q", r.to, token)
	}
	r.send("", 0, 0, rawCredit(stream.Credit{Packets: 32, Bytes: 1 << 18}))
	return r, token
}

// numbered is a handler that writes numbers without end.
func numbered(w *stream.Writer, r *stream.Request) error {
	for i := 0; ; i++ {
		if _, err := w.Write(fmt.Append(nil, i)); err != nil {
			return err
		}
	}
}

// The name of a stream is told to consumers of other accounts and to no others.
func TestNameIsToldAcrossAccounts(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	s.handle(t, "svc", numbered)
	r, _ := crossedConsumer(t, p)
	r.send("", 0, 0, rawReset(stream.CloseCanceled))
	within := consumerByHand(t, p)
	within.send("", 0, 0, rawPing())
	for m := nextRequest(t, within.in); ; m = nextRequest(t, within.in) {
		f := frames(t, m)
		if f[len(f)-1].Type == stream.FrameResume {
			t.Fatal("a stream within an account was named")
		}
		if f[0].Type == stream.FrameCredit {
			break
		}
	}
	within.send("", 0, 0, rawReset(stream.CloseCanceled))
}

// resumption is the packet that asks for the stream with token.
func resumption(token string) []byte {
	return rawPacket(0, 0, 0, stream.Frame{Type: stream.FrameResume, Payload: []byte(token)})
}

// ask asks for a stream, and returns the subscription to the reply subject.
func (r *rawPeer) ask(token, reply string) *nats.Subscription {
	r.t.Helper()
	at := subscribe(r.t, r.nc, reply)
	if err := r.nc.PublishRequest("svc", reply, resumption(token)); err != nil {
		r.t.Fatal(err)
	}
	return at
}

// A consumer that asks for its stream is challenged where it asks from. When it has answered, the stream goes on there.
func TestConsumerIsFoundWhereItAsksFrom(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{MaxStreams: 1})
	s.handle(t, "svc", numbered)
	r, token := crossedConsumer(t, p)
	at := r.ask(token, mapped("second"))
	m := message(t, at, stream.FrameChallenge)
	f := frames(t, m)
	if len(f) != 2 || f[1].Type != stream.FramePing || m.Reply != r.to {
		t.Fatalf("%+v, reply %s", f, m.Reply)
	}
	r.send("", 0, 0, rawResponse(f[0].Payload), stream.Frame{Type: stream.FrameChallenge, Payload: []byte("consumer")})
	if f := frames(t, message(t, at, stream.FrameResponse)); string(f[0].Payload) != "consumer" {
		t.Errorf("answer %+v", f[0])
	}
	if f := frames(t, message(t, at, stream.FrameCredit)); f[0].Flags&stream.FlagGap == 0 {
		t.Error("the producer does not ask for what the consumer sent meanwhile")
	}
	r.send("", 0, 0, stream.Frame{Type: stream.FrameCredit, Flags: stream.FlagGap, Payload: stream.AppendCredit(nil, stream.Credit{Packets: 32, Bytes: 1 << 18})})
	for first := false; !first; { // packets that were never published may come before those that are published again
		h, _, err := stream.ParsePacketHeader(message(t, at, stream.FrameData).Data)
		if err != nil {
			t.Fatal(err)
		}
		first = h.Seq == 0
	}
	if st := s.Stats(); st.Streams != 1 || st.DroppedStray+st.DroppedRequest != 0 {
		t.Errorf("%+v", st)
	}
	r.send("", 0, 0, rawReset(stream.CloseCanceled))
}

// A stranger that has heard a name, and asks, gets a challenge in each AckTimeout at most. Without the consumer's
// number it cannot answer.
func TestNameAloneRedirectsNothing(t *testing.T) {
	p := newPair(t)
	const fast = 50 * time.Millisecond
	s := newService(t, p, stream.ServerParams{AckTimeout: fast})
	s.handle(t, "svc", numbered)
	r, token := crossedConsumer(t, p)
	victim := mapped("victim")
	start := time.Now()
	at := r.ask(token, victim)
	nonce := frames(t, message(t, at, stream.FrameChallenge))[0].Payload
	stranger := *r
	for stranger.number = 1; stranger.number < 7; stranger.number++ {
		stranger.send("", 0, 0, rawResponse(nonce), rawCredit(stream.Credit{Packets: 1000, Bytes: 1 << 40}))
	}
	for range 1000 {
		if err := r.nc.PublishRequest("svc", victim, resumption(token)); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	n := 1
	for m, err := at.NextMsg(2 * fast); err == nil; m, err = at.NextMsg(2 * fast) {
		if frames(t, m)[0].Type != stream.FrameChallenge {
			t.Fatalf("the victim got %x", m.Data)
		}
		n++
	}
	if most := 2 + int(time.Since(start)/fast); n > most {
		t.Errorf("%d challenges in %v, at most %d may be", n, time.Since(start), most)
	}
	r.send("", 0, 0, rawPing())
	r.frame(r.in, stream.FrameCredit) // the stream is where it was
	r.send("", 0, 0, rawReset(stream.CloseCanceled))
}

func wantNothing(t *testing.T, sub *nats.Subscription) {
	t.Helper()
	if m, err := sub.NextMsg(50 * time.Millisecond); err == nil {
		t.Errorf("%s got %x", m.Subject, m.Data)
	}
}

// A name that is not that of a stream across accounts gets no answer and starts no handler.
func TestUnknownNamesAreDropped(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{MaxStreams: 1})
	s.handle(t, "svc", numbered)
	within := consumerByHand(t, p)
	ordinary := within.to[strings.LastIndexByte(within.to, '.')+1:]
	for _, token := range []string{"~1m5G0123456789A", "0123456789abcdef", ordinary} {
		wantNothing(t, within.ask(token, mapped("guess")))
	}
	for _, reply := range []string{"", "svc", "$JS.API.INFO", "other"} {
		if err := within.nc.PublishMsg(&nats.Msg{Subject: "svc", Reply: reply, Data: resumption(ordinary)}); err != nil {
			t.Fatal(err)
		}
	}
	const dropped = 2 + 4 // the ordinary stream is known, and nothing is done about it
	eventually(t, "they are counted", func() bool { return s.Stats().DroppedStray >= dropped })
	if st := s.Stats(); st.Streams != 1 {
		t.Errorf("%+v", st)
	}
	within.send("", 0, 0, rawReset(stream.CloseCanceled))
}

// A consumer that asks for a stream which has ended normally gets the last word again.
func TestEndIsRepeatedWhereItIsAskedFor(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	s.handle(t, "svc", func(w *stream.Writer, r *stream.Request) error {
		_, err := io.Copy(io.Discard, r)
		return err
	})
	r, token := crossedConsumer(t, p)
	r.send("", stream.PacketSeq|stream.PacketAck, 0, rawData("all"), rawClose(stream.CloseNormalClosure))
	for closed := false; !closed; {
		m := nextRequest(t, r.in)
		h, _, _ := stream.ParsePacketHeader(m.Data)
		if closed = h.Flags&stream.PacketSeq != 0; closed {
			r.send("", 0, 1, rawCredit(stream.Credit{Ack: h.Seq + 1, Packets: 32, Bytes: 1 << 18}))
		}
	}
	eventually(t, "the stream has ended", func() bool { return s.Stats().Streams == 0 })
	at := r.ask(token, mapped("second"))
	if f := frames(t, nextRequest(t, at)); f[0].Type != stream.FrameCredit {
		t.Errorf("the answer is %+v", f[0])
	}
}

// crossedProducer answers a stream of p's consumer by hand, from a mapped subject, and returns the subscription to the
// request subject.
func crossedProducer(t *testing.T, p *pair, named bool) (r *rawPeer, s *stream.Stream, asked *nats.Subscription) {
	t.Helper()
	subject, requests := rawRequests(t, p)
	s = open(t, p.consumer, subject)
	inbox := mapped("first")
	r = &rawPeer{t: t, nc: p.producer.Conn, number: 8, to: nextRequest(t, requests).Reply}
	r.in = subscribe(t, r.nc, inbox)
	hello := []stream.Frame{rawPing()}
	if named {
		hello = append(hello, stream.Frame{Type: stream.FrameResume, Payload: []byte("~1m5G0123456789A")})
	}
	r.send(inbox, 0, 0, hello...)
	r.frame(r.in, stream.FrameCredit)
	return r, s, requests
}

// A consumer asks for its stream when the producer does not answer, not before, and not more often than that takes.
func TestConsumerAsksForItsStreamOfASilentProducer(t *testing.T) {
	const ack = 40 * time.Millisecond
	p := newPair(t, pairOptions{consumer: stream.ClientParams{KeepAlive: 2 * ack, AckTimeout: ack}})
	start := time.Now()
	r, s, asked := crossedProducer(t, p, true)
	m := nextRequest(t, asked)
	h, _, _ := stream.ParsePacketHeader(m.Data)
	if f := frames(t, m); len(f) != 1 || f[0].Type != stream.FrameResume || string(f[0].Payload) != "~1m5G0123456789A" || h.Sender != 0 || m.Header != nil {
		t.Fatalf("it asks with %+v, %+v, %v", h, f, m.Header)
	}
	if m.Reply != r.to {
		t.Errorf("it asks from %s, want %s", m.Reply, r.to)
	}
	r.frame(r.in, stream.FramePing) // it asked where the producer was first
	n := 0
	for ; n < 5; n++ {
		nextRequest(t, asked)
	}
	if d := time.Since(start); d < time.Duration(n)*ack/2 {
		t.Errorf("it asked %d times in %v", n, d)
	}

	second := mapped("second")
	at := subscribe(t, r.nc, second)
	r.send(second, 0, 0, stream.Frame{Type: stream.FrameChallenge, Payload: []byte("producer")}, rawPing())
	if f := frames(t, nextRequest(t, at)); f[0].Type != stream.FrameResponse || string(f[0].Payload) != "producer" {
		t.Fatalf("the answer is %+v", f)
	}
	challenge := frames(t, nextRequest(t, at))
	if challenge[0].Type != stream.FrameChallenge {
		t.Fatalf("after the answer comes %+v", challenge)
	}
	r.send("", 0, 0, rawResponse(challenge[0].Payload))
	if f := frames(t, message(t, at, stream.FrameCredit)); f[0].Flags&stream.FlagGap == 0 {
		t.Error("the consumer does not ask for what was sent meanwhile")
	}
	r.send("", stream.PacketSeq, 0, rawData("on"), rawClose(stream.CloseNormalClosure))
	if rec, err := s.Recv(); err != nil || string(rec) != "on" {
		t.Errorf("%q, %v", rec, err)
	}
	wantEOF(t, s)
}

// A consumer that was told no name does not ask.
func TestConsumerWithoutNameDoesNotAsk(t *testing.T) {
	const ack = 10 * time.Millisecond
	p := newPair(t, pairOptions{consumer: stream.ClientParams{KeepAlive: 2 * ack, AckTimeout: ack, PeerTimeout: 20 * ack, ResumeTimeout: time.Second}})
	_, s, asked := crossedProducer(t, p, false)
	_, err := s.Recv()
	wantCode(t, err, stream.CloseAbnormalClosure, "")
	wantNothing(t, asked)
}

// A producer that is not answered hears the subject of the request beside its queue group, for a while, also after the
// registration was stopped.
func TestProducerListensForItsSilentConsumer(t *testing.T) {
	const ack = 20 * time.Millisecond
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{KeepAlive: 2 * ack, AckTimeout: ack, PeerTimeout: 20 * time.Second, ResumeTimeout: 20 * ack})
	reg := s.register(t, "svc", "group", numbered)
	if err := s.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	before := s.nc.NumSubscriptions()
	r, token := crossedConsumer(t, p)
	eventually(t, "the producer listens", func() bool { return s.nc.NumSubscriptions() == before+1 })
	reg.Stop()
	var at *nats.Subscription
	eventually(t, "it hears its consumer", func() bool {
		at = r.ask(token, mapped("second"))
		_, err := at.NextMsg(ack)
		return err == nil
	})
	stop := time.Now().Add(30 * ack)
	eventually(t, "it listens no longer", func() bool {
		if time.Now().After(stop) {
			r.send("", 0, 0, rawReset(stream.CloseCanceled))
		} else {
			r.send("", 0, 0, rawPing())
		}
		return s.nc.NumSubscriptions() == before-1
	})
	eventually(t, "the stream has ended", func() bool {
		r.send("", 0, 0, rawReset(stream.CloseCanceled))
		return s.Stats().Streams == 0
	})
}

// A server that may subscribe to its subjects only in a queue group tries to listen once, and goes on.
func TestProducerThatMayNotListenGoesOn(t *testing.T) {
	const ack = 20 * time.Millisecond
	p := newRestricted(t, `authorization { users: [
		{ user: producer, password: secret-of-producer, permissions: { subscribe: [ "svc.> group", "_SINBOX.producer.>" ] } }
		{ user: alice, password: secret-of-alice }
	] }`)
	denied := make(refusals, 16)
	s := newService(t, p, stream.ServerParams{KeepAlive: 2 * ack, AckTimeout: ack, PeerTimeout: 40 * ack, ResumeTimeout: 4 * ack}, user("producer", denied.option())...)
	reg := s.register(t, "svc.down", "group", numbered)
	if err := s.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	alice := p.newClient(t, stream.ClientParams{}, user("alice")...)
	for range 3 {
		inbox := mapped("first")
		in := subscribe(t, alice.Conn, inbox)
		if err := alice.Conn.PublishMsg(&nats.Msg{Subject: "svc.down", Reply: inbox, Header: nats.Header{"Stream-Open": {"~1m5I"}}}); err != nil {
			t.Fatal(err)
		}
		message(t, in, stream.FramePing)
		eventually(t, "the silent consumer is given up", func() bool { return s.Stats().Streams == 0 })
	}
	if n := len(denied); n != 1 {
		t.Errorf("NATS refused %d times", n)
	}
	if err := reg.Err(); err != nil {
		t.Error(err)
	}
}
