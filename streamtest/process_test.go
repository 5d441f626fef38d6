package streamtest_test

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/streamtest"
)

const limit = 10 * time.Second // for what takes milliseconds

// await waits until cond holds.
func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// receive waits for something to arrive at c.
func receive[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(limit):
		t.Fatalf("waited in vain: %s", what)
		panic("unreachable")
	}
}

func TestProcessKillAndRestart(t *testing.T) {
	p := streamtest.RunProcess(t, streamtest.WithMaxPayload(1<<16))
	url := p.URL()
	lost, back := make(chan error, 8), make(chan struct{}, 8)
	nc := p.Connect(t, nats.ReconnectHandler(func(*nats.Conn) { back <- struct{}{} }),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) { lost <- err }))
	if got := nc.MaxPayload(); got != 1<<16 {
		t.Errorf("MaxPayload() = %d, want 64 KiB", got)
	}
	p.Kill()
	p.Kill()
	receive(t, "the disconnect", lost)
	if _, err := p.Dial(); !errors.Is(err, nats.ErrNoServers) {
		t.Errorf("Dial to a server that was killed: %v, want ErrNoServers", err)
	}
	if err := p.Pause(); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("Pause of a server that was killed: %v, want ErrProcessDone", err)
	}
	if err := p.Restart(streamtest.WithMaxPayload(1 << 12)); err != nil {
		t.Fatal(err)
	}
	receive(t, "the reconnect", back)
	if got := nc.MaxPayload(); got != 1<<12 || p.URL() != url {
		t.Errorf("after the restart MaxPayload() = %d at %s, want 4096 at %s", got, p.URL(), url)
	}
	if err := p.Restart(); err != nil { // of one that runs
		t.Fatal(err)
	}
	receive(t, "the second reconnect", back)
	if got := nc.MaxPayload(); got != 1<<12 {
		t.Errorf("the restart forgot its options: MaxPayload() = %d", got)
	}
}

func TestProcessStop(t *testing.T) {
	p := streamtest.RunProcess(t)
	if err := p.Pause(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	p.Stop()
	p.Stop()
	p.Wait()
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("Stop took %v", d)
	}
}

func TestProcessPause(t *testing.T) {
	p := streamtest.RunProcess(t)
	nc := p.Connect(t)
	for range 2 {
		if err := p.Pause(); err != nil {
			t.Fatal(err)
		}
	}
	if err := nc.FlushTimeout(50 * time.Millisecond); !errors.Is(err, nats.ErrTimeout) {
		t.Fatalf("Flush to a paused server: %v, want ErrTimeout", err)
	}
	if _, err := p.SlowConsumers(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("SlowConsumers() of a paused server: %v, want ErrDeadlineExceeded", err)
	}
	if err := p.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := nc.FlushTimeout(limit); err != nil {
		t.Fatal(err)
	}
	if n, err := p.SlowConsumers(); n != 0 || err != nil {
		t.Errorf("SlowConsumers() = %d, %v", n, err)
	}
}

func TestProcessLameDuck(t *testing.T) {
	p := streamtest.RunProcess(t)
	told := make(chan struct{}, 1)
	p.Connect(t, nats.LameDuckModeHandler(func(*nats.Conn) { told <- struct{}{} }))
	if err := p.LameDuck(); err != nil {
		t.Fatal(err)
	}
	receive(t, "the announcement", told)
	p.Wait()
	if err := p.LameDuck(); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("LameDuck of a server that ended: %v, want ErrProcessDone", err)
	}
}

func TestProcessOptions(t *testing.T) {
	p := streamtest.RunProcess(t, streamtest.WithOptions(func(o *server.Options) {
		o.ServerName = "named"
		o.Users = []*server.User{{Username: "me", Password: "secret", Permissions: &server.Permissions{
			Publish: &server.SubjectPermission{Allow: []string{"a"}}}}}
		o.Tags.Add("a", "b")
		o.Cluster.PoolSize = -1
	}))
	if nc := p.Connect(t, nats.UserInfo("me", "secret")); nc.ConnectedServerName() != "named" {
		t.Errorf("server name %q, want named", nc.ConnectedServerName())
	}
	if _, err := p.Dial(nats.UserInfo("me", "wrong")); !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("Dial with the wrong password: %v, want ErrAuthorization", err)
	}
}

func TestProcessInvalid(t *testing.T) {
	for name, c := range map[string]struct {
		opt  streamtest.Option
		want string
	}{
		"options": {streamtest.WithOptions(func(o *server.Options) { o.MaxPayload, o.MaxPending = 2, 1 }), "max_pending"},
		"config":  {streamtest.WithConfig("nonsense: 1"), "nonsense"},
		"interface": {streamtest.WithOptions(func(o *server.Options) {
			o.AccountResolver = &server.MemAccResolver{}
		}), "AccountResolver"},
		"port": {streamtest.WithOptions(func(o *server.Options) { o.Host = "192.0.2.1" }), "192.0.2.1"},
	} {
		p, err := streamtest.StartProcess(c.opt)
		if err == nil {
			p.Kill()
			t.Errorf("%s: started", name)
		} else if !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want a word about %s", name, err, c.want)
		}
	}
}

// starter is what Server and Process have in common.
type starter interface {
	Dial(...nats.Option) (*nats.Conn, error)
}

func TestConfig(t *testing.T) {
	const text = `
		max_payload: 8KB
		authorization {
			users: [
				{ user: writer, password: w, permissions: { publish: "log.>", subscribe: { deny: ">" } } }
				{ user: reader, password: r, permissions: { publish: { deny: ">" }, subscribe: "log.>" } }
			]
		}`
	for name, srv := range map[string]starter{
		"server":  streamtest.Run(t, streamtest.WithConfig(text)),
		"process": streamtest.RunProcess(t, streamtest.WithConfig(text)),
	} {
		t.Run(name, func(t *testing.T) {
			denied := make(chan error, 1)
			writer, err := srv.Dial(nats.UserInfo("writer", "w"),
				nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { denied <- err }))
			if err != nil {
				t.Fatal(err)
			}
			defer writer.Close()
			reader, err := srv.Dial(nats.UserInfo("reader", "r"))
			if err != nil {
				t.Fatal(err)
			}
			defer reader.Close()
			if got := writer.MaxPayload(); got != 8000 && got != 8192 {
				t.Errorf("MaxPayload() = %d, want 8 KB", got)
			}
			sub, err := reader.SubscribeSync("log.>")
			if err != nil || reader.Flush() != nil || writer.Publish("other", nil) != nil {
				t.Fatal(err)
			}
			if err := receive(t, "the denial", denied); !errors.Is(err, nats.ErrPermissionViolation) {
				t.Errorf("publish without permission: %v", err)
			}
			if err := writer.Publish("log.a", []byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := sub.NextMsg(limit); err != nil {
				t.Error(err)
			}
		})
	}
	if srv, err := streamtest.Start(streamtest.WithConfig("nonsense: 1")); err == nil {
		srv.Shutdown()
		t.Error("Start accepted a configuration that no server accepts")
	}
}
