package faults

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/fastconn"
	"github.com/natsstream/stream/internal/lifecycle"
)

func TestMain(m *testing.M) {
	lifecycle.Strict = true
	if role := os.Getenv(peerEnv); role != "" { // a process to be killed, see process_test.go
		os.Exit(peer(role, os.Getenv(peerURL)))
	}
	goleak.VerifyTestMain(m)
}

const (
	// patience is how long a test waits for what must happen but has no time of its own.
	patience = 20 * time.Second
	// noise is what is added to each time that is measured. Tests of other packages share the processors: on two of
	// them a goroutine that is ready waits in Go's queue, at 10 ms a turn, for a dozen others, and then for the
	// processor itself.
	noise = 250 * time.Millisecond
	// overrun is how long a call may go on after its context ended.
	overrun = 50*time.Millisecond + noise
	// settled is how long it may take until everything is given back.
	settled = time.Second + noise
	// slack is what may be added to the library's own times.
	slack = 250*time.Millisecond + noise
)

// runs is how often a fault is tried.
func runs(reduced, full int) int {
	switch {
	case os.Getenv("STREAM_FAULTS") == "full":
		return full
	case testing.Short():
		return 1
	}
	return reduced
}

func connect(t *testing.T, url string) *nats.Conn {
	t.Helper()
	nc, err := dial(url)
	if err != nil {
		t.Fatal(err)
	}
	return nc
}

// fast reports whether the suite runs over fast connections.
func fast() bool { return os.Getenv("STREAMTEST_CONNECTIONS") == "fast" }

func dial(url string, opts ...nats.Option) (*nats.Conn, error) {
	opts = append([]nats.Option{nats.DontRandomize(), nats.IgnoreDiscoveredServers(), nats.MaxReconnects(-1),
		nats.ReconnectWait(50 * time.Millisecond), nats.ReconnectJitter(0, 0)}, opts...)
	if fast() {
		opts = append(opts, fastconn.Enable())
	}
	return nats.Connect(url, opts...)
}

// A trial is one run of a fault: a server and a client of the library, each on a connection of its own, and streams
// between them while the fault happens.
type trial struct {
	server, client string              // URLs
	sOpts, cOpts   []nats.Option       // of their connections
	under, queue   string              // what subjects begin with, and the queue group of the handlers
	kinds          []string            // of streams: "down", "echo", "up", "idle"; the first two by default
	records        int                 // of each stream; 0: as many as it takes until the fault is over
	large          bool                // records of up to 32 KiB instead of 1 KiB
	slow           bool                // each stream waits after each record, so that packets of several streams share envelopes
	streams        int                 // of each kind; 2 by default
	times          stream.ClientParams // only the times are used
	goesOn         time.Duration       // how long after the fault each stream must have gone on; patience by default
	calm           bool                // no calls whose contexts end meanwhile

	// ends, if set, says that the fault ends all streams: at this time after it began at the latest, with an error for
	// which named is true. Otherwise all must come to their normal end. If only named is set, a stream may do either.
	ends  time.Duration
	named func(error) bool

	fault func(*rig)
	heal  func() // before the ends are closed, which would wait for the network
}

// run runs the trial and checks that no goroutine is left.
func (x trial) run(t *testing.T) {
	t.Helper()
	leakless(t, func() { x.one(t) })
}

