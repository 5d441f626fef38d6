package stream

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/nats-io/nats.go"
)

// This file decides whether a message is a request, and to which subjects an answer may be sent; docs/PROTOCOL.md sections 2.6 and
// 2.7. Its functions touch no state, and any goroutine may call them. A handler may be subscribed to a wildcard, so any message
// can arrive: packets of streams, also of its own, answers to other requests, acknowledgements of JetStream. None of these may
// start a handler. Otherwise one handler's packets would start the next handler.

// errStray is the error for a message that is no request.
var errStray = errors.New("stream: not a request")

// request holds the facts about a request that a producer needs before it answers.
type request struct {
	offer   Token // the codec and the windows that the consumer offers
	json    bool  // the consumer knows only the fallback
	crossed bool  // from another account: its reply subject was mapped on the way
}

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
// The subject of a binary consumer ends with its token, unless a NATS server has mapped it: then it begins with _R_. NATS and
// its clients use names with a leading underscore for inboxes, so no service has such a subject.
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

// checkAnswer returns why this end must not publish to a subject that a peer named, nil if it may. Publishing to a subject with
// wildcards closes a pedantic connection. Subjects that begin with $ belong to NATS itself: an answer there could, for
// instance, acknowledge a message of JetStream.
func checkAnswer(subject string) error {
	if !validSubject(subject) || subject[0] == '$' {
		return fmt.Errorf("stream: reply subject %q cannot be written to: %w", subject, nats.ErrBadSubject)
	}
	return nil
}

// looksLikePacket reports whether b is a packet of this version or of a later one. Later versions keep magic and length in
// their places.
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
