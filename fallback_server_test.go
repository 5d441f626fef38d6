package stream_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// A consumer that speaks only the fallback acknowledges nothing and answers no question. What it can make a server do is bounded
// by the server's parameters, and by NATS, which says if nobody receives a message.

// fallbackCause serves "svc" with handlers that write until that fails, and returns the causes of their ends.
func fallbackCause(t *testing.T, params stream.ServerParams) (*pair, *service, chan error) {
	t.Helper()
	causes := make(chan error, 100)
	p, s := newServed(t, params, func(w *stream.Writer, r *stream.Request) error {
		for {
			if _, err := w.Write([]byte("record")); err != nil {
				<-r.Context().Done()
				causes <- context.Cause(r.Context())
				return err
			}
			_ = w.Flush() // the next write fails as well
		}
	})
	return p, s, causes
}

func requestFallback(t *testing.T, nc *nats.Conn, reply string) {
	t.Helper()
	if err := nc.PublishRequest("svc", reply, nil); err != nil {
		t.Fatal(err)
	}
}

func wantRefusal(t *testing.T, messages *nats.Subscription, code int) {
	t.Helper()
	if m := nextJSON(t, messages); m.Type != stream.StreamingMsgTypeClose || m.CloseError == nil || m.CloseError.Code != code {
		t.Errorf("a fallback consumer got %+v, want close %d", m, code)
	}
}

func TestServerRefusesTheFallbackByDefault(t *testing.T) {
	p, _ := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		if len(r.Data) == 0 {
			t.Error("a fallback consumer is served")
		}
		return nil
	})
	inbox, messages := jsonInbox(t, p)
	requestFallback(t, p.consumer.Conn, inbox)
	wantRefusal(t, messages, stream.CloseUnsupportedData)
	s, err := p.consumer.Open(testContext(t), "svc", []byte("binary"))
	if err != nil {
		t.Fatal(err)
	}
	wantEOF(t, s)
	// One message for one message: there is nothing to be gained by a reply subject of somebody else.
	if m, err := messages.NextMsg(20 * time.Millisecond); err == nil {
		t.Errorf("a second message: %q", m.Data)
	}
}

// Requests whose reply subject nobody listens at do not hold handlers.
func TestFallbackStreamEndsIfNobodyReceivesIt(t *testing.T) {
	const requests = 5
	p, s, causes := fallbackCause(t, stream.ServerParams{MaxStreams: requests + 1, MaxFallback: requests})
	for range 4 {
		for range requests {
			requestFallback(t, p.consumer.Conn, "no.body")
		}
		for range requests {
			waitFor(t, "the handler's end", func() {
				err := <-causes
				if !errors.Is(err, nats.ErrNoResponders) {
					t.Errorf("the handler's context ended with %v", err)
				}
				wantCode(t, err, stream.CloseAbnormalClosure, "")
			})
		}
		eventually(t, "the streams are gone", func() bool { return s.Stats().Streams == 0 })
		time.Sleep(10 * time.Millisecond) // the handlers are counted out as they return
	}
}

func TestFallbackConsumerThatLeavesIsNoticed(t *testing.T) {
	p, _, causes := fallbackCause(t, stream.ServerParams{MaxFallback: 1, KeepAlive: 20 * time.Millisecond})
	inbox, messages := jsonInbox(t, p)
	requestFallback(t, p.consumer.Conn, inbox)
	for range 100 {
		if m := nextJSON(t, messages); m.Type != stream.StreamingMsgTypeData || string(m.Data) != "record" {
			t.Fatalf("got %+v", m)
		}
	}
	if err := messages.Unsubscribe(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the handler's end", func() {
		if err := <-causes; !errors.Is(err, nats.ErrNoResponders) {
			t.Errorf("the handler's context ended with %v", err)
		}
	})
}

