package streamotel_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	"go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	oteltrace "go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamotel"
	"github.com/natsstream/stream/streamtest"
)

const patience = time.Minute

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair is a client and a server whose spans and metrics are recorded.
type pair struct {
	client *stream.Client
	server *stream.Server
	nc     *nats.Conn
	spans  *tracetest.SpanRecorder
	meters *metric.ManualReader
}

func newPair(t *testing.T, url string) *pair {
	t.Helper()
	p := &pair{spans: tracetest.NewSpanRecorder(), meters: metric.NewManualReader()}
	opts := []streamotel.Option{
		streamotel.WithTracerProvider(trace.NewTracerProvider(trace.WithSpanProcessor(p.spans))),
		streamotel.WithMeterProvider(metric.NewMeterProvider(metric.WithReader(p.meters))),
		streamotel.WithPropagator(propagation.TraceContext{}),
	}
	dial := func() *nats.Conn {
		nc, err := nats.Connect(url, nats.IgnoreDiscoveredServers())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	p.nc = dial()
	var err error
	if p.client, err = stream.NewClient(stream.ClientParams{Conn: dial(), Interceptors: []func(stream.OpenFunc) stream.OpenFunc{streamotel.Client(opts...)}}); err != nil {
		t.Fatal(err)
	}
	if p.server, err = stream.NewServer(stream.ServerParams{
		Conn: p.nc, Logger: slog.New(slog.DiscardHandler), Interceptors: []func(stream.Handler) stream.Handler{streamotel.Server(opts...)},
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.client.Close()
		_ = p.server.Close()
	})
	return p
}

func (p *pair) handle(t *testing.T, h stream.Handler) {
	t.Helper()
	if _, err := p.server.Handle("svc", h); err != nil {
		t.Fatal(err)
	}
	if err := p.nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
}

// read opens a stream, sends records of three bytes, and reads it to its end.
func (p *pair) read(t *testing.T, records int) (int, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := p.client.Open(ctx, "svc", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	sent := make(chan error, 1)
	go func() { // while the answers are read: if both ends only wrote, both would wait for credit
		for range records {
			if _, err := s.Write([]byte("abc")); err != nil {
				sent <- err
				return
			}
		}
		if records > 0 {
			sent <- s.CloseSend()
		} else {
			sent <- nil
		}
	}()
	for n := 0; ; n++ {
		if _, err := s.Recv(); err == io.EOF {
			return n, <-sent
		} else if err != nil {
			return n, err
		}
	}
}

// ended waits for n spans, and returns that of the consumer and that of the producer.
func (p *pair) ended(t *testing.T, n int) (client, server trace.ReadOnlySpan) {
	t.Helper()
	for end := time.Now().Add(patience); len(p.spans.Ended()) < n; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d spans have ended, want %d", len(p.spans.Ended()), n)
		}
	}
	for _, s := range p.spans.Ended() {
		if s.SpanKind() == oteltrace.SpanKindClient {
			client = s
		} else {
			server = s
		}
	}
	return client, server
}

func value(s trace.ReadOnlySpan, key string) attribute.Value {
	for _, a := range s.Attributes() {
		if string(a.Key) == key {
			return a.Value
		}
	}
	return attribute.Value{}
}

// echo sends back each record, and says in a header whether it has the span.
func echo(w *stream.Writer, r *stream.Request) error {
	if !oteltrace.SpanContextFromContext(r.Context()).IsValid() {
		return errors.New("the handler has no span")
	}
	for rec, err := range r.All() {
		if err != nil {
			return err
		}
		if _, err := w.Write(rec); err != nil {
			return err
		}
	}
	return nil
}

func verifySpans(t *testing.T, p *pair, records int) {
	t.Helper()
	client, server := p.ended(t, 2)
	if client == nil || server == nil || server.Parent().SpanID() != client.SpanContext().SpanID() || !server.Parent().IsRemote() {
		t.Fatalf("the spans are not child and parent: %v, %v", client, server)
	}
	for _, s := range []trace.ReadOnlySpan{client, server} {
		if s.Name() != "stream svc" || s.Status().Code == codes.Error || value(s, "messaging.destination.name").AsString() != "svc" || len(s.Events()) != 0 {
			t.Errorf("%v %v %v", s.Name(), s.Status(), s.Attributes())
		}
		for _, key := range []string{"stream.records.received", "stream.records.sent"} {
			if n := value(s, key).AsInt64(); n != int64(records) {
				t.Errorf("%v: %s %d, want %d", s.SpanKind(), key, n, records)
			}
		}
	}
}

func TestOneSpanForAStream(t *testing.T) {
	p := newPair(t, streamtest.Run(t).URL())
	p.handle(t, echo)
	if n, err := p.read(t, 1000); n != 1000 || err != nil {
		t.Fatal(n, err)
	}
	verifySpans(t, p, 1000)
}

