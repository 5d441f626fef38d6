package stream

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"pgregory.net/rapid"

	"github.com/natsstream/stream/internal/liveness"
	"github.com/natsstream/stream/internal/natsconn/fake"
)

// TestModel does random operations on streams whose connections fail, and holds what every call returns to a model: for
// each direction of each stream the records that were written and how it was closed, and of the network what it did.
//
//   - The records that were read are a prefix of those that were written.
//   - A direction ends normally, or with its writer's code, only after everything that was written, and only if closed
//     so.
//   - Any other error has a reason: a consumer that left, a deadline that passed, an outage that took too long.
//   - Calls return when their context ends, and in the end all of them do.
//   - Nothing is left: sessions, reserved bytes, handlers, goroutines.
//
// Operations are plain data, so that a failure shrinks to few of them. Each example runs in a bubble of its own, where
// time is virtual. -rapid.checks sets how many there are.
func TestModel(t *testing.T) {
	checks := 200
	if os.Getenv("STREAM_FAULTS") == "full" {
		checks = 20_000
	}
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "rapid.checks" })
	if _, env := os.LookupEnv("RAPID_CHECKS"); !given && !env {
		before := flag.Lookup("rapid.checks").Value.String()
		defer func() { _ = flag.Set("rapid.checks", before) }()
		if err := flag.Set("rapid.checks", strconv.Itoa(checks)); err != nil {
			t.Fatal(err)
		}
	}
	rapid.Check(t, func(rt *rapid.T) {
		window := rapid.SampledFrom([]int{0, 64 << 10, minWindow}).Draw(rt, "window")
		kinds := modelKinds
		if rapid.Bool().Draw(rt, "faults") {
			kinds = slices.Concat(modelKinds, modelFaults)
		}
		ops := rapid.SliceOfN(modelOps(kinds), 1, 60).Draw(rt, "operations")
		r := modelRun{shut: rapid.SampledFrom([]string{"", "", "", "client", "server"}).Draw(rt, "closed at the end")}
		synctest.Test(t, func(*testing.T) { r.run(window, ops) })
		if len(r.failures) > 0 {
			rt.Fatalf("%s\nwhat happened:\n%s", strings.Join(r.failures, "\n"), strings.Join(r.trace, "\n"))
		}
	})
}

var modelParams = ClientParams{
	MaxRecordSize: 1 << 20, KeepAlive: 2 * time.Second, AckTimeout: 200 * time.Millisecond,
	ResumeTimeout: 2 * time.Second, DisconnectTimeout: 5 * time.Second,
}

// modelSlack is how long after the end of its context a call may return.
const modelSlack = 50 * time.Millisecond

// modelOp is one operation.
type modelOp struct {
	kind   string
	stream int // which of those that are open, modulo their number
	side   int // consumerSide or handlerSide, of a stream or of the network
	n      int
	size   int
	code   int
	times  [3]time.Duration
	mask   uint16 // of the next 16 messages from side
	atOnce bool   // the next one does not wait until nobody has anything to do
}

const (
	consumerSide = iota
	handlerSide
)

var sideNames = [2]string{"consumer", "handler"}

func (op modelOp) String() string {
	s := fmt.Sprintf("%s(", op.kind)
	switch op.kind {
	case "open":
		s += fmt.Sprintf("deadline %v, abandon %v", op.times[0], op.n == 1)
	case "pass":
		s += op.times[0].String()
	case "outage":
		s += fmt.Sprintf("%s: lossy %v, down %v, lossy %v", sideNames[op.side], op.times[0], op.times[1], op.times[2])
	case "drop", "replay":
		s += fmt.Sprintf("%s: %016b", sideNames[op.side], op.mask)
	default:
		s += fmt.Sprintf("%d %s", op.stream, sideNames[op.side])
		if op.n > 0 {
			s += fmt.Sprintf(", %d times", op.n)
		}
		if op.size > 0 {
			s += fmt.Sprintf(", %d bytes", op.size)
		}
		if op.code > 0 {
			s += fmt.Sprintf(", code %d", op.code)
		}
	}
	s += ")"
	if op.atOnce {
		s += " at once"
	}
	return s
}

