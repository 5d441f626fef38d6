package stream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// recipe returns the configuration in docs/PROTOCOL.md section 15 whose first line is "# permissions: " and name.
func recipe(t testing.TB, name string) string {
	t.Helper()
	doc, err := os.ReadFile("../docs/PROTOCOL.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?ms)^```text\n(# permissions: " + regexp.QuoteMeta(name) + "\n.*?)^```$").FindSubmatch(doc)
	if block == nil {
		t.Fatalf("docs/PROTOCOL.md has no block %q", name)
	}
	return string(block[1])
}

// verifyStrangers lets bob try to read and to write the streams of alice, and the subjects of the producer.
func verifyStrangers(t *testing.T, p *pair, srv *service, alice, bob *stream.Client) {
	// An attacker must not know the subjects of alice's stream and its handler.
	requests, err := srv.nc.SubscribeSync("svc.taken")
	if err != nil || srv.nc.Flush() != nil {
		t.Fatal(err)
	}
	victim := open(t, alice, "svc.taken")
	req, err := requests.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	// On the connection that the request came on: allow_responses knows no other.
	w := p.newClient(t, stream.ClientParams{Conn: srv.nc}).NewWriter(req.Reply)
	write(t, w, []byte("before"))
	if rec, err := victim.Recv(); string(rec) != "before" || err != nil {
		t.Fatalf("%q, %v", rec, err)
	}

	denied := make(refusals, 64)
	stranger, err := p.server.Dial(user("bob", denied.option())...)
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	var heard sync.Map
	forbidden := []string{">", "_SINBOX.>", "_SINBOX.alice.>", "_SINBOX.producer.>", "svc.>", req.Reply}
	for _, subject := range forbidden {
		if _, err := stranger.Subscribe(subject, func(m *nats.Msg) { heard.Store(m.Subject, string(m.Data)) }); err != nil {
			t.Fatal(err)
		}
	}
	forged := stream.AppendPacket(nil, stream.PacketHeader{}, stream.Frame{Type: stream.FrameReset, Code: 4999})
	for _, data := range [][]byte{forged, []byte(`{"type":2,"closeError":{"Code":1000,"Text":""}}`)} {
		if err := stranger.Publish(req.Reply, data); err != nil {
			t.Fatal(err)
		}
	}
	if err := stranger.Flush(); err != nil {
		t.Fatal(err)
	}
	for range len(forbidden) + 2 {
		waitFor(t, "a refusal", func() { <-denied })
	}

	write(t, w, []byte("after"))
	closeWriter(t, w)
	if rec, err := victim.Recv(); string(rec) != "after" || err != nil {
		t.Fatalf("%q, %v", rec, err)
	}
	wantEOF(t, victim)
	if err := stranger.Flush(); err != nil {
		t.Fatal(err)
	}
	heard.Range(func(subject, data any) bool {
		t.Errorf("a stranger read %q on %s", data, subject)
		return true
	})
	if s := alice.Stats(); s.DroppedForeign != 0 || s.DroppedMalformed != 0 {
		t.Errorf("a stranger reached a stream: %+v", s)
	}
	verifyEcho(t, bob, "svc.echo", 3, 10) // whom it did not harm either
}

// The two recipes for one account let streams pass both ways, and keep strangers out.
func TestPermissionRecipesLetStreamsPass(t *testing.T) {
	for _, name := range []string{"one account", "answers only"} {
		t.Run(name, func(t *testing.T) {
			p := newRestricted(t, recipe(t, name))
			srv := newService(t, p, stream.ServerParams{KeepAlive: 20 * time.Millisecond}, user("producer")...)
			srv.handle(t, "svc.echo", echo)
			alice := p.newClient(t, stream.ClientParams{KeepAlive: 20 * time.Millisecond}, user("alice")...)
			bob := p.newClient(t, stream.ClientParams{}, user("bob")...)

			var group sync.WaitGroup
			for _, c := range []*stream.Client{alice, bob} {
				for range 4 {
					group.Go(func() { verifyEcho(t, c, "svc.echo", 1200, 1, 100, 3000) })
				}
			}
			group.Wait()
			verifyEcho(t, alice, "svc.echo", 3, 2<<20)
			if s := srv.Stats(); s.UnsentControl != 0 || s.DroppedControl != 0 {
				t.Errorf("server: %+v", s)
			}
			verifyStrangers(t, p, srv, alice, bob)
			verifyResponders(t, p, alice, srv)
		})
	}
}

