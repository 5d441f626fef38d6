package stream

import (
	"errors"
	"testing"

	"github.com/nats-io/nats.go"
)

// What becomes of a message at a handler, by everything that is looked at.
func TestParseRequest(t *testing.T) {
	const inbox = "_SINBOX.server."
	token := string(AppendToken(nil, Token{Codec: JSON, LogPackets: 5, LogBytes: 18, ID: 7}))
	offer := nats.Header{headerOpen: {"~1j5I"}}
	packet := AppendPacket(nil, PacketHeader{Flags: PacketSeq, Sender: 2}, Frame{Type: FrameData, Payload: []byte("x")})
	version2 := append([]byte{PacketMagic, 0x21}, packet[2:]...)
	type want int
	const (
		binary want = iota
		json
		stray
		refused
	)
	for _, c := range []struct {
		pattern, subject, reply string
		header                  nats.Header
		data                    []byte
		want                    want
	}{
		{"svc", "svc", "_SINBOX.x." + token, nil, nil, binary},
		{"svc", "svc", "_SINBOX.x." + token, offer, nil, binary},
		{"svc", "svc", "_SINBOX.x.Ab3dEf7h", nil, nil, json},
		{"svc", "svc", "_R_.Ab3dEf7hIj", nil, nil, json},
		{"svc", "svc", "_R_.Ab3dEf7hIj", offer, nil, binary},
		{"svc", "svc", "_INBOX.x.y", offer, nil, binary},
		{"svc", "svc", "inbox.alice." + token, offer, nil, binary},
		{"svc", "svc", token, nil, nil, binary},
		{"svc", "svc", "an.old.consumer", nil, nil, json},
		{"svc", "svc", "an.old.consumer", offer, nil, refused},
		{"svc", "svc", "", nil, nil, refused},
		{"svc", "svc", "", offer, nil, refused},
		{"svc", "svc", "_SINBOX.x.~2" + token[2:], nil, nil, refused},
		{"svc", "svc", "_SINBOX.x.~2" + token[2:], offer, nil, binary}, // the header counts
		{"svc", "svc", "_SINBOX.x." + token, nats.Header{headerOpen: {"~2j5I"}}, nil, refused},
		{"svc", "svc", "_SINBOX.x." + token, nats.Header{headerOpen: {"x"}}, nil, json},
		{"svc", "svc", "_SINBOX.x." + token, nats.Header{headerOpen: {"~1j5I", "~1j5I"}}, nil, binary},

		// Reply subjects.
		{"svc", "svc", ">", nil, nil, refused},
		{"svc", "svc", "*", offer, nil, refused},
		{"svc", "svc", "_SINBOX.*." + token, nil, nil, refused},
		{"svc", "svc", "_SINBOX.." + token, nil, nil, refused},
		{"svc", "svc", ".", nil, nil, refused},
		{"svc", "svc", "_SINBOX.x.", nil, nil, refused},
		{"svc", "svc", "a b." + token, nil, nil, refused},
		{"svc", "svc", "$JS.API.STREAM.PURGE.ORDERS", nil, nil, refused},
		{"svc", "svc", "$JS.API." + token, offer, nil, refused},
		{"svc", "svc", "svc", nil, nil, refused},
		{"svc", "svc", "svc", offer, nil, refused},
		{"svc.*", "svc.a", "svc.b", nil, nil, refused},
		{"svc.*", "svc.a", "svc.b." + token, nil, nil, binary},
		{"svc.*", "svc.a", "svc." + token, nil, nil, binary},
		{"svc.>", "svc.a", "svc.b.c", nil, nil, refused},
		{">", "svc", "old.consumer", nil, nil, refused},
		{">", "svc", "_SINBOX.x.Ab3dEf7h", nil, nil, json},

		// What is no request.
		{"svc", "svc", "_SINBOX.x." + token, nil, packet, stray},
		{"svc", "svc", "", nil, packet, stray},
		{"svc", "svc", "_SINBOX.x." + token, nil, version2, stray},
		{"svc", "svc", "_SINBOX.x." + token, offer, packet, binary},
		{"svc", "svc", "_SINBOX.x." + token, nil, packet[:len(packet)-1], binary},
		{"svc", "svc", "_SINBOX.x." + token, nil, append([]byte{}, PacketMagic), binary},
		{"svc", "svc", "_SINBOX.x.Ab3dEf7h", nil, append([]byte("\xf5"), packet...), json},
		{"svc", "svc", "_SINBOX.x.Ab3dEf7h", nil, []byte(`{"type":1}`), json},
		{"svc", "svc", "_SINBOX.x." + token, nats.Header{headerProbe: {"1"}}, []byte(`{"type":1}`), stray},
		{"svc", "svc", "", nats.Header{"Status": {"503"}}, nil, stray},
		{"svc", "svc", "_SINBOX.x." + token, nats.Header{"Status": {"503"}}, nil, stray},
		{"svc", "svc", "_SINBOX.x." + token, nats.Header{"Status": {"ready"}}, []byte("x"), binary},
		{">", inbox + token, "_SINBOX.x." + token, offer, nil, stray},
		{"_SINBOX.>", inbox + token, "_SINBOX.x." + token, offer, nil, stray},
		{"_SINBOX.>", "_SINBOX.other.x", "_SINBOX.x." + token, offer, nil, binary},
		{">", "_INBOX.other.x", "_SINBOX.x." + token, offer, nil, stray},
		{"*.>", "$JS.API.INFO", "_INBOX.x.y", nil, nil, stray},
		{"$KV.>", "$KV.bucket.key", "_INBOX.x.y", nil, nil, json},
		{"svc.*", "svc.$x", "_INBOX.x.y", nil, nil, json},
	} {
		r, err := parseRequest(&nats.Msg{Subject: c.subject, Reply: c.reply, Header: c.header, Data: c.data}, c.pattern, inbox)
		got := refused
		switch {
		case err == errStray:
			got = stray
		case err == nil && r.json:
			got = json
		case err == nil:
			got = binary
		case !errors.Is(err, nats.ErrBadSubject) && !errors.Is(err, ErrVersion) && !errors.Is(err, nats.ErrMsgNoReply):
			t.Errorf("%+v: error %v", c, err)
		}
		if got != c.want {
			t.Errorf("handler of %s, message to %s with reply %q, header %v, data %q: %d, %v; want %d", c.pattern, c.subject, c.reply, c.header, c.data, got, err, c.want)
		}
	}
}

