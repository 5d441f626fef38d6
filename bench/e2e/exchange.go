package e2e

import (
	"bytes"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/natsstream/stream/internal/load"
)

// OpenImpls ask a question and get one answer: the library by opening a stream
// that carries one record and closes, plain NATS by a request.
func OpenImpls() []Impl { return exchangeImpls(load.OpenOnce) }

// EchoImpls send a record and get it back: the library over a stream that is
// open in both directions, plain NATS by a request.
func EchoImpls() []Impl { return exchangeImpls(load.OpenEcho) }

func exchangeImpls(open func(load.Dialer, int) (load.Pinger, error)) []Impl {
	return []Impl{{Name: "stream", OpenPinger: open}, {Name: "fast", OpenPinger: overFast(open)}, {Name: "nats", OpenPinger: openRequest}}
}

// requestPinger is nats.Request, answered in the subscription's callback.
type requestPinger struct {
	load.Pair
	subject string
	record  []byte
}

func openRequest(d load.Dialer, size int) (load.Pinger, error) {
	conns, err := load.DialPair(d)
	if err != nil {
		return nil, err
	}
	p := &requestPinger{Pair: conns, subject: nats.NewInbox(), record: load.NewRecord(size, 0)}
	_, err = conns.Producer.Subscribe(p.subject, func(m *nats.Msg) { _ = m.Respond(m.Data) })
	if err == nil {
		err = conns.Producer.Flush()
	}
	if err != nil {
		conns.Close()
		return nil, err
	}
	return p, nil
}

func (p *requestPinger) Ping() error {
	m, err := p.Consumer.Request(p.subject, p.record, 10*time.Second)
	if err == nil && !bytes.Equal(m.Data, p.record) {
		err = load.ErrAnswer
	}
	return err
}
