package streamtest

import (
	"bytes"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"
)

// Proxy is a TCP proxy that imitates the faults of networks. It does not parse the bytes. By default it passes all
// bytes at once. A setting holds for all present and later connections. Its methods may be called concurrently.
//
// Give clients the option nats.IgnoreDiscoveredServers. Otherwise a server that announces its own address leads them
// around the proxy.
type Proxy struct {
	relay
	faults atomic.Pointer[faults]
}

// faults states how a Proxy treats the bytes of each direction. It is never changed, only replaced.
type faults struct {
	hole    [2]bool
	delay   [2]time.Duration
	rate    [2]int
	changed chan struct{} // closed when this has been replaced
}

// StartProxy starts a proxy to target, which is host:port or a NATS URL. It listens on a free port of 127.0.0.1. The
// caller ends it with Close. It is no error if nothing listens at target: connections are reset then.
func StartProxy(target string) (*Proxy, error) {
	p := &Proxy{}
	p.faults.Store(&faults{changed: make(chan struct{})})
	if err := p.start(target, p.pump); err != nil {
		return nil, err
	}
	return p, nil
}

// RunProxy starts a proxy that ends with the test. If it cannot start, the test fails at once.
func RunProxy(tb testing.TB, target string) *Proxy {
	tb.Helper()
	p, err := StartProxy(target)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(p.Close)
	return p
}

// Cut closes all connections in the orderly way. The proxy drops the bytes that it holds. New connections can be made
// at once.
func (p *Proxy) Cut() {
	for _, l := range p.all() {
		l.cut()
	}
}

// Reset closes all connections with a TCP reset. The proxy drops the bytes that it holds. New connections can be made
// at once.
func (p *Proxy) Reset() {
	for _, l := range p.all() {
		l.reset()
	}
}

// Refuse sets whether new connections are reset as soon as they are made. Existing connections remain.
func (p *Proxy) Refuse(refuse bool) { p.refuse.Store(refuse) }

// BlackHole stops the given direction until [Proxy.Heal]. Connections remain open, and new ones can be made. Sent bytes
// are held until the system's buffers are full. Then the sender's writes block. Neither bytes nor the end of a
// connection get through.
func (p *Proxy) BlackHole(dir Direction) {
	p.change(dir, func(f *faults, d Direction) { f.hole[d] = true })
}

// Heal ends [Proxy.BlackHole] in both directions. The held bytes arrive if their connection still lives.
func (p *Proxy) Heal() {
	p.change(Both, func(f *faults, d Direction) { f.hole[d] = false })
}

// Delay makes every byte of the given direction arrive d later. It does not limit throughput up to about 32 MiB on the
// way. Zero, the default, is no delay. The new delay also holds for bytes on the way, which stay in order.
func (p *Proxy) Delay(dir Direction, d time.Duration) {
	p.change(dir, func(f *faults, dir Direction) { f.delay[dir] = d })
}

// Throttle lets at most bytesPerSecond of each connection through in the given direction. Zero, the default, or less is
// no limit.
func (p *Proxy) Throttle(dir Direction, bytesPerSecond int) {
	p.change(dir, func(f *faults, d Direction) { f.rate[d] = max(0, bytesPerSecond) })
}

// change replaces the faults and wakes all goroutines that wait because of the old ones.
func (p *Proxy) change(dir Direction, set func(*faults, Direction)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	old := p.faults.Load()
	f := *old
	f.changed = make(chan struct{})
	for _, d := range []Direction{ToServer, ToClient} {
		if dir.includes(d) {
			set(&f, d)
		}
	}
	p.faults.Store(&f)
	close(old.changed)
}

// A chunk is bytes on the way. The last chunk has the error that ended them.
type chunk struct {
	b   []byte
	at  time.Time // of reading
	err error
}

// Reading and writing have goroutines of their own, because a delay must not keep the next bytes from being read.
const (
	chunkSize = 32 << 10
	maxChunks = 1024 // many small chunks fill the queue early; later ones are larger, because their bytes are read together
)

// slack is the unused time that a throttle makes up for. It covers timers that are late, but not an idle connection.
const slack = 100 * time.Millisecond

// pump moves the bytes of a link until it ends.
func (p *Proxy) pump(l *link) {
	ended := make(chan struct{}, 4)
	for _, dir := range []Direction{ToServer, ToClient} {
		q := make(chan chunk, maxChunks)
		go func() { p.read(l, dir, q); ended <- struct{}{} }()
		go func() { p.write(l, dir, q); ended <- struct{}{} }()
	}
	for range 4 {
		<-ended
	}
}

func (p *Proxy) read(l *link, dir Direction, q chan<- chunk) {
	src, _ := l.ends(dir)
	for buf := make([]byte, chunkSize); ; {
		if !p.pass(l, dir, time.Time{}) { // bytes that are not read make the sender's writes block
			drain(src)
			return
		}
		n, err := src.Read(buf)
		at := time.Now()
		for _, c := range []chunk{{b: bytes.Clone(buf[:n]), at: at}, {at: at, err: err}} {
			if len(c.b) == 0 && c.err == nil {
				continue
			}
			select {
			case q <- c:
			case <-l.done:
			}
		}
		if err != nil {
			return
		}
	}
}

// drain reads until the sender ends as well, so that the end is orderly.
func drain(src *net.TCPConn) { _, _ = io.Copy(io.Discard, src) }

func (p *Proxy) write(l *link, dir Direction, q <-chan chunk) {
	_, dst := l.ends(dir)
	var free time.Time // when the throttle lets the next bytes through
	for {
		var c chunk
		select {
		case c = <-q:
		case <-l.done:
			return
		}
		if !p.pass(l, dir, c.at) {
			return
		}
		if c.err != nil {
			l.end(c.err, dst)
			return
		}
		for len(c.b) > 0 {
			n := len(c.b)
			if rate := p.faults.Load().rate[dir]; rate > 0 {
				n = min(n, max(1, rate/100)) // a hundred steps a second look like a slow line
				if now := time.Now(); free.Before(now.Add(-slack)) {
					free = now
				}
				free = free.Add(time.Duration(float64(n) / float64(rate) * float64(time.Second)))
				if !p.wait(l, dir, free) || !p.pass(l, dir, c.at) {
					return
				}
			}
			if _, err := dst.Write(c.b[:n]); err != nil {
				if !l.ending() {
					l.reset()
				}
				return
			}
			c.b = c.b[n:]
		}
	}
}

// pass waits until bytes that were read at the given time may pass. It returns false if the link ends before. The zero
// time stands for bytes that were not read yet.
func (p *Proxy) pass(l *link, dir Direction, at time.Time) bool {
	for {
		f := p.faults.Load()
		var due <-chan time.Time
		if !f.hole[dir] {
			left := time.Until(at.Add(f.delay[dir]))
			if left <= 0 || at.IsZero() {
				return !l.ending()
			}
			due = time.After(left)
		}
		select {
		case <-due:
		case <-f.changed:
		case <-l.done:
			return false
		}
	}
}

// wait waits until t, or until the limit from which t was computed changes. It returns false if the link ends before.
func (p *Proxy) wait(l *link, dir Direction, t time.Time) bool {
	f := p.faults.Load()
	for rate := f.rate[dir]; f.rate[dir] == rate; f = p.faults.Load() {
		select {
		case <-time.After(time.Until(t)):
			return true
		case <-f.changed:
		case <-l.done:
			return false
		}
	}
	return true
}
