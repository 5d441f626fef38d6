package stream

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
	"weak"
)

// This file keeps the responders of one request of OpenMany; docs/PROTOCOL.md section 2.8. The mux adds responders, a
// timer ends the gathering, and goroutines of the user make it and take the streams. The outbox runs ending. Any
// goroutine may run leave, and any but the mux may run requestEnded. The lock of a gathering guards the state that they
// share.

// gathering is a request of OpenMany and the streams of its responders. The request has a session like any consumer's
// stream: the mux finds the session by its token, and the outbox publishes the request. But the session is bound to no
// sender, and nobody reads it. The first packets of all responders come to its token. divert passes each to the session
// of its sender, which has a token of its own.
type gathering struct {
	request *session
	options openOptions
	offer   Token // of the request; each responder may use it

	// members counts the sessions that need the token of the request: its own until its end, and those of responders.
	members atomic.Int32
	left    atomic.Bool // the request is no longer a member

	routes map[uint64]route // by the numbers of their senders. The mux's

	mu       sync.Mutex
	queue    []*Stream              // that the user has not got yet
	all      []weak.Pointer[Stream] // of all responders: the map of the mux keeps those that are open
	answered int                    // responders
	refused  int                    // producers that ended their streams in their first packets
	refusal  error                  // of the last of them
	heard    int64                  // when the last responder came, by the endpoint's time
	timer    *time.Timer            // of stalled; nil before begin
	over     error                  // why no further responder is taken; nil while some are
	news     chan struct{}          // closed, and made anew, when queue or over changes
}

// manyOptions are the options of OpenMany.
type manyOptions struct {
	asked            bool // by OpenMany
	minimum, maximum int
	stall            time.Duration
}

// Bounds of the responders of one request.
const (
	defaultMaxResponders = 1 << 10
	mostResponders       = 1 << 16
	defaultStall         = time.Second
)

// gathering returns the gathering that s belongs to, nil if there is none.
func (s *session) gathering() *gathering {
	if !s.gathers {
		return nil
	}
	return s.extras.Load().gathering
}

// join makes g the gathering of s, which is not registered yet.
func (s *session) join(g *gathering) {
	s.extra().gathering = g
	s.gathers = true
}

// gather makes s the session of a request with any number of responders. s is not registered yet.
func (s *session) gather(o *openOptions, offer Token) {
	g := &gathering{request: s, options: *o, offer: offer, routes: make(map[uint64]route), news: make(chan struct{})}
	g.members.Store(1)
	s.join(g)
	s.bucket.bind(s.senderNumber) // no producer has this odd number, so the packets of each are foreign
}

// begin starts the clock of the gathering. The session of the request is registered, so it may have ended.
func (g *gathering) begin() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.over == nil {
		g.heard = g.request.ep.now()
		g.timer = time.AfterFunc(g.options.many.stall, g.stalled)
	}
}

// nobodyAnswered reports whether no message of a producer has arrived for s. Called by the mux.
func (s *session) nobodyAnswered() bool {
	if g := s.gathering(); g != nil && g.request == s {
		return len(g.routes) == 0
	}
	return s.bucket.form.Load() == formUnknown
}

// stalled ends the gathering if no responder came for the time that the options set. Time without a connection does not
// count.
func (g *gathering) stalled() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.over != nil {
		return
	}
	ep, stall := g.request.ep, g.options.many.stall
	left := stall
	if ep.outbox.up.Load() {
		left -= time.Duration(ep.now() - max(g.heard, ep.outbox.resumed.Load()))
	}
	if left > 0 {
		g.timer.Reset(left)
		return
	}
	g.endLocked(io.EOF)
}

// endLocked ends the gathering with err, io.EOF if it was not interrupted. The outbox then ends the session of the
// request; see ending.
func (g *gathering) endLocked(err error) {
	if least := g.options.many.minimum; err == io.EOF && g.answered < least {
		err = &TooFewRespondersError{Minimum: least, Answered: g.answered, Refused: g.refused, Err: g.refusal}
	}
	g.over = err
	if g.timer != nil {
		g.timer.Stop()
	}
	g.tellLocked()
	g.request.mark(workBind)
}

// tellLocked wakes the goroutines that wait for news.
func (g *gathering) tellLocked() {
	close(g.news)
	g.news = make(chan struct{})
}

// ending returns the end of the request's session if the gathering is over and the user has got all streams, nil
// otherwise. Until then the session waits for the end of the context, which ends the streams that the user has not got.
func (g *gathering) ending() *ending {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.over == nil || len(g.queue) > 0 {
		return nil
	}
	e := &ending{kind: endLocal, err: g.over}
	if g.answered == 0 {
		e.reset.Code = CloseCanceled // for producers that answer later
	}
	return e
}

// requestEnded ends the gathering with the end of the request's session, unless it was over before. An end by the user,
// by the context or with the client also ends the streams that the user has not got yet.
func (g *gathering) requestEnded(e *ending) {
	g.mu.Lock()
	if g.over == nil {
		g.endLocked(e.err)
	}
	var unreturned []*Stream
	if e.kind == endLocal && len(g.queue) > 0 {
		g.over, unreturned, g.queue = e.err, g.queue, nil
		g.tellLocked()
	}
	g.mu.Unlock()
	g.request.release(e)
	for _, st := range unreturned {
		st.session.endLocally(e)
	}
}

// leave takes the token of s out of use. The token of the request stays until all responders' streams have ended,
// because packets that a responder has sent to it may still be under way, and a responder of another implementation may
// use it for long.
func (g *gathering) leave(s *session) {
	if s == g.request {
		if g.left.Swap(true) {
			return
		}
	} else if _, ok := s.ep.sessions.LoadAndDelete(s.token); !ok {
		return
	}
	if g.members.Add(-1) == 0 {
		s.ep.sessions.Delete(g.request.token)
	}
}

// next returns the next stream. With neither a stream nor an error, more may come: then the channel is closed at the
// next change.
func (g *gathering) next() (*Stream, <-chan struct{}, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.queue) == 0 {
		return nil, g.news, g.over
	}
	st := g.queue[0]
	g.queue[0] = nil
	if g.queue = g.queue[1:]; len(g.queue) == 0 && g.over != nil {
		g.request.mark(workBind)
	}
	return st, nil, nil
}

// close ends the gathering for its user, and returns the streams of all responders that are open. Others may be among
// them.
func (g *gathering) close() (all []*Stream) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.over == nil {
		g.endLocked(ErrClosed)
	}
	g.over, g.queue = ErrClosed, nil
	for _, p := range g.all {
		if st := p.Value(); st != nil {
			all = append(all, st)
		}
	}
	return all
}

// TooFewRespondersError is the error of [Responders.Next] if fewer responders answered than [WithMinResponders] asks
// for.
type TooFewRespondersError struct {
	Minimum  int   // as asked for
	Answered int   // responders, whose streams Next has returned
	Refused  int   // further responders that ended their streams in their first packets
	Err      error // the last of these ends, most often a [*CloseError]; nil if there is none
}

func (e *TooFewRespondersError) Error() string {
	text := fmt.Sprintf("stream: %d responders answered, at least %d should: look whether all are well, or allow more time with WithStallTimeout", e.Answered, e.Minimum)
	if e.Refused > 0 {
		text += fmt.Sprintf("; %d refused, the last with: %v", e.Refused, e.Err)
	}
	return text
}

// Unwrap returns Err.
func (e *TooFewRespondersError) Unwrap() error { return e.Err }
