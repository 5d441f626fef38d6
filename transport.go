package stream

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// transport is what the endpoint needs of a NATS connection. The seam exists for time: timers are tested against an
// in-memory transport, where testing/synctest can tell a waiting goroutine from a busy one, which real sockets hide.
type transport interface {
	// publish sends data to subject, with a reply subject unless it is empty. It may block for as long as the
	// connection does; only the outbox calls it.
	publish(subject, reply string, data []byte) error
	publishMsg(m *nats.Msg) error
	// subscribe calls f for one message after the other until unsubscribe has returned. That calls f for all that
	// the server sent before it stopped sending, as far as the connection delivers it within unsubscribeTimeout.
	// queue is that of a Handle, or empty.
	subscribe(subject, queue string, f nats.MsgHandler) (unsubscribe func(), err error)
	// errors calls f for each error that the server reports and no call returns, until stop.
	errors(f func(error)) (stop func())
	// statusChanges delivers every change of status until stop.
	statusChanges() (changes <-chan nats.Status, stop func())
	// status and maxPayload take the connection's lock, which is held while a peer takes no bytes. So only the
	// endpoint's own goroutines ask; calls of the user's look at what the endpoint remembers.
	status() nats.Status
	maxPayload() int64
}

// natsTransport is the real one.
type natsTransport struct{ nc *nats.Conn }

// maxSubjects is how long the subject of a message and its reply subject may be together. A NATS server closes the
// connection, and so ends all its streams, over a longer control line: 4,096 bytes unless it is configured otherwise, some
// of them for sizes. The subjects that peers name are as long as they like.
const maxSubjects = 4096 - 32

func checkSubjects(n int) error {
	if n > maxSubjects {
		return fmt.Errorf("subject and reply subject of %d bytes, a server takes %d: %w", n, maxSubjects, nats.ErrBadSubject)
	}
	return nil
}

func (t natsTransport) publish(subject, reply string, data []byte) error {
	if err := checkSubjects(len(subject) + len(reply)); err != nil {
		return err
	}
	if reply == "" {
		return t.nc.Publish(subject, data)
	}
	return t.nc.PublishRequest(subject, reply, data)
}

func (t natsTransport) publishMsg(m *nats.Msg) error { return t.nc.PublishMsg(m) }

// unsubscribeTimeout bounds the wait for a connection that takes no bytes.
const unsubscribeTimeout = 2 * time.Second

func (t natsTransport) subscribe(subject, queue string, f nats.MsgHandler) (func(), error) {
	sub, err := t.nc.QueueSubscribe(subject, queue, f)
	if err != nil {
		return nil, err
	}
	// Credit bounds what can be pending here, stream by stream. The default limits bound all streams together, and
	// what they drop is the newest message of whichever stream comes next.
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		_ = sub.Unsubscribe()
		return nil, err
	}
	closed := make(chan struct{})
	sub.SetClosedHandler(func(string) { close(closed) })
	return func() {
		if sub.Drain() == nil {
			select {
			case <-closed:
				return
			case <-time.After(unsubscribeTimeout):
			}
		}
		_ = sub.Unsubscribe() // fails where the connection has dropped the subscription already
	}, nil
}

func (t natsTransport) status() nats.Status { return t.nc.Status() }
func (t natsTransport) maxPayload() int64   { return t.nc.MaxPayload() }

func (t natsTransport) statusChanges() (<-chan nats.Status, func()) {
	ch := t.nc.StatusChanged(nats.CONNECTED, nats.RECONNECTING, nats.DISCONNECTED, nats.DRAINING_SUBS, nats.DRAINING_PUBS, nats.CLOSED)
	return ch, func() { t.nc.RemoveStatusListener(ch) }
}

// hooks are the error handlers that endpoints have put in front of their users' own, one for each connection.
var hooks struct {
	sync.Mutex
	byConn map[*nats.Conn]*hook
}

// hook hands the errors of one connection to its endpoints and to the handler that was there before.
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

// errors chains a handler: NATS has room for one. It is taken out with the last endpoint of the connection, unless the
// user has set another meanwhile.
func (t natsTransport) errors(f func(error)) (stop func()) {
	hooks.Lock()
	defer hooks.Unlock()
	h := hooks.byConn[t.nc]
	if h == nil {
		h = &hook{before: t.nc.ErrorHandler(), calls: make(map[int]func(error))}
		if hooks.byConn == nil {
			hooks.byConn = make(map[*nats.Conn]*hook)
		}
		hooks.byConn[t.nc] = h
		t.nc.SetErrorHandler(h.handle)
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
		delete(hooks.byConn, t.nc)
		if reflect.ValueOf(t.nc.ErrorHandler()).Pointer() == reflect.ValueOf(nats.ErrHandler(h.handle)).Pointer() {
			t.nc.SetErrorHandler(h.before)
		}
	}
}

// deniedSubject returns the subject that a permissions error says this end may not publish or subscribe to.
func deniedSubject(err error) (subject string, subscribe, ok bool) {
	if !errors.Is(err, nats.ErrPermissionViolation) {
		return "", false, false
	}
	text := err.Error()
	start := strings.IndexByte(text, '"')
	if start < 0 {
		return "", false, false
	}
	quoted, qerr := strconv.QuotedPrefix(text[start:]) // the server writes it with %q
	subject, uerr := strconv.Unquote(quoted)
	return subject, strings.Contains(strings.ToLower(text[:start]), "for subscription"), qerr == nil && uerr == nil
}
