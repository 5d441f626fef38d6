package stream

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"pgregory.net/rapid"

	"github.com/natsstream/stream/internal/natsconn/fake"
	"github.com/natsstream/stream/internal/race"
)

// newPlacingPeer is newEnvelopedPeer for writers that may place their next records. Each has sent and got acknowledged
// three records.
func newPlacingPeer(t *testing.T, n int) *envelopedPeer {
	t.Helper()
	p := newEnvelopedPeer(t, n)
	p.write("third") // in an envelope, which shows that the writers may place records
	for i := range p.writers {
		p.tell(i, p.acks(3))
	}
	p.news()
	for i, w := range p.writers {
		if !w.mayPlace() {
			t.Fatalf("writer %d may place no record", i)
		}
	}
	return p
}

// mayPlace reports whether w places a record that is written while the outbox is awake.
func (w *Writer) mayPlace() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.place.at != nil && !w.queued
}

// placed returns how many packets are placed in open envelopes.
func (p *envelopedPeer) placed() (n int) {
	e := p.writers[0].session.remote.Load().envelopes
	e.mu.Lock()
	defer e.mu.Unlock()
	for v := e.first; v != nil; v = v.next {
		n += v.placed
	}
	return n
}

// A record of an idle stream goes into the envelope without the outbox. Further records of the stream gather in a
// packet of their own, and follow.
func TestIdleStreamsPlaceOneRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const streams, records = 20, 4
		p := newPlacingPeer(t, streams)
		p.together(func() {
			for k := range records {
				for i, w := range p.writers {
					if _, err := fmt.Fprintf(w, "record %d of %d", k, i); err != nil {
						t.Error(err)
					}
				}
			}
			if n := p.placed(); n != streams {
				t.Errorf("%d records are placed, want one of each of %d streams", n, streams)
			}
		})
		all, messages := p.carry()
		if len(all) != 2*streams || messages != 1 {
			t.Errorf("%d packets in %d messages, want two of each of %d streams in one", len(all), messages, streams)
		}
		next := map[string]uint32{}
		for _, c := range all {
			if want := 3 + next[c.stream]; c.seq != want {
				t.Errorf("%s: packet %d, want %d", c.stream, c.seq, want)
			}
			next[c.stream]++
		}
		for _, w := range p.writers {
			if got := w.Totals(); got.RecordsOut != 3+records {
				t.Errorf("%+v", got)
			}
		}
	})
}

// After a large packet, the next records gather in a packet. After a small one, they are placed again.
func TestBusyStreamsPlaceNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 3)
		w := p.writers[1]
		for i, size := range []int{2000, 10, 10} {
			p.together(func() {
				if _, err := w.Write(make([]byte, size)); err != nil {
					t.Error(err)
				}
				if want := i / 2; p.placed() != want {
					t.Errorf("after a record of %d bytes, %d are placed, want %d", size, p.placed(), want)
				}
			})
			p.tell(1, p.acks(uint32(4+i)))
		}
	})
}

// While the outbox sleeps, a record is not placed: its packet goes alone at once.
func TestNothingIsPlacedWhileTheOutboxSleeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 3)
		if _, err := p.writers[1].Write([]byte("alone")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if all, messages := p.carry(); messages != 1 || len(all) != 1 || all[0] != (carried{p.subject(1), 3, false}) {
			t.Errorf("%+v in %d messages", all, messages)
		}
		if p.writers[1].placedIn != 0 {
			t.Error("the record was placed")
		}
	})
}

// A placed packet that is alone in its envelope goes without it, on the subject of its stream.
func TestPlacedPacketAloneGoesWithoutEnvelope(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 3)
		p.together(func() {
			if _, err := p.writers[1].Write([]byte("alone")); err != nil {
				t.Error(err)
			}
			if n := p.placed(); n != 1 {
				t.Errorf("%d records are placed", n)
			}
		})
		if all, messages := p.carry(); messages != 1 || len(all) != 1 || all[0] != (carried{p.subject(1), 3, false}) {
			t.Errorf("%+v in %d messages", all, messages)
		}
	})
}

// Records that do not fit into an envelope, or must not be placed, take the usual way. They follow those that were
// placed.
func TestRecordsThatAreNotPlacedFollow(t *testing.T) {
	for name, write := range map[string]func(w *Writer) error{
		"a large record": func(w *Writer) error { _, err := w.Write(make([]byte, 5000)); return err },
		"an object":      func(w *Writer) error { _, err := w.WriteObject("object"); return err },
		"TryWrite":       func(w *Writer) error { _, err := w.TryWrite([]byte("tried")); return err },
		"ReadFrom":       func(w *Writer) error { _, err := w.ReadFrom(bytes.NewReader(make([]byte, 100))); return err },
		"CLOSE":          func(w *Writer) error { go w.Close(); return nil },
		"records after a flush": func(w *Writer) error {
			go w.Flush()
			synctest.Wait()
			_, err := w.Write([]byte("flushed"))
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPlacingPeer(t, 4)
				p.together(func() {
					for _, w := range p.writers {
						if _, err := w.Write([]byte("placed")); err != nil {
							t.Error(err)
						}
						if err := write(w); err != nil {
							t.Error(err)
						}
						synctest.Wait()
					}
					if n := p.placed(); n != 4 {
						t.Errorf("%d records are placed", n)
					}
				})
				all, _ := p.carry()
				next := map[string]uint32{}
				for _, c := range all {
					if want := 3 + next[c.stream]; c.seq != want {
						t.Errorf("%s: packet %d, want %d", c.stream, c.seq, want)
					}
					next[c.stream]++
				}
				if len(all) != 8 {
					t.Errorf("%+v", all)
				}
			})
		})
	}
}

