// Package streamprom exports metrics of streams to Prometheus.
//
//	metrics := streamprom.New()
//	prometheus.MustRegister(metrics)
//
//	client, err := stream.NewClient(stream.ClientParams{Conn: nc, Hooks: metrics.Hooks()})
//	server, err := stream.NewServer(stream.ServerParams{Conn: nc, Hooks: metrics.Hooks()})
//	metrics.Watch("orders", server.Stats)
//
// # Metrics of streams
//
// The metrics of streams have two labels: subject, the subject of the request, and side, which is consumer or producer.
// The subject is empty for Writers of stream.NewWriter, which do not know it.
//
//   - stream_opened_total: streams that were opened
//   - stream_open: streams that are open
//   - stream_closed_total, with the label code: streams that have ended, 1000 for the normal end, and the close code
//     otherwise. Other values are no_responders, deadline_exceeded, canceled, closed (the consumer left before the
//     end), and error.
//   - stream_duration_seconds: histogram of the lives of streams
//   - stream_first_record_seconds: histogram of the time until the first record
//   - stream_received_bytes_total, stream_sent_bytes_total, stream_received_records_total, stream_sent_records_total:
//     of streams that have ended
//   - stream_retransmitted_packets_total
//   - stream_reconnects_total: streams that went on after a reconnect of this end
//
// The last two begin at 0 with the first stream of a subject and side.
//
// # Metrics of clients and servers
//
// Watch adds the fields of stream.Stats, with the label endpoint:
//
//   - stream_endpoint_streams, stream_endpoint_reserved_bytes, stream_endpoint_kept_bytes: what is in use
//   - stream_endpoint_fast: 1 while packets travel past nats.go
//   - stream_endpoint_sent_packets_total, stream_endpoint_sent_packet_bytes_total, and the same for received
//   - stream_endpoint_received_records_total
//   - stream_endpoint_sent_envelopes_total, stream_endpoint_received_envelopes_total
//   - stream_endpoint_resent_packets_total, stream_endpoint_unsent_control_total,
//     stream_endpoint_unreported_errors_total
//   - stream_endpoint_dropped_total, with the label reason
//
// The folder grafana beside this package has a dashboard with all of these metrics.
//
// # Cardinality
//
// Each subject makes series of its own. If a part of your subjects changes, shorten them by [WithSubject]. After 1,000
// subjects, the metrics count streams of further subjects as "other", so that a stranger cannot fill your Prometheus.
// No label holds a token.
package streamprom

import (
	"context"
	"errors"
	"strconv"
	"sync"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/natsstream/stream"
)

// maxSubjects is how many subjects have series of their own.
const maxSubjects = 1000

// other is the subject of all further streams.
const other = "other"

// Option configures [New].
type Option func(*Metrics)

// WithSubject sets a function that returns the subject to report. Let it replace parts that change, such as the number
// of an order.
func WithSubject(f func(subject string) string) Option { return func(m *Metrics) { m.subject = f } }

// WithDurationBuckets sets the bounds of the histograms, in seconds: from 1 ms to 1,000 s, three for each power of ten,
// by default.
func WithDurationBuckets(seconds []float64) Option { return func(m *Metrics) { m.buckets = seconds } }

// Metrics is a prometheus.Collector of streams. It is safe for use by many goroutines at once.
type Metrics struct {
	subject func(string) string
	buckets []float64

	opened, closed, receivedBytes, sentBytes, receivedRecords, sentRecords, resent, reconnects *prometheus.CounterVec
	open                                                                                       *prometheus.GaugeVec
	duration, first                                                                            *prometheus.HistogramVec

	mu        sync.Mutex
	subjects  map[string]bool
	endpoints map[string]func() stream.Stats
}

var _ prometheus.Collector = (*Metrics)(nil)

// New returns metrics without streams. Register them with Prometheus.
func New(opts ...Option) *Metrics {
	m := &Metrics{
		subject:  func(s string) string { return s },
		subjects: map[string]bool{}, endpoints: map[string]func() stream.Stats{},
	}
	for low := 1e-3; low < 1e3; low *= 10 {
		m.buckets = append(m.buckets, low, 2.5*low, 5*low)
	}
	m.buckets = append(m.buckets, 1e3)
	for _, set := range opts {
		set(m)
	}
	counter := func(name, help string, more ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "stream", Name: name, Help: help}, append([]string{"subject", "side"}, more...))
	}
	histogram := func(name, help string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: "stream", Name: name, Help: help, Buckets: m.buckets}, []string{"subject", "side"})
	}
	m.opened = counter("opened_total", "Streams that were opened.")
	m.closed = counter("closed_total", "Streams that have ended, by close code.", "code")
	m.receivedBytes = counter("received_bytes_total", "Bytes of records that streams which have ended received.")
	m.sentBytes = counter("sent_bytes_total", "Bytes of records that streams which have ended sent.")
	m.receivedRecords = counter("received_records_total", "Records that streams which have ended received.")
	m.sentRecords = counter("sent_records_total", "Records that streams which have ended sent.")
	m.resent = counter("retransmitted_packets_total", "Packets that were retransmitted, because the peer missed them.")
	m.reconnects = counter("reconnects_total", "Streams that went on after a reconnect of this end.")
	m.open = prometheus.NewGaugeVec(prometheus.GaugeOpts{Namespace: "stream", Name: "open", Help: "Streams that are open."}, []string{"subject", "side"})
	m.duration = histogram("duration_seconds", "Lives of streams in seconds.")
	m.first = histogram("first_record_seconds", "Time until the first record in seconds.")
	return m
}

