package streamtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Direction is a direction of bytes or messages between a client and its server.
type Direction int

// The directions. Both stands for the two others.
const (
	ToServer Direction = iota
	ToClient
	Both
)

// String returns the name of the constant.
func (d Direction) String() string {
	if d < ToServer || d > Both {
		return fmt.Sprintf("Direction(%d)", int(d))
	}
	return [...]string{"ToServer", "ToClient", "Both"}[d]
}

// includes reports whether d is one or Both. one is not Both.
func (d Direction) includes(one Direction) bool { return d == one || d == Both }

// A relay accepts connections, and makes a connection to its target for each. serve moves the bytes.
type relay struct {
	ln     net.Listener
	target string
	serve  func(*link)
	refuse atomic.Bool
	ctx    context.Context // done when the relay is closed
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu    sync.Mutex
	links []*link // in the order of their acceptance
	last  uint64  // id
}

// A link is a connection of a client together with the connection to the server that was made for it.
type link struct {
	id             uint64
	client, server *net.TCPConn
	done           chan struct{} // closed when the link has to end
	once           sync.Once
}

func (r *relay) start(target string, serve func(*link)) error {
	if _, after, ok := strings.Cut(target, "://"); ok {
		target = after
	}
	if _, _, err := net.SplitHostPort(target); err != nil {
		return fmt.Errorf("streamtest: %w", err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("streamtest: %w", err)
	}
	r.ln, r.target, r.serve = ln, target, serve
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.wg.Go(r.accept)
	return nil
}

func (r *relay) accept() {
	for {
		conn, err := r.ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil {
			time.Sleep(time.Millisecond) // most likely there are no free file descriptors: try again
			continue
		}
		client := conn.(*net.TCPConn)
		if r.refuse.Load() {
			reset(client)
			continue
		}
		r.wg.Go(func() { r.join(client) })
	}
}

// join makes the connection to the target, and keeps the link until it ends.
func (r *relay) join(client *net.TCPConn) {
	dialer := net.Dialer{Timeout: 5 * time.Second}
	conn, err := dialer.DialContext(r.ctx, "tcp", r.target)
	if err != nil {
		reset(client)
		return
	}
	l := &link{client: client, server: conn.(*net.TCPConn), done: make(chan struct{})}
	r.mu.Lock()
	r.last++
	l.id = r.last
	r.links = append(r.links, l)
	r.mu.Unlock()
	stop := context.AfterFunc(r.ctx, l.reset)
	r.serve(l)
	stop()
	_ = l.client.Close()
	_ = l.server.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range r.links {
		if r.links[i] == l {
			r.links = append(r.links[:i:i], r.links[i+1:]...) // a copy: callers of all may iterate over the old slice
			break
		}
	}
}

// all returns the present links.
func (r *relay) all() []*link {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.links[:len(r.links):len(r.links)]
}

// Addr returns the address for clients, as host:port.
func (r *relay) Addr() string { return r.ln.Addr().String() }

// URL returns the address for clients, for nats.Connect.
func (r *relay) URL() string { return "nats://" + r.Addr() }

// Close resets all connections, accepts no more, and returns when all goroutines have ended. A second call does
// nothing.
func (r *relay) Close() {
	_ = r.ln.Close()
	r.cancel()
	r.wg.Wait()
}

// ends returns the source and the destination of the bytes of a direction.
func (l *link) ends(dir Direction) (src, dst *net.TCPConn) {
	if dir == ToServer {
		return l.client, l.server
	}
	return l.server, l.client
}

// ending reports whether the link has to end.
func (l *link) ending() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

// stop ends the link. It drops bytes that it has not written yet.
func (l *link) stop() { l.once.Do(func() { close(l.done) }) }

func (l *link) reset() {
	l.stop()
	reset(l.client)
	reset(l.server)
}

// linger is how long an orderly end waits for that of the peer.
const linger = 100 * time.Millisecond

// cut ends both connections as their ends would.
func (l *link) cut() {
	l.stop()
	now := time.Now()
	for _, c := range []*net.TCPConn{l.client, l.server} {
		_ = c.SetWriteDeadline(now) // a write that hangs would hold the link
		_ = c.CloseWrite()
		_ = c.SetReadDeadline(now.Add(linger)) // read until the peer closes: TCP resets a connection that is closed with unread bytes
	}
}

// end ends dst in the way in which src ended: in order, or by a reset.
func (l *link) end(err error, dst *net.TCPConn) {
	if errors.Is(err, io.EOF) {
		_ = dst.CloseWrite()
	} else {
		l.reset()
	}
}

// reset closes c with a reset instead of the orderly end.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}