// If more streams write than fit into one envelope, their writers fill several.
func TestWritersFillSeveralEnvelopes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const streams = 300 // more than are placed in one envelope
		p := newPlacingPeer(t, streams)
		p.write("fourth")
		all, messages := p.carry()
		if len(all) != streams || messages < 2 || messages > mostOpen {
			t.Errorf("%d packets in %d messages, want %d in several", len(all), messages, streams)
		}
		for i := range p.writers {
			p.tell(i, p.acks(4))
		}
	})
}

// Before the outbox publishes a packet, it takes those that were placed, and a writer publishes nothing in its place
// until then.
func TestPlacedPacketsGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 3)
		o, w := &p.c.ep.outbox, p.writers[0]
		p.conn.Now = func(string, []byte) (sent, rest bool) { return true, false }
		time.Sleep(time.Second + time.Duration(visitPause)) // the ticker wakes the outbox each second
		if !o.park.Take() {
			t.Fatal("the outbox does not sleep")
		}
		if !o.mayVisit(w.session) {
			t.Error("the writer may not publish while nothing is placed")
		}
		o.announce()
		time.Sleep(time.Second)
		p.together(func() {
			for _, record := range []string{"placed", "later"} {
				if _, err := w.Write([]byte(record)); err != nil {
					t.Error(err)
				}
			}
			if o.slept = 0; o.mayVisit(w.session) { // the outbox waits in the test's publish
				t.Error("the writer may publish although a packet is placed")
			}
			if got := w.sender.publishNext(); got != placedFirst {
				t.Errorf("publishNext: %d", got)
			}
		})
		if all, _ := p.carry(); len(all) != 2 || all[0].seq != 3 || all[1].seq != 4 {
			t.Errorf("%+v", all)
		}
	})
}

// Streams that place records in each round do not hold back a packet of another one.
func TestPlacedPacketsLetOthersPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 10)
		rounds, published := 0, false
		before := p.conn.Published
		p.conn.Published = func(subject, reply string, data []byte) error {
			published = published || bytes.Contains(data, []byte("large"))
			if subject == envelopedInbox+".e" && !published && rounds < 100 {
				rounds++
				for k := range 2 { // while the outbox publishes
					_, _ = p.writers[1+(2*rounds+k)%9].Write([]byte("small"))
				}
			}
			return before(subject, reply, data)
		}
		p.together(func() {
			for i, record := range []string{"large" + strings.Repeat(" ", 5000), "small", "small"} {
				if _, err := p.writers[i].Write([]byte(record)); err != nil {
					t.Error(err)
				}
			}
		})
		if !published || rounds > 5 {
			t.Errorf("published: %v, after %d rounds", published, rounds)
		}
	})
}

// While packets of a stream wait after an error of a publish, its records are not placed: they would overtake these.
func TestNothingIsPlacedAheadOfFailedPackets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 3)
		w := p.writers[0]
		p.conn.fail = func(_ int, data []byte) error {
			if bytes.Contains(data, []byte("packet 0")) {
				return errors.New("an error that is no loss")
			}
			return nil
		}
		w.sender.uninvite()
		p.together(func() {
			for i, size := range []int{3000, 0, 5000} {
				if _, err := w.Write(fmt.Appendf(make([]byte, size), "packet %d", i)); err != nil {
					t.Error(err)
				}
				w.mu.Lock()
				w.sealLocked()
				w.mu.Unlock()
			}
		})
		p.conn.fail = nil
		before := p.conn.Published
		p.conn.Published = func(subject, reply string, data []byte) error {
			err := before(subject, reply, data)
			switch {
			case bytes.Contains(data, []byte("packet 0")): // an envelope is opened, and takes packet 1
				p.writers[1].session.mark(workCredit)
				p.writers[2].session.mark(workCredit)
			case bytes.Contains(data, []byte("packet 1")):
				if w.mayPlace() {
					t.Error("a record may be placed while packet 2 waits")
				}
			}
			return err
		}
		p.together(func() { w.session.mark(workPackets) })
		seq := w.sender.unacked.Acked()
		for packet := range w.sender.unacked.All() {
			if got := packetSeq(packet.buf); got != seq {
				t.Errorf("packet %d is kept as number %d", got, seq)
			}
			seq++
		}
		if seq != 6 {
			t.Errorf("%d packets were published", seq)
		}
	})
}

