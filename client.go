package stream

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/liveness"

	"github.com/natsstream/stream/concurrency"
	"github.com/natsstream/stream/internal/natsconn"
)

// RequestChanLen is the buffer of the channel that OpenStream returns.
const RequestChanLen = 16

// ClientParams configure a [Client]. The zero value of every field but Conn means the default its comment names.
type ClientParams struct {
	// Conn is the connection to use. The client neither closes nor drains it. To hear of subjects that are not allowed, it puts
	// a handler in front of the connection's error handler: set your own before, not after.
	Conn *nats.Conn
	// Codec is how Open and OpenMsg ask producers to encode objects: MsgPack by default. OpenStream always asks for
	// JSON.
	Codec Codec
	// Window is the most bytes one stream's producer may be ahead of its reader, rounded down to a power of two;
	// 4 MiB by default, 4 KiB at least. A stream begins with at most 256 KiB and grows when it is used up. One packet may
	// exceed it.
	Window int
	// MaxBuffered is the same for the windows of all streams together: 64 MiB by default. Windows grow within an eighth
	// of it, and new streams begin with the less the more of it is in use, at least 4 KiB each. What has arrived of records
	// that come in pieces is in it. A record that finds no room waits, within the read that puts it together, and its sender stops.
	// One record at a time may exceed MaxBuffered. One that does not proceed while others wait ends with CloseTryAgainLater.
	// Fallback peers are not in it. It bounds once more what writers keep until peers acknowledge it: as less is left, each
	// stream may keep less, down to a packet, and writes wait. SECURITY.md in the repository lists what is in no budget.
	MaxBuffered int
	// MaxRecordSize is the largest record, in bytes, that is sent or received: 16 MiB by default, or MaxBuffered if that is less,
	// but at least 256 KiB. It may not exceed MaxBuffered, which a record in pieces has to fit into, together with the window of
	// its stream: leave a quarter of MaxBuffered for that. Up to 256 KiB, what a packet holds, it may.
	MaxRecordSize int
	// FallbackBuffer is the most bytes of messages that a producer which speaks only the JSON fallback, and so cannot be told to
	// wait, may be ahead of its reader: 64 MiB by default. Of messages below 64 bytes it is as many as if they had 64, because of
	// what each takes in memory, but at least 1,024. Beyond it that stream ends with CloseTooSlow.
	FallbackBuffer int

	// The times are at least a millisecond.

	// KeepAlive is how long nothing may be heard from a peer, on any stream, before it is asked whether it lives: 500 ms
	// by default. One question asks for all streams that two ends share, so their number does not matter.
	KeepAlive time.Duration
	// PeerTimeout is how long nothing may be heard from a peer, on any stream, before its streams end with
	// [CloseAbnormalClosure]: 3.8 s by default, and otherwise the sum of KeepAlive and 3.3 s, or ResumeTimeout if that is
	// less. KeepAlive is a quarter of it if it would not be less. Times are up to 100 ms longer, and longer if what was sent before a question is still on its way.
	// [Stream.SetPeerTimeout] and [Writer.SetPeerTimeout] set it for one stream.
	PeerTimeout time.Duration
	// AckTimeout is how long an acknowledgement or an answer may take before it is asked for, again if need be: 250 ms
	// by default. Make it longer than a round trip between the peers.
	AckTimeout time.Duration
	// ResumeTimeout is how long what was not acknowledged is kept after the end of a stream, how long a request or its answer
	// may be missed after a reconnect, and how long a single stream of a living peer may be without answers: 5 s by default.
	// Then the stream ends with CloseAbnormalClosure.
	ResumeTimeout time.Duration
	// DisconnectTimeout is how long this end's own connection may be down before its streams end with
	// CloseAbnormalClosure: 30 s by default. The other times stand still meanwhile.
	DisconnectTimeout time.Duration
}

