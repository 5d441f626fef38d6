// Package typed gives streams the types of their records.
//
//	// The producer
//	typed.Handle(server, "prices", func(s *typed.ServerStream[Query, Price]) error {
//		for price := range watch(s.Context(), s.Request.Symbol) {
//			if err := s.Send(price); err != nil {
//				return err
//			}
//		}
//		return nil
//	})
//
//	// The consumer
//	s, err := typed.Open[Query, Price](ctx, client, "prices", Query{Symbol: "X"})
//	for price, err := range s.All() { … }
//
// The first type is that of the request, and of the records that the consumer sends after it. The second type is that
// of the producer's records. The two ends may use different types if the codec decodes one from the other.
//
// # Codecs
//
// The consumer chooses the codec: [MsgPack], unless [WithCodecs] sets another. The producer accepts all codecs that its
// own WithCodecs lists: MsgPack and [JSON] by default. If the producer lacks the codec, the stream ends with
// stream.CloseUnsupportedData and a reason that names the codecs of both ends. Package protocodec has a codec for
// Protocol Buffers, and package cborcodec one for CBOR. Each is a module of its own. A codec of your own is a type with
// three methods. Records are encoded straight into packets. docs/PROTOCOL.md section 6 has the format.
//
// # Errors
//
// The errors are those of package stream. If a record does not decode, one call of Recv fails with a [*DecodeError],
// and the stream goes on. A request that does not decode ends the stream with stream.CloseBadRequest.
package typed

