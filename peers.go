package stream

import "hash/maphash"

// peers finds the sessions that write to a subject, so that a refused publish costs the same however many streams there
// are. The outbox owns it. It holds a session from when the outbox first serves it until it finishes it.
type peers struct {
	seed  maphash.Seed
	first map[uint64]*session // by the hash of the subject; sessions with the same hash are linked
}

// peerLink is a session's place in peers.
type peerLink struct {
	prev, next *session
	listed     bool
}

func (p *peers) init() {
	p.seed = maphash.MakeSeed()
	p.first = make(map[uint64]*session)
}

// target returns the subject that s writes to: its peer's, or, until a consumer knows that, its request's.
func (s *session) target() string {
	if s.peer == "" && s.stream != nil {
		return s.subject
	}
	return s.peer
}

// add lists s under its target.
func (p *peers) add(s *session) {
	h := maphash.String(p.seed, s.target())
	first := p.first[h]
	s.listing = peerLink{next: first, listed: true}
	if first != nil {
		first.listing.prev = s
	}
	p.first[h] = s
}

// remove takes s off the list, if it is on it. Its target is the same as when it was added.
func (p *peers) remove(s *session) {
	l := s.listing
	if !l.listed {
		return
	}
	s.listing = peerLink{}
	if l.next != nil {
		l.next.listing.prev = l.prev
	}
	switch {
	case l.prev != nil:
		l.prev.listing.next = l.next
	case l.next != nil:
		p.first[maphash.String(p.seed, s.target())] = l.next
	default:
		delete(p.first, maphash.String(p.seed, s.target()))
	}
}

// move makes subject the peer of s.
func (p *peers) move(s *session, subject string) {
	if s.peer == subject {
		return
	}
	listed := s.listing.listed
	p.remove(s)
	s.peer = subject
	if listed {
		p.add(s)
	}
}

// take removes the sessions whose target is subject, and calls f for each.
func (p *peers) take(subject string, f func(*session)) {
	for s := p.first[maphash.String(p.seed, subject)]; s != nil; {
		next := s.listing.next
		if s.target() == subject {
			p.remove(s)
			f(s)
		}
		s = next
	}
}