// GoString makes rapid print it so.
func (op modelOp) GoString() string { return op.String() }

// modelKinds and modelFaults are the operations; each is as frequent as it is listed.
var (
	modelKinds = strings.Fields(`open open open write write write write write write read read read read read read
		large oversize end end cancel close reset return flush sync sync pass pass pass pass`)
	modelFaults = strings.Fields(`outage outage drop drop replay replay`)
)

func modelOps(kinds []string) *rapid.Generator[modelOp] {
	pick := func(d ...time.Duration) *rapid.Generator[time.Duration] { return rapid.SampledFrom(d) }
	const ms = time.Millisecond
	return rapid.Custom(func(t *rapid.T) modelOp {
		op := modelOp{kind: rapid.SampledFrom(kinds).Draw(t, "kind")}
		op.stream = rapid.IntRange(0, modelStreams-1).Draw(t, "stream")
		op.side = rapid.IntRange(0, 1).Draw(t, "side")
		switch op.kind {
		case "open":
			op.times[0] = pick(0, 0, 0, 30*ms, 700*ms, 4000*ms).Draw(t, "deadline")
			op.n = rapid.IntRange(0, 1).Draw(t, "abandon")
		case "write":
			op.n = rapid.IntRange(1, 50).Draw(t, "records")
			op.size = rapid.SampledFrom([]int{0, 1, 7, 100, 1000, 5000}).Draw(t, "size")
		case "large":
			op.n, op.size = 1, rapid.SampledFrom([]int{40_000, coalesceSize, singleSize, 300_000, 700_000}).Draw(t, "size")
		case "oversize":
			op.n, op.size = 1, modelParams.MaxRecordSize+1
		case "read":
			op.n = rapid.SampledFrom([]int{1, 2, 10, 1000}).Draw(t, "records")
		case "reset":
			op.code = rapid.SampledFrom([]int{CloseNormalClosure, 4322, 4322}).Draw(t, "code")
		case "end", "return":
			op.code = rapid.SampledFrom([]int{CloseNormalClosure, CloseNormalClosure, 4321}).Draw(t, "code")
		case "sync":
			op.times[0] = pick(10*ms, 300*ms, 3000*ms).Draw(t, "timeout")
		case "pass":
			op.times[0] = pick(1*ms, 40*ms, 150*ms, 300*ms, 1000*ms, 3000*ms, 10_000*ms).Draw(t, "time")
		case "outage":
			op.times[0] = pick(0, 1*ms, 100*ms).Draw(t, "before")
			op.times[1] = pick(0, 1*ms, 60*ms, 500*ms, 1300*ms, 3000*ms, 8000*ms).Draw(t, "down")
			op.times[2] = pick(0, 1*ms, 100*ms).Draw(t, "after")
		case "drop", "replay":
			op.mask = rapid.Uint16().Draw(t, "which")
		}
		op.atOnce = rapid.Bool().Draw(t, "at once")
		return op
	})
}

const modelStreams = 4

// modelRun is one example: the system, and the model of its network.
type modelRun struct {
	shut    string // which endpoint is closed at the end, while streams are open: "client", "server", or neither
	m       *memoryPair
	began   time.Time
	streams []*modelStream
	outages sync.WaitGroup
	actors  sync.WaitGroup

	mu       sync.Mutex
	failures []string
	trace    []string
	conns    [2]*fake.Conn
	lossy    [2]int // outages that lose what passes now
	down     [2]int // outages that keep the connection down now
	masks    [2]uint16
	replays  [2]uint16
	drops    int           // messages lost on their own
	harm     time.Duration // all outages, from their beginning to their end
	over     time.Duration // those that have ended
	outs     [2]int        // how many each side had
	closing  bool          // the endpoint is being closed
}

