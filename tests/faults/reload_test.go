package faults

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// reload gives a running server another configuration. Its connections stay up, unless the configuration closes them.
func reload(t *testing.T, srv *streamtest.Server, config string) {
	t.Helper()
	o := new(server.Options)
	if err := o.ProcessConfigString(config); err != nil {
		t.Error(err)
		return
	}
	o.Host, o.Port, o.NoLog, o.NoSigs = "127.0.0.1", srv.Raw().Addr().(*net.TCPAddr).Port, true, true
	if err := srv.Raw().ReloadOptions(o); err != nil {
		t.Error(err)
	}
}

// TestMaxConnectionsReloaded lowers max_connections below the connections that there are, and raises it again. The
// server closes one of them meanwhile. All streams go on.
func TestMaxConnectionsReloaded(t *testing.T) {
	for range runs(2, 20) {
		srv := streamtest.Run(t, streamtest.WithConfig("max_connections: 100"))
		trial{server: srv.URL(), client: srv.URL(), kinds: []string{"down", "up", "echo", "idle"}, calm: true, fault: func(r *rig) {
			r.settle()
			reload(t, srv, "max_connections: 1")
			r.settle()
			reload(t, srv, "max_connections: 100")
		}}.run(t)
	}
}

// ending is a trial in which a reload of the server ends all streams, with an error for which named is true. Another
// reload gives back.
func ending(srv *streamtest.Server, before, reduced string, named func(error) bool, then func(*rig)) trial {
	return trial{server: srv.URL(), client: srv.URL(), kinds: []string{"down", "up", "echo"}, large: true, times: hasty, calm: true,
		ends: 2 * patience, named: named, fault: func(r *rig) {
			r.settle()
			reload(r.t, srv, reduced)
			if !within(patience, func() bool { return r.all(func(f *flow) bool { return f.done.Load() }) }) {
				r.t.Error("streams neither go on nor end")
			}
			reload(r.t, srv, before)
			then(r)
		}}
}

// TestMaxPayloadReloaded lowers max_payload below the size of packets. A reload sends no INFO, so the next large packet
// makes the server close the connection. Here the connection does not come back. All streams end with an error. Ends with
// new connections work.
func TestMaxPayloadReloaded(t *testing.T) {
	for range runs(2, 20) {
		srv := streamtest.Run(t, streamtest.WithConfig("max_payload: 1MB"))
		x := ending(srv, "max_payload: 1MB", "max_payload: 8KB", isCode(stream.CloseAbnormalClosure), func(*rig) {
			if err := newPassing(t, srv.URL(), srv.URL(), large()).run("down", large()); err != nil {
				t.Errorf("after max_payload was raised: %v", err)
			}
		})
		x.under = "before." // the producer still answers if only the consumer lost its connection
		x.sOpts, x.cOpts = []nats.Option{nats.NoReconnect()}, []nats.Option{nats.NoReconnect()}
		x.one(t)
	}
}

// TestMaxPayloadReloadedUnderReconnects is the same with connections that may come back. They do if a write finds that the
// server has closed the connection before its error is read. The library then learns the limit. Each stream goes on in
// smaller packets, or ends with an error: a packet that was sent before may be too large now.
func TestMaxPayloadReloadedUnderReconnects(t *testing.T) {
	for range runs(2, 20) {
		srv := streamtest.Run(t, streamtest.WithConfig("max_payload: 1MB"))
		trial{server: srv.URL(), client: srv.URL(), kinds: []string{"down", "up", "echo"}, large: true, times: hasty, calm: true,
			named: func(err error) bool {
				return isCode(stream.CloseAbnormalClosure, stream.CloseInternalServerErr)(err) || errors.Is(err, nats.ErrMaxPayload)
			},
			fault: func(r *rig) {
				r.settle()
				reload(t, srv, "max_payload: 8KB")
				r.settle()
				reload(t, srv, "max_payload: 1MB")
			}}.run(t)
	}
}

// permitted is a configuration with the permissions of the two ends.
type permitted struct{ producerPub, producerSub, alicePub, aliceSub string }

func (p permitted) config() string {
	return fmt.Sprintf(`authorization { users: [
		{ user: producer, password: %q, permissions: { publish: %q, subscribe: %q } }
		{ user: alice, password: %q, permissions: { publish: %q, subscribe: %q } } ] }`,
		secret("producer"), p.producerPub, p.producerSub, secret("alice"), p.alicePub, p.aliceSub)
}

// refusal reports whether err is an end of which the user learns: a refusal, a close code, or the report that nobody
// listens.
func refusal(err error) bool {
	return isNamed(err) || errors.Is(err, nats.ErrPermissionViolation) || errors.Is(err, nats.ErrMaxSubscriptionsExceeded)
}

// TestPermissionsReloaded takes one permission of one end away while streams run. Each stream ends with an error. After
// the next reload, new streams work on the same connections.
func TestPermissionsReloaded(t *testing.T) {
	all := permitted{">", ">", ">", ">"}.config()
	for name, c := range map[string]struct{ before, reduced string }{
		"publish of the producer":   {all, permitted{"nothing", ">", ">", ">"}.config()},
		"subscribe of the producer": {all, permitted{">", "nothing", ">", ">"}.config()},
		"publish of the consumer":   {all, permitted{">", ">", "nothing", ">"}.config()},
		"subscribe of the consumer": {all, permitted{">", ">", ">", "nothing"}.config()},
	} {
		t.Run(name, func(t *testing.T) {
			for range runs(2, 20) {
				srv := streamtest.Run(t, streamtest.WithConfig(c.before))
				x := ending(srv, c.before, c.reduced, refusal, (*rig).recovers)
				x.sOpts, x.cOpts = as("producer", false), as("alice", false)
				x.one(t)
			}
		})
	}
}

// account is a configuration with one account for all users, and a limit of its subscriptions.
func account(subscriptions int) string {
	return fmt.Sprintf(`accounts { A { users: [ { user: a, password: a } ], limits { max_subscriptions: %d } } }
		no_auth_user: a`, subscriptions)
}

// TestMaxSubscriptionsReloaded lowers max_subscriptions of an account to one. The server closes the connections, and
// refuses subscriptions of the next ones without saying which. A stream ends with an error, or goes on if both ends
// kept their inboxes. After the next reload, new streams work on the same connections.
func TestMaxSubscriptionsReloaded(t *testing.T) {
	for range runs(2, 50) {
		srv := streamtest.Run(t, streamtest.WithConfig(account(100)))
		trial{server: srv.URL(), client: srv.URL(), kinds: []string{"down", "up", "echo"}, times: hasty, calm: true, named: refusal, fault: func(r *rig) {
			r.settle()
			reload(t, srv, account(1))
			r.settle()
			reload(t, srv, account(100))
			r.recovers()
		}}.one(t)
	}
}

// recovers fails the test unless streams work again.
func (r *rig) recovers() {
	if err := error(nil); !within(patience, func() bool { err = r.works(); return err == nil }) {
		r.t.Errorf("after the next reload: %v", err)
	}
}

// works opens a stream, and exchanges a record on it.
func (r *rig) works() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	s, err := r.cl.Open(ctx, r.under+"echo", nil)
	if err != nil {
		return err
	}
	defer s.Close()
	want := strings.Repeat("x", 1000)
	if _, err := s.Write([]byte(want)); err != nil {
		return err
	}
	rec, err := s.Recv()
	if err == nil && string(rec) != want {
		err = errWrong
	}
	return err
}
