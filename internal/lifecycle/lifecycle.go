// Package lifecycle holds the life of a stream at one end as a table: the states of its two halves and of the stream,
// the events that change them, and the actions of each transition.
//
// The table is data. The outbox calls [State.On] and carries out the actions. Tests walk the whole table. The tables of
// docs/PROTOCOL.md section 12 and the drawings of docs/DESIGN.md are generated from it. The package knows no packets,
// no goroutines and no time.
package lifecycle

import (
	"fmt"
)

// Role is the end of a stream that a state belongs to. Roles are bits, so that a rule can name several.
type Role uint8

const (
	Consumer Role = 1 << iota // opened the stream
	Handler                   // a Server's handler produces the stream, and may read records from the consumer
	Writer                    // produces the stream and takes no records: NewWriter
)

// Send is the state of the half that sends.
type Send uint8

const (
	NoSender Send = iota // a consumer that has not written yet
	Waiting              // records were written, and the peer's subject is not known yet
	Open                 // records can be published
	Closing              // CLOSE was published and is not acknowledged yet
	Settled              // CLOSE was acknowledged, or the peer takes no records
)

// Recv is the state of the half that receives.
type Recv uint8

const (
	Reading Recv = iota // records may come
	Done                // the peer's CLOSE was read, or none is expected
	Unread              // the handler returned, or the consumer left: records that still arrive are not read
)

// Phase is the state of the stream as a whole.
type Phase uint8

const (
	Live   Phase = iota
	Ending       // this end ended the stream, and its RESET was not published yet
	Gone         // over: the token is out of use
)

// State is the state of a stream at one end. The zero State is that of a consumer that has just opened its stream.
type State struct {
	Send  Send
	Recv  Recv
	Phase Phase
}

// Start returns the first state of a stream. A producer that does not take records expects no CLOSE of its consumer.
func Start(r Role, takesRecords bool) State {
	switch {
	case r == Consumer:
		return State{NoSender, Reading, Live}
	case takesRecords:
		return State{Open, Reading, Live}
	}
	return State{Open, Done, Live}
}

// Event is an event in the life of a stream.
type Event uint8

const (
	Written         Event = iota // the consumer's user wrote or closed its direction for the first time
	PeerKnown                    // a first message of the peer carried a reply subject, or the peer proved another one
	PeerIsJSON                   // the first message is of the JSON fallback
	ClosePublished               // this end's CLOSE was published
	CloseAcked                   // the peer acknowledged this end's CLOSE
	CloseRead                    // CLOSE 1000 was read, and the stream goes on: this end has a sender, or CLOSE has HALF
	HandlerReturned              // the handler returned, and its CLOSE was written
	ConsumerLeft                 // the consumer left with code 1000, and its CLOSE was written
	Completed                    // nothing remains to be done in either direction
	PeerFailed                   // CLOSE with another code was read
	ResetRead                    // the peer's RESET arrived
	Ended                        // this end ends the stream before it is complete
	Told                         // RESET was published, or cannot be
	events
)

// Action is a set of things for the outbox to do after a transition.
type Action uint8

const (
	AckClose   Action = 1 << iota // send a CREDIT that acknowledges CLOSE
	SendReset                     // send RESET with the code that the stream ended with, if it has one
	Probe                         // send PING, once, if nothing was received
	FailWrites                    // writes fail from now on
	Release                       // take the token out of use, end the users' contexts, give buffers and windows back
	Forget                        // remove the stream from the outbox's tables and from the server's count
)

// On returns the state after event e, and the actions to carry out. ok is false for an event that the table does not
// expect in state s: the state stays, and there are no actions.
func (s State) On(e Event, r Role) (next State, do Action, ok bool) {
	for i := range rules {
		if rule := &rules[i]; rule.matches(s, e, r) {
			return rule.apply(s), rule.do, true
		}
	}
	if Strict {
		panic(fmt.Sprintf("lifecycle: no rule for event %v of a %v in state %v", e, r, s))
	}
	return s, 0, false
}

// Strict makes On panic for an event without a rule. Tests set it before they start goroutines: an event that the table
// lacks is a mistake in the table or in the code that raised it.
var Strict bool

// sends, recvs are sets of states: bit n stands for state n. A zero set stands for all states.
type (
	sends uint8
	recvs uint8
)

func in(states ...Send) (set sends) {
	for _, s := range states {
		set |= 1 << s
	}
	return set
}

func at(states ...Recv) (set recvs) {
	for _, s := range states {
		set |= 1 << s
	}
	return set
}

// keep marks a half that a rule does not change.
const keep = 0xFF

// rule is one row of the table.
type rule struct {
	role  Role
	event Event
	send  sends
	recv  recvs
	phase Phase

	toSend  Send
	toRecv  Recv
	toPhase Phase
	do      Action
	why     string // a note for docs/PROTOCOL.md
}

