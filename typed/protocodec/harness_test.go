package protocodec_test

import (
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

const patience = 20 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// ends returns a client and a server on one connection.
func ends(tb testing.TB) (*stream.Client, *stream.Server, *nats.Conn) {
	tb.Helper()
	nc := streamtest.Run(tb).Connect(tb)
	client, err := stream.NewClient(stream.ClientParams{Conn: nc})
	if err != nil {
		tb.Fatal(err)
	}
	server, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		_ = client.Close()
		_ = server.Close()
	})
	return client, server, nc
}