// verifyResponders lets the producer's user serve a subject twice, and uses the streams of both. Their handlers must
// learn the tokens of their streams by the permissions that the recipe gives.
func verifyResponders(t *testing.T, p *pair, alice *stream.Client, srv *service) {
	t.Helper()
	servers := []*service{srv, newService(t, p, stream.ServerParams{}, user("producer")...)}
	for i, s := range servers {
		s.handle(t, "svc.all", named(i))
	}
	r, err := alice.OpenMany(testContext(t), "svc.all", []byte("request"), stall, stream.WithMaxResponders(2))
	if err != nil {
		t.Fatal(err)
	}
	streams, err := take(t, r)
	if err != io.EOF || len(streams) != 2 {
		t.Fatalf("%d streams, %v", len(streams), err)
	}
	if a, b := verifyNamed(t, streams[0], 1500), verifyNamed(t, streams[1], 1500); a == b {
		t.Errorf("both streams are of %q", a)
	}
}

// A publish that allow_responses does not cover ends the handler's stream with an error that names the consumer's
// subject: more than one message by default, any after its expiry, and any after the producer's connection was made
// anew.
func TestAllowResponsesIsNotEnoughForAHandler(t *testing.T) {
	base := recipe(t, "answers only")
	const grant = `allow_responses: { max: -1, expires: "24h" }`
	if strings.Count(base, grant) != 3 {
		t.Fatalf("the recipe does not say %s for each user", grant)
	}
	for name, c := range map[string]struct {
		grant string
		then  func(srv *service) error
	}{
		"by default": {"allow_responses: true", nil},
		"expired": {`allow_responses: { max: -1, expires: "50ms" }`, func(*service) error {
			time.Sleep(60 * time.Millisecond)
			return nil
		}},
		"reconnected": {grant, func(srv *service) error { return srv.nc.ForceReconnect() }},
	} {
		t.Run(name, func(t *testing.T) {
			p := newRestricted(t, strings.Replace(base, grant, c.grant, 1)) // the producer's
			srv := newService(t, p, stream.ServerParams{}, user("producer")...)
			causes := make(chan error, 1)
			srv.handle(t, "svc.two", func(w *stream.Writer, r *stream.Request) error {
				write(t, w, []byte("one"))
				if err := w.Flush(); err != nil {
					return err
				}
				if c.then != nil {
					if err := c.then(srv); err != nil {
						return err
					}
				}
				_, _ = w.Write([]byte("two"))
				<-r.Context().Done()
				causes <- context.Cause(r.Context())
				return nil
			})
			alice := p.newClient(t, stream.ClientParams{KeepAlive: time.Second, ResumeTimeout: 200 * time.Millisecond}, user("alice")...)
			s := open(t, alice, "svc.two")
			if rec, err := s.Recv(); string(rec) != "one" || err != nil {
				t.Fatalf("%q, %v", rec, err)
			}
			var cause error
			waitFor(t, "the handler's context to end", func() { cause = <-causes })
			wantRefused(t, cause, "_SINBOX.alice.")
		})
	}
}

// Nor does a consumer's stream survive its reconnect where it may only answer.
func TestAllowResponsesIsNotEnoughForAConsumer(t *testing.T) {
	p := newRestricted(t, recipe(t, "answers only"))
	times := stream.ServerParams{KeepAlive: time.Second, ResumeTimeout: 200 * time.Millisecond}
	srv := newService(t, p, times, user("producer")...)
	srv.handle(t, "svc.echo", echo)
	denied := make(refusals, 1)
	alice := p.newClient(t, stream.ClientParams{}, user("alice", denied.option())...)
	s := open(t, alice, "svc.echo")
	exchange(t, s, 1)
	if err := alice.Conn.ForceReconnect(); err != nil {
		t.Fatal(err)
	}
	_, err := s.Recv()
	denied.within(t, time.Now(), err, "_SINBOX.producer.")
	verifyEcho(t, alice, "svc.echo", 100, 10)
}

