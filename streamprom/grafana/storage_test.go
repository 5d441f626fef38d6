package grafana

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/prometheus/model/histogram"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/storage"
	"github.com/prometheus/prometheus/tsdb/chunkenc"
	"github.com/prometheus/prometheus/tsdb/chunks"
	"github.com/prometheus/prometheus/util/annotations"
)

// scrapes are the metrics of a registry at several times, as Prometheus stores them.
type scrapes struct {
	series map[string]*series
}

type series struct {
	labels  labels.Labels
	samples []chunks.Sample
}

// take adds the present values of g, as if Prometheus had read them at the time at.
func (s *scrapes) take(g prometheus.Gatherer, at time.Time) error {
	families, err := g.Gather()
	if err != nil {
		return err
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			switch {
			case m.GetHistogram() != nil:
				h := m.GetHistogram()
				for _, b := range h.GetBucket() {
					s.add(f.GetName()+"_bucket", m, at, float64(b.GetCumulativeCount()), "le", fmt.Sprint(b.GetUpperBound()))
				}
				s.add(f.GetName()+"_bucket", m, at, float64(h.GetSampleCount()), "le", "+Inf")
				s.add(f.GetName()+"_sum", m, at, h.GetSampleSum())
				s.add(f.GetName()+"_count", m, at, float64(h.GetSampleCount()))
			case m.GetCounter() != nil:
				s.add(f.GetName(), m, at, m.GetCounter().GetValue())
			case m.GetGauge() != nil:
				s.add(f.GetName(), m, at, m.GetGauge().GetValue())
			default:
				return fmt.Errorf("%s is of type %v", f.GetName(), f.GetType())
			}
		}
	}
	return nil
}

func (s *scrapes) add(name string, m *dto.Metric, at time.Time, v float64, more ...string) {
	pairs := append([]string{"__name__", name}, more...)
	for _, l := range m.GetLabel() {
		pairs = append(pairs, l.GetName(), l.GetValue())
	}
	l := labels.FromStrings(pairs...)
	if s.series == nil {
		s.series = map[string]*series{}
	}
	if s.series[l.String()] == nil {
		s.series[l.String()] = &series{labels: l}
	}
	one := s.series[l.String()]
	one.samples = append(one.samples, sample{at.UnixMilli(), v})
}

// names returns the label names of each metric.
func (s *scrapes) names() map[string]map[string]bool {
	all := map[string]map[string]bool{}
	for _, one := range s.series {
		name := one.labels.Get("__name__")
		if all[name] == nil {
			all[name] = map[string]bool{}
		}
		one.labels.Range(func(l labels.Label) { all[name][l.Name] = true })
	}
	return all
}

// Querier implements storage.Queryable.
func (s *scrapes) Querier(int64, int64) (storage.Querier, error) { return querier{s}, nil }

// querier is a storage.Querier.
type querier struct{ *scrapes }

// Select returns the series that match.
func (q querier) Select(_ context.Context, _ bool, _ *storage.SelectHints, matchers ...*labels.Matcher) storage.SeriesSet {
	set := &found{at: -1}
	for _, one := range q.series {
		if !slices.ContainsFunc(matchers, func(m *labels.Matcher) bool { return !m.Matches(one.labels.Get(m.Name)) }) {
			set.all = append(set.all, one)
		}
	}
	slices.SortFunc(set.all, func(a, b *series) int { return labels.Compare(a.labels, b.labels) })
	return set
}

func (querier) Close() error { return nil }

// LabelValues and LabelNames are not called by queries.
func (querier) LabelValues(context.Context, string, *storage.LabelHints, ...*labels.Matcher) ([]string, annotations.Annotations, error) {
	return nil, nil, errors.ErrUnsupported
}

func (querier) LabelNames(context.Context, *storage.LabelHints, ...*labels.Matcher) ([]string, annotations.Annotations, error) {
	return nil, nil, errors.ErrUnsupported
}

// found is a storage.SeriesSet.
type found struct {
	all []*series
	at  int
}

func (f *found) Next() bool { f.at++; return f.at < len(f.all) }
func (f *found) At() storage.Series {
	return storage.NewListSeries(f.all[f.at].labels, f.all[f.at].samples)
}
func (f *found) Err() error                        { return nil }
func (f *found) Warnings() annotations.Annotations { return nil }

// sample is a chunks.Sample of a number.
type sample struct {
	at    int64 // in ms
	value float64
}

func (s sample) T() int64                      { return s.at }
func (s sample) ST() int64                     { return 0 }
func (s sample) F() float64                    { return s.value }
func (s sample) H() *histogram.Histogram       { return nil }
func (s sample) FH() *histogram.FloatHistogram { return nil }
func (s sample) Type() chunkenc.ValueType      { return chunkenc.ValFloat }
func (s sample) Copy() chunks.Sample           { return s }
