package grafana

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"math"
	"os"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"go.uber.org/goleak"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamprom"
	"github.com/natsstream/stream/streamtest"
)

const (
	patience = time.Minute
	interval = 15 * time.Second // of the scrapes
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// panel is the part of a panel that has queries.
type panel struct {
	Title   string
	Type    string
	GridPos struct{ H, W, X, Y int }
	Targets []struct{ RefID, Expr, LegendFormat, Format string }
}

func read(t *testing.T) (raw []byte, panels []panel) {
	t.Helper()
	raw, err := os.ReadFile("streams.json")
	if err != nil {
		t.Fatal(err)
	}
	var d struct{ Panels []panel }
	if err := json.Unmarshal(raw, &d); err != nil {
		t.Fatal(err)
	}
	return raw, d.Panels
}

// Grafana knows every field of the dashboard, and no panel covers another.
func TestDashboardHasGrafanasSchema(t *testing.T) {
	plugins.RegisterDefaultPlugins()
	raw, panels := read(t)
	//lint:ignore SA1019 every version of Grafana imports this form
	var d dashboard.Dashboard
	if err := d.UnmarshalJSONStrict(raw); isError(err) {
		t.Error(err)
	}
	if err := d.Validate(); isError(err) {
		t.Error(err)
	}
	used := map[[2]int]string{}
	for _, p := range panels {
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := used[[2]int{x, y}]; other != "" || x >= 24 {
					t.Fatalf("panel %q is at the place of %q, or beyond the 24 columns", p.Title, other)
				}
				used[[2]int{x, y}] = p.Title
			}
		}
	}
}

// isError reports whether err has a text: the library that knows the schema returns empty lists of errors that are not
// nil.
func isError(err error) bool { return err != nil && err.Error() != "" }

// Each query of the dashboard has a result on metrics of real streams, with the labels of its legend, and each exported
// metric is on the dashboard.
func TestQueriesHaveResults(t *testing.T) {
	raw, panels := read(t)
	data, start, end := observe(t)
	exported := data.names()
	engine := newEngine(t)
	shown := map[string]bool{}
	for _, p := range panels {
		for _, target := range p.Targets {
			query := expand.Replace(target.Expr)
			expr, err := grammar.ParseExpr(query)
			if err != nil {
				t.Errorf("%s: %v", p.Title, err)
				continue
			}
			for _, selector := range selectors(expr) {
				shown[selector.Name] = true
				for _, m := range selector.LabelMatchers {
					if !exported[selector.Name][m.Name] {
						t.Errorf("%s: %s has no label %s", p.Title, selector.Name, m.Name)
					}
				}
			}
			q, err := engine.NewRangeQuery(t.Context(), data, nil, query, start, end, interval)
			if err != nil {
				t.Errorf("%s: %v", p.Title, err)
				continue
			}
			verify(t, p, target.LegendFormat, q.Exec(t.Context()))
			q.Close()
		}
	}
	for name := range exported {
		family := strings.TrimSuffix(strings.TrimSuffix(name, "_sum"), "_count")
		if !shown[name] && !shown[family+"_bucket"] {
			t.Errorf("no panel shows %s", name)
		}
	}
	for _, query := range readmeQueries(t) {
		q, err := engine.NewInstantQuery(t.Context(), data, nil, query, end)
		if err != nil {
			t.Errorf("README.md: %v", err)
			continue
		}
		if v, err := q.Exec(t.Context()).Vector(); err != nil || len(v) == 0 {
			t.Errorf("README.md: %s: %v, %v", query, v, err)
		}
		q.Close()
	}
	for _, v := range regexp.MustCompile(`label_values\((\w+), (\w+)\)`).FindAllStringSubmatch(string(raw), -1) {
		if !exported[v[1]][v[2]] {
			t.Errorf("a variable asks for the label %s of %s, which does not exist", v[2], v[1])
		}
	}
}

// A dashboard of streams that did not fail shows that: each panel has data, and no stream counts as failed.
func TestQueriesHaveResultsWithoutFailures(t *testing.T) {
	_, panels := read(t)
	data, start, end := observeHealthy(t)
	engine := newEngine(t)
	for _, p := range panels {
		for _, target := range p.Targets {
			q, err := engine.NewRangeQuery(t.Context(), data, nil, expand.Replace(target.Expr), start, end, interval)
			if err != nil {
				t.Errorf("%s: %v", p.Title, err)
				continue
			}
			matrix, err := q.Exec(t.Context()).Matrix()
			if err != nil || len(matrix) == 0 {
				t.Errorf("%s: %s: %d series, %v", p.Title, target.Expr, len(matrix), err)
			}
			for _, s := range matrix {
				for _, point := range s.Floats {
					if point.F != 0 && p.Title == "Streams that fail" {
						t.Errorf("%s: %v is %v", p.Title, s.Metric, point.F)
					}
				}
			}
			q.Close()
		}
	}
}

