package stream_test

import (
	"encoding/json"
	"errors"
	"runtime"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// A fallback consumer whose producer's client is closed is told, as the original library would have done it.
func TestFallbackConsumerIsToldOfClientClose(t *testing.T) {
	p := newPair(t)
	c := p.newClient(t, stream.ClientParams{})
	messages, err := p.consumer.Conn.SubscribeSync(oldInbox)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.consumer.Conn.Flush(); err != nil {
		t.Fatal(err)
	}
	w := c.NewWriter(oldInbox)
	write(t, w, []byte("hello"))
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); !errors.Is(err, stream.ErrClientClosed) {
		t.Errorf("Writer.Close: %v", err)
	}
	for _, want := range []stream.StreamingMsg{
		{Type: stream.StreamingMsgTypeData, Data: []byte("hello")},
		{Type: stream.StreamingMsgTypeClose, CloseError: &stream.CloseError{Code: stream.CloseGoingAway, Text: "client closed"}},
	} {
		b, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		m, err := messages.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		if string(m.Data) != string(b) {
			t.Errorf("%s, want %s", m.Data, b)
		}
	}
}

// Messages that wait to be read are counted by their data, so their headers must not wait with them.
func TestUnreadHeadersTakeNoMemory(t *testing.T) {
	const messages, size = 30, 512 << 10
	p := newPair(t)
	s, reply, nc := rawStream(t, p)
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	header := nats.Header{"Large": {strings.Repeat("x", size)}}
	for i := range messages {
		if err := nc.PublishMsg(&nats.Msg{Subject: reply, Header: header, Data: rawPacket(stream.PacketSeq, 9, uint32(i), rawData("x"))}); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	// The last one has arrived when the first one after it, a PING, is answered; nothing is read yet.
	answers, err := nc.SubscribeSync(nats.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.PublishRequest(reply, answers.Subject, rawPacket(0, 9, messages, stream.Frame{Type: stream.FramePing})); err != nil {
		t.Fatal(err)
	}
	if _, err := answers.NextMsg(patience); err != nil {
		t.Fatal(err)
	}
	header = nil
	var held int64
	if !poll(func() bool { held = heap() - before; return held < messages*size/2 }) {
		t.Errorf("%d MiB are held for %d records of one byte", held>>20, messages)
	}
	for range messages {
		if rec, err := s.Recv(); string(rec) != "x" || err != nil {
			t.Fatalf("%q, %v", rec, err)
		}
	}
}
