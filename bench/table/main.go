// Command table runs the benchmarks against each other and prints ratios.
//
// Absolute times say more about the machine and its other load than about the
// code. So every implementation runs in this one process, in short slices
// that take turns, and a ratio is the median of the ratios of slices that ran
// one after the other.
//
//	go run ./bench/table                         # everything, about two minutes
//	go run ./bench/table -filter 'size=16/' -rounds 9
//	go run ./bench/table -short                  # shows only that it works
//
// A line with a target ends with ok or MISS; with -strict a MISS makes the exit
// code 1.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/natsstream/stream/bench/e2e"
	"github.com/natsstream/stream/internal/load"
)

func main() {
	var (
		t      = table{out: os.Stdout}
		filter = flag.String("filter", "", "regular `expression`: run only matching lines, for example size=128/streams=1$, latency, idle, slow, micro")
		short  = flag.Bool("short", false, "few and short slices, fewer idle streams: to see that it works")
		strict = flag.Bool("strict", false, "exit with code 1 when a target is missed")
	)
	flag.IntVar(&t.rounds, "rounds", 5, "slices of each implementation per line")
	flag.DurationVar(&t.slice, "time", 500*time.Millisecond, "`duration` of a slice")
	flag.IntVar(&t.idle, "idle", 100_000, "idle streams to open")
	flag.Parse()
	if *short {
		t.rounds, t.slice, t.idle = 1, 20*time.Millisecond, 2000
	}
	var err error
	if t.filter, err = regexp.Compile(*filter); err == nil {
		err = t.run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "table:", err)
		os.Exit(1)
	}
	if t.missed > 0 {
		fmt.Fprintf(t.out, "\n%d targets missed\n", t.missed)
		if *strict {
			os.Exit(1)
		}
	}
}

type table struct {
	out    io.Writer
	env    *e2e.Env
	rounds int
	slice  time.Duration
	idle   int
	filter *regexp.Regexp
	missed int
}

func (t *table) run() (err error) {
	if t.env, err = e2e.NewEnv(); err != nil {
		return err
	}
	defer t.env.Close()
	fmt.Fprintf(t.out, "%s %s/%s, GOMAXPROCS %d, %s; %d rounds of %v per implementation, medians\n",
		runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.GOMAXPROCS(0), cpuModel(), t.rounds, t.slice)
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			if strings.Contains(d.Path, "nats-io/nats") {
				fmt.Fprintf(t.out, "%s %s\n", d.Path, d.Version)
			}
		}
	}
	for _, part := range []func() error{t.endToEnd, t.slowStreams, t.latency, t.exchanges, t.idleStreams, t.micro} {
		if err := part(); err != nil {
			return err
		}
	}
	return nil
}

func (t *table) wants(name string) bool { return t.filter.MatchString(name) }

// verdict compares a figure with its target.
func (t *table) verdict(ok bool) string {
	if ok {
		return "ok"
	}
	t.missed++
	return "MISS"
}

// atLeast and atMost format a figure with its target; 0 means there is none.
func (t *table) atLeast(x, target float64, format string) string {
	s := fmt.Sprintf(format, x)
	if target > 0 {
		s += fmt.Sprintf(" ≥ %g %s", target, t.verdict(x >= target))
	}
	return s
}

func (t *table) atMost(x, target float64, format string) string {
	s := fmt.Sprintf(format, x)
	if target > 0 {
		s += fmt.Sprintf(" ≤ %g %s", target, t.verdict(x <= target))
	}
	return s
}

// The targets, as multiples of the speed of the floor and of the baseline.
var (
	floorTarget    = map[string]float64{"size=16/streams=1": 9, "size=128/streams=1": 4.5, "size=1024/streams=1": 1.4, "size=16384/streams=1": 0.9}
	baselineTarget = map[string]float64{"size=16/streams=1": 50, "size=128/streams=1": 25}
	mallocsTarget  = map[string]float64{"size=128/streams=1": 0.05}
)

// contender is one implementation of a line of the table.
type contender struct {
	name    string
	session load.Session
	n       int       // records per slice
	ns      []float64 // per record, of each slice
	cpu     []float64 // processor time, likewise
	records int
	mallocs uint64
}

// race runs the implementations in turn.
func (t *table) race(impls []e2e.Impl, cfg load.Config) (_ map[string]*contender, err error) {
	byName := make(map[string]*contender)
	var all []*contender
	defer func() {
		for _, c := range all {
			c.session.Close()
		}
	}()
	for _, impl := range impls {
		s, err := impl.Open(t.env, cfg)
		if err != nil {
			return nil, fmt.Errorf("impl=%s/%v: %w", impl.Name, cfg, err)
		}
		c := &contender{name: impl.Name, session: s}
		all = append(all, c)
		byName[impl.Name] = c
		per, err := load.WarmUp(s, cfg)
		if err != nil {
			return nil, fmt.Errorf("impl=%s/%v: %w", impl.Name, cfg, err)
		}
		c.n = max(int(t.slice/per), cfg.Streams)
	}
	for range t.rounds {
		for _, c := range all {
			runtime.GC() // so that no slice pays for the garbage of the one before
			mallocs, cpu := load.Mallocs(), load.CPUTime()
			start := time.Now()
			if err := c.session.Run(c.n); err != nil {
				return nil, fmt.Errorf("impl=%s/%v: %w", c.name, cfg, err)
			}
			c.ns = append(c.ns, float64(time.Since(start))/float64(c.n))
			c.cpu = append(c.cpu, float64(load.CPUTime()-cpu)/float64(c.n))
			c.mallocs += load.Mallocs() - mallocs
			c.records += c.n
		}
	}
	return byName, nil
}

