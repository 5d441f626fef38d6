package stream

import (
	"strings"
	"testing"
	"testing/synctest"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/natsconn/fake"
)

// hold makes every publish of the server wait until the function it returns is called.
func (m *memoryPair) hold() (release func()) {
	hold, before := make(chan struct{}), m.back.Published
	m.back.Published = func(subject, reply string, data []byte) error {
		<-hold
		return before(subject, reply, data)
	}
	m.server.ep.outbox.doLater(outOfStream{subject: "held", refuse: &CloseError{Code: CloseTryAgainLater}})
	synctest.Wait()
	return func() {
		close(hold)
		synctest.Wait()
		m.back.Published = before
	}
}

// controlPacket returns a control packet from the consumer s to its handler.
func (s *Stream) controlPacket(frames ...Frame) []byte {
	return AppendPacket(nil, PacketHeader{Sender: s.session.sender}, frames...)
}

// A stream whose peer floods it with control packets has a few of them waiting, and leaves the others room and turns.
func TestControlFloodTakesItsShare(t *testing.T) {
	const flood = 2 * maxInbound
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		ended := make(chan error, 2)
		m.handle(t, "svc", waits(ended))
		hostile, honest := m.open(t, "svc"), m.open(t, "svc")
		synctest.Wait()
		subject := func(s *Stream) string { return s.session.out.peer }
		release := m.hold()
		before := m.server.Stats().DroppedControl
		ping := hostile.controlPacket(Frame{Type: FramePing})
		for range flood {
			m.server.ep.receive(&nats.Msg{Subject: subject(hostile), Data: ping})
		}
		if n := m.server.ep.outbox.inbound.Len(); n > maxControls {
			t.Errorf("%d control words of one stream wait, want at most %d", n, maxControls)
		}
		if n := m.server.Stats().DroppedControl - before; n != flood-maxControls {
			t.Errorf("%d control packets were counted as dropped of %d", n, flood)
		}
		m.server.ep.receive(&nats.Msg{Subject: subject(honest), Reply: honest.session.reply, Data: honest.controlPacket(Frame{Type: FramePing})})
		if n := m.server.Stats().DroppedControl - before; n != flood-maxControls {
			t.Errorf("a control packet of another stream was dropped")
		}
		answers := map[string]int{}
		published := m.back.Published
		m.back.Published = func(to, reply string, data []byte) error {
			if isFrame(data, FrameCredit) {
				answers[to]++
			}
			return published(to, reply, data)
		}
		release()
		if answers[honest.session.reply] == 0 {
			t.Error("the other stream was not answered")
		}
		if n := answers[hostile.session.reply]; n > maxControls {
			t.Errorf("%d answers to %d questions that were taken", n, maxControls)
		}
		// There is room again.
		dropped := m.server.Stats().DroppedControl
		m.server.ep.receive(&nats.Msg{Subject: subject(hostile), Data: ping})
		synctest.Wait()
		if m.server.Stats().DroppedControl != dropped {
			t.Error("there is no room again")
		}
		for _, s := range []*Stream{hostile, honest} {
			_ = s.Close()
			synctest.Wait()
			<-ended
		}
		m.nothingLeft(t)
	})
}

// Control packets and reply subjects that wait for an outbox which is held in a publish take no more than a bound in bytes,
// those of strangers a quarter of it.
func TestControlWordsAreBoundedInBytes(t *testing.T) {
	long := strings.Repeat("r", 4000)
	for name, c := range map[string]struct {
		stranger bool
		word     control
		most     int // that wait
	}{
		"packets of streams":   {false, control{packet: make([]byte, maxControlPacket)}, maxInboundBytes / maxControlPacket},
		"replies to streams":   {false, control{reply: long}, maxInboundBytes / len(long)},
		"short, of streams":    {false, control{absent: true}, maxInbound},
		"replies of strangers": {true, control{reply: long}, maxInboundBytes / 4 / len(long)},
		"short, of strangers":  {true, control{reply: "r"}, maxInbound/4 + 1},
	} {
		t.Run(name, func(t *testing.T) {
			o := new(outbox)
			o.init(&endpoint{})
			var s *session
			for i := range 2 * maxInbound {
				if i%maxControls == 0 && !c.stranger {
					s = new(session)
				}
				c.word.session = s
				o.deliver(c.word)
			}
			n := o.inbound.Len()
			if n > c.most || n < c.most*9/10 {
				t.Errorf("%d wait, want at most %d", n, c.most)
			}
			if n, dropped := 2*maxInbound-n, o.ep.counters.overrun.Load(); dropped != uint64(n) {
				t.Errorf("%d are counted as dropped, want %d", dropped, n)
			}
		})
	}
}

// What a stream publishes is in proportion to what it was sent: an answer for each question that it takes, and for requests to
// send again no more than is under way, and a packet or two each after that.
func TestFloodsAreAnsweredOnce(t *testing.T) {
	const packets = 30 // that the handler has sent, and that nobody acknowledged
	credit := func(ack int, flags FrameFlags) Frame {
		return Frame{Type: FrameCredit, Flags: flags, Payload: AppendCredit(nil, Credit{Ack: uint32(ack), Packets: packets + 2, Bytes: initialWindow})}
	}
	for name, c := range map[string]struct {
		frame func(i int) Frame
		n     int
		most  int64 // messages out
	}{
		"PING":                       {func(int) Frame { return Frame{Type: FramePing} }, 1000, 1000},
		"CREDIT of nothing":          {func(int) Frame { return credit(0, 0) }, 1000, 0},
		"GAP, the same again":        {func(int) Frame { return credit(0, FlagGap) }, 1000, packets + 1},
		"GAP, a packet further each": {func(i int) Frame { return credit(i+1, FlagGap) }, packets, 2*packets + packets},
		"GAP, back and forth":        {func(i int) Frame { return credit(i/2*(i%2), FlagGap) }, 2 * packets, 2*packets + packets},
		"CREDIT, acknowledging":      {func(i int) Frame { return credit(i+1, 0) }, packets, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				m.handle(t, "svc", func(w *Writer, r *Request) error {
					for range packets {
						if _, err := w.Write([]byte("x")); err != nil {
							return err
						}
						if err := w.Flush(); err != nil {
							return err
						}
					}
					<-r.Context().Done()
					return nil
				})
				s := m.open(t, "svc")
				synctest.Wait()
				m.bus.SetFilter(func(from, _ *fake.Conn, _ *nats.Msg) bool { return from != m.conn }) // the test is the consumer now
				subject := s.session.out.peer
				m.sentBack.take()
				for i := range c.n {
					m.server.ep.receive(&nats.Msg{Subject: subject, Data: s.controlPacket(c.frame(i))})
					synctest.Wait()
				}
				if all, _ := m.sentBack.take(); all > c.most {
					t.Errorf("%d messages for %d, want at most %d", all, c.n, c.most)
				}
				m.bus.SetFilter(nil)
				_ = s.Close()
				synctest.Wait()
				m.nothingLeft(t)
			})
		})
	}
}
