package ring

import "time"

// Yielder decides whether a goroutine that was woken yields the processor before it works. Other goroutines that can
// run then do so first, and more work may come from them: it is done together. If no more work comes, the goroutine
// yields less often. If a yield takes long, goroutines that compute keep the processors, and the goroutine does not
// yield for a time. The zero Yielder is ready for use, by one goroutine.
type Yielder struct {
	skip, skipped uint32        // wake-ups without a yield: after each that brought nothing, and since then
	rest          time.Duration // the pause after the last yield that took long
	until         time.Duration // of that pause
}

const (
	// maxSkip bounds the wake-ups between two yields. If yields bring no work, the goroutine yields once in 65
	// wake-ups.
	maxSkip = 64
	// longYield is the time of a yield after which the goroutine pauses, unless a piece of work came for each
	// perPiece. It is the time for which Go lets a goroutine run that computes.
	longYield = 10 * time.Millisecond
	perPiece  = 100 * time.Microsecond
	// minRest is the first pause, and maxRest the longest. Each pause is twice as long as the one before.
	minRest, maxRest = longYield, 30 * time.Second
)

// Due reports whether to yield now, after a wake-up. now is a time that does not go back.
func (y *Yielder) Due(now time.Duration) bool {
	if y.skipped < y.skip {
		y.skipped++
		return false
	}
	return now >= y.until
}

// Yielded records a yield from began until now, and how many pieces of work it brought.
func (y *Yielder) Yielded(began, now time.Duration, pieces int) {
	y.skipped = 0
	if pieces > 0 {
		y.skip = 0
	} else {
		y.skip = min(2*y.skip+1, maxSkip)
	}
	if took := now - began; took >= longYield && took > time.Duration(pieces)*perPiece {
		y.rest = min(max(2*y.rest, minRest), maxRest)
		y.until = now + y.rest
	} else {
		y.rest /= 2
	}
}