func (c *contender) mallocsPerRecord() float64 { return float64(c.mallocs) / float64(c.records) }

// times returns how many times as fast a is as b.
func times(a, b *contender) float64 { return ratio(b.ns, a.ns) }

// ratio returns the median of the ratios of slices that ran one after the other.
func ratio(x, y []float64) float64 {
	ratios := make([]float64, len(x))
	for i := range ratios {
		ratios[i] = x[i] / y[i]
	}
	return median(ratios)
}

func (t *table) endToEnd() error {
	w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
	header := false
	for _, cfg := range e2e.Matrix() {
		line := cfg.String()
		if !t.wants(line) {
			continue
		}
		if !header {
			header = true
			fmt.Fprint(w, "\nEnd to end, ns per record; × = how many times as fast as that one, CPU × = the same in processor time\n\n")
			fmt.Fprintln(w, "\tplain NATS\tstream\toriginal\tTCP relay\t× plain NATS\tCPU ×\t× original\t× TCP relay\tmallocs/rec\t(plain NATS)\tfast connection\t× stream\t× plain NATS\tCPU ×\t× TCP relay\tmallocs/rec")
		}
		c, err := t.race(e2e.Impls(), cfg)
		if err != nil {
			return err
		}
		ours, floor, baseline, ceiling, fast := c["stream"], c["nats"], c["original"], c["tcp"], c["fast"]
		fmt.Fprintf(w, "%s\t%.1f\t%.1f\t%.1f\t%.1f\t%s\t%.2f\t%s\t%.2f\t%s\t%.1f\t%.1f\t%.2f\t%.2f\t%.2f\t%.2f\t%.4f\n", line,
			median(floor.ns), median(ours.ns), median(baseline.ns), median(ceiling.ns),
			t.atLeast(times(ours, floor), floorTarget[line], "%.2f"),
			ratio(floor.cpu, ours.cpu),
			t.atLeast(times(ours, baseline), baselineTarget[line], "%.1f"),
			times(ours, ceiling),
			t.atMost(ours.mallocsPerRecord(), mallocsTarget[line], "%.4f"),
			floor.mallocsPerRecord(),
			median(fast.ns), times(fast, ours), times(fast, floor), ratio(floor.cpu, fast.cpu), times(fast, ceiling), fast.mallocsPerRecord())
	}
	return w.Flush()
}

func (t *table) slowStreams() error {
	cfg := load.Config{Size: 128, Streams: min(10_000, t.idle)}
	line := fmt.Sprintf("slow/%v", cfg)
	if !t.wants(line) {
		return nil
	}
	c, err := t.race(e2e.SlowImpls(), cfg)
	if err != nil {
		return err
	}
	floor, subjects := c["nats"], c["nats-subjects"]
	fmt.Fprint(t.out, "\nMany slow streams, ns per record: no two records can share a packet; × as above, against plain NATS\n\n")
	w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, line+"\tns\t× one subject\tCPU ×\t× a subject each\tCPU ×\tmallocs/rec")
	for _, impl := range e2e.SlowImpls() {
		x := c[impl.Name]
		fmt.Fprintf(w, "impl=%s\t%.0f\t%.2f\t%.2f\t%.2f\t%.2f\t%.2f\n", impl.Name, median(x.ns),
			times(x, floor), ratio(floor.cpu, x.cpu), times(x, subjects), ratio(subjects.cpu, x.cpu), x.mallocsPerRecord())
	}
	return w.Flush()
}

// pinged holds the measurements of one implementation, one operation at a time.
type pinged struct {
	name   string
	pinger load.Pinger
	all    []time.Duration
	p50    []float64 // of each slice
	mean   []float64 // likewise
}

