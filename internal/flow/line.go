// Package flow decides how much may be on its way between two ends of streams, and keeps the packets that may have to
// be published again. It knows no frames, no lock and no clock: the outbox reports each packet that it published and
// each acknowledgement, and asks for the packet to publish next. Other goroutines use only [Records] and [Windows].
package flow

// Line bounds the bytes that are on their way to one peer, so that they spend little time in queues of the network and
// of NATS servers. A slow line then delays a question to the peer, or another stream's record, by about queueTarget and
// not by whole windows.
//
// The rule is delay-based, after LEDBAT (RFC 6817) and BBR (Cardwell et al., "BBR: Congestion-Based Congestion
// Control", ACM Queue 14(5), 2016). Some packets are marks: the sender asks for the acknowledgement of a mark at once,
// and measures how long it takes. While the round trip stays near the shortest one seen, the limit doubles. When it
// grows by more than queueTarget, the limit becomes the bytes that the line carries in that time.
//
// Packets of all streams to a peer travel in order, so an acknowledged mark shows that everything before it has arrived
// or is lost. A topology that changes breaks the order: then the estimate is wrong for one round trip, and no record
// is.
//
// S identifies a stream. Times are nanoseconds of one monotonic clock. One goroutine owns a Line.
type Line[S comparable] struct {
	sent    uint64 // bytes published in all
	arrived uint64 // bytes published before the last mark that was answered
	acked   uint64 // bytes acknowledged in all, and bytes that are no longer waited for
	limit   uint64 // bytes that may be on their way
	raised  uint64 // sent when the limit changed
	held    bool   // the limit held a packet back since then
	steady  bool   // the first doubling is over: the limit follows the rate
	rate    uint64 // bytes a second, 0 before it was measured

	marks    [maxMarks]mark[S] // the oldest first
	out      int               // how many of them are not answered yet
	answered int64             // when the last mark was answered
	base     shortest
}

// mark is a packet that the sender asked to acknowledge at once.
type mark[S comparable] struct {
	stream  S
	seq     uint32 // of the packet
	sent    uint64 // Line.sent behind the packet
	arrived uint64 // Line.through at that time
	at      int64
}

const (
	second = int64(1e9)

	// queueTarget is how long a packet may wait in queues on its way. It is long beside the jitter of networks and
	// short beside the patience of users.
	queueTarget = 300 * second / 1000

	// firstLimit may be on its way before anything is known of a line: 4 s at 16 KiB/s, and seven doublings to
	// Unlimited.
	firstLimit = 64 << 10

	// minLimit keeps two of the smallest packets on their way.
	minLimit = 2 * MinPacket

	// Unlimited is the limit from which on windows alone bound a sender.
	Unlimited = 8 << 20

	// maxMarks marks divide the data on its way into parts, so that the line does not run empty until one is answered.
	maxMarks = 4

	// lateMark is how long the answer to a mark may take on a line without a limit before packets wait for it.
	lateMark = 2 * queueTarget

	// restMarks is the time between two marks on a line that is not limited. Marks then cost nothing, and a line that
	// becomes slow is noticed soon.
	restMarks = 100 * second / 1000

	// MinPacket and MaxPacket bound the size of a packet in bytes. The smallest takes a quarter of a second at 16
	// KiB/s.
	MinPacket = 4 << 10
	MaxPacket = 64 << 10

	// FirstPacket bounds packets before anything is known of a line. It has room for a record of 16 KiB, and takes a
	// second at 16 KiB/s.
	FirstPacket = 16<<10 + 64

	// unknownRate is the slowest line that a stream must live through before its rate is measured, in bytes a second.
	unknownRate = 16 << 10
)

// NewLine returns a line of which nothing is known.
func NewLine[S comparable]() Line[S] { return Line[S]{limit: firstLimit} }

// MaySend reports whether another packet may be published. The line notes that it held one back.
func (l *Line[S]) MaySend(now int64) bool {
	if l.limit == Unlimited {
		return !l.late(now)
	}
	if l.onTheWay() < l.limit {
		return true
	}
	l.held = true
	return false
}

// Room returns how many bytes may be published now. If it is not 0, MaySend is true.
func (l *Line[S]) Room(now int64) uint64 {
	switch {
	case l.limit != Unlimited:
		return l.limit - min(l.onTheWay(), l.limit)
	case l.late(now):
		return 0
	}
	return Unlimited
}

// late reports whether the answer to the oldest mark takes long.
func (l *Line[S]) late(now int64) bool {
	return l.out > 0 && now-l.marks[0].at >= lateMark+l.base.min()
}

// through returns how many published bytes are no longer on their way. Marks and acknowledgements each show a part of
// them. Packets that were taken for lost and had arrived count twice.
func (l *Line[S]) through() uint64 { return min(l.sent, max(l.arrived, l.acked)) }

func (l *Line[S]) onTheWay() uint64 { return l.sent - l.through() }

// Sent notes that n bytes were published.
func (l *Line[S]) Sent(n int) { l.sent += uint64(n) }

