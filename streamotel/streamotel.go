// Package streamotel reports streams to OpenTelemetry: one span for each stream at each end, never one for a record,
// and metrics. The context of the consumer's span travels in the headers of the request, so the span of the producer is
// its child.
//
//	client, err := stream.NewClient(stream.ClientParams{
//		Conn:         nc,
//		Interceptors: []func(stream.OpenFunc) stream.OpenFunc{streamotel.Client()},
//	})
//	server, err := stream.NewServer(stream.ServerParams{
//		Conn:         nc,
//		Interceptors: []func(stream.Handler) stream.Handler{streamotel.Server()},
//	})
//
// # Spans
//
// The span of a consumer begins when the stream is opened, and ends when the stream has ended there. The span of a
// producer begins before the handler is called, and ends when the handler returns. The name of a span is "stream" and
// the subject. It has these attributes. Those that the semantic conventions for messaging define have the names of the
// conventions:
//
//   - messaging.system: nats
//   - messaging.destination.name: the subject of the request
//   - stream.records.received, stream.records.sent, stream.bytes.received, stream.bytes.sent: the records and bytes
//     that this end read and wrote
//   - error.type: of a stream that failed, the close code as a number, or the kind of the error
//
// A consumer that closes its stream before the end causes no error at its own end. At the producer, error.type is 4001
// if the handler returns the error of a write.
//
// # Metrics
//
//   - stream.client.duration, stream.server.duration: histogram of the lives of streams in seconds
//   - stream.client.active, stream.server.active: how many streams are open
//   - stream.client.records, stream.server.records: counter of records, with the attribute stream.direction, received
//     or sent
//   - stream.client.bytes, stream.server.bytes: the same in bytes
//
// They have the attributes messaging.system, messaging.destination.name and error.type. A subject with a changing part
// makes as many series as the part has values: shorten it by [WithSubject].
package streamotel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"github.com/natsstream/stream"
)

const scope = "github.com/natsstream/stream/streamotel"

// Option configures [Client] or [Server].
type Option func(*config)

type config struct {
	tracers    trace.TracerProvider
	meters     metric.MeterProvider
	propagator propagation.TextMapPropagator
	subject    func(string) string
}

// WithTracerProvider sets the provider of the tracer: that of package otel by default.
func WithTracerProvider(p trace.TracerProvider) Option { return func(c *config) { c.tracers = p } }

// WithMeterProvider sets the provider of the meter: that of package otel by default.
func WithMeterProvider(p metric.MeterProvider) Option { return func(c *config) { c.meters = p } }

// WithPropagator sets how contexts travel: the propagator of package otel by default.
func WithPropagator(p propagation.TextMapPropagator) Option {
	return func(c *config) { c.propagator = p }
}

// WithSubject sets a function that returns the subject to report. Let it replace parts that change, such as the number
// of an order.
func WithSubject(f func(subject string) string) Option { return func(c *config) { c.subject = f } }

// observer reports the streams of one end.
type observer struct {
	config
	tracer   trace.Tracer
	kind     trace.SpanKind
	duration metric.Float64Histogram
	active   metric.Int64UpDownCounter
	records  metric.Int64Counter
	bytes    metric.Int64Counter
}

func newObserver(side string, kind trace.SpanKind, opts []Option) *observer {
	o := &observer{kind: kind, config: config{
		tracers: otel.GetTracerProvider(), meters: otel.GetMeterProvider(), propagator: otel.GetTextMapPropagator(),
		subject: func(s string) string { return s },
	}}
	for _, set := range opts {
		set(&o.config)
	}
	o.tracer = o.tracers.Tracer(scope)
	m := o.meters.Meter(scope)
	var errs [4]error
	o.duration, errs[0] = m.Float64Histogram("stream."+side+".duration", metric.WithUnit("s"), metric.WithDescription("Lives of streams."))
	o.active, errs[1] = m.Int64UpDownCounter("stream."+side+".active", metric.WithUnit("{stream}"), metric.WithDescription("Streams that are open."))
	o.records, errs[2] = m.Int64Counter("stream."+side+".records", metric.WithUnit("{record}"), metric.WithDescription("Records of streams that have ended."))
	o.bytes, errs[3] = m.Int64Counter("stream."+side+".bytes", metric.WithUnit("By"), metric.WithDescription("Bytes of records of streams that have ended."))
	if err := errors.Join(errs[:]...); err != nil {
		otel.Handle(err) // the instruments work, or do nothing
	}
	return o
}

