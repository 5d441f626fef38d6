package stream

import (
	"fmt"
	"slices"

	"github.com/natsstream/stream/internal/lifecycle"
)

// denials are refused publishes to subjects that no stream of this endpoint publishes to. The NATS server checks
// permissions after it maps subjects. So such a refusal may belong to a request, or to a publish of the user's own on
// the same connection, and it does not say to which. The outbox attributes it to a request only if that request is
// still unanswered AckTimeout later, and if the refusal cannot mean a request to another subject. The outbox owns
// denials, and runs all of this file.
type denials struct {
	// requested holds the subjects of requests that were published lately, with their times. A refusal that names one
	// of them needs no attribution: no mapping hid its subject, and its stream may have ended before.
	requested map[string]int64
	last      int64 // when the last request was published, 0 if none was
	pending   []denial
}

// denial is one refusal that was not attributed yet.
type denial struct {
	subject string
	err     error
	at, due int64
}

const (
	// A refusal comes a round trip after the publish. AckTimeout is meant to be longer than that; a busy connection may
	// take more.
	denialWindow = 4 // times AckTimeout

	maxRequested = 1 << 10 // subjects that are remembered
	maxDenials   = 1 << 6  // refusals that wait for their attribution
)

// publishes records that a request is published to subject.
func (d *denials) publishes(subject string, now, window int64) {
	if d.requested == nil {
		d.requested = make(map[string]int64)
	}
	if len(d.requested) >= maxRequested {
		for subject, at := range d.requested {
			if now-at > window {
				delete(d.requested, subject)
			}
		}
		if len(d.requested) >= maxRequested {
			clear(d.requested) // with so many subjects at once, attribute finds several candidates and no refusal is attributed
		}
	}
	d.requested[subject], d.last = now, now
}

// add stores a refusal of a subject that no stream publishes to.
func (d *denials) add(subject string, err error, now, patience int64) {
	if d.last == 0 || now-d.last > denialWindow*patience {
		return // no request is recent enough; an end that only serves never has one
	}
	if _, ours := d.requested[subject]; ours {
		return
	}
	if _, err := ParseToken(lastToken(subject)); err == nil {
		return // a stream's peer, and the stream has ended
	}
	same := func(p denial) bool { return p.subject == subject }
	if i := slices.IndexFunc(d.pending, same); i >= 0 {
		d.pending[i].at = now
	} else if len(d.pending) < maxDenials {
		d.pending = append(d.pending, denial{subject: subject, err: err, at: now, due: now + patience})
	}
}

// waiting is an unanswered request.
type waiting struct {
	subject string
	asked   int64 // when the request was published
}

// attribute returns the subject of the requests that a refusal at the given time is about: the only subject with
// requests that were published within window before it. It returns false if there is none. It also returns false if
// there are several, and undecided is true then.
func attribute(requests []waiting, at, window int64) (subject string, ok, undecided bool) {
	for _, r := range requests {
		switch {
		case r.asked > at || at-r.asked > window:
		case !ok:
			subject, ok = r.subject, true
		case r.subject != subject:
			return "", false, true
		}
	}
	return subject, ok, false
}

// decideDenials ends the streams to which pending refusals are attributed. The outbox calls it at each tick.
func (o *outbox) decideDenials(now int64) {
	d := &o.denials
	if !slices.ContainsFunc(d.pending, func(p denial) bool { return now >= p.due }) {
		return
	}
	var (
		sessions []*session
		requests []waiting
	)
	o.ep.sessions.Range(func(_ [TokenSize]byte, s *session) bool {
		if s.unanswered() {
			sessions = append(sessions, s)
			requests = append(requests, waiting{s.out.subject, s.out.life.upSince})
		}
		return true
	})
	window := denialWindow * o.ep.times.Ack
	left := d.pending[:0]
	for _, p := range d.pending {
		if now < p.due {
			left = append(left, p)
			continue
		}
		subject, ok, undecided := attribute(requests, p.at, window)
		if undecided {
			p.due = now + o.ep.times.Ack
			left = append(left, p)
		}
		if ok {
			err := fmt.Errorf("stream: may not publish to %s, to which the NATS server seems to map %s; allow it (docs/PROTOCOL.md section 15): %w",
				p.subject, subject, p.err)
			for _, s := range sessions {
				if s.out.subject == subject && s.out.life.upSince <= p.at && p.at-s.out.life.upSince <= window {
					s.requestEnd(&ending{kind: endFault, err: err})
				}
			}
		}
	}
	clear(d.pending[len(left):])
	d.pending = left
}

// unanswered reports whether the session is a consumer's, its request was published, and no answer came.
func (s *session) unanswered() bool {
	return s.role == lifecycle.Consumer && s.out.life.took != 0 && s.out.peer == "" && !s.peerTakesNone() && s.bucket.ring.Pushed() == 0 && s.end.Load() == nil
}
