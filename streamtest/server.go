package streamtest

import (
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/fastconn"
)

// readyTimeout is how long Start waits for the server to accept connections. A start takes milliseconds; the limit is
// for an overloaded machine.
const readyTimeout = 10 * time.Second

// An Option changes a server before it starts, in this process or in one of its own.
type Option func(*server.Options)

// WithMaxPayload sets the largest message in bytes that the server accepts. The default is 1 MiB, that of NATS.
func WithMaxPayload(bytes int32) Option {
	return func(o *server.Options) { o.MaxPayload = bytes }
}

// WithOptions lets tweak change any option of the server, after this package has set its defaults. [Start] and [Run]
// apply their options in order.
func WithOptions(tweak func(*server.Options)) Option {
	return tweak
}

// Server is a NATS server in this process. It listens on a free TCP port of 127.0.0.1, has JetStream off, logs nothing
// and leaves the signals of the process alone. Its methods may be called concurrently.
type Server struct {
	raw *server.Server
}

// Start starts a server and returns when it accepts connections. The caller ends it with [Server.Shutdown].
func Start(opts ...Option) (*Server, error) {
	o := defaults()
	if err := apply(o, opts); err != nil {
		return nil, fmt.Errorf("streamtest: %w", err)
	}
	raw, err := server.NewServer(o)
	if err != nil {
		return nil, fmt.Errorf("streamtest: %w", err)
	}
	raw.Start()
	s := &Server{raw: raw}
	if !raw.ReadyForConnections(readyTimeout) {
		s.Shutdown()
		return nil, fmt.Errorf("streamtest: %w", errNotReady)
	}
	return s, nil
}

// Run starts a server that ends with the test. If it cannot start, the test fails at once.
func Run(tb testing.TB, opts ...Option) *Server {
	tb.Helper()
	s, err := Start(opts...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(s.Shutdown)
	return s
}

// URL returns the address for [nats.Connect].
func (s *Server) URL() string {
	return s.raw.ClientURL()
}

// Dial returns a new connection to the server. The connection tries to reconnect every 50 ms, without end, because
// NATS's default of two seconds is long for tests. The given options override this. The caller closes the connection.
func (s *Server) Dial(opts ...nats.Option) (*nats.Conn, error) {
	return dial(s.URL(), opts)
}

// connections is the environment variable that selects the kind of connections. If it is fast, all have the option of
// package fastconn, so that tests can run over both kinds.
const connections = "STREAMTEST_CONNECTIONS"

func dial(urls string, opts []nats.Option) (*nats.Conn, error) {
	defaults := []nats.Option{nats.MaxReconnects(-1), nats.ReconnectWait(50 * time.Millisecond)}
	opts = append(defaults, opts...)
	if os.Getenv(connections) == "fast" {
		opts = append(opts, fastconn.Enable())
	}
	nc, err := nats.Connect(urls, opts...)
	if err != nil {
		return nil, fmt.Errorf("streamtest: %w", err)
	}
	return nc, nil
}

// Connect is [Server.Dial] for a test: the connection is closed at its end, before a server of [Run] ends. If it cannot
// be made, the test fails at once.
func (s *Server) Connect(tb testing.TB, opts ...nats.Option) *nats.Conn {
	tb.Helper()
	return connect(tb, s.URL(), opts)
}

func connect(tb testing.TB, urls string, opts []nats.Option) *nats.Conn {
	tb.Helper()
	nc, err := dial(urls, opts)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(nc.Close)
	return nc
}

// SlowConsumers returns how many connections the server has closed because they did not read fast enough.
func (s *Server) SlowConsumers() int64 {
	return s.raw.NumSlowConsumers()
}

// Raw returns the embedded server, for calls that this package does not wrap.
func (s *Server) Raw() *server.Server {
	return s.raw
}

// Shutdown closes all connections, ends the server and returns when it has ended. A second call does nothing.
func (s *Server) Shutdown() {
	s.raw.Shutdown()
	s.raw.WaitForShutdown()
}
