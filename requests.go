package stream

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// This file has the rules for requests: their subjects, headers and sizes, which messages are requests, and to which
// subjects an answer may be sent; docs/PROTOCOL.md sections 2.4, 2.6 and 2.7. Its functions touch no state, and any
// goroutine may call them. A handler may be subscribed to a wildcard, so any message can arrive: packets of streams,
// also of its own, answers to other requests, acknowledgements of JetStream. None of these may start a handler.
// Otherwise one handler's packets would start the next handler.

// errStray is the error for a message that is no request.
var errStray = errors.New("stream: not a request")

// request holds the facts about a request that a producer needs before it answers.
type request struct {
	offer   Token // the codec and the windows that the consumer offers
	json    bool  // the consumer knows only the fallback
	crossed bool  // from another account: its reply subject was mapped on the way
}

// Headers of a request, docs/PROTOCOL.md sections 2.2 and 2.4. Names with this prefix are reserved for the library.
const (
	headerPrefix  = "Stream-"
	headerOpen    = headerPrefix + "Open"    // the offer, for producers that cannot read it in the reply subject
	headerProbe   = headerPrefix + "Probe"   // marks a message of the fallback that carries a reply subject: it is no request
	headerTimeout = headerPrefix + "Timeout" // milliseconds that the consumer will wait for the end of the stream
)

// parseRequest reads a message that arrived at the handler of pattern, at an endpoint whose inbox begins with inbox.
// The error is errStray if the message is no request. Any other error is the reason not to answer the request.
func parseRequest(m *nats.Msg, pattern, inbox string) (request, error) {
	open, hasOpen := m.Header[headerOpen]
	switch {
	case !hasOpen && looksLikePacket(m.Data),
		m.Header[headerProbe] != nil,
		len(m.Data) == 0 && m.Header["Status"] != nil, // a status message of the NATS server
		strings.HasPrefix(m.Subject, inbox),
		reserved(m.Subject) && startsWild(pattern): // internal traffic of NATS that a wildcard matches
		return request{}, errStray
	case m.Reply == "":
		return request{}, nats.ErrMsgNoReply
	}
	var r request
	var err error
	if len(open) == 1 {
		r.offer, err = ParseOffer(open[0])
	} else {
		r.offer, err = ParseToken(lastToken(m.Reply))
	}
	if errors.Is(err, ErrVersion) {
		return request{}, err
	}
	r.json = err != nil
	if !r.json {
		_, err := ParseToken(lastToken(m.Reply))
		r.crossed = err != nil
	}
	return r, checkReply(m.Reply, pattern, r.json)
}

// checkReply returns why an answer must not be written to a request's reply subject, nil if it may.
//
// The subject of a binary consumer ends with its token, unless a NATS server has mapped it: then it begins with _R_.
// NATS and its clients use names with a leading underscore for inboxes, so no service has such a subject.
func checkReply(reply, pattern string, json bool) error {
	if err := checkAnswer(reply); err != nil {
		return err
	}
	if _, err := ParseToken(lastToken(reply)); err == nil || reply[0] == '_' {
		return nil
	}
	switch {
	case !json:
		return fmt.Errorf("stream: reply subject %q is no inbox: it must end with a token: %w", reply, nats.ErrBadSubject)
	case subjectMatches(pattern, reply):
		return fmt.Errorf("stream: reply subject %q is a request subject: %w", reply, nats.ErrBadSubject)
	}
	return nil
}

// checkAnswer returns why this end must not publish to a subject that a peer named, nil if it may. Publishing to a
// subject with wildcards closes a pedantic connection. Subjects that begin with $ belong to NATS itself: an answer
// there could, for instance, acknowledge a message of JetStream.
func checkAnswer(subject string) error {
	if !validSubject(subject) || subject[0] == '$' {
		return fmt.Errorf("stream: reply subject %q cannot be written to: %w", subject, nats.ErrBadSubject)
	}
	return nil
}

// looksLikePacket reports whether b is a packet of this version or of a later one. Later versions keep magic and length
// in their places.
func looksLikePacket(b []byte) bool {
	return len(b) >= PacketHeaderSize && b[0] == PacketMagic && uint64(binary.BigEndian.Uint32(b[PacketHeaderSize-4:])) == uint64(len(b))
}

// reserved reports whether a subject is one that NATS and its clients use among themselves, such as $JS.API.INFO or
// _INBOX.x.y.
func reserved(subject string) bool {
	return subject != "" && (subject[0] == '$' || subject[0] == '_')
}

// startsWild reports whether the first element of a subject is a wildcard.
func startsWild(pattern string) bool {
	first, _, _ := strings.Cut(pattern, ".")
	return first == "*" || first == ">"
}