// WantsMark reports whether the packet to be published next, of n bytes, should be a mark.
func (l *Line[S]) WantsMark(n int, now int64) bool {
	last, part := l.through(), l.limit/maxMarks // acknowledgements that come without marks spare them
	if l.out > 0 {
		last = max(last, l.marks[l.out-1].sent)
	}
	if l.limit == Unlimited {
		part = firstLimit / maxMarks
		if l.out > 0 || now-l.answered < restMarks {
			return false
		}
	}
	return l.out < maxMarks && (l.sent+uint64(n)-last >= part || l.out == 0 && l.onTheWay()+uint64(n) >= l.limit)
}

// CanMark reports whether another packet may be a mark.
func (l *Line[S]) CanMark() bool { return l.out < maxMarks }

// Stuck reports whether the limit holds packets back although no mark is on its way, so that no answer can raise it:
// the limit shrank below the published bytes. The packet that was published last must then become the mark. Its sender
// asks for the acknowledgement when that is overdue.
func (l *Line[S]) Stuck() bool { return l.out == 0 && l.limit != Unlimited && l.onTheWay() >= l.limit }

// Mark notes that the packet published last, number seq of stream, was a mark. Its publishing began at now.
func (l *Line[S]) Mark(stream S, seq uint32, now int64) {
	l.marks[l.out] = mark[S]{stream, seq, l.sent, l.through(), now}
	l.out++
}

// Acked notes that n more bytes of stream were acknowledged, which are its packets before seq.
func (l *Line[S]) Acked(stream S, seq uint32, n uint64, now int64) {
	l.acked += n
	for i := l.out - 1; i >= 0; i-- {
		if m := l.marks[i]; m.stream == stream && int32(seq-m.seq) > 0 {
			l.drop(i + 1)
			l.answer(m, now)
			return
		}
	}
}

// Lost notes that n bytes of stream, and its marks, will not be acknowledged: its packets are lost, or it has ended.
func (l *Line[S]) Lost(stream S, n uint64) {
	l.acked += n
	for i := l.out - 1; i >= 0; i-- {
		if l.marks[i].stream == stream {
			copy(l.marks[i:l.out], l.marks[i+1:l.out])
			l.out--
			l.marks[l.out] = mark[S]{} // keeps no stream alive
		}
	}
}

// drop takes the n oldest marks out.
func (l *Line[S]) drop(n int) {
	copy(l.marks[:], l.marks[n:l.out])
	clear(l.marks[l.out-n : l.out])
	l.out -= n
}

func (l *Line[S]) answer(m mark[S], now int64) {
	trip := max(now-m.at, 1)
	l.base.add(now, trip)
	l.measure(m, trip)
	l.arrived, l.answered = m.sent, now

	limit, queue := l.limit, trip-l.base.min()
	switch {
	case queue > queueTarget:
		l.steady = true
		limit = l.fitting()
	case !l.held || m.sent < l.raised+limit: // a larger limit was not needed, or this one was not tried yet
		return
	case !l.steady:
		limit *= 2
	case queue < queueTarget/2:
		limit += max(limit/8, minLimit/4)
	}
	l.limit, l.raised, l.held = min(max(limit, minLimit), Unlimited), l.sent, false
	if l.limit == Unlimited {
		l.steady = false
	}
}

// measure takes the rate from the bytes that arrived while the mark was on its way. A line with a queue was busy all
// that time, so the sample is its rate. Otherwise the line carries at least so much.
func (l *Line[S]) measure(m mark[S], trip int64) {
	sample := uint64(float64(m.sent-m.arrived) * float64(second) / float64(trip))
	if trip-l.base.min() > queueTarget {
		l.rate = sample
	} else {
		l.rate = max(l.rate, sample)
	}
}

// fitting returns the bytes that the line carries within the shortest round trip and queueTarget.
func (l *Line[S]) fitting() uint64 {
	return uint64(float64(l.rate) * float64(l.base.min()+queueTarget) / float64(second))
}

// Packet returns how many bytes a packet should hold at most, so that several packets fit into the limit.
func (l *Line[S]) Packet() int { return int(min(max(l.limit/maxMarks, MinPacket), MaxPacket)) }

// Patience returns how much longer than on an empty line an answer may take, because of the bytes ahead of it.
func (l *Line[S]) Patience() int64 {
	rate := l.rate
	if rate == 0 {
		rate = unknownRate
	}
	return int64(float64(l.onTheWay()) / float64(rate) * float64(second))
}

// Reset begins anew after a reconnect, which may have changed the line. The data that was on its way is lost or has
// arrived.
func (l *Line[S]) Reset() { *l = Line[S]{limit: firstLimit} }

// shortest is the minimum of samples of the last one to two periods, so that a path which has become longer for good is
// not taken for a queue for ever.
type shortest struct {
	began       int64
	last, older int64 // minimum of this period and of the one before, 0 if there is none
}

const shortestPeriod = 60 * second

func (s *shortest) add(now, sample int64) {
	if now-s.began >= shortestPeriod {
		s.began, s.older, s.last = now, s.last, 0
	}
	if s.last == 0 || sample < s.last {
		s.last = sample
	}
}

func (s *shortest) min() int64 {
	if s.older != 0 && (s.last == 0 || s.older < s.last) {
		return s.older
	}
	return s.last
}