func (r *modelRun) logf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.trace = append(r.trace, fmt.Sprintf("%10v ", time.Since(r.began))+fmt.Sprintf(format, args...))
}

func (r *modelRun) failf(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.failures) < 10 {
		r.failures = append(r.failures, fmt.Sprintf(format, args...))
	}
	r.trace = append(r.trace, fmt.Sprintf("%10v FAILED: ", time.Since(r.began))+fmt.Sprintf(format, args...))
}

// filter is the network: it loses messages, and notes those that are to come again.
func (r *modelRun) filter(from, to *fake.Conn, m *nats.Msg) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lossy[consumerSide]+r.lossy[handlerSide] > 0 {
		for side, c := range r.conns {
			if r.lossy[side] > 0 && (from == c || to == c) {
				return false
			}
		}
	}
	if from == nil {
		return true
	}
	side := slices.Index(r.conns[:], from)
	drop, replay := r.masks[side]&1 != 0, r.replays[side]&1 != 0
	r.masks[side] >>= 1
	r.replays[side] >>= 1
	if drop {
		r.drops++
		return false
	}
	if replay && m.Subject != modelSubject { // NATS repeats nothing, least of all a request
		subject, reply, data := m.Subject, m.Reply, bytes.Clone(m.Data)
		r.actors.Go(func() {
			time.Sleep(time.Duration(side+len(data)%3) * 30 * time.Millisecond)
			_ = from.Publish(subject, reply, data)
		})
	}
	return true
}

// outage takes a connection down for a while, and loses the messages just before and after as well.
func (r *modelRun) outage(op modelOp) {
	all := op.times[0] + op.times[1] + op.times[2]
	change := func(lossy, down int) {
		r.mu.Lock()
		r.lossy[op.side] += lossy
		before := r.down[op.side]
		r.down[op.side] += down
		after := r.down[op.side]
		r.mu.Unlock()
		switch {
		case before == 0 && after == 1:
			r.conns[op.side].Set(nats.RECONNECTING)
		case before == 1 && after == 0:
			r.conns[op.side].Set(nats.CONNECTED)
		}
	}
	r.mu.Lock()
	r.harm += all
	r.outs[op.side]++
	r.mu.Unlock()
	change(1, 0)
	r.outages.Go(func() {
		time.Sleep(op.times[0])
		change(0, 1)
		time.Sleep(op.times[1])
		change(0, -1)
		time.Sleep(op.times[2])
		change(-1, 0)
		r.mu.Lock()
		r.over += all
		r.mu.Unlock()
	})
}

const modelSubject = "model"

// run does the operations and ends the streams that they leave.
func (r *modelRun) run(window int, ops []modelOp) {
	r.began = time.Now()
	p := modelParams
	p.Window = window
	m, err := newMemoryPair(p)
	if err != nil {
		r.failf("%v", err)
		return
	}
	r.m = m
	r.conns = [2]*fake.Conn{consumerSide: m.conn, handlerSide: m.back}
	defer r.actors.Wait()
	defer m.close()
	if _, err := m.server.Handle(modelSubject, r.handle); err != nil {
		r.failf("%v", err)
		return
	}
	m.bus.SetFilter(r.filter)
	for _, op := range ops {
		r.do(op)
		if !op.atOnce {
			synctest.Wait()
		}
	}
	r.finish()
}