func (p ClientParams) withDefaults() (ClientParams, error) {
	if p.Codec > MsgPack {
		return p, fmt.Errorf("stream: parameter Codec is %d, which is unknown: use JSON, MsgPack or the zero value", p.Codec)
	}
	defaultMaxRecord := 16 << 20
	if p.MaxBuffered > 0 {
		defaultMaxRecord = min(defaultMaxRecord, max(p.MaxBuffered, onePacket))
	}
	for _, f := range []struct {
		name  string
		field *int
		value int
		min   int
	}{
		{"Window", &p.Window, defaultWindow, minWindow},
		{"MaxBuffered", &p.MaxBuffered, defaultMaxBuffered, minWindow},
		{"MaxRecordSize", &p.MaxRecordSize, defaultMaxRecord, 1},
		{"FallbackBuffer", &p.FallbackBuffer, fallbackLimit, 1},
	} {
		if *f.field == 0 {
			*f.field = f.value
		}
		if *f.field < f.min {
			return p, fmt.Errorf("stream: parameter %s is %d bytes: it must be at least %d, or 0 for %d", f.name, *f.field, f.min, f.value)
		}
	}
	if p.MaxRecordSize > max(p.MaxBuffered, onePacket) {
		return p, fmt.Errorf("stream: parameter MaxRecordSize is %d bytes and MaxBuffered %d: no such record would arrive; raise "+
			"MaxBuffered, best to more than twice MaxRecordSize, or lower MaxRecordSize", p.MaxRecordSize, p.MaxBuffered)
	}
	for _, f := range []struct {
		name  string
		field *time.Duration
		value time.Duration
	}{
		{"KeepAlive", &p.KeepAlive, defaultKeepAlive},
		{"AckTimeout", &p.AckTimeout, defaultAckTimeout},
		{"ResumeTimeout", &p.ResumeTimeout, defaultResumeTimeout},
		{"DisconnectTimeout", &p.DisconnectTimeout, defaultDisconnectTimeout},
	} {
		if *f.field == 0 {
			*f.field = f.value
		}
		if *f.field < time.Millisecond {
			return p, fmt.Errorf("stream: parameter %s is %v: it must be at least 1ms, or 0 for %v", f.name, *f.field, f.value)
		}
		*f.field = min(*f.field, never)
	}
	switch {
	case p.PeerTimeout == 0:
		p.PeerTimeout = p.KeepAlive + min(p.ResumeTimeout, defaultPatience)
	case p.PeerTimeout < time.Millisecond:
		return p, fmt.Errorf("stream: parameter PeerTimeout is %v: it must be at least 1ms, or 0 for %v", p.PeerTimeout, p.KeepAlive+min(p.ResumeTimeout, defaultPatience))
	}
	if p.PeerTimeout = min(p.PeerTimeout, 2*never); p.KeepAlive >= p.PeerTimeout {
		p.KeepAlive = p.PeerTimeout / patienceParts
	}
	return p, nil
}

// onePacket is the largest record that travels in one packet, and so takes nothing of MaxBuffered but its stream's window.
const onePacket = singleSize - PacketHeaderSize - FrameHeaderSize

// intervals returns the times of p for package liveness.
func (p *ClientParams) intervals() liveness.Intervals {
	return liveness.Intervals{
		KeepAlive: int64(p.KeepAlive), Ack: int64(p.AckTimeout), Resume: int64(p.ResumeTimeout),
		Disconnect: int64(p.DisconnectTimeout), Patience: int64(p.PeerTimeout - p.KeepAlive),
	}
}

// never is the longest time that a parameter may be, two years. What is made of it, up to 64 times as long, added to a time
// since the start does not overflow.
const never time.Duration = 1 << 56

// Client opens streams over one NATS connection, and makes writers for requests that arrived on it. All its streams
// share one wildcard subscription. It is safe for use by many goroutines at once. Close it when it is no longer used;
// several clients may share a connection.
type Client struct {
	Conn *nats.Conn // as given to NewClient; do not change

	ep    *endpoint
	codec Codec
}

