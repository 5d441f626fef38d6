package flow

import (
	"fmt"
	"testing"
)

const ms = second / 1000

// lineSim is a line with a rate and a delay, and senders that always have something to send.
type lineSim struct {
	rate  float64 // bytes a second
	delay int64   // round trip of an empty line

	now   int64
	line  Line[int]
	free  int64      // when the line has carried everything
	acks  [][2]int64 // when a mark's answer arrives, and its packet
	seq   uint32
	sent  uint64
	worst int64 // longest queue after the first ten seconds
	burst int64 // longest queue at all
	idle  int64 // how long the line was empty after the first ten seconds
}

func (s *lineSim) run(until int64) {
	for s.now < until {
		for range 16 { // as fast as this at most, and windows of 8 MiB
			if float64(s.free-s.now)/float64(second)*s.rate > 8<<20 {
				break
			}
			if !s.line.MaySend(s.now) {
				break
			}
			n := s.line.Packet()
			mark := s.line.WantsMark(n, s.now)
			s.line.Sent(n)
			s.seq++
			s.sent += uint64(n)
			s.free = max(s.free, s.now) + int64(float64(n)/s.rate*float64(second))
			if mark {
				s.line.Mark(1, s.seq, s.now)
				s.acks = append(s.acks, [2]int64{s.free + s.delay, int64(s.seq)})
			}
		}
		queue := s.free - s.now
		s.burst = max(s.burst, queue)
		if s.now > 10*second {
			s.worst = max(s.worst, queue)
		}
		next := s.now + ms/4
		if len(s.acks) > 0 && s.acks[0][0] <= next {
			next = max(s.acks[0][0], s.now+1)
		}
		if s.now > 10*second && s.free < next {
			s.idle += next - max(s.free, s.now)
		}
		s.now = next
		if len(s.acks) > 0 && s.acks[0][0] <= s.now {
			s.line.Acked(1, uint32(s.acks[0][1])+1, 0, s.now)
			s.acks = s.acks[1:]
			if s.line.Stuck() {
				s.line.Mark(1, s.seq, s.now)
				s.acks = append(s.acks, [2]int64{max(s.free, s.now) + s.delay, int64(s.seq)})
			}
		}
	}
}

// Every rate is used, and a slow line's queue stays short.
func TestLineFollowsTheRate(t *testing.T) {
	for _, kib := range []int{16, 43, 128, 256, 1024, 10 << 10, 100 << 10} {
		for _, delay := range []int64{0, 2, 50, 200} {
			t.Run(fmt.Sprintf("%d KiB/s, %d ms", kib, delay), func(t *testing.T) {
				s := &lineSim{rate: float64(kib << 10), delay: delay * ms, line: NewLine[int]()}
				s.run(60 * second)
				used := 1 - float64(s.idle)/float64(50*second)
				if least := 0.9; used < least {
					t.Errorf("%.0f %% of the line were used", 100*used)
				}
				most := 3 * queueTarget
				if kib >= 10<<10 { // the windows bound these
					most = int64(float64(Unlimited+16*MaxPacket) / s.rate * float64(second))
				}
				if s.worst > max(most, int64(float64(6*MinPacket)/s.rate*float64(second))+s.delay) {
					t.Errorf("a packet waits %d ms", s.worst/ms)
				}
				t.Logf("used %.2f, longest queue %d ms, at the start %d ms, limit %d, packet %d, rate %d", used, s.worst/ms, s.burst/ms, s.line.limit, s.line.Packet(), s.line.rate)
			})
		}
	}
}

