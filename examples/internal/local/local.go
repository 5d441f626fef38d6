// Package local gives an example the parts of a deployment: a NATS server, and connections to it of two programs, here in
// one process. In a program of yours, nats.Connect takes its place.
package local

import (
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/streamtest"
)

// Connect starts a NATS server in this process and returns two connections to it. stop closes both and ends the server.
func Connect() (producer, consumer *nats.Conn, stop func(), err error) {
	server, err := streamtest.Start()
	if err != nil {
		return nil, nil, nil, err
	}
	if producer, err = server.Dial(nats.Name("producer")); err != nil {
		server.Shutdown()
		return nil, nil, nil, err
	}
	if consumer, err = server.Dial(nats.Name("consumer")); err != nil {
		producer.Close()
		server.Shutdown()
		return nil, nil, nil, err
	}
	return producer, consumer, func() {
		consumer.Close()
		producer.Close()
		server.Shutdown()
	}, nil
}
