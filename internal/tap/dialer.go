// Package tap is the fast connection: a net.Conn between nats.go and the network that takes the messages of some
// subscriptions before nats.go reads them. The goroutine that reads the connection hands them over, in buffers that are
// used again. All other bytes pass through, in both directions.
//
// Package fastconn offers it to users, and package natsconn registers the inboxes of endpoints.
package tap

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// Dialer makes the tapped connections of a connection of nats.go, one after the other. Connections of nats.go that are
// made with the same options share it. It resolves the names of servers and does TLS in the place of nats.go, which
// would otherwise encrypt the bytes that Conn has to parse. nats.go runs Dial, in the goroutine that connects or
// reconnects.
type Dialer struct {
	opts   *nats.Options // those that nats.Connect gets; read when a connection is made
	under  nats.CustomDialer
	lookup bool // nats.go would have looked up the names of servers

	mu      sync.Mutex // guards the fields below
	users   map[*nats.Conn]*user
	inboxes map[string]*Sub // by subject
	tlsName string          // the last name of a server to which TLS was made, for servers that are known by address only
}

// Use makes o dial through a new Dialer, over the dialer that o has now. Later changes of other options count.
func Use(o *nats.Options) error {
	if d, ok := o.CustomDialer.(*Dialer); ok && d.opts == o {
		return nil
	}
	d := &Dialer{opts: o, under: o.CustomDialer, lookup: !o.SkipHostLookup}
	o.CustomDialer, o.SkipHostLookup = d, true
	return nil
}

// Of returns the Dialer of a connection, nil if it has none or cannot use it.
func Of(nc *nats.Conn) *Dialer {
	d, _ := nc.Opts.CustomDialer.(*Dialer)
	return d
}

// SkipTLSHandshake tells nats.go that Dial makes TLS. With WebSocket, nats.go does it.
func (d *Dialer) SkipTLSHandshake() bool { return !d.webSocket() }

// urls returns the addresses that were given to nats.Connect.
func (d *Dialer) urls() []string {
	urls := d.opts.Servers
	if d.opts.Url != "" {
		urls = append([]string{d.opts.Url}, urls...)
	}
	return urls
}

func (d *Dialer) hasScheme(schemes ...string) bool {
	for _, u := range d.urls() {
		for _, s := range schemes {
			if strings.HasPrefix(strings.ToLower(strings.TrimSpace(u)), s+"://") {
				return true
			}
		}
	}
	return false
}

// webSocket reports whether the connection speaks WebSocket. nats.go does not mix it with other connections.
func (d *Dialer) webSocket() bool { return d.hasScheme("ws", "wss") }

// Dial connects to a server.
func (d *Dialer) Dial(network, address string) (net.Conn, error) {
	hosts := d.hosts(address)
	raw, err := d.dial(network, hosts)
	if err != nil || d.webSocket() {
		return raw, err
	}
	c, err := d.tap(raw, address)
	if err != nil {
		_ = raw.Close()
		return nil, err
	}
	return c, nil
}

// hosts returns the addresses to try for a server.
func (d *Dialer) hosts(address string) []string {
	host, port, err := net.SplitHostPort(address)
	if err != nil || !d.lookup || net.ParseIP(host) != nil {
		return []string{address}
	}
	found, _ := net.LookupHost(host)
	if len(found) == 0 {
		return []string{address}
	}
	var hosts []string
	for _, h := range found {
		hosts = append(hosts, net.JoinHostPort(h, port))
	}
	if !d.opts.NoRandomize {
		rand.Shuffle(len(hosts), func(i, j int) { hosts[i], hosts[j] = hosts[j], hosts[i] })
	}
	return hosts
}

// dial makes the connection below, by the user's dialer if there is one.
func (d *Dialer) dial(network string, hosts []string) (raw net.Conn, err error) {
	under := d.under
	if under == nil {
		dialer := net.Dialer{Timeout: d.opts.Timeout}
		if d.opts.Dialer != nil {
			dialer = *d.opts.Dialer
		}
		dialer.Timeout /= time.Duration(len(hosts))
		if allowed := multipathTCP(d.opts); allowed != nil {
			dialer.SetMultipathTCP(*allowed)
		}
		under = &dialer
	}
	for _, host := range hosts {
		if raw, err = under.Dial(network, host); err == nil {
			return raw, nil
		}
	}
	return nil, err
}

