package stream

import (
	"hash/maphash"

	"github.com/natsstream/stream/internal/lifecycle"
)

// peers finds the sessions that publish to a subject, so that the cost of a refused publish does not depend on the
// number of streams. The outbox owns it. A session is in it from when the outbox first serves it until its stream is
// over.
type peers struct {
	seed  maphash.Seed
	first map[uint64]*session              // by the hash of the subject
	more  map[uint64]map[*session]struct{} // further sessions with the same hash. They are rare, so a session needs no links
}

func (p *peers) init() {
	p.seed = maphash.MakeSeed()
	p.first = make(map[uint64]*session)
	p.more = make(map[uint64]map[*session]struct{})
}

// target returns the subject that s publishes to: that of its peer. Until a consumer knows its peer, it is that of its
// request.
func (s *session) target() string {
	if s.out.peer == "" && s.role == lifecycle.Consumer {
		return s.out.subject
	}
	return s.out.peer
}

// add lists s under its target.
func (p *peers) add(s *session) {
	s.out.places.set(listed)
	h := maphash.String(p.seed, s.target())
	if p.first[h] == nil {
		p.first[h] = s
		return
	}
	if p.more[h] == nil {
		p.more[h] = make(map[*session]struct{})
	}
	p.more[h][s] = struct{}{}
}

// remove takes s off the list, if it is on it. Its target is the same as when it was added.
func (p *peers) remove(s *session) {
	if !s.out.places.has(listed) {
		return
	}
	s.out.places.clear(listed)
	h := maphash.String(p.seed, s.target())
	if p.first[h] == s {
		delete(p.first, h)
		for next := range p.more[h] {
			p.first[h] = next
			s = next
			break
		}
	}
	if more := p.more[h]; more != nil {
		if delete(more, s); len(more) == 0 {
			delete(p.more, h)
		}
	}
}

// move makes subject the peer of s.
func (p *peers) move(s *session, subject string) {
	if s.out.peer == subject {
		return
	}
	was := s.out.places.has(listed)
	p.remove(s)
	s.out.peer = subject
	if was {
		p.add(s)
	}
}

// take removes the sessions whose target is subject, and calls f for each.
func (p *peers) take(subject string, f func(*session)) {
	h := maphash.String(p.seed, subject)
	for s := range p.more[h] {
		if s.target() == subject {
			p.remove(s)
			f(s)
		}
	}
	if s := p.first[h]; s != nil && s.target() == subject {
		p.remove(s)
		f(s)
	}
}
