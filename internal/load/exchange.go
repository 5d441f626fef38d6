package load

import (
	"bytes"
	"context"
	"errors"
	"io"

	"github.com/natsstream/stream"
)

// ErrAnswer is the error of an answer that differs from its request.
var ErrAnswer = errors.New("the answer is not what was sent")

// exchange is a client and a server of the library.
type exchange struct {
	Pair
	client *stream.Client
	server *stream.Server
	record []byte
}

func newExchange(d Dialer, size int, subject string, h stream.Handler) (*exchange, error) {
	conns, err := DialPair(d)
	if err != nil {
		return nil, err
	}
	e := &exchange{Pair: conns, record: NewRecord(size, 0)}
	if e.client, err = stream.NewClient(stream.ClientParams{Conn: conns.Consumer}); err != nil {
		conns.Close()
		return nil, err
	}
	if e.server, err = stream.NewServer(stream.ServerParams{Conn: conns.Producer}); err == nil {
		_, err = e.server.Handle(subject, h)
	}
	if err == nil {
		err = conns.Producer.Flush()
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
	e.Pair.Close()
}

type oncePinger struct {
	*exchange
	subject string
}

// OpenOnce measures whole streams: each Ping opens a stream that carries one record and closes.
func OpenOnce(d Dialer, size int) (Pinger, error) {
	subject := d.Subject()
	e, err := newExchange(d, size, subject, func(w *stream.Writer, r *stream.Request) error {
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
	rec, err := s.Next()
	if err == nil && !bytes.Equal(rec, p.record) {
		err = ErrAnswer
	}
	if err == nil {
		_, err = s.Next()
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

// OpenEcho opens a stream on which each record is sent back.
func OpenEcho(d Dialer, size int) (Pinger, error) {
	subject := d.Subject()
	e, err := newExchange(d, size, subject, func(w *stream.Writer, r *stream.Request) error {
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
	rec, err := p.stream.Next()
	if err == nil && !bytes.Equal(rec, p.record) {
		err = ErrAnswer
	}
	return err
}
