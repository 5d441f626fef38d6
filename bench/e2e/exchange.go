package e2e

import (
	"bytes"
	"context"
	"errors"
	"io"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// OpenImpls ask a question and get one answer: the library by opening a stream
// that carries one record and closes, plain NATS by a request.
func OpenImpls() []Impl {
	return []Impl{{Name: "stream", OpenPinger: openOnce}, {Name: "nats", OpenPinger: openRequest}}
}

// EchoImpls send a record and get it back: the library over a stream that is
// open in both directions, plain NATS by a request.
func EchoImpls() []Impl {
	return []Impl{{Name: "stream", OpenPinger: openEcho}, {Name: "nats", OpenPinger: openRequest}}
}

var errAnswer = errors.New("the answer is not what was sent")

// requestPinger is nats.Request, answered in the subscription's callback.
type requestPinger struct {
	pair
	subject string
	record  []byte
}

func openRequest(env *Env, size int) (Pinger, error) {
	conns, err := env.dialPair()
	if err != nil {
		return nil, err
	}
	p := &requestPinger{pair: conns, subject: nats.NewInbox(), record: newRecord(size, 0)}
	_, err = conns.producer.Subscribe(p.subject, func(m *nats.Msg) { _ = m.Respond(m.Data) })
	if err == nil {
		err = conns.producer.Flush()
	}
	if err != nil {
		conns.Close()
		return nil, err
	}
	return p, nil
}

func (p *requestPinger) Ping() error {
	m, err := p.consumer.Request(p.subject, p.record, 10*time.Second)
	if err == nil && !bytes.Equal(m.Data, p.record) {
		err = errAnswer
	}
	return err
}

// exchange is a client and a server of the library.
type exchange struct {
	pair
	client *stream.Client
	server *stream.Server
	record []byte
}

func newExchange(env *Env, size int, subject string, h stream.Handler) (*exchange, error) {
	conns, err := env.dialPair()
	if err != nil {
		return nil, err
	}
	e := &exchange{pair: conns, record: newRecord(size, 0)}
	if e.client, err = stream.NewClient(stream.ClientParams{Conn: conns.consumer}); err != nil {
		conns.Close()
		return nil, err
	}
	if e.server, err = stream.NewServer(stream.ServerParams{Conn: conns.producer}); err == nil {
		_, err = e.server.Handle(subject, h)
	}
	if err == nil {
		err = conns.producer.Flush()
	}
	if err != nil {
		e.Close()
		return nil, err
	}
	return e, nil
}

func (e *exchange) Close() {
	_ = e.client.Close()
	if e.server != nil {
		_ = e.server.Close()
	}
	e.pair.Close()
}

type oncePinger struct {
	*exchange
	subject string
}

func openOnce(env *Env, size int) (Pinger, error) {
	subject := nats.NewInbox()
	e, err := newExchange(env, size, subject, func(w *stream.Writer, r *stream.Request) error {
		_, err := w.Write(r.Data)
		return err
	})
	return oncePinger{e, subject}, err
}

func (p oncePinger) Ping() error {
	s, err := p.client.Open(context.Background(), p.subject, p.record)
	if err != nil {
		return err
	}
	rec, err := s.Recv()
	if err == nil && !bytes.Equal(rec, p.record) {
		err = errAnswer
	}
	if err == nil {
		_, err = s.Recv()
	}
	if err != io.EOF {
		_ = s.Close()
		return err
	}
	return nil
}

type echoPinger struct {
	*exchange
	stream *stream.Stream
}

func openEcho(env *Env, size int) (Pinger, error) {
	subject := nats.NewInbox()
	e, err := newExchange(env, size, subject, func(w *stream.Writer, r *stream.Request) error {
		for rec, err := range r.All() {
			if err != nil {
				return err
			}
			if _, err := w.Write(rec); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	s, err := e.client.Open(context.Background(), subject, nil)
	if err != nil {
		e.Close()
		return nil, err
	}
	return echoPinger{e, s}, nil
}

func (p echoPinger) Ping() error {
	if _, err := p.stream.Write(p.record); err != nil {
		return err
	}
	rec, err := p.stream.Recv()
	if err == nil && !bytes.Equal(rec, p.record) {
		err = errAnswer
	}
	return err
}
