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

// Direction is that of bytes or messages between a client and its server.
type Direction int

// The directions. Both stands for each of them.
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

// includes reports whether d is one, which is not Both, or Both.
func (d Direction) includes(one Direction) bool { return d == one || d == Both }

// A relay accepts connections and makes one to its target for each. serve moves the bytes.
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

// A link is a connection of a client and that to the server made for it.
type link struct {
	id             uint64
	client, server *net.TCPConn
	done           chan struct{} // closed when the link shall end
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
			time.Sleep(time.Millisecond) // out of file descriptors, perhaps not for long
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
			r.links = append(r.links[:i:i], r.links[i+1:]...) // all may be iterating over the old ones
			break
		}
	}
}

// all returns the links that there are.
func (r *relay) all() []*link {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.links[:len(r.links):len(r.links)]
}

// Addr returns where clients connect to, as host:port.
func (r *relay) Addr() string { return r.ln.Addr().String() }

// URL returns where clients connect to, for nats.Connect.
func (r *relay) URL() string { return "nats://" + r.Addr() }

// Close resets all connections, accepts no more, and returns when everything ended. It may be called again.
func (r *relay) Close() {
	_ = r.ln.Close()
	r.cancel()
	r.wg.Wait()
}

// ends returns where the bytes of a direction come from and where they go.
func (l *link) ends(dir Direction) (src, dst *net.TCPConn) {
	if dir == ToServer {
		return l.client, l.server
	}
	return l.server, l.client
}

// ending reports whether the link shall end.
func (l *link) ending() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

// stop ends the link. Bytes that it has not written yet are lost.
func (l *link) stop() { l.once.Do(func() { close(l.done) }) }

func (l *link) reset() {
	l.stop()
	reset(l.client)
	reset(l.server)
}

// linger is how long an orderly end waits for the peer's.
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
