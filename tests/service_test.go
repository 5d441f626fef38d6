package stream_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"

	"github.com/natsstream/stream"
)

// discover sends a question below $SRV and decodes all answers that arrive before the services have answered a later
// question.
func discover[T any](t *testing.T, nc *nats.Conn, want int, verb micro.Verb, to ...string) []T {
	t.Helper()
	to = append(to, "", "")
	subject, err := micro.ControlSubject(verb, to[0], to[1])
	if err != nil {
		t.Fatal(err)
	}
	answers, err := nc.SubscribeSync(nc.NewInbox())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = answers.Unsubscribe() }()
	if err := nc.PublishRequest(subject, answers.Subject, nil); err != nil {
		t.Fatal(err)
	}
	var all []T
	for range want {
		m, err := answers.NextMsg(patience)
		if err != nil {
			t.Fatalf("%s: %d answers, then %v", subject, len(all), err)
		}
		d := json.NewDecoder(bytes.NewReader(m.Data))
		d.DisallowUnknownFields()
		var answer T
		if err := d.Decode(&answer); err != nil {
			t.Fatalf("%s: %q: %v", subject, m.Data, err)
		}
		all = append(all, answer)
	}
	if m, err := answers.NextMsg(50 * time.Millisecond); err == nil && m.Header.Get("Status") == "" {
		t.Errorf("%s: a further answer: %q", subject, m.Data)
	}
	return all
}