import (
	"context"
	"fmt"
	"io"
	"iter"
	"strings"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// header names the codec of a stream in its request.
const header = "Record-Codec"

// Option configures [Open] or [Handle].
type Option func(*options)

type options struct {
	codecs []Codec
	queue  string
	header nats.Header
	open   []stream.OpenOption
}

func collect(opts []Option) options {
	o := options{codecs: []Codec{MsgPack, JSON}}
	for _, set := range opts {
		set(&o)
	}
	return o
}

// WithCodecs sets the codecs. Open uses the first of them, and Handle accepts all of them.
func WithCodecs(first Codec, more ...Codec) Option {
	return func(o *options) { o.codecs = append([]Codec{first}, more...) }
}

// WithQueue makes Handle a member of a queue group: NATS gives each request to one member. Open ignores it.
func WithQueue(queue string) Option { return func(o *options) { o.queue = queue } }

// WithHeader sets headers of the request of Open. Handle ignores it.
func WithHeader(h nats.Header) Option { return func(o *options) { o.header = h } }

// WithOpenOptions sets options of the stream that Open opens. Handle ignores it.
func WithOpenOptions(opts ...stream.OpenOption) Option {
	return func(o *options) { o.open = append(o.open, opts...) }
}

// Stream is the consumer's end of a stream. Its methods may be called as those of [stream.Stream]: one goroutine may
// receive while others send.
type Stream[Req, Rec any] struct {
	raw   *stream.Stream
	codec Codec
}

// Open opens a stream with the request req. It does not wait for the producer: the first Recv does. Errors: those of
// [stream.Client.OpenMsg], and the codec's if req cannot be encoded.
func Open[Req, Rec any](ctx context.Context, c *stream.Client, subject string, req Req, opts ...Option) (*Stream[Req, Rec], error) {
	o := collect(opts)
	codec := o.codecs[0]
	data, err := codec.Append(nil, req)
	if err != nil {
		return nil, fmt.Errorf("typed: encode the request, a %T, as %s: %w", req, codec.Name(), err)
	}
	h := make(nats.Header, len(o.header)+1)
	for k, v := range o.header {
		h[k] = v
	}
	h[header] = []string{codec.Name()}
	s, err := c.OpenMsg(ctx, &nats.Msg{Subject: subject, Header: h, Data: data}, o.open...)
	if err != nil {
		return nil, err
	}
	return &Stream[Req, Rec]{s, codec}, nil
}

// Recv returns the next record. It waits and fails as [stream.Stream.Recv] does: [io.EOF] is the normal end.
func (s *Stream[Req, Rec]) Recv() (Rec, error) { return recv[Rec](s.raw.Next, s.codec) }

// All returns an iterator over the records, as [stream.Stream.All] does. It also stops after a record that does not
// decode.
func (s *Stream[Req, Rec]) All() iter.Seq2[Rec, error] { return all(s.Recv) }

// Send sends v to the producer. It waits and fails as [stream.Stream.Write] does.
func (s *Stream[Req, Rec]) Send(v Req) error {
	e := encoding[Req]{codec: s.codec, v: v}
	_, err := s.raw.WriteAppend(e.append)
	return e.result(err)
}

// CloseSend ends this end's direction; see [stream.Stream.CloseSend].
func (s *Stream[Req, Rec]) CloseSend() error { return s.raw.CloseSend() }

// Close ends the stream; see [stream.Stream.Close].
func (s *Stream[Req, Rec]) Close() error { return s.raw.Close() }

// Raw returns the stream below, for its header, deadlines, totals and the like.
func (s *Stream[Req, Rec]) Raw() *stream.Stream { return s.raw }

// Codec returns the codec of the records.
func (s *Stream[Req, Rec]) Codec() Codec { return s.codec }

// Handler produces one stream. Its result ends the stream as that of a [stream.Handler] does.
type Handler[Req, Rec any] func(s *ServerStream[Req, Rec]) error

// ServerStream is the producer's end of a stream. One goroutine may receive while others send.
type ServerStream[Req, Rec any] struct {
	Request Req // the request that opened the stream
	raw     *stream.Request
	writer  *stream.Writer
	codec   Codec
}

// Handle serves the requests on subject with h. Errors: those of [stream.Server.HandleQueue].
func Handle[Req, Rec any](s *stream.Server, subject string, h Handler[Req, Rec], opts ...Option) (*stream.Registration, error) {
	if h == nil {
		return nil, fmt.Errorf("typed: Handle needs a handler, it got nil")
	}
	o := collect(opts)
	return s.HandleQueue(subject, o.queue, func(w *stream.Writer, r *stream.Request) error {
		codec, err := choose(r.Header.Get(header), o.codecs)
		if err != nil {
			return err
		}
		s := &ServerStream[Req, Rec]{raw: r, writer: w, codec: codec}
		if err := codec.Decode(r.Data, &s.Request); err != nil {
			return &stream.CloseError{Code: stream.CloseBadRequest, Text: fmt.Sprintf("decode the request, %d bytes of %s: %v", len(r.Data), codec.Name(), err)}
		}
		return h(s)
	})
}

// choose returns the codec that a request names, or the first for a request that names none.
func choose(name string, codecs []Codec) (Codec, error) {
	if name == "" {
		return codecs[0], nil
	}
	names := make([]string, 0, len(codecs))
	for _, c := range codecs {
		if c.Name() == name {
			return c, nil
		}
		names = append(names, c.Name())
	}
	return nil, &stream.CloseError{
		Code: stream.CloseUnsupportedData,
		Text: fmt.Sprintf("the consumer asks for codec %.40q, the producer has %s", name, strings.Join(names, ", ")),
	}
}

// Context ends when the consumer leaves, when its deadline passes, and when the handler has returned.
func (s *ServerStream[Req, Rec]) Context() context.Context { return s.raw.Context() }

// Send sends v to the consumer. It waits and fails as [stream.Writer.Write] does.
func (s *ServerStream[Req, Rec]) Send(v Rec) error {
	e := encoding[Rec]{codec: s.codec, v: v}
	_, err := s.writer.WriteAppend(e.append)
	return e.result(err)
}

// Recv returns the next record of the consumer. It waits and fails as [stream.Request.Recv] does: [io.EOF] comes after
// CloseSend.
func (s *ServerStream[Req, Rec]) Recv() (Req, error) { return recv[Req](s.raw.Next, s.codec) }

// All returns an iterator over the consumer's records, as [stream.Request.All] does. It also stops after a record that
// does not decode.
func (s *ServerStream[Req, Rec]) All() iter.Seq2[Req, error] { return all(s.Recv) }

// Raw returns the request and the writer below, for headers, Draining and the like.
func (s *ServerStream[Req, Rec]) Raw() (*stream.Request, *stream.Writer) { return s.raw, s.writer }

// Codec returns the codec of the records.
func (s *ServerStream[Req, Rec]) Codec() Codec { return s.codec }

// DecodeError is the error of a record that does not decode. The stream goes on. It does not match errors that end
// streams.
type DecodeError struct {
	Codec string // name of the codec
	Size  int    // bytes of the record
	Type  string // of the target
	Text  string // of the codec's error
}

func (e *DecodeError) Error() string {
	return fmt.Sprintf("typed: decode a record of %d bytes as %s into %s: %s", e.Size, e.Codec, e.Type, e.Text)
}

// recv decodes the next record.
func recv[T any](next func() ([]byte, error), codec Codec) (v T, err error) {
	record, err := next()
	if err != nil {
		return v, err
	}
	if err := codec.Decode(record, &v); err != nil {
		var none T
		return none, &DecodeError{codec.Name(), len(record), fmt.Sprintf("%T", v), err.Error()}
	}
	return v, nil
}

// encoding encodes a value straight into a packet.
type encoding[T any] struct {
	codec Codec
	v     T
	err   error // of the codec
}

func (e *encoding[T]) append(dst []byte) ([]byte, error) {
	b, err := e.codec.Append(dst, e.v)
	e.err = err
	return b, err
}

// result returns the error of a send whose write returned err. An error of the codec is not wrapped, because one that
// is io.EOF would look like an end.
func (e *encoding[T]) result(err error) error {
	if e.err != nil {
		return fmt.Errorf("typed: encode a %T as %s: %v", e.v, e.codec.Name(), e.err)
	}
	return err
}

// all returns the results of recv until io.EOF.
func all[T any](recv func() (T, error)) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		for {
			v, err := recv()
			if err == io.EOF || !yield(v, err) || err != nil {
				return
			}
		}
	}
}
