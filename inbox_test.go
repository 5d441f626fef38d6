package stream_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// A permission for the inbox goes by a reload and comes back, while the connection is up. The client and the server report the
// permission meanwhile, and work again soon after.
func TestInboxPermissionGoesAndComesBack(t *testing.T) {
	config := func(producer, alice string) string {
		return fmt.Sprintf(`authorization { users: [
			{ user: producer, password: secret-of-producer, permissions: { subscribe: [ "svc.>", %q ], publish: ">" } }
			{ user: alice, password: secret-of-alice, permissions: { subscribe: %q, publish: ">" } }
			{ user: bob, password: secret-of-bob } ] }`, producer, alice)
	}
	const producerInbox, aliceInbox = "_SINBOX.producer.>", "_SINBOX.alice.>"
	p := newRestricted(t, config(producerInbox, aliceInbox))
	srv := newService(t, p, stream.ServerParams{}, user("producer")...)
	if _, err := srv.HandleQueue("svc.echo", "q", echo); err != nil {
		t.Fatal(err)
	}
	if err := srv.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	alice := p.newClient(t, stream.ClientParams{}, user("alice")...)
	bob := p.newClient(t, stream.ClientParams{}, user("bob")...)
	verifyEcho(t, alice, "svc.echo", 10, 10)
	for range 3 {
		ofAlice, ofBob := open(t, alice, "svc.echo"), open(t, bob, "svc.echo")
		exchange(t, ofAlice, 1)
		exchange(t, ofBob, 1)
		reload(t, p.server, config(producerInbox, "nothing"))
		_, err := ofAlice.Recv()
		wantRefused(t, err, "_SINBOX.alice.")
		_, err = alice.Open(testContext(t), "svc.echo", nil)
		wantRefused(t, err, "_SINBOX.alice.")
		exchange(t, ofBob, 2)
		wantNotDone(t, alice.Done(), alice.Err())

		reload(t, p.server, config("nothing", aliceInbox)) // now the server's is gone
		if _, err := ofBob.Recv(); err == nil {
			t.Error("a stream of a server that hears nothing goes on")
		}
		eventually(t, "the server has left its queue group", func() bool {
			_, err := readAll(open(t, bob, "svc.echo"))
			return errors.Is(err, nats.ErrNoResponders)
		})
		_, err = srv.Handle("svc.other", echo)
		wantRefused(t, err, "_SINBOX.producer.")
		wantNotDone(t, srv.Done(), srv.Err())

		reload(t, p.server, config(producerInbox, aliceInbox))
		eventually(t, "both are back", func() bool {
			ctx, cancel := context.WithTimeout(testContext(t), time.Second)
			defer cancel()
			s, err := alice.Open(ctx, "svc.echo", nil)
			if err != nil {
				return false
			}
			defer s.Close()
			if s.CloseSend() != nil {
				return false
			}
			_, err = readAll(s)
			return !errors.Is(err, nats.ErrNoResponders) && !errors.Is(err, context.DeadlineExceeded)
		})
		verifyEcho(t, alice, "svc.echo", 10, 10)
		verifyEcho(t, bob, "svc.echo", 10, 10)
	}
}

// A member of a queue group that cannot serve leaves the requests to the others. It comes back when it can.
func TestMemberThatCannotServe(t *testing.T) {
	config := func(inboxes string) string {
		return fmt.Sprintf(`authorization { users: [
			{ user: producer, password: secret-of-producer, permissions: { subscribe: [ "svc.>", %s ], publish: ">" } }
			{ user: alice, password: secret-of-alice } ] }`, inboxes)
	}
	p := newRestricted(t, config(`"_SINBOX.good.>"`))
	const both = `"_SINBOX.good.>", "_SINBOX.bad.>"`
	reload(t, p.server, config(both))
	var served [2]atomic.Int64
	for i, prefix := range []string{"_SINBOX.good", "_SINBOX.bad"} {
		srv := newService(t, p, stream.ServerParams{}, append(user("producer"), nats.CustomInboxPrefix(prefix))...)
		if _, err := srv.HandleQueue("svc.x", "q", func(w *stream.Writer, r *stream.Request) error {
			served[i].Add(1)
			_, err := w.Write([]byte("x"))
			return err
		}); err != nil || srv.nc.Flush() != nil {
			t.Fatal(err)
		}
	}
	reload(t, p.server, config(`"_SINBOX.good.>"`))
	alice := p.newClient(t, stream.ClientParams{}, user("alice")...)
	ask := func() error {
		s := open(t, alice, "svc.x")
		defer s.Close()
		if records, err := readAll(s); len(records) != 1 {
			return err
		}
		return nil
	}
	eventually(t, "only one member serves", func() bool {
		before := served[1].Load()
		for range 20 {
			if ask() != nil {
				return false
			}
		}
		return served[1].Load() == before
	})
	before := served[1].Load()
	for range scaled(500) {
		if err := ask(); err != nil {
			t.Fatal(err)
		}
	}
	if n := served[1].Load() - before; n != 0 {
		t.Errorf("%d requests were served by a member that hears nothing", n)
	}
	reload(t, p.server, config(both))
	eventually(t, "both serve", func() bool {
		if err := ask(); err != nil {
			t.Error(err)
			return true
		}
		return served[1].Load() > before
	})
}

