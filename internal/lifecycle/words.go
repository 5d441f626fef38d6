package lifecycle

import (
	"fmt"
	"strings"
)

// This file has the words of the table for docs/PROTOCOL.md section 12. Only internal/framegen and tests run it.
var (
	roleNames  = []string{"consumer", "handler", "writer"}
	eventNames = [events]string{
		"the user writes or closes for the first time",
		"the peer's address is known, or proved",
		"first message is of the fallback",
		"CLOSE published",
		"CLOSE acknowledged",
		"CLOSE 1000 read, and the stream goes on",
		"handler returned, its CLOSE was written",
		"consumer left with 1000, its CLOSE was written",
		"nothing remains to be done",
		"CLOSE of another code read",
		"RESET",
		"this end ends the stream, section 12.3",
		"RESET published, or nobody to be told",
	}
	actionNames = []string{"CREDIT", "RESET", "PING, once, if nothing was received", "writes fail", "", ""}
)

// Word is a state and its meaning.
type Word struct{ Name, Doc string }

// Sends, Recvs and Phases are the states in order.
var (
	Sends = []Word{
		{"NONE", "A consumer has not written yet. Its direction needs no CLOSE."},
		{"WAITING", "A consumer has written, and does not know its producer's subject yet."},
		{"OPEN", "Packets can be published, as credit allows. A producer begins here: the request gave it subject and window."},
		{"CLOSING", "CLOSE was published and is not acknowledged yet."},
		{"SETTLED", "CLOSE was acknowledged, or the peer takes no records."},
	}
	Recvs = []Word{
		{"READING", "Records may come."},
		{"DONE", "CLOSE was read. A producer whose consumer can send no records begins here."},
		{"UNREAD", "The handler returned, or the consumer left. Nobody reads the records that still come."},
	}
	Phases = []Word{
		{"LIVE", "The stream is open in at least one direction."},
		{"ENDING", "This end ended the stream, and its RESET was not published yet."},
		{"GONE", "The stream is over. Its token is out of use."},
	}
)

func (r Role) String() string {
	if r == anyone {
		return "any"
	}
	return names(roleNames, uint8(r))
}

func (s Send) String() string  { return Sends[s].Name }
func (r Recv) String() string  { return Recvs[r].Name }
func (p Phase) String() string { return Phases[p].Name }
func (e Event) String() string { return eventNames[e] }

func (s State) String() string { return fmt.Sprintf("%v/%v/%v", s.Send, s.Recv, s.Phase) }

// String returns the actions that a peer or a user can observe.
func (a Action) String() string { return names(actionNames, uint8(a)) }

// names returns the members of a set of bits, without those that have no name.
func names(all []string, set uint8) string {
	var out []string
	for i, name := range all {
		if set&(1<<i) != 0 && name != "" {
			out = append(out, name)
		}
	}
	return strings.Join(out, ", ")
}

// Row is one rule in words, for documents.
type Row struct{ Role, Send, Recv, Phase, Event, Do, ToSend, ToRecv, ToPhase, Why string }

// Rows returns the table in words, in order. A half that a rule does not look at, or does not change, is "any" or
// empty.
func Rows() []Row {
	rows := make([]Row, len(rules))
	for i := range rules {
		r := &rules[i]
		row := Row{
			Role: r.role.String(), Send: "any", Recv: "any", Phase: r.phase.String(), Event: r.event.String(),
			Do: r.do.String(), ToPhase: r.toPhase.String(), Why: r.why,
		}
		if r.send != 0 {
			row.Send = states(Sends, uint8(r.send))
		}
		if r.recv != 0 {
			row.Recv = states(Recvs, uint8(r.recv))
		}
		if r.toSend != keep {
			row.ToSend = r.toSend.String()
		}
		if r.toRecv != keep {
			row.ToRecv = r.toRecv.String()
		}
		rows[i] = row
	}
	return rows
}

func states(words []Word, set uint8) string {
	all := make([]string, len(words))
	for i, w := range words {
		all[i] = w.Name
	}
	return names(all, set)
}
