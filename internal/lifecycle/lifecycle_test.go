package lifecycle

import (
	"slices"
	"testing"
)

var roles = []Role{Consumer, Handler, Writer}

func allStates() (all []State) {
	for send := NoSender; send <= Settled; send++ {
		for recv := Reading; recv <= Unread; recv++ {
			for phase := Live; phase <= Gone; phase++ {
				all = append(all, State{send, recv, phase})
			}
		}
	}
	return all
}

// starts are the states in which a stream of role r can begin.
func starts(r Role) []State {
	if r == Handler { // with a consumer that speaks only the fallback it takes no records
		return []State{Start(r, true), Start(r, false)}
	}
	return []State{Start(r, false)}
}

// reachable returns the states of role r that some sequence of events leads to.
func reachable(r Role) map[State]bool {
	seen := make(map[State]bool)
	todo := starts(r)
	for len(todo) > 0 {
		s := todo[0]
		todo = todo[1:]
		if seen[s] {
			continue
		}
		seen[s] = true
		for e := range events {
			if next, _, ok := s.On(e, r); ok {
				todo = append(todo, next)
			}
		}
	}
	return seen
}

func TestNoTwoRulesMatchOneEvent(t *testing.T) {
	for _, r := range roles {
		for _, s := range allStates() {
			for e := range events {
				var found []int
				for i := range rules {
					if rules[i].matches(s, e, r) {
						found = append(found, i)
					}
				}
				if len(found) > 1 {
					t.Errorf("%v, %v, %v: rules %d", r, s, e, found)
				}
			}
		}
	}
}

func TestNothingGoesBack(t *testing.T) {
	for _, r := range roles {
		for _, s := range allStates() {
			for e := range events {
				next, _, ok := s.On(e, r)
				if next.Send < s.Send || next.Phase < s.Phase || s.Recv != Reading && next.Recv != s.Recv && e != PeerFailed {
					t.Errorf("%v, %v, %v: back to %v", r, s, e, next)
				}
				if !ok && next != s {
					t.Errorf("%v, %v, %v: no rule, and yet %v", r, s, e, next)
				}
			}
		}
	}
}

// A stream gives back what it holds exactly when it is no longer Live, and is forgotten exactly when it becomes Gone.
func TestForgottenOnce(t *testing.T) {
	for _, r := range roles {
		for s := range reachable(r) {
			for e := range events {
				next, do, ok := s.On(e, r)
				ends := s.Phase == Live && next.Phase != Live
				goes := s.Phase != Gone && next.Phase == Gone
				if ok && (ends != (do&Release != 0) || goes != (do&Forget != 0)) {
					t.Errorf("%v, %v, %v: actions %b, next %v", r, s, e, do, next)
				}
			}
		}
	}
}

// A stream whose both directions are complete does not stay.
func TestCompleteStreamsEnd(t *testing.T) {
	for _, r := range roles {
		for s := range reachable(r) {
			if s.Phase == Live && s.Send == Settled && s.Recv != Reading {
				t.Errorf("%v: %v is complete and stays", r, s)
			}
		}
	}
}

// From every state this end can end the stream, whatever happened before.
func TestEveryStreamCanEnd(t *testing.T) {
	for _, r := range roles {
		for s := range reachable(r) {
			if s.Phase == Gone {
				continue
			}
			end := s
			if s.Phase == Live {
				end, _, _ = s.On(Ended, r)
			}
			if end, _, _ = end.On(Told, r); end.Phase != Gone {
				t.Errorf("%v: %v cannot end", r, s)
			}
			for _, e := range []Event{ResetRead, PeerFailed} {
				if next, do, _ := s.On(e, r); s.Phase == Live && (next.Phase != Gone || do&SendReset != 0) {
					t.Errorf("%v: %v after %v: %v, actions %b", r, s, e, next, do)
				}
			}
		}
	}
}

// A peer is told of an end by RESET, or has said the end itself, or has everything.
func TestPeersAreTold(t *testing.T) {
	for _, r := range roles {
		for s := range reachable(r) {
			if s.Phase != Live {
				continue
			}
			_, do, _ := s.On(Ended, r)
			if do&SendReset == 0 {
				t.Errorf("%v: %v ends in silence", r, s)
			}
		}
	}
}

