package flow

// Loss limits the packets that are on their way after a loss. Packets that are lost together were most often too many
// at once for a server or a connection between the ends, and would be lost again. So the limit is half of the packets
// that were on their way at the loss. It rises by an eighth each time that as many packets arrived as it allows (after
// RFC 5681 and RFC 8312).
//
// The zero Loss is no limit. All methods belong to one goroutine, the outbox.
type Loss struct {
	limit  uint32 // packets on their way at most; 0 is no limit
	lostAt uint32 // packets that were on their way at the last loss
	grown  uint32 // packets acknowledged since limit changed
	asked  bool   // the peer was asked how many of those on their way arrived
}

// slowness is how many times as many packets have to arrive for a step near the size of the last loss. Below that size
// steps come fast, because so many packets are known to get through.
const slowness = 16

// Limit returns how many packets may be on their way, 0 for any number.
func (l *Loss) Limit() uint32 { return l.limit }

// Lost records that packets were lost while n were on their way.
func (l *Loss) Lost(n uint32) { *l = Loss{limit: max(1, n/2), lostAt: n} }

// Full reports whether no further packet may be on its way beside n.
func (l *Loss) Full(n uint32) bool { return l.limit != 0 && n >= l.limit }

// Ask reports whether to ask the peer for an acknowledgement, without which no more packets may be on their way. It
// returns true once until packets arrive.
func (l *Loss) Ask() bool {
	ask := !l.asked
	l.asked = true
	return ask
}

// Arrived records that n packets were acknowledged, and raises the limit by an eighth, at least one, each time that as
// many packets arrived as it allows. It raises more slowly from near the size of the last loss up to twice that size. A
// limit that reaches most is removed. Arrived reports whether there was a limit.
func (l *Loss) Arrived(n, most uint32) bool {
	if l.limit == 0 {
		return false
	}
	l.asked = false
	more, enough := 1+l.limit/8, l.limit
	if l.limit+more >= l.lostAt && l.limit <= 2*l.lostAt {
		enough *= slowness
	}
	if l.grown += n; l.grown < enough {
		return true
	}
	l.grown = 0
	if l.limit += more; l.limit >= most {
		l.limit = 0
	}
	return true
}

// Unanswered records that the peer did not answer. If Ask was the reason for the question, the question behind the
// packets was lost. So not all packets got through, and the limit becomes one less.
func (l *Loss) Unanswered() {
	if l.asked && l.limit > 1 {
		l.lostAt = l.limit
		l.limit--
		l.grown = 0
	}
}