func (r *rule) matches(s State, e Event, role Role) bool {
	return r.event == e && r.role&role != 0 && r.phase == s.Phase &&
		(r.send == 0 || r.send&(1<<s.Send) != 0) && (r.recv == 0 || r.recv&(1<<s.Recv) != 0)
}

func (r *rule) apply(s State) State {
	if r.toSend != keep {
		s.Send = r.toSend
	}
	if r.toRecv != keep {
		s.Recv = r.toRecv
	}
	s.Phase = r.toPhase
	return s
}

const (
	producers = Handler | Writer
	anyone    = Consumer | producers

	detached = "RESET has the code of CLOSE: the producer may still be sending"
	unread   = "RESET has the code of CLOSE, and is sent only if CLOSE had HALF or anything was received"
)

// rules is the table. No two rows match the same state, event and role; a test holds that.
var rules = []rule{
	// The sender begins.
	{Consumer, Written, in(NoSender), 0, Live, Waiting, keep, Live, 0, "keep the records until the peer is known"},
	{Consumer, PeerKnown, in(Waiting), 0, Live, Open, keep, Live, 0, "note subject and window, section 2.3"},
	{Consumer, PeerKnown, in(NoSender, Open, Closing, Settled), 0, Live, keep, keep, Live, 0, "write there from now on, section 2.3"},
	{producers, PeerKnown, 0, 0, Live, keep, keep, Live, 0, "write there from now on, section 2.3"},
	{Consumer, PeerIsJSON, in(NoSender), 0, Live, keep, keep, Live, 0, "section 11"},
	{Consumer, PeerIsJSON, in(Waiting), at(Reading), Live, Settled, keep, Live, FailWrites, "a fallback producer takes no records"},
	{Consumer, PeerIsJSON, in(Waiting), at(Done), Live, Settled, keep, Gone, FailWrites | Release | Forget, ""},

	// The sender ends.
	{anyone, ClosePublished, in(Open), 0, Live, Closing, keep, Live, 0, ""},
	{Consumer, CloseAcked, in(Closing), at(Reading), Live, Settled, keep, Live, 0, ""},
	{Handler, CloseAcked, in(Closing), at(Reading), Live, Settled, keep, Live, Probe, "the handler goes on reading"},
	{anyone, CloseAcked, in(Closing), at(Done), Live, Settled, keep, Gone, Release | Forget, "the stream is complete"},
	{Handler, CloseAcked, in(Closing), at(Unread), Live, Settled, keep, Ending, Release | SendReset, unread},
	{Consumer, CloseAcked, in(Closing), at(Unread), Live, Settled, keep, Ending, Release | SendReset, detached},

	// The receiver ends.
	{Consumer, CloseRead, in(NoSender, Waiting, Open, Closing), at(Reading), Live, keep, Done, Live, AckClose, ""},
	{Handler, CloseRead, in(Open, Closing), at(Reading), Live, keep, Done, Live, AckClose, ""},
	{Consumer | Handler, CloseRead, in(Settled), at(Reading), Live, keep, Done, Gone, AckClose | Release | Forget, "the stream is complete"},
	{Handler, HandlerReturned, in(Open, Closing), at(Reading), Live, keep, Unread, Live, 0, ""},
	{Handler, HandlerReturned, in(Settled), at(Reading), Live, keep, Unread, Ending, Release | SendReset, unread},
	{Handler, HandlerReturned, 0, at(Done), Live, keep, keep, Live, 0, ""},
	{Consumer, ConsumerLeft, in(Open, Closing), at(Reading), Live, keep, Unread, Live, 0, "its CLOSE goes on being repaired"},
	{Consumer, ConsumerLeft, in(Settled), at(Reading), Live, keep, Unread, Ending, Release | SendReset, detached},

	// The stream ends.
	{Consumer, Completed, 0, at(Reading), Live, keep, Done, Gone, AckClose | Release | Forget, "CLOSE 1000 without HALF was read, and there is no sender"},
	{producers, Completed, in(Closing, Settled), 0, Live, keep, keep, Gone, Release | Forget, "a RESET said so, section 12.3"},
	{anyone, PeerFailed, 0, 0, Live, keep, Done, Gone, AckClose | Release | Forget, ""},
	{anyone, ResetRead, 0, 0, Live, keep, keep, Gone, Release | Forget, "records that arrived in order stay readable"},
	{anyone, Ended, 0, 0, Live, keep, keep, Ending, Release | SendReset, ""},
	{anyone, Told, 0, 0, Ending, keep, keep, Gone, Forget, ""},

	// Late news.
	{anyone, PeerKnown, 0, 0, Ending, keep, keep, Ending, 0, "RESET goes to that subject"},
	{anyone, PeerKnown, 0, 0, Gone, keep, keep, Gone, SendReset, "the stream ended before its peer was known"},
}