// subjectMatches reports whether a subscription to pattern receives messages on subject.
func subjectMatches(pattern, subject string) bool {
	for {
		p, pRest, pMore := strings.Cut(pattern, ".")
		if p == ">" {
			return true
		}
		s, sRest, sMore := strings.Cut(subject, ".")
		if p != "*" && p != s || pMore != sMore {
			return false
		}
		if !pMore {
			return true
		}
		pattern, subject = pRest, sRest
	}
}

// validSubject reports whether a request can be published to subject.
func validSubject(subject string) bool {
	if subject == "" || strings.ContainsAny(subject, " \t\r\n") {
		return false
	}
	for token := range strings.SplitSeq(subject, ".") {
		if token == "" || token == "*" || token == ">" {
			return false
		}
	}
	return true
}

// lastToken returns the last token of a subject.
func lastToken(subject string) string { return subject[strings.LastIndexByte(subject, '.')+1:] }

// remoteName returns the part of a subject that all streams of one end share. A subject that was mapped between
// accounts ends with no token, and shows nothing about other streams. It has a name of its own, with noToken behind it:
// a stranger may choose a subject that is the name of another end.
func remoteName(subject string) string {
	i := strings.LastIndexByte(subject, '.')
	if _, err := ParseToken(subject[i+1:]); i < 0 || err != nil {
		return subject + noToken
	}
	return subject[:i]
}

// noToken ends the names of ends with a subject without a token. No subject has a space.
const noToken = " "

// requestSize returns how many bytes of a request count against the server's max_payload: its data and its header. The
// header is "NATS/1.0", a line for each value and an empty line.
func requestSize(msg *nats.Msg) int64 {
	const eol = len("\r\n")
	n := len("NATS/1.0") + eol + len(headerOpen) + len(": ") + OfferSize + eol + eol + len(msg.Data)
	n += len(headerTimeout) + len(": ") + len("9223372036854775807") + eol
	for key, values := range msg.Header {
		for _, v := range values {
			n += len(key) + len(": ") + len(v) + eol
		}
	}
	return int64(n)
}

// tooLarge returns the error for a message of size bytes that the server would refuse, because it accepts at most max.
func tooLarge(what string, size, max int64) error {
	return fmt.Errorf("%s of %d bytes, the server takes %d (max_payload): send less, or raise that limit: %w", what, size, max, nats.ErrMaxPayload)
}

// setTimeout writes the time until the deadline of ctx into h, as a duration, because the clocks of two machines
// differ.
func setTimeout(h nats.Header, ctx context.Context) {
	if deadline, ok := ctx.Deadline(); ok {
		left := time.Until(deadline)
		ms := left / time.Millisecond
		if left%time.Millisecond > 0 {
			ms++
		}
		h[headerTimeout] = []string{strconv.FormatInt(max(1, int64(ms)), 10)}
	}
}

// parseTimeout returns how long the consumer waits, 0 for no limit.
func parseTimeout(h nats.Header) (time.Duration, error) {
	v, ok := h[headerTimeout]
	if !ok || len(v) != 1 {
		return 0, nil
	}
	ms, err := strconv.ParseUint(v[0], 10, 63) // takes no sign
	if err != nil || ms == 0 {
		return 0, fmt.Errorf("header %s is %q: it must be a number of milliseconds above 0", headerTimeout, v[0])
	}
	return time.Duration(min(ms, math.MaxInt64/uint64(time.Millisecond))) * time.Millisecond, nil
}

// requestHeaders decodes the headers of the requests of one subscription. Most requests have only an offer, and most
// offers are that of the request before.
type requestHeaders struct {
	header nats.Header
	offer  [1]string
}

// decode returns the headers in b. They are valid until the next call if only the library's own are among them.
func (r *requestHeaders) decode(b []byte) nats.Header {
	const head, tail = metaHead + headerOpen + ": ", metaEOL + metaEOL
	var offer []byte
	if len(b) == len(head)+OfferSize+len(tail) && string(b[:len(head)]) == head && string(b[len(b)-len(tail):]) == tail {
		offer = b[len(head) : len(head)+OfferSize]
	}
	if offer == nil || bytes.ContainsFunc(offer, unprintable) {
		h, _ := nats.DecodeHeadersMsg(b) // nats.go delivers a message with bad headers as well
		return h
	}
	if r.header == nil {
		r.header = make(nats.Header)
	}
	if r.offer[0] != string(offer) {
		r.offer[0] = string(offer)
	}
	r.header[headerOpen] = r.offer[:]
	return r.header
}

func unprintable(r rune) bool { return r <= ' ' || r >= 0x7f }

// userHeader returns h without the library's own headers.
func userHeader(h nats.Header) nats.Header {
	maps.DeleteFunc(h, func(key string, _ []string) bool { return strings.HasPrefix(key, headerPrefix) })
	if len(h) == 0 {
		return nil
	}
	return h
}
