package fuzz

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// oldMessage is a message of the original protocol, as its producers and consumers had it.
type oldMessage struct {
	Type       int       `json:"type"`
	Data       []byte    `json:"data,omitempty"`
	CloseError *oldClose `json:"closeError,omitempty"`
}

type oldClose struct {
	Code int
	Text string
}

// FuzzFallback takes its input for a message of an old producer, and compares what the reader sees with what
// encoding/json makes of it. Then it sends its input as a record, and as the reason of a close, to an old consumer,
// compares the messages byte for byte with those of encoding/json, and gives them to our own reader.
func FuzzFallback(f *testing.F) {
	for _, text := range []string{
		`{"type":1,"data":"aGVsbG8="}`, `{"type":1}`, `{"type":1,"data":""}`, `{"type":1,"data":null}`,
		`{"type":2,"closeError":{"Code":1000,"Text":""}}`, `{"type":2,"closeError":{"Code":4000,"Text":"\u003cno\u003e \"x\" é"}}`,
		`{"type":2}`, `{"type":2,"closeError":null}`, `{"type":2,"closeError":{}}`, `{"type":3}`, `{}`, `null`, `[1]`, `1e400`,
		` { "data" : "aGVsbG8=" , "type" : 1 } `, `{"TYPE":1,"Data":"aGVsbG8="}`, `{"type":1,"data":"aGVsbG8\u003d"}`,
		`{"type":1,"data":"\/\/\/\/"}`, `{"type":1,"data":[104,105]}`, `{"type":1,"data":"aGVsbG8"}`, `{"type":1,"data":"aGVsbG9="}`,
		`{"type":1,"data":"aGVs bG8="}`, "{\"type\":1,\"data\":\"aGVs\nbG8=\"}", "{\"type\":1,\"data\":\"aGVs\r\nbG8=\"}", `{"type":1,"data":"aGVs\nbG8="}`,
		`{"type":1,"data":"aGVsbG8=","data":"eHh4"}`, `{"type":1,"data":"`, `{"type":1,"data":"}`, `{"type":1,"data":""`, `{"type":1,"data":"-_-_"}`,
		`{"type":1,"data":"` + strings.Repeat("AAAA", 300) + `"}`, `hello`, "\x00", "<&>\u2028\xff", `{"type":1.0}`, `{"type":2,"closeError":{"code":1000,"tExt":"x"}}`,
	} {
		f.Add([]byte(text))
	}
	l := newLab(f, stream.ClientParams{})
	const inbox = "_INBOX.WzMBDEFgQTDaRKtrDRD6kp.Ab3dEf9Z" // eight characters of base 62: an old consumer
	published := make(chan *nats.Msg, 10)
	if _, err := l.raw.ChanSubscribe(inbox, published); err != nil {
		f.Fatal(err)
	}
	if err := l.raw.Flush(); err != nil {
		f.Fatal(err)
	}
	normal := []byte(`{"type":2,"closeError":{"Code":1000,"Text":""}}`)

	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) > 0 && input[0] != stream.PacketMagic {
			readOld(t, l, input, normal)
		}

		// To an old consumer.
		w := l.client.NewWriter(inbox)
		if n, err := w.Write(input); n != len(input) || err != nil {
			t.Fatalf("Write: %d, %v", n, err)
		}
		reason := strings.ToValidUTF8(string(input[:min(len(input), stream.MaxReason)]), "")
		if err := w.CloseWithCode(stream.CloseBadRequest, reason); err != nil {
			t.Fatal(err)
		}
		var messages []message
		for _, want := range []oldMessage{{Type: 1, Data: input}, {Type: 2, CloseError: &oldClose{stream.CloseBadRequest, reason}}} {
			m := l.wait(t, published)
			if b, err := json.Marshal(want); err != nil || !bytes.Equal(m.Data, b) {
				t.Fatalf("published\n%s, want\n%s", m.Data, b)
			}
			messages = append(messages, message{data: bytes.Clone(m.Data)})
		}

		// And back.
		s, reply := l.open(t)
		defer s.Close()
		l.publish(t, reply, messages)
		if rec, err := s.Recv(); err != nil || !bytes.Equal(rec, input) {
			t.Fatalf("a record comes back as %q, %v", rec, err)
		}
		_, err := s.Recv()
		if ce, ok := errors.AsType[*stream.CloseError](err); !ok || ce.Code != stream.CloseBadRequest || ce.Text != reason {
			t.Fatalf("the close comes back as %v", err)
		}
	})
}

// readOld sends one message of an old producer to a new stream, and compares what is read with encoding/json.
func readOld(t *testing.T, l *lab, text, normal []byte) {
	s, reply := l.open(t)
	defer s.Close()
	l.publish(t, reply, []message{{data: text}, {data: normal}})
	rec, err := s.Recv()
	ce, closed := errors.AsType[*stream.CloseError](err)

	var want oldMessage
	switch bad := json.Unmarshal(text, &want); {
	case bad != nil || want.Type != 1 && want.Type != 2:
		if !closed || ce.Code != stream.CloseUnsupportedData || ce.Text == "" {
			t.Fatalf("%q, %v; encoding/json: %+v, %v", rec, err, want, bad)
		}
	case want.Type == 1:
		if err != nil || !bytes.Equal(rec, want.Data) {
			t.Fatalf("%q, %v; want %q", rec, err, want.Data)
		}
		if rec, err := s.Recv(); err != io.EOF {
			t.Fatalf("behind the record: %q, %v", rec, err)
		}
		// What one record was decoded into belongs to the reader, and to nobody else.
		if encoded := base64.StdEncoding.EncodeToString(rec); encoded != base64.StdEncoding.EncodeToString(want.Data) {
			t.Fatalf("the record changed into %s", encoded)
		}
	case want.CloseError == nil:
		if !closed || ce.Code != stream.CloseProtocolError || ce.Text == "" {
			t.Fatalf("%q, %v; want close %d", rec, err, stream.CloseProtocolError)
		}
	case want.CloseError.Code == stream.CloseNormalClosure:
		if err != io.EOF {
			t.Fatalf("%q, %v; want io.EOF", rec, err)
		}
	default:
		if !closed || ce.Code != want.CloseError.Code || ce.Text != want.CloseError.Text {
			t.Fatalf("%q, %v; want %+v", rec, err, want.CloseError)
		}
	}
}
