package wheel

import (
	"sync/atomic"
	"time"
)

// Ticker is the goroutine that wakes the owner of a [Wheel] at every tick, while the wheel has entries. It also detects
// an owner that takes no ticks.
//
// [Ticker.Run] belongs to the ticker's goroutine, and [Ticker.Disarm] and [Ticker.TakeDue] to the owner. Any goroutine
// may call the other methods. Init must come first.
type Ticker struct {
	tick     time.Duration
	patience time.Duration

	armed atomic.Bool // the ticker ticks
	due   atomic.Bool // it ticked, and the owner has not taken the tick: stored by the ticker, cleared by the owner

	wake  chan struct{} // capacity 1: ends the sleep of a ticker that was not armed
	quit  chan struct{}
	ended chan struct{}
}

// Hooks are the functions that a [Ticker] calls, one after the other, on its goroutine. None of them may block.
type Hooks struct {
	Wake  func() // wakes the owner, which then takes the tick
	Stuck func() // called at each tick while the owner has taken no tick for patience or longer
}

// Init prepares t for ticks of the given length. An owner is stuck if it has taken no tick for patience.
func (t *Ticker) Init(tick, patience time.Duration) {
	t.tick, t.patience = tick, patience
	t.wake = make(chan struct{}, 1)
	t.quit = make(chan struct{})
	t.ended = make(chan struct{})
}

// Run ticks until Stop is called. It sleeps while the ticker is not armed.
func (t *Ticker) Run(h Hooks) {
	defer close(t.ended)
	clock := time.NewTicker(t.tick)
	defer clock.Stop()
	missed := time.Duration(0) // ticks in a row that the owner did not take. They stand still with the process, as clocks do not
	for {
		select {
		case <-clock.C:
		case <-t.quit:
			return
		}
		if t.armed.Load() {
			if !t.due.Swap(true) {
				missed = 0
			} else if missed++; missed*t.tick >= t.patience {
				h.Stuck()
			}
			h.Wake()
			continue
		}
		clock.Stop()
		select {
		case <-t.wake:
		case <-t.quit:
			return
		}
		clock.Reset(t.tick)
	}
}

// Arm makes the ticker tick, within a tick if it sleeps. It never blocks.
func (t *Ticker) Arm() {
	t.armed.Store(true)
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// Disarm lets the ticker sleep from its next tick on. Owner only.
func (t *Ticker) Disarm() { t.armed.Store(false) }

// Armed reports whether the ticker ticks.
func (t *Ticker) Armed() bool { return t.armed.Load() }

// Due reports whether there was a tick that the owner has not taken.
func (t *Ticker) Due() bool { return t.due.Load() }

// TakeDue reports whether there was a tick since the last call. Owner only.
func (t *Ticker) TakeDue() bool {
	if !t.due.Load() { // a load costs other cores nothing, and most calls end here
		return false
	}
	t.due.Store(false)
	return true
}

// Stop ends Run, and returns when it has. Call it once, and only if Run was started.
func (t *Ticker) Stop() {
	close(t.quit)
	<-t.ended
}
