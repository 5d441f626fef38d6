package streamtest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// childEnv in the environment makes a test binary run as a server instead of its tests.
const childEnv = "STREAMTEST_SERVER"

// A Process runs the test's own binary again, because that binary has the server linked and nothing has to be
// installed. The binary must become a server before its main runs, or it would run the tests. So this is an init
// function, and test packages need no TestMain. Packages that are initialised before this one run their init in the
// child too.
func init() {
	if os.Getenv(childEnv) == "" {
		return
	}
	if err := serveChild(); err != nil {
		report{Error: err.Error()}.send()
		os.Exit(1)
	}
	os.Exit(0)
}

// order is the first line that the child reads from its standard input.
type order struct {
	Steps []step
	Port  int  // where to listen
	Fixed bool // Port overrides Steps
}

// A report is a line that the child writes to its standard output, after reportMark. The child reports an error before
// it ends, the port when it accepts connections, and then an answer to each line of its input.
type report struct {
	Error   string
	Port    int
	Seq     int
	Remotes int   // other nodes that are connected
	Routes  int   // connections to them
	Pool    int   // connections that there should be to each
	Slow    int64 // connections cut off because they did not read
}

// reportMark distinguishes reports from output of the init functions of other packages.
const reportMark = "streamtest-report "

func (r report) send() {
	b, _ := json.Marshal(r) // cannot fail: numbers and a string
	fmt.Printf("%s%s\n", reportMark, b)
}

// serveChild runs the server in this process until a signal or the end of standard input ends it.
func serveChild() error {
	in := bufio.NewReader(os.Stdin)
	line, err := in.ReadBytes('\n')
	if err != nil {
		return err
	}
	var ord order
	if err := json.Unmarshal(line, &ord); err != nil {
		return err
	}
	o := defaults()
	o.NoSigs = false
	o.LameDuckDuration, o.LameDuckGracePeriod = lameDuckDuration, lameDuckGrace
	for _, s := range ord.Steps {
		if err := s.do(o); err != nil {
			return err
		}
	}
	if ord.Fixed || o.Port == server.RANDOM_PORT {
		o.Port = ord.Port
	}
	srv, err := server.NewServer(o)
	if err != nil {
		return err
	}
	srv.SetLoggerV2(fatalLogger{}, false, false, false)
	srv.Start()
	if !srv.ReadyForConnections(readyTimeout) {
		return errNotReady
	}
	report{Port: srv.Addr().(*net.TCPAddr).Port}.send()
	go func() {
		for {
			var seq int
			line, err := in.ReadBytes('\n')
			if err != nil || json.Unmarshal(line, &seq) != nil {
				os.Exit(1) // the parent is gone
			}
			report{
				Seq:     seq,
				Remotes: srv.NumRemotes(),
				Routes:  srv.NumRoutes(),
				Pool:    max(1, o.Cluster.PoolSize+len(o.Cluster.PinnedAccounts)),
				Slow:    srv.NumSlowConsumers(),
			}.send()
		}
	}()
	srv.WaitForShutdown()
	return nil
}

var errNotReady = errors.New("the server does not accept connections")

// Times of a Process in lame duck mode, which takes two minutes in production.
const (
	lameDuckDuration = time.Second
	lameDuckGrace    = 100 * time.Millisecond
)

// fatalLogger receives the error that ends a server, most likely that its port is taken. Without it, the parent would
// wait for the server in vain.
type fatalLogger struct{}

func (fatalLogger) Fatalf(format string, args ...any) {
	report{Error: fmt.Sprintf(format, args...)}.send()
	os.Exit(1)
}
func (fatalLogger) Noticef(string, ...any) {}
func (fatalLogger) Warnf(string, ...any)   {}
func (fatalLogger) Errorf(string, ...any)  {}
func (fatalLogger) Debugf(string, ...any)  {}
func (fatalLogger) Tracef(string, ...any)  {}
