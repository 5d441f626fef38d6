package streamtest_test

import (
	"errors"
	"net/url"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/natsstream/stream/streamtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRoundTrip(t *testing.T) {
	srv := streamtest.Run(t)
	answerer, asker := srv.Connect(t), srv.Connect(t, nats.Name("asker"))
	if _, err := answerer.Subscribe("echo", func(m *nats.Msg) { _ = m.Respond(m.Data) }); err != nil {
		t.Fatal(err)
	}
	if err := answerer.Flush(); err != nil {
		t.Fatal(err)
	}
	m, err := asker.Request("echo", []byte("hello"), 5*time.Second)
	if err != nil || string(m.Data) != "hello" {
		t.Fatalf("got %v, %v; want the request back", m, err)
	}
	if asker.Opts.Name != "asker" {
		t.Errorf("Connect did not pass its options on")
	}
	if n := srv.SlowConsumers(); n != 0 {
		t.Errorf("SlowConsumers() = %d, want 0", n)
	}
}

func TestListensOnLoopbackOnly(t *testing.T) {
	srv := streamtest.Run(t)
	u, err := url.Parse(srv.URL())
	if err != nil || u.Hostname() != "127.0.0.1" || u.Port() == "" || u.Port() == "0" {
		t.Fatalf("URL() = %s, %v; want a port of 127.0.0.1", srv.URL(), err)
	}
	if srv.Raw().JetStreamEnabled() {
		t.Error("JetStream is on")
	}
}

func TestServersAreSeparate(t *testing.T) {
	a, b := streamtest.Run(t), streamtest.Run(t)
	if a.URL() == b.URL() {
		t.Fatalf("two servers on %s", a.URL())
	}
}

func TestOptions(t *testing.T) {
	srv := streamtest.Run(t, streamtest.WithMaxPayload(4096), streamtest.WithOptions(func(o *server.Options) {
		o.ServerName = "tweaked"
	}))
	nc := srv.Connect(t)
	if got := nc.MaxPayload(); got != 4096 {
		t.Errorf("MaxPayload() = %d, want 4096", got)
	}
	if got := nc.ConnectedServerName(); got != "tweaked" {
		t.Errorf("server name %q, want tweaked", got)
	}
}

func TestInvalidOptions(t *testing.T) {
	if srv, err := streamtest.Start(streamtest.WithOptions(func(o *server.Options) {
		o.MaxPayload, o.MaxPending = 2, 1 // more per message than per connection
	})); err == nil {
		srv.Shutdown()
		t.Fatal("Start accepted options that no server accepts")
	}
}

func TestShutdown(t *testing.T) {
	srv, err := streamtest.Start()
	if err != nil {
		t.Fatal(err)
	}
	closed := make(chan struct{})
	nc, err := srv.Dial(nats.NoReconnect(), nats.ClosedHandler(func(*nats.Conn) { close(closed) }))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	srv.Shutdown()
	srv.Shutdown()
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Fatal("the connection outlives the server")
	}
	if _, err := srv.Dial(); !errors.Is(err, nats.ErrNoServers) {
		t.Fatalf("Dial after Shutdown: %v, want ErrNoServers", err)
	}
}
