package stream

import (
	"math"
	"slices"
	"strings"

	"github.com/natsstream/stream/internal/flow"
	"github.com/natsstream/stream/internal/lifecycle"
	"github.com/natsstream/stream/internal/ring"
)

// line is the path from this end to one peer, which all streams between the two share. It bounds the bytes that are on
// their way at once (see flow.Line), and holds the sessions that wait for it. The outbox owns it.
//
// Sessions take turns, one packet a turn. A session that had nothing to send, and has little now, goes first, so that a
// quiet stream does not wait for a turn of each busy one (after the new flows of FQ-CoDel, RFC 8290 section 4.1).
type line struct {
	flow.Line[*session]
	sizes   flow.Sizes
	peer    string   // the key in lines.byPeer
	turns   *turns   // the sessions that wait; nil if none has waited lately
	turn    *session // may publish the next packet; nil if no session has the turn
	busy    bool     // the line is on lines.busy
	users   int      // sessions that use the line
	began   int64    // when the publishing of the last mark began
	last    *session // that published the last packet, number lastSeq
	lastSeq uint32
	left    int64 // when the last user left
	resumed int64 // value of outbox.resumed when the line was last reset
}

// places is the set of the outbox's lists that a session is in, with flags that these lists need.
type places uint8

const (
	listed   places = 1 << iota // in outbox.peers
	onLine                      // waits on its line for a turn
	steady                      // has waited on its line, and its backlog was not empty since
	toResume                    // in remote.waiting, to ask after a reconnect
	toAsk                       // in remote.waiting, to ask about an acknowledgement or credit
)

func (p places) has(q places) bool { return p&q != 0 }
func (p *places) set(q places)     { *p |= q }
func (p *places) clear(q places)   { *p &^= q }

// lines are the lines of one endpoint.
type lines struct {
	byPeer map[string]*line
	busy   []*line // lines with waiting sessions
	idle   int     // lines without users
	swept  int64
}

// lineIdle is how long a line without users is remembered, so that a consumer that opens one stream after the other
// measures its line once.
const lineIdle = int64(60e9)

// maxIdleLines bounds the lines that are remembered without users, because each request can name another peer.
const maxIdleLines = 1 << 10

// lineOf returns the line to the peer of s.
func (o *outbox) lineOf(s *session) *line {
	l := s.out.line
	if l == nil {
		var key string
		if p := s.remote.Load(); p != nil {
			key = p.name
		} else {
			key = remoteName(s.out.peer)
		}
		if l = o.lines.byPeer[key]; l == nil {
			l = &line{Line: flow.NewLine[*session](), peer: strings.Clone(key), resumed: o.resumed.Load()}
			o.lines.byPeer[l.peer] = l
		} else if l.users == 0 {
			o.lines.idle--
		}
		l.users++
		s.out.line = l
	}
	o.resumeLine(l)
	return l
}

// mayPublish reports whether the line has room for a packet of s. If it has not, s waits for its turn.
func (o *outbox) mayPublish(s *session) bool {
	l := o.lineOf(s)
	if l.turn == s {
		l.turn = nil
	} else if l.turn != nil || l.waits() > 0 {
		o.wait(l, s)
		return false
	}
	if l.MaySend(o.ep.clock.Load()) {
		return true
	}
	o.wait(l, s)
	return false
}

// littleBacklog is the most that a quiet session has to send, in bytes.
const littleBacklog = flow.MinPacket

// wait puts s on the list of sessions that wait for the line, if s has something to send.
func (o *outbox) wait(l *line, s *session) {
	if s.out.places.has(onLine) {
		return
	}
	n := s.send.Load().backlog()
	if n == 0 {
		s.out.places.clear(steady)
		return
	}
	if l.turns == nil {
		l.turns = newTurns()
	}
	if s.out.places.has(steady) || n > littleBacklog {
		l.turns.others.Push(s)
	} else {
		l.turns.quiet.Push(s)
	}
	s.out.places.set(onLine | steady)
	o.setBusy(l)
	if p := s.remote.Load(); p != nil && p.envelopes != nil {
		o.stopPlaces(p.envelopes) // their packets would go first
	}
}