// pings alternates slices of single operations. A ratio compares slices that
// ran one after the other.
func (t *table) pings(line string, impls []e2e.Impl) (_ []*pinged, err error) {
	const size, pings = 128, 250
	var all []*pinged
	defer func() {
		for _, r := range all {
			r.pinger.Close()
		}
	}()
	for _, impl := range impls {
		p, err := impl.OpenPinger(t.env, size)
		if err != nil {
			return nil, fmt.Errorf("%s/impl=%s: %w", line, impl.Name, err)
		}
		all = append(all, &pinged{name: impl.Name, pinger: p})
	}
	took := make([]time.Duration, pings)
	slice := func(r *pinged) error {
		for i := range took {
			start := time.Now()
			if err := r.pinger.Ping(); err != nil {
				return fmt.Errorf("%s/impl=%s: %w", line, r.name, err)
			}
			took[i] = time.Since(start)
		}
		return nil
	}
	for _, r := range all {
		if err := slice(r); err != nil { // warm-up
			return nil, err
		}
	}
	runtime.GC()
	// As long as the end-to-end lines take, in much shorter slices: a pause of
	// the machine then falls on all alike.
	for end := time.Now().Add(time.Duration(t.rounds) * t.slice * time.Duration(len(all))); time.Now().Before(end); {
		for _, r := range all {
			if err := slice(r); err != nil {
				return nil, err
			}
			r.all = append(r.all, took...)
			var sum time.Duration
			for _, d := range took {
				sum += d
			}
			r.mean = append(r.mean, float64(sum)/pings)
			slices.Sort(took)
			r.p50 = append(r.p50, float64(load.Percentile(took, 50)))
		}
	}
	for _, r := range all {
		slices.Sort(r.all)
	}
	return all, nil
}

// us returns a percentile in microseconds.
func (r *pinged) us(p int) float64 { return float64(load.Percentile(r.all, p)) / 1e3 }

func named(all []*pinged, name string) *pinged {
	return all[slices.IndexFunc(all, func(r *pinged) bool { return r.name == name })]
}

func (t *table) latency() error {
	const line = "latency/size=128"
	if !t.wants(line) {
		return nil
	}
	all, err := t.pings(line, e2e.PingImpls())
	if err != nil {
		return err
	}
	fmt.Fprintf(t.out, "\nOne record at a time, µs, %d of each\n\n", len(all[0].all))
	w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\tp50\tp90\tp99\tp50 ÷ plain NATS")
	for _, r := range all {
		target := 0.0
		if r.name == "stream" {
			target = 1.03
		}
		fmt.Fprintf(w, "impl=%s/size=128\t%.2f\t%.2f\t%.2f\t%s\n", r.name, r.us(50), r.us(90), r.us(99),
			t.atMost(ratio(r.p50, named(all, "nats").p50), target, "%.3f"))
	}
	return w.Flush()
}

// exchanges compares a question and its answer with nats.Request.
func (t *table) exchanges() error {
	w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
	header := false
	for _, c := range []struct {
		line      string
		impls     []e2e.Impl
		rate, p50 float64 // targets, as parts of nats.Request's
		fast      float64 // the target of the rate over fast connections
	}{
		{"open/size=128", e2e.OpenImpls(), 0.6, 0, 0.75},
		{"echo/size=128", e2e.EchoImpls(), 0, 1.1, 0},
	} {
		if !t.wants(c.line) {
			continue
		}
		all, err := t.pings(c.line, c.impls)
		if err != nil {
			return err
		}
		if !header {
			header = true
			fmt.Fprint(w, "\nA question and its answer, µs: open, one record, close; and an echo over an open stream\n\n")
			fmt.Fprintln(w, "\tp50\tp99\tnats.Request p50\tp99\trate ÷ nats.Request\tp50 ÷ nats.Request")
		}
		floor := named(all, "nats")
		row := func(line string, ours *pinged, rate float64) {
			fmt.Fprintf(w, "%s\t%.2f\t%.2f\t%.2f\t%.2f\t%s\t%s\n", line, ours.us(50), ours.us(99), floor.us(50), floor.us(99),
				t.atLeast(ratio(floor.mean, ours.mean), rate, "%.2f"), t.atMost(ratio(ours.p50, floor.p50), c.p50, "%.2f"))
		}
		row(c.line, named(all, "stream"), c.rate)
		row(c.line+" fast", named(all, "fast"), c.fast)
	}
	return w.Flush()
}

func (t *table) idleStreams() error {
	line := fmt.Sprintf("idle/streams=%d", t.idle)
	if !t.wants(line) {
		return nil
	}
	cost, err := e2e.Idle(t.env, t.idle)
	if err != nil {
		return err
	}
	fmt.Fprint(t.out, "\nAn idle open stream at its consumer, bytes\n\n")
	w := tabwriter.NewWriter(t.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\theap\tstacks\ttogether\tgoroutines\tns to open")
	fmt.Fprintf(w, "%s\t%.0f\t%.0f\t%s\t%.4f\t%d\n", line, cost.HeapBytes, cost.StackBytes,
		t.atMost(cost.Bytes(), 2048, "%.0f"), cost.Goroutines, cost.OpenTime.Nanoseconds())
	return w.Flush()
}

func median(xs []float64) float64 {
	xs = slices.Clone(xs)
	slices.Sort(xs)
	return xs[len(xs)/2]
}

// cpuModel returns the processor's name if the system reports it.
func cpuModel() string {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err == nil {
		for line := range strings.Lines(string(info)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				return strings.TrimSpace(v)
			}
		}
	}
	return "processor unknown"
}
