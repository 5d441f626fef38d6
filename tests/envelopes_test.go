package stream_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/fastconn"
)

// connections are the kinds of connection that carry envelopes.
var connections = map[string][]nats.Option{"ordinary connection": nil, "fast connection": {fastconn.Enable()}}

// crowd is a number of streams of one client to one server, which the test writes to one record at a time, at both
// ends.
type crowd struct {
	client  *stream.Client
	server  *service
	streams []*stream.Stream
	writers []*stream.Writer // of the handlers
	back    []*stream.Request
	sent    int // records on each stream and in each direction
	done    chan struct{}
}

// newCrowd opens n streams, which the end of the test closes.
func newCrowd(t testing.TB, p *pair, n int, client, server []nats.Option) *crowd {
	t.Helper()
	c := &crowd{done: make(chan struct{})}
	c.server = newService(t, p, stream.ServerParams{MaxStreams: 2 * n}, server...)
	c.client = p.newClient(t, stream.ClientParams{}, client...)
	type end struct {
		w *stream.Writer
		r *stream.Request
	}
	ends := make(chan end, 1)
	c.server.handle(t, "svc.crowd", func(w *stream.Writer, r *stream.Request) error {
		ends <- end{w, r}
		<-c.done
		return nil
	})
	t.Cleanup(func() { close(c.done) })
	for range n {
		s, err := c.client.Open(testContext(t), "svc.crowd", nil, stream.WithWindow(4<<10))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		waitFor(t, "the handler", func() {
			e := <-ends
			c.writers, c.back = append(c.writers, e.w), append(c.back, e.r)
		})
		c.streams = append(c.streams, s)
	}
	c.rounds(t, 1) // both ends know each other
	return c
}

// rounds sends records on all streams in both directions, one on each and then the next on each, and checks what
// arrives.
func (c *crowd) rounds(t testing.TB, n int) {
	t.Helper()
	waitFor(t, "records of many streams", func() {
		for range n {
			for i := range c.streams {
				rec := testRecord(i*1000+c.sent, 128)
				for _, err := range []error{errOf(c.writers[i].Write(rec)), errOf(c.streams[i].Write(rec))} {
					if err != nil {
						t.Errorf("stream %d: %v", i, err)
						return
					}
				}
			}
			for i := range c.streams {
				for _, recv := range []func() ([]byte, error){c.streams[i].Recv, c.back[i].Next} {
					if rec, err := recv(); err != nil || !bytes.Equal(rec, testRecord(i*1000+c.sent, 128)) {
						t.Errorf("stream %d, record %d: %d bytes, %v", i, c.sent, len(rec), err)
						return
					}
				}
			}
			c.sent++
		}
	})
	if t.Failed() {
		t.FailNow()
	}
}

// share sends rounds until envelopes travel both ways.
func (c *crowd) share(t testing.TB) {
	t.Helper()
	eventually(t, "envelopes travel both ways", func() bool {
		c.rounds(t, 5)
		return c.client.Stats().EnvelopesSent > 0 && c.server.Stats().EnvelopesSent > 0
	})
}

// Packets of many slow streams between two ends share messages, on each kind of connection at each end.
func TestSlowStreamsShareMessages(t *testing.T) {
	for at, client := range connections {
		for to, server := range connections {
			t.Run(at+" to "+to, func(t *testing.T) {
				p := newPair(t)
				c := newCrowd(t, p, 50, client, server)
				c.share(t)
				before, messages := c.server.Stats(), c.server.nc.Stats().OutMsgs
				c.rounds(t, 20)
				after := c.server.Stats()
				packets := after.PacketsSent - before.PacketsSent
				if server == nil && c.server.nc.Stats().OutMsgs-messages > packets/2 {
					t.Errorf("%d messages with %d packets", c.server.nc.Stats().OutMsgs-messages, packets)
				}
				if n := after.EnvelopesSent - before.EnvelopesSent; n == 0 || n > packets/4 {
					t.Errorf("%d envelopes with %d packets", n, packets)
				}
				eventually(t, "all envelopes arrive", func() bool {
					s, c := c.server.Stats(), c.client.Stats()
					return s.EnvelopesReceived >= c.EnvelopesSent && c.EnvelopesReceived >= s.EnvelopesSent
				})
				for name, s := range map[string]stream.Stats{"client": c.client.Stats(), "server": after} {
					if s.PacketsResent != 0 || s.DroppedEarly != 0 || s.DroppedMalformed != 0 || s.DroppedUnknown != 0 {
						t.Errorf("%s: %+v", name, s)
					}
				}
			})
		}
	}
}