// NewClient returns a client on params.Conn, which must be open. Errors: [nats.ErrInvalidConnection] for a nil
// connection, that of the subscription, or what is wrong with params.
func NewClient(params ClientParams) (*Client, error) {
	if params.Conn == nil {
		return nil, noConnection("ClientParams.Conn", "set it to what nats.Connect returns")
	}
	params, err := params.withDefaults()
	if err != nil {
		return nil, err
	}
	ep, err := newEndpoint(natsconn.New(params.Conn), params.Conn.Opts.InboxPrefix, params)
	if err != nil {
		return nil, err
	}
	if params.Codec == CodecDefault {
		params.Codec = MsgPack
	}
	return &Client{Conn: params.Conn, ep: ep, codec: params.Codec}, nil
}

// Close ends all streams of the client with [ErrClientClosed], tells their producers, and returns when the NATS server has taken
// that and the client's goroutines have ended: the program may end right after. It takes a round trip to the server, and
// longer in these cases:
//
//   - The producer of a stream has not answered its request yet: AckTimeout at most, and no more than two seconds. A producer
//     that answers later finds out within ResumeTimeout.
//   - The connection is down, or the server does not answer: two seconds.
//   - The connection takes no bytes: for as long as that lasts, [nats.FlusherTimeout] and a little more.
//
// The connection stays open: close it afterwards. Close never fails, and closing again does nothing.
func (c *Client) Close() error {
	c.ep.close(&ending{kind: endLocal, err: ErrClientClosed, reset: CloseError{CloseGoingAway, "client closed"}})
	return nil
}

// Open sends data to subj as the request of a new stream and returns the stream. It does not wait for the producer:
// the first Recv does, and returns [nats.ErrNoResponders] at once if nobody listens on subj. data may be reused at once.
//
// The stream lives until its end was received, ctx ends, or it is closed; one of these must happen. As with every
// request over NATS, one that is lost between servers is not missed by anybody: until the first packet only ctx, or
// [Client.Close], ends the wait for a producer that never heard of it. A request lost with this end's own connection
// ends the stream with [CloseAbnormalClosure] after ResumeTimeout; it is never sent twice. Errors: that of an ended
// ctx, [nats.ErrInvalidContext] for a nil one, [nats.ErrBadSubject], also for a subject of about 4,000 bytes, over
// which a NATS server would close the connection, [nats.ErrMaxPayload], [nats.ErrConnectionClosed],
// [nats.ErrConnectionDraining], [ErrClientClosed]. Then nothing was sent and nothing is kept.
func (c *Client) Open(ctx context.Context, subj string, data []byte) (*Stream, error) {
	return c.open(ctx, &nats.Msg{Subject: subj, Data: data}, c.codec, nil)
}

// OpenMsg is [Client.Open] with a message: its Subject, Data and Header are sent. Its Reply is not used, and msg is not
// changed. Names of headers that begin with Stream- are the library's: leave them out.
func (c *Client) OpenMsg(ctx context.Context, msg *nats.Msg) (*Stream, error) {
	if msg == nil {
		return nil, nats.ErrInvalidMsg
	}
	return c.open(ctx, msg, c.codec, nil)
}

// Headers of a request, docs/PROTOCOL.md sections 2.2 and 2.4. Those with this prefix are the library's.
const (
	headerPrefix  = "Stream-"
	headerOpen    = headerPrefix + "Open"    // the offer, for producers that cannot read it in the reply subject
	headerProbe   = headerPrefix + "Probe"   // marks a message of the fallback that carries a reply subject: it is no request
	headerTimeout = headerPrefix + "Timeout" // milliseconds that the consumer will wait for the end of the stream
)

// setTimeout says in h how much is left of ctx. Clocks of two machines differ, so what travels is a duration.
func setTimeout(h nats.Header, ctx context.Context) {
	if deadline, ok := ctx.Deadline(); ok {
		left := time.Until(deadline)
		ms := left / time.Millisecond
		if left%time.Millisecond > 0 {
			ms++
		}
		h[headerTimeout] = []string{strconv.FormatInt(max(1, int64(ms)), 10)}
	}
}

