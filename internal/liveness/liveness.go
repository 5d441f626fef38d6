// Package liveness decides when a peer is asked for a sign of life, when a peer or a stream is given up, and when to
// look again. [DecidePeer] decides about the other end, which many streams may share. [Decide] decides about one
// stream. Both are pure functions over facts. The outbox of package stream gathers the facts and acts.
//
// All times are in nanoseconds of a [Clock], which never reads 0; 0 means never.
package liveness

// SuspectPings is the number of unanswered questions that make a peer suspect.
const SuspectPings = 3

// graceAcks times Ack is the time after a standstill of the clock in which nothing is given up: a question and its
// answer.
const graceAcks = 2

// maxBackoff is the largest power of two by which a question about an acknowledgement is delayed.
const maxBackoff = 6

// Intervals are the parameters of an endpoint that have the same names, in nanoseconds.
type Intervals struct {
	KeepAlive, Ack, Resume, Disconnect int64

	Patience int64 // how long a peer may take to answer: PeerTimeout without KeepAlive
}

// Facts are all that a decision depends on.
type Facts struct {
	Now   int64
	Times *Intervals
	// Patience is the shortest time for which the peer may be suspect before it is given up.
	Patience int64
	// Repeat is the time after which an unanswered question is repeated, at least Times.Ack.
	Repeat int64
	// Jitter shortens KeepAlive, so that streams that began together are not asked together.
	Jitter int64

	Born    int64 // when the outbox first saw the stream
	Heard   int64 // last sign of life of the peer on this stream
	Others  int64 // when records of the peer last arrived, on any stream
	Sent    int64 // when the last packet was published
	Lost    int64 // since when the request may be lost, with the connection that took it
	Pinged  int64 // when the last PING was published
	Suspect int64 // since when the peer may be gone
	Closed  int64 // since when CLOSE waits to be acknowledged
	Resumed int64 // when the clock began to run again, at a reconnect or after a standstill of this end
	Down    int64 // when the connection was seen to be down, if it is
	Queued  int64 // how long the data before a question or CLOSE may take on its way to the peer

	Pings int32 // unanswered since the last sign of life
	Asks  int32 // questions since the last packet or acknowledgement, without repetitions

	Ending       bool // the stream has ended, and its end waits for the outbox
	Disconnected bool // this end's connection is down
	Consumer     bool // this end sent the request
	Registered   bool // the mux knows this end's subject
	Received     bool // a packet of the peer arrived
	NoPeer       bool // no peer can be asked: its address is not known, or it knows no PING
	Scarce       bool // much memory is in use for packets that are not acknowledged
	Unacked      bool // packets of this end are not acknowledged
	Stalled      bool // a writer waits for credit
	Failed       bool // a publish failed, and no writer will repeat it
	Silent       bool // this end is a handler's, and its consumer may not know its address, or the name of the stream
	Unpaid       bool // no question may be repeated now, nor one about an acknowledgement or credit be sent: enough are unanswered
}

// Reason is the reason for which a stream is given up.
type Reason uint8

const (
	Alive          Reason = iota // the stream goes on
	Disconnected                 // this end's connection was down for Disconnect
	EndUnconfirmed               // CLOSE was not acknowledged for Resume
	RequestLost                  // nothing was heard for Resume after the connection that took the request came back
	NobodyToAsk                  // packets are missing, and the address of their sender was not known for Resume
	PeerGone                     // the peer was suspect for Resume
)

// Decision is the decision about a stream.
type Decision struct {
	GiveUp    Reason // if not Alive, the other fields do not matter
	Next      int64  // when to look again, at the latest
	Republish bool   // publish the packet that failed
	Ping      bool   // ask the peer
	Repeated  bool   // the PING repeats one that was not answered
	Paid      bool   // the PING is one of those that Unpaid delays
	Wait      bool   // ask when answers have paid for the question
	Lost      bool   // more than one PING was not answered, so packets before it may be lost too
}

// until makes the next look no later than at.
func (d *Decision) until(at int64) { d.Next = min(d.Next, at) }

// Decide looks at a stream.
func Decide(f *Facts) Decision {
	d := Decision{Next: f.Now + f.Times.KeepAlive}
	switch {
	case f.Ending:
		return d
	case f.Disconnected:
		return f.waitForConnection(d)
	}
	if f.Failed {
		d.Republish, d.Next = true, f.Now+f.Times.Ack
	}
	switch {
	case f.Closed != 0 && f.Now >= f.unconfirmed():
		return giveUp(EndUnconfirmed)
	case f.NoPeer:
		return f.waitForPeer(d)
	case f.Suspect != 0 && f.Now >= f.gone(f.Suspect):
		return giveUp(PeerGone)
	}
	return f.ask(d)
}

