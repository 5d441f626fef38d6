package main

import (
	"fmt"
	"image/color"
	"math"
	"os"
	"path/filepath"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// ink is a grey that is read on white and on black. The background of the charts is transparent.
var ink = color.RGBA{0x80, 0x86, 0x8f, 0xff}

// palette is the colour of each rival, of middle lightness for the same reason.
var palette = map[string]color.RGBA{
	"stream":            {0xd9, 0x48, 0x2b, 0xff},
	"stream, fast":      {0xe8, 0x9a, 0x3c, 0xff},
	"nats":              {0x2f, 0x8f, 0xd0, 0xff},
	"request-many":      {0x6f, 0xb7, 0xd9, 0xff},
	"grpc-go":           {0x2f, 0xa0, 0x60, 0xff},
	"connect-go":        {0x8b, 0xb1, 0x3d, 0xff},
	"yamux":             {0x9a, 0x66, 0xc8, 0xff},
	"quic-go":           {0xd0, 0x7f, 0xb5, 0xff},
	"relay":             {0x80, 0x86, 0x8f, 0xff},
	"original":          {0xb0, 0x8a, 0x3e, 0xff},
	"jetstream-consume": {0x4a, 0x6f, 0xb5, 0xff},
	"jetstream-fetch":   {0x2a, 0xa1, 0xa8, 0xff},
	"request-loop":      {0xc2, 0x4f, 0x7a, 0xff},
	"psrpc":             {0xa0, 0x52, 0x2d, 0xff},
}

const (
	chartWidth  = 7.5 * vg.Inch
	chartHeight = 4 * vg.Inch
)

func newChart(title, x, y string) *plot.Plot {
	p := plot.New()
	p.BackgroundColor = nil // the page shows through
	p.Title.Text = title
	p.Title.TextStyle.Color = ink
	p.X.Label.Text, p.Y.Label.Text = x, y
	for _, axis := range []*plot.Axis{&p.X, &p.Y} {
		axis.Color, axis.Label.TextStyle.Color = ink, ink
		axis.Tick.Color, axis.Tick.Label.Color = ink, ink
		axis.Scale = plot.LogScale{}
	}
	p.Y.Tick.Marker = plot.TickerFunc(decades)
	p.Legend.TextStyle.Color = ink
	p.Legend.Top, p.Legend.Left = true, false
	p.Legend.ThumbnailWidth = 0.4 * vg.Inch
	grid := plotter.NewGrid()
	faint := ink
	faint.A = 0x30
	grid.Vertical.Color, grid.Horizontal.Color = faint, faint
	p.Add(grid)
	return p
}

// decades marks 1, 2 and 5 of each power of ten, and writes large numbers short.
func decades(low, high float64) (ticks []plot.Tick) {
	for d := math.Pow(10, math.Floor(math.Log10(low))); d <= high; d *= 10 {
		for _, m := range []float64{1, 2, 5} {
			if v := m * d; v >= low && v <= high {
				ticks = append(ticks, plot.Tick{Value: v, Label: short(v)})
			}
		}
	}
	return ticks
}

// marks puts a tick at each of the values.
func marks(values []int, name func(int) string) plot.TickerFunc {
	return func(low, high float64) (ticks []plot.Tick) {
		for _, v := range values {
			if x := float64(v); x >= low && x <= high {
				ticks = append(ticks, plot.Tick{Value: x, Label: name(v)})
			}
		}
		return ticks
	}
}

func short(v float64) string {
	for _, unit := range []struct {
		value float64
		name  string
	}{{1e9, " G"}, {1e6, " M"}, {1e3, " k"}} {
		if v >= unit.value {
			return strconv.FormatFloat(v/unit.value, 'g', 4, 64) + unit.name
		}
	}
	return strconv.FormatFloat(v, 'g', 3, 64)
}

// addLine adds a line with points. A rival without points has no line.
func addLine(p *plot.Plot, rival string, points plotter.XYs, dashed, legend bool) error {
	if len(points) == 0 {
		return nil
	}
	line, dots, err := plotter.NewLinePoints(points)
	if err != nil {
		return err
	}
	hue, ok := palette[rival]
	if !ok {
		hue = ink
	}
	line.Color, dots.Color = hue, hue
	line.Width = vg.Points(1.2)
	if rival == ourName {
		line.Width = vg.Points(2.6)
	}
	dots.Shape, dots.Radius = draw.CircleGlyph{}, vg.Points(2.2)
	if dashed {
		line.Dashes = []vg.Length{vg.Points(4), vg.Points(3)}
	}
	p.Add(line, dots)
	if legend {
		p.Legend.Add(rival, line)
	}
	return nil
}

// writeChart writes a chart, unless it has no data.
func writeChart(p *plot.Plot, file string) error {
	for _, axis := range []*plot.Axis{&p.X, &p.Y} {
		if axis.Min > axis.Max {
			return nil
		}
		if axis.Min == axis.Max { // a logarithmic axis needs a range above 0
			axis.Min, axis.Max = axis.Min/2, axis.Max*2
		}
	}
	c := vgsvg.NewWith(vgsvg.UseWH(chartWidth, chartHeight), vgsvg.EmbedFonts(false))
	p.Draw(draw.New(c))
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	if _, err := c.WriteTo(f); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// charts writes all charts into dir.
func (r *results) charts(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, c := range []struct {
		file string
		draw func() (*plot.Plot, error)
	}{
		{"throughput-1.svg", func() (*plot.Plot, error) { return r.throughputChart(1) }},
		{"throughput-100.svg", func() (*plot.Plot, error) { return r.throughputChart(100) }},
		{"cpu.svg", r.cpuChart},
		{"latency-1.svg", func() (*plot.Plot, error) { return r.latencyChart(1) }},
		{"latency-1000.svg", func() (*plot.Plot, error) { return r.latencyChart(1000) }},
		{"idle.svg", r.idleChart},
	} {
		p, err := c.draw()
		if err == nil {
			err = writeChart(p, filepath.Join(dir, c.file))
		}
		if err != nil {
			return fmt.Errorf("%s: %w", c.file, err)
		}
	}
	return nil
}

// bySize adds a line for each rival over the size of records.
func (r *results) bySize(p *plot.Plot, streams int, y func(throughput) float64) error {
	sizes := cells(r.Throughput, func(t throughput) int { return t.Size })
	p.X.Tick.Marker = marks(sizes, bytesName)
	for _, rival := range cells(r.Throughput, func(t throughput) string { return t.Rival }) {
		var points plotter.XYs
		for _, t := range r.Throughput {
			if t.Rival == rival && t.Streams == streams && t.Reason == "" && y(t) > 0 {
				points = append(points, plotter.XY{X: float64(t.Size), Y: y(t)})
			}
		}
		if err := addLine(p, rival, points, false, true); err != nil {
			return err
		}
	}
	return nil
}

func (r *results) throughputChart(streams int) (*plot.Plot, error) {
	title := "Records per second, one stream"
	if streams != 1 {
		title = fmt.Sprintf("Records per second, %d streams together", streams)
	}
	p := newChart(title, "size of a record", "records per second")
	return p, r.bySize(p, streams, func(t throughput) float64 { return 1e9 / t.Nanoseconds })
}

func (r *results) cpuChart() (*plot.Plot, error) {
	p := newChart("Processor time, one stream, both ends and everything between them", "size of a record", "seconds per million records")
	p.Legend.Left = true
	return p, r.bySize(p, 1, func(t throughput) float64 { return t.CPU })
}

func (r *results) latencyChart(streams int) (*plot.Plot, error) {
	p := newChart(fmt.Sprintf("Latency of %d-byte records, %s: p50, and p99 dashed", pacedSize, countStreams(streams)),
		"records per second, all streams together", "microseconds from when a record was due")
	p.Legend.Left = true
	p.X.Tick.Marker = marks(cells(r.Paced, func(p paced) int { return p.Rate }), func(v int) string { return short(float64(v)) })
	for _, rival := range cells(r.Paced, func(p paced) string { return p.Rival }) {
		var middle, high plotter.XYs
		for _, x := range r.Paced {
			if x.Rival == rival && x.Streams == streams && x.Reason == "" {
				middle = append(middle, plotter.XY{X: float64(x.Rate), Y: x.P50})
				high = append(high, plotter.XY{X: float64(x.Rate), Y: x.P99})
			}
		}
		if err := addLine(p, rival, middle, false, true); err != nil {
			return nil, err
		}
		if err := addLine(p, rival, high, true, false); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func (r *results) idleChart() (*plot.Plot, error) {
	p := newChart("Memory of an idle stream, both ends together", "", "bytes")
	p.X.Scale, p.Y.Scale = plot.LinearScale{}, plot.LinearScale{}
	p.Y.Tick.Marker = plot.DefaultTicks{}
	var values plotter.Values
	var names []string
	for _, i := range r.Idle {
		if i.Reason == "" {
			values, names = append(values, i.Bytes), append(names, fmt.Sprintf("%s × %s", i.Name, short(float64(i.Streams))))
		}
	}
	if len(values) == 0 {
		return p, nil
	}
	bars, err := plotter.NewBarChart(values, 40)
	if err != nil {
		return nil, err
	}
	bars.Color, bars.LineStyle.Color = palette["nats"], palette["nats"]
	p.Add(bars)
	p.NominalX(names...)
	p.Y.Min = 0
	return p, nil
}
