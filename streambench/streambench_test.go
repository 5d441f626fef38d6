package streambench

import (
	"bufio"
	"bytes"
	"flag"
	"os"
	"os/exec"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/streamtest"
)

var update = flag.Bool("update", false, "rewrite testdata/names.txt")

// BenchmarkStream is the benchmark of the package documentation, against an embedded server.
func BenchmarkStream(b *testing.B) {
	s, err := streamtest.Start()
	if err != nil {
		b.Fatal(err)
	}
	defer s.Shutdown()
	p := Params{URL: s.URL()}
	if testing.Short() {
		p.Sizes, p.Streams, p.SlowStreams = []int{16, 128}, []int{1, 2}, 1001
	}
	Run(b, p)
}

// People compare figures of today with figures of last year. A benchmark or a unit that is renamed breaks the comparison.
func TestNamesAndUnitsStay(t *testing.T) {
	const golden = "testdata/names.txt"
	cmd := exec.Command(os.Args[0], "-test.short", "-test.run=^$", "-test.bench=.", "-test.benchtime=1x", "-test.benchmem")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var lines []string
	procs := regexp.MustCompile(`-\d+$`)
	for scan := bufio.NewScanner(bytes.NewReader(out)); scan.Scan(); {
		f := strings.Fields(scan.Text())
		if len(f) < 4 || !strings.HasPrefix(f[0], "Benchmark") {
			continue
		}
		line := procs.ReplaceAllString(f[0], "")
		for i := 3; i < len(f); i += 2 {
			line += " " + f[i]
		}
		lines = append(lines, line+"\n")
	}
	got := strings.Join(lines, "")
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("the benchmarks and their units are\n%s\nand they were\n%s\nA new one is fine: run this test with -update. "+
			"A changed one needs an entry in CHANGELOG.md.", got, want)
	}
}

func TestDefaultsStay(t *testing.T) {
	var p Params
	if _, err := p.dialer(); err != nil {
		t.Fatal(err)
	}
	want := Params{URL: "nats://127.0.0.1:4222", Subject: "streambench", Sizes: []int{16, 128, 1024, 16384}, Streams: []int{1, 100}, SlowStreams: 10_000}
	if !reflect.DeepEqual(p, want) {
		t.Errorf("%+v, want %+v", p, want)
	}
}

func TestInvalidParamsAreRefused(t *testing.T) {
	for name, p := range map[string]Params{
		"small record":     {Sizes: []int{128, MinSize - 1}},
		"no stream":        {Streams: []int{0}},
		"few slow streams": {SlowStreams: 1000},
	} {
		if _, err := p.dialer(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	p := Params{URL: "nats://127.0.0.1:1"}
	d, err := p.dialer()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Dial(); err == nil || !strings.Contains(err.Error(), p.URL) {
		t.Errorf("no server: %v", err)
	}
}

// The error handler of streambench comes after the user's options, so that no error of a connection is missed.
func TestErrorOfAConnectionFailsTheRun(t *testing.T) {
	s, err := streamtest.Start()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Shutdown()
	p := Params{URL: s.URL(), Options: []nats.Option{nats.ErrorHandler(nil)}}
	d, err := p.dialer()
	if err != nil {
		t.Fatal(err)
	}
	nc, err := d.Dial()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	if err := d.Err(); err != nil {
		t.Fatal(err)
	}
	nc.Opts.AsyncErrorCB(nc, nil, nats.ErrSlowConsumer)
	if err := d.Err(); err == nil {
		t.Error("no error")
	}
}

func TestEachBenchmarkHasASubjectOfItsOwn(t *testing.T) {
	p := Params{Subject: "mine.bench"}
	d, err := p.dialer()
	if err != nil {
		t.Fatal(err)
	}
	if a, b := d.Subject(), d.Subject(); a == b || !strings.HasPrefix(a, "mine.bench.") {
		t.Errorf("subjects %q and %q", a, b)
	}
}
