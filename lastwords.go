package stream

import "time"

// This file is about the end of an endpoint whose program may end right after it: its peers are to hear that it left.
//
// A consumer that leaves before its producer has answered does not know where to send a RESET. Its answer is that to the producer's
// first packet, for as long as there is an endpoint to give it. So an endpoint that closes waits for such answers, for a while.

// unanswered are the requests whose streams have ended at this end and whose producers do not know it yet. The outbox owns it.
type unanswered struct {
	requests int
	last     int64 // when the last of them was added
}

// add notes that the stream of a request ended unanswered. Those from long ago are lost, or their producers answered when they
// could not be told apart.
func (u *unanswered) add(now, patience int64) {
	if now-u.last > patience {
		u.requests = 0
	}
	u.requests++
	u.last = now
}

// remove notes that a producer was answered, or that there is none.
func (u *unanswered) remove() { u.requests = max(0, u.requests-1) }

// awaitAnswers returns when all sessions that are marked have been served and no producer is left that has yet to be told, or
// after the patience.
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

// answerLast ends awaitAnswers if there is nothing to wait for. The outbox calls it when it has nothing to do.
func (o *outbox) answerLast() {
	u := &o.unanswered
	if u.requests == 0 || !o.up.Load() || o.ep.now()-u.last > o.ep.times.Ack {
		close(o.told)
		o.toldAll = true
	}
}
