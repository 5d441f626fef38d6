package stream

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"pgregory.net/rapid"

	"github.com/natsstream/stream/internal/natsconn/fake"
)

// Several responders in virtual time.

// serveMany makes n further servers on the bus of m that serve "all", each with what handler returns for its number.
func (m *memoryPair) serveMany(t testing.TB, n int, handler func(i int) Handler) (conns []*fake.Conn, stop func()) {
	t.Helper()
	var servers []*Server
	for i := range n {
		conn := m.bus.Connect(fmt.Sprint("server ", i))
		s, err := newServer(conn, "", ServerParams{
			KeepAlive: m.times.KeepAlive, PeerTimeout: m.times.PeerTimeout, AckTimeout: m.times.AckTimeout,
			ResumeTimeout: m.times.ResumeTimeout, DisconnectTimeout: m.times.DisconnectTimeout,
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Handle("all", handler(i)); err != nil {
			t.Fatal(err)
		}
		conns, servers = append(conns, conn), append(servers, s)
	}
	return conns, func() {
		for _, s := range servers {
			s.Close()
		}
		time.Sleep(time.Second) // for handlers, for which Close does not wait
		synctest.Wait()
	}
}

// openMany sends a request to all of them.
func (m *memoryPair) openMany(t *testing.T, opts ...OpenOption) *Responders {
	t.Helper()
	r, err := m.client.OpenMany(t.Context(), "all", nil, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// all returns the streams of r, and the last error of Next.
func (r *Responders) all(t *testing.T) (all []*Stream, err error) {
	t.Helper()
	for {
		s, err := r.Next(t.Context())
		if err != nil {
			return all, err
		}
		all = append(all, s)
	}
}

// flowing writes records until the consumer leaves.
func flowing(int) Handler {
	return func(w *Writer, _ *Request) error {
		for {
			if _, err := w.Write([]byte("record")); err != nil {
				return err
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// The gathering ends a stall time after the last responder, and no sooner: each new one begins it anew.
func TestGatheringEndsAfterTheLastResponder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		_, stop := m.serveMany(t, 3, flowing)
		defer stop()
		// The request reaches the servers, and the answers of each come half a second after those of the one before.
		start, first := time.Now(), make(map[*fake.Conn]time.Duration)
		m.bus.SetFilter(func(from, to *fake.Conn, msg *nats.Msg) bool {
			if to != m.conn || from == m.conn {
				return true
			}
			if first[from] == 0 {
				first[from] = time.Duration(len(first)+1) * 600 * time.Millisecond
			}
			return time.Since(start) >= first[from]
		})
		streams, err := m.openMany(t, WithStallTimeout(time.Second)).all(t)
		if err != io.EOF || len(streams) != 3 {
			t.Fatalf("%d streams, %v", len(streams), err)
		}
		took(t, "the gathering", start, 2800*time.Millisecond, 2800*time.Millisecond+2*timerSlack)
		m.bus.SetFilter(nil)
		for _, s := range streams {
			for range 10 {
				if _, err := s.Recv(); err != nil {
					t.Fatal(err)
				}
			}
			s.Close()
		}
		m.nothingLeft(t)
	})
}

// The stall time does not run while the connection is down. Responders whose answers were lost meanwhile are found.
func TestGatheringOutlivesAnOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		_, stop := m.serveMany(t, 3, flowing)
		defer stop()
		m.bus.SetFilter(fake.BlackHole(nil, m.conn)) // the answers are lost
		r := m.openMany(t, WithStallTimeout(time.Second), WithMaxResponders(3))
		time.Sleep(500 * time.Millisecond)
		m.conn.Set(nats.RECONNECTING)
		time.Sleep(1400 * time.Millisecond)
		m.conn.Set(nats.CONNECTED)
		time.Sleep(400 * time.Millisecond)
		m.bus.SetFilter(nil)
		streams, err := r.all(t)
		if err != io.EOF || len(streams) != 3 {
			t.Fatalf("%d streams, %v", len(streams), err)
		}
		for _, s := range streams {
			if _, err := s.Recv(); err != nil {
				t.Error(err)
			}
			s.Close()
		}
		m.nothingLeft(t)
	})
}

// A request that was lost with its connection ends, also if nobody limits the wait, unless a responder has answered.
func TestRequestLostWithItsConnectionEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		_, stop := m.serveMany(t, 2, flowing)
		defer stop()
		reconnect := func() {
			synctest.Wait()
			m.conn.Set(nats.RECONNECTING)
			time.Sleep(100 * time.Millisecond)
			m.conn.Set(nats.CONNECTED)
		}
		m.bus.SetFilter(fake.BlackHole(m.conn, nil))
		r := m.openMany(t, WithStallTimeout(time.Hour))
		reconnect()
		start := time.Now()
		if _, err := r.all(t); !isCode(err, CloseAbnormalClosure) {
			t.Errorf("a lost request: %v", err)
		}
		took(t, "the end of a lost request", start, 4*time.Second, 6*time.Second)

		n := 0
		m.bus.SetFilter(func(from, to *fake.Conn, msg *nats.Msg) bool { // one server gets it
			if msg.Subject != "all" {
				return true
			}
			n++
			return n == 1
		})
		r = m.openMany(t, WithStallTimeout(20*time.Second))
		reconnect()
		streams, err := r.all(t)
		if err != io.EOF || len(streams) != 1 {
			t.Errorf("%d streams, %v", len(streams), err)
		}
		r.Close()
		m.nothingLeft(t)
	})
}