func (r *modelRun) do(op modelOp) {
	r.logf("%v", op)
	switch op.kind {
	case "pass":
		time.Sleep(op.times[0])
		return
	case "outage":
		r.outage(op)
		return
	case "drop", "replay":
		r.mu.Lock()
		defer r.mu.Unlock()
		if op.kind == "drop" {
			r.masks[op.side] = op.mask
		} else {
			r.replays[op.side] = op.mask
		}
		return
	case "open":
		if len(r.streams) < modelStreams {
			r.open(op)
		}
		return
	}
	if len(r.streams) == 0 {
		return
	}
	s := r.streams[op.stream%len(r.streams)]
	e := &s.ends[op.side]
	switch op.kind {
	case "write", "large", "oversize":
		e.writes <- func() { e.write(op.n, op.size) }
	case "read":
		e.reads <- func() { e.read(op.n) }
	case "flush":
		e.writes <- func() { e.check("Flush", e.flush(), true) }
	case "sync":
		e.writes <- func() { e.syncs(op.times[0]) }
	case "end":
		code := op.code
		if op.side == consumerSide {
			code = CloseNormalClosure
		}
		e.writes <- func() { e.close(code) }
	case "return":
		s.ends[handlerSide].writes <- func() { s.giveBack(op.code) }
	case "cancel":
		s.leave(0)
	case "close":
		s.leave(CloseCanceled)
	case "reset":
		s.leave(op.code)
	}
}

// modelStream is one stream and the model's knowledge of it.
type modelStream struct {
	r       *modelRun
	id      int
	st      *Stream
	cancel  context.CancelFunc
	abandon bool // at the end its consumer leaves; else both sides go through with it
	ends    [2]modelEnd

	deadline   time.Time // zero if there is none
	dropsFirst int       // the network's history when it was opened
	overFirst  time.Duration

	// Guarded by r.mu.
	started  bool // the handler was called
	returned bool // the handler returned, or is about to
	canceled bool
	leftAt   time.Time // when the consumer left first
	closed   int       // code that the consumer left with by Close or CloseWithCode
}

// modelEnd is one end of a stream: one goroutine that reads and one that writes.
type modelEnd struct {
	s             *modelStream
	side          int
	reads, writes chan func()
	stopped       chan struct{} // reads that have not begun are not wanted any longer

	recv      func() ([]byte, error)
	writeTo   func([]byte) (int, error)
	flushTo   func() error
	syncTo    func(context.Context) error
	closeWith func(code int) error

	// Guarded by r.mu.
	sent   []int     // sizes of the records written, those that are being written included
	code   int       // that the direction was closed with, or is about to be; 0 if it is open
	shut   bool      // and that has succeeded
	last   int       // how many records had been written when code was set
	left   bool      // and that was by leaving: a write that was under way then may have succeeded
	inUse  bool      // a call that writes has succeeded
	got    int       // records read
	result error     // what reads ended with
	ended  time.Time // when the end's context ended
	calls  map[string]int
}

func (e *modelEnd) name() string { return fmt.Sprintf("stream %d, %s", e.s.id, sideNames[e.side]) }
func (e *modelEnd) peer() *modelEnd {
	return &e.s.ends[1-e.side]
}

func (r *modelRun) open(op modelOp) {
	s := &modelStream{r: r, id: len(r.streams), abandon: op.n == 1}
	for side := range s.ends {
		s.ends[side] = modelEnd{
			s: s, side: side, reads: make(chan func(), 100), writes: make(chan func(), 100),
			stopped: make(chan struct{}), calls: make(map[string]int),
		}
	}
	r.mu.Lock()
	s.dropsFirst, s.overFirst = r.drops, r.over
	r.streams = append(r.streams, s)
	r.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	if d := op.times[0]; d > 0 {
		s.deadline = time.Now().Add(d)
		ctx, s.cancel = context.WithDeadline(ctx, s.deadline)
	}
	st, err := r.m.client.Open(ctx, modelSubject, []byte{byte(s.id)})
	if err != nil {
		r.failf("Open: %v", err)
		return
	}
	s.st = st
	e := &s.ends[consumerSide]
	e.recv, e.writeTo, e.flushTo, e.syncTo = st.Recv, st.Write, st.Flush, st.Sync
	e.closeWith = func(int) error { return st.CloseSend() }
	e.watch(st.Context())
	r.actors.Go(func() { e.work(e.reads) })
	r.actors.Go(func() { e.work(e.writes) })
}

