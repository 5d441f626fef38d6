package flow

import (
	"testing"

	"pgregory.net/rapid"
)

const window = 256 // the most packets of a window, as in the root package

// TestLossHalvesAndGrowsAgain: after a loss half as much may be on its way, less if that is lost too, and more again as
// packets arrive.
func TestLossHalvesAndGrowsAgain(t *testing.T) {
	var l Loss
	lose := func(n, want uint32) {
		t.Helper()
		if l.Lost(n); l.Limit() != want {
			t.Errorf("limit %d after a loss of %d, want %d", l.Limit(), n, want)
		}
	}
	if l.Limit() != 0 || l.Full(1<<31) || l.Arrived(1, window) {
		t.Error("the zero Loss is a limit")
	}
	lose(100, 50)
	lose(50, 25)
	lose(1, 1)
	total := uint32(0)
	for l.Limit() != 0 && total < 1<<19 {
		before := l.Limit()
		if !l.Arrived(before, window) {
			t.Fatalf("no limit was reported, and it was %d", before)
		}
		total += before
		if l.Limit() != 0 && l.Limit() < before {
			t.Fatalf("limit went from %d to %d", before, l.Limit())
		}
	}
	if l.Limit() != 0 {
		t.Errorf("limit is still %d after %d packets", l.Limit(), total)
	}
}

// TestLossLimitGoesInTime: it grows slowly at the loss and nowhere else.
func TestLossLimitGoesInTime(t *testing.T) {
	for lost := uint32(1); lost <= window; lost *= 2 {
		var l Loss
		l.Lost(lost)
		rounds := 0
		for ; l.Limit() != 0; rounds++ {
			l.Arrived(l.Limit(), window)
		}
		if rounds > 200 {
			t.Errorf("after a loss of %d packets it takes %d round trips until there is no limit", lost, rounds)
		}
	}
}

func TestLossArrived(t *testing.T) {
	for _, tt := range []struct {
		name       string
		before     Loss
		n          uint32
		limit      uint32
		lostAt     uint32
		grown      uint32
		nowLimited bool
	}{
		{"not enough", Loss{limit: 10, lostAt: 100}, 9, 10, 100, 9, true},
		{"an eighth more", Loss{limit: 16, lostAt: 100}, 16, 19, 100, 0, true},
		{"at least one", Loss{limit: 1, lostAt: 100}, 1, 2, 100, 0, true},
		{"together with what came before", Loss{limit: 10, lostAt: 100, grown: 9}, 1, 12, 100, 0, true},
		{"slow at the loss", Loss{limit: 48, lostAt: 50}, 48, 48, 50, 48, true},
		{"slow up to twice the loss", Loss{limit: 100, lostAt: 50}, 100, 100, 50, 100, true},
		{"sixteen rounds at the loss", Loss{limit: 48, lostAt: 50, grown: 15 * 48}, 48, 55, 50, 0, true},
		{"fast beyond", Loss{limit: 101, lostAt: 50}, 101, 114, 50, 0, true},
		{"no limit from a window on", Loss{limit: 240, lostAt: 50}, 240, 0, 50, 0, true},
	} {
		l := tt.before
		l.asked = true
		if was := l.Arrived(tt.n, window); was != tt.nowLimited {
			t.Errorf("%s: a limit was reported: %v", tt.name, was)
		}
		if want := (Loss{limit: tt.limit, lostAt: tt.lostAt, grown: tt.grown}); l != want {
			t.Errorf("%s: %+v, want %+v", tt.name, l, want)
		}
	}
}

// TestLossUnanswered: a question behind the packets that was lost means a little less, down to one packet. A question
// of another kind says nothing.
func TestLossUnanswered(t *testing.T) {
	l := Loss{limit: 2, lostAt: 50, grown: 1}
	if l.Unanswered(); l.Limit() != 2 {
		t.Errorf("limit %d, and nobody was asked because of it", l.Limit())
	}
	if !l.Ask() || l.Ask() {
		t.Error("it asks once until packets arrive")
	}
	l.Unanswered()
	if want := (Loss{limit: 1, lostAt: 2, asked: true}); l != want {
		t.Errorf("%+v, want %+v", l, want)
	}
	if l.Unanswered(); l.Limit() != 1 {
		t.Errorf("limit %d after two questions without answer, want 1", l.Limit())
	}
	if l.Arrived(1, window); !l.Ask() {
		t.Error("it does not ask again after packets arrived")
	}
}

// TestLossAlwaysLetsOneGo: no sequence of events stops a stream, and without a loss there is no limit.
func TestLossAlwaysLetsOneGo(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var l Loss
		lost := false
		for range rapid.IntRange(1, 100).Draw(t, "steps") {
			n := rapid.Uint32Range(1, window).Draw(t, "n")
			step := rapid.IntRange(0, 3).Draw(t, "step")
			switch step {
			case 0:
				l.Lost(n)
				lost = true
			case 1:
				l.Arrived(n, window)
			case 2:
				l.Ask()
			default:
				l.Unanswered()
			}
			switch {
			case l.Full(0):
				t.Fatal("nothing may be on its way")
			case l.Limit() >= window:
				t.Fatalf("limit %d, and a window is %d", l.Limit(), window)
			case !lost && l.Limit() != 0:
				t.Fatalf("limit %d without a loss", l.Limit())
			case l.Limit() != 0 && (!l.Full(l.Limit()) || l.Full(l.Limit()-1)):
				t.Fatal("Full and Limit differ")
			}
		}
	})
}