// multipathTCP returns the option AllowMultipathTCP, which nats.go has since version 1.54. The package builds with
// older versions, too.
func multipathTCP(o *nats.Options) *bool {
	option := reflect.ValueOf(o).Elem().FieldByName("AllowMultipathTCP")
	if !option.IsValid() {
		return nil
	}
	allowed, _ := option.Interface().(*bool)
	return allowed
}

// tap makes TLS over raw if the server or the user requires it, and returns the tapped connection.
func (d *Dialer) tap(raw net.Conn, address string) (net.Conn, error) {
	if under, ok := d.under.(interface{ SkipTLSHandshake() bool }); ok && under.SkipTLSHandshake() {
		return newConn(d, raw, nil), nil // raw is secure already, or is meant to stay as it is
	}
	if d.opts.Timeout > 0 {
		if err := raw.SetDeadline(time.Now().Add(d.opts.Timeout)); err != nil {
			return nil, err
		}
	}
	var info []byte
	secure := d.secure()
	if !secure || !d.opts.TLSHandshakeFirst {
		var err error
		if info, err = readInfo(raw); err != nil {
			return nil, err
		}
		secure = requiresTLS(info, secure)
	}
	if secure {
		conn, err := d.handshake(raw, address)
		if err != nil {
			return nil, err
		}
		raw = conn
	}
	if err := raw.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	return newConn(d, raw, info), nil
}

// secure reports whether the user wants TLS.
func (d *Dialer) secure() bool { return d.opts.Secure || d.hasScheme("tls") }

// maxInfo bounds the first line of a server.
const maxInfo = 1 << 20

// readInfo reads the first line of a server, and perhaps more.
func readInfo(raw net.Conn) ([]byte, error) {
	info := make([]byte, 0, 4<<10)
	for {
		n, err := raw.Read(info[len(info):cap(info)])
		info = info[:len(info)+n]
		switch {
		case bytes.IndexByte(info, '\n') >= 0:
			return info, nil
		case err != nil:
			return nil, err
		case len(info) > maxInfo:
			return nil, errors.New("fastconn: the first line of the server does not end: connect to a NATS server")
		case len(info) == cap(info):
			info = append(info, 0)[:len(info)]
		}
	}
}

// requiresTLS reports whether nats.go goes on with TLS after the first line of the server. Any other line than INFO,
// and a server without the TLS that the user wants, is left to nats.go, which reports the error.
func requiresTLS(info []byte, wanted bool) bool {
	line, _, _ := bytes.Cut(info, []byte{'\n'})
	args, ok := bytes.CutPrefix(line, []byte("INFO "))
	var server struct {
		Required  bool `json:"tls_required"`
		Available bool `json:"tls_available"`
	}
	if !ok || json.Unmarshal(args, &server) != nil {
		return false
	}
	return server.Required || wanted && server.Available
}

// handshake makes TLS as nats.go does.
func (d *Dialer) handshake(raw net.Conn, address string) (net.Conn, error) {
	config := &tls.Config{}
	switch {
	case d.opts.TLSConfig != nil:
		config = d.opts.TLSConfig.Clone()
	case d.hasScheme("tls"):
		config.MinVersion = tls.VersionTLS12
	}
	if d.opts.TLSCertCB != nil {
		cert, err := d.opts.TLSCertCB()
		if err != nil {
			return nil, err
		}
		config.Certificates = []tls.Certificate{cert}
	}
	if d.opts.RootCAsCB != nil {
		roots, err := d.opts.RootCAsCB()
		if err != nil {
			return nil, err
		}
		config.RootCAs = roots
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = address
	}
	if config.ServerName == "" {
		config.ServerName = d.serverName(host)
	}
	conn := tls.Client(raw, config)
	if err := conn.Handshake(); err != nil {
		return nil, fmt.Errorf("%w: %w", nats.ErrTLS, err)
	}
	if net.ParseIP(host) == nil {
		d.mu.Lock()
		d.tlsName = host
		d.mu.Unlock()
	}
	return conn, nil
}

// serverName returns the name that the certificate of a server must have. The servers of a cluster name each other by
// address only: they have the name of the server that the connection had before.
func (d *Dialer) serverName(host string) string {
	if net.ParseIP(host) == nil {
		return host
	}
	for _, u := range d.urls() {
		if !strings.Contains(u, "://") {
			u = "nats://" + u
		}
		if parsed, err := url.Parse(strings.TrimSpace(u)); err == nil && parsed.Hostname() == host {
			return host
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.tlsName != "" {
		return d.tlsName
	}
	return host
}