// handle is the handler of all streams. It returns when it was told to, after its reader.
func (r *modelRun) handle(w *Writer, q *Request) error {
	r.mu.Lock()
	s := r.streams[q.Data[0]]
	again := s.started
	s.started = true
	r.mu.Unlock()
	if again {
		r.failf("stream %d: a second handler", s.id)
		return nil
	}
	e := &s.ends[handlerSide]
	e.recv, e.writeTo, e.flushTo, e.syncTo = q.Recv, w.Write, w.Flush, w.Sync
	e.closeWith = func(code int) error { return w.CloseWithCode(code) }
	e.watch(q.Context())
	var reader sync.WaitGroup
	reader.Go(func() { e.work(e.reads) })
	e.work(e.writes)
	reader.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	if e.code == CloseNormalClosure {
		return nil
	}
	return &CloseError{Code: e.code}
}

// giveBack makes the handler return.
func (s *modelStream) giveBack(code int) {
	s.r.mu.Lock()
	e := &s.ends[handlerSide]
	if e.code == 0 {
		e.code, e.last = code, len(e.sent)
	}
	s.returned = true
	s.r.mu.Unlock()
	close(e.stopped)
}

// leave makes the consumer leave: code 0 by its context, 4001 by Close, any other by CloseWithCode. With code 1000 that
// closes its direction too.
func (s *modelStream) leave(code int) {
	s.r.mu.Lock()
	if s.leftAt.IsZero() {
		s.leftAt = time.Now()
	}
	if code == 0 {
		s.canceled = true
	} else if s.closed == 0 {
		s.closed = code
	}
	e := &s.ends[consumerSide]
	if code == CloseNormalClosure && e.code == 0 {
		e.code, e.last, e.left = code, len(e.sent)-min(1, e.calls["Write"]), true
	}
	s.r.mu.Unlock()
	switch code {
	case 0:
		s.cancel()
	case CloseCanceled:
		e.check("Close", s.st.Close(), false)
	default:
		e.check("CloseWithCode", s.st.CloseWithCode(code), false)
	}
}

func (e *modelEnd) watch(ctx context.Context) {
	context.AfterFunc(ctx, func() {
		e.s.r.logf("%s: context ended: %v", e.name(), context.Cause(ctx))
		e.s.r.mu.Lock()
		defer e.s.r.mu.Unlock()
		e.ended = time.Now()
	})
}

// work does the jobs of a channel until there are no more, or nobody wants them.
func (e *modelEnd) work(queue chan func()) {
	for {
		select {
		case <-e.stopped:
			return
		default:
		}
		select {
		case f, ok := <-queue:
			if !ok {
				return
			}
			f()
		case <-e.stopped:
			return
		}
	}
}

// call makes a call and sees to it that it does not outlive its contexts.
func (e *modelEnd) call(what string, until time.Time, f func() error) error {
	r := e.s.r
	began := time.Now()
	r.mu.Lock()
	e.calls[what]++
	r.mu.Unlock()
	err := f()
	now := time.Now()
	r.mu.Lock()
	if e.calls[what]--; e.calls[what] == 0 {
		delete(e.calls, what)
	}
	limits := []time.Time{e.ended, until}
	r.mu.Unlock()
	for _, limit := range limits {
		if limit.IsZero() || !limit.Before(now) {
			continue
		}
		if limit.Before(began) {
			limit = began
		}
		if late := now.Sub(limit); late > modelSlack {
			r.failf("%s: %s returned %v after its context had ended", e.name(), what, late)
		}
	}
	return err
}

var modelNoise = func() []byte {
	b := make([]byte, modelParams.MaxRecordSize+8192)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}()

// record returns record i of the end.
func (e *modelEnd) record(i, size int) []byte {
	id := e.s.id<<20 | e.side<<19 | i
	b := bytes.Clone(modelNoise[id*31%8192:][:size])
	copy(b, fmt.Sprintf("%08x", id))
	return b
}