const restrictedUsers = `
authorization { users: [
	{ user: producer, password: $PRODUCER_PASSWORD, permissions: {
		subscribe: [ "svc.>", "_SINBOX.producer.>" ], publish: %s } }
	{ user: alice, password: $ALICE_PASSWORD, permissions: {
		subscribe: %s, publish: %s } }
	{ user: bob, password: $BOB_PASSWORD, permissions: {
		subscribe: [ "svc.>", "_SINBOX.bob.>" ], publish: [ "_SINBOX.alice.>" ] } }
] }`

// A consumer that may not publish its request, or its credit, hears so on that stream. Its other streams go on.
func TestForbiddenPublishOfConsumerEndsOneStream(t *testing.T) {
	for name, c := range map[string]struct {
		publish string // what alice may
		open    string
		named   string
	}{
		"request": {`[ "svc.echo", "_SINBOX.producer.>" ]`, "svc.none", "svc.none"},
		"control": {`[ "svc.>", "_SINBOX.producer.>" ]`, "svc.bob", "_SINBOX.bob."},
	} {
		t.Run(name, func(t *testing.T) {
			p := newRestricted(t, fmt.Sprintf(restrictedUsers, `"_SINBOX.alice.>"`, `"_SINBOX.alice.>"`, c.publish))
			params := stream.ServerParams{KeepAlive: 100 * time.Millisecond, AckTimeout: 20 * time.Millisecond, ResumeTimeout: 100 * time.Millisecond}
			srv := newService(t, p, params, user("producer")...)
			srv.handle(t, "svc.echo", echo)
			other := newService(t, p, params, user("bob")...) // alice may not write to it in the second case
			for _, subject := range []string{"svc.none", "svc.bob"} {
				other.handle(t, subject, func(w *stream.Writer, r *stream.Request) error {
					for i := range 1000 {
						if _, err := w.Write(testRecord(i, 1000)); err != nil {
							return err
						}
					}
					return nil
				})
			}
			denied := make(refusals, 1)
			alice := p.newClient(t, stream.ClientParams{}, user("alice", denied.option())...)
			goesOn := open(t, alice, "svc.echo")
			exchange(t, goesOn, 1)

			s := open(t, alice, c.open)
			records, err := readAll(s)
			ended := time.Now()
			for i, rec := range records {
				if !bytes.Equal(rec, testRecord(i, 1000)) {
					t.Errorf("record %d is another", i)
				}
			}
			denied.within(t, ended, err, c.named)
			if _, err := s.Write(nil); !errors.Is(err, nats.ErrPermissionViolation) {
				t.Errorf("Write: %v", err)
			}
			if cause := context.Cause(s.Context()); !errors.Is(cause, nats.ErrPermissionViolation) {
				t.Errorf("cause of the context: %v", cause)
			}

			exchange(t, goesOn, 2)
			if err := goesOn.CloseSend(); err != nil {
				t.Error(err)
			}
			wantEOF(t, goesOn)
			verifyEcho(t, alice, "svc.echo", 1200, 500)
		})
	}
}

// A producer that may not publish to one consumer's inbox hears so on that stream. Its other streams go on.
func TestForbiddenPublishOfProducerEndsOneStream(t *testing.T) {
	p := newRestricted(t, recipe(t, "one account"))
	denied := make(refusals, 1)
	params := stream.ServerParams{KeepAlive: 20 * time.Millisecond}
	srv := newService(t, p, params, user("producer", denied.option())...)
	srv.handle(t, "svc.echo", echo)
	type result struct {
		at           time.Time
		cause, write error
	}
	results := make(chan result, 1)
	watch := func(write func(w *stream.Writer) error) stream.Handler {
		return func(w *stream.Writer, r *stream.Request) error {
			err := write(w)
			<-r.Context().Done()
			res := result{at: time.Now(), cause: context.Cause(r.Context()), write: err}
			if err == nil {
				_, res.write = w.Write(nil)
			}
			results <- res
			return nil
		}
	}
	srv.handle(t, "svc.writes", watch(func(w *stream.Writer) error {
		for {
			if _, err := w.Write(make([]byte, 1000)); err != nil {
				return err
			}
		}
	}))
	srv.handle(t, "svc.silent", watch(func(*stream.Writer) error { return nil })) // its PING is refused

	alice := p.newClient(t, stream.ClientParams{}, user("alice")...)
	goesOn := open(t, alice, "svc.echo")
	exchange(t, goesOn, 1)

	for _, subject := range []string{"svc.writes", "svc.silent"} {
		// A request whose reply subject is nobody's that the producer may answer.
		reply := "_SINBOX.carol.inbox." + string(stream.AppendToken(nil, stream.Token{LogPackets: 5, LogBytes: 18, ID: 1}))
		if err := alice.Conn.PublishRequest(subject, reply, nil); err != nil {
			t.Fatal(err)
		}
		var res result
		waitFor(t, "the handler's context to end", func() { res = <-results })
		denied.within(t, res.at, res.cause, reply)
		wantRefused(t, res.write, reply)
	}
	exchange(t, goesOn, 2)
	if err := goesOn.CloseSend(); err != nil {
		t.Error(err)
	}
	wantEOF(t, goesOn)
	verifyEcho(t, alice, "svc.echo", 1200, 500)
}

