package stream_test

import (
	"encoding/json"
	"errors"
	"io"
	"reflect"
	"strings"
	"sync"
	"testing"
	"unicode"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// Totals count each record once, of any size and kind, with its own bytes and no others, at both ends and in both
// directions. They are exact for the goroutine that reads or writes, in the middle of a packet as well.
func TestTotalsCountRecords(t *testing.T) {
	sizes := []int{0, 1, 100, 100, 100, coalesceLimit, coalesceLimit + 1, singleLimit, singleLimit + 1, 3 * singleLimit, 7}
	var read stream.Totals
	check := func(what string, got stream.Totals, want stream.Totals) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %+v, want %+v", what, got, want)
		}
	}
	p, s := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		if err := w.SetHeader(nats.Header{"Name": {"value"}}); err != nil {
			return err
		}
		var want stream.Totals
		for i, size := range sizes {
			if _, err := w.Write(testRecord(i, size)); err != nil {
				return err
			}
			want.RecordsOut++
			want.BytesOut += uint64(size)
			got := w.Totals()
			got.RecordsAcked, got.BytesAcked = 0, 0
			check("a record was written", got, want)
		}
		n, err := w.WriteObject([]string{"an", "object"})
		if err != nil {
			return err
		}
		if _, err := w.WriteObject(func() {}); err == nil {
			t.Error("a function was encoded")
		}
		if ok, err := w.TryWrite([]byte("tried")); !ok || err != nil {
			t.Error(ok, err)
		}
		want.RecordsOut += 2
		want.BytesOut += uint64(n + len("tried"))
		if err := w.Sync(r.Context()); err != nil {
			return err
		}
		want.RecordsAcked, want.BytesAcked = want.RecordsOut, want.BytesOut
		check("all was acknowledged", w.Totals(), want)
		rec, err := r.Recv()
		if err != nil {
			return err
		}
		want.RecordsIn, want.BytesIn = 1, uint64(len(rec))
		check("the request", r.Totals(), want)
		check("the writer", w.Totals(), want)
		read = want
		return w.SetTrailer(nats.Header{"Trailer": {"value"}})
	})
	st := open(t, p.consumer, "svc")
	check("a new stream", st.Totals(), stream.Totals{})
	var want stream.Totals
	for i, size := range sizes {
		var err error
		if i%3 == 2 {
			buf := make([]byte, size)
			if _, err = io.ReadFull(st, buf[:min(1, size)]); err == nil { // the rest of the record comes from Recv
				_, err = io.ReadFull(st, buf[min(1, size):])
			}
		} else if st.Ready(); true { // it counts nothing
			_, err = st.Recv()
		}
		if err != nil {
			t.Fatal(err)
		}
		want.RecordsIn++
		want.BytesIn += uint64(size)
		check("a record was read", st.Totals(), want)
	}
	var v any
	if err := st.RecvObject(&v); err != nil {
		t.Error(err)
	}
	if rec, err := st.Recv(); err != nil || string(rec) != "tried" {
		t.Error(string(rec), err)
	}
	if _, err := st.Write([]byte("answer")); err != nil {
		t.Error(err)
	}
	wantEOF(t, st)
	got := st.Totals()
	if got.RecordsIn != read.RecordsOut || got.BytesIn != read.BytesOut || got.RecordsOut != read.RecordsIn || got.BytesOut != read.BytesIn {
		t.Errorf("the ends disagree: %+v, %+v", got, read)
	}
	eventually(t, "the records are counted", func() bool {
		return p.consumer.Stats().RecordsReceived == got.RecordsIn && s.Stats().RecordsReceived == 1
	})
	if sent, received := s.Stats(), p.consumer.Stats(); sent.PacketsSent != received.PacketsReceived || sent.BytesSent != received.BytesReceived {
		t.Errorf("sent %d packets, %d bytes; received %d, %d", sent.PacketsSent, sent.BytesSent, received.PacketsReceived, received.BytesReceived)
	}
}