func (e *modelEnd) write(n, size int) {
	r := e.s.r
	for range n {
		r.mu.Lock()
		i, closed := len(e.sent), e.shut
		e.sent = append(e.sent, size)
		r.mu.Unlock()
		p := e.record(i, size)
		err := e.call("Write", time.Time{}, func() error {
			n, err := e.writeTo(p)
			if err == nil && n != size {
				r.failf("%s: Write of %d bytes returned %d", e.name(), size, n)
			}
			return err
		})
		e.used(err)
		clear(p[:min(len(p), 5000)]) // it is the caller's again
		switch {
		case err == nil && closed:
			r.failf("%s: Write succeeded after the direction was closed", e.name())
		case err == nil && size > modelParams.MaxRecordSize:
			r.failf("%s: Write of %d bytes succeeded", e.name(), size)
		}
		if err != nil {
			r.mu.Lock()
			e.sent = e.sent[:i]
			r.mu.Unlock()
			if !errors.Is(err, ErrRecordTooLarge) || size <= modelParams.MaxRecordSize {
				e.check("Write", err, true)
			}
			return
		}
	}
}

func (e *modelEnd) flush() error {
	return e.call("Flush", time.Time{}, e.flushTo)
}

// used notes that the direction is in use, unless a call failed.
func (e *modelEnd) used(err error) {
	e.s.r.mu.Lock()
	defer e.s.r.mu.Unlock()
	e.inUse = e.inUse || err == nil
}

func (e *modelEnd) syncs(timeout time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	until, _ := ctx.Deadline()
	err := e.call("Sync", until, func() error { return e.syncTo(ctx) })
	if !errors.Is(err, context.DeadlineExceeded) || time.Now().Before(until) {
		e.check("Sync", err, true)
	}
}

func (e *modelEnd) close(code int) {
	r := e.s.r
	r.mu.Lock()
	if e.code == 0 {
		e.code, e.last = code, len(e.sent)
	}
	r.mu.Unlock()
	err := e.call("Close", time.Time{}, func() error { return e.closeWith(code) })
	e.used(err)
	if err == nil {
		r.mu.Lock()
		e.shut = true
		r.mu.Unlock()
	}
	e.check("Close", err, true)
}

func (e *modelEnd) read(n int) {
	r := e.s.r
	for range n {
		select {
		case <-e.stopped:
			return
		default:
		}
		var rec []byte
		err := e.call("Recv", time.Time{}, func() (err error) { rec, err = e.recv(); return err })
		if err != nil {
			r.mu.Lock()
			before := e.result
			e.result = err
			r.mu.Unlock()
			if before == nil {
				e.check("Recv", err, false)
			} else if before.Error() != err.Error() {
				r.failf("%s: Recv returned %v, before it was %v", e.name(), err, before)
			}
			return
		}
		r.mu.Lock()
		from, size, before := e.peer(), -1, e.result
		if e.got < len(from.sent) {
			size = from.sent[e.got]
		}
		i := e.got
		e.got++
		r.mu.Unlock()
		switch {
		case before != nil:
			r.failf("%s: Recv returned a record after %v", e.name(), before)
		case size < 0:
			r.failf("%s: Recv returned record %d, which was never written: %d bytes", e.name(), i, len(rec))
		case !bytes.Equal(rec, from.record(i, size)):
			r.failf("%s: record %d has %d bytes, or others than the %d that were written", e.name(), i, len(rec), size)
		}
	}
}

// check sees to it that there is a reason for err.
func (e *modelEnd) check(what string, err error, write bool) {
	r := e.s.r
	if err == nil {
		return
	}
	r.logf("%s: %s: %v", e.name(), what, err)
	r.mu.Lock()
	reason := e.allowedLocked(err, write)
	r.mu.Unlock()
	if reason != "" {
		r.failf("%s: %s returned %q: %s", e.name(), what, err, reason)
	}
}

