package streamprom_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/prometheus/common/expfmt"
	"go.uber.org/goleak"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamprom"
	"github.com/natsstream/stream/streamtest"
)

const patience = time.Minute

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair returns a client and a server that share the metrics, and a function that ends both.
func pair(t *testing.T, url string, m *streamprom.Metrics) (client *stream.Client, end func()) {
	t.Helper()
	dial := func() *nats.Conn {
		nc, err := nats.Connect(url, nats.IgnoreDiscoveredServers())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	client, err := stream.NewClient(stream.ClientParams{Conn: dial(), Hooks: m.Hooks()})
	if err != nil {
		t.Fatal(err)
	}
	nc := dial()
	server, err := stream.NewServer(stream.ServerParams{Conn: nc, Hooks: m.Hooks()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := server.Handle("svc.*", func(w *stream.Writer, r *stream.Request) error {
		if string(r.Data) == "fail" {
			return &stream.CloseError{Code: 4242}
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
	}); err != nil {
		t.Fatal(err)
	}
	if err := nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	m.Watch("server", server.Stats)
	end = func() {
		// A stream whose last packet is not acknowledged yet would end by Close.
		for limit := time.Now().Add(patience); server.Stats().Streams > 0 && time.Now().Before(limit); time.Sleep(time.Millisecond) {
		}
		_ = client.Close()
		_ = server.Close()
	}
	t.Cleanup(end)
	return client, end
}

// exchange sends records of ten bytes, and reads a stream to its end.
func exchange(t *testing.T, c *stream.Client, subject, data string, records int) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := c.Open(ctx, subject, []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	sent := make(chan error, 1)
	go func() { // while the answers are read: if both ends only wrote, both would wait for credit
		for range records {
			if _, err := s.Write(make([]byte, 10)); err != nil {
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
	for err == nil {
		_, err = s.Recv()
	}
	if err == io.EOF {
		return <-sent
	}
	return err
}

func TestMetricsOfStreams(t *testing.T) {
	m := streamprom.New()
	client, end := pair(t, streamtest.Run(t).URL(), m)
	for range 3 {
		if err := exchange(t, client, "svc.a", "", 20); err != nil {
			t.Fatal(err)
		}
	}
	if err := exchange(t, client, "svc.a", "fail", 0); !errors.Is(err, &stream.CloseError{Code: 4242}) {
		t.Fatal(err)
	}
	if err := exchange(t, client, "nobody", "", 0); !errors.Is(err, nats.ErrNoResponders) {
		t.Fatal(err)
	}
	end() // waits for the hooks
	const want = `
# HELP stream_closed_total Streams that have ended, by close code.
# TYPE stream_closed_total counter
stream_closed_total{code="1000",side="consumer",subject="svc.a"} 3
stream_closed_total{code="1000",side="producer",subject="svc.a"} 3
stream_closed_total{code="4242",side="consumer",subject="svc.a"} 1
stream_closed_total{code="4242",side="producer",subject="svc.a"} 1
stream_closed_total{code="no_responders",side="consumer",subject="nobody"} 1
# HELP stream_open Streams that are open.
# TYPE stream_open gauge
stream_open{side="consumer",subject="nobody"} 0
stream_open{side="consumer",subject="svc.a"} 0
stream_open{side="producer",subject="svc.a"} 0
# HELP stream_opened_total Streams that were opened.
# TYPE stream_opened_total counter
stream_opened_total{side="consumer",subject="nobody"} 1
stream_opened_total{side="consumer",subject="svc.a"} 4
stream_opened_total{side="producer",subject="svc.a"} 4
# HELP stream_received_bytes_total Bytes of records that streams which have ended received.
# TYPE stream_received_bytes_total counter
stream_received_bytes_total{side="consumer",subject="nobody"} 0
stream_received_bytes_total{side="consumer",subject="svc.a"} 600
stream_received_bytes_total{side="producer",subject="svc.a"} 600
# HELP stream_sent_records_total Records that streams which have ended sent.
# TYPE stream_sent_records_total counter
stream_sent_records_total{side="consumer",subject="nobody"} 0
stream_sent_records_total{side="consumer",subject="svc.a"} 60
stream_sent_records_total{side="producer",subject="svc.a"} 60
`
	if err := testutil.CollectAndCompare(m, strings.NewReader(want), "stream_closed_total", "stream_open", "stream_opened_total",
		"stream_received_bytes_total", "stream_sent_records_total"); err != nil {
		t.Error(err)
	}
	if n := testutil.CollectAndCount(m, "stream_duration_seconds", "stream_first_record_seconds"); n != 5 {
		t.Errorf("%d histograms, want 3 of durations and 2 of first records", n)
	}
	if n := testutil.CollectAndCount(m, "stream_endpoint_dropped_total"); n != 11 {
		t.Errorf("%d reasons of drops", n)
	}
	m.Watch("server", nil)
	if n := testutil.CollectAndCount(m, "stream_endpoint_dropped_total", "stream_endpoint_streams"); n != 0 {
		t.Errorf("%d metrics of an endpoint that was removed", n)
	}
}

// Each field of Stats is exported: a field that changes changes one metric.
func TestEveryCounterOfAnEndpointIsExported(t *testing.T) {
	var stats stream.Stats
	m := streamprom.New()
	m.Watch("client", func() stream.Stats { return stats })
	sum := func() (sum float64) {
		t.Helper()
		registry := prometheus.NewPedanticRegistry()
		registry.MustRegister(m)
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, metric := range f.GetMetric() {
				sum += metric.GetCounter().GetValue() + metric.GetGauge().GetValue()
			}
		}
		return sum
	}
	fields := reflect.ValueOf(&stats).Elem()
	for i := range fields.NumField() {
		before := sum()
		switch f := fields.Field(i); f.Kind() {
		case reflect.Bool:
			f.SetBool(true)
		case reflect.Uint64:
			f.SetUint(1)
		default:
			f.SetInt(1)
		}
		if got := sum() - before; got != 1 {
			t.Errorf("%s grew by 1 and the metrics by %g", fields.Type().Field(i).Name, got)
		}
	}
}

func TestNamesAndHelpAreSound(t *testing.T) {
	m := streamprom.New()
	client, end := pair(t, streamtest.Run(t).URL(), m)
	if err := exchange(t, client, "svc.a", "", 1); err != nil {
		t.Fatal(err)
	}
	end()
	problems, err := testutil.CollectAndLint(m)
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	if err := prometheus.NewPedanticRegistry().Register(m); err != nil {
		t.Error(err)
	}
}

func TestRetransmissionsUnderLoss(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	i := streamtest.RunInterceptor(t, streamtest.Run(t).URL(), streamtest.Only(streamtest.HasPrefix(0xF5),
		streamtest.Drop(0.02, rng), streamtest.Duplicate(0.05, rng), streamtest.Reorder(0.05, 3, rng)))
	m := streamprom.New()
	client, end := pair(t, i.URL(), m)
	const records = 20_000
	if err := exchange(t, client, "svc.a", "", records); err != nil {
		t.Fatal(err)
	}
	end()
	if n := testutil.ToFloat64(one(m, "stream_sent_records_total", "consumer")); n != records {
		t.Errorf("%v records, want %d", n, records)
	}
	if testutil.ToFloat64(one(m, "stream_retransmitted_packets_total", "consumer"))+testutil.ToFloat64(one(m, "stream_retransmitted_packets_total", "producer")) == 0 {
		t.Error("no retransmission was counted")
	}
}

// If the counters of rare events began with their first event, Prometheus would not see it as an increase.
func TestCountersOfRareEventsBeginAtZero(t *testing.T) {
	m := streamprom.New()
	h := m.Hooks()
	h.Opened(stream.StreamInfo{Subject: "svc.a"})
	h.Opened(stream.StreamInfo{Subject: "svc.a", Producer: true})
	const want = `
# HELP stream_reconnects_total Streams that went on after a reconnect of this end.
# TYPE stream_reconnects_total counter
stream_reconnects_total{side="consumer",subject="svc.a"} 0
stream_reconnects_total{side="producer",subject="svc.a"} 0
# HELP stream_retransmitted_packets_total Packets that were retransmitted, because the peer missed them.
# TYPE stream_retransmitted_packets_total counter
stream_retransmitted_packets_total{side="consumer",subject="svc.a"} 0
stream_retransmitted_packets_total{side="producer",subject="svc.a"} 0
`
	if err := testutil.CollectAndCompare(m, strings.NewReader(want), "stream_reconnects_total", "stream_retransmitted_packets_total"); err != nil {
		t.Error(err)
	}
}

// single is a collector of one metric.
type single struct{ metric prometheus.Metric }

func (s single) Describe(d chan<- *prometheus.Desc) { d <- s.metric.Desc() }
func (s single) Collect(m chan<- prometheus.Metric) { m <- s.metric }

// one returns the metric of a name and side.
func one(m *streamprom.Metrics, name, side string) prometheus.Collector {
	all := make(chan prometheus.Metric, 1000)
	m.Collect(all)
	close(all)
	for metric := range all {
		text, err := testutil.CollectAndFormat(single{metric}, expfmt.TypeTextPlain, name)
		if err == nil && strings.Contains(string(text), `side="`+side+`"`) {
			return single{metric}
		}
	}
	return nil
}

func TestSubjectsAreBounded(t *testing.T) {
	m := streamprom.New(streamprom.WithDurationBuckets([]float64{1}))
	h := m.Hooks()
	for i := range 3000 {
		h.Opened(stream.StreamInfo{Subject: fmt.Sprint("svc.", i)})
	}
	if n := testutil.CollectAndCount(m, "stream_opened_total"); n != 1001 {
		t.Errorf("%d series, want 1001", n)
	}
	m = streamprom.New(streamprom.WithSubject(func(string) string { return "svc.*" }))
	h = m.Hooks()
	for i := range 3000 {
		h.Opened(stream.StreamInfo{Subject: fmt.Sprint("svc.", i)})
	}
	if n := testutil.CollectAndCount(m, "stream_opened_total"); n != 1 {
		t.Errorf("%d series, want 1", n)
	}
}

func Example() {
	_ = func(nc *nats.Conn) error {
		metrics := streamprom.New()
		if err := prometheus.Register(metrics); err != nil {
			return err
		}
		server, err := stream.NewServer(stream.ServerParams{Conn: nc, Hooks: metrics.Hooks()})
		if err != nil {
			return err
		}
		metrics.Watch("orders", server.Stats)
		return nil
	}
}