// Messages that carry a question to NATS are what they would be without: the original library sees no difference.
func TestFallbackQuestionsDisturbNobody(t *testing.T) {
	const records = 1000
	tried := make(chan struct{})
	p, s := newServed(t, stream.ServerParams{MaxFallback: 1, KeepAlive: time.Millisecond}, func(w *stream.Writer, _ *stream.Request) error {
		for i := range records {
			if i == records/2 {
				<-tried
			}
			if _, err := w.Write([]byte("record")); err != nil {
				return err
			}
			if err := w.Flush(); err != nil {
				return err
			}
		}
		return nil
	})
	inbox, messages := jsonInbox(t, p)
	requestFallback(t, p.consumer.Conn, inbox)
	asked := 0
	for i := range records {
		m := nextRequest(t, messages)
		if string(m.Data) != `{"type":1,"data":"cmVjb3Jk"}` {
			t.Fatalf("message %d is %q", i, m.Data)
		}
		if (m.Reply != "") != (m.Header.Get("Stream-Probe") != "") {
			t.Fatalf("message %d has reply subject %q, header %v", i, m.Reply, m.Header)
		}
		if m.Reply != "" {
			if asked++; asked > 1 {
				continue
			}
			// Whoever learns the subject can do nothing with it.
			rawPublish(t, p.consumer.Conn, m.Reply, rawPacket(0, 7, 0, rawCredit(stream.Credit{Ack: 9})), rawPacket(stream.PacketSeq, 7, 0, rawData("x")), []byte(`{"type":1}`))
			close(tried)
		}
	}
	if m := nextRequest(t, messages); string(m.Data) != `{"type":2,"closeError":{"Code":1000,"Text":""}}` {
		t.Errorf("the last message is %q", m.Data)
	}
	if asked == 0 || s.Stats().DroppedForeign == 0 {
		t.Errorf("%d of %d messages asked; %+v", asked, records, s.Stats())
	}
}

func TestFallbackTimeoutEndsTheStream(t *testing.T) {
	p, _, causes := fallbackCause(t, stream.ServerParams{MaxFallback: 1, FallbackTimeout: 50 * time.Millisecond})
	for _, timeout := range []string{"", "3600000", "10"} {
		inbox, messages := jsonInbox(t, p)
		m := &nats.Msg{Subject: "svc", Reply: inbox, Header: nats.Header{}}
		if timeout != "" {
			m.Header["Stream-Timeout"] = []string{timeout}
		}
		if err := p.consumer.Conn.PublishMsg(m); err != nil {
			t.Fatal(err)
		}
		for {
			if m := nextJSON(t, messages); m.Type == stream.StreamingMsgTypeClose {
				wantCode(t, m.CloseError, stream.CloseDeadlineExceeded, "")
				break
			}
		}
		wantCode(t, <-causes, stream.CloseDeadlineExceeded, "")
		time.Sleep(10 * time.Millisecond) // the handler is counted out as it returns
	}
}

// Fallback consumers have their own share of the handlers, so that others find room.
func TestMaxFallback(t *testing.T) {
	release, began := make(chan struct{}), make(chan struct{}, 10)
	p, _ := newServed(t, stream.ServerParams{MaxStreams: 4, MaxFallback: 2}, func(*stream.Writer, *stream.Request) error {
		began <- struct{}{}
		<-release
		return nil
	})
	inbox, messages := jsonInbox(t, p)
	for range 2 {
		requestFallback(t, p.consumer.Conn, inbox)
		<-began
	}
	requestFallback(t, p.consumer.Conn, inbox)
	wantRefusal(t, messages, stream.CloseTryAgainLater)
	s := open(t, p.consumer, "svc")
	<-began
	close(release)
	wantEOF(t, s)
	for range 2 {
		wantRefusal(t, messages, stream.CloseNormalClosure)
	}
	eventually(t, "there is room again", func() bool {
		requestFallback(t, p.consumer.Conn, inbox)
		return nextJSON(t, messages).CloseError.Code == stream.CloseNormalClosure
	})
}
