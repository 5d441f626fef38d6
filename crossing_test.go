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

// A stream across accounts whose mapped subjects are gone is asked for by the subject of its request. Here the test plays one
// end, with subjects that look as if a NATS server had mapped them.

// mapped returns a subject that looks mapped: it ends with no token. NATS does not let a client use _R_ in a reply subject.
func mapped(name string) string { return "_M_." + name + "." + nats.NewInbox()[len("_INBOX."):] }

// frames returns the frames of a packet.
func frames(t *testing.T, m *nats.Msg) (all []stream.Frame) {
	t.Helper()
	_, body, err := stream.ParsePacketHeader(m.Data)
	for err == nil && len(body) > 0 {
		var f stream.Frame
		f, body, err = stream.ParseFrame(body)
		all = append(all, f)
	}
	if err != nil {
		t.Fatalf("%v in %x", err, m.Data)
	}
	return all
}

// message returns the next message at sub whose packet begins with a frame of type typ.
func message(t *testing.T, sub *nats.Subscription, typ stream.FrameType) *nats.Msg {
	t.Helper()
	for {
		if m := nextRequest(t, sub); frames(t, m)[0].Type == typ {
			return m
		}
	}
}

// resumption is the packet that asks for the stream with token.
func resumption(token string) []byte {
	return rawPacket(0, 0, 0, stream.Frame{Type: stream.FrameResume, Payload: []byte(token)})
}

// crossedConsumer opens a stream on "svc" by hand, with a mapped reply subject, and returns the name that the producer gives it.
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

// ask asks for a stream, and returns what comes to the reply subject.
func (r *rawPeer) ask(token, reply string) *nats.Subscription {
	r.t.Helper()
	at := subscribe(r.t, r.nc, reply)
	if err := r.nc.PublishRequest("svc", reply, resumption(token)); err != nil {
		r.t.Fatal(err)
	}
	return at
}

func wantNothing(t *testing.T, sub *nats.Subscription) {
	t.Helper()
	if m, err := sub.NextMsg(50 * time.Millisecond); err == nil {
		t.Errorf("%s got %x", m.Subject, m.Data)
	}
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
	if h, _, err := stream.ParsePacketHeader(message(t, at, stream.FrameData).Data); err != nil || h.Seq != 0 {
		t.Errorf("the first packet is number %d, %v", h.Seq, err)
	}
	if st := s.Stats(); st.Streams != 1 || st.DroppedStray+st.DroppedRequest != 0 {
		t.Errorf("%+v", st)
	}
	r.send("", 0, 0, rawReset(stream.CloseCanceled))
}

// Who has heard a name, and asks, gets a challenge in each AckTimeout at most. Without the consumer's number it cannot answer.
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

// crossedProducer answers a stream of p's consumer by hand, from a mapped subject, and returns what comes to the request subject.
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
func TestConsumerAsksForItsStream(t *testing.T) {
	const ack = 40 * time.Millisecond
	p := newPair(t, pairOptions{consumer: stream.ClientParams{KeepAlive: 2 * ack, AckTimeout: ack}})
	r, s, asked := crossedProducer(t, p, true)
	m := nextRequest(t, asked)
	start := time.Now()
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

// A producer that is not answered hears the subject of the request beside its queue group, for a while, also after the registration
// was stopped.
func TestProducerListensForItsConsumer(t *testing.T) {
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
func TestProducerThatMayNotListen(t *testing.T) {
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
