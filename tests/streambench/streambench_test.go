package streambench_test

import (
	"bufio"
	"bytes"
	"flag"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/streambench"
	"github.com/natsstream/stream/streamtest"
)

// patience bounds the wait for an event of NATS.
const patience = 20 * time.Second

var update = flag.Bool("update", false, "rewrite testdata/names.txt")

// BenchmarkStream is the benchmark of the package documentation, against an embedded server.
func BenchmarkStream(b *testing.B) {
	s, err := streamtest.Start()
	if err != nil {
		b.Fatal(err)
	}
	defer s.Shutdown()
	p := streambench.Params{URL: s.URL()}
	if testing.Short() {
		p.Sizes, p.Streams, p.SlowStreams = []int{16, 128}, []int{1, 2}, 1001
	}
	streambench.Run(b, p)
}

// People compare figures of today with figures of last year. A benchmark or a unit that is renamed breaks the
// comparison.
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

// The error handler of streambench comes after the user's options, so that no error of a connection is missed.
func TestErrorOfAConnectionFailsTheRun(t *testing.T) {
	benchtime := flag.Lookup("test.benchtime").Value
	defer benchtime.Set(benchtime.String())
	if err := benchtime.Set("1x"); err != nil {
		t.Fatal(err)
	}
	p := streambench.Params{
		URL: streamtest.Run(t).URL(), Sizes: []int{16}, Streams: []int{1}, SlowStreams: 1001,
		Options: []nats.Option{nats.ErrorHandler(nil), nats.ConnectHandler(func(nc *nats.Conn) {
			nc.ErrorHandler()(nc, nil, nats.ErrSlowConsumer)
		})},
	}
	failed := false
	for limit := time.Now().Add(patience); !failed && time.Now().Before(limit); { // a run may end before nats.go calls the handler
		testing.Benchmark(func(b *testing.B) {
			defer func() { failed = b.Failed() }()
			streambench.Run(b, p)
		})
	}
	if !failed {
		t.Error("an error of a connection did not fail the run")
	}
}