func (m *Metrics) vectors() []prometheus.Collector {
	return []prometheus.Collector{
		m.opened, m.closed, m.receivedBytes, m.sentBytes, m.receivedRecords, m.sentRecords, m.resent, m.reconnects, m.open, m.duration, m.first,
	}
}

// Hooks returns hooks for the parameters of clients and servers. Any number of them may share the metrics.
func (m *Metrics) Hooks() stream.Hooks {
	return stream.Hooks{
		Opened: func(i stream.StreamInfo) {
			l := m.labels(i)
			m.opened.WithLabelValues(l...).Inc()
			m.open.WithLabelValues(l...).Inc()
			// These counters begin at zero, so that Prometheus sees their first event as an increase.
			m.resent.WithLabelValues(l...)
			m.reconnects.WithLabelValues(l...)
		},
		FirstRecord: func(i stream.StreamInfo) {
			m.first.WithLabelValues(m.labels(i)...).Observe(i.Elapsed.Seconds())
		},
		Closed: func(i stream.StreamInfo, t stream.Totals, err error) {
			l := m.labels(i)
			m.open.WithLabelValues(l...).Dec()
			m.closed.WithLabelValues(append(l, codeOf(err))...).Inc()
			m.duration.WithLabelValues(l...).Observe(i.Elapsed.Seconds())
			m.receivedBytes.WithLabelValues(l...).Add(float64(t.BytesIn))
			m.sentBytes.WithLabelValues(l...).Add(float64(t.BytesOut))
			m.receivedRecords.WithLabelValues(l...).Add(float64(t.RecordsIn))
			m.sentRecords.WithLabelValues(l...).Add(float64(t.RecordsOut))
		},
		Retransmitted: func(i stream.StreamInfo, packets int) {
			m.resent.WithLabelValues(m.labels(i)...).Add(float64(packets))
		},
		Reconnected: func(i stream.StreamInfo) { m.reconnects.WithLabelValues(m.labels(i)...).Inc() },
	}
}

// labels returns the subject and the side of a stream. The slice has no spare capacity.
func (m *Metrics) labels(i stream.StreamInfo) []string {
	side := "consumer"
	if i.Producer {
		side = "producer"
	}
	subject := m.subject(i.Subject)
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.subjects[subject] {
		if len(m.subjects) >= maxSubjects {
			subject = other
		} else {
			m.subjects[subject] = true
		}
	}
	return []string{subject, side}
}

// goingAway is the label of streams that ended because their client or server was closed.
var goingAway = strconv.Itoa(stream.CloseGoingAway)

// codeOf returns the label for the end of a stream.
func codeOf(err error) string {
	if err == nil {
		return strconv.Itoa(stream.CloseNormalClosure)
	}
	for target, label := range map[error]string{
		nats.ErrNoResponders: "no_responders", context.DeadlineExceeded: "deadline_exceeded", context.Canceled: "canceled", stream.ErrClosed: "closed",
		stream.ErrClientClosed: goingAway, stream.ErrServerClosed: goingAway,
	} {
		if errors.Is(err, target) {
			return label
		}
	}
	if ce, ok := errors.AsType[*stream.CloseError](err); ok {
		return strconv.Itoa(ce.Code)
	}
	return "error"
}

// Watch adds the counters of a client or server under a name. stats is the Stats method of the client or server. A
// second Watch with the same name replaces the first. A nil stats removes the name: remove a client or server that was
// closed.
func (m *Metrics) Watch(name string, stats func() stream.Stats) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if stats == nil {
		delete(m.endpoints, name)
		return
	}
	m.endpoints[name] = stats
}

