package typed_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
	"github.com/natsstream/stream/typed"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type query struct {
	Symbol string `json:"symbol"`
	Count  int    `json:"count"`
}

type price struct {
	Symbol string  `json:"symbol"`
	Number int     `json:"number"`
	Value  float64 `json:"value"`
}

// ends returns a client and a server on connections of their own to url.
func ends(t testing.TB, url string) (*stream.Client, *stream.Server, *nats.Conn) {
	t.Helper()
	dial := func() *nats.Conn {
		nc, err := nats.Connect(url, nats.IgnoreDiscoveredServers())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(nc.Close)
		return nc
	}
	nc := dial()
	client, err := stream.NewClient(stream.ClientParams{Conn: dial()})
	if err != nil {
		t.Fatal(err)
	}
	server, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = client.Close()
		_ = server.Close()
	})
	return client, server, nc
}

func handle[Req, Rec any](t testing.TB, s *stream.Server, nc *nats.Conn, h typed.Handler[Req, Rec], opts ...typed.Option) {
	t.Helper()
	if _, err := typed.Handle(s, "prices", h, opts...); err != nil {
		t.Fatal(err)
	}
	if err := nc.FlushTimeout(20 * time.Second); err != nil {
		t.Fatal(err)
	}
}

func limited(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// count answers with as many prices as the query says, and then with one for each further query.
func count(s *typed.ServerStream[query, price]) error {
	n := 0
	for ; n < s.Request.Count; n++ {
		if err := s.Send(price{s.Request.Symbol, n, float64(n) / 2}); err != nil {
			return err
		}
	}
	for q, err := range s.All() {
		if err != nil {
			return err
		}
		if err := s.Send(price{q.Symbol, n, 0}); err != nil {
			return err
		}
		n++
	}
	return nil
}

func verifyCount(t *testing.T, c *stream.Client, n, more int, opts ...typed.Option) {
	t.Helper()
	s, err := typed.Open[query, price](limited(t), c, "prices", query{"X", n}, opts...)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for range more {
		if err := s.Send(query{Symbol: "Y"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	i := 0
	for p, err := range s.All() {
		want := price{"X", i, float64(i) / 2}
		if i >= n {
			want = price{"Y", i, 0}
		}
		if err != nil || p != want {
			t.Fatalf("%+v, %v; want %+v", p, err, want)
		}
		i++
	}
	if i != n+more {
		t.Errorf("%d records, want %d", i, n+more)
	}
}

func TestRecordsOfBothTypes(t *testing.T) {
	client, server, nc := ends(t, streamtest.Run(t).URL())
	handle(t, server, nc, count)
	for _, codec := range []typed.Codec{typed.MsgPack, typed.JSON} {
		verifyCount(t, client, 1000, 10, typed.WithCodecs(codec))
	}
	verifyCount(t, client, 3, 0)
}

func TestRecordsUnderLoss(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	i := streamtest.RunInterceptor(t, streamtest.Run(t).URL(), streamtest.Only(streamtest.HasPrefix(0xF5),
		streamtest.Drop(0.02, rng), streamtest.Duplicate(0.02, rng), streamtest.Reorder(0.05, 3, rng)))
	client, server, nc := ends(t, i.URL())
	handle(t, server, nc, count)
	verifyCount(t, client, 20_000, 100)
}

// named is a codec that few know.
type named struct {
	typed.Codec
	name string
}

func (n named) Name() string { return n.name }

func TestUnknownCodecEndsTheStream(t *testing.T) {
	client, server, nc := ends(t, streamtest.Run(t).URL())
	handle(t, server, nc, count, typed.WithCodecs(typed.JSON, named{typed.JSON, "text"}))
	s, err := typed.Open[query, price](limited(t), client, "prices", query{}, typed.WithCodecs(named{typed.JSON, "rare"}))
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Recv()
	if ce, ok := errors.AsType[*stream.CloseError](err); !ok || ce.Code != stream.CloseUnsupportedData ||
		!strings.Contains(ce.Text, "rare") || !strings.Contains(ce.Text, "json, text") {
		t.Errorf("%v", err)
	}
	verifyCount(t, client, 3, 1, typed.WithCodecs(named{typed.JSON, "text"}))
}

func TestRequestThatDoesNotDecode(t *testing.T) {
	client, server, nc := ends(t, streamtest.Run(t).URL())
	handle(t, server, nc, count)
	for _, h := range []nats.Header{nil, {"Record-Codec": {"json"}}} {
		s, err := client.OpenMsg(limited(t), &nats.Msg{Subject: "prices", Header: h, Data: []byte("\xc1")})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); !errors.Is(err, &stream.CloseError{Code: stream.CloseBadRequest}) {
			t.Errorf("%v: %v", h, err)
		}
	}
}

// A record that does not decode fails one call, with an error that is no end of a stream.
func TestRecordThatDoesNotDecode(t *testing.T) {
	client, server, nc := ends(t, streamtest.Run(t).URL())
	handle(t, server, nc, func(s *typed.ServerStream[query, price]) error {
		if err := s.Send(price{Number: 1}); err != nil {
			return err
		}
		_, w := s.Raw()
		if _, err := w.Write([]byte(`"text"`)); err != nil {
			return err
		}
		return s.Send(price{Number: 3})
	})
	s, err := typed.Open[query, price](limited(t), client, "prices", query{}, typed.WithCodecs(typed.JSON))
	if err != nil {
		t.Fatal(err)
	}
	if p, err := s.Recv(); err != nil || p.Number != 1 {
		t.Fatalf("%+v, %v", p, err)
	}
	p, err := s.Recv()
	if de, ok := errors.AsType[*typed.DecodeError](err); !ok || de.Size != 6 || de.Codec != "json" || p != (price{}) {
		t.Errorf("%+v, %v", p, err)
	}
	if p, err := s.Recv(); err != nil || p.Number != 3 {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Errorf("%v, want io.EOF", err)
	}
}

// eof is a codec whose errors look like the end of a stream.
type eof struct{}

func (eof) Name() string                       { return "eof" }
func (eof) Append([]byte, any) ([]byte, error) { return nil, io.EOF }
func (eof) Decode([]byte, any) error           { return io.EOF }

func TestErrorOfACodecIsNoEnd(t *testing.T) {
	client, server, nc := ends(t, streamtest.Run(t).URL())
	errs := make(chan error, 2)
	handle(t, server, nc, func(s *typed.ServerStream[query, price]) error {
		errs <- s.Send(price{})
		_, w := s.Raw()
		_, err := w.Write([]byte("x"))
		return err
	}, typed.WithCodecs(lenient{}))
	s, err := typed.Open[query, price](limited(t), client, "prices", query{}, typed.WithCodecs(lenient{}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("Recv: %v", err)
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Errorf("%v, want io.EOF", err)
	}
	if err := <-errs; err == nil || errors.Is(err, io.EOF) {
		t.Errorf("Send: %v", err)
	}
	if _, err := typed.Open[query, price](limited(t), client, "prices", query{}, typed.WithCodecs(eof{})); err == nil {
		t.Error("Open: no error")
	}
}

// lenient encodes and decodes requests, and is eof for records.
type lenient struct{ eof }

func (lenient) Append(dst []byte, v any) ([]byte, error) {
	if _, ok := v.(query); ok {
		return dst, nil
	}
	return nil, io.EOF
}

func (lenient) Decode(b []byte, _ any) error {
	if len(b) == 0 {
		return nil
	}
	return io.EOF
}

func TestRecordsLargerThanAPacket(t *testing.T) {
	client, server, nc := ends(t, streamtest.Run(t).URL())
	handle(t, server, nc, func(s *typed.ServerStream[string, string]) error {
		return s.Send(strings.Repeat(s.Request, 1<<20))
	})
	s, err := typed.Open[string, string](limited(t), client, "prices", "ab")
	if err != nil {
		t.Fatal(err)
	}
	if v, err := s.Recv(); err != nil || v != strings.Repeat("ab", 1<<20) {
		t.Errorf("%d bytes, %v", len(v), err)
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Errorf("%v, want io.EOF", err)
	}
}

// Send costs no more allocations than WriteObject.
func TestSendAllocatesLittle(t *testing.T) {
	client, server, nc := ends(t, streamtest.Run(t).URL())
	const n = 20_000
	handle(t, server, nc, func(s *typed.ServerStream[query, price]) error {
		_, w := s.Raw()
		v := price{"X", 1, 2}
		perRun := func(f func() error) float64 {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			for range n {
				if err := f(); err != nil {
					return -1
				}
			}
			runtime.ReadMemStats(&after)
			return float64(after.Mallocs-before.Mallocs) / n
		}
		send := perRun(func() error { return s.Send(v) })
		object := perRun(func() error { _, err := w.WriteObject(v); return err })
		if send < 0 || object < 0 || send > object+0.5 {
			return fmt.Errorf("Send allocates %.2f times, WriteObject %.2f", send, object)
		}
		return nil
	})
	s, err := typed.Open[query, price](limited(t), client, "prices", query{})
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = s.Raw().Next()
	}
	if err != io.EOF {
		t.Error(err)
	}
}

func TestHandleNeedsAHandler(t *testing.T) {
	_, server, _ := ends(t, streamtest.Run(t).URL())
	if _, err := typed.Handle[query, price](server, "prices", nil); err == nil {
		t.Error("no error")
	}
}
