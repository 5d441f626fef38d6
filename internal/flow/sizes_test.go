package flow

import "testing"

// What passed is published as a whole, and what is larger is not for a while after a loss. Then it is tried again, ever
// more seldom.
func TestSizesLimitWhatDoesNotPass(t *testing.T) {
	var s Sizes
	want := func(when string, now int64, most int, doubts bool) {
		t.Helper()
		if got := s.Most(MaxPacket, now); got != most || s.Fails(MaxPacket, now) != (most < MaxPacket) || s.Doubts(MaxPacket) != doubts {
			t.Errorf("%s: packets of %d at most, want %d; large ones fail: %v, are doubted: %v", when, got, most, s.Fails(MaxPacket, now), s.Doubts(MaxPacket))
		}
	}
	now := 5 * second
	want("nothing known", now, MaxPacket, true)
	s.Passed(16_000)
	want("smaller ones passed", now, MaxPacket, true)
	s.Failed(60_000, now)
	want("after a failure", now, 16_000, true)
	s.Failed(40_000, now+second)
	want("after another one", now+second, 16_000, true)
	s.Passed(20_000)
	want("somewhat larger ones passed", now+second, 20_000, true)
	for _, wait := range []int64{firstWait, secondWait, 2 * secondWait, 4 * secondWait} {
		want("before the end of the wait", now+wait-1, 20_000, true)
		now += wait
		want("after the wait", now, MaxPacket, true)
		if s.Memory() < wait {
			t.Errorf("the sizes are forgotten before the end of the wait of %d s", wait/second)
		}
		s.Failed(50_000, now)
	}
	for range 30 {
		now = s.until
		s.Failed(50_000, now)
	}
	if s.wait != longestWait {
		t.Errorf("the wait grows to %d s", s.wait/second)
	}
	s.Passed(60_000)
	want("they pass", now, MaxPacket, true)
	s.Passed(MaxPacket)
	want("the largest pass", now, MaxPacket, false)
	if s.Memory() != 0 {
		t.Error("a limit that is gone is remembered")
	}
	s.Failed(30_000, now)
	want("the way has changed", now, LargeFragment, true)
	s.Failed(LargeFragment, now)
	want("not even large fragments pass", now, SmallFragment, true)
	if s.Doubts(SmallFragment) {
		t.Error("the smallest size is doubted")
	}
}

// Each row is the life of one packet: how it is published each time that the peer misses it, and answers that nothing
// arrived.
func TestPassingFormsOfAMissedPacket(t *testing.T) {
	const whole, large, small = 0, LargeFragment, SmallFragment
	for _, tt := range []struct {
		name   string
		size   int
		most   int
		known  Sizes
		fresh  int // how often the packet is new to this end's connection
		forms  []int
		stuck  bool
		failed int // what is known not to pass, after the last form passed
	}{
		{"larger than all that passed", 16_000, MaxPacket, Sizes{}, 0, []int{large}, false, 16_000},
		{"nor in large fragments", 16_000, MaxPacket, Sizes{}, 0, []int{large, large, small}, false, LargeFragment},
		{"not much larger than a fragment", 3000, MaxPacket, Sizes{}, 0, []int{small}, false, 3000},
		{"proven", 16_000, MaxPacket, Sizes{proven: 20_000}, 0, []int{whole, whole, whole, large}, false, 16_000},
		{"the own connection was away", 16_000, MaxPacket, Sizes{}, 1, []int{whole, large}, false, 16_000},
		{"known to fail", 16_000, MaxPacket, Sizes{limit: 10_000, until: minute}, 0, []int{large}, false, 10_000},
		{"known to fail in large fragments", 16_000, MaxPacket, Sizes{limit: 4000, until: minute}, 0, []int{small}, false, 4000},
		{"the own server takes less", 16_000, 5000, Sizes{proven: 20_000}, 1, []int{large}, false, 0},
		{"the own server takes little", 16_000, 2000, Sizes{proven: 20_000}, 1, []int{small}, false, 0},
		{"the smallest", 1000, MaxPacket, Sizes{}, 0, []int{whole, whole, whole, whole, whole, whole, whole, whole, whole, whole}, true, 0},
		{"no form passes", 2000, MaxPacket, Sizes{}, 0, []int{small, small, small, small, small, small, small, small, small}, true, 0},
	} {
		var p Passing
		for i, want := range tt.forms {
			if got := p.Again(7, tt.size, tt.most, i < tt.fresh, &tt.known, 0); got != want {
				t.Errorf("%s: try %d in %d, want %d", tt.name, i, got, want)
			}
			if p.Asks() && i < len(tt.forms)-1 && p.Answer(7, 0, p.Ask(), second) {
				t.Errorf("%s: there was progress", tt.name)
			}
		}
		if size, stuck := p.Stuck(); stuck != tt.stuck || size != tt.size {
			t.Errorf("%s: stuck with %d bytes: %v", tt.name, size, stuck)
		}
		if _, hopeless := p.Hopeless(second, 2*second); hopeless {
			t.Errorf("%s: given up too early", tt.name)
		}
		if _, hopeless := p.Hopeless(2*second, 2*second); hopeless != tt.stuck {
			t.Errorf("%s: given up in time: %v", tt.name, hopeless)
		}
		if !p.Acked(8, &tt.known, 0) || tt.known.limit != tt.failed {
			t.Errorf("%s: packets of %d fail, want %d", tt.name, tt.known.limit, tt.failed)
		}
	}
}