// A line whose rate changes is used again at its new rate, and its queue is short again, within some seconds.
func TestLineFollowsAChange(t *testing.T) {
	for _, kib := range [][2]int{{10 << 10, 128}, {128, 10 << 10}, {1024, 64}, {100 << 10, 1024}} {
		t.Run(fmt.Sprintf("%d to %d KiB/s", kib[0], kib[1]), func(t *testing.T) {
			s := &lineSim{rate: float64(kib[0] << 10), delay: 20 * ms, line: NewLine[int]()}
			s.run(20 * second)
			left := float64(s.free-s.now) / float64(second) * s.rate
			s.rate = float64(kib[1] << 10)
			slower := float64(kib[0]) / float64(kib[1])
			s.free = s.now + int64(left/s.rate*float64(second)) // what is queued goes out at the new rate
			for i := range s.acks {
				s.acks[i][0] = s.now + int64(float64(s.acks[i][0]-s.now)*slower)
			}
			settled := s.free + 20*second
			s.run(settled)
			s.worst, s.idle = 0, 0
			s.run(settled + 30*second)
			if used := 1 - float64(s.idle)/float64(30*second); used < 0.9 {
				t.Errorf("%.0f %% of the line were used", 100*used)
			}
			if s.worst > 4*queueTarget {
				t.Errorf("a packet waits %d ms", s.worst/ms)
			}
		})
	}
}

// What a stream that ended had on its way is waited for no longer.
func TestLineForgetsStreamsThatEnded(t *testing.T) {
	l := NewLine[string]()
	const part = firstLimit / maxMarks
	for i, stream := range []string{"a", "b", "a", "a"} {
		if !l.WantsMark(part, 1) {
			t.Fatalf("packet %d is no mark", i)
		}
		l.Sent(part)
		l.Mark(stream, uint32(i), 1)
	}
	if l.MaySend(1) {
		t.Error("more than the limit is on its way")
	}
	l.Lost("a", 3*part)
	if l.out != 1 || l.onTheWay() != part || !l.MaySend(1) {
		t.Errorf("%d marks, %d bytes are on their way", l.out, l.onTheWay())
	}
	l.Acked("a", 9, 0, 2)
	l.Acked("b", 2, part, 2)
	if l.out != 0 || l.onTheWay() != 0 {
		t.Errorf("%d marks, %d bytes are on their way", l.out, l.onTheWay())
	}
	if l.marks != [maxMarks]mark[string]{} {
		t.Errorf("marks keep streams alive: %v", l.marks)
	}
}

// An acknowledgement of earlier packets answers no mark, and one of a later packet answers the marks before it.
func TestLineTakesTheRightAnswers(t *testing.T) {
	l := NewLine[int]()
	const part = firstLimit / maxMarks
	first := uint32(1<<31 - 2) // numbers wrap
	for i := range uint32(maxMarks) {
		l.Sent(part)
		l.Mark(1, first+i, int64(i+1))
	}
	if l.Acked(1, first, 0, 9); l.out != maxMarks {
		t.Errorf("%d marks are out", l.out)
	}
	if l.Acked(1, first+3, 0, 9); l.arrived != 3*part || l.out != 1 {
		t.Errorf("%d arrived, %d marks are out", l.arrived, l.out)
	}
	if !l.MaySend(9) {
		t.Error("the answer lets nothing go")
	}
}

// A stream whose peer acknowledges of itself, as it does when a part of the window was read, needs no marks.
func TestAcknowledgementsSpareMarks(t *testing.T) {
	l := NewLine[int]()
	for seq := range uint32(1000) {
		if l.WantsMark(1000, int64(seq)*second) {
			t.Fatalf("packet %d is a mark", seq)
		}
		l.Sent(1000)
		if seq%8 == 7 {
			l.Acked(1, seq+1, 8000, int64(seq)*second)
		}
	}
}

// Patience is what the bytes ahead take, on a line that was measured and on one that was not.
func TestPatienceFollowsWhatLiesAhead(t *testing.T) {
	l := NewLine[int]()
	l.Sent(32 << 10)
	if got := l.Patience(); got != 2*second {
		t.Errorf("%d ms on a line that was not measured", got/ms)
	}
	s := &lineSim{rate: 256 << 10, delay: 20 * ms, line: NewLine[int]()}
	s.run(20 * second)
	ahead := float64(s.line.onTheWay()) / s.rate
	if got := float64(s.line.Patience()) / float64(second); got < 0.9*ahead || got > 1.1*ahead {
		t.Errorf("%.2f s for %.2f s of bytes", got, ahead)
	}
	s.line.Reset()
	if s.line.Patience() != 0 || !s.line.MaySend(s.now) {
		t.Error("a new connection waits for the old one's bytes")
	}
}