// Without permission to subscribe to its inbox a client or server has no streams, and says why.
func TestForbiddenInboxIsReported(t *testing.T) {
	p := newRestricted(t, fmt.Sprintf(restrictedUsers, `"_SINBOX.alice.>"`, `"_SINBOX.alice.>"`, `[ "svc.>", "_SINBOX.producer.>" ]`))
	srv := newService(t, p, stream.ServerParams{KeepAlive: time.Second, ResumeTimeout: 200 * time.Millisecond}, user("producer")...)
	srv.handle(t, "svc.echo", echo)

	elsewhere := nats.CustomInboxPrefix("_SINBOX.nowhere")
	denied := make(refusals, 1)
	alice := p.newClient(t, stream.ClientParams{}, user("alice", denied.option(), elsewhere)...)
	s, err := alice.Open(testContext(t), "svc.echo", nil)
	if err == nil {
		_, err = s.Recv()
	}
	denied.within(t, time.Now(), err, "_SINBOX.nowhere.")
	_, err = alice.Open(testContext(t), "svc.echo", nil)
	wantRefused(t, err, "_SINBOX.nowhere.")
	w := alice.NewWriter("_SINBOX.alice.x")
	_, err = w.Write(nil)
	wantRefused(t, err, "_SINBOX.nowhere.")

	denied = make(refusals, 1)
	nc, err := p.server.Dial(user("producer", denied.option(), elsewhere)...)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	bad, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		t.Fatal(err)
	}
	defer bad.Close()
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the server refuses handlers", func() bool { _, err = bad.Handle("svc.bad", echo); return err != nil })
	denied.within(t, time.Now(), err, "_SINBOX.nowhere.")

	good := p.newClient(t, stream.ClientParams{}, user("alice")...)
	verifyEcho(t, good, "svc.echo", 10, 10)
}

// The server checks permissions after it maps subjects, and names the one that it has mapped. The request hears of it
// all the same, and no other stream does.
func TestForbiddenMappedSubjectEndsOneStream(t *testing.T) {
	p := newRestricted(t, `mappings: { "svc.v1": "svc.v2" }`+fmt.Sprintf(restrictedUsers, `"_SINBOX.alice.>"`, `"_SINBOX.alice.>"`,
		`[ "svc.v1", "svc.echo", "_SINBOX.producer.>" ]`))
	srv := newService(t, p, stream.ServerParams{}, user("producer")...)
	srv.handle(t, "svc.echo", echo)
	alice := p.newClient(t, stream.ClientParams{}, user("alice")...)
	goesOn := open(t, alice, "svc.echo")
	exchange(t, goesOn, 1)
	for range 3 {
		s := open(t, alice, "svc.v1")
		other := open(t, alice, "svc.echo") // at the same time
		_, err := s.Recv()
		wantRefused(t, err, "svc.v2")
		exchange(t, other, 2)
		if err := other.CloseSend(); err != nil {
			t.Error(err)
		}
		wantEOF(t, other)
	}
	exchange(t, goesOn, 3)
	if err := goesOn.CloseSend(); err != nil {
		t.Error(err)
	}
	wantEOF(t, goesOn)
}

