package fastconn_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/fastconn"
	"github.com/natsstream/stream/streamtest"
)

// bothKinds runs f with options for a connection of nats.go, and with those for a fast one. Both are for the user
// server, and expect that subscriptions are refused.
func bothKinds(t *testing.T, f func(t *testing.T, opts ...nats.Option)) {
	user := []nats.Option{nats.UserInfo("server", "secret-of-server"), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})}
	t.Run("nats.go", func(t *testing.T) { f(t, user...) })
	t.Run("fast", func(t *testing.T) { f(t, append(user, fastconn.Enable())...) })
}

// permitted returns the configuration of a server with the users server and other. The first may not subscribe to the
// given subjects.
func permitted(denied ...string) string {
	return fmt.Sprintf(`authorization { users = [
		{ user: server, password: secret-of-server, permissions: { publish: ">", subscribe: { allow: ">", deny: %s } } }
		{ user: other, password: secret-of-other }
	] }`, strings.ReplaceAll(fmt.Sprintf("%q", append(denied, "never")), " ", ", "))
}

// reload gives a running server another configuration. Its connections stay up.
func reload(t *testing.T, srv *streamtest.Server, config string) {
	t.Helper()
	o := new(server.Options)
	if err := o.ProcessConfigString(config); err != nil {
		t.Fatal(err)
	}
	o.Host, o.Port, o.NoLog, o.NoSigs = "127.0.0.1", srv.Raw().Addr().(*net.TCPAddr).Port, true, true
	if err := srv.Raw().ReloadOptions(o); err != nil {
		t.Fatal(err)
	}
}

// logger is a slog.Handler that calls line for each line.
type logger struct {
	line func(text string)
}

func (l *logger) Enabled(context.Context, slog.Level) bool { return true }
func (l *logger) WithAttrs([]slog.Attr) slog.Handler       { return l }
func (l *logger) WithGroup(string) slog.Handler            { return l }
func (l *logger) Handle(_ context.Context, r slog.Record) error {
	text := r.Message
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "subject" {
			text += ": " + a.Value.String()
		}
		return true
	})
	l.line(text)
	return nil
}

// A program may send its log over NATS, and wait until a line is stored, on the connection that the line is about. The
// requests that arrive before the answer must not wait for the logger.
func TestLoggerMayWaitForAnswersOnTheConnectionOfItsServer(t *testing.T) {
	bothKinds(t, func(t *testing.T, opts ...nats.Option) {
		srv := streamtest.Run(t, streamtest.WithConfig(permitted()))
		nc := connect(t, srv.URL(), opts...)
		other := connect(t, srv.URL(), nats.UserInfo("other", "secret-of-other"))
		client := newClient(t, other)
		if _, err := other.Subscribe("log", func(m *nats.Msg) { _ = m.Respond(nil) }); err != nil {
			t.Fatal(err)
		}
		if err := other.Flush(); err != nil {
			t.Fatal(err)
		}
		// A request is on its way to the server before the line is, so it arrives before the answer to the line.
		send := func(text string) error {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			st, err := client.Open(ctx, "svc", nil)
			if err != nil {
				return fmt.Errorf("open a stream: %w", err)
			}
			defer st.Close()
			if _, err := st.Recv(); ctx.Err() != nil {
				return fmt.Errorf("the stream of a request gets no answer: %w", err)
			}
			if _, err := nc.RequestWithContext(ctx, "log", []byte(text)); err != nil {
				return fmt.Errorf("the line gets no answer: %w", err)
			}
			return nil
		}
		var mu sync.Mutex
		lines := make(map[string]int)
		s, err := stream.NewServer(stream.ServerParams{Conn: nc, Logger: slog.New(&logger{func(text string) {
			if err := send(text); err != nil {
				t.Errorf("line %q: %v", text, err)
			}
			mu.Lock()
			defer mu.Unlock()
			lines[text]++
		}})})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		for _, subject := range []string{"svc", "second"} {
			if _, err := s.HandleQueue(subject, "q", func(w *stream.Writer, r *stream.Request) error { return nil }); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := s.AddService("prices", "1.0.0", "", nil); err != nil {
			t.Fatal(err)
		}
		if err := nc.Flush(); err != nil {
			t.Fatal(err)
		}
		for _, step := range []struct {
			denied string
			lines  []string
		}{
			{"second", []string{"stream: a subject is not served: second"}},
			{"", []string{"stream: a subject is served again: second"}},
			{"$SRV.>", []string{"stream: tools do not find the services of the server"}},
			{"", nil},
			{"_SINBOX.>", []string{"stream: the server serves nothing until its inbox is heard"}},
			{"", []string{"stream: the server's inbox is heard again"}},
		} {
			mu.Lock()
			clear(lines)
			mu.Unlock()
			reload(t, srv, permitted(strings.Fields(step.denied)...))
			for _, want := range step.lines {
				eventually(t, "the logger has the line "+want, func() bool {
					mu.Lock()
					defer mu.Unlock()
					for text := range lines {
						if strings.HasPrefix(text, want) {
							return true
						}
					}
					return t.Failed()
				})
			}
			if t.Failed() {
				t.Fatalf("with %q denied", step.denied)
			}
		}
	})
}

// A logger that takes no line holds neither streams up nor the end of the server.
func TestStuckLoggerHoldsNothingUp(t *testing.T) {
	bothKinds(t, func(t *testing.T, opts ...nats.Option) {
		srv := streamtest.Run(t, streamtest.WithConfig(permitted("second")))
		nc := connect(t, srv.URL(), opts...)
		client := newClient(t, connect(t, srv.URL(), nats.UserInfo("other", "secret-of-other")))
		logging, release := make(chan struct{}, 100), make(chan struct{})
		defer close(release)
		s, err := stream.NewServer(stream.ServerParams{Conn: nc, Logger: slog.New(&logger{func(string) {
			logging <- struct{}{}
			<-release
		}})})
		if err != nil {
			t.Fatal(err)
		}
		refused := make([]*stream.Registration, 0, 2)
		for _, subject := range []string{"svc", "second", "second"} {
			r, err := s.Handle(subject, func(w *stream.Writer, r *stream.Request) error {
				_, err := io.Copy(w, onlyReader{r})
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			if subject == "second" {
				refused = append(refused, r)
			}
		}
		<-logging
		for _, r := range refused { // the second refusal does not wait for the line about the first
			eventually(t, "the registration knows the refusal", func() bool { return r.Err() != nil })
		}
		transfer(t, client, "svc", 100_000)
		closed := make(chan struct{})
		go func() {
			defer close(closed)
			_ = s.Close()
		}()
		eventually(t, "the server is closed", func() bool {
			select {
			case <-closed:
				return true
			default:
				return false
			}
		})
	})
}