// Flush does not return for a record that was written while the connection was down.
func TestNothingIsPlacedWhileTheConnectionIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 3)
		flushed := make(chan error, 3)
		p.together(func() {
			p.conn.Set(nats.RECONNECTING)
			synctest.Wait()
			for _, w := range p.writers {
				if _, err := w.Write([]byte("down")); err != nil {
					t.Error(err)
				}
				go func() { flushed <- w.Flush() }()
			}
			if n := p.placed(); n != 0 {
				t.Errorf("%d records are placed", n)
			}
		})
		if len(flushed) != 0 {
			t.Errorf("%d calls returned", len(flushed))
		}
		p.conn.Set(nats.CONNECTED)
		synctest.Wait()
		if len(flushed) != 3 {
			t.Errorf("%d calls returned after the reconnect", len(flushed))
		}
	})
}

// This end keeps a bounded number of bytes for each stream. The record that uses up this bound asks for an
// acknowledgement. A record that uses up the peer's credit does the same.
func TestPlacedRecordsAskAtTheOwnWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 2)
		w := p.writers[0]
		p.together(func() { p.c.ep.window = 8 << 10 })
		for asked := false; !asked; {
			p.write(strings.Repeat("record", 150))
			for _, m := range p.news() {
				for _, packet := range packetsOf(m.Data) {
					h, _, err := ParsePacketHeader(packet)
					asked = asked || err == nil && h.Sender == w.session.senderNumber && h.Flags&PacketAck != 0
				}
			}
			w.mu.Lock()
			credit := w.creditLocked()
			w.mu.Unlock()
			if !credit && !asked {
				t.Fatal("the window is used up, and no packet asked for an acknowledgement")
			}
		}
	})
}

// After the loss of an envelope, writers open smaller ones. After a refusal of the subject, they open none.
func TestPlacesFollowLossesAndRefusals(t *testing.T) {
	for name, happen := range map[string]func(p *envelopedPeer){
		"a loss": func(p *envelopedPeer) {
			p.write("lost")
			p.tell(7, Frame{Type: FrameCredit, Flags: FlagGap, Payload: AppendCredit(nil, Credit{Ack: 3, Packets: 200, Bytes: 1 << 30})})
		},
		"a refusal": func(p *envelopedPeer) {
			p.c.ep.outbox.doLater(outOfStream{subject: envelopedInbox + ".e", denied: nats.ErrPermissionViolation})
			synctest.Wait()
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPlacingPeer(t, 8)
				happen(p)
				p.news()
				e := p.writers[0].session.remote.Load().envelopes
				most := p.c.ep.outbox.envelopeSize(e)
				if p.c.ep.outbox.envelopes.refused != 0 {
					most = 0
				}
				p.write(strings.Repeat("record", 100))
				for _, m := range p.news() {
					if m.Subject == e.subject && len(m.Data) > most {
						t.Errorf("an envelope of %d bytes, at most %d", len(m.Data), most)
					}
				}
			})
		})
	}
}

// Placed packets do not overtake a stream that waits for its turn on a full line.
func TestPlacedPacketsHeedTheLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 60)
		go func() {
			for range 40 {
				_, _ = p.writers[0].Write(make([]byte, 10<<10))
			}
		}()
		synctest.Wait()
		o := &p.c.ep.outbox
		if l := o.lines.byPeer[envelopedInbox]; l.Room(o.ep.clock.Load()) != 0 || l.waits() != 1 {
			t.Fatalf("%d streams wait on a line with room for %d bytes", l.waits(), l.Room(o.ep.clock.Load()))
		}
		p.news()
		p.together(func() {
			for _, w := range p.writers[1:] {
				if _, err := w.Write(make([]byte, 900)); err != nil {
					t.Error(err)
				}
			}
		})
		if n := len(p.news()); n != 0 {
			t.Errorf("%d messages were sent on a full line", n)
		}
		_ = p.c.Close()
	})
}

// Writers open as many envelopes as the outbox allowed, and no more than the endpoint may have.
func TestWritersOpenFewEnvelopes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 300)
		o, e := &p.c.ep.outbox, p.writers[0].session.remote.Load().envelopes
		p.together(func() {
			e.most = 1
			for _, w := range p.writers {
				if _, err := w.Write([]byte("record")); err != nil {
					t.Error(err)
				}
			}
			if n := o.openByWriters.Load(); n != 1 || e.first != e.last {
				t.Errorf("%d envelopes are open, want one", n)
			}
		})
		if n := o.openByWriters.Load(); n != 0 {
			t.Errorf("%d envelopes are open", n)
		}
		for i := range p.writers {
			p.tell(i, p.acks(4))
		}
		p.together(func() {
			for i, change := range []struct{ begin, end func() }{
				{func() { o.openByWriters.Add(mostOpenedHere) }, func() { o.openByWriters.Add(-mostOpenedHere) }},
				{func() { o.connection.Add(1) }, func() { o.connection.Add(^uint32(0)) }}, // it came back
			} {
				change.begin()
				if _, err := p.writers[i].Write([]byte("record")); err != nil {
					t.Error(err)
				}
				if n := p.placed(); n != 0 {
					t.Errorf("%d records are placed", n)
				}
				change.end()
			}
		})
	})
}

