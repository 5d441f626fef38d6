package natsconn

import (
	"errors"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/nats-io/nats.go"
)

// This file delivers the errors that NATS reports on a connection, and parses permission errors. nats.go runs
// hook.handle in a goroutine of its own. Any goroutine may run the rest. The locks of hooks and of each hook guard the
// handlers.

// hooks are the error handlers that endpoints have put in front of the users' own, one for each connection.
var hooks struct {
	sync.Mutex
	byConn map[*nats.Conn]*hook
}

// hook passes the errors of one connection to its endpoints and to the user's handler.
type hook struct {
	before nats.ErrHandler
	next   int
	mu     sync.Mutex
	calls  map[int]func(error)
}

func (h *hook) handle(nc *nats.Conn, sub *nats.Subscription, err error) {
	h.mu.Lock()
	calls := slices.Collect(maps.Values(h.calls))
	h.mu.Unlock()
	for _, f := range calls {
		f(err)
	}
	if h.before != nil {
		h.before(nc, sub, err)
	}
}

// OnError chains a handler, because a connection has room for one. The last stop of the connection restores the handler
// that was there before, unless the user has set another meanwhile.
func (c conn) OnError(f func(error)) (stop func()) {
	hooks.Lock()
	defer hooks.Unlock()
	h := hooks.byConn[c.nc]
	if h == nil {
		h = &hook{before: c.nc.ErrorHandler(), calls: make(map[int]func(error))}
		if hooks.byConn == nil {
			hooks.byConn = make(map[*nats.Conn]*hook)
		}
		hooks.byConn[c.nc] = h
		c.nc.SetErrorHandler(h.handle)
	}
	h.mu.Lock()
	id := h.next
	h.next++
	h.calls[id] = f
	h.mu.Unlock()
	return func() {
		hooks.Lock()
		defer hooks.Unlock()
		h.mu.Lock()
		delete(h.calls, id)
		last := len(h.calls) == 0
		h.mu.Unlock()
		if !last {
			return
		}
		delete(hooks.byConn, c.nc)
		if reflect.ValueOf(c.nc.ErrorHandler()).Pointer() == reflect.ValueOf(nats.ErrHandler(h.handle)).Pointer() {
			c.nc.SetErrorHandler(h.before)
		}
	}
}

// Denial is the operation that a permissions error denies to this end.
type Denial struct {
	Subject   string
	Queue     string // of a subscription
	Subscribe bool   // false for publish
}

// Denied returns the operation that a permissions error denies. ok is false for any other error.
func Denied(err error) (d Denial, ok bool) {
	if !errors.Is(err, nats.ErrPermissionViolation) {
		return d, false
	}
	text := err.Error()
	start := strings.IndexByte(text, '"')
	if start < 0 {
		return d, false
	}
	d.Subscribe = strings.Contains(strings.ToLower(text[:start]), "for subscription")
	d.Subject, text, ok = unquote(text[start:])
	if rest, queue := strings.CutPrefix(strings.ToLower(text), " using queue "); ok && queue {
		d.Queue, _, ok = unquote(text[len(text)-len(rest):])
	}
	return d, ok
}

// unquote removes the text that the server wrote with %q from the front of text.
func unquote(text string) (value, rest string, ok bool) {
	quoted, err := strconv.QuotedPrefix(text)
	if err != nil {
		return "", "", false
	}
	value, err = strconv.Unquote(quoted)
	return value, text[len(quoted):], err == nil
}