// grammar parses the queries.
var grammar = parser.NewParser(parser.Options{})

func newEngine(t *testing.T) *promql.Engine {
	t.Helper()
	engine := promql.NewEngine(promql.EngineOpts{MaxSamples: 1e6, Timeout: patience, LookbackDelta: 5 * time.Minute, Parser: grammar})
	t.Cleanup(func() { _ = engine.Close() })
	return engine
}

// readmeQueries returns the queries in the table of README.md of streamprom.
func readmeQueries(t *testing.T) (queries []string) {
	t.Helper()
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, code := range regexp.MustCompile("`[^`]*stream_[^`]+`").FindAllString(string(text), -1) {
		queries = append(queries, strings.ReplaceAll(strings.Trim(code, "`"), `\|`, "|"))
	}
	if len(queries) < 4 {
		t.Errorf("README.md has %d queries", len(queries))
	}
	return queries
}

// expand replaces the variables of Grafana as it does for a dashboard that shows everything.
var expand = strings.NewReplacer("$__rate_interval", "1m", "$subject", ".*", "$side", ".*", "$endpoint", ".*")

func selectors(e parser.Expr) (all []*parser.VectorSelector) {
	parser.Inspect(e, func(n parser.Node, _ []parser.Node) error {
		if s, ok := n.(*parser.VectorSelector); ok {
			all = append(all, s)
		}
		return nil
	})
	return all
}

var legend = regexp.MustCompile(`{{\s*(\w+)\s*}}`)

// verify checks the result of a query of p.
func verify(t *testing.T, p panel, legendFormat string, r *promql.Result) {
	t.Helper()
	matrix, err := r.Matrix()
	if err != nil || len(r.Warnings) > 0 {
		t.Errorf("%s: %v, %v", p.Title, err, r.Warnings)
		return
	}
	most := math.Inf(-1)
	for _, s := range matrix {
		for _, point := range s.Floats {
			most = max(most, point.F) // NaN wins: a quantile of nothing
			if math.IsNaN(most) {
				most = math.Inf(-1)
			}
		}
		for _, name := range legend.FindAllStringSubmatch(legendFormat, -1) {
			if s.Metric.Get(name[1]) == "" {
				t.Errorf("%s: a series has no label %s: %v", p.Title, name[1], s.Metric)
			}
		}
	}
	if most < 0 || most == 0 && !strings.HasPrefix(p.Title, "Memory") { // which may be free at each scrape
		t.Errorf("%s: %d series, and the largest value is %v", p.Title, len(matrix), most)
	}
}

// observe runs streams of all kinds between scrapes of their metrics.
func observe(t *testing.T) (data *scrapes, start, end time.Time) {
	t.Helper()
	n := 0
	i := streamtest.RunInterceptor(t, streamtest.Run(t).URL(), streamtest.Only(streamtest.HasPrefix(0xF5), func(*streamtest.Message) (v streamtest.Verdict) {
		n++
		switch n % 20 {
		case 3:
			v.Drop = true
		case 6:
			v.Copies = 1
		}
		return v
	}))
	network := streamtest.RunProxy(t, i.URL())
	metrics := streamprom.New()
	hooks := metrics.Hooks()
	var retransmitted, reconnected atomic.Int64
	countRetransmitted, countReconnected := hooks.Retransmitted, hooks.Reconnected
	hooks.Retransmitted = func(i stream.StreamInfo, packets int) { countRetransmitted(i, packets); retransmitted.Add(1) }
	hooks.Reconnected = func(i stream.StreamInfo) { countReconnected(i); reconnected.Add(1) }
	server, client := pair(t, network.URL(), hooks)
	metrics.Watch("server", server.Stats)
	metrics.Watch("client", func() stream.Stats { return withRareEvents(client.Stats()) })

	clock := newClock(t, metrics)
	for range 3 {
		s := open(t, client, "orders", "echo")
		exchangeUntilMore(t, s, &retransmitted)
		network.Cut()
		exchangeUntilMore(t, s, &reconnected)
		clock.scrape() // while it is open
		if err := s.CloseSend(); err != nil {
			t.Fatal(err)
		}
		wantEnd(t, s, io.EOF)
		wantEnd(t, open(t, client, "orders", "fail"), &stream.CloseError{Code: 4242})
		wantEnd(t, open(t, client, "nobody", ""), nats.ErrNoResponders)
		left := open(t, client, "orders", "echo")
		exchange(t, left, 1)
		_ = left.Close()
		clock.scrape()
	}
	return clock.data, clock.start, clock.now
}

