package streamgrpc

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/natsstream/stream"
)

// inlineSize is the largest message that travels in the request of its call. A larger one follows as a record, which
// has no limit of the NATS server's.
const inlineSize = 64 << 10

// clientStream is a call at its client. One goroutine may send and another may receive, as with gRPC. Header may be
// called by a third. When the context ends, a goroutine of its own runs abandoned. Each of them is the reader while it
// holds the place in reading.
type clientStream struct {
	conn    *ClientConn
	subject string
	desc    *grpc.StreamDesc
	header  call
	codec   encoding.CodecV2

	maxRecv, maxSend int // maxSend 0: no limit
	waitForReady     bool
	credentials      []grpc.PerRPCCredsCallOption
	headerTo         []*metadata.MD
	trailerTo        []*metadata.MD
	peerTo           []*peer.Peer
	onFinish         []func(error)

	watched watched
	ctx     context.Context
	cancel  context.CancelFunc
	stream  *stream.Stream // nil until start
	unwatch func() bool    // ends the wait for the end of ctx; nil without such a wait; held by the reader

	// The sender's.
	buf      []byte
	sent     bool // the only message was sent
	sendDone bool
	sendErr  error // why SendMsg failed, if the stream was never opened

	// A reader holds the place in reading.
	reading chan struct{}
	pending []byte // a record that Header read and RecvMsg has not
	ended   error  // the result of the call
	trailer metadata.MD

	headerOnce sync.Once
	headerRead chan struct{} // closed when response is set, or headerErr
	response   metadata.MD   // the header of the server
	headerErr  error         // of a call that failed before its header came
}

// apply reads the options of a call.
func (s *clientStream) apply(opts []grpc.CallOption) error {
	for _, o := range opts {
		switch o := o.(type) {
		case grpc.HeaderCallOption:
			s.headerTo = append(s.headerTo, o.HeaderAddr)
		case grpc.TrailerCallOption:
			s.trailerTo = append(s.trailerTo, o.TrailerAddr)
		case grpc.PeerCallOption:
			s.peerTo = append(s.peerTo, o.PeerAddr)
		case grpc.FailFastCallOption:
			s.waitForReady = !o.FailFast
		case grpc.OnFinishCallOption:
			s.onFinish = append(s.onFinish, o.OnFinish)
		case grpc.MaxRecvMsgSizeCallOption:
			s.maxRecv = o.MaxRecvMsgSize
		case grpc.MaxSendMsgSizeCallOption:
			s.maxSend = o.MaxSendMsgSize
		case grpc.PerRPCCredsCallOption:
			s.credentials = append(s.credentials, o)
		case grpc.ContentSubtypeCallOption:
			s.header.codec = o.ContentSubtype
		case grpc.ForceCodecV2CallOption:
			s.codec, s.header.codec = o.CodecV2, o.CodecV2.Name()
		case grpc.ForceCodecCallOption:
			s.codec, s.header.codec = oldCodec{o.Codec}, o.Codec.Name()
		case grpc.CustomCodecCallOption:
			return status.Error(codes.Unimplemented, "grpc.CallCustomCodec is not supported: use grpc.ForceCodec")
		case grpc.CompressorCallOption:
			if o.CompressorType != "" && o.CompressorType != encoding.Identity {
				return status.Errorf(codes.Unimplemented, "compression is not supported: call without grpc.UseCompressor(%q)", o.CompressorType)
			}
		}
	}
	return nil
}

// withCredentials returns md with the metadata of the call's credentials, or an error if gRPC does not allow one of the
// entries.
func (s *clientStream) withCredentials(ctx context.Context, md metadata.MD) (metadata.MD, error) {
	copied := false
	for _, o := range s.credentials {
		if o.Creds.RequireTransportSecurity() && !s.conn.secure {
			return nil, status.Error(codes.Unauthenticated, "the credentials demand transport security: "+
				"encrypt the connections to NATS, and say so by streamgrpc.WithTransportSecurity")
		}
		more, err := o.Creds.GetRequestMetadata(ctx, s.subject)
		if err != nil {
			if _, ok := status.FromError(err); ok {
				return nil, err
			}
			return nil, status.Errorf(codes.Unauthenticated, "metadata of the credentials: %v", err)
		}
		if !copied {
			md, copied = md.Copy(), true
			if md == nil {
				md = metadata.MD{}
			}
		}
		for k, v := range more {
			md.Append(k, v)
		}
	}
	return md, checkReserved(md)
}

func checkReserved(md metadata.MD) error {
	if err := checkMetadata(md); err != nil {
		return status.Error(codes.Internal, err.Error())
	}
	return nil
}

