package streamnet_test

import (
	"io"
	"testing"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// BenchmarkDownload compares a download over a connection with the same bytes over a bare stream.
func BenchmarkDownload(b *testing.B) {
	const size, chunk = 64 << 20, 32 << 10
	e := newEnds(b, streamtest.Run(b).URL())
	send := func(w io.Writer) error {
		p := make([]byte, chunk)
		for range size / chunk {
			if _, err := w.Write(p); err != nil {
				return err
			}
		}
		return nil
	}
	if _, err := e.server.Handle("bare", func(w *stream.Writer, _ *stream.Request) error { return send(w) }); err != nil {
		b.Fatal(err)
	}
	l := e.listen(b, "conn")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_ = send(c)
				_ = c.Close()
			}()
		}
	}()
	b.Run("over=stream", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			s, err := e.client.Open(b.Context(), "bare", nil)
			if err != nil {
				b.Fatal(err)
			}
			if n, err := io.Copy(io.Discard, s); n != size || err != nil {
				b.Fatal(n, err)
			}
		}
	})
	b.Run("over=conn", func(b *testing.B) {
		b.SetBytes(size)
		for b.Loop() {
			c := e.dial(b, "conn")
			if n, err := io.Copy(io.Discard, c); n != size || err != nil {
				b.Fatal(n, err)
			}
			_ = c.Close()
		}
	})
}