// allowedLocked returns why err is not one that the model allows in this state, or "".
func (e *modelEnd) allowedLocked(err error, write bool) string {
	s, from := e.s, e.peer()
	consumer, handler := &s.ends[consumerSide], &s.ends[handlerSide]
	ce, coded := errors.AsType[*CloseError](err)
	late := !s.deadline.IsZero() && !time.Now().Before(s.deadline)
	complete := func() string {
		if !write && e.got != from.last && !(from.left && e.got > from.last) {
			return fmt.Sprintf("after %d of %d records", e.got, from.last)
		}
		return ""
	}
	// The consumer has come to its end, or is about to say so.
	over := consumer.result != nil || handler.code != 0 && consumer.calls["Recv"] > 0
	left := s.canceled || s.closed != 0 || late || over
	switch {
	case err == io.EOF && write:
		return "a write has no such end"
	case err == io.EOF && from.code == CloseNormalClosure:
		return complete()
	case err == io.EOF && e.side == handlerSide && !from.inUse && e.got == 0 && over:
		return "" // the consumer never used its direction and is done
	case err == io.EOF:
		return "the direction was not closed normally"

	case errors.Is(err, ErrClosed) && write && e.code != 0:
		return ""
	case errors.Is(err, ErrClosed) && e.side == consumerSide && s.closed != 0:
		return ""
	case errors.Is(err, ErrClosed) && write && e.side == consumerSide && s.returned:
		return "" // reads tell how the handler ended
	case errors.Is(err, ErrClosed) && write && e.side == consumerSide && !handler.ended.IsZero() && s.mayBeLostLocked():
		return "" // the handler's end has given the stream up, and its CLOSE may be among what was not read: reads tell
	case errors.Is(err, ErrClosed) && write && e.side == handlerSide && s.closed == CloseNormalClosure:
		return ""
	case errors.Is(err, ErrClosed):
		return "nobody closed it"

	case e.side == consumerSide && errors.Is(err, context.DeadlineExceeded) && late:
		return ""
	case e.side == consumerSide && errors.Is(err, context.Canceled) && s.canceled:
		return ""
	case !coded && e.side == consumerSide && errors.Is(err, nats.ErrNoResponders) && !s.started && s.r.outs[handlerSide] > 0:
		return ""
	case s.r.closing && errors.Is(err, [...]error{consumerSide: ErrClientClosed, handlerSide: ErrServerClosed}[e.side]):
		return map[bool]string{false: "the other endpoint was closed"}[(s.r.shut == "client") == (e.side == consumerSide)]
	case s.r.closing && coded && (ce.Code == CloseGoingAway || ce.Code == CloseAbnormalClosure):
		return "" // or it finds the other end gone
	case !coded:
		return "there is no reason for it"

	case ce.Code == CloseAbnormalClosure && s.mayBeLostLocked():
		return ""
	case ce.Code == CloseAbnormalClosure:
		return "the network was not that bad"
	case ce.Code == CloseNormalClosure:
		return "a normal end is no error"
	case e.side == consumerSide && ce.Code == handler.code:
		return complete()
	case e.side == handlerSide && ce.Code == CloseCanceled && (left || s.mayBeLostLocked()):
		return "" // also where a RESET with another code got lost, or the consumer has given up
	case e.side == handlerSide && ce.Code == s.closed && s.closed != 0:
		return ""
	case e.side == handlerSide && ce.Code == CloseDeadlineExceeded && late:
		return ""
	}
	return "there is no reason for this code"
}

// mayBeLostLocked reports whether the network may have failed the stream for long enough for one side to give up.
func (s *modelStream) mayBeLostLocked() bool {
	r := s.r
	if !s.started && r.outs[consumerSide] > 0 {
		return true // the request was lost with the consumer's connection
	}
	harm := r.harm - s.overFirst + time.Duration(r.drops-s.dropsFirst)*modelParams.AckTimeout
	return harm >= modelParams.ResumeTimeout-2*modelParams.AckTimeout
}

