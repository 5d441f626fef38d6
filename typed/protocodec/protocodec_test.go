package protocodec_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/typed"
	"github.com/natsstream/stream/typed/protocodec"
)

var codec = typed.WithCodecs(protocodec.Codec)

// structpb.Value has a oneof, which the codecs of the library cannot carry.
func TestMessagesOfBothWays(t *testing.T) {
	client, server, nc := ends(t)
	if _, err := typed.Handle(server, "values", func(s *typed.ServerStream[*wrapperspb.Int32Value, *structpb.Value]) error {
		for i := range s.Request.GetValue() {
			if err := s.Send(structpb.NewNumberValue(float64(i))); err != nil {
				return err
			}
		}
		for v, err := range s.All() {
			if err != nil {
				return err
			}
			if err := s.Send(structpb.NewStringValue(fmt.Sprint(v.GetValue()))); err != nil {
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
	s, err := typed.Open[*wrapperspb.Int32Value, *structpb.Value](ctx, client, "values", wrapperspb.Int32(3), codec)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Send(wrapperspb.Int32(7)), s.CloseSend()); err != nil {
		t.Fatal(err)
	}
	want := []*structpb.Value{structpb.NewNumberValue(0), structpb.NewNumberValue(1), structpb.NewNumberValue(2), structpb.NewStringValue("7")}
	for i, w := range want {
		if v, err := s.Recv(); err != nil || !proto.Equal(v, w) {
			t.Errorf("record %d: %v, %v; want %v", i, v, err, w)
		}
	}
	if _, err := s.Recv(); err != io.EOF {
		t.Errorf("%v, want io.EOF", err)
	}
}

// A producer without the codec says which ones it has.
func TestProducerWithoutTheCodec(t *testing.T) {
	client, server, nc := ends(t)
	if _, err := typed.Handle(server, "values", func(*typed.ServerStream[string, string]) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if err := nc.FlushTimeout(patience); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	s, err := typed.Open[*wrapperspb.Int32Value, *wrapperspb.Int32Value](ctx, client, "values", wrapperspb.Int32(3), codec)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); !errors.Is(err, &stream.CloseError{Code: stream.CloseUnsupportedData}) {
		t.Errorf("%v", err)
	}
}

func TestValuesThatAreNoMessages(t *testing.T) {
	var none *wrapperspb.Int32Value
	for _, v := range []any{1, "text", nil, none} {
		if _, err := protocodec.Codec.Append(nil, v); err == nil {
			t.Errorf("%T was encoded", v)
		}
	}
	var number int
	var text *string
	for _, v := range []any{number, &number, &text, nil} {
		if err := protocodec.Codec.Decode(nil, v); err == nil {
			t.Errorf("a record was decoded into a %T", v)
		}
	}
	if err := protocodec.Codec.Decode([]byte{0xff}, wrapperspb.Int32(1)); err == nil {
		t.Error("invalid bytes were decoded")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte{8, 7})
	f.Fuzz(func(_ *testing.T, b []byte) {
		var v *structpb.Value
		_ = protocodec.Codec.Decode(b, &v)
	})
}

func Example() {
	// Both ends name the codec. The producer may list further ones.
	_ = func(ctx context.Context, client *stream.Client, server *stream.Server, symbol *wrapperspb.StringValue) error {
		if _, err := typed.Handle(server, "prices", func(s *typed.ServerStream[*wrapperspb.StringValue, *structpb.Value]) error {
			return s.Send(structpb.NewStringValue(s.Request.GetValue()))
		}, typed.WithCodecs(protocodec.Codec)); err != nil {
			return err
		}
		_, err := typed.Open[*wrapperspb.StringValue, *structpb.Value](ctx, client, "prices", symbol, typed.WithCodecs(protocodec.Codec))
		return err
	}
}