// Streams of several responders to one request share messages as well, if the responders have one endpoint, although
// the packets of all of them come to the token of the request at first.
func TestRespondersOfOneEndShareMessages(t *testing.T) {
	const streams, rounds = 20, 50
	p := newPair(t)
	srv := newService(t, p, stream.ServerParams{})
	for i := range streams {
		srv.handle(t, "all", func(w *stream.Writer, r *stream.Request) error {
			for k := range rounds {
				if _, err := w.Write(testRecord(i*rounds+k, 100)); err != nil {
					return err
				}
				if _, err := r.Recv(); err != nil { // the consumer has read from all
					return err
				}
			}
			return nil
		})
	}
	all, err := take(t, openMany(t, p.consumer, stall, stream.WithMaxResponders(streams)))
	if err != io.EOF || len(all) != streams {
		t.Fatalf("%d streams, %v", len(all), err)
	}
	number := make([]int, streams)
	for k := range rounds {
		for i, s := range all {
			rec, err := s.Recv()
			if err != nil {
				t.Fatal(err)
			}
			if k == 0 {
				number[i] = int(binary.LittleEndian.Uint64(rec))
			}
			if !bytes.Equal(rec, testRecord(number[i]+k, 100)) {
				t.Fatalf("stream %d, record %d: %x", i, k, rec[:8])
			}
		}
		for _, s := range all {
			if _, err := s.Write([]byte("next")); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, s := range all {
		wantEOF(t, s)
	}
	if a, b := srv.Stats().EnvelopesSent, p.consumer.Stats().EnvelopesSent; a+b == 0 {
		t.Error("no envelopes")
	}
	if st := p.consumer.Stats(); st.DroppedUnknown+st.DroppedMalformed != 0 {
		t.Errorf("%+v", st)
	}
}

// A stream that is busy alone sends its packets alone, although the peer has other streams.
func TestBusyStreamSharesNoMessage(t *testing.T) {
	p := newPair(t)
	c := newCrowd(t, p, 20, nil, nil)
	c.share(t)
	time.Sleep(50 * time.Millisecond) // acknowledgements that are due go out
	before, back := c.server.Stats().EnvelopesSent, c.client.Stats().EnvelopesSent
	const records = 1000
	for i := range records {
		exchangeOne(t, c, 3, i)
	}
	// A question about another stream may wait at the same time.
	if n := c.server.Stats().EnvelopesSent - before; n > records/50 {
		t.Errorf("the server sent %d envelopes for %d records of one stream", n, records)
	}
	if n := c.client.Stats().EnvelopesSent - back; n > records/50 {
		t.Errorf("the client sent %d envelopes for %d records of one stream", n, records)
	}
}

// exchangeOne sends record k on stream i and waits until it arrives.
func exchangeOne(t testing.TB, c *crowd, i, k int) {
	t.Helper()
	write(t, c.writers[i], testRecord(k, 128))
	if rec, err := c.streams[i].Recv(); err != nil || !bytes.Equal(rec, testRecord(k, 128)) {
		t.Fatalf("record %d: %d bytes, %v", k, len(rec), err)
	}
}

// A peer that does not say that it receives envelopes gets none. This one is of an earlier version: it skips the
// statement.
func TestPeersThatDoNotKnowEnvelopesGetNone(t *testing.T) {
	const streams, rounds = 40, 10
	p := newPair(t)
	nc, err := p.server.Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	prefix := nc.NewInbox() + "."
	var mu sync.Mutex
	packets, envelopes := map[string]int{}, 0
	controls := map[string]string{} // control subjects, by the subjects of their consumers
	_, err = nc.Subscribe(prefix+"*", func(m *nats.Msg) {
		mu.Lock()
		defer mu.Unlock()
		h, _, err := stream.ParsePacketHeader(m.Data)
		if err != nil {
			envelopes++
			return
		}
		if m.Reply != "" {
			controls[m.Subject] = m.Reply
		}
		if h.Flags&stream.PacketSeq == 0 {
			return
		}
		packets[m.Subject]++
		credit := stream.AppendCredit(nil, stream.Credit{Ack: h.Seq + 1, Packets: h.Seq + 33, Bytes: 1 << 20})
		_ = nc.Publish(controls[m.Subject], stream.AppendPacket(nil, stream.PacketHeader{Sender: 1}, stream.Frame{Type: stream.FrameCredit, Payload: credit}))
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	writers := make([]*stream.Writer, streams)
	for i := range writers {
		writers[i] = p.producer.NewWriter(prefix + string(stream.AppendToken(nil, stream.Token{Codec: stream.MsgPack, LogPackets: 5, LogBytes: 18, ID: uint64(i)})))
	}
	for k := range rounds {
		for _, w := range writers {
			write(t, w, testRecord(k, 128))
		}
		for _, w := range writers {
			if err := w.Sync(testContext(t)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, w := range writers {
		closeWriter(t, w)
	}
	mu.Lock()
	defer mu.Unlock()
	if sent := p.producer.Stats().EnvelopesSent; envelopes != 0 || sent != 0 {
		t.Errorf("%d envelopes arrived, %d were sent", envelopes, sent)
	}
	if len(packets) != streams {
		t.Errorf("packets of %d streams arrived", len(packets))
	}
}

// Envelopes need no permission beyond those of docs/PROTOCOL.md section 15. Ends that may only answer, and streams
// across accounts, send each packet alone.
func TestEnvelopesNeedNoFurtherPermission(t *testing.T) {
	for _, c := range []struct {
		recipe    string
		envelopes bool
		refusals  int // for each end
	}{
		{"one account", true, 0},
		{"answers only", false, 1},
		{"across accounts", false, 0},
	} {
		t.Run(c.recipe, func(t *testing.T) {
			p := newRestricted(t, recipe(t, c.recipe))
			atServer, atClient := make(refusals, 100), make(refusals, 100)
			all := newCrowd(t, p, 20, user("alice", atClient.option()), user("producer", atServer.option()))
			if c.envelopes {
				all.share(t)
			} else {
				all.rounds(t, scaled(200))
				if a, b := all.server.Stats().EnvelopesSent, all.client.Stats().EnvelopesSent; a != 0 || b != 0 {
					t.Errorf("server sent %d envelopes, client %d", a, b)
				}
			}
			if a, b := len(atServer), len(atClient); a > c.refusals || b > c.refusals {
				t.Errorf("NATS refused %d publishes of the server, %d of the client; want at most %d", a, b, c.refusals)
			}
		})
	}
}

// A permission that is taken away while envelopes are in use costs no record.
func TestStreamsOutliveTheRefusalOfEnvelopes(t *testing.T) {
	const config = `authorization { users: [
		{ user: producer, password: $PRODUCER_PASSWORD, permissions: { publish: { allow: ">", deny: [ %s ] }, subscribe: ">" } }
		{ user: alice, password: $ALICE_PASSWORD }
	] }`
	p := newRestricted(t, fmt.Sprintf(config, `"nothing"`))
	c := newCrowd(t, p, 30, user("alice"), user("producer", nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})))
	c.share(t)
	reload(t, p.server, fmt.Sprintf(config, `"_SINBOX.alice.*.e"`))
	c.rounds(t, 20)
	before := c.server.Stats().EnvelopesSent
	c.rounds(t, 20)
	if n := c.server.Stats().EnvelopesSent - before; n != 0 {
		t.Errorf("%d envelopes were sent after NATS had refused one", n)
	}
}

// What comes to the subject of envelopes and is none is dropped and counted, and harms no stream.
func TestBrokenEnvelopesAreDropped(t *testing.T) {
	for name, opts := range connections {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			c := newCrowd(t, p, 10, opts, opts)
			nc, err := p.server.Dial()
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			subject := make(chan string, 1000)
			sub, err := nc.Subscribe("_SINBOX.*.e", func(m *nats.Msg) {
				select {
				case subject <- m.Subject:
				default:
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := nc.Flush(); err != nil {
				t.Fatal(err)
			}
			c.share(t)
			var at [2]string
			waitFor(t, "the subjects of both ends", func() {
				for at[0] = <-subject; at[1] == "" || at[1] == at[0]; at[1] = <-subject {
				}
			})
			if err := sub.Unsubscribe(); err != nil {
				t.Fatal(err)
			}
			before := c.client.Stats().DroppedMalformed + c.server.Stats().DroppedMalformed
			stranger := stream.AppendPacket(nil, stream.PacketHeader{Flags: stream.PacketSeq, Sender: 1}, stream.Frame{Type: stream.FrameData, Payload: []byte("x")})
			messages := [][]byte{nil, {0xF5}, []byte("{}"), stranger, bytes.Repeat([]byte{0xF5}, 100), make([]byte, 100), append(bytes.Clone(stranger[:1]), 0x14)}
			for _, subject := range at {
				for _, m := range messages {
					if err := nc.Publish(subject, m); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := nc.Flush(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "all are counted", func() bool {
				return c.client.Stats().DroppedMalformed+c.server.Stats().DroppedMalformed == before+uint64(2*len(messages))
			})
			c.rounds(t, 10)
		})
	}
}

// Many streams begin, exchange records at their own pace and end, while envelopes carry them.
func TestEnvelopesUnderLoad(t *testing.T) {
	for name, opts := range connections {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			srv := newService(t, p, stream.ServerParams{}, opts...)
			srv.handle(t, "svc.echo", echo)
			client := p.newClient(t, stream.ClientParams{}, opts...)
			var records atomic.Int64
			inParallel(t, 64, func(i int, r *rand.Rand) {
				for range scaled(20) {
					s, err := client.Open(testContext(t), "svc.echo", nil, stream.WithWindow(4<<10))
					if err != nil {
						t.Error(err)
						return
					}
					sizes := []int{8, 100, 1000, 3000}
					n := 1 + r.IntN(40)
					var sending sync.WaitGroup
					sending.Go(func() {
						for k := range n {
							if _, err := s.Write(testRecord(k, sizes[(i+k)%len(sizes)])); err != nil {
								t.Errorf("Write: %v", err)
								return
							}
							if k%5 == 0 {
								time.Sleep(50 * time.Microsecond)
							}
						}
						if err := s.CloseSend(); err != nil {
							t.Errorf("CloseSend: %v", err)
						}
					})
					for k := range n {
						rec, err := s.Next()
						if err != nil || !bytes.Equal(rec, testRecord(k, sizes[(i+k)%len(sizes)])) {
							t.Errorf("record %d of %d: %d bytes, %v", k, n, len(rec), err)
							break
						}
						records.Add(1)
					}
					if _, err := s.Next(); err != io.EOF && !t.Failed() {
						t.Errorf("after %d records: %v", n, err)
					}
					sending.Wait()
					s.Close()
				}
			})
			if srv.Stats().EnvelopesSent+client.Stats().EnvelopesSent == 0 {
				t.Errorf("no envelopes for %d records", records.Load())
			}
		})
	}
}