// The packet of a stream that ended meanwhile does not spoil the envelope for the others.
func TestEndedStreamsLeaveTheEnvelopeWhole(t *testing.T) {
	for _, streams := range []int{1, 2} {
		synctest.Test(t, func(t *testing.T) {
			p := newPlacingPeer(t, 3)
			before := p.conn.Published
			p.conn.Published = func(subject, reply string, data []byte) error {
				if bytes.Contains(data, []byte("published")) { // then the outbox takes the RESET first
					for i := range streams {
						_, _ = fmt.Fprintf(p.writers[i], "placed %d", i)
					}
					p.conn.Deliver(&nats.Msg{Subject: p.writers[0].session.reply(), Data: AppendPacket(nil, PacketHeader{Sender: 1}, Frame{Type: FrameReset, Code: CloseCanceled})})
				}
				return before(subject, reply, data)
			}
			p.together(func() { _, _ = p.writers[2].Write([]byte("published")) })
			for i := range streams {
				if !slices.ContainsFunc(p.conn.sent(), func(m nats.Msg) bool { return bytes.Contains(m.Data, fmt.Appendf(nil, "placed %d", i)) }) {
					t.Errorf("the record of stream %d of %d is missing", i, streams)
				}
			}
		})
	}
}

// A record is placed only if the peer has granted credit for it. One that uses up the credit asks for more.
func TestPlacedRecordsHeedCredit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 3)
		w := p.writers[1]
		p.together(func() {
			w.mu.Lock()
			w.granted.packets = 4
			w.mu.Unlock()
			for range 2 {
				go w.Write([]byte("record"))
				synctest.Wait()
			}
			if n := p.placed(); n != 1 {
				t.Errorf("%d records are placed", n)
			}
		})
		all := p.news()
		if h, _, err := ParsePacketHeader(all[len(all)-1].Data); err != nil || h.Seq != 3 || h.Flags != PacketSeq|PacketAck {
			t.Errorf("%+v, %v", h, err)
		}
		p.tell(1, p.acks(4))
		if all, _ := p.carry(); len(all) != 1 || all[0].seq != 4 {
			t.Errorf("%+v", all)
		}
	})
}

// If max_payload shrinks, writers open smaller envelopes.
func TestPlacesHeedMaxPayload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 60)
		p.conn.SetMaxPayload(1500)
		p.c.ep.lookAtMaxPayload()
		p.write("fourth")
		all, messages := p.carry()
		if len(all) != 60 || messages < 2 {
			t.Errorf("%d packets in %d messages", len(all), messages)
		}
		for _, c := range all {
			if !c.envelope {
				t.Errorf("%+v is in no envelope", c)
			}
		}
		for _, m := range p.conn.sent() {
			if len(m.Data) > 1500 && bytes.Contains(m.Data, []byte("fourth")) {
				t.Errorf("a message of %d bytes", len(m.Data))
			}
		}
	})
}

// Flush and Sync wait for placed records.
func TestFlushAndSyncWaitForPlacedRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 3)
		flushed, synced := make(chan error, 3), make(chan error, 3)
		p.together(func() {
			for _, w := range p.writers {
				if _, err := w.Write([]byte("placed")); err != nil {
					t.Error(err)
				}
				go func() { flushed <- w.Flush() }()
				go func() { synced <- w.Sync(t.Context()) }()
			}
			synctest.Wait()
			if len(flushed) != 0 || len(synced) != 0 {
				t.Error("a call returned before the records were published")
			}
		})
		if len(flushed) != 3 || len(synced) != 0 {
			t.Errorf("%d flushed, %d acknowledged", len(flushed), len(synced))
		}
		for i := range p.writers {
			p.tell(i, p.acks(4))
		}
		if len(synced) != 3 {
			t.Errorf("%d acknowledged", len(synced))
		}
		for range 3 {
			if err := <-flushed; err != nil {
				t.Error(err)
			}
			if err := <-synced; err != nil {
				t.Error(err)
			}
		}
	})
}

// A stream may end, by either end, between the write of a placed record and the outbox. Nothing of it stays.
func TestStreamsEndWithPlacedRecords(t *testing.T) {
	for name, end := range map[string]func(p *envelopedPeer, i int){
		"the peer":   func(p *envelopedPeer, i int) { p.tell(i, Frame{Type: FrameReset, Code: CloseCanceled}) },
		"this end":   func(p *envelopedPeer, i int) { go p.writers[i].CloseWithCode(CloseCanceled) },
		"the client": func(p *envelopedPeer, i int) { go p.c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := newPlacingPeer(t, 5)
				p.together(func() {
					for _, w := range p.writers {
						if _, err := w.Write([]byte("placed")); err != nil {
							t.Error(err)
						}
					}
					if n := p.placed(); n != 5 {
						t.Errorf("%d records are placed", n)
					}
					for i := range p.writers {
						end(p, i)
					}
				})
				for i := range p.writers {
					p.tell(i, p.acks(5))
				}
				time.Sleep(time.Minute)
				if r := &p.c.ep.outbox.envelopes.retained; r.first != nil || r.bytes != 0 {
					t.Errorf("envelopes of %d bytes are kept", r.bytes)
				}
				if n := p.c.ep.kept.Load(); n != 0 {
					t.Errorf("%d bytes are kept", n)
				}
				for _, w := range p.writers {
					if w.mayPlace() {
						t.Error("a stream that has ended places records")
					}
				}
			})
		})
	}
}