// Retransmissions make no further spans, and count no record twice.
func TestOneSpanUnderLoss(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	i := streamtest.RunInterceptor(t, streamtest.Run(t).URL(), streamtest.Only(streamtest.HasPrefix(0xF5),
		streamtest.Drop(0.02, rng), streamtest.Duplicate(0.05, rng), streamtest.Reorder(0.05, 3, rng)))
	p := newPair(t, i.URL())
	p.handle(t, echo)
	if n, err := p.read(t, 20_000); n != 20_000 || err != nil {
		t.Fatal(n, err)
	}
	verifySpans(t, p, 20_000)
}

func TestFailuresAreErrorsOfSpans(t *testing.T) {
	for name, c := range map[string]struct {
		handler        stream.Handler
		client, server string
	}{
		"error": {func(*stream.Writer, *stream.Request) error { return errors.New("broken") }, "5000", "*errors.errorString"},
		"code":  {func(*stream.Writer, *stream.Request) error { return &stream.CloseError{Code: 4242} }, "4242", "4242"},
		"panic": {func(*stream.Writer, *stream.Request) error { panic("broken") }, "5000", "*errors.errorString"},
		"normal": {func(*stream.Writer, *stream.Request) error {
			return &stream.CloseError{Code: stream.CloseNormalClosure}
		}, "", ""},
		"no responders": {nil, "no_responders", ""},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, streamtest.Run(t).URL())
			n := 1
			if c.handler != nil {
				p.handle(t, c.handler)
				n = 2
			}
			if _, err := p.read(t, 0); (err == nil) != (c.client == "") {
				t.Errorf("%v", err)
			}
			client, server := p.ended(t, n)
			if got := value(client, "error.type").AsString(); got != c.client || (client.Status().Code == codes.Error) != (got != "") {
				t.Errorf("client: %q %v, want %q", got, client.Status(), c.client)
			}
			if server != nil && value(server, "error.type").AsString() != c.server {
				t.Errorf("server: %q, want %q", value(server, "error.type").AsString(), c.server)
			}
		})
	}
}

func TestInvalidOpenEndsItsSpan(t *testing.T) {
	p := newPair(t, streamtest.Run(t).URL())
	if _, err := p.client.Open(t.Context(), "a b", nil); err == nil {
		t.Fatal("no error")
	}
	if client, _ := p.ended(t, 1); client.Status().Code != codes.Error {
		t.Errorf("%v", client.Status())
	}
}

func TestMetrics(t *testing.T) {
	p := newPair(t, streamtest.Run(t).URL())
	p.handle(t, echo)
	for range 3 {
		if n, err := p.read(t, 10); n != 10 || err != nil {
			t.Fatal(n, err)
		}
	}
	p.ended(t, 6)
	var all metricdata.ResourceMetrics
	if err := p.meters.Collect(t.Context(), &all); err != nil {
		t.Fatal(err)
	}
	got := map[string]int64{}
	for _, s := range all.ScopeMetrics {
		for _, m := range s.Metrics {
			switch d := m.Data.(type) {
			case metricdata.Sum[int64]:
				for _, point := range d.DataPoints {
					direction, _ := point.Attributes.Value("stream.direction")
					got[m.Name+" "+direction.AsString()] += point.Value
				}
			case metricdata.Histogram[float64]:
				for _, point := range d.DataPoints {
					got[m.Name] += int64(point.Count)
				}
			}
		}
	}
	for name, want := range map[string]int64{
		"stream.client.duration": 3, "stream.server.duration": 3, "stream.client.active ": 0, "stream.server.active ": 0,
		"stream.client.records received": 30, "stream.client.records sent": 30, "stream.server.records received": 30,
		"stream.client.bytes received": 90, "stream.server.bytes sent": 90,
	} {
		if n, ok := got[name]; !ok || n != want {
			t.Errorf("%s is %d (known: %v), want %d", name, n, ok, want)
		}
	}
}

func TestSubjectsCanBeShortened(t *testing.T) {
	spans := tracetest.NewSpanRecorder()
	open := streamotel.Client(streamotel.WithTracerProvider(trace.NewTracerProvider(trace.WithSpanProcessor(spans))),
		streamotel.WithSubject(func(string) string { return "orders.*" }))(
		func(context.Context, *nats.Msg, ...stream.OpenOption) (*stream.Stream, error) {
			return nil, errors.New("none")
		})
	if _, err := open(t.Context(), &nats.Msg{Subject: "orders.17", Header: nats.Header{}}); err == nil {
		t.Error("no error")
	}
	if all := spans.Ended(); len(all) != 1 || all[0].Name() != "stream orders.*" {
		t.Errorf("%v", all)
	}
}

func Example() {
	// Give the interceptors to the client and the server when they are made.
	_ = func(nc *nats.Conn) error {
		client, err := stream.NewClient(stream.ClientParams{Conn: nc, Interceptors: []func(stream.OpenFunc) stream.OpenFunc{streamotel.Client()}})
		if err != nil {
			return err
		}
		server, err := stream.NewServer(stream.ServerParams{Conn: nc, Interceptors: []func(stream.Handler) stream.Handler{streamotel.Server()}})
		if err != nil {
			return err
		}
		fmt.Println(client.Stats(), server.Stats())
		return nil
	}
}