func isCode(err error, code int) bool {
	ce, ok := errors.AsType[*CloseError](err)
	return ok && ce.Code == code
}

// Refusals of different senders count once each, however often they arrive.
func TestRepeatedRefusalsCountOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := fake.New()
		conn.Requested = func(*nats.Msg) error { return nil }
		c := fakeClient(t, conn, ClientParams{})
		r, err := c.OpenMany(t.Context(), "all", nil)
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			for sender := range uint64(5) {
				packet := testPacketFlags(0, 2*sender+2, 0, Frame{Type: FrameReset, Code: CloseTryAgainLater, Payload: []byte("full")})
				conn.Deliver(&nats.Msg{Subject: r.gathering.request.reply(), Data: packet})
			}
		}
		_, err = r.all(t)
		few, ok := errors.AsType[*TooFewRespondersError](err)
		if !ok || few.Answered != 0 || few.Refused != 5 || !isCode(few.Err, CloseTryAgainLater) || Retryable(err) {
			t.Error(err)
		}
	})
}

// A responder moves to the token of its stream, and the request's token gets nothing more. Lost questions, challenges
// and answers delay that.
func TestRespondersMoveToTheirTokens(t *testing.T) {
	for _, lost := range []FrameType{0, FramePing, FrameChallenge, FrameResponse} {
		t.Run(fmt.Sprint("lost ", lost), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := memoryTest(t, ClientParams{})
				var mu sync.Mutex
				subjects := make(map[string]int) // packets of records
				left := 4
				m.bus.SetFilter(func(from, to *fake.Conn, msg *nats.Msg) bool {
					mu.Lock()
					defer mu.Unlock()
					if isSequenced(msg.Data) {
						subjects[msg.Subject]++
					}
					if lost != 0 && left > 0 && isFrame(msg.Data, lost) {
						left--
						return false
					}
					return true
				})
				_, stop := m.serveMany(t, 3, flowing)
				defer stop()
				r := m.openMany(t, WithMaxResponders(3))
				streams, err := r.all(t)
				if err != io.EOF || len(streams) != 3 {
					t.Fatalf("%d streams, %v", len(streams), err)
				}
				read := func(n int) {
					for _, s := range streams {
						for range n {
							if rec, err := s.Recv(); string(rec) != "record" || err != nil {
								t.Fatal(string(rec), err)
							}
						}
					}
				}
				if lost == 0 {
					read(20) // for 200 ms, before any question but the first
				} else {
					read(1000)
				}
				mu.Lock()
				clear(subjects)
				mu.Unlock()
				read(100)
				mu.Lock()
				defer mu.Unlock()
				request := r.gathering.request.reply()
				if len(subjects) != 3 || subjects[request] != 0 {
					t.Errorf("packets go to %d subjects, %d to that of the request", len(subjects), subjects[request])
				}
				for _, s := range streams {
					if n := subjects[s.session.reply()]; n < 50 {
						t.Errorf("%d packets went to the token of a stream", n)
					}
				}
				r.Close()
			})
		})
	}
}

// A request costs its responders' streams nothing once they have moved: the session of a stream by Open has no state of
// a gathering.
func TestStreamOfOneResponderHasNoExtras(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := memoryTest(t, ClientParams{})
		m.handle(t, "one", flowing(0))
		s := m.open(t, "one")
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		if s.session.extras.Load() != nil {
			t.Error("a stream of Open has extras")
		}
		s.Close()
		m.nothingLeft(t)
	})
}