// Placed packets that are lost are published again, before later records of their streams, which are not placed until
// then.
func TestLostPlacedPacketsAreRepaired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 6)
		p.loseEnvelopes(func() { p.write("fourth") })
		if all, _ := p.carry(); len(all) != 0 {
			t.Errorf("%+v", all)
		}
		for i, w := range p.writers {
			p.together(func() { // the report of the loss and the next record come together
				if _, err := w.Write([]byte("fifth")); err != nil {
					t.Error(err)
				}
				p.conn.Deliver(&nats.Msg{Subject: w.session.reply(), Data: AppendPacket(nil, PacketHeader{Sender: uint64(2*i + 1)},
					Frame{Type: FrameCredit, Flags: FlagGap, Payload: AppendCredit(nil, Credit{Ack: 3, Packets: 200, Bytes: 1 << 30})})})
			})
			again := p.news()
			if !slices.ContainsFunc(again, func(m nats.Msg) bool { return bytes.Contains(m.Data, fmt.Appendf(nil, "fourth %d", i)) }) {
				t.Errorf("stream %d: the lost record is not among %d messages", i, len(again))
			}
			if w.mayPlace() {
				t.Errorf("stream %d places records", i)
			}
			p.tell(i, p.acks(4))
			if all, _ := p.carry(); len(all) != 1 || all[0] != (carried{p.subject(i), 4, false}) {
				t.Errorf("stream %d: %+v follows", i, all)
			}
		}
	})
}

// The outbox asks for the acknowledgement of a placed packet if that is overdue.
func TestPlacedPacketsAreAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 4)
		for range 5 { // no check of an earlier packet is due afterwards
			time.Sleep(time.Second)
			for i := range p.writers {
				p.tell(i, p.acks(3))
			}
		}
		p.write("fourth")
		p.news()
		time.Sleep(time.Duration(4 * p.c.ep.times.Ack))
		asked := map[string]bool{}
		for _, m := range p.news() {
			for _, packet := range packetsOf(m.Data) {
				for _, f := range controlFrames(packet) {
					asked[m.Subject] = asked[m.Subject] || f.Type == FramePing
				}
			}
		}
		for i := range p.writers {
			if !asked[p.subject(i)] {
				t.Errorf("stream %d was not asked", i)
			}
		}
	})
}

// Envelopes with packets that nobody acknowledges take a part of the budget at most, and nearly empty ones nothing. The
// packets move to memory of their own then, and are published again from there.
func TestUnacknowledgedPacketsDoNotKeepEnvelopes(t *testing.T) {
	for name, test := range map[string]struct {
		streams, size, retained int
	}{
		"nearly empty": {6, 0, 0},
		"full":         {40, 700, 1 << 18},
	} {
		t.Run(name, func(t *testing.T) { testUnacknowledged(t, test.streams, test.size, int64(test.retained)) })
	}
}

func testUnacknowledged(t *testing.T, streams, size int, retained int64) {
	synctest.Test(t, func(t *testing.T) {
		const rounds = 30
		p := newPlacingPeer(t, streams)
		o := &p.c.ep.outbox
		p.together(func() { p.c.ep.budget = retainedPart * max(retained, 1<<18) })
		pad := strings.Repeat(" ", size)
		for k := range rounds {
			p.write(pad + fmt.Sprintf("round %d", k))
			for i := range streams - 1 { // the last stream stalls
				p.tell(i, p.acks(uint32(4+k)))
			}
			if r := &o.envelopes.retained; r.bytes > retained || (r.first != nil) != (retained != 0) {
				t.Fatalf("%d bytes of envelopes are kept after round %d, at most %d", r.bytes, k, retained)
			}
		}
		p.news()
		i := streams - 1
		p.tell(i, Frame{Type: FrameCredit, Flags: FlagGap, Payload: AppendCredit(nil, Credit{Ack: 3, Packets: 200, Bytes: 1 << 30})})
		var again [][]byte
		for before := -1; before < len(again); p.tell(i, p.acks(uint32(3+len(again)))) {
			before = len(again)
			for _, m := range p.news() {
				if h, body, err := ParsePacketHeader(m.Data); err == nil && h.Flags&PacketSeq != 0 {
					f, _, err := ParseFrame(body)
					if err != nil || h.Seq != uint32(3+len(again)) {
						t.Fatalf("packet %d, %v", h.Seq, err)
					}
					again = append(again, f.Payload)
				}
			}
		}
		for k := range rounds {
			if want := pad + fmt.Sprintf("round %d %d", k, i); k >= len(again) || string(again[k]) != want {
				t.Fatalf("%d packets were published again, number %d should be %q", len(again), k, want)
			}
		}
		if r := &o.envelopes.retained; r.first != nil || r.bytes != 0 || p.c.ep.kept.Load() != 0 {
			t.Errorf("%d bytes of envelopes and %d of packets are kept", r.bytes, p.c.ep.kept.Load())
		}
	})
}