func newMicro(t *testing.T, s *service, name string) *stream.Service {
	t.Helper()
	v, err := s.AddService(name, "1.2.3", "tells prices", map[string]string{"team": "a"})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// ask opens a stream and reads it to its end. It returns nil for the normal end.
func ask(t *testing.T, p *pair, subject, data string) error {
	s, err := p.consumer.Open(testContext(t), subject, []byte(data))
	if err == nil {
		_, err = readAll(s)
	}
	return err
}

func TestServiceIsFoundByTools(t *testing.T) {
	p := newPair(t)
	quiet := stream.ServerParams{Logger: slog.New(slog.DiscardHandler)}
	first, second := newService(t, p, quiet), newService(t, p, quiet)
	for _, s := range []*service{first, second} {
		v := newMicro(t, s, "prices")
		if _, err := v.Handle("quote", "svc.quote", func(w *stream.Writer, r *stream.Request) error {
			switch string(r.Data) {
			case "fail":
				return errors.New("no such symbol")
			case "panic":
				panic("broken")
			case "normal":
				return &stream.CloseError{Code: stream.CloseNormalClosure}
			}
			_, err := w.Write(r.Data)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if _, err := v.HandleQueue("each", "svc.each", "", echo); err != nil {
			t.Fatal(err)
		}
		if err := s.nc.FlushTimeout(patience); err != nil {
			t.Fatal(err)
		}
	}
	nc := p.consumer.Conn

	ids := map[string]bool{}
	for _, a := range discover[micro.Ping](t, nc, 2, micro.PingVerb) {
		ids[a.ID] = true
		if a.Name != "prices" || a.Version != "1.2.3" || a.Metadata["team"] != "a" || a.Type != micro.PingResponseType {
			t.Errorf("%+v", a)
		}
		discover[micro.Ping](t, nc, 1, micro.PingVerb, "prices", a.ID)
	}
	if len(ids) != 2 {
		t.Errorf("IDs %v", ids)
	}
	for _, a := range discover[micro.Info](t, nc, 2, micro.InfoVerb, "prices") {
		if len(a.Endpoints) != 2 || a.Endpoints[0].Subject != "svc.quote" || a.Endpoints[0].QueueGroup != stream.ServiceQueue ||
			a.Endpoints[1].QueueGroup != "" || a.Description != "tells prices" {
			t.Errorf("%+v", a)
		}
	}

	want := map[string]int{"fail": 7, "panic": 3, "normal": 2, "record": 20}
	var all sync.WaitGroup
	for data, n := range want {
		for range n {
			all.Go(func() { _ = ask(t, p, "svc.quote", data) })
		}
	}
	all.Wait()
	requests, failed := 0, 0
	for _, a := range discover[micro.Stats](t, nc, 2, micro.StatsVerb, "prices") {
		e := a.Endpoints[0]
		requests += e.NumRequests
		failed += e.NumErrors
		if e.NumErrors > 0 && e.LastError != "no such symbol" && e.LastError != "the handler panicked" {
			t.Errorf("last error %q", e.LastError)
		}
		if e.NumRequests > 0 && (e.ProcessingTime <= 0 || e.AverageProcessingTime != e.ProcessingTime/time.Duration(e.NumRequests)) {
			t.Errorf("%v for %d requests, mean %v", e.ProcessingTime, e.NumRequests, e.AverageProcessingTime)
		}
		var counters stream.Stats
		if err := json.Unmarshal(e.Data, &counters); err != nil || counters.PacketsSent == 0 {
			t.Errorf("counters %s: %v", e.Data, err)
		}
	}
	if requests != 32 || failed != 10 {
		t.Errorf("%d requests and %d errors, want 32 and 10", requests, failed)
	}
	discover[micro.Ping](t, nc, 0, micro.PingVerb, "other")
}

func TestServiceEnds(t *testing.T) {
	p := newPair(t)
	nc := p.consumer.Conn
	for name, end := range map[string]func(s *service, v *stream.Service){
		"Stop":  func(_ *service, v *stream.Service) { v.Stop() },
		"Close": func(s *service, _ *stream.Service) { _ = s.Close() },
		"Drain": func(s *service, _ *stream.Service) {
			if err := s.Drain(t.Context()); err != nil {
				t.Error(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newService(t, p, stream.ServerParams{})
			v := newMicro(t, s, name)
			if _, err := v.Handle("echo", "svc."+name, echo); err != nil {
				t.Fatal(err)
			}
			if err := s.nc.FlushTimeout(patience); err != nil {
				t.Fatal(err)
			}
			verifyEcho(t, p.consumer, "svc."+name, 1, 10)
			discover[micro.Ping](t, nc, 1, micro.PingVerb, name)
			end(s, v)
			discover[micro.Ping](t, nc, 0, micro.PingVerb, name)
			if err := ask(t, p, "svc."+name, ""); !errors.Is(err, nats.ErrNoResponders) {
				t.Errorf("a request: %v", err)
			}
			if _, err := v.Handle("again", "svc.again", echo); !errors.Is(err, stream.ErrServerClosed) {
				t.Errorf("Handle: %v", err)
			}
			v.Stop()
			if name != "Stop" {
				if _, err := s.AddService("late", "1.0.0", "", nil); !errors.Is(err, stream.ErrServerClosed) {
					t.Errorf("AddService: %v", err)
				}
			}
		})
	}
}

func TestInvalidServiceIsRefused(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	for _, c := range [][2]string{{"", "1.0.0"}, {"a.b", "1.0.0"}, {"a b", "1.0.0"}, {"a", ""}, {"a", "1"}, {"a", "v1.0.0"}, {"a", "01.0.0"}} {
		if v, err := s.AddService(c[0], c[1], "", nil); err == nil || v != nil {
			t.Errorf("service %q %q: no error", c[0], c[1])
		}
	}
	v := newMicro(t, s, "valid")
	for _, c := range []struct {
		name, subject string
		h             stream.Handler
	}{{"", "svc.a", echo}, {"a.b", "svc.a", echo}, {"a", "a..b", echo}, {"a", "svc.a", nil}} {
		if r, err := v.Handle(c.name, c.subject, c.h); err == nil || r != nil {
			t.Errorf("endpoint %q %q: no error", c.name, c.subject)
		}
	}
	for i := range 2 {
		if _, err := v.Handle("a", "svc.a", echo); (err == nil) != (i == 0) {
			t.Errorf("endpoint a, time %d: %v", i+1, err)
		}
	}
	if a := discover[micro.Info](t, p.consumer.Conn, 1, micro.InfoVerb, "valid"); len(a[0].Endpoints) != 1 {
		t.Errorf("%+v", a)
	}
}

// Interceptors are code of the user, so no lock of the service is held when Handle calls them.
func TestInterceptorsMayUseTheServiceThatIsAddedTo(t *testing.T) {
	p := newPair(t)
	var v *stream.Service
	inner := false
	s := newService(t, p, stream.ServerParams{Interceptors: []func(stream.Handler) stream.Handler{func(next stream.Handler) stream.Handler {
		if !inner {
			inner = true
			if _, err := v.Handle("second", "svc.second", echo); err != nil {
				t.Error(err)
			}
		}
		return next
	}}})
	v = newMicro(t, s, "prices")
	waitFor(t, "Handle", func() {
		if _, err := v.Handle("first", "svc.first", echo); err != nil {
			t.Error(err)
		}
	})
	if err := s.nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	for _, subject := range []string{"svc.first", "svc.second"} {
		verifyEcho(t, p.consumer, subject, 3, 100)
	}
	for _, e := range discover[micro.Stats](t, p.consumer.Conn, 1, micro.StatsVerb, "prices")[0].Endpoints {
		if e.NumRequests != 1 {
			t.Errorf("%s: %d requests", e.Name, e.NumRequests)
		}
	}
}

// The recipe lets a monitor see the services, and nothing else.
func TestServiceRecipeLetsAMonitorWatch(t *testing.T) {
	p := newRestricted(t, recipe(t, "services"))
	srv := newService(t, p, stream.ServerParams{}, user("producer")...)
	v := newMicro(t, srv, "prices")
	if _, err := v.Handle("echo", "svc.echo", echo); err != nil {
		t.Fatal(err)
	}
	if err := srv.nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	alice := p.newClient(t, stream.ClientParams{}, user("alice")...)
	verifyEcho(t, alice, "svc.echo", 3, 100)
	denied := make(refusals, 64)
	monitor, err := p.server.Dial(append(user("monitor", denied.option()), nats.CustomInboxPrefix("_INBOX.monitor"))...)
	if err != nil {
		t.Fatal(err)
	}
	defer monitor.Close()
	if a := discover[micro.Stats](t, monitor, 1, micro.StatsVerb, "prices"); a[0].Endpoints[0].NumRequests != 1 {
		t.Errorf("%+v", a[0].Endpoints[0])
	}
	if err := monitor.Publish("svc.echo", nil); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a refusal", func() { <-denied })
}

// The handler of a service may stop it.
func TestServiceIsStoppedByItsHandler(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	v := newMicro(t, s, "once")
	if _, err := v.Handle("last", "svc.last", func(*stream.Writer, *stream.Request) error {
		v.Stop()
		return fmt.Errorf("no more")
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	if err := ask(t, p, "svc.last", ""); err == nil {
		t.Error("no error")
	}
}
