package ring

import "sync/atomic"

// Parker puts one goroutine, the sleeper, to sleep until another goroutine wakes it. It takes no lock and loses no
// wake-up. The sleeper announces that it is about to sleep, looks once more for work, and only then waits. A waker
// first makes its work visible and then calls Wake. Go's atomics are sequentially consistent, so at least one side sees
// the other: either the sleeper finds the work, or the waker finds the announcement.
//
// One goroutine at a time may be the sleeper, and call Announce, Retract and Wait. Any number may call Wake and Take at
// the same time. The zero Parker is ready for use. It allocates with the first Announce: many streams have readers that
// never sleep.
type Parker struct {
	asleep atomic.Uint32 // 1 from Announce until the sleeper retracts or a waker takes it back
	signal chan struct{} // capacity 1: the wake-up of the waker that set asleep back to 0. The store to asleep publishes it
}

// Announce announces that the caller is about to sleep. The caller then looks for work a last time, and calls Wait if
// there is none or Retract if there is.
func (p *Parker) Announce() {
	if p.signal == nil {
		p.signal = make(chan struct{}, 1)
	}
	p.asleep.Store(1)
}

// Retract takes an announcement back. If a waker was faster, it has sent its signal or is about to: Retract takes that
// signal, so that no later Wait returns because of it.
func (p *Parker) Retract() {
	if !p.asleep.CompareAndSwap(1, 0) {
		<-p.signal
	}
}

// Wait sleeps until the Wake that answers the announcement.
func (p *Parker) Wait() { <-p.signal }

// Wake wakes the sleeper if one has announced itself. It never blocks, and costs one atomic load if there is none.
func (p *Parker) Wake() {
	if p.Take() {
		p.Signal()
	}
}

// Take takes the announcement of a sleeper, and reports whether there was one. The sleeper then sleeps until the caller
// wakes it with Signal. Instead of that, the caller may do the work of the sleeper, with all that the sleeper owns, and
// then act as a sleeper does: it calls Announce, looks for work a last time, and calls Wake if there is some. Only one
// caller at a time has the announcement, and sees all that the sleeper and earlier callers have done.
func (p *Parker) Take() bool { return p.asleep.Load() == 1 && p.asleep.CompareAndSwap(1, 0) }

// Announced reports whether a sleeper has announced itself.
func (p *Parker) Announced() bool { return p.asleep.Load() == 1 }

// Signal wakes the sleeper after Take. It never blocks.
func (p *Parker) Signal() { p.signal <- struct{}{} }
