package interop

import (
	"context"
	"math/rand/v2"
	"net"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamnet"
	"github.com/natsstream/stream/streamtest"
)

// patience bounds what should happen soon.
const patience = time.Minute

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// network is a way from dialing ends to a listener on the subject "service".
type network struct {
	client   *stream.Client
	listener *streamnet.Listener
	strike   func() // makes trouble now, while bytes are on their way; it may be called by any goroutine
}

// dial has the form that net/http and others want. It waits for the subscription of the listener, and for NATS after a
// restart.
func (n network) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	return streamnet.Dial(ctx, n.client, n.listener.Addr().String(), stream.WithRetry(stream.Retry{Attempts: 100}))
}

// onNetworks runs f on a sound network, on one that loses and reorders packets, and on one whose NATS server is killed
// and started again when f calls strike.
func onNetworks(t *testing.T, f func(t *testing.T, n network)) {
	t.Run("network=sound", func(t *testing.T) {
		t.Parallel()
		f(t, newNetwork(t, streamtest.Run(t).URL(), func() {}))
	})
	t.Run("network=lossy", func(t *testing.T) {
		t.Parallel()
		rng := rand.New(rand.NewPCG(1, 2))
		i := streamtest.RunInterceptor(t, streamtest.Run(t).URL(),
			streamtest.Only(streamtest.HasPrefix(0xF5), streamtest.Drop(0.01, rng), streamtest.Reorder(0.01, 3, rng)))
		f(t, newNetwork(t, i.URL(), func() {}))
	})
	t.Run("network=killed", func(t *testing.T) {
		t.Parallel()
		p := streamtest.RunProcess(t)
		f(t, newNetwork(t, p.URL(), func() {
			p.Kill()
			if err := p.Restart(); err != nil {
				t.Error(err)
			}
		}))
	})
}

func newNetwork(t *testing.T, url string, strike func()) network {
	t.Helper()
	connect := func() *nats.Conn {
		nc, err := nats.Connect(url, nats.IgnoreDiscoveredServers(), nats.ReconnectWait(10*time.Millisecond), nats.MaxReconnects(-1),
			nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})) // a killed server is no news
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	server, err := stream.NewServer(stream.ServerParams{Conn: connect()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	client, err := stream.NewClient(stream.ClientParams{Conn: connect()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	l, err := streamnet.Listen(server, "service")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return network{client, l, strike}
}

// limited returns a context for a call that should end soon.
func limited(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// scaled returns n, and fewer in a short run.
func scaled(n, short int) int {
	if testing.Short() {
		return short
	}
	return n
}
