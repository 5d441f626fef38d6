package stream_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// A peer says by the reply subjects of its packets where it receives. It may move, and then proves that it receives at the new
// subject before anything but a challenge goes there.

// rawPeer is an end of a stream that the test plays: the bytes that a library's end sends to it, and where to answer.
type rawPeer struct {
	t      *testing.T
	nc     *nats.Conn
	number uint64 // of the sender that the test is
	to     string // the library's end
	in     *nats.Subscription
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

func subscribe(t *testing.T, nc *nats.Conn, subject string) *nats.Subscription {
	t.Helper()
	sub, err := nc.SubscribeSync(subject)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sub.Unsubscribe() })
	return sub
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

func rawResponse(nonce []byte) stream.Frame {
	return stream.Frame{Type: stream.FrameResponse, Payload: nonce}
}

// serveChatter serves "svc" with handlers that send what they can and take what comes.
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

// victims are given to library ends by peers that acknowledge without end. Each gets challenges, few, and nothing else.
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
		flood(t, r, func() uint32 { return 0 })
		s.Close()
		waitFor(t, "the writer to see the end", func() { <-done })
	})
}

// A peer that moves gets everything at its new subject once it has answered the challenge there, whoever else answers one.
func TestPeerMovesOnceItHasProvedWhere(t *testing.T) {
	p := newPair(t)
	const fast = 5 * time.Millisecond
	serveChatter(t, p, stream.ServerParams{AckTimeout: fast})
	r := consumerByHand(t, p)
	first, second := rawInbox(), rawInbox()
	atFirst, atSecond := subscribe(t, r.nc, first), subscribe(t, r.nc, second)
	// isData reports whether a packet of records comes to sub.
	isData := func(sub *nats.Subscription) bool {
		for m, err := sub.NextMsg(50 * time.Millisecond); err == nil; m, err = sub.NextMsg(50 * time.Millisecond) {
			if h, _, err := stream.ParsePacketHeader(m.Data); err == nil && h.Flags&stream.PacketSeq != 0 {
				return true
			}
		}
		return false
	}
	ping := func(reply string) {
		r.send(reply, 0, 0, rawPing())
		time.Sleep(8 * fast) // no challenge is under way any longer
	}
	grant := func(from uint32) {
		r.send("", 0, 0, rawCredit(stream.Credit{Ack: from, Packets: from + 64, Bytes: 1 << 40}))
	}

	ping(first)
	nonce := r.frame(atFirst, stream.FrameChallenge).Payload
	r.send("", 0, 0, rawResponse([]byte("12345678")))
	ping(second) // the first challenge is void now
	r.send("", 0, 0, rawResponse(nonce))
	grant(0)
	if isData(atFirst) {
		t.Fatal("data went to a subject that was not proved")
	}
	r.frame(atSecond, stream.FrameChallenge) // of the question before
	ping(second)
	nonce = r.frame(atSecond, stream.FrameChallenge).Payload
	r.send("", 0, 0, rawResponse(nonce))
	eventually(t, "data goes to the proved subject", func() bool {
		r.send("", 0, 0, stream.Frame{Type: stream.FrameCredit, Flags: stream.FlagGap, Payload: stream.AppendCredit(nil, stream.Credit{Packets: 64, Bytes: 1 << 40})})
		return isData(atSecond)
	})
	if isData(atFirst) {
		t.Error("data went to the first subject")
	}
	r.send("", 0, 0, rawReset(stream.CloseCanceled))
}

// Both ends answer a challenge where they know their peer to be, with what it held, and once for a packet.
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
