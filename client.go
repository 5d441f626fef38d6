package stream

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/concurrency"
	"github.com/natsstream/stream/internal/natsconn"
)

// This file has Client and its parameters. Goroutines of the user run it. Each OpenStream has a goroutine of its own,
// which runs forward. Its functions touch fields that are set once, and atomics. freshMaxPayload waits for the outbox.

// RequestChanLen is the size of the buffer of the channel that OpenStream returns.
const RequestChanLen = 16

// ClientParams configure a [Client]. The zero value of every field except Conn selects the default that its comment
// names. A time must be at least 1 ms.
type ClientParams struct {
	// Conn is the connection to use. The client neither closes nor drains it. To receive permission errors, the client
	// puts a handler in front of the connection's error handler. If you set a handler of your own, set it before
	// NewClient.
	Conn *nats.Conn
	// Codec is the encoding of objects that Open and OpenMsg request from producers: MsgPack by default. OpenStream
	// always requests JSON.
	Codec Codec
	// Window is the most bytes by which the producer of one stream may be ahead of its reader. It is rounded down to a
	// power of two. It is 4 MiB by default, and at least 4 KiB. A stream starts with a window of at most 256 KiB, which
	// grows when it is used up. One packet may exceed the window.
	Window int
	// MaxBuffered is the budget in bytes for the packets of all streams that arrived and were not read: 64 MiB by
	// default. The first 4 KiB of each stream are not counted. A packet that finds no room is dropped, and
	// retransmitted when there is room. The windows of busy streams share an eighth of the budget, and idle streams use
	// nothing of it. The more streams are open, the smaller the windows that new streams begin with, down to 4 KiB.
	//
	// The budget also covers the received pieces of records that are being assembled. A record that finds no room
	// waits, in the read that assembles it, and its sender stops. One record at a time may exceed MaxBuffered. A record
	// that does not proceed while others wait ends its stream with CloseTryAgainLater.
	//
	// A second budget of the same size covers the packets that writers keep until peers acknowledge them. As that
	// budget is used up, each stream may keep fewer bytes, down to one packet, and writes wait. Messages that packets
	// of several streams share may take a quarter of it besides.
	//
	// Messages of fallback peers are in neither budget. SECURITY.md in the repository lists all memory outside the
	// budgets.
	MaxBuffered int
	// MaxRecordSize is the largest record, in bytes, that is sent or received. The default is 16 MiB, or MaxBuffered if
	// that is less, but at least 256 KiB. A value above 256 KiB may not exceed MaxBuffered: a record in pieces has to
	// fit into MaxBuffered together with its stream's packets. Leave a quarter of MaxBuffered for these.
	MaxRecordSize int
	// FallbackBuffer is the most bytes by which a producer that speaks only the JSON fallback may be ahead of its
	// reader: 64 MiB by default. Such a producer knows no flow control. If it exceeds the limit, its stream ends with
	// CloseTooSlow. A message below 64 bytes counts as 64 bytes, because of the memory that each message takes. At
	// least 1,024 messages always fit.
	FallbackBuffer int

	// Interceptors are put around Open, OpenMsg, OpenStream and OpenMany, the first one outermost. NewClient calls each
	// interceptor once. It gets the next [OpenFunc] and returns an OpenFunc that calls the next one, usually once. The
	// message is a copy, so the returned OpenFunc may change its Subject, Data and Header, which is not nil. If it
	// calls the next OpenFunc twice, it opens two streams, and must close the one that it does not return. If it
	// returns an error without a call, it opens none. Panics pass through to the caller of Open.
	Interceptors []func(OpenFunc) OpenFunc

	// Hooks are called for each stream that the client opens, and for each Writer that it makes; see [Hooks]. Their
	// panics are logged to slog.Default().
	Hooks Hooks

	// KeepAlive is how long a peer may be silent on all its streams before this end sends it a PING: 500 ms by default.
	// One PING serves all streams between two ends, for any number of streams.
	KeepAlive time.Duration
	// PeerTimeout is how long a peer may be silent on all its streams before these end with [CloseAbnormalClosure]. The
	// default is KeepAlive plus the smaller of 3.3 s and ResumeTimeout: 3.8 s if both have their defaults. If KeepAlive
	// is not less than PeerTimeout, a quarter of PeerTimeout is used for KeepAlive. The end and the PING come up to 100
	// ms later than these times, and later still while data that was sent before a PING is on its way. [WithKeepAlive],
	// [Stream.SetPeerTimeout] and [Writer.SetPeerTimeout] set the timeout of one stream.
	PeerTimeout time.Duration
	// AckTimeout is how long this end waits for an acknowledgement or an answer before it asks the peer for it,
	// repeatedly if necessary: 250 ms by default. Set it longer than a round trip between the peers.
	AckTimeout time.Duration
	// ResumeTimeout is 5 s by default. It bounds three times, after which the stream ends with CloseAbnormalClosure:
	//
	//   - how long unacknowledged packets are kept after the end of a stream
	//   - how long a request or its answer may be missing after a reconnect
	//   - how long one stream of a live peer may be without answers
	ResumeTimeout time.Duration
	// DisconnectTimeout is how long this end's own connection may be down before its streams end with
	// CloseAbnormalClosure: 30 s by default. The other timeouts do not run while the connection is down.
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
	if err := checkInterceptors(p.Interceptors); err != nil {
		return p, err
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

// onePacket is the largest record in one packet that this end accepts. In one packet, a record uses only its stream's
// window. This end sends packets of at most flow.MaxPacket.
const onePacket = singleSize - PacketHeaderSize - FrameHeaderSize

// never is the longest time that a parameter may be, two years. Even 64 times that, added to a time since the start,
// does not overflow. No timeout is computed with a larger factor.
const never time.Duration = 1 << 56

// Client opens streams over one NATS connection, and makes writers for requests that arrived on it. All its streams
// share one wildcard subscription. Several clients may share a connection. Close a client that is no longer used. A
// Client is safe for use by many goroutines at once.
type Client struct {
	Conn *nats.Conn // as given to NewClient; do not change

	ep          *endpoint
	codec       Codec
	intercepted OpenFunc // open with the interceptors around it; nil without interceptors
}

// NewClient returns a client on params.Conn, which must be open. Errors: [nats.ErrInvalidConnection] for a nil
// connection; the error of the subscription; an error that names the invalid field of params.
func NewClient(params ClientParams) (*Client, error) {
	if params.Conn == nil {
		return nil, noConnection("ClientParams.Conn", "set it to what nats.Connect returns")
	}
	params, err := params.withDefaults()
	if err != nil {
		return nil, err
	}
	if params.Codec == CodecDefault {
		params.Codec = MsgPack
	}
	c := &Client{Conn: params.Conn, codec: params.Codec}
	if err := c.intercept(params.Interceptors); err != nil { // before anything is started: they may panic
		return nil, err
	}
	if c.ep, err = newEndpoint(natsconn.New(params.Conn), params.Conn.Opts.InboxPrefix, params); err != nil {
		return nil, err
	}
	return c, nil
}

// Close ends all streams of the client with [ErrClientClosed] and resets them at their producers. It returns when the
// NATS server has received the resets and the client's goroutines have ended: the program may exit right after. Close
// takes one round trip to the server, or longer:
//
//   - up to AckTimeout, and at most 2 s, if the producer of a stream has not answered its request yet. A producer that
//     answers later notices the end within ResumeTimeout.
//   - up to 2 s if the connection is down or the server does not answer.
//   - up to [nats.FlusherTimeout] and a little more if the connection accepts no bytes.
//
// Close leaves the connection open: close it afterwards. Close never fails. A second Close does nothing.
func (c *Client) Close() error {
	c.ep.close(&ending{kind: endLocal, err: ErrClientClosed, reset: CloseError{CloseGoingAway, "client closed"}})
	return nil
}

// Open sends data to subj as the request of a new stream and returns the stream. It does not wait for the producer: the
// first Recv does, and returns [nats.ErrNoResponders] at once if nobody serves subj. data may be reused at once.
//
// The stream lives until its end was received, ctx ends, or it is closed. Make sure that one of these happens: NATS
// does not report a request that is lost between servers. Until the first packet arrives, only ctx, [WithOpenTimeout],
// [Stream.Close] or [Client.Close] ends the wait for a producer that did not receive the request. If the request is
// lost with this end's own connection, the stream ends with [CloseAbnormalClosure] after ResumeTimeout. A request is
// never sent twice, except with [WithRetry]. opts are for this stream only.
//
// With an error, nothing was sent and nothing is kept. Errors:
//
//   - the error of an ended ctx, or [nats.ErrInvalidContext] for a nil one
//   - [nats.ErrBadSubject], also for a subject of about 4,000 bytes, for which a NATS server would close the connection
//   - [nats.ErrMaxPayload] if the request is larger than the server accepts
//   - [nats.ErrConnectionClosed], [nats.ErrConnectionDraining] and [ErrClientClosed]
//   - an error that names an option with an invalid value
func (c *Client) Open(ctx context.Context, subj string, data []byte, opts ...OpenOption) (*Stream, error) {
	return c.openMsg(ctx, &nats.Msg{Subject: subj, Data: data}, opts)
}

// OpenMsg is [Client.Open] with a message: its Subject, Data and Header are sent. Its Reply is not used, and msg is not
// changed. Do not set headers that begin with Stream-: these names are reserved for the library.
func (c *Client) OpenMsg(ctx context.Context, msg *nats.Msg, opts ...OpenOption) (*Stream, error) {
	if msg == nil {
		return nil, nats.ErrInvalidMsg
	}
	return c.openMsg(ctx, msg, opts)
}

func (c *Client) openMsg(ctx context.Context, msg *nats.Msg, opts []OpenOption) (*Stream, error) {
	if ctx == nil {
		return nil, noContext("Open")
	}
	if c.intercepted != nil {
		return c.openIntercepted(ctx, msg, opts)
	}
	return c.open(ctx, msg, opts...)
}

// open is the innermost OpenFunc.
func (c *Client) open(ctx context.Context, msg *nats.Msg, opts ...OpenOption) (*Stream, error) {
	o := c.collect(opts)
	switch {
	case ctx == nil:
		return nil, noContext("Open")
	case msg == nil:
		return nil, nats.ErrInvalidMsg
	case o.err != nil:
		return nil, o.err
	case o.many != nil:
		return c.openMany(ctx, msg, o)
	case o.retry != nil:
		return c.openRetrying(ctx, msg, o)
	}
	return c.openOnce(ctx, msg, o)
}

// openOnce opens a stream and sends its request once.
func (c *Client) openOnce(ctx context.Context, msg *nats.Msg, o openOptions) (*Stream, error) {
	if ctx.Err() != nil {
		return nil, contextError(ctx)
	}
	ep := c.ep
	switch {
	case ep.draining.Load():
		return nil, nats.ErrConnectionDraining
	case !validSubject(msg.Subject):
		return nil, fmt.Errorf("stream: cannot open %q: use a subject without wildcards, white space and empty elements: %w", msg.Subject, nats.ErrBadSubject)
	}
	if err := natsconn.CheckSubjects(len(msg.Subject) + len(ep.prefix) + TokenSize); err != nil {
		return nil, fmt.Errorf("stream: cannot open: %w", err)
	}
	if size := requestSize(msg); size > ep.maxPayload.Load() {
		if max := ep.freshMaxPayload(ctx); size > max {
			return nil, fmt.Errorf("stream: %w", tooLarge("request", size, max))
		}
	}
	return ep.open(ctx, msg, o)
}

// freshMaxPayload returns the present max_payload of the connection, for a call that would fail otherwise. The outbox
// asks for it. freshMaxPayload waits for at most AckTimeout, because the connection may take no bytes.
func (ep *endpoint) freshMaxPayload(ctx context.Context) int64 {
	o := &ep.outbox
	if !o.up.Load() {
		return ep.maxPayload.Load()
	}
	looked := make(chan struct{})
	o.doLater(outOfStream{looked: looked})
	late := time.NewTimer(time.Duration(ep.times.Ack))
	defer late.Stop()
	select {
	case <-looked:
	case <-late.C:
	case <-ctx.Done():
	case <-o.done:
	}
	return ep.maxPayload.Load()
}

// OpenStream opens a stream as the original library did: each record is one result on the channel. Objects that the
// producer writes with WriteObject arrive as JSON. The channel is closed when the stream ends. At any end except normal
// closure, the last result holds the error. If ctx ends, the last result holds the error of ctx, and records that the
// caller has not received may be dropped. A caller that only reads again 100 ms after the end of ctx may receive records
// that follow dropped ones. A caller that stops reading must end ctx. Errors are those of [Client.Open].
func (c *Client) OpenStream(ctx context.Context, subj string, data []byte) (<-chan *concurrency.AsyncResult[[]byte], error) {
	s, err := c.openMsg(ctx, &nats.Msg{Subject: subj, Data: data}, []OpenOption{withCodec(JSON)})
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

// sendLast sends the last result of a stream after its context ended. The caller may have stopped reading. If the
// channel stays full, sendLast drops all records in it. It does not drop only some, because a gap between two records
// would be worse. Recv does not return records that arrived before the end of its context either. A caller that reads
// again at the same time may still receive the newest records, in order and before the last result.
func sendLast(ch chan *concurrency.AsyncResult[[]byte], last *concurrency.AsyncResult[[]byte]) {
	timeout := time.NewTimer(abandonedAfter)
	defer timeout.Stop()
	select {
	case ch <- last:
		return
	case <-timeout.C:
	}
	select {
	case ch <- last: // a place became free at the same time
		return
	default:
	}
	select {
	case <-ch:
	default: // the caller reads again
	}
	ch <- last // there is room: no other goroutine sends
	for len(ch) > 1 {
		select {
		case res := <-ch:
			if res == last { // the caller has received all records before it
				ch <- last
				return
			}
		default:
		}
	}
}

// abandonedAfter is how long a full channel of OpenStream keeps its goroutine after its context ended.
const abandonedAfter = 100 * time.Millisecond
