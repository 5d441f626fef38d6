package stream

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
)

// This file has the errors that end streams, and the rules that turn errors into close codes. Its functions touch no
// state, and any goroutine may call them.

// CloseError is the error of a stream that ended with a close code. Either the peer sent the code, or this end chose it
// because of a fault that it found. A CloseError marshals to the JSON of the original protocol,
// {"Code":1000,"Text":""}.
type CloseError struct {
	Code int
	Text string
}

// Error returns "nats stream: close 1006 (abnormal closure): text".
func (e *CloseError) Error() string {
	if e == nil {
		return "nats stream: nil *CloseError: return the value nil for no error"
	}
	s := "nats stream: close " + strconv.Itoa(e.Code)
	if name := closeName(e.Code); name != "" {
		s += " (" + name + ")"
	}
	if e.Text != "" {
		s += ": " + e.Text
	}
	return s
}

// Is reports whether target is a [*CloseError] with the same code and the same text. If target's text is empty, only
// the codes are compared: errors.Is(err, &CloseError{Code: CloseBadRequest}) matches any text.
func (e *CloseError) Is(target error) bool {
	t, ok := target.(*CloseError)
	return ok && t != nil && e != nil && t.Code == e.Code && (t.Text == "" || t.Text == e.Text)
}

// Errors of this end. The peer did not send them.
var (
	// ErrConcurrentRecv is returned by a read of a Stream or Request while another goroutine reads it. Read a stream in
	// one goroutine, or lock around its reads.
	ErrConcurrentRecv = errors.New("stream: concurrent read: a Stream has one reader at a time")
	// ErrClosed is returned by reads of a Stream after its Close, by writes to a Writer after its Close, and by writes
	// to a stream after the peer ended it normally.
	ErrClosed = errors.New("stream: use of a closed stream")
	// ErrClientClosed is returned by Open, and by writers made from the client, after Client.Close.
	ErrClientClosed = errors.New("stream: client is closed")
	// ErrServerClosed is returned by a Server's methods after Close and Drain.
	ErrServerClosed = errors.New("stream: server is closed")
	// ErrOneWay is returned by a Stream's writes if the producer speaks only the JSON fallback, which carries no
	// records to the producer. Send all data of the consumer with the request. Reads go on.
	ErrOneWay = errors.New("stream: the producer speaks the JSON fallback and takes no records")
	// ErrRecordTooLarge is returned by writes of a record larger than MaxRecordSize. If the peer speaks only the JSON
	// fallback, which cannot split a record, it is also returned for a record that does not fit into one NATS message.
	// Nothing of the record was sent, and the writer stays usable. A Handler that returns it ends its stream with
	// CloseMessageTooBig.
	ErrRecordTooLarge = errors.New("stream: record too large")
	// ErrCloseCode is returned by CloseWithCode for a code outside 1000–5999. Nothing was sent. Call it again with a
	// valid code.
	ErrCloseCode = errors.New("stream: invalid close code")
)

// noConnection and noContext are the errors for nil arguments. They name the argument, and match errors of nats.go,
// which do not name it.
func noConnection(field, advice string) error {
	return fmt.Errorf("stream: %s is nil: %s: %w", field, advice, nats.ErrInvalidConnection)
}

func noContext(call string) error {
	return fmt.Errorf("stream: the context of %s is nil: pass context.Background() if there is no other: %w", call, nats.ErrInvalidContext)
}

// connectionLost returns the error that ends all streams when their connection is closed for good.
func connectionLost(cause error) error {
	return fmt.Errorf("%w: %w", &CloseError{Code: CloseAbnormalClosure, Text: "connection lost"}, cause)
}

// protocolError returns the error that ends a stream after its peer sent a packet or message that this end cannot
// accept.
func protocolError(code int, format string, args ...any) *CloseError {
	return &CloseError{Code: code, Text: cutReason(fmt.Sprintf(format, args...), MaxReason)}
}

// contextError returns the error of a call after its context ended: ctx.Err(). If the owner of the context gave a
// cause, the cause stands in front, and errors.Is finds both.
func contextError(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	switch {
	case cause == nil:
		return err
	case errors.Is(cause, err): // the cause includes ctx.Err()
		return cause
	}
	return fmt.Errorf("%w: %w", cause, err)
}

// handlerEnd returns the code and text with which the result of a handler ends its stream; [Handler] documents them.
// Only nil and a bare *CloseError with CloseNormalClosure are a normal end. An error that wraps one reports more than a
// normal end.
func handlerEnd(err error) CloseError {
	if err == nil {
		return CloseError{Code: CloseNormalClosure}
	}
	if isNormal(err) {
		return *err.(*CloseError)
	}
	e, ok := errors.AsType[*CloseError](err)
	switch {
	case ok && e != nil && e.Code != CloseNormalClosure && validCode(e.Code):
		return *e
	case errors.Is(err, ErrRecordTooLarge):
		return CloseError{CloseMessageTooBig, err.Error()}
	}
	return CloseError{CloseInternalServerErr, err.Error()}
}

// isNormal reports whether err is a bare *CloseError with CloseNormalClosure. A peer's RESET can carry that code. No
// read or write returns it, because a handler that returned it again would end its own stream normally.
func isNormal(err error) bool {
	e, ok := err.(*CloseError)
	return ok && e != nil && e.Code == CloseNormalClosure
}

func validCode(code int) bool { return code >= minCloseCode && code <= maxCloseCode }

// closeReason checks the code of CloseWithCode and joins its texts to the reason. A reason is for people to read, and
// often is the text of an error. A reason that is too long or not valid UTF-8 is cut and repaired, so that it never
// keeps a stream from ending.
func closeReason(code int, text []string) (string, error) {
	if !validCode(code) {
		return "", fmt.Errorf("%w: %d is not in %d–%d", ErrCloseCode, code, minCloseCode, maxCloseCode)
	}
	return cutReason(strings.Join(text, " "), MaxReason), nil
}

// cutReason returns s as valid UTF-8 of at most n bytes.
func cutReason(s string, n int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= n {
		return s
	}
	for !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}
