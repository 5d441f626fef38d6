package streambench

import (
	"reflect"
	"strings"
	"testing"
)

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