// The outbox may publish a packet again from an envelope just when other envelopes use up the budget. The packet does
// not move meanwhile.
func TestRetransmissionsOutliveTheirEnvelopes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 12)
		pad := strings.Repeat(" ", 900)
		p.write(pad + "fourth")
		r := &p.c.ep.outbox.envelopes.retained
		if r.first == nil {
			t.Fatal("no envelope is kept")
		}
		before := p.conn.Published
		p.conn.Published = func(subject, reply string, data []byte) error {
			if bytes.Contains(data, []byte("fifth")) { // another goroutine writes, while the outbox is about to repair the first stream
				_, _ = p.writers[2].Write([]byte("sixth"))
			}
			return before(subject, reply, data)
		}
		p.news()
		p.together(func() {
			p.c.ep.budget = retainedPart * r.bytes
			p.conn.Deliver(&nats.Msg{Subject: p.writers[0].session.reply(), Data: AppendPacket(nil, PacketHeader{Sender: 1},
				Frame{Type: FrameCredit, Flags: FlagGap, Payload: AppendCredit(nil, Credit{Ack: 3, Packets: 200, Bytes: 1 << 30})})})
			for _, w := range p.writers[1:] {
				if _, err := w.Write([]byte(pad + "fifth")); err != nil {
					t.Error(err)
				}
			}
		})
		again := false
		for _, m := range p.news() {
			if h, _, err := ParsePacketHeader(m.Data); m.Subject == p.subject(0) && err == nil && h.Flags&PacketSeq != 0 {
				again = true
				if !bytes.HasSuffix(m.Data, []byte("fourth 0")) {
					t.Errorf("% x was published again", m.Data)
				}
			}
		}
		if !again {
			t.Error("nothing was published again")
		}
	})
}

// After a loss, as few packets are on the way as without placing.
func TestPlacedPacketsHeedTheLimitAfterALoss(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPlacingPeer(t, 4)
		for range 4 {
			p.write("lost")
		}
		p.tell(1, Frame{Type: FrameCredit, Flags: FlagGap, Payload: AppendCredit(nil, Credit{Ack: 3, Packets: 200, Bytes: 1 << 30})})
		for _, n := range []uint32{5, 7} {
			for i := range p.writers {
				p.tell(i, p.acks(n))
			}
		}
		for range 12 {
			p.write("after")
		}
		q := &p.writers[1].sender.unacked
		if limit := q.loss.Limit(); limit == 0 || q.OnTheWay() > limit {
			t.Errorf("%d packets are on the way, at most %d should be", q.OnTheWay(), limit)
		}
	})
}

// The bound of kept envelopes holds within a round of the outbox, too.
func TestEnvelopesAreBoundedWithinARound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const streams = 40
		p := newPlacingPeer(t, streams)
		r := &p.c.ep.outbox.envelopes.retained
		placed, peak := 0, int64(0)
		before := p.conn.Published
		p.conn.Published = func(subject, reply string, data []byte) error {
			if bytes.Contains(data, []byte("large")) && placed < streams/2 { // this sends the envelope of the record before
				_, _ = p.writers[placed].Write([]byte("placed"))
				placed++
			}
			peak = max(peak, r.bytes)
			return before(subject, reply, data)
		}
		p.together(func() {
			p.c.ep.budget = retainedPart * 16 << 10
			for _, w := range p.writers[streams/2:] {
				if _, err := w.Write([]byte("large" + strings.Repeat(" ", 2<<10))); err != nil {
					t.Error(err)
				}
			}
		})
		if peak > 16<<10 || placed != streams/2 {
			t.Errorf("%d bytes of envelopes are kept, at most %d should be; %d records were written", peak, 16<<10, placed)
		}
	})
}