// turns holds the sessions that wait on one line. A session that leaves the line stays in its queue until that is swept
// or the session would have its turn. So each operation takes constant time on average, for any number of sessions.
type turns struct {
	quiet, others ring.Ring[*session] // the outbox pushes and pops
	gone          int                 // sessions in the queues that have left the line
}

func newTurns() *turns {
	t := new(turns)
	t.quiet.Init(math.MaxInt32)
	t.others.Init(math.MaxInt32)
	return t
}

// waits returns how many sessions wait.
func (l *line) waits() int {
	if l.turns == nil {
		return 0
	}
	return l.turns.quiet.Len() + l.turns.others.Len() - l.turns.gone
}

// next removes the session whose turn it is from the line. The caller has checked that a session waits.
func (l *line) next() *session {
	t := l.turns
	for {
		s, quiet := t.quiet.Pop()
		if !quiet {
			s, _ = t.others.Pop()
		}
		switch {
		case s.out.line != l:
			t.gone--
		case quiet && s.send.Load().backlog() > littleBacklog: // it has written on
			t.others.Push(s)
		default:
			return s
		}
	}
}

// removed notes that a session that waits has left the line.
func (l *line) removed() {
	t := l.turns
	if t.gone++; t.gone <= l.waits() {
		return
	}
	for _, q := range []*ring.Ring[*session]{&t.quiet, &t.others} {
		for range q.Len() {
			if s, _ := q.Pop(); s.out.line == l {
				q.Push(s)
			}
		}
	}
	t.gone = 0
}

// offLine records that the peer of s acknowledged n more bytes, in the packets before seq.
func (o *outbox) offLine(s *session, seq uint32, n uint64) {
	if l := s.out.line; l != nil {
		l.Acked(s, seq, n, o.ep.now())
		o.nextTurn(l)
	}
}

// lostOnLine records that n bytes of s are not on their way, because the peer misses a packet and drops the packets
// behind it.
func (o *outbox) lostOnLine(s *session, n uint64) {
	if l := s.out.line; l != nil {
		l.Lost(s, n)
		o.nextTurn(l)
	}
}

// nextTurn lets the session publish that has waited longest.
func (o *outbox) nextTurn(l *line) {
	if s := l.last; s != nil && l.Stuck() {
		l.Mark(s, l.lastSeq, o.ep.now())
	}
	for l.turn == nil && l.waits() > 0 && l.MaySend(o.ep.clock.Load()) {
		s := l.next()
		s.out.places.clear(onLine)
		if s.out.state.Phase == lifecycle.Live {
			l.turn = s
			s.mark(workPackets)
		}
	}
}

// leaveLine removes s from its line, because its stream has ended. n bytes of s are not acknowledged.
func (o *outbox) leaveLine(s *session, n uint64) {
	l := s.out.line
	if l == nil {
		return
	}
	s.out.line = nil
	if s.out.places.has(onLine) {
		s.out.places.clear(onLine)
		l.removed()
	}
	if l.turn == s {
		l.turn = nil
	}
	if l.last == s {
		l.last = nil
	}
	l.Lost(s, n)
	if l.users--; l.users > 0 {
		o.nextTurn(l)
	} else if o.lines.idle == maxIdleLines {
		delete(o.lines.byPeer, l.peer)
	} else {
		l.left = o.ep.now()
		o.lines.idle++
	}
}

func (o *outbox) setBusy(l *line) {
	if !l.busy {
		l.busy = true
		o.lines.busy = append(o.lines.busy, l)
	}
}

// tickLines checks the lines with waiting sessions, because a reconnect may have emptied them. It forgets lines that
// were unused for lineIdle. It sends no questions: a stream asks for overdue acknowledgements, and so for that of a
// mark.
func (o *outbox) tickLines(now int64) {
	o.lines.busy = slices.DeleteFunc(o.lines.busy, func(l *line) bool {
		o.resumeLine(l)
		o.nextTurn(l)
		if l.busy = l.waits() > 0; !l.busy {
			l.turns = nil // the queues are as large as they ever were
		}
		return !l.busy
	})
	if now-o.lines.swept < lineIdle {
		return
	}
	o.lines.swept = now
	for key, l := range o.lines.byPeer {
		if l.users == 0 && now-l.left >= max(lineIdle, l.sizes.Memory()) {
			delete(o.lines.byPeer, key)
			o.lines.idle--
		}
	}
}