// Any number of responders, any losses, repetitions and outages: each record comes once, in order, on the stream of its
// responder.
func TestRespondersNeverMix(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(1, 5).Draw(rt, "responders")
		records := rapid.SliceOfN(rapid.IntRange(0, 50), n, n).Draw(rt, "records")
		loss := rapid.IntRange(0, 20).Draw(rt, "percent lost")
		again := rapid.IntRange(0, 20).Draw(rt, "percent repeated")
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(rt, "seed"), 1))
		outage := rapid.IntRange(-1, 20).Draw(rt, "outage after")
		maximum := rapid.SampledFrom([]int{n, n, n + 1, max(1, n-1)}).Draw(rt, "maximum")
		var failures []string
		fail := func(format string, args ...any) { failures = append(failures, fmt.Sprintf(format, args...)) }
		synctest.Test(t, func(t *testing.T) {
			m, err := newMemoryPair(ClientParams{AckTimeout: 50 * time.Millisecond})
			if err != nil {
				t.Fatal(err)
			}
			defer m.close()
			_, stop := m.serveMany(t, n, func(i int) Handler {
				return func(w *Writer, r *Request) error {
					for k := range records[i] {
						if _, err := fmt.Fprintf(w, "%d %d", i, k); err != nil {
							return err
						}
						if k%7 == 0 {
							time.Sleep(time.Millisecond)
						}
					}
					return nil
				}
			})
			defer stop()
			m.bus.SetFilter(func(from, to *fake.Conn, msg *nats.Msg) bool {
				if msg.Subject == "all" || from == nil {
					return true
				}
				if rng.IntN(100) < again && to == m.conn { // late
					subject, reply, data := msg.Subject, msg.Reply, bytes.Clone(msg.Data)
					time.AfterFunc(time.Duration(rng.IntN(200))*time.Millisecond, func() { _ = m.back.Publish(subject, reply, data) })
				}
				return rng.IntN(100) >= loss
			})
			r, err := m.client.OpenMany(t.Context(), "all", nil, WithMaxResponders(maximum), WithStallTimeout(5*time.Second))
			if err != nil {
				t.Fatal(err)
			}
			if outage >= 0 {
				synctest.Wait() // the request is not to be lost
				time.Sleep(time.Duration(outage) * time.Millisecond)
				m.conn.Set(nats.RECONNECTING)
				time.Sleep(50 * time.Millisecond)
				m.conn.Set(nats.CONNECTED)
			}
			streams, err := r.all(t)
			if want := min(n, maximum); err != io.EOF || len(streams) != want {
				fail("%d streams of %d, %v", len(streams), want, err)
			}
			seen := make(map[string]bool)
			for _, s := range streams {
				var who string
				k := 0
				for {
					rec, err := s.Recv()
					if err == io.EOF {
						break
					} else if err != nil {
						fail("of %q after %d records: %v", who, k, err)
						break
					}
					name, number, _ := strings.Cut(string(rec), " ")
					if k == 0 {
						who = name
						if seen[who] {
							fail("two streams are of %q", who)
						}
						seen[who] = true
					}
					if name != who || number != fmt.Sprint(k) {
						fail("%q at place %d of %q", rec, k, who)
					}
					k++
				}
				if who != "" {
					var i int
					fmt.Sscan(who, &i)
					if k != records[i] {
						fail("%d records of %q, want %d", k, who, records[i])
					}
				}
			}
			m.bus.SetFilter(nil)
			r.Close()
			time.Sleep(time.Minute) // repetitions, and what servers still ask
			synctest.Wait()
			if err := m.left(); err != nil {
				fail("%v", err)
			}
		})
		if len(failures) > 0 {
			rt.Fatal(strings.Join(failures, "\n"))
		}
	})
}