// The server quotes the subject that it names.
func TestForbiddenSubjectMayBeQuoted(t *testing.T) {
	const odd = `svc.odd"\\.'é`
	p := newRestricted(t, fmt.Sprintf(restrictedUsers, `[]`, `"_SINBOX.alice.>"`, `[ "svc.echo" ]`))
	denied := make(refusals, 1)
	alice := p.newClient(t, stream.ClientParams{}, user("alice", denied.option())...)
	_, err := open(t, alice, odd).Recv()
	denied.within(t, time.Now(), err, odd)
}

// newAccounts is a server with the recipe for accounts, with a service in one and a client in another.
func newAccounts(t *testing.T, server stream.ServerParams, client stream.ClientParams) (*pair, *service, *stream.Client) {
	t.Helper()
	p := newRestricted(t, recipe(t, "across accounts"))
	srv := newService(t, p, server, user("producer")...)
	return p, srv, p.newClient(t, client, user("alice")...)
}

// Streams cross accounts in both directions, with headers and trailers, credit and records of any size.
func TestStreamsCrossAccounts(t *testing.T) {
	// No end asks whether the other has something: a question that crosses the answer is to a stream that is over.
	p, srv, alice := newAccounts(t, stream.ServerParams{AckTimeout: patience}, stream.ClientParams{AckTimeout: patience})
	srv.handle(t, "svc.echo", echo)
	bob := p.newClient(t, stream.ClientParams{AckTimeout: patience}, user("bob")...)
	var group sync.WaitGroup
	for _, c := range []*stream.Client{alice, bob} {
		for range 4 {
			group.Go(func() { verifyEcho(t, c, "svc.echo", 1500, 1, 1000, 4000) }) // both first windows are much smaller
		}
	}
	group.Wait()
	verifyEcho(t, alice, "svc.echo", 6, 40_000, 1<<20, 5<<20)
	verifyResponders(t, p, alice, srv)

	if _, err := readAll(open(t, alice, "svc.nobody")); !errors.Is(err, nats.ErrNoResponders) {
		t.Errorf("nobody there: %v", err)
	}
	// Each stream may ask for a proof of its peer's subject (CHALLENGE). The answer may come when the stream is over.
	const streams = 4 + 1 + 2
	if s := alice.Stats(); s.PacketsSent == 0 || s.DroppedForeign+s.DroppedMalformed != 0 || s.DroppedUnknown > streams {
		t.Errorf("consumer: %+v", s)
	}
}

// The reply subject of a request that crossed accounts is none of the consumer's. Its offer comes from a header.
func TestOfferCrossesAccounts(t *testing.T) {
	_, srv, alice := newAccounts(t, stream.ServerParams{}, stream.ClientParams{Window: 8 << 10})
	requests, err := srv.nc.SubscribeSync("svc.raw")
	if err != nil || srv.nc.Flush() != nil {
		t.Fatal(err)
	}
	s := open(t, alice, "svc.raw")
	req, err := requests.NextMsg(patience)
	if err != nil {
		t.Fatal(err)
	}
	if strings.HasPrefix(req.Reply, "_SINBOX.") || !strings.HasPrefix(req.Reply, "_R_.") {
		t.Errorf("reply subject %s was not mapped", req.Reply)
	}
	offer, err := stream.ParseOffer(req.Header.Get("Stream-Open"))
	if err != nil || offer.LogBytes != 13 || offer.LogPackets != 5 || offer.Codec != stream.MsgPack {
		t.Errorf("offer %+v, %v", offer, err)
	}
	s.Close()

	// The handler heeds it: it writes objects as asked and, while nothing is read, no more than was offered.
	written := make(chan int, 1)
	srv.handle(t, "svc.fill", func(w *stream.Writer, r *stream.Request) error {
		if _, err := w.WriteObject(map[string]int{"n": 1}); err != nil {
			return err
		}
		for n := 1; ; n++ {
			if _, err := w.Write(make([]byte, 1<<10)); err != nil {
				written <- n
				return nil
			}
		}
	})
	s = open(t, alice, "svc.fill")
	var v map[string]int
	if err := s.RecvObject(&v); err != nil || v["n"] != 1 {
		t.Errorf("%v, %v", v, err)
	}
	eventually(t, "the credit is used up", func() bool { return srv.Stats().BytesSent >= 8<<10 })
	s.Close()
	waitFor(t, "the handler to return", func() {
		if n := <-written; n > 8+33 { // one packet may exceed the window, and one is open
			t.Errorf("%d KiB were written into a window of 8", n)
		}
	})
}