// begin reports a stream on subject that begins, and returns a function that reports its end.
func (o *observer) begin(ctx context.Context, subject string) (context.Context, func(stream.Totals, error)) {
	subject = o.subject(subject)
	common := []attribute.KeyValue{attribute.String("messaging.system", "nats"), attribute.String("messaging.destination.name", subject)}
	start := time.Now()
	ctx, span := o.tracer.Start(ctx, "stream "+subject, trace.WithSpanKind(o.kind), trace.WithAttributes(common...), trace.WithTimestamp(start))
	o.active.Add(ctx, 1, metric.WithAttributes(common...))
	return ctx, func(t stream.Totals, err error) {
		o.active.Add(ctx, -1, metric.WithAttributes(common...))
		for _, d := range []struct {
			name           string
			records, bytes uint64
		}{{"received", t.RecordsIn, t.BytesIn}, {"sent", t.RecordsOut, t.BytesOut}} {
			span.SetAttributes(attribute.Int64("stream.records."+d.name, int64(d.records)), attribute.Int64("stream.bytes."+d.name, int64(d.bytes)))
			if d.records > 0 {
				attrs := metric.WithAttributes(append(common[:2:2], attribute.String("stream.direction", d.name))...)
				o.records.Add(ctx, int64(d.records), attrs)
				o.bytes.Add(ctx, int64(d.bytes), attrs)
			}
		}
		measured := common[:2:2]
		if kind := errorType(err); kind != "" {
			span.SetAttributes(attribute.String("error.type", kind))
			span.SetStatus(codes.Error, err.Error())
			measured = append(measured, attribute.String("error.type", kind))
		}
		end := time.Now()
		o.duration.Record(ctx, end.Sub(start).Seconds(), metric.WithAttributes(measured...))
		span.End(trace.WithTimestamp(end))
	}
}

// errorType returns the kind of the error of a stream, empty for one that did not fail.
func errorType(err error) string {
	switch {
	case err == nil || errors.Is(err, io.EOF) || errors.Is(err, stream.ErrClosed):
		return ""
	case errors.Is(err, nats.ErrNoResponders):
		return "no_responders"
	case errors.Is(err, context.DeadlineExceeded):
		return "deadline_exceeded"
	case errors.Is(err, context.Canceled):
		return "canceled"
	}
	if ce, ok := errors.AsType[*stream.CloseError](err); ok {
		if ce.Code == stream.CloseNormalClosure {
			return ""
		}
		return strconv.Itoa(ce.Code)
	}
	return fmt.Sprintf("%T", err)
}

// Client returns an interceptor for [stream.ClientParams] that reports the streams of a client.
func Client(opts ...Option) func(stream.OpenFunc) stream.OpenFunc {
	o := newObserver("client", trace.SpanKindClient, opts)
	return func(next stream.OpenFunc) stream.OpenFunc {
		return func(ctx context.Context, msg *nats.Msg, opts ...stream.OpenOption) (*stream.Stream, error) {
			ctx, end := o.begin(ctx, msg.Subject)
			o.propagator.Inject(ctx, carrier(msg.Header))
			s, err := next(ctx, msg, opts...)
			if err != nil {
				end(stream.Totals{}, err)
				return s, err
			}
			context.AfterFunc(s.Context(), func() { end(s.Totals(), context.Cause(s.Context())) })
			return s, nil
		}
	}
}

// Server returns an interceptor for [stream.ServerParams] that reports the streams of handlers. A handler finds its
// span by trace.SpanFromContext in the context of its request.
func Server(opts ...Option) func(stream.Handler) stream.Handler {
	o := newObserver("server", trace.SpanKindServer, opts)
	return func(next stream.Handler) stream.Handler {
		return func(w *stream.Writer, r *stream.Request) (err error) {
			ctx, end := o.begin(o.propagator.Extract(r.Context(), carrier(r.Header)), r.Subject)
			returned := false
			defer func() { // also if the handler panics
				if !returned {
					err = errPanicked
				}
				end(w.Totals(), err)
			}()
			err = next(w, r.WithContext(ctx))
			returned = true
			return err
		}
	}
}

var errPanicked = errors.New("the handler panicked")

// carrier carries a context in the headers of a request.
type carrier nats.Header

func (c carrier) Get(key string) string { return nats.Header(c).Get(key) }
func (c carrier) Set(key, value string) { nats.Header(c).Set(key, value) }

func (c carrier) Keys() []string {
	keys := make([]string, 0, len(c))
	for k := range c {
		keys = append(keys, k)
	}
	return keys
}