func TestSubjectMatches(t *testing.T) {
	for _, c := range []struct {
		pattern, subject string
		want             bool
	}{
		{"a", "a", true}, {"a", "b", false}, {"a", "a.b", false}, {"a.b", "a", false}, {"a.b", "a.b", true},
		{"*", "a", true}, {"*", "a.b", false}, {"*.b", "a.b", true}, {"a.*", "a.b", true}, {"a.*", "a.b.c", false}, {"a.*", "a", false},
		{">", "a", true}, {">", "a.b.c", true}, {"a.>", "a.b", true}, {"a.>", "a.b.c", true}, {"a.>", "a", false}, {"a.>", "b.c", false},
		{"*.>", "a", false}, {"*.>", "a.b", true}, {"a.*.c", "a.b.c", true}, {"a.*.c", "a.b.d", false},
	} {
		if got := subjectMatches(c.pattern, c.subject); got != c.want {
			t.Errorf("%s, %s: %v", c.pattern, c.subject, got)
		}
	}
}

// A window of more than 2^30 packets counts as 2^30: beyond it numbers before and behind could not be told apart.
func TestOfferedWindow(t *testing.T) {
	for _, c := range []struct{ logPackets, logBytes uint8 }{{0, 0}, {5, 18}, {30, 40}, {31, 61}} {
		got := offered(Token{LogPackets: c.logPackets, LogBytes: c.logBytes})
		if got.packets != 1<<min(c.logPackets, 30) || got.bytes != 1<<c.logBytes {
			t.Errorf("%+v gives %+v", c, got)
		}
	}
}

// A request crossed accounts if its offer is in the header and its reply subject says nothing.
func TestRequestThatCrossedAccounts(t *testing.T) {
	const token = "~1m5I0123456789A"
	for _, c := range []struct {
		reply   string
		header  nats.Header
		crossed bool
	}{
		{"_R_.Ab3dEf7hIj.Kl", nats.Header{headerOpen: {"~1m5I"}}, true},
		{"_INBOX.x.y", nats.Header{headerOpen: {"~1m5I"}}, true},
		{"_SINBOX.x." + token, nats.Header{headerOpen: {"~1m5I"}}, false},
		{"_SINBOX.x." + token, nil, false},
		{"_R_.Ab3dEf7hIj.Kl", nil, false}, // a fallback consumer
		{"_R_.Ab3dEf7hIj.Kl", nats.Header{headerOpen: {"x"}}, false},
	} {
		r, err := parseRequest(&nats.Msg{Subject: "svc", Reply: c.reply, Header: c.header}, "svc", "_SINBOX.server.")
		if err != nil || r.crossed != c.crossed {
			t.Errorf("%+v: %+v, %v", c, r, err)
		}
	}
}

// What asks for a stream is a control packet of no sender that begins with RESUME.
func TestSoughtToken(t *testing.T) {
	const token = "~1m5G0123456789A"
	name := Frame{Type: FrameResume, Payload: []byte(token)}
	for _, c := range []struct {
		header PacketHeader
		frames []Frame
		want   string
	}{
		{PacketHeader{}, []Frame{name}, token},
		{PacketHeader{}, []Frame{name, {Type: FramePing}}, token},
		{PacketHeader{Sender: 1}, []Frame{name}, ""},
		{PacketHeader{Flags: PacketSeq}, []Frame{name}, ""},
		{PacketHeader{}, []Frame{{Type: FramePing}, name}, ""},
		{PacketHeader{}, []Frame{{Type: FrameResume, Payload: []byte(token[1:])}}, ""},
		{PacketHeader{}, nil, ""},
	} {
		if got := soughtToken(AppendPacket(nil, c.header, c.frames...)); got != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
	for _, b := range []string{"", "\xf5", `{"type":1}`} {
		if got := soughtToken([]byte(b)); got != "" {
			t.Errorf("%q: %q", b, got)
		}
	}
}