// Any messages at the token of a request: a model of docs/PROTOCOL.md section 2.8 says which streams begin, and with
// which records.
func TestMessagesAtARequestFollowTheModel(t *testing.T) {
	type message struct {
		sender   uint64
		seq      uint32
		kind     string
		address  bool // it has a reply subject
		atStream int  // it comes to the token of this stream instead, if there is one
	}
	type responder struct {
		expect  uint32
		reset   bool
		records []string
	}
	draw := rapid.Custom(func(t *rapid.T) message {
		return message{
			sender: 2 * rapid.Uint64Range(1, 6).Draw(t, "sender"), seq: rapid.Uint32Range(0, 4).Draw(t, "seq"),
			kind:    rapid.SampledFrom(strings.Fields("data data data data ping credit reset json cut empty")).Draw(t, "kind"),
			address: rapid.Bool().Draw(t, "address"), atStream: rapid.IntRange(-6, 3).Draw(t, "at"),
		}
	})
	rapid.Check(t, func(rt *rapid.T) {
		maximum := rapid.IntRange(1, 5).Draw(rt, "maximum")
		messages := rapid.SliceOfN(draw, 0, 60).Draw(rt, "messages")
		var failures []string
		fail := func(format string, args ...any) { failures = append(failures, fmt.Sprintf(format, args...)) }
		synctest.Test(t, func(t *testing.T) {
			conn := fake.New()
			conn.Published = func(string, string, []byte) error { return nil }
			c := fakeClient(t, conn, ClientParams{})
			r, err := c.OpenMany(t.Context(), "all", nil, WithMaxResponders(maximum))
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			known, order := make(map[uint64]*responder), []uint64(nil) // nil for one that refused
			var streams []*Stream
			next := func() {
				for st, _, _ := r.gathering.next(); st != nil; st, _, _ = r.gathering.next() {
					streams = append(streams, st)
				}
			}
			for _, m := range messages {
				msg := &nats.Msg{Subject: r.gathering.request.reply()}
				at := -1
				if next(); m.atStream >= 0 && m.atStream < len(streams) {
					at = m.atStream
					msg.Subject = streams[at].session.reply()
				}
				if m.address {
					msg.Reply = string(AppendToken([]byte("_SINBOX.producer."), Token{Codec: MsgPack, LogPackets: 5, LogBytes: 16, ID: m.sender}))
				}
				record := fmt.Sprint(m.sender, " ", m.seq)
				switch m.kind {
				case "data":
					msg.Data = testPacket(m.sender, m.seq, testData(record))
				case "ping":
					msg.Data = testPacketFlags(0, m.sender, m.seq, Frame{Type: FramePing})
				case "credit":
					msg.Data = testPacketFlags(0, m.sender, m.seq, Frame{Type: FrameCredit, Payload: AppendCredit(nil, Credit{Packets: 1})})
				case "reset":
					msg.Data = testPacketFlags(0, m.sender, m.seq, Frame{Type: FrameReset, Code: 4000})
				case "json":
					msg.Data = []byte(`{"type":1,"data":"YQ=="}`)
				case "cut":
					msg.Data = testPacket(m.sender, m.seq, testData(record))[:20]
				case "empty":
					msg.Header = nats.Header{"Status": {"503"}}
					if at < 0 && len(known) == 0 {
						continue // ends the request
					}
				}
				conn.Deliver(msg)
				synctest.Wait()
				if m.kind == "json" || m.kind == "cut" || m.kind == "empty" {
					if m.kind == "json" && at < 0 {
						known[0] = nil
					}
					continue
				}
				p, met := known[m.sender]
				switch {
				case at >= 0 && order[at] != m.sender: // foreign there
				case !met && m.kind == "reset":
					known[m.sender] = nil
				case !met && m.address && len(order) < maximum:
					p = new(responder)
					known[m.sender], order = p, append(order, m.sender)
				}
				if p == nil || p.reset || at >= 0 && order[at] != m.sender {
					continue
				}
				switch {
				case m.kind == "reset":
					p.reset = true
				case m.kind == "data" && m.seq == p.expect:
					p.expect++
					p.records = append(p.records, record)
				}
			}
			if next(); len(streams) != len(order) {
				fail("%d streams, want %d", len(streams), len(order))
				return
			}
			for i, st := range streams {
				p := known[order[i]]
				for _, want := range p.records {
					if rec, err := st.Recv(); string(rec) != want || err != nil {
						fail("%q, %v of responder %d; want %q", rec, err, order[i], want)
					}
				}
				if st.Ready() != p.reset {
					fail("responder %d: a read returns at once: %v, but it has reset the stream: %v", order[i], st.Ready(), p.reset)
				} else if p.reset {
					if _, err := st.Recv(); !isCode(err, 4000) {
						fail("responder %d: %v", order[i], err)
					}
				}
			}
			r.Close()
			synctest.Wait()
			if n := c.ep.sessions.Size(); n != 0 {
				fail("%d streams are left", n)
			}
		})
		if len(failures) > 0 {
			rt.Fatal(strings.Join(failures, "\n"))
		}
	})
}