// Another goroutine may watch a stream: what it sees never becomes less, and no more is acknowledged than was written.
func TestTotalsMayBeWatched(t *testing.T) {
	const streams = 4
	n := scaled(20_000)
	p, s := newServed(t, stream.ServerParams{}, echo)
	var all sync.WaitGroup
	for i := range streams {
		all.Go(func() {
			st := open(t, p.consumer, "svc")
			done := make(chan struct{})
			var watchers sync.WaitGroup
			watchers.Go(func() {
				var last stream.Totals
				for ended := false; !ended; {
					select {
					case <-done:
						ended = true
					default:
					}
					now := st.Totals()
					if now.RecordsIn < last.RecordsIn || now.BytesIn < last.BytesIn || now.RecordsOut < last.RecordsOut || now.BytesOut < last.BytesOut ||
						now.RecordsAcked < last.RecordsAcked || now.BytesAcked < last.BytesAcked || now.RecordsAcked > now.RecordsOut || now.BytesAcked > now.BytesOut {
						t.Errorf("%+v, and before %+v", now, last)
						return
					}
					last = now
				}
			})
			watchers.Go(func() {
				for k := range n {
					if _, err := st.Write(testRecord(k, 10+i)); err != nil {
						t.Error(err)
						return
					}
				}
				if err := st.CloseSend(); err != nil {
					t.Error(err)
				}
			})
			if _, err := readAll(st); err != io.EOF {
				t.Error(err)
			}
			close(done)
			watchers.Wait()
			if err := st.Sync(testContext(t)); err != nil && !errors.Is(err, stream.ErrClosed) {
				t.Error(err)
			}
			if got, n, size := st.Totals(), uint64(n), uint64(10+i); got.RecordsIn != n || got.BytesIn != n*size || got.RecordsOut != n || got.BytesOut != n*size {
				t.Errorf("%+v, want %d records of %d bytes", got, n, size)
			}
		})
	}
	waitFor(t, "all streams", all.Wait)
	eventually(t, "all is counted", func() bool {
		return p.consumer.Stats().RecordsReceived == uint64(streams*n) && s.Stats().RecordsReceived == uint64(streams*n)
	})
}

// A fallback peer acknowledges nothing; all else is counted.
func TestTotalsOfAFallbackPeer(t *testing.T) {
	p := newPair(t)
	inbox, sub := jsonInbox(t, p)
	if err := p.consumer.Conn.FlushTimeout(patience); err != nil { // the subscription is on another connection than the writer
		t.Fatal(err)
	}
	w := p.producer.NewWriter(inbox)
	write(t, w, []byte("one"), []byte("three"))
	closeWriter(t, w)
	for range 3 {
		nextJSON(t, sub)
	}
	if got, want := w.Totals(), (stream.Totals{RecordsOut: 2, BytesOut: 8}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	st, tell := oldProducer(t, p)
	tell([]byte(`{"type":1,"data":"cmVjb3Jk"}`))
	if _, err := st.Recv(); err != nil {
		t.Error(err)
	}
	if got, want := st.Totals(), (stream.Totals{RecordsIn: 1, BytesIn: 6}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
	_ = st.Close()
	if n := p.consumer.Stats(); n.PacketsReceived != 1 || n.BytesReceived == 0 {
		t.Errorf("%+v", n)
	}
	eventually(t, "the record is counted", func() bool { return p.consumer.Stats().RecordsReceived == 1 })
	if got := stream.NewWriter(nil, "").Totals(); got != (stream.Totals{}) {
		t.Errorf("a writer that can never write: %+v", got)
	}
}

// Each field of Stats and Totals has its name in snake case in JSON.
func TestStatsHaveNamesInJSON(t *testing.T) {
	for _, v := range []any{stream.Stats{}, stream.Totals{}} {
		typ := reflect.TypeOf(v)
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		var fields map[string]json.RawMessage
		if err := json.Unmarshal(b, &fields); err != nil {
			t.Fatal(err)
		}
		for f := range typ.Fields() {
			var snake strings.Builder
			for i, r := range f.Name {
				if unicode.IsUpper(r) && i > 0 {
					snake.WriteByte('_')
				}
				snake.WriteRune(unicode.ToLower(r))
			}
			if _, ok := fields[snake.String()]; !ok || f.Tag.Get("json") != snake.String() {
				t.Errorf("%s.%s is %q in JSON", typ.Name(), f.Name, f.Tag.Get("json"))
			}
			delete(fields, snake.String())
		}
		if len(fields) != 0 {
			t.Errorf("%s: also %v", typ.Name(), fields)
		}
	}
}
