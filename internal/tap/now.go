package tap

import (
	"net"
	"sync/atomic"
	"syscall"
)

// now writes to a connection without waiting. Its user holds outgoing.mu, except for possible.
type now struct {
	raw syscall.RawConn // nil if the connection cannot do this
	off atomic.Bool     // nothing can be written any more

	// The arguments and the result of one write. A closure would allocate.
	data    []byte
	written int
	call    func(fd uintptr) bool
}

// init prepares writes to conn. Only a connection of the kernel itself is written to: another type may do more in its
// Write than the kernel does, as TLS does.
func (w *now) init(conn net.Conn) {
	if !mayWriteNow {
		return
	}
	var c syscall.Conn
	switch conn := conn.(type) {
	case *net.TCPConn:
		c = conn
	case *net.UnixConn:
		c = conn
	default:
		return
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return
	}
	w.raw, w.call = raw, w.once
}

// possible reports whether write can write at all.
func (w *now) possible() bool { return w.raw != nil && !w.off.Load() }

// write writes as much of data as the kernel takes at once, and returns how many bytes that was. An error counts as no
// bytes. The next ordinary write gets it too, or moves the deadline that has passed.
func (w *now) write(data []byte) int {
	w.data, w.written = data, 0
	if w.raw.Write(w.call) != nil {
		w.written = 0
	}
	w.data = nil
	return w.written
}

// once is the call that RawConn.Write makes. Its result ends RawConn.Write, which would wait otherwise.
func (w *now) once(fd uintptr) bool {
	w.written = max(0, writeNow(fd, w.data))
	return true
}
