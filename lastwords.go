package stream

import "time"

// This file resets the streams of an endpoint that closes, although its program may exit right after. The goroutine
// that closes the endpoint runs awaitAnswers, and the outbox runs the rest.
//
// A consumer that ends a stream before its producer has answered has no address for a RESET. It sends the RESET as the
// answer to the producer's first packet, and needs a live endpoint for that. So an endpoint that closes waits a while
// for such packets.

// unanswered has the requests of streams that have ended at this end while their producers could not be reset yet. The
// outbox owns it.
type unanswered struct {
	requests map[[TokenSize]byte]struct{} // tokens of the streams. A producer may send several packets for one of them
	last     int64                        // when the last request was added
}

// maxUnanswered bounds the requests that a closing endpoint waits for.
const maxUnanswered = 1 << 14

// add records that the stream with a token ended unanswered. It forgets older requests if the last one is longer ago
// than patience: these are lost, or their producers answered without being recognized.
func (u *unanswered) add(token [TokenSize]byte, now, patience int64) {
	if u.requests == nil || now-u.last > patience {
		u.requests = make(map[[TokenSize]byte]struct{})
	}
	if len(u.requests) < maxUnanswered {
		u.requests[token] = struct{}{}
	}
	u.last = now
}

// remove records that the request of the stream with a token is settled.
func (u *unanswered) remove(token string) {
	if len(token) == TokenSize {
		delete(u.requests, [TokenSize]byte([]byte(token)))
	}
}

// requestState states whether unanswered has the request of a consumer's stream.
type requestState uint8

const (
	requestNotCounted requestState = iota
	requestCounted                 // in unanswered, if there was room
	requestSettled                 // the producer was reset, or no producer exists
)

// countRequest counts the request of s, which has ended, unless the request was settled before the outbox acted on the
// end.
func (o *outbox) countRequest(s *session) {
	if s.out.requested == requestNotCounted {
		s.out.requested = requestCounted
		o.unanswered.add(s.token, o.ep.now(), o.ep.times.Ack)
	}
}

// settleRequest records that the producer of a stream that has ended was reset, or that no producer exists. s is nil if
// the token is out of use. The outbox counted the request before that, if it was to be counted.
func (o *outbox) settleRequest(s *session, token string) {
	o.unanswered.remove(token)
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
	if len(u.requests) == 0 || !o.up.Load() || o.ep.now()-u.last > o.ep.times.Ack {
		close(o.told)
		o.toldAll = true
	}
}
