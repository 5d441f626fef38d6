package flow

// This file decides how packets are published that may be too large for a NATS server or a device on the way. A leaf
// node has a max_payload of its own, and nothing reports it to the sender. Such a packet is lost each time, while
// smaller ones behind it arrive. Sizes and Passing distinguish that loss from others. The outbox calls them.

// Sizes of the messages that carry a packet in fragments, in bytes. Almost every server and device passes the large
// ones. The small ones are for the rest.
const (
	LargeFragment = 4 << 10
	SmallFragment = 1 << 10
)

// QuestionSize is the size of the message that asks how much of a packet arrived.
const QuestionSize = 40

// Sizes holds the packet sizes that pass to one peer, and those that do not. The zero Sizes knows nothing. One
// goroutine owns it. Times are nanoseconds of one clock.
type Sizes struct {
	proven int   // the largest packet that the peer acknowledged
	limit  int   // packets of this size and larger do not pass; 0 if none is known
	until  int64 // when larger ones are tried again
	wait   int64 // how long that was after the limit was found
}

const (
	minute = 60 * second

	// firstWait is short, because the first loss may have had another reason: a reconnect of the peer takes packets of
	// all sizes. Then the packets are smaller for a minute.
	firstWait = minute
	// secondWait is how long a limit lasts that was found again. Each later one lasts twice as long as the one before.
	// A try can cost all clients of a leaf node their link.
	secondWait  = 10 * minute
	longestWait = 24 * 60 * minute
)

// Fails reports whether packets of size bytes must not be published as a whole. These are packets larger than all that
// passed, for some time after such a packet did not pass.
func (s *Sizes) Fails(size int, now int64) bool {
	return s.limit != 0 && now < s.until && size > max(s.proven, s.Fragment())
}

// Most returns the largest size of a new packet, at most most.
func (s *Sizes) Most(most int, now int64) int {
	if s.Fails(most, now) {
		return max(s.proven, s.Fragment())
	}
	return most
}

// Fragment returns the size of the messages to carry a packet in fragments that is known not to pass.
func (s *Sizes) Fragment() int {
	if s.limit > LargeFragment {
		return LargeFragment
	}
	return SmallFragment
}

// Doubts reports whether packets of size bytes are larger than all that passed.
func (s *Sizes) Doubts(size int) bool { return size > s.proven && size > SmallFragment }

// Passed records that the peer acknowledged a packet of size bytes that was sent as a whole.
func (s *Sizes) Passed(size int) {
	if size <= s.proven {
		return
	}
	s.proven = size
	if size >= s.limit {
		s.limit, s.wait, s.until = 0, 0, 0
	}
}

// Failed records that a packet of size bytes does not pass, while its fragments do.
func (s *Sizes) Failed(size int, now int64) {
	if now < s.until {
		s.limit = min(s.limit, size)
	} else {
		switch s.limit = size; s.wait {
		case 0:
			s.wait = firstWait
		case firstWait:
			s.wait = secondWait
		default:
			s.wait = min(2*s.wait, longestWait)
		}
		s.until = now + s.wait
	}
	if s.proven >= s.limit { // the path has changed
		s.proven = 0
	}
}

// Memory returns how long to keep Sizes for a peer without streams.
func (s *Sizes) Memory() int64 { return 2 * s.wait }

// Passing holds the state of a sender's packets that may not pass: the first packet that the peer misses, and the first
// packet on its way that is larger than all that passed. One goroutine owns it, and a nil Passing knows nothing.
type Passing struct {
	doubt   bool   // packet doubted is larger than all that passed, and not acknowledged
	doubted uint32 // its number
	tried   int64  // when it was published

	// Of the packet that is missed; size is 0 if there is none.
	seq      uint32
	size     int
	fragment int    // size of the messages that carry the packet in fragments, 0 as long as it is published as a whole
	sends    int    // how often it was published in that form
	failures int    // how often the peer answered behind it that nothing more had arrived
	arrived  int    // bytes of it that arrived
	since    int64  // when the loss was found, or when the last bytes were reported to have arrived
	question uint32 // number of the last question
	first    uint32 // number of the first question about the present form that is not answered yet; earlier answers do not count
	own      bool   // this end's own server does not accept the packet
}

// How often a missed packet is published in each form before the next form. Random loss hardly ever hits the same
// packet that often, and does no harm if it does.
const (
	wholeTries = 2
	largeTries = 2
	smallTries = 8
)