// Cancellation and deadlines reach a handler in another account, and its close code comes back.
func TestEndsCrossAccounts(t *testing.T) {
	_, srv, alice := newAccounts(t, stream.ServerParams{}, stream.ClientParams{})
	causes := make(chan error, 1)
	srv.handle(t, "svc.endless", func(w *stream.Writer, r *stream.Request) error {
		for {
			if _, err := w.Write(make([]byte, 1000)); err != nil {
				<-r.Context().Done()
				causes <- context.Cause(r.Context())
				return err
			}
		}
	})
	srv.handle(t, "svc.fail", func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("x"))
		return &stream.CloseError{Code: 4321, Text: "mine"}
	})
	cause := func() (err error) {
		t.Helper()
		waitFor(t, "the handler to hear of it", func() { err = <-causes })
		return err
	}
	ctx, cancel := context.WithCancel(testContext(t))
	s, err := alice.Open(ctx, "svc.endless", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	cancel()
	wantCode(t, cause(), stream.CloseCanceled, "")

	ctx, cancel = context.WithTimeout(testContext(t), 100*time.Millisecond)
	defer cancel()
	if s, err = alice.Open(ctx, "svc.endless", nil); err != nil {
		t.Fatal(err)
	}
	if _, err := readAll(s); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
	wantCode(t, cause(), stream.CloseDeadlineExceeded, "")

	records, err := readAll(open(t, alice, "svc.fail"))
	if len(records) != 1 {
		t.Errorf("%d records", len(records))
	}
	wantCode(t, err, 4321, "mine")
}

// Questions to silent peers cross accounts, each with a reply subject mapped anew.
func TestQuestionsCrossAccounts(t *testing.T) {
	_, srv, alice := newAccounts(t, stream.ServerParams{KeepAlive: 10 * time.Millisecond, AckTimeout: 10 * time.Millisecond, ResumeTimeout: 2 * time.Second},
		stream.ClientParams{KeepAlive: 10 * time.Millisecond, AckTimeout: 10 * time.Millisecond, ResumeTimeout: 2 * time.Second})
	srv.handle(t, "svc.echo", echo)
	s := open(t, alice, "svc.echo")
	for i := range 4 {
		before := srv.nc.Stats().InMsgs
		exchange(t, s, i)
		eventually(t, "questions and answers have passed", func() bool { return srv.nc.Stats().InMsgs >= before+20 })
	}
	if err := s.CloseSend(); err != nil {
		t.Error(err)
	}
	wantEOF(t, s)
}

// The mapping of reply subjects goes with the connection of the end that they belong to. Streams outlive that.
func TestStreamsAcrossAccountsSurviveReconnects(t *testing.T) {
	for _, name := range []string{"consumer", "producer"} {
		t.Run(name, func(t *testing.T) {
			_, srv, alice := newAccounts(t, stream.ServerParams{}, stream.ClientParams{})
			nc := alice.Conn
			if name == "producer" {
				nc = srv.nc
			}
			reconnect := func() {
				t.Helper()
				before := nc.Stats().Reconnects
				if err := nc.ForceReconnect(); err != nil {
					t.Fatal(err)
				}
				eventually(t, "the connection is back, and its subscriptions", func() bool { return nc.Stats().Reconnects > before && nc.Flush() == nil })
			}
			srv.handle(t, "svc.echo", echo)
			n := scaled(20_000)
			srv.handle(t, "svc.down", func(w *stream.Writer, r *stream.Request) error {
				for i := range n {
					if _, err := w.Write(testRecord(i, 1000)); err != nil {
						return err
					}
				}
				return nil
			})
			up := make(chan error, 1)
			srv.handle(t, "svc.up", func(w *stream.Writer, r *stream.Request) error { // it writes nothing
				for i := range n {
					if rec, err := r.Recv(); err != nil || !bytes.Equal(rec, testRecord(i, 1000)) {
						up <- fmt.Errorf("record %d: %d bytes, %w", i, len(rec), err)
						return err
					}
				}
				_, err := r.Recv()
				up <- err
				return nil
			})

			silent := open(t, alice, "svc.echo")
			exchange(t, silent, 1)
			s := open(t, alice, "svc.down")
			for i := range n {
				if i == n/3 || i == 2*n/3 {
					reconnect()
				}
				if rec, err := s.Recv(); err != nil || !bytes.Equal(rec, testRecord(i, 1000)) {
					t.Fatalf("record %d: %d bytes, %v", i, len(rec), err)
				}
			}
			wantEOF(t, s)
			s = open(t, alice, "svc.up")
			for i := range n {
				if i == n/3 || i == 2*n/3 {
					reconnect()
				}
				if _, err := s.Write(testRecord(i, 1000)); err != nil {
					t.Fatalf("record %d: %v", i, err)
				}
			}
			if err := s.CloseSend(); err != nil {
				t.Error(err)
			}
			waitFor(t, "the handler to have all", func() {
				if err := <-up; err != io.EOF {
					t.Error(err)
				}
			})
			wantEOF(t, s)
			exchange(t, silent, 2)
			if err := silent.CloseSend(); err != nil {
				t.Error(err)
			}
			wantEOF(t, silent)
		})
	}
}