// If large fragments close the link on their way, the questions behind them are not answered either. Small ones follow
// soon.
func TestPassingTakesSmallFragmentsWithoutAnswers(t *testing.T) {
	for name, tt := range map[string]struct {
		known    Sizes
		progress int // bytes that arrived of the first fragments
		want     int
	}{
		"nothing is heard":          {Sizes{}, 0, SmallFragment},
		"something arrived":         {Sizes{}, 4000, LargeFragment},
		"fragments of a size known": {Sizes{proven: LargeFragment}, 0, LargeFragment},
	} {
		var p Passing
		for range largeTries {
			if got := p.Again(7, 16_000, MaxPacket, false, &tt.known, 0); got != LargeFragment {
				t.Errorf("%s: in %d at first", name, got)
			}
			p.Ask()
			if tt.progress != 0 {
				p.Answer(7, tt.progress, p.Ask(), 0)
			}
		}
		if got := p.Again(7, 16_000, MaxPacket, false, &tt.known, 0); got != tt.want {
			t.Errorf("%s: in %d, want %d", name, got, tt.want)
		}
	}
}

// If fragments are lost as well, then the size is not the reason.
func TestPassingLearnsNothingFromRandomLoss(t *testing.T) {
	var p Passing
	var known Sizes
	p.Again(7, 16_000, MaxPacket, false, &known, 0)
	if !p.Answer(7, 8000, p.Ask(), 0) || p.Arrived(7) != 8000 || p.Arrived(8) != 0 {
		t.Error("no progress")
	}
	if p.Again(7, 16_000, MaxPacket, false, &known, 0) != LargeFragment || !p.Acked(8, &known, 0) || known.limit != 0 {
		t.Errorf("packets of %d fail", known.limit)
	}
}

// Answers to questions of before, about other packets, and to packets that arrived meanwhile count nothing.
func TestPassingTakesTheRightAnswers(t *testing.T) {
	var p Passing
	var known Sizes
	early := p.Ask()
	p.Again(7, 16_000, MaxPacket, false, &known, 0)
	p.Answer(7, 0, early, 0)
	p.Answer(8, 0, p.Ask(), 0)
	p.Answer(7, 16_000, p.Ask(), 0)
	if p.failures != 0 || p.arrived != 0 {
		t.Errorf("%d failures, %d bytes arrived", p.failures, p.arrived)
	}
	p.Answer(7, 9000, p.Ask(), 0)
	p.Answer(7, 0, p.Ask(), 0) // the receiver had no room to keep it
	if p.failures != 1 || p.arrived != 0 {
		t.Errorf("%d failures, %d bytes arrived", p.failures, p.arrived)
	}
}

// A peer that has no room for a packet says nothing about its size.
func TestPassingForgivesWhatWasRefused(t *testing.T) {
	var none *Passing
	none.Refused()
	var p Passing
	var known Sizes
	fail := func() {
		for range smallTries {
			p.Again(7, 900, MaxPacket, false, &known, 0)
			p.Answer(7, 0, p.Ask(), 0)
		}
	}
	fail()
	if _, stuck := p.Stuck(); !stuck {
		t.Fatal("the packet is not stuck")
	}
	late := p.Ask()
	p.Refused()
	p.Answer(7, 0, late, 0)
	if _, stuck := p.Stuck(); stuck || p.failures != 0 {
		t.Errorf("%d answers count that came with a refusal or before", p.failures)
	}
	if p.Again(7, 900, MaxPacket, false, &known, 0); p.Asks() {
		t.Error("the packet needs a question, as if it had been missed twice")
	}
	fail()
	if _, stuck := p.Stuck(); !stuck {
		t.Error("the packet is not found stuck after a refusal")
	}
}

// Packets of a size that is doubted wait for the first of them, if its acknowledgement is late, and for one in
// fragments.
func TestPassingHoldsWhatMayNotPass(t *testing.T) {
	var none *Passing
	if none.Holds(0, 0) || none.InFragments() || none.Arrived(0) != 0 {
		t.Error("no Passing holds packets back")
	}
	var p Passing
	var known Sizes
	first := uint32(1<<32 - 1) // numbers wrap
	if !p.Try(first, second) || p.Try(first+1, second) {
		t.Error("the first is not told from the second")
	}
	if p.Holds(second+10, 10) || !p.Holds(second+11, 10) {
		t.Error("packets wait too early or too late")
	}
	if p.Acked(first, &known, 0) || !p.Holds(2*second, 10) {
		t.Error("the packets before it were acknowledged, and the wait is over")
	}
	if !p.Acked(first+1, &known, 0) || p.Holds(2*second, 10) {
		t.Error("the packet was acknowledged, and the others wait")
	}
	p.Again(3, 16_000, MaxPacket, false, &known, 0)
	if !p.Holds(0, 10) || !p.InFragments() {
		t.Error("nothing waits for the packet in fragments")
	}
}