// Again returns how to publish the packet with number seq again, of size bytes: the size of the messages to carry it in
// fragments, or 0 for the whole. most is the max_payload of this end's own server. fresh says that the packet was not
// published as a whole since this end's own connection came back.
//
// A packet larger than all that passed before is not published as a whole a second time: if a server on its way closes
// the link between two servers because of it, that harms all who use the link.
func (m *Passing) Again(seq uint32, size, most int, fresh bool, known *Sizes, now int64) (fragment int) {
	if m.seq != seq || m.size == 0 {
		*m = Passing{doubt: m.doubt, doubted: m.doubted, tried: m.tried, question: m.question, first: m.question + 1, seq: seq, size: size, since: now}
	}
	m.own = m.own || size > most
	switch {
	case size <= SmallFragment:
	case m.fragment == 0 && size <= most && !known.Fails(size, now) && (fresh || size <= known.proven && m.failures < wholeTries):
	case m.fragment == 0 && size > LargeFragment && most >= LargeFragment && !known.Fails(LargeFragment, now):
		m.form(LargeFragment)
	case m.fragment == 0 || m.fragment == LargeFragment && (m.failures >= largeTries || m.silent(known)):
		m.form(SmallFragment)
	}
	m.sends++
	return m.fragment
}

// silent reports whether nothing was heard of the large fragments: no answer says that something arrived, or that
// nothing did. If a server on their way closes the link between two servers because of them, the question behind them
// is lost, too.
func (m *Passing) silent(known *Sizes) bool {
	return m.sends >= largeTries && m.failures == 0 && m.arrived == 0 && LargeFragment > known.proven
}

func (m *Passing) form(fragment int) {
	m.fragment, m.sends, m.failures, m.first = fragment, 0, 0, m.question+1
}

// Asks reports whether a question behind the packet has to ask how much of it arrived. A packet that is missed for the
// first time and travels as a whole needs no question, because it nearly always arrives.
func (m *Passing) Asks() bool { return m.fragment != 0 || m.sends > 1 }

// Ask returns the number of the next question.
func (m *Passing) Ask() uint32 {
	m.question++
	return m.question
}

// Arrived returns how many bytes of packet seq need not be published again in fragments.
func (m *Passing) Arrived(seq uint32) int {
	if m == nil || m.seq != seq {
		return 0
	}
	return m.arrived
}

// Answer handles the answer to a question: so many bytes of packet seq, which the peer waits for, had arrived before
// the question. It reports whether these are more than before.
func (m *Passing) Answer(seq uint32, bytes int, question uint32, now int64) (more bool) {
	switch {
	case m.seq != seq || m.size == 0 || bytes >= m.size:
		return false
	case bytes > m.arrived:
		m.arrived, m.since, m.failures = bytes, now, 0
		return true
	}
	m.arrived = bytes
	if int32(question-m.first) >= 0 {
		m.failures++
		m.first = question + 1
	}
	return false
}

// Try records that packet seq is published for the first time, and that Sizes doubts its size. It reports whether it is
// the first such packet on its way: its sender asks for the acknowledgement at once.
func (m *Passing) Try(seq uint32, now int64) (first bool) {
	if m.doubt {
		return false
	}
	m.doubt, m.doubted, m.tried = true, seq, now
	return true
}

// Holds reports whether packets of a size that Sizes doubts have to wait: because another one is under way in
// fragments, or was published longer than patience ago and is not acknowledged.
func (m *Passing) Holds(now, patience int64) bool {
	return m != nil && (m.fragment != 0 || m.doubt && now-m.tried > patience)
}

// InFragments reports whether the packet that is missed is under way in fragments.
func (m *Passing) InFragments() bool { return m != nil && m.fragment != 0 }

// Stuck reports whether nothing of the packet arrives in its smallest form, and returns its size. A packet that is no
// larger than the questions which were answered does not pass for another reason.
func (m *Passing) Stuck() (size int, stuck bool) {
	return m.size, m.failures >= smallTries && m.size > QuestionSize && (m.fragment == SmallFragment || m.size <= SmallFragment)
}

// Hopeless reports whether Stuck has been true for patience.
func (m *Passing) Hopeless(now, patience int64) (size int, hopeless bool) {
	size, stuck := m.Stuck()
	return size, stuck && now-m.since >= patience
}

// Refused records that the peer has no room for the missed packet. So the answers about it show nothing about its size.
func (m *Passing) Refused() {
	if m != nil {
		m.sends, m.failures, m.first = 0, 0, m.question+1
	}
}

// Acked records that the peer acknowledged all packets before next, and reports whether waiting packets may go. If the
// fragments of a packet arrived at once, then the size was the reason for its loss. If some of them were lost, messages
// of any size are.
func (m *Passing) Acked(next uint32, known *Sizes, now int64) (more bool) {
	if m.doubt && int32(next-m.doubted) > 0 {
		m.doubt, more = false, true
	}
	if m.size == 0 || int32(next-m.seq) <= 0 {
		return more
	}
	if m.fragment != 0 && m.sends == 1 && !m.own {
		if size := m.size; m.fragment == LargeFragment || size <= LargeFragment {
			known.Failed(size, now)
		} else {
			known.Failed(LargeFragment, now)
		}
	}
	m.size, m.fragment = 0, 0
	return true
}
