package cborcodec_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/typed"
	"github.com/natsstream/stream/typed/cborcodec"
)

var codec = typed.WithCodecs(cborcodec.Codec)

type reading struct {
	Sensor string            `json:"sensor"`
	At     time.Time         `cbor:"at"`
	Values []float64         `json:"values,omitempty"`
	Raw    []byte            `json:"raw"`
	Labels map[string]string `json:"labels"`
}

func TestValuesOfBothWays(t *testing.T) {
	client, server, nc := ends(t)
	if _, err := typed.Handle(server, "readings", func(s *typed.ServerStream[reading, reading]) error {
		if err := s.Send(s.Request); err != nil {
			return err
		}
		for v, err := range s.All() {
			if err != nil {
				return err
			}
			if err := s.Send(v); err != nil {
				return err
			}
		}
		return nil
	}, codec); err != nil {
		t.Fatal(err)
	}
	if err := nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	small := reading{"a", time.Unix(1, 0).UTC(), []float64{1, 2.5}, []byte{0, 1}, map[string]string{"k": "v"}}
	large := small
	large.Raw = bytes.Repeat([]byte{7}, 1<<20)
	s, err := typed.Open[reading, reading](ctx, client, "readings", small, codec)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Send(large), s.CloseSend()); err != nil {
		t.Fatal(err)
	}
	for _, want := range []reading{small, large} {
		v, err := s.Recv()
		v.At = v.At.UTC()
		if err != nil || !reflect.DeepEqual(v, want) {
			t.Errorf("%.100v, %v", v, err)
		}
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Errorf("%v, want io.EOF", err)
	}
}

func TestAppendKeepsWhatWasThere(t *testing.T) {
	for _, room := range []int{0, 3, 64} {
		dst := append(make([]byte, 0, room), "abc"...)
		b, err := cborcodec.Codec.Append(dst, strings.Repeat("x", 20))
		if err != nil || !bytes.HasPrefix(b, []byte("abc")) {
			t.Errorf("%q, %v", b, err)
		}
		var v string
		if err := cborcodec.Codec.Decode(b[3:], &v); err != nil || v != strings.Repeat("x", 20) {
			t.Errorf("%q, %v", v, err)
		}
	}
	if _, err := cborcodec.Codec.Append(nil, make(chan int)); err == nil {
		t.Error("a channel was encoded")
	}
	if err := cborcodec.Codec.Decode([]byte{1, 2}, new(int)); err == nil {
		t.Error("bytes behind the value were ignored")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{0xa1, 0x61, 0x61, 1})
	f.Fuzz(func(_ *testing.T, b []byte) {
		var v any
		_ = cborcodec.Codec.Decode(b, &v)
	})
}

func Example() {
	// Both ends name the codec. The producer may list further ones.
	_ = func(ctx context.Context, client *stream.Client, server *stream.Server) (*typed.Stream[string, reading], error) {
		codec := typed.WithCodecs(cborcodec.Codec)
		if _, err := typed.Handle(server, "readings", func(s *typed.ServerStream[string, reading]) error {
			return s.Send(reading{})
		}, codec); err != nil {
			return nil, err
		}
		return typed.Open[string, reading](ctx, client, "readings", "sensor-1", codec)
	}
}
