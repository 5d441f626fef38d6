package flow

// Envelopes holds the sizes of envelopes that pass to one peer. A leaf node may take smaller messages than this end's
// server, and closes its link over a larger one. So envelopes begin small, and grow as they are acknowledged. The zero
// Envelopes knows nothing. One goroutine, the outbox, owns it. Times are nanoseconds of one clock.
type Envelopes struct {
	proven int   // the largest size that the peer acknowledged
	passed int64 // when it last acknowledged a packet that came in an envelope
	until  int64 // envelopes are no larger than proven before that
	wait   int64 // how long that was after the last loss
}

const (
	// FirstEnvelope is the size of envelopes before anything is known: that of control packets, which almost every
	// server and device passes.
	FirstEnvelope = LargeFragment
	// MaxEnvelope bounds envelopes. Larger messages gain nothing.
	MaxEnvelope = 32 << 10

	envelopeSilence   = 4 * second // without an acknowledgement, after which a loss shows that none arrive any more
	firstEnvelopeWait = second
	envelopeWaitParts = 8 // factor of each further wait
	maxEnvelopeWait   = 60 * minute
)

// Most returns how large an envelope may be, 0 if packets have to go alone.
func (e *Envelopes) Most(now int64) int {
	if now < e.until {
		return e.proven
	}
	return min(max(2*e.proven, FirstEnvelope), MaxEnvelope)
}

// Passed records that the peer acknowledged a packet which ended at size in its envelope.
func (e *Envelopes) Passed(size int, now int64) {
	e.passed = now
	if size > e.proven {
		e.proven, e.wait = size, 0
	}
}

// Lost records that the peer misses a packet which ended at size in its envelope. Messages of any size may be lost, so
// the loss shows something only if no envelope of that size arrived lately.
func (e *Envelopes) Lost(size int, now int64) {
	if size <= e.proven {
		if now-e.passed < envelopeSilence {
			return
		}
		e.proven = 0
	}
	if now < e.until {
		return
	}
	e.wait = min(max(envelopeWaitParts*e.wait, firstEnvelopeWait), maxEnvelopeWait)
	e.until = now + e.wait
}
