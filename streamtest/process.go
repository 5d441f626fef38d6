package streamtest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// Process is a NATS server in a process of its own. It can be killed, stopped, paused, and started again at the same
// address. In all other respects it is like a [Server]. It needs no binary except the test's own, and does not outlive
// the test. Its methods may be called concurrently. Methods that change its state wait for each other.
type Process struct {
	port int

	mu    sync.Mutex
	opts  *server.Options // the result of steps in this process; the child computes the rest
	steps []step
	child *child // the last one started
}

// StartProcess starts a server and returns when it accepts connections. The caller ends it with [Process.Kill] or
// [Process.Stop].
//
// An option may set values that can be sent to another process, such as numbers, texts and users. It may set neither a
// *tls.Config nor an interface: use [WithConfig] for these. Options are called in this process.
func StartProcess(opts ...Option) (*Process, error) {
	o := defaults()
	steps, err := record(o, opts)
	if err != nil {
		return nil, err
	}
	// Another program may take the port between its choice and its use.
	for try := 0; ; try++ {
		port, err := freePort()
		if err != nil {
			return nil, err
		}
		c, port, err := startChild(order{Steps: steps, Port: port})
		if err == nil {
			return &Process{port: port, opts: o, steps: steps, child: c}, nil
		}
		if try == 2 || !strings.Contains(err.Error(), "address already in use") {
			return nil, err
		}
	}
}

// RunProcess starts a server that is killed at the end of the test. If it cannot start, the test fails at once.
func RunProcess(tb testing.TB, opts ...Option) *Process {
	tb.Helper()
	p, err := StartProcess(opts...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(p.Kill)
	return p
}

// URL returns the address for [nats.Connect]. It remains the same over restarts.
func (p *Process) URL() string {
	return fmt.Sprintf("nats://127.0.0.1:%d", p.port)
}

// Dial returns a new connection to the server, as [Server.Dial] does. The caller closes it.
func (p *Process) Dial(opts ...nats.Option) (*nats.Conn, error) {
	return dial(p.URL(), opts)
}

// Connect is [Process.Dial] for a test: the connection is closed at its end; see [Server.Connect].
func (p *Process) Connect(tb testing.TB, opts ...nats.Option) *nats.Conn {
	tb.Helper()
	return connect(tb, p.URL(), opts)
}

// Kill ends the server as a crash does, without notice to clients, and returns when the server has ended. It does
// nothing if the server has ended before.
func (p *Process) Kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.child.kill()
}

// Stop shuts the server down and returns when it has ended. It resumes a paused server first, and kills a server that
// does not end within ten seconds. It does nothing if the server has ended before.
func (p *Process) Stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.child.stop()
}

// LameDuck starts the lame duck mode of the server: it announces its end to clients, refuses new connections, closes
// the present ones after 100 ms, spread over a second, and ends. LameDuck returns at once; [Process.Wait] returns when
// the server has ended. It returns an error if no server runs, and errors.ErrUnsupported on systems without such
// signals.
func (p *Process) LameDuck() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.child.lameDuck()
}

// Pause stops the server from running until [Process.Resume]. Its connections stay open and nothing is read from them.
// On Linux nothing runs when Pause returns, and elsewhere very soon after. Errors are those of LameDuck.
func (p *Process) Pause() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.child.pause()
}

// Resume ends a [Process.Pause]. Errors are those of LameDuck.
func (p *Process) Resume() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.child.resume()
}

// Wait returns when the server that runs at the time of the call has ended.
func (p *Process) Wait() {
	p.mu.Lock()
	c := p.child
	p.mu.Unlock()
	<-c.done
}

// Restart starts the server again at the same address and returns when it accepts connections. It applies opts after
// the earlier options. It stops a running server first. After an error no server runs, and Restart can be tried again.
func (p *Process) Restart(opts ...Option) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	o := *p.opts
	steps, err := record(&o, opts)
	if err != nil {
		return err
	}
	steps = append(p.steps[:len(p.steps):len(p.steps)], steps...)
	p.child.stop()
	c, _, err := startChild(order{Steps: steps, Port: p.port, Fixed: true})
	if err != nil {
		return err
	}
	p.opts, p.steps, p.child = &o, steps, c
	return nil
}

// SlowConsumers returns how many connections the server has closed since its last start because they did not read fast
// enough. It returns an error if the server does not answer within a second.
func (p *Process) SlowConsumers() (int64, error) {
	r, err := p.ask()
	return r.Slow, err
}

func (p *Process) running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.child.done:
		return false
	default:
		return true
	}
}

func (p *Process) ask() (report, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.child.ask()
}

// freePort returns a free port of 127.0.0.1. It is below the ports that systems give to outgoing connections. Otherwise
// such a connection could take it while the server is down.
func freePort() (int, error) {
	var err error
	for range 100 {
		port := 20000 + rand.IntN(12000)
		var ln net.Listener
		if ln, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			return port, ln.Close()
		}
	}
	return 0, fmt.Errorf("streamtest: %w", err)
}
