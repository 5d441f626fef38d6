package liveness_test

import (
	"testing"

	"pgregory.net/rapid"

	. "github.com/natsstream/stream/internal/liveness"
)

func TestClock(t *testing.T) {
	const limit = 10
	c := NewClock(limit)
	want := func(now, reads, resumed int64) {
		t.Helper()
		if got := c.Now(now); got != reads {
			t.Errorf("at %d the clock reads %d, want %d", now, got, reads)
		}
		if got := c.Resumed(); got != resumed {
			t.Errorf("at %d it began to run at %d, want %d", now, got, resumed)
		}
		if at := c.Until(c.Now(now)); at > now {
			t.Errorf("at %d the clock reads its time not before %d", now, at)
		}
	}
	want(1, 1, 0)
	c.Tick(5, true, false)
	want(5, 5, 0)
	want(9, 9, 0)
	c.Tick(15, true, false)
	want(15, 15, 0)
	want(100, 25, 0) // the tick is late
	c.Tick(100, true, false)
	want(100, 25, 25)
	c.Tick(110, false, false)
	want(110, 35, 25)
	c.Tick(500, false, false)
	want(505, 35, 25)
	c.Tick(510, true, false)
	want(510, 35, 35)
	want(514, 39, 35)
	c.Tick(515, true, true) // the connection was down between two ticks
	want(515, 40, 40)
	c.Start(1000)
	want(1003, 53, 40)
}

// The clock goes neither back nor faster than time, whatever happens.
func TestClockIsMonotonic(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := NewClock(rapid.Int64Range(1, 50).Draw(t, "limit"))
		now, last := int64(1), c.Now(1)
		for range rapid.IntRange(1, 50).Draw(t, "steps") {
			step := rapid.Int64Range(0, 100).Draw(t, "step")
			now += step
			switch rapid.IntRange(0, 3).Draw(t, "event") {
			case 0:
				c.Start(now)
			case 1, 2:
				c.Tick(now, rapid.Bool().Draw(t, "hears"), rapid.Bool().Draw(t, "broke"))
			}
			reads := c.Now(now)
			if reads < last || reads > last+step {
				t.Fatalf("%d after %d, in a time of %d", reads, last, step)
			}
			if c.Resumed() > reads {
				t.Fatalf("it will begin to run at %d, and reads %d", c.Resumed(), reads)
			}
			last = reads
		}
	})
}