// endpointMetrics are the metrics that Watch adds, one for each field of stream.Stats.
var endpointMetrics = []endpointMetric{
	gauge("streams", "Streams and writers that peers can reach now.", func(s stream.Stats) float64 { return float64(s.Streams) }),
	gauge("reserved_bytes", "Bytes of packets that arrived and were not read, and of records in pieces.", func(s stream.Stats) float64 { return float64(s.Reserved) }),
	gauge("kept_bytes", "Bytes of packets that peers have not acknowledged.", func(s stream.Stats) float64 { return float64(s.Kept) }),
	gauge("fast", "1 while packets travel past nats.go, otherwise 0.", func(s stream.Stats) float64 {
		if s.Fast {
			return 1
		}
		return 0
	}),
	counter("sent_packets_total", "Packets of records that were published, each once.", func(s stream.Stats) uint64 { return s.PacketsSent }),
	counter("sent_packet_bytes_total", "Bytes of these packets.", func(s stream.Stats) uint64 { return s.BytesSent }),
	counter("received_packets_total", "Packets of records that were accepted, each once.", func(s stream.Stats) uint64 { return s.PacketsReceived }),
	counter("received_packet_bytes_total", "Bytes of these packets.", func(s stream.Stats) uint64 { return s.BytesReceived }),
	counter("received_records_total", "Records that reads returned.", func(s stream.Stats) uint64 { return s.RecordsReceived }),
	counter("sent_envelopes_total", "Messages with packets of several streams.", func(s stream.Stats) uint64 { return s.EnvelopesSent }),
	counter("received_envelopes_total", "Messages with packets of several streams.", func(s stream.Stats) uint64 { return s.EnvelopesReceived }),
	counter("resent_packets_total", "Packets that were retransmitted.", func(s stream.Stats) uint64 { return s.PacketsResent }),
	counter("unsent_control_total", "Control packets that NATS did not accept.", func(s stream.Stats) uint64 { return s.UnsentControl }),
	counter("unreported_errors_total", "Failures of handlers after the normal end was published.", func(s stream.Stats) uint64 { return s.UnreportedErrors }),
	dropped("no_room", func(s stream.Stats) uint64 { return s.DroppedNoRoom }),
	dropped("early", func(s stream.Stats) uint64 { return s.DroppedEarly }),
	dropped("request", func(s stream.Stats) uint64 { return s.DroppedRequest }),
	dropped("stray", func(s stream.Stats) uint64 { return s.DroppedStray }),
	dropped("unknown", func(s stream.Stats) uint64 { return s.DroppedUnknown }),
	dropped("duplicate", func(s stream.Stats) uint64 { return s.DroppedDuplicate }),
	dropped("foreign", func(s stream.Stats) uint64 { return s.DroppedForeign }),
	dropped("malformed", func(s stream.Stats) uint64 { return s.DroppedMalformed }),
	dropped("pub_ack", func(s stream.Stats) uint64 { return s.DroppedPubAck }),
	dropped("control", func(s stream.Stats) uint64 { return s.DroppedControl }),
	dropped("events", func(s stream.Stats) uint64 { return s.DroppedEvents }),
}

// endpointMetric is one metric of a client or server, or one reason of the metric of dropped messages.
type endpointMetric struct {
	desc   *prometheus.Desc
	kind   prometheus.ValueType
	labels []string // after the label endpoint
	value  func(stream.Stats) float64
}

func gauge(name, help string, value func(stream.Stats) float64) endpointMetric {
	return endpointMetric{desc: describe(name, help), kind: prometheus.GaugeValue, value: value}
}

func counter(name, help string, value func(stream.Stats) uint64) endpointMetric {
	return endpointMetric{
		desc: describe(name, help), kind: prometheus.CounterValue,
		value: func(s stream.Stats) float64 { return float64(value(s)) },
	}
}

var endpointDropped = describe("dropped_total", "Messages that were dropped, by reason.", "reason")

func dropped(reason string, value func(stream.Stats) uint64) endpointMetric {
	return endpointMetric{
		desc: endpointDropped, kind: prometheus.CounterValue, labels: []string{reason},
		value: func(s stream.Stats) float64 { return float64(value(s)) },
	}
}

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("stream_endpoint_"+name, help, append([]string{"endpoint"}, labels...), nil)
}

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(descs chan<- *prometheus.Desc) {
	for _, v := range m.vectors() {
		v.Describe(descs)
	}
	for _, e := range endpointMetrics {
		if e.desc != endpointDropped { // once, below
			descs <- e.desc
		}
	}
	descs <- endpointDropped
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(metrics chan<- prometheus.Metric) {
	for _, v := range m.vectors() {
		v.Collect(metrics)
	}
	m.mu.Lock()
	stats := make(map[string]stream.Stats, len(m.endpoints))
	for name, f := range m.endpoints {
		stats[name] = f()
	}
	m.mu.Unlock()
	for name, s := range stats {
		for _, e := range endpointMetrics {
			metrics <- prometheus.MustNewConstMetric(e.desc, e.kind, e.value(s), append([]string{name}, e.labels...)...)
		}
	}
}