// observeHealthy runs streams that end normally and streams that their consumer leaves, without loss or reconnects,
// between scrapes of their metrics.
func observeHealthy(t *testing.T) (data *scrapes, start, end time.Time) {
	t.Helper()
	metrics := streamprom.New()
	hooks := metrics.Hooks()
	const rounds, streams = 5, 3
	closed, countClosed := make(chan struct{}, 2*streams), hooks.Closed
	hooks.Closed = func(i stream.StreamInfo, totals stream.Totals, err error) {
		countClosed(i, totals, err)
		closed <- struct{}{}
	}
	server, client := pair(t, streamtest.Run(t).URL(), hooks)
	metrics.Watch("server", server.Stats)
	metrics.Watch("client", client.Stats)
	clock := newClock(t, metrics)
	for range rounds {
		s := open(t, client, "orders", "echo")
		exchange(t, s, 10)
		if err := s.CloseSend(); err != nil {
			t.Fatal(err)
		}
		wantEnd(t, s, io.EOF)
		left := open(t, client, "orders", "echo")
		exchange(t, left, 1)
		_ = left.Close()
		ctx, cancel := context.WithCancel(t.Context())
		canceled, err := client.Open(ctx, "orders", []byte("echo"))
		if err != nil {
			t.Fatal(err)
		}
		exchange(t, canceled, 1)
		cancel()
		wantEnd(t, canceled, context.Canceled)
		for range 2 * streams { // the ends of both sides
			select {
			case <-closed:
			case <-time.After(patience):
				t.Fatal("an end of a stream was not reported")
			}
		}
		clock.scrape()
	}
	return clock.data, clock.start, clock.now
}

// pair returns a server that serves orders, and a client of it. Both have hooks.
func pair(t *testing.T, url string, hooks stream.Hooks) (*stream.Server, *stream.Client) {
	t.Helper()
	connect := func() *nats.Conn {
		nc, err := nats.Connect(url, nats.IgnoreDiscoveredServers(), nats.ReconnectWait(10*time.Millisecond), nats.MaxReconnects(-1))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	nc := connect()
	server, err := stream.NewServer(stream.ServerParams{Conn: nc, Hooks: hooks})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Close() })
	client, err := stream.NewClient(stream.ClientParams{Conn: connect(), Hooks: hooks})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	if _, err := server.Handle("orders", serve); err != nil {
		t.Fatal(err)
	}
	if err := nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	return server, client
}

// clock scrapes metrics as if its interval passed between two scrapes.
type clock struct {
	t          *testing.T
	registry   *prometheus.Registry
	data       *scrapes
	start, now time.Time
}

func newClock(t *testing.T, metrics *streamprom.Metrics) *clock {
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(metrics)
	start := time.Unix(1_700_000_000, 0)
	return &clock{t: t, registry: registry, data: new(scrapes), start: start, now: start}
}

func (c *clock) scrape() {
	c.t.Helper()
	if err := c.data.take(c.registry, c.now); err != nil {
		c.t.Fatal(err)
	}
	c.now = c.now.Add(interval)
}

// withRareEvents adds values for counters that the streams of this test leave at zero.
func withRareEvents(s stream.Stats) stream.Stats {
	s.Fast = true
	s.EnvelopesSent, s.EnvelopesReceived = s.PacketsSent, s.PacketsReceived
	s.UnsentControl, s.UnreportedErrors = s.PacketsSent, s.PacketsSent
	return s
}

// serve sends the consumer's records back, or fails.
func serve(w *stream.Writer, r *stream.Request) error {
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
}

func open(t *testing.T, c *stream.Client, subject, data string) *stream.Stream {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	s, err := c.Open(ctx, subject, []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func exchange(t *testing.T, s *stream.Stream, records int) {
	t.Helper()
	for range records { // fewer than a window has room for
		if _, err := s.Write(make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
	}
	for range records {
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
	}
}

// exchangeUntilMore exchanges records until a hook has counted.
func exchangeUntilMore(t *testing.T, s *stream.Stream, count *atomic.Int64) {
	t.Helper()
	for before := count.Load(); count.Load() == before; {
		exchange(t, s, 10)
	}
}

func wantEnd(t *testing.T, s *stream.Stream, want error) {
	t.Helper()
	if _, err := s.Recv(); !errors.Is(err, want) {
		t.Errorf("%v, want %v", err, want)
	}
}
