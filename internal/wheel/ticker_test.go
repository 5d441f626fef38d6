package wheel_test

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/natsstream/stream/internal/wheel"
)

const (
	tick     = 10 * time.Millisecond
	patience = 100 * time.Millisecond
)

// started is a Ticker in a bubble, and what it called.
type started struct {
	wheel.Ticker
	wakes, stuck atomic.Int64
}

func start(t *testing.T) *started {
	s := new(started)
	s.Init(tick, patience)
	go s.Run(wheel.Hooks{
		Wake:  func() { s.wakes.Add(1) },
		Stuck: func() { s.stuck.Add(1) },
	})
	t.Cleanup(s.Stop)
	return s
}

// after lets time pass, and everything that is due in it happen.
func after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func TestTickerSleepsUntilItIsArmed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t)
		after(time.Hour)
		if s.wakes.Load() != 0 || s.Due() || s.TakeDue() {
			t.Fatalf("%d wake-ups of a ticker that was not armed", s.wakes.Load())
		}
		s.Arm()
		s.Arm() // does not block while the first is not seen
		after(tick + tick/2)
		if s.wakes.Load() != 1 || !s.Armed() || !s.Due() {
			t.Fatalf("%d wake-ups a tick after it was armed", s.wakes.Load())
		}
	})
}

func TestTickerWakesAtEveryTick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t)
		s.Arm()
		synctest.Wait()
		after(tick / 2)
		for n := range 100 {
			after(tick)
			if s.wakes.Load() != int64(n)+1 || !s.TakeDue() || s.TakeDue() || s.Due() {
				t.Fatalf("tick %d: %d wake-ups", n+1, s.wakes.Load())
			}
		}
		if s.stuck.Load() != 0 {
			t.Error("an owner that took every tick was called stuck")
		}
		s.Disarm()
		after(time.Hour)
		if n := s.wakes.Load(); n != 100 {
			t.Errorf("%d wake-ups of a ticker that was disarmed after 100", n)
		}
	})
}

// TestTickerArmedAgainBeforeItSleeps: an owner that disarms the ticker and arms it again at once loses no tick.
func TestTickerArmedAgainBeforeItSleeps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t)
		s.Arm()
		synctest.Wait()
		after(tick / 2)
		for n := range 10 {
			s.Disarm()
			s.Arm()
			after(tick)
			if s.wakes.Load() != int64(n)+1 {
				t.Fatalf("%d wake-ups after %d ticks", s.wakes.Load(), n+1)
			}
		}
	})
}

func TestTickerReportsAnOwnerThatTakesNoTick(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := start(t)
		s.Arm()
		synctest.Wait()
		after(patience + tick/2) // the first tick is due, nine were missed
		if s.stuck.Load() != 0 {
			t.Fatal("the owner was called stuck before its patience was over")
		}
		after(tick)
		if s.stuck.Load() != 1 {
			t.Fatalf("called stuck %d times after its patience", s.stuck.Load())
		}
		after(tick)
		if s.stuck.Load() != 2 {
			t.Fatal("an owner that stays away was called stuck once only")
		}
		if !s.TakeDue() {
			t.Fatal("no tick is due")
		}
		after(tick)
		if s.stuck.Load() != 2 {
			t.Error("the owner was called stuck and had just taken a tick")
		}
	})
}

func TestTickerStopsWhetherItTicksOrSleeps(t *testing.T) {
	for _, armed := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s := start(t)
			if armed {
				s.Arm()
			}
			after(time.Second)
		}) // Stop runs in the cleanup; a goroutine that is left fails the bubble
	}
}
