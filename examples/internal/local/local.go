// Package local gives an example a NATS server and two connections to it, in one process. Your own programs call
// nats.Connect instead.
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
