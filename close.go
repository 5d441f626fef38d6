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

// CloseError is the end of a stream with a close code: what the peer sent, or what this end found out about it.
// It marshals to the JSON of the original protocol, {"Code":1000,"Text":""}.
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

// Is reports whether target is a [*CloseError] with the same code and, unless target's text is empty, the same text,
// so that errors.Is(err, &CloseError{Code: CloseBadRequest}) asks for the code alone.
func (e *CloseError) Is(target error) bool {
	t, ok := target.(*CloseError)
	return ok && t != nil && e != nil && t.Code == e.Code && (t.Text == "" || t.Text == e.Text)
}

// Errors of this end: no bytes of the peer are behind them.
var (
	// ErrConcurrentRecv is returned by a read of a Stream while another goroutine's read is under way. Give a stream
	// one reader, or lock around its reads.
	ErrConcurrentRecv = errors.New("stream: concurrent read: a Stream has one reader at a time")
	// ErrClosed is returned by reads of a Stream after its Close, by writes to a Writer after its Close, and by writes to a
	// stream that the peer ended normally.
	ErrClosed = errors.New("stream: use of a closed stream")
	// ErrClientClosed is returned by Open, and by writers made from the client, after Client.Close.
	ErrClientClosed = errors.New("stream: client is closed")
	// ErrServerClosed is returned by a Server's methods after Close and Drain.
	ErrServerClosed = errors.New("stream: server is closed")
	// ErrOneWay is returned by a Stream's writes where the producer speaks only the JSON fallback, which has no way
	// back. Read what it sends, and send all of your own with the request.
	ErrOneWay = errors.New("stream: the producer speaks the JSON fallback and takes no records")
	// ErrRecordTooLarge is returned by writes of a record larger than MaxRecordSize, or than one NATS message where
	// the peer speaks only the JSON fallback, which cannot cut it. Nothing of the record was sent; the writer goes on. A
	// Handler that returns it ends its stream with CloseMessageTooBig.
	ErrRecordTooLarge = errors.New("stream: record too large")
	// ErrCloseCode is returned by CloseWithCode for a code outside 1000–5999. Nothing was sent; call it again with
	// one that fits.
	ErrCloseCode = errors.New("stream: invalid close code")
)

// noConnection and noContext are returned for arguments that are nil. The errors of nats.go that they match do not say which.
func noConnection(field, advice string) error {
	return fmt.Errorf("stream: %s is nil: %s: %w", field, advice, nats.ErrInvalidConnection)
}

func noContext(call string) error {
	return fmt.Errorf("stream: the context of %s is nil: pass context.Background() if there is no other: %w", call, nats.ErrInvalidContext)
}

// connectionLost is what streams end with when the connection is closed for good under them.
func connectionLost(cause error) error {
	return fmt.Errorf("%w: %w", &CloseError{Code: CloseAbnormalClosure, Text: "connection lost"}, cause)
}

// protocolError ends a stream whose peer sent what this end cannot take.
func protocolError(code int, format string, args ...any) *CloseError {
	return &CloseError{Code: code, Text: cutReason(fmt.Sprintf(format, args...), MaxReason)}
}

// contextError is the error of a call whose context ended: ctx.Err(), with the cause in front where the owner of the
// context gave one. errors.Is finds both.
func contextError(ctx context.Context) error {
	err, cause := ctx.Err(), context.Cause(ctx)
	switch {
	case cause == nil:
		return err
	case errors.Is(cause, err): // it says as much, or more
		return cause
	}
	return fmt.Errorf("%w: %w", cause, err)
}

// handlerEnd returns how the result of a handler ends its stream; [Handler] documents it. Only nil and a bare *CloseError with
// CloseNormalClosure are a normal end: if an error wraps one, more happened than a normal end.
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

// isNormal reports whether err is a bare *CloseError with CloseNormalClosure. A peer's RESET can carry that code. No read or
// write returns it, because a handler that returned it again would end its own stream normally.
func isNormal(err error) bool {
	e, ok := err.(*CloseError)
	return ok && e != nil && e.Code == CloseNormalClosure
}

func validCode(code int) bool { return code >= minCloseCode && code <= maxCloseCode }

// closeReason joins and checks what CloseWithCode was given. The reason is for people to read, often an error's text:
// it is cut and mended where it does not fit, so that the end of a stream never fails because of it.
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