// A permission for the inbox goes by a reload and comes back, while the connection is up. The client and the server
// report the permission meanwhile, and work again soon after.
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
func TestMemberThatCannotServeLeavesItsGroup(t *testing.T) {
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

// The server refuses a subscription without saying which. If it is the inbox, streams end, and none begins until there
// is room.
func TestRefusedInboxBySubscriptionLimitRecovers(t *testing.T) {
	group := newConcurrent(t)
	defer group.Wait()
	for name, limit := range map[string]string{
		"account": `accounts { A { users: [ { user: a, password: a } ], limits { max_subscriptions: 3 } }
			B { users: [ { user: b, password: b } ] } }
			no_auth_user: a`,
		"connection": `max_subscriptions: 3`,
	} {
		group.Run(name, func(t *testing.T) {
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

// If it is another subscription of the connection, no stream notices, also if the client may not write to its own
// inbox.
func TestRefusedOtherSubscriptionHarmsNobody(t *testing.T) {
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

// crowded is a server with registrations on a connection that may have too few subscriptions for them.
type crowded struct {
	p     *pair
	srv   *service
	alice *stream.Client
	regs  []*stream.Registration
}

// crowdedConfig lets each connection have limit subscriptions.
func crowdedConfig(limit int, publish string) string {
	return fmt.Sprintf(`accounts { A { limits { max_subscriptions: %d }, users: [
		{ user: producer, password: secret-of-producer, permissions: { publish: %q } }
		{ user: alice, password: secret-of-alice } ] } }`, limit, publish)
}

// newCrowded makes a server on a connection with further subscriptions of the user.
func newCrowded(t *testing.T, config string, own int) (c *crowded, mine []*nats.Subscription) {
	t.Helper()
	c = &crowded{p: newRestricted(t, config)}
	c.srv = newService(t, c.p, stream.ServerParams{Logger: slog.New(slog.DiscardHandler)},
		user("producer", nats.ReconnectWait(20*time.Millisecond), nats.ReconnectJitter(0, 0))...)
	c.alice = c.p.newClient(t, stream.ClientParams{}, user("alice", nats.ReconnectWait(20*time.Millisecond), nats.ReconnectJitter(0, 0))...)
	for i := range own {
		sub, err := c.srv.nc.SubscribeSync(fmt.Sprint("mine.", i))
		if err != nil {
			t.Fatal(err)
		}
		mine = append(mine, sub)
	}
	return c, mine
}

// register handles n subjects in a queue group, in no group if that is empty.
func (c *crowded) register(t *testing.T, queue string, n int) {
	t.Helper()
	for i := range n {
		c.regs = append(c.regs, c.srv.register(t, fmt.Sprint("svc.", i), queue, echo))
	}
}

// serves reports whether a stream on subject number i reaches its handler.
func (c *crowded) serves(t *testing.T, i int) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(testContext(t), time.Second) // a request may be lost while a connection is made again
	defer cancel()
	s, err := c.alice.Open(ctx, fmt.Sprint("svc.", i), nil)
	if err != nil {
		return false
	}
	defer s.Close()
	if s.CloseSend() != nil {
		return false
	}
	_, err = readAll(s)
	return err == io.EOF
}

// served waits until the server serves n subjects, and returns which.
func (c *crowded) served(t *testing.T, when string, n int) map[int]bool {
	t.Helper()
	var served map[int]bool
	eventually(t, fmt.Sprintf("%d subjects are served %s", n, when), func() bool {
		served = make(map[int]bool)
		for i := range c.regs {
			if c.serves(t, i) {
				served[i] = true
			}
		}
		return len(served) == n
	})
	wantNotDone(t, c.srv.Done(), c.srv.Err())
	return served
}

// expect waits until the server serves n subjects, and the registrations of the others say why they are not served.
func (c *crowded) expect(t *testing.T, when string, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("all but %d registrations say that they are not served %s", n, when), func() bool {
		healthy := 0
		for _, r := range c.regs {
			if r.Err() == nil {
				healthy++
			}
		}
		return healthy == n
	})
	served := c.served(t, when, n)
	for i, r := range c.regs {
		switch err := r.Err(); {
		case served[i] && err != nil:
			t.Errorf("%s: the subject %d is served and says %v", when, i, err)
		case !served[i] && (!errors.Is(err, nats.ErrMaxSubscriptionsExceeded) || !strings.Contains(err.Error(), fmt.Sprint("svc.", i))):
			t.Errorf("%s: the subject %d is not served and says %v", when, i, err)
		}
	}
}

// The NATS server refuses subscriptions of a Server without saying which. Registrations that are not heard say so, and
// the others serve. All serve soon after there is room.
func TestRegistrationsRefusedBySubscriptionLimitRecover(t *testing.T) {
	for _, queue := range []string{"", "q"} {
		t.Run(fmt.Sprintf("reloads, queue group %q", queue), func(t *testing.T) {
			c, _ := newCrowded(t, crowdedConfig(4, ">"), 0)
			c.register(t, queue, 7)
			c.expect(t, "with room for 3", 3)
			reload(t, c.p.server, crowdedConfig(100, ">"))
			c.expect(t, "with room", 7)
			for range scaled(3) {
				reload(t, c.p.server, crowdedConfig(3, ">")) // closes the connection. nats.go subscribes again in any order
				c.expect(t, "with room for 2", 2)
				reload(t, c.p.server, crowdedConfig(100, ">"))
				c.expect(t, "with room again", 7)
			}
		})
		t.Run(fmt.Sprintf("other subscriptions, queue group %q", queue), func(t *testing.T) {
			c, mine := newCrowded(t, crowdedConfig(7, ">"), 3)
			c.register(t, queue, 6)
			for n := 3; ; n++ {
				c.expect(t, "beside other subscriptions", n)
				if len(mine) == 0 {
					break
				}
				if err := mine[0].Unsubscribe(); err != nil {
					t.Fatal(err)
				}
				mine = mine[1:]
			}
		})
	}
}

// A server that may not publish to its own inbox cannot find out which of its subscriptions is refused. It tries all
// again.
func TestRefusedRegistrationsRecoverWithoutProbes(t *testing.T) {
	const toConsumers = "_SINBOX.alice.>"
	c, _ := newCrowded(t, crowdedConfig(4, toConsumers), 0)
	c.register(t, "q", 6)
	time.Sleep(100 * time.Millisecond)
	reload(t, c.p.server, crowdedConfig(100, toConsumers))
	c.served(t, "with room", 6)
}

// The server does not disturb registrations that are heard while other subscriptions of its connection are refused.
func TestRefusedOtherSubscriptionsDisturbNoRegistration(t *testing.T) {
	c, _ := newCrowded(t, crowdedConfig(4, ">"), 0)
	c.register(t, "q", 3)
	for i := range c.regs {
		verifyEcho(t, c.alice, fmt.Sprint("svc.", i), 1, 10)
	}
	for i := range scaled(300) {
		sub, err := c.srv.nc.SubscribeSync("mine")
		if err != nil {
			t.Fatal(err)
		}
		verifyEcho(t, c.alice, fmt.Sprint("svc.", i%3), 1, 10)
		if err := sub.Unsubscribe(); err != nil {
			t.Fatal(err)
		}
		if err := c.regs[i%3].Err(); err != nil {
			t.Fatal(err)
		}
	}
}
