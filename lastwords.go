package stream

import "time"

// This file resets the streams of an endpoint that closes, although its program may exit right after. The goroutine
// that closes the endpoint runs awaitAnswers, and the outbox runs the rest.
//
// A consumer that ends a stream before its producer has answered has no address for a RESET. It sends the RESET as the
// answer to the producer's first packet, and needs a live endpoint for that. So an endpoint that closes waits a while
// for such packets.

// unanswered counts the requests of streams that have ended at this end while their producers could not be reset yet.
// The outbox owns it.
type unanswered struct {
	requests int
	last     int64 // when the last of them was added
}

// add records that the stream of a request ended unanswered. It forgets older requests if the last one is longer ago
// than patience: these are lost, or their producers answered without being recognized.
func (u *unanswered) add(now, patience int64) {
	if now-u.last > patience {
		u.requests = 0
	}
	u.requests++
	u.last = now
}

// remove records that the request of one of these streams is settled.
func (u *unanswered) remove() { u.requests = max(0, u.requests-1) }

// requestState states whether unanswered counts the request of a consumer's stream.
type requestState uint8

const (
	requestNotCounted requestState = iota
	requestCounted                 // in unanswered
	requestSettled                 // the producer was reset, or no producer exists
)

// countRequest counts the request of s, which has ended, unless the request was settled before the outbox acted on the
// end.
func (o *outbox) countRequest(s *session) {
	if s.out.requested == requestNotCounted {
		s.out.requested = requestCounted
		o.unanswered.add(o.ep.now(), o.ep.times.Ack)
	}
}

// settleRequest records that the producer of a stream that has ended was reset, or that no producer exists. s is nil if
// the token is out of use. The outbox counted the request before that, if it was to be counted.
func (o *outbox) settleRequest(s *session) {
	if s == nil || s.out.requested == requestCounted {
		o.unanswered.remove()
	}
	if s != nil {
		s.out.requested = requestSettled
	}
}

// awaitAnswers returns when the outbox has served all marked sessions and all producers are reset, or after the
// patience.
func (o *outbox) awaitAnswers(patience time.Duration) {
	o.leaving.Store(true)
	o.park.Wake()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-o.told:
	case <-o.done:
	case <-timer.C:
	}
}

// answerLast ends awaitAnswers if there is nothing to wait for. The outbox calls it when it is idle.
func (o *outbox) answerLast() {
	u := &o.unanswered
	if u.requests == 0 || !o.up.Load() || o.ep.now()-u.last > o.ep.times.Ack {
		close(o.told)
		o.toldAll = true
	}
}
