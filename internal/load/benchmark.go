package load

import (
	"slices"
	"testing"
	"time"
)

// BenchmarkSession runs a benchmark of the time per record of a session. open is called once: the session outlives the
// calls by which the framework finds b.N, so its streams are opened and warmed up once.
func BenchmarkSession(b *testing.B, name string, cfg Config, open func() (Session, error)) {
	var s Session
	b.Run(name, func(b *testing.B) {
		if s == nil {
			var err error
			if s, err = open(); err != nil {
				b.Fatal(err)
			}
			if _, err := WarmUp(s, cfg); err != nil {
				b.Fatal(err)
			}
		}
		b.SetBytes(int64(cfg.Size))
		mallocs, cpu := Mallocs(), CPUTime()
		b.ResetTimer()
		if err := s.Run(b.N); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		b.ReportMetric(float64(CPUTime()-cpu)/float64(b.N), "cpu-ns/rec")
		b.ReportMetric(float64(Mallocs()-mallocs)/float64(b.N), "mallocs/rec")
	})
	if s != nil {
		s.Close()
	}
}

// BenchmarkPinger runs a benchmark of operations that follow each other, with the percentiles of their times. open is
// called once.
func BenchmarkPinger(b *testing.B, name string, open func() (Pinger, error)) {
	var p Pinger
	b.Run(name, func(b *testing.B) {
		if p == nil {
			var err error
			if p, err = open(); err != nil {
				b.Fatal(err)
			}
			for range 200 {
				if err := p.Ping(); err != nil {
					b.Fatal(err)
				}
			}
		}
		took := make([]time.Duration, 0, b.N)
		mallocs := Mallocs()
		b.ResetTimer()
		for range b.N {
			start := time.Now()
			if err := p.Ping(); err != nil {
				b.Fatal(err)
			}
			took = append(took, time.Since(start))
		}
		b.StopTimer()
		b.ReportMetric(float64(Mallocs()-mallocs)/float64(b.N), "mallocs/rec")
		slices.Sort(took)
		b.ReportMetric(float64(Percentile(took, 50)), "p50-ns")
		b.ReportMetric(float64(Percentile(took, 99)), "p99-ns")
	})
	if p != nil {
		p.Close()
	}
}