// A peer that loses messages gets every record, in order, whatever the writers do meanwhile.
func TestPlacedRecordsArriveInOrder(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		synctest.Test(t, func(t *testing.T) {
			streams := rapid.IntRange(2, 6).Draw(r, "streams")
			p := newPlacingPeer(t, streams)
			var lossy atomic.Bool
			lossy.Store(true)
			p.conn.fail = func(n int, data []byte) error {
				if lossy.Load() && len(data) > PacketHeaderSize && rapid.IntRange(0, 5).Draw(r, "lost") == 0 {
					return nats.ErrReconnectBufExceeded
				}
				return nil
			}
			written, got, next := make([]int, streams), make([]int, streams), make([]uint32, streams)
			for i := range next {
				next[i] = 3
			}
			index := map[string]int{}
			for i := range streams {
				index[p.subject(i)] = i
			}
			take := func(subject string, packet []byte) {
				h, body, err := ParsePacketHeader(packet)
				if err != nil || h.Flags&PacketSeq == 0 || h.Seq != next[index[subject]] {
					return
				}
				i := index[subject]
				next[i]++
				for len(body) > 0 {
					var f Frame
					if f, body, err = ParseFrame(body); err != nil {
						t.Fatal(err)
					}
					if f.Type != FrameData {
						continue
					}
					if n := int(binary.BigEndian.Uint32(f.Payload)); n != got[i] {
						t.Fatalf("stream %d: record %d, want %d", i, n, got[i])
					}
					got[i]++
				}
			}
			answer := func() {
				for _, m := range p.news() {
					body, n, err := openEnvelope(m.Data)
					if err != nil {
						take(m.Subject, m.Data)
						continue
					}
					for range n {
						var token, packet []byte
						token, packet, body = nextEnveloped(body)
						take(envelopedInbox+"."+string(token), packet)
					}
				}
				for i := range streams {
					var flags FrameFlags
					if got[i] < written[i] {
						flags = FlagGap
					}
					p.tell(i, Frame{Type: FrameCredit, Flags: flags, Payload: AppendCredit(nil, Credit{Ack: next[i], Packets: next[i] + 200, Bytes: 1 << 30})})
				}
			}
			for range rapid.IntRange(1, 12).Draw(r, "rounds") {
				p.together(func() {
					for range rapid.IntRange(0, 12).Draw(r, "writes") {
						i := rapid.IntRange(0, streams-1).Draw(r, "stream")
						rec := binary.BigEndian.AppendUint32(nil, uint32(written[i]))
						rec = append(rec, make([]byte, rapid.SampledFrom([]int{0, 20, 50}).Draw(r, "size"))...)
						if _, err := p.writers[i].Write(rec); err != nil {
							t.Error(err)
						}
						written[i]++
						switch rapid.IntRange(0, 5).Draw(r, "then") {
						case 0:
							go p.writers[i].Flush()
							synctest.Wait()
						case 1:
							p.tell(i, p.acks(next[i]))
						}
					}
				})
				answer()
			}
			lossy.Store(false)
			for range 20 {
				time.Sleep(time.Second)
				answer()
			}
			for i := range streams {
				if got[i] != written[i] {
					t.Errorf("stream %d: %d of %d records arrived", i, got[i], written[i])
				}
			}
			if r := &p.c.ep.outbox.envelopes.retained; r.first != nil || p.c.ep.kept.Load() != 0 {
				t.Errorf("%d bytes of envelopes and %d of packets are kept", r.bytes, p.c.ep.kept.Load())
			}
		})
	})
}

// Many slow streams lose messages, and their producer's connection breaks. Every record arrives, and nothing is kept.
func TestSlowStreamsSurviveLossAndReconnects(t *testing.T) {
	for seed := range int64(6) {
		synctest.Test(t, func(t *testing.T) {
			const streams, records = 40, 150
			m := memoryTest(t, ClientParams{})
			var mu sync.Mutex // guards random
			random := rand.New(rand.NewSource(seed))
			draw := func(n int) int {
				mu.Lock()
				defer mu.Unlock()
				return random.Intn(n)
			}
			var loss atomic.Int64 // per mille
			m.bus.SetFilter(func(_, _ *fake.Conn, _ *nats.Msg) bool { return int64(draw(1000)) >= loss.Load() })
			m.handle(t, "slow", func(w *Writer, r *Request) error {
				for k := range records {
					b := fmt.Appendf(nil, "%d ", k)
					var err error
					switch draw(40) {
					case 0:
						b = append(b, make([]byte, 3000)...)
					case 1:
						b = append(b, make([]byte, 1000)...)
					case 2:
						err = w.Flush()
					case 3:
						err = w.Sync(r.Context())
					}
					if err == nil {
						_, err = w.Write(b)
					}
					if err != nil {
						return err
					}
					time.Sleep(time.Duration(draw(300)) * time.Microsecond)
				}
				return nil
			})
			var all []*Stream
			for range streams {
				all = append(all, m.open(t, "slow"))
			}
			time.Sleep(10 * time.Millisecond)
			loss.Store(20 * (seed % 3))
			var readers sync.WaitGroup
			for i, st := range all {
				readers.Go(func() {
					k := 0
					for b, err := range st.All() {
						if err != nil || !bytes.HasPrefix(b, fmt.Appendf(nil, "%d ", k)) {
							t.Errorf("stream %d: record %d is %.20q, %v", i, k, b, err)
							return
						}
						k++
					}
					if k != records {
						t.Errorf("stream %d: %d of %d records", i, k, records)
					}
				})
			}
			if seed%2 == 1 {
				for range 3 {
					time.Sleep(7 * time.Millisecond)
					m.back.Set(nats.RECONNECTING)
					time.Sleep(2 * time.Millisecond)
					m.back.Set(nats.CONNECTED)
				}
			}
			readers.Wait()
			loss.Store(0)
			for _, st := range all {
				_ = st.Close()
			}
			time.Sleep(2 * time.Second)
			synctest.Wait()
			if r := &m.server.ep.outbox.envelopes.retained; r.first != nil || r.bytes != 0 {
				t.Errorf("%d bytes of envelopes are kept", r.bytes)
			}
			m.nothingLeft(t)
		})
	}
}