// leakless fails the test unless there are as many goroutines as before within the time after f.
func leakless(t *testing.T, f func()) {
	t.Helper()
	before := runtime.NumGoroutine()
	f()
	if !within(settled, func() bool { return runtime.NumGoroutine() <= before }) {
		buf := make([]byte, 1<<20)
		t.Errorf("%d goroutines, %d before\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
	}
}

// within reports whether ok becomes true in time.
func within(d time.Duration, ok func() bool) bool {
	for end := time.Now().Add(d); ; time.Sleep(2 * time.Millisecond) {
		if ok() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
	}
}

// rig is what a trial runs on.
type rig struct {
	trial
	t        *testing.T
	sc, cc   *nats.Conn
	srv      *stream.Server
	cl       *stream.Client
	flows    []*flow
	stop     chan struct{} // the fault is over
	handlers atomic.Int64  // that run
	began    atomic.Pointer[time.Time]
	over     atomic.Bool // the fault has happened
}

// flow is one stream of numbered records.
type flow struct {
	rig  *rig
	i    int
	kind string
	pace time.Duration
	got  atomic.Int64 // records that arrived
	sent atomic.Int64 // records in all; -1 while that is open
	done atomic.Bool
}

// one runs the trial.
func (x trial) one(t *testing.T) {
	t.Helper()
	if x.streams == 0 {
		x.streams = 2
	}
	if x.kinds == nil {
		x.kinds = []string{"down", "echo"}
	}
	if x.goesOn == 0 {
		x.goesOn = patience
	}
	if x.times.AckTimeout == 0 {
		x.times.AckTimeout = 50 * time.Millisecond
	}
	r := &rig{trial: x, t: t, stop: make(chan struct{})}
	var err error
	if r.sc, err = dial(x.server, x.sOpts...); err != nil {
		t.Error(err)
		return
	}
	defer r.sc.Close()
	if r.cc, err = dial(x.client, x.cOpts...); err != nil {
		t.Error(err)
		return
	}
	defer r.cc.Close()
	p := x.times
	p.Conn = r.cc
	if r.cl, err = stream.NewClient(p); err != nil {
		t.Error(err)
		return
	}
	defer r.cl.Close()
	r.srv, err = stream.NewServer(stream.ServerParams{Conn: r.sc, KeepAlive: p.KeepAlive, AckTimeout: p.AckTimeout,
		ResumeTimeout: p.ResumeTimeout, DisconnectTimeout: p.DisconnectTimeout})
	if err != nil {
		t.Error(err)
		return
	}
	defer r.srv.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	if err := r.serve(ctx); err != nil {
		t.Error(err)
		return
	}

	var streams, calls sync.WaitGroup
	for _, f := range r.flows {
		streams.Go(func() { f.run(ctx) })
	}
	within(patience, func() bool { return r.all(func(f *flow) bool { return f.done.Load() || f.got.Load() > 0 }) })
	r.envelopes("before the fault", 0)
	if a, b := r.cl.Stats().Fast, r.srv.Stats().Fast; a != fast() || b != fast() {
		t.Errorf("fast connections: client %v, server %v, want %v", a, b, fast())
	}
	if !x.calm {
		for range 2 {
			calls.Go(func() { r.impatient(ctx) })
		}
	}
	r.begin()
	x.fault(r)
	r.over.Store(true)
	if x.ends == 0 {
		sent := r.srv.Stats().EnvelopesSent
		r.goOn()
		if x.records == 0 {
			r.envelopes("after the fault", sent)
		}
		close(r.stop)
	}
	streams.Wait()
	calls.Wait()
	r.idle()
	if x.heal != nil {
		x.heal()
	}
}

// envelopes fails the test of slow streams unless the server sends further envelopes.
func (r *rig) envelopes(when string, sent uint64) {
	if r.slow && !within(patience, func() bool { return r.srv.Stats().EnvelopesSent > sent }) {
		r.t.Errorf("no envelopes %s", when)
	}
}

// begin notes that the fault begins now.
func (r *rig) begin() {
	now := time.Now()
	r.began.Store(&now)
}

func (r *rig) all(ok func(*flow) bool) bool {
	for _, f := range r.flows {
		if !ok(f) {
			return false
		}
	}
	return true
}

// goOn fails the test unless every stream goes on in time.
func (r *rig) goOn() {
	before := make([]int64, len(r.flows))
	for i, f := range r.flows {
		before[i] = f.got.Load()
	}
	if !within(r.goesOn+noise, func() bool {
		return r.all(func(f *flow) bool { return f.done.Load() || f.got.Load() > before[f.i] })
	}) {
		for i, f := range r.flows {
			if !f.done.Load() && f.got.Load() == before[i] {
				r.t.Errorf("%s stands still %v after the fault, at record %d", f.kind, r.goesOn+noise, before[i])
			}
		}
	}
}

// serve starts the handlers and returns when requests reach them.
func (r *rig) serve(ctx context.Context) error {
	for i := range len(r.kinds) * r.streams {
		f := &flow{rig: r, i: i, kind: r.kinds[i%len(r.kinds)]}
		if r.slow || i%(2*len(r.kinds)) < len(r.kinds) { // the others send as fast as they can
			f.pace = time.Millisecond
		}
		f.sent.Store(-1)
		r.flows = append(r.flows, f)
	}
	handle := func(subject string, h stream.Handler) error {
		_, err := r.srv.HandleQueue(r.under+subject, r.queue, func(w *stream.Writer, q *stream.Request) error {
			r.handlers.Add(1)
			defer r.handlers.Add(-1)
			return h(w, q)
		})
		return err
	}
	if err := errors.Join(
		handle("down", func(w *stream.Writer, q *stream.Request) error {
			i, err := strconv.Atoi(string(q.Data))
			if err != nil {
				return err
			}
			return r.flows[i].send(w)
		}),
		handle("echo", echo),
		handle("idle", echo),
		handle("up", func(w *stream.Writer, q *stream.Request) error {
			i, err := strconv.Atoi(string(q.Data))
			if err != nil {
				return err
			}
			return r.flows[i].receive(q.Recv)
		}),
		handle("ready", func(w *stream.Writer, q *stream.Request) error { return nil }),
		handle("mute", mute),
		handle("flood", func(w *stream.Writer, q *stream.Request) error {
			end := watch(q.Context())
			err := flood(w)
			r.onTime(end, "a handler's Write", err)
			return err
		}),
		r.sc.FlushTimeout(patience)); err != nil {
		return err
	}
	for { // interest takes its time to another node, and answers theirs back
		s, err := r.cl.Open(ctx, r.under+"ready", nil)
		if err != nil {
			return err
		}
		_, err = s.Recv()
		s.Close()
		if err == io.EOF {
			return nil
		}
		if !errors.Is(err, nats.ErrNoResponders) {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func echo(w *stream.Writer, q *stream.Request) error {
	for rec, err := range q.All() {
		if err != nil {
			return err
		}
		if _, err := w.Write(rec); err != nil {
			return err
		}
	}
	return nil
}

// mute writes one record and reads nothing.
func mute(w *stream.Writer, q *stream.Request) error {
	if _, err := w.Write([]byte("here")); err != nil {
		return err
	}
	<-q.Context().Done()
	return context.Cause(q.Context())
}

// flood writes until that fails.
func flood(w io.Writer) error {
	for b := make([]byte, 1000); ; {
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
}

// send sends the records of a flow, all of them or until the fault is over.
func (f *flow) send(w io.Writer) error {
	n := f.rig.records
	for i := 0; n == 0 || i < n; i++ {
		if _, err := w.Write(f.record(i)); err != nil {
			return err
		}
		if f.kind == "idle" && i == 0 {
			for !f.rig.over.Load() {
				time.Sleep(time.Millisecond)
			}
		}
		if f.rig.slow || i%16 == 0 {
			if f.pace > 0 {
				time.Sleep(f.pace)
			}
			select {
			case <-f.rig.stop:
				if n == 0 {
					n = i + 50
				}
			default:
			}
		}
	}
	f.sent.Store(int64(n))
	return nil
}

// chance is what records are cut from.
var chance = func() []byte {
	b := make([]byte, 128<<10)
	r := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < len(b); i += 8 {
		binary.LittleEndian.PutUint64(b[i:], r.Uint64())
	}
	return b
}()

// record returns what only record i of this flow is.
func (f *flow) record(i int) []byte {
	n, from := 64+(i*31+f.i)%997, (i*37+f.i*1009)%(64<<10)
	if f.rig.large {
		n = 64 + (i*3571+f.i)%(32<<10)
	}
	b := append([]byte(nil), chance[from:from+n]...)
	binary.BigEndian.PutUint32(b, uint32(f.i))
	binary.BigEndian.PutUint32(b[4:], uint32(i))
	return b
}

// run opens the stream and reads it to its end, and fails the test unless that is as it must be.
func (f *flow) run(ctx context.Context) {
	r := f.rig
	defer f.done.Store(true)
	err := f.read(ctx)
	var took time.Duration
	if began := r.began.Load(); began != nil {
		took = time.Since(*began)
	}
	switch n := f.got.Load(); {
	case r.ends == 0 && err != io.EOF && (r.named == nil || !r.named(err)):
		r.t.Errorf("%s after record %d: %v", f.kind, n, err)
	case err == io.EOF && n != f.sent.Load():
		r.t.Errorf("%s ended after %d of %d records without an error", f.kind, n, f.sent.Load())
	case r.ends != 0 && (err == io.EOF || !r.named(err)):
		r.t.Errorf("%s ended with %v", f.kind, err)
	case r.ends != 0 && took > r.ends+noise:
		r.t.Errorf("%s ended after %v, want %v: %v", f.kind, took, r.ends, err)
	}
}

var errWrong = errors.New("wrong record")

func (f *flow) read(ctx context.Context) error {
	s, err := f.rig.cl.Open(ctx, f.rig.under+f.kind, strconv.AppendInt(nil, int64(f.i), 10))
	if err != nil {
		return err
	}
	defer s.Close()
	sender := make(chan error, 1)
	if f.kind == "down" {
		sender <- nil
	} else {
		go func() { sender <- errors.Join(f.send(s), s.CloseSend()) }()
	}
	if f.kind == "up" { // the handler looks at the records
		_, err = s.Recv()
	} else if err = f.receive(s.Recv); err == nil {
		err = io.EOF
	}
	_ = s.Close() // or the sender might wait
	sendErr := <-sender
	if err == io.EOF && sendErr != nil && !errors.Is(sendErr, stream.ErrClosed) {
		return fmt.Errorf("the stream ended, but the sender: %w", sendErr)
	}
	return err
}

// receive takes the records of a flow to their end.
func (f *flow) receive(recv func() ([]byte, error)) error {
	for i := 0; ; i++ {
		rec, err := recv()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		if want := f.record(i); !bytes.Equal(rec, want) {
			return fmt.Errorf("%w: got number %d of %d, %d bytes, want number %d, %d bytes", errWrong,
				binary.BigEndian.Uint32(rec[4:]), binary.BigEndian.Uint32(rec), len(rec), i, len(want))
		}
		f.got.Store(int64(i + 1))
	}
}

// impatient makes calls that wait and whose contexts end, most likely during the fault.
func (r *rig) impatient(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Millisecond+rand.N(300*time.Millisecond))
	defer cancel()
	end := watch(ctx)
	var calls sync.WaitGroup
	defer calls.Wait()
	open := func(subject string) *stream.Stream {
		s, err := r.cl.Open(ctx, r.under+subject, nil)
		if err != nil {
			r.check("Open", err)
			return nil
		}
		return s
	}
	if s := open("mute"); s != nil {
		calls.Go(func() {
			defer s.Close()
			var err error
			for err == nil {
				_, err = s.Recv()
			}
			r.onTime(end, "Recv", err)
		})
		calls.Go(func() { r.onTime(end, "Write", flood(s)) })
		calls.Go(func() {
			short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
			defer cancel()
			end := watch(short)
			if err := s.Sync(short); err != nil {
				r.onTime(end, "Sync", err)
			}
		})
	}
	if s := open("flood"); s != nil {
		<-ctx.Done()
		_, err := s.Recv()
		r.onTime(end, "Recv", err)
		s.Close()
	}
}

// end is when a context ended, as a goroutine saw it that waits for nothing else: a machine that is busy lets that one
// wait too.
type end struct{ seen atomic.Pointer[time.Time] }

func watch(ctx context.Context) *end {
	e := &end{}
	context.AfterFunc(ctx, func() {
		now := time.Now()
		e.seen.Store(&now)
	})
	return e
}

// onTime checks the error of a call that returned just now, and that it did not outlive its context.
func (r *rig) onTime(e *end, call string, err error) {
	if at := e.seen.Load(); at != nil && time.Since(*at) > overrun {
		r.t.Errorf("%s returned %v after its context ended: %v", call, time.Since(*at), err)
	}
	r.check(call, err)
}

func (r *rig) check(call string, err error) {
	if !isNamed(err) {
		r.t.Errorf("%s: %v", call, err)
	}
}

// isNamed reports whether a caller can tell what err is.
func isNamed(err error) bool {
	if _, ok := errors.AsType[*stream.CloseError](err); ok {
		return true
	}
	for _, target := range []error{context.DeadlineExceeded, context.Canceled, stream.ErrClosed, stream.ErrClientClosed, stream.ErrServerClosed, stream.ErrOneWay,
		nats.ErrNoResponders, nats.ErrConnectionClosed, nats.ErrConnectionDraining, nats.ErrDisconnected} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// isCode returns a function that reports whether an error has the close code.
func isCode(codes ...int) func(error) bool {
	return func(err error) bool {
		for _, code := range codes {
			if errors.Is(err, &stream.CloseError{Code: code}) {
				return true
			}
		}
		return false
	}
}

// idle fails the test unless everything is given back in time.
func (r *rig) idle() {
	var a, b stream.Stats
	if !within(settled, func() bool {
		a, b = r.srv.Stats(), r.cl.Stats()
		return a.Streams == 0 && b.Streams == 0 && a.Reserved == 0 && b.Reserved == 0 && r.handlers.Load() == 0
	}) {
		r.t.Errorf("not given back: server %d streams, %d bytes, %d handlers; client %d streams, %d bytes",
			a.Streams, a.Reserved, r.handlers.Load(), b.Streams, b.Reserved)
	}
}