// start opens the stream. message is the only message of the client, or nil.
func (s *clientStream) start(message []byte) error {
	if deadline, ok := s.ctx.Deadline(); ok {
		if s.header.timeout = time.Until(deadline); s.header.timeout <= 0 {
			return s.neverOpened(status.Error(codes.DeadlineExceeded, "the deadline passed before the call"))
		}
	}
	if message != nil && len(message) <= inlineSize {
		s.header.message, s.header.inline = message, true
	}
	data := s.header.append(nil)
	var err error
	if s.waitForReady {
		s.stream, err = s.conn.streams.Open(s.ctx, s.subject, data, stream.WithRetry(readyRetry))
	} else {
		s.stream, err = s.conn.streams.Open(s.ctx, s.subject, data)
	}
	if err != nil {
		return s.neverOpened(statusOf(s.ctx, err))
	}
	s.watched.outHeader(s.header.md)
	if len(s.watched.handlers)+len(s.onFinish) > 0 { // they have to know the end of a call that nobody reads
		s.reading <- struct{}{}
		s.unwatch = context.AfterFunc(s.ctx, s.abandoned)
		<-s.reading
	}
	for _, p := range s.peerTo {
		*p = peer.Peer{Addr: address(s.subject)}
	}
	if message != nil && !s.header.inline {
		return s.send(append([]byte{recordMessage}, message...))
	}
	return nil
}

// readyRetry repeats a call that waits for its server until its context ends.
var readyRetry = stream.Retry{Attempts: 1 << 30, Wait: 50 * time.Millisecond, MaxWait: time.Second}

// neverOpened ends a call that has no stream.
func (s *clientStream) neverOpened(err error) error {
	s.sendErr = err
	s.reading <- struct{}{}
	s.finish(err)
	<-s.reading
	return err
}

// abandoned ends a call whose context has ended, unless a read does.
func (s *clientStream) abandoned() {
	s.reading <- struct{}{}
	s.finish(statusOf(s.ctx, context.Cause(s.ctx)))
	<-s.reading
}

// address is the subject of a peer.
type address string

func (address) Network() string  { return "nats" }
func (a address) String() string { return string(a) }

var _ net.Addr = address("")

func (s *clientStream) Context() context.Context { return s.ctx }

// SendMsg sends m, and may block while the server does not read. It returns io.EOF if the call has ended; RecvMsg has
// its status.
func (s *clientStream) SendMsg(m any) error {
	if s.sendDone || s.sent && !s.desc.ClientStreams {
		return status.Error(codes.Internal, "SendMsg after CloseSend, or a second message of a call that takes one")
	}
	var err error
	s.buf, err = appendMessage(append(s.buf[:0], recordMessage), s.codec, m)
	if err == nil && s.maxSend > 0 && len(s.buf)-1 > s.maxSend {
		err = status.Errorf(codes.ResourceExhausted, "a message of %d bytes, and at most %d may be sent: raise grpc.MaxCallSendMsgSize", len(s.buf)-1, s.maxSend)
	}
	if err != nil {
		if !s.desc.ClientStreams {
			return s.neverOpened(err)
		}
		s.cancel()
		s.sendErr = err
		return err
	}
	n := len(s.buf) - 1
	if s.desc.ClientStreams {
		err = s.send(s.buf)
	} else {
		s.sent = true
		err = s.start(s.buf[1:])
		s.buf = nil
	}
	if err == nil {
		s.watched.outPayload(m, n)
	}
	return err
}

// send writes a record.
func (s *clientStream) send(record []byte) error {
	_, err := s.stream.Write(record)
	if err == nil {
		return nil
	}
	if errors.Is(err, stream.ErrRecordTooLarge) {
		s.sendErr = statusOf(s.ctx, err)
		s.cancel() // as for gRPC, a message that cannot be sent ends the call
		return s.sendErr
	}
	return io.EOF
}

// CloseSend announces that no further message follows. It returns nil: RecvMsg reports all errors.
func (s *clientStream) CloseSend() error {
	s.sendDone = true
	if s.stream != nil {
		_ = s.stream.CloseSend() // a call that has ended reports that by RecvMsg
	}
	return nil
}

// Header waits for the header of the server, or the end of the call. A call that ended without a header has none.
func (s *clientStream) Header() (metadata.MD, error) {
	for {
		select {
		case <-s.headerRead:
			return s.response, s.headerErr
		case s.reading <- struct{}{}:
			if s.stream == nil && s.ended == nil {
				<-s.reading
				return nil, status.Error(codes.Internal, "Header before the message of the call was sent")
			}
			if s.pending == nil && s.ended == nil {
				s.pending = s.read()
			}
			<-s.reading
		}
	}
}