func TestEveryRuleIsReachable(t *testing.T) {
	used := make(map[int]bool)
	for _, r := range roles {
		for s := range reachable(r) {
			for e := range events {
				for i := range rules {
					if rules[i].matches(s, e, r) {
						used[i] = true
					}
				}
			}
		}
	}
	for i := range rules {
		if !used[i] {
			t.Errorf("rule %d is never used: %+v", i, Rows()[i])
		}
	}
}

func TestPaths(t *testing.T) {
	for _, test := range []struct {
		name   string
		role   Role
		start  State
		events []Event
		want   State
		last   Action
	}{
		{"a consumer reads everything and sends nothing", Consumer, Start(Consumer, true),
			[]Event{PeerKnown, Completed}, State{NoSender, Done, Gone}, AckClose | Release | Forget},
		{"a consumer sends, closes, and reads to the end", Consumer, Start(Consumer, true),
			[]Event{Written, PeerKnown, ClosePublished, CloseAcked, CloseRead}, State{Settled, Done, Gone}, AckClose | Release | Forget},
		{"a consumer reads to the end and its CLOSE is acknowledged last", Consumer, Start(Consumer, true),
			[]Event{Written, PeerKnown, CloseRead, ClosePublished, CloseAcked}, State{Settled, Done, Gone}, Release | Forget},
		{"a half-close keeps a consumer that has not written", Consumer, Start(Consumer, true),
			[]Event{PeerKnown, CloseRead}, State{NoSender, Done, Live}, AckClose},
		{"a fallback producer takes no records", Consumer, Start(Consumer, true),
			[]Event{Written, PeerIsJSON}, State{Settled, Reading, Live}, FailWrites},
		{"a consumer leaves before it knows its producer", Consumer, Start(Consumer, true),
			[]Event{Ended, Told, PeerKnown}, State{NoSender, Reading, Gone}, SendReset},
		{"a consumer leaves with 1000, and its CLOSE is repaired", Consumer, Start(Consumer, true),
			[]Event{Written, PeerKnown, ConsumerLeft, ClosePublished, CloseAcked, Told}, State{Settled, Unread, Gone}, Forget},
		{"a consumer whose CLOSE was acknowledged leaves with 1000", Consumer, Start(Consumer, true),
			[]Event{Written, PeerKnown, ClosePublished, CloseAcked, ConsumerLeft}, State{Settled, Unread, Ending}, Release | SendReset},
		{"a handler returns, and its consumer has everything", Handler, Start(Handler, true),
			[]Event{HandlerReturned, ClosePublished, CloseAcked, Told}, State{Settled, Unread, Gone}, Forget},
		{"a handler closes, reads on, and returns", Handler, Start(Handler, true),
			[]Event{ClosePublished, CloseAcked, HandlerReturned}, State{Settled, Unread, Ending}, Release | SendReset},
		{"a handler that closed reads to the end", Handler, Start(Handler, true),
			[]Event{ClosePublished, CloseAcked, CloseRead}, State{Settled, Done, Gone}, AckClose | Release | Forget},
		{"a writer's CLOSE is acknowledged", Writer, Start(Writer, false),
			[]Event{ClosePublished, CloseAcked}, State{Settled, Done, Gone}, Release | Forget},
		{"a consumer that has everything resets a producer that closed", Writer, Start(Writer, false),
			[]Event{ClosePublished, Completed}, State{Closing, Done, Gone}, Release | Forget},
		{"the peer resets", Handler, Start(Handler, true),
			[]Event{PeerKnown, ResetRead}, State{Open, Reading, Gone}, Release | Forget},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, do := test.start, Action(0)
			for _, e := range test.events {
				next, d, ok := s.On(e, test.role)
				if !ok {
					t.Fatalf("no rule for %v in %v", e, s)
				}
				s, do = next, d
			}
			if s != test.want || do != test.last {
				t.Errorf("%v with actions %b, want %v with %b", s, do, test.want, test.last)
			}
		})
	}
}

// The words of the table name everything that they should.
func TestRows(t *testing.T) {
	for i, row := range Rows() {
		if slices.Contains([]string{row.Role, row.Send, row.Recv, row.Phase, row.Event, row.ToPhase}, "") {
			t.Errorf("row %d has an empty field: %+v", i, row)
		}
	}
}

func TestStrictPanics(t *testing.T) {
	Strict = true
	defer func() {
		Strict = false
		if recover() == nil {
			t.Error("an event without a rule went unnoticed")
		}
	}()
	State{NoSender, Reading, Live}.On(HandlerReturned, Consumer)
}
