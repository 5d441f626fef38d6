package streamgrpc

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/natsstream/stream"
)

// serverStream is a call at its server. One goroutine may send and another may receive, as with gRPC. The one that
// sends also sets the header and the trailer.
type serverStream struct {
	server    *Server
	writer    *stream.Writer
	request   *stream.Request
	method    string
	call      call
	codec     encoding.CodecV2
	streaming bool // the client sends any number of messages
	watched   watched
	ctx       context.Context

	received bool // the only message of the client was received
	buf      []byte

	header     metadata.MD
	headerSent bool
	trailer    metadata.MD
	invalid    error // of the first trailer that gRPC does not allow
}

var _ grpc.ServerStream = (*serverStream)(nil)

// transportStream is the call as grpc.SetHeader, grpc.SendHeader and grpc.SetTrailer use it.
type transportStream struct{ *serverStream }

var _ grpc.ServerTransportStream = transportStream{}

func (s transportStream) Method() string { return s.method }

// SetTrailer adds to the trailer.
func (s transportStream) SetTrailer(md metadata.MD) error {
	if err := checkReserved(md); err != nil {
		return err
	}
	s.trailer = metadata.Join(s.trailer, md)
	return nil
}

func (s *serverStream) Context() context.Context { return s.ctx }

// SetHeader adds to the header, which is sent with the first message or the status.
func (s *serverStream) SetHeader(md metadata.MD) error {
	if s.headerSent {
		return status.Error(codes.Internal, "the header was sent already")
	}
	if err := checkReserved(md); err != nil {
		return err
	}
	s.header = metadata.Join(s.header, md)
	return nil
}

// SendHeader sends the header at once.
func (s *serverStream) SendHeader(md metadata.MD) error {
	if err := s.SetHeader(md); err != nil {
		return err
	}
	return s.sendHeader()
}

func (s *serverStream) sendHeader() error {
	s.headerSent = true
	s.buf = appendMetadata(append(s.buf[:0], recordHeader), s.header)
	if err := s.write(); err != nil {
		return err
	}
	s.watched.outHeader(s.header)
	return nil
}

// write sends s.buf as a record.
func (s *serverStream) write() error {
	_, err := s.writer.Write(s.buf)
	if err != nil {
		return statusOf(s.ctx, err)
	}
	return nil
}

// SetTrailer adds to the trailer. If gRPC does not allow md, the call fails with codes.Internal.
func (s *serverStream) SetTrailer(md metadata.MD) {
	if err := (transportStream{s}).SetTrailer(md); err != nil && s.invalid == nil {
		s.invalid = err
	}
}

// SendMsg sends m, and may block while the client does not read.
func (s *serverStream) SendMsg(m any) error {
	switch {
	case s.headerSent:
	case len(s.header) > 0:
		if err := s.sendHeader(); err != nil {
			return err
		}
	default: // the message shows that there is none
		s.headerSent = true
		s.watched.outHeader(nil)
	}
	var err error
	if s.buf, err = appendMessage(append(s.buf[:0], recordMessage), s.codec, m); err != nil {
		return err
	}
	if err := s.write(); err != nil {
		return err
	}
	s.watched.outPayload(m, len(s.buf)-1)
	return nil
}

// RecvMsg receives the next message into m. It returns io.EOF after the last one.
func (s *serverStream) RecvMsg(m any) error {
	if !s.streaming {
		if s.received {
			return io.EOF
		}
		s.received = true
	}
	if s.call.inline {
		if s.streaming {
			return status.Error(codes.Internal, "the client sent one message only: its stub is of another version")
		}
		return s.decode(s.call.message, m)
	}
	record, err := s.request.Recv()
	switch {
	case err == io.EOF && s.streaming:
		return io.EOF
	case err == io.EOF:
		return status.Error(codes.Internal, "the client sent no message")
	case err != nil && s.ctx.Err() != nil:
		return status.FromContextError(s.ctx.Err()).Err()
	case err != nil:
		return statusOf(s.ctx, err)
	case len(record) == 0 || record[0] != recordMessage:
		return status.Error(codes.Internal, "a record that is no message: is the peer a client of this package?")
	}
	return s.decode(record[1:], m)
}

func (s *serverStream) decode(message []byte, m any) error {
	if err := decode(message, s.server.maxRecv, s.codec, m); err != nil {
		return err
	}
	s.watched.inPayload(m, len(message))
	return nil
}

// end sends the status of the service's result, and the trailer. The stream ends normally after it.
func (s *serverStream) end(result error) error {
	if result == nil {
		result = s.invalid
	}
	st, ok := status.FromError(result)
	if !ok {
		st = status.FromContextError(result)
	}
	err := s.sendStatus(st)
	s.watched.trailer(s.trailer)
	s.watched.end(s.trailer, st.Err())
	return err
}

func (s *serverStream) sendStatus(st *status.Status) error {
	if !s.headerSent && len(s.header) > 0 {
		if err := s.sendHeader(); err != nil {
			return err
		}
	}
	if st.Code() == codes.OK && len(s.trailer) == 0 {
		return nil
	}
	encoded, err := proto.Marshal(st.Proto())
	if err != nil {
		return err
	}
	s.buf = appendMetadata(append(s.buf[:0], recordStatus), s.trailer)
	s.buf = protowire.AppendTag(s.buf, fieldStatus, protowire.BytesType)
	s.buf = protowire.AppendBytes(s.buf, encoded)
	if _, err = s.writer.Write(s.buf); errors.Is(err, stream.ErrRecordTooLarge) {
		return &stream.CloseError{Code: stream.CloseMessageTooBig, Text: "the trailer or the details of the status are too large"}
	}
	return err
}