func giveUp(r Reason) Decision { return Decision{GiveUp: r} }

// since returns t, or the time when the clock began to run again if that is later.
func (f *Facts) since(t int64) int64 { return max(t, f.Resumed) }

// overdue returns the end of Resume if it began at t.
func (f *Facts) overdue(t int64) int64 { return grace(t+f.Times.Resume, f.Resumed, f.Times) }

// waitForConnection is Decide while the connection is down. It uses Now, Born, Down and the next look, which are times
// of a clock that does not stop, and no other times.
func (f *Facts) waitForConnection(d Decision) Decision {
	down := f.Down
	if down == 0 { // the outbox has not seen it yet
		down = f.Now
	}
	end := max(down, f.Born) + f.Times.Disconnect
	if f.Now >= end {
		return giveUp(Disconnected)
	}
	if !f.Consumer && !f.Registered {
		// After the reconnect nobody marks this session, because it has no token yet. Its consumer waits for a hello.
		d.Next = f.Now + f.Times.Ack
	}
	d.until(end)
	return d
}

// waitForPeer is Decide if no peer can be asked.
func (f *Facts) waitForPeer(d Decision) Decision {
	if f.Lost != 0 && !f.Received {
		if end := f.overdue(f.Lost); f.Now >= end {
			return giveUp(RequestLost)
		} else {
			d.until(end)
		}
	}
	if f.Suspect != 0 {
		if end := f.overdue(f.Suspect); f.Now >= end {
			return giveUp(NobodyToAsk)
		} else {
			d.until(end)
		}
	}
	return d
}

// ask decides whether to ask the peer now.
func (f *Facts) ask(d Decision) Decision {
	if f.Pings > 0 || f.Suspect != 0 {
		repeat := f.Pinged + f.Repeat
		if f.Unpaid {
			repeat = max(repeat, f.Now+f.Times.Ack/4)
		}
		d.Ping = f.Now >= repeat
		d.until(repeat)
	} else {
		silent := max(f.Heard, f.since(f.Born)) + f.Times.KeepAlive - f.Jitter
		d.Ping = f.Now >= silent || f.Silent
		d.until(silent)
		if f.Unacked || f.Stalled {
			// A lost credit looks like a slow reader, so the questions become rarer.
			overdue := f.since(max(f.Sent, f.Pinged)) + f.Times.Ack<<min(f.Asks, maxBackoff)
			switch {
			case f.Now < overdue:
				d.until(overdue)
			case d.Ping:
			case f.Unpaid && f.Closed == 0: // the end of a stream has a time limit, so it does not wait
				d.Wait = true
			default:
				d.Ping, d.Paid = true, true
			}
		}
	}
	suspect := f.Suspect
	if d.Ping {
		d.Repeated, d.Lost = f.Pings > 0, f.Pings > 1 // the first answer may only be slower than Ack
		d.Paid = d.Paid || d.Repeated
		if suspect == 0 && f.Pings >= SuspectPings {
			suspect = f.Now
		}
		d.Next = f.Now + min(f.Times.KeepAlive, f.Repeat)
	}
	if f.Closed != 0 {
		d.until(f.unconfirmed())
	}
	if suspect != 0 {
		d.until(f.gone(suspect))
	}
	return d
}

// gone returns the time when a peer that is suspect since t is given up.
func (f *Facts) gone(t int64) int64 { return max(f.overdue(t), t+f.Patience) + f.queued(t) }

// unconfirmed returns the time when the acknowledgement of CLOSE is given up. Signs of life on this stream do not count
// here: they may be answers to earlier packets.
func (f *Facts) unconfirmed() int64 {
	if f.Others > f.Closed && !f.Scarce {
		return f.overdue(f.Closed) + behindOthers*f.Times.Resume
	}
	return f.overdue(f.Closed) + f.queued(f.Closed)
}

// behindOthers is how many times Resume more a stream may wait for an answer, or for the acknowledgement of CLOSE, if
// records of the peer arrive on others: it may be behind them on a slow line.
const behindOthers = 6

// queued returns by how much queued data on the line prolongs the wait for the answer to a packet sent at t.
func (f *Facts) queued(t int64) int64 {
	if f.Others > t && f.Heard <= t {
		return behindOthers * f.Times.Resume
	}
	return min(f.Queued, f.Times.Resume)
}
