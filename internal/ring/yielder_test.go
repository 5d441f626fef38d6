package ring_test

import (
	"testing"
	"time"

	"github.com/natsstream/stream/internal/ring"
)

// yields counts the yields of a number of wake-ups, one each microsecond from at on. Each yield takes took.
func yields(y *ring.Yielder, at *time.Duration, wakes int, took time.Duration, pieces int) (n int) {
	for range wakes {
		*at += time.Microsecond
		if y.Due(*at) {
			n++
			began := *at
			*at += took
			y.Yielded(began, *at, pieces)
		}
	}
	return n
}

func TestYielderYieldsAtEachWakeUpWhileThatBringsWork(t *testing.T) {
	var y ring.Yielder
	at := time.Second
	if n := yields(&y, &at, 1000, time.Microsecond, 1); n != 1000 {
		t.Errorf("%d yields in 1000 wake-ups, each brought work", n)
	}
}

func TestYielderYieldsSeldomIfThatBringsNothing(t *testing.T) {
	var y ring.Yielder
	at := time.Second
	yields(&y, &at, 1000, time.Microsecond, 0)
	if n := yields(&y, &at, 6500, time.Microsecond, 0); n < 90 || n > 110 {
		t.Errorf("%d yields in 6500 wake-ups that brought nothing, expected one in 65", n)
	}
	yields(&y, &at, 65, time.Microsecond, 1)
	if n := yields(&y, &at, 100, time.Microsecond, 1); n != 100 {
		t.Errorf("%d yields in 100 wake-ups after one that brought work", n)
	}
}

func TestYielderPausesAfterLongYields(t *testing.T) {
	var y ring.Yielder
	at := time.Second
	const long, hour = 10 * time.Millisecond, time.Hour
	began, n := at, 0
	for at-began < hour {
		if n += yields(&y, &at, 1, long, 10); n > 200 {
			t.Fatalf("%d long yields in %v", n, at-began)
		}
		at += 10 * time.Millisecond
	}
	if n < 100 { // one in 30 seconds
		t.Errorf("%d long yields in an hour: the pauses are too long", n)
	}
	at += hour
	if n := yields(&y, &at, 1000, time.Microsecond, 1); n != 1000 {
		t.Errorf("%d yields in 1000 wake-ups after the pause", n)
	}
	if yields(&y, &at, 1, long, 10); yields(&y, &at, 1000, time.Microsecond, 1) != 0 {
		t.Error("yields during the pause after a long yield")
	}
	if at += long; yields(&y, &at, 10, time.Microsecond, 1) != 10 {
		t.Error("the pause after good yields and a single long one is longer than that one")
	}
}

func TestYielderDoesNotPauseAfterLongYieldsThatBringMuch(t *testing.T) {
	var y ring.Yielder
	at := time.Second
	if n := yields(&y, &at, 100, 20*time.Millisecond, 200); n != 100 {
		t.Errorf("%d yields in 100 wake-ups, each brought 200 pieces of work in 20 ms", n)
	}
	if n := yields(&y, &at, 100, 20*time.Millisecond, 199); n != 1 {
		t.Errorf("%d yields in 100 wake-ups within the pause", n)
	}
}