// Trailer returns the trailer of the server. It is valid after RecvMsg has returned an error, io.EOF included.
func (s *clientStream) Trailer() metadata.MD {
	s.reading <- struct{}{}
	defer func() { <-s.reading }()
	return s.trailer
}

// RecvMsg receives the next message into m. It returns io.EOF at the end of a call whose status is OK, and the status
// otherwise.
func (s *clientStream) RecvMsg(m any) error {
	s.reading <- struct{}{}
	defer func() { <-s.reading }()
	if s.stream == nil && s.ended == nil {
		return status.Error(codes.Internal, "RecvMsg before the message of the call was sent")
	}
	record := s.pending
	s.pending = nil
	if record == nil {
		record = s.next()
	}
	if record == nil {
		if s.ended == io.EOF && !s.desc.ServerStreams {
			return status.Error(codes.Internal, "the server sent no message")
		}
		return s.ended
	}
	if err := decode(record[1:], s.maxRecv, s.codec, m); err != nil {
		s.finish(err)
		return err
	}
	s.watched.inPayload(m, len(record)-1)
	if s.desc.ServerStreams {
		return nil
	}
	// The one message is valid only if the call succeeds.
	if s.next() != nil {
		err := status.Error(codes.Internal, "the server sent a second message")
		s.finish(err)
		return err
	}
	if s.ended != io.EOF {
		return s.ended
	}
	return nil
}

// next returns the next record that is a message, or nil at the end of the call, whose result is in ended. The reader
// runs it.
func (s *clientStream) next() []byte {
	for s.ended == nil {
		if record := s.read(); record != nil {
			return record
		}
	}
	return nil
}

// read reads a record. It returns the record if that is a message, and nil after a header or the end of the call.
func (s *clientStream) read() []byte {
	record, err := s.stream.Recv()
	if err != nil {
		s.broken(err)
		return nil
	}
	if len(record) == 0 {
		s.finish(status.Error(codes.Internal, "an empty record: is the peer a server of this package?"))
		return nil
	}
	switch record[0] {
	case recordHeader:
		md, err := parseHeader(record[1:])
		if err != nil {
			s.finish(status.Error(codes.Internal, err.Error()))
			return nil
		}
		s.setHeader(md, nil)
	case recordMessage:
		s.setHeader(nil, nil)
		return record
	case recordStatus:
		s.finishWithStatus(record[1:])
	default:
		s.finish(status.Errorf(codes.Internal, "a record of kind %q: is the peer of another version?", record[0]))
	}
	return nil
}

// broken ends a call whose stream ended with err before the record of the status.
func (s *clientStream) broken(err error) {
	switch {
	case err == io.EOF: // the status is OK, and the trailer empty
		s.watched.trailer(nil)
		s.finish(io.EOF)
	case errors.Is(err, nats.ErrNoResponders):
		s.finish(s.conn.noResponders(s.ctx, err))
	default:
		s.finish(statusOf(s.ctx, err))
	}
}

// finishWithStatus ends a call with the status that the server sent.
func (s *clientStream) finishWithStatus(b []byte) {
	trailer, encoded, err := parseStatus(b)
	var st spb.Status
	if err == nil {
		err = proto.Unmarshal(encoded, &st)
	}
	s.trailer = trailer
	s.watched.trailer(trailer)
	_, after := s.stream.Recv()
	switch {
	case err == nil && after == nil:
		s.finish(status.Error(codes.Internal, "the server sent a record after the status"))
	case err != nil:
		s.finish(status.Errorf(codes.Internal, "the status of the server: %v", err))
	case st.GetCode() != int32(codes.OK):
		s.finish(status.FromProto(&st).Err())
	default:
		s.finish(io.EOF)
	}
}

// finish makes err the result of the call and releases its stream. The reader runs it.
func (s *clientStream) finish(err error) {
	if s.ended != nil {
		return
	}
	s.ended = err
	s.setHeader(nil, err)
	if s.stream != nil {
		_ = s.stream.Close()
	}
	if s.unwatch != nil {
		s.unwatch()
	}
	s.cancel()
	for _, to := range s.trailerTo {
		*to = s.trailer
	}
	s.watched.end(s.trailer, err)
	if err == io.EOF {
		err = nil
	}
	for _, f := range s.onFinish {
		f(err)
	}
}

// setHeader publishes the header of the server, once.
func (s *clientStream) setHeader(md metadata.MD, err error) {
	s.headerOnce.Do(func() {
		if err != io.EOF {
			s.headerErr = err
		}
		if err == nil {
			s.watched.inHeader(md)
		}
		s.response = md
		for _, to := range s.headerTo {
			*to = md
		}
		close(s.headerRead)
	})
}
