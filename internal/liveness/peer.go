package liveness

// PeerFacts are all facts that a decision about a peer depends on. The outbox gathers them. A peer is the other end of
// one or many streams.
type PeerFacts struct {
	Now   int64
	Times *Intervals
	// KeepAlive is Times.KeepAlive. It is shorter if a stream asks for that, and longer if there are many peers. Jitter
	// shortens it.
	KeepAlive, Jitter int64

	Heard   int64 // last sign of life, on any stream
	Asked   int64 // last question
	Suspect int64 // when the first unanswered question was sent, or NATS reported that nobody received one
	Resumed int64 // when the clock began to run again, at a reconnect or after a standstill of this end

	Questions int32 // unanswered since the last sign of life
	Absent    bool  // NATS reported that nobody received a question

	// Queued is how long data that was sent before the question may take on its way.
	Queued int64
}

// PeerDecision is the decision about a peer.
type PeerDecision struct {
	GiveUp bool  // end its streams
	Ask    bool  // ask it on one of its streams
	Next   int64 // when to look again, at the latest
}

// DecidePeer decides about a peer. A peer that is silent for KeepAlive is asked every Ack. It is given up Patience
// after the first question.
func DecidePeer(f *PeerFacts) PeerDecision {
	d := PeerDecision{Next: f.Now + f.KeepAlive}
	if f.Questions == 0 && !f.Absent {
		silent := max(f.Heard, f.Resumed) + f.KeepAlive - f.Jitter
		d.Ask = f.Now >= silent
		if !d.Ask {
			d.Next = silent
			return d
		}
	} else {
		repeat := f.Asked + f.Times.Ack
		d.Ask = f.Now >= repeat
		d.Next = repeat
	}
	if d.Ask {
		d.Next = f.Now + f.Times.Ack
	}
	if f.Suspect != 0 && (f.Absent || f.Questions >= SuspectPings) {
		end := f.end()
		d.GiveUp = f.Now >= end
		if !d.GiveUp {
			d.Next = min(d.Next, end)
		}
	}
	return d
}

// end returns the time when the peer is given up if it stays silent.
func (f *PeerFacts) end() int64 {
	end := grace(f.Suspect+f.Times.Patience, f.Resumed, f.Times)
	if !f.Absent { // an absent peer cannot receive the question
		end += min(f.Queued, f.Times.Resume)
	}
	return end
}

// grace delays end if the clock has just begun to run again at resumed: after a reconnect or a pause of the process,
// messages that have arrived are handled first. The delay has a limit, because a connection may never last long enough.
func grace(end, resumed int64, t *Intervals) int64 {
	return max(end, min(resumed+graceAcks*t.Ack, end+t.Resume))
}