// closingTime is the most that Close may take now, when nobody has anything to do and the connections are up:
// AckTimeout for a client with a request that its producer has not answered, of a stream that is open or ended within
// the last AckTimeout.
func (r *modelRun) closingTime() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.streams {
		ended := s.ends[consumerSide].ended
		if s.st.session.out.peer == "" && (ended.IsZero() || time.Since(ended) <= modelParams.AckTimeout) && r.shut == "client" {
			return modelParams.AckTimeout
		}
	}
	return 0
}

// finish ends all streams, each as it is its fate, and checks that nothing is left.
func (r *modelRun) finish() {
	r.logf("the end")
	r.outages.Wait()
	r.mu.Lock()
	r.masks, r.replays = [2]uint16{}, [2]uint16{}
	r.mu.Unlock()
	time.Sleep(2 * modelParams.AckTimeout)
	for _, s := range r.streams {
		r.mu.Lock()
		lost := !s.started
		r.mu.Unlock()
		consumer, handler := &s.ends[consumerSide], &s.ends[handlerSide]
		if lost || s.abandon {
			s.leave(0)
		}
		if !s.abandon {
			consumer.writes <- func() { consumer.close(CloseNormalClosure) }
			consumer.reads <- func() { consumer.read(1 << 30) }
			handler.reads <- func() { handler.read(1 << 30); close(handler.reads) }
			handler.writes <- func() { handler.close(CloseNormalClosure) }
		}
	}
	if r.shut != "" {
		synctest.Wait()
		r.mu.Lock()
		r.closing = true
		r.mu.Unlock()
		limit := r.closingTime()
		r.logf("the %s is closed", r.shut)
		began := time.Now()
		if r.shut == "client" {
			r.m.client.Close()
		} else {
			r.m.server.Close()
		}
		if d := time.Since(began); d > limit {
			r.failf("closing the %s took %v, and may take %v", r.shut, d, limit)
		}
	}
	// Losses are repaired, and peers that are gone are given up.
	p := modelParams
	time.Sleep(p.KeepAlive + p.ResumeTimeout + (liveness.SuspectPings+3)*p.AckTimeout)
	synctest.Wait()
	for _, s := range r.streams {
		for i := range s.ends {
			e := &s.ends[i]
			r.mu.Lock()
			idle := len(e.calls) == 0 && len(e.reads) == 0 && len(e.writes) == 0 || i == handlerSide && (!s.started || s.returned && len(e.calls) == 0)
			calls := fmt.Sprint(e.calls)
			if !s.abandon && i == consumerSide && e.result == nil {
				calls += ", and its end was not read"
				idle = false
			}
			if i == consumerSide && s.st.session.out.peer == "" && s.mayBeLostLocked() {
				idle = true // its producer has given it up, could not say so, and it does not know whom to ask
			}
			r.mu.Unlock()
			if !idle {
				r.failf("%s: still busy at the end: %s", e.name(), calls)
			}
		}
		r.mu.Lock()
		began, ended := s.leftAt, s.ends[handlerSide].ended
		told := s.started && r.harm == 0 && r.drops == 0 && !began.IsZero() && s.ends[handlerSide].code == 0
		through := !s.abandon && s.ends[consumerSide].result != nil
		open := s.ends[consumerSide].ended.IsZero()
		r.mu.Unlock()
		if through && open {
			r.failf("stream %d: the consumer's context has not ended", s.id)
		}
		if late := ended.Sub(began); told && (ended.IsZero() || late > 2*maxTick) {
			r.failf("stream %d: the handler's context ended %v after the consumer had left", s.id, late)
		}
	}
	for _, s := range r.streams {
		s.leave(0)
		close(s.ends[consumerSide].stopped)
		r.mu.Lock()
		returned := s.returned
		r.mu.Unlock()
		if !returned && s.started {
			s.giveBack(CloseNormalClosure)
		}
	}
	time.Sleep(p.KeepAlive + p.ResumeTimeout + (liveness.SuspectPings+3)*p.AckTimeout)
	synctest.Wait()
	if err := r.m.left(); err != nil {
		r.failf("%v", err)
	}
}