func (c *Client) open(ctx context.Context, msg *nats.Msg, codec Codec, answered chan struct{}) (*Stream, error) {
	if ctx == nil {
		return nil, noContext("Open")
	}
	if ctx.Err() != nil {
		return nil, contextError(ctx)
	}
	ep := c.ep
	switch {
	case ep.draining.Load():
		return nil, nats.ErrConnectionDraining
	case !validSubject(msg.Subject):
		return nil, fmt.Errorf("stream: cannot open %q: %w", msg.Subject, nats.ErrBadSubject)
	}
	if err := natsconn.CheckSubjects(len(msg.Subject) + len(ep.prefix) + TokenSize); err != nil {
		return nil, fmt.Errorf("stream: cannot open: %w", err)
	}
	if size := requestSize(msg); size > ep.maxPayload.Load() {
		if max := ep.freshMaxPayload(ctx); size > max {
			return nil, fmt.Errorf("stream: %w", tooLarge("request", size, max))
		}
	}
	return ep.open(ctx, msg, codec, answered)
}

// tooLarge is the error for a message of size bytes that the server, which takes max, would refuse.
func tooLarge(what string, size, max int64) error {
	return fmt.Errorf("%s of %d bytes, the server takes %d (max_payload): send less, or have its limit raised: %w", what, size, max, nats.ErrMaxPayload)
}

// requestSize is what a request counts against the server's max_payload: its data and its header, which is
// "NATS/1.0", a line for each value and an empty line.
func requestSize(msg *nats.Msg) int64 {
	const eol = len("\r\n")
	n := len("NATS/1.0") + eol + len(headerOpen) + len(": ") + OfferSize + eol + eol + len(msg.Data)
	n += len(headerTimeout) + len(": ") + len("9223372036854775807") + eol
	for key, values := range msg.Header {
		for _, v := range values {
			n += len(key) + len(": ") + len(v) + eol
		}
	}
	return int64(n)
}

// validSubject reports whether a request can be published to subject.
func validSubject(subject string) bool {
	if subject == "" || strings.ContainsAny(subject, " \t\r\n") {
		return false
	}
	for token := range strings.SplitSeq(subject, ".") {
		if token == "" || token == "*" || token == ">" {
			return false
		}
	}
	return true
}

// OpenStream opens a stream as the original library did: each record is one result on the channel. Objects that the
// producer writes with WriteObject arrive as JSON. Normal closure closes the channel. Before any other end, the last result
// has the error. If ctx ends, that is the error of ctx, and records that the caller has not received may be dropped. A caller
// that stops reading must end ctx. Errors are those of [Client.Open].
func (c *Client) OpenStream(ctx context.Context, subj string, data []byte) (<-chan *concurrency.AsyncResult[[]byte], error) {
	s, err := c.open(ctx, &nats.Msg{Subject: subj, Data: data}, JSON, nil)
	if err != nil {
		return nil, err
	}
	ch := make(chan *concurrency.AsyncResult[[]byte], RequestChanLen)
	go forward(ctx, s, ch)
	return ch, nil
}

// forward is the goroutine of one OpenStream. It ends with the stream or with ctx.
func forward(ctx context.Context, s *Stream, ch chan *concurrency.AsyncResult[[]byte]) {
	defer close(ch)
	defer s.Close()
	var slab results
	for {
		value, err := s.Recv()
		if err == io.EOF {
			return
		}
		select {
		case ch <- slab.next(value, err):
			if err != nil {
				return
			}
		case <-ctx.Done():
			if err == nil {
				err = contextError(ctx)
			}
			sendLast(ch, slab.next(nil, err))
			return
		}
	}
}

// sendLast sends the last result of a stream whose context ended. The caller may have stopped reading: if the channel stays
// full, the results in it are dropped to make room, all of them, because a gap between two records would be worse. Recv does
// not return records that arrived before the end of its context either.
func sendLast(ch chan *concurrency.AsyncResult[[]byte], last *concurrency.AsyncResult[[]byte]) {
	timeout := time.NewTimer(abandonedAfter)
	defer timeout.Stop()
	select {
	case ch <- last:
		return
	case <-timeout.C:
	}
	for len(ch) > 0 {
		select {
		case <-ch:
		default:
		}
	}
	ch <- last // there is room: no other goroutine sends
}

// abandonedAfter is how long a full channel of OpenStream keeps its goroutine after its context ended.
const abandonedAfter = 100 * time.Millisecond