// Many goroutines write to each of many streams. The packets of each stream are published in order, with all records,
// and Flush means that.
func TestPlacingWritersKeepTheOrder(t *testing.T) {
	const streams, writers = 8, 3
	records := 1000
	if race.Enabled || testing.Short() {
		records /= 4
	}
	conn := fake.New()
	conn.Requested = func(*nats.Msg) error { return nil }
	var mu sync.Mutex
	next, got := map[string]uint32{}, map[string]int{}
	fill := make(chan string, 1<<16) // subjects of packets to acknowledge
	take := func(subject string, packet []byte) {
		h, body, err := ParsePacketHeader(packet)
		if err != nil || h.Flags&PacketSeq == 0 {
			return
		}
		if h.Seq != next[subject] {
			t.Errorf("%s: packet %d, want %d", subject, h.Seq, next[subject])
		}
		next[subject] = h.Seq + 1
		for len(body) > 0 {
			var f Frame
			if f, body, err = ParseFrame(body); err != nil {
				t.Error(err)
				return
			}
			if f.Type == FrameData {
				got[subject]++
			}
		}
		fill <- subject
	}
	var trial []byte
	conn.Published = func(subject, _ string, data []byte) error {
		time.Sleep(50 * time.Microsecond) // the writers are faster
		mu.Lock()
		defer mu.Unlock()
		body, n, err := openEnvelope(data)
		if err != nil {
			take(subject, data)
			return nil
		}
		for range n {
			var token, packet []byte
			token, packet, body = nextEnveloped(body)
			if h, frames, err := ParsePacketHeader(packet); err == nil && h.Flags&PacketSeq == 0 {
				if f, _, err := ParseFrame(frames); err == nil && f.Type == FrameChallenge {
					trial = bytes.Clone(f.Payload)
					fill <- envelopedInbox + "." + string(token)
				}
			}
			take(envelopedInbox+"."+string(token), packet)
		}
		return nil
	}
	c := fakeClient(t, conn, ClientParams{})
	p := &envelopedPeer{c: c}
	index := map[string]int{}
	for i := range streams {
		p.writers = append(p.writers, c.NewWriter(p.subject(i)))
		index[p.subject(i)] = i
	}
	stop := make(chan struct{})
	var peer sync.WaitGroup
	peer.Go(func() {
		for {
			select {
			case <-stop:
				return
			case subject := <-fill:
				i := index[subject]
				mu.Lock()
				frames := []Frame{p.acks(next[subject]), {Type: frameEnvelopes}}
				if trial != nil {
					frames = append(frames, Frame{Type: FrameResponse, Payload: trial})
				}
				mu.Unlock()
				conn.Deliver(&nats.Msg{Subject: p.writers[i].session.reply(), Data: AppendPacket(nil, PacketHeader{Sender: uint64(2*i + 1)}, frames...)})
			}
		}
	})
	var all sync.WaitGroup
	for i, w := range p.writers {
		for g := range writers {
			all.Go(func() {
				for k := range records {
					if _, err := w.Write(make([]byte, 10+(k+g)%50)); err != nil {
						t.Error(err)
						return
					}
					if k%4 != 0 { // otherwise more records follow at once
						time.Sleep(100 * time.Microsecond)
					}
					switch (k*7 + g*3 + i) % 97 {
					case 0:
						if err := w.Flush(); err != nil {
							t.Error(err)
						}
					case 1:
						if _, err := w.WriteObject(k); err != nil {
							t.Error(err)
						}
					}
				}
				if err := w.Flush(); err != nil {
					t.Error(err)
				}
			})
		}
	}
	all.Wait()
	placed := 0
	for i, w := range p.writers {
		if err := w.Sync(t.Context()); err != nil {
			t.Error(err)
		}
		mu.Lock()
		if out := int(w.Totals().RecordsOut); out != got[p.subject(i)] {
			t.Errorf("stream %d: %d of %d records were published", i, got[p.subject(i)], out)
		}
		mu.Unlock()
		w.mu.Lock()
		if w.placedIn != 0 {
			placed++
		}
		w.mu.Unlock()
	}
	close(stop)
	peer.Wait()
	if placed == 0 {
		t.Error("no stream placed a record")
	}
}

// Once the pools are full, a placed record allocates nothing.
func TestPlacingAllocatesNothing(t *testing.T) {
	conn := fake.New()
	conn.Requested = func(*nats.Msg) error { return nil }
	h := holding(conn)
	c := fakeClient(t, conn, ClientParams{})
	o := &c.ep.outbox
	o.doLater(outOfStream{subject: "held", refuse: &CloseError{Code: CloseTryAgainLater}})
	defer func() { h <- struct{}{} }()
	for o.park.Announced() || o.hasOutOfStream() {
		time.Sleep(time.Millisecond)
	}
	s := unopenedStream(c.ep)
	w := newConsumerWriter(s)
	s.send.Store(&w.sender)
	w.granted = credited{1 << 20, 1 << 40}
	e := &enveloping{most: 1, size: coalesceMost}
	w.place.at = e
	record := make([]byte, 100)
	if n := testing.AllocsPerRun(1000, func() {
		w.mu.Lock()
		if !w.placeLocked(record, FlagRaw) {
			t.Fatal("not placed")
		}
		w.freeLocked(w.kept)
		w.mu.Unlock()
		o.placed.Store(nil) // this test is the outbox
		v := e.first
		e.first, e.last, e.opened, e.news = nil, nil, 0, false
		o.openByWriters.Store(0)
		v.kept = 1
		o.envelopes.retained.push(v)
		putPacket(&v.at(0).packet)
	}); n > 0 && !race.Enabled {
		t.Errorf("%.2f allocations", n)
	}
}