// The server refuses a subscription without saying which. If it is the inbox, streams end, and none begins until there is room.
func TestMaxSubscriptionsRefusesInbox(t *testing.T) {
	for name, limit := range map[string]string{
		"account": `accounts { A { users: [ { user: a, password: a } ], limits { max_subscriptions: 3 } }
			B { users: [ { user: b, password: b } ] } }
			no_auth_user: a`,
		"connection": `max_subscriptions: 3`,
	} {
		t.Run(name, func(t *testing.T) {
			p := newRestricted(t, limit)
			nc, err := p.server.Dial()
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			var mine []*nats.Subscription
			for i := range 3 {
				sub, err := nc.SubscribeSync(fmt.Sprint("mine.", i))
				if err != nil {
					t.Fatal(err)
				}
				mine = append(mine, sub)
			}
			if err := nc.Flush(); err != nil {
				t.Fatal(err)
			}
			c, err := stream.NewClient(stream.ClientParams{Conn: nc})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			s, err := c.Open(ctx, "mine.0", nil)
			if err == nil {
				_, err = s.Recv()
			}
			if !errors.Is(err, nats.ErrMaxSubscriptionsExceeded) {
				t.Errorf("the first stream: %v", err)
			}
			if _, err := c.Open(ctx, "mine.0", nil); !errors.Is(err, nats.ErrMaxSubscriptionsExceeded) {
				t.Errorf("the next stream: %v", err)
			}
			if err := mine[2].Unsubscribe(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "there is room for the inbox", func() bool { s, err = c.Open(ctx, "mine.0", nil); return err == nil })
			if _, err := mine[0].NextMsg(patience); err != nil {
				t.Error(err)
			}
			s.Close()
			if s, err = c.Open(ctx, "nobody", nil); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Recv(); !errors.Is(err, nats.ErrNoResponders) { // it comes by the inbox
				t.Error(err)
			}
		})
	}
}

// If it is another subscription of the connection, no stream notices, also if the client may not write to its own inbox.
func TestMaxSubscriptionsRefusesAnother(t *testing.T) {
	p := newRestricted(t, `accounts { A {
		users: [ { user: producer, password: secret-of-producer }
			{ user: alice, password: secret-of-alice, permissions: { publish: [ "svc.>", "_SINBOX.producer.>" ] } }
			{ user: bob, password: secret-of-bob } ]
		limits { max_subscriptions: 4 } } }`)
	srv := newService(t, p, stream.ServerParams{}, user("producer")...)
	srv.handle(t, "svc.echo", echo)
	var streams []*stream.Stream
	var clients []*stream.Client
	for _, name := range []string{"alice", "bob"} {
		c := p.newClient(t, stream.ClientParams{}, user(name)...)
		if err := c.Conn.Flush(); err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
		s := open(t, c, "svc.echo")
		exchange(t, s, 0)
		streams = append(streams, s)
	}
	for i := range 5 {
		for _, nc := range []*nats.Conn{srv.nc, clients[0].Conn, clients[1].Conn} {
			sub, err := nc.SubscribeSync(fmt.Sprint("more.", i))
			if err != nil || nc.Flush() != nil {
				t.Fatal(err)
			}
			defer func() { _ = sub.Unsubscribe() }()
		}
		for k, s := range streams {
			exchange(t, s, i)
			verifyEcho(t, clients[k], "svc.echo", 3, 10)
		}
		time.Sleep(100 * time.Millisecond) // the doubt may take AckTimeout to end
	}
	for _, s := range streams {
		if err := s.CloseSend(); err != nil {
			t.Error(err)
		}
		wantEOF(t, s)
	}
}
