package stream

import (
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
	subscribe(subject string, f nats.MsgHandler) (unsubscribe func(), err error)
	// statusChanges delivers every change of status until stop.
	statusChanges() (changes <-chan nats.Status, stop func())
	// status and maxPayload take the connection's lock, which is held while a peer takes no bytes. So only the
	// endpoint's own goroutines ask; calls of the user's look at what the endpoint remembers.
	status() nats.Status
	maxPayload() int64
}

// natsTransport is the real one.
type natsTransport struct{ nc *nats.Conn }

func (t natsTransport) publish(subject, reply string, data []byte) error {
	if reply == "" {
		return t.nc.Publish(subject, data)
	}
	return t.nc.PublishRequest(subject, reply, data)
}

func (t natsTransport) publishMsg(m *nats.Msg) error { return t.nc.PublishMsg(m) }

// unsubscribeTimeout bounds the wait for a connection that takes no bytes.
const unsubscribeTimeout = 2 * time.Second

func (t natsTransport) subscribe(subject string, f nats.MsgHandler) (func(), error) {
	sub, err := t.nc.Subscribe(subject, f)
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
