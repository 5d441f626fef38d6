package liveness_test

import (
	"testing"

	"pgregory.net/rapid"

	. "github.com/natsstream/stream/internal/liveness"
)

// The intervals of these tests, in no unit.
const (
	keepAlive  = 1000
	ack        = 10
	resume     = 100
	disconnect = 500
	patience   = 70
)

var times = Intervals{KeepAlive: keepAlive, Ack: ack, Resume: resume, Disconnect: disconnect, Patience: patience}

// Decide for each way in which a stream can be.
func TestDecide(t *testing.T) {
	const now = 10_000
	for name, c := range map[string]struct {
		facts Facts
		want  Decision
	}{
		"heard just now":          {Facts{Heard: now}, Decision{Next: now + keepAlive}},
		"jitter shortens silence": {Facts{Heard: now, Jitter: 7}, Decision{Next: now + keepAlive - 7}},
		"silence not over":        {Facts{Heard: now - keepAlive + 1}, Decision{Next: now + 1}},
		"silence over":            {Facts{Heard: now - keepAlive}, Decision{Ping: true, Next: now + ack}},
		"silence since birth":     {Facts{Born: now - keepAlive}, Decision{Ping: true, Next: now + ack}},
		"silence since reconnect": {Facts{Resumed: now - keepAlive + 5}, Decision{Next: now + 5}},
		"silent handler":          {Facts{Heard: now, Silent: true}, Decision{Ping: true, Next: now + ack}},
		"silent handler, asked":   {Facts{Silent: true, Pings: 1, Pinged: now}, Decision{Next: now + ack}},

		"ending":                                     {Facts{Ending: true, Closed: 1, Suspect: 1}, Decision{Next: now + keepAlive}},
		"failed publish":                             {Facts{Heard: now, Failed: true}, Decision{Republish: true, Next: now + ack}},
		"failed publish, no peer":                    {Facts{Heard: now, Failed: true, NoPeer: true}, Decision{Republish: true, Next: now + ack}},
		"failed publish, given up":                   {Facts{Failed: true, Closed: 1}, Decision{GiveUp: EndUnconfirmed}},
		"first question outstanding":                 {Facts{Pings: 1, Pinged: now - ack + 3}, Decision{Next: now + 3}},
		"first question unanswered, too many are":    {Facts{Pings: 1, Pinged: now - ack, Unpaid: true}, Decision{Next: now + ack/4}},
		"first question, others are unanswered":      {Facts{Heard: now - keepAlive, Unpaid: true}, Decision{Ping: true, Next: now + ack}},
		"acknowledgement overdue, enough unanswered": {Facts{Heard: now, Unacked: true, Sent: now - ack, Unpaid: true}, Decision{Wait: true, Next: now + keepAlive}},
		"credit overdue, enough unanswered":          {Facts{Heard: now, Stalled: true, Sent: now - ack, Unpaid: true}, Decision{Wait: true, Next: now + keepAlive}},
		"the end overdue, enough unanswered":         {Facts{Heard: now, Unacked: true, Closed: now - ack, Sent: now - ack, Unpaid: true}, Decision{Ping: true, Paid: true, Next: now + ack}},
		"first question unanswered":                  {Facts{Pings: 1, Pinged: now - ack}, Decision{Ping: true, Paid: true, Repeated: true, Next: now + ack}},
		"second question unanswered":                 {Facts{Pings: 2, Pinged: now - ack}, Decision{Ping: true, Paid: true, Repeated: true, Lost: true, Next: now + ack}},
		"suspect":                                    {Facts{Pings: 4, Pinged: now, Suspect: now - resume + 2}, Decision{Next: now + 2}},
		"suspect by the server":                      {Facts{Suspect: now, Pinged: now - 1}, Decision{Next: now + ack - 1}},
		"suspect, it queues":                         {Facts{Pings: 9, Pinged: now, Suspect: now - resume, Queued: 3}, Decision{Next: now + 3}},
		"suspect, it queues for too long":            {Facts{Pings: 9, Pinged: now, Suspect: now - 2*resume, Queued: 9 * resume}, Decision{GiveUp: PeerGone}},
		"suspect, records arrive on others":          {Facts{Pings: 9, Pinged: now, Suspect: now - resume, Others: now - 1}, Decision{Next: now + ack}},
		"suspect, records arrive on others for long": {Facts{Pings: 9, Pinged: now, Suspect: now - 7*resume, Others: now - 1}, Decision{GiveUp: PeerGone}},
		"suspect, records arrived before":            {Facts{Pings: 9, Pinged: now, Suspect: now - resume, Others: now - resume}, Decision{GiveUp: PeerGone}},
		"the end, records arrive on others":          {Facts{Closed: now - resume, Others: now}, Decision{Next: now + ack, Ping: true}},
		"the end, heard as well":                     {Facts{Closed: now - resume, Heard: now - 1, Others: now - 1}, Decision{Next: now + 6*resume}},
		"the end, records arrive for long":           {Facts{Closed: now - 7*resume, Heard: now - 1, Others: now - 1}, Decision{GiveUp: EndUnconfirmed}},
		"the end, records arrive, little memory":     {Facts{Closed: now - resume, Heard: now - 1, Others: now - 1, Scarce: true}, Decision{GiveUp: EndUnconfirmed}},
		"the end, records arrived before":            {Facts{Closed: now - resume, Others: now - resume}, Decision{GiveUp: EndUnconfirmed}},
		"the end queues":                             {Facts{Closed: now - resume, Queued: 3}, Decision{Next: now + 3, Ping: true}},
		"the end queues for too long":                {Facts{Closed: now - 2*resume, Queued: 9 * resume}, Decision{GiveUp: EndUnconfirmed}},
		"suspect for long":                           {Facts{Pings: 9, Pinged: now, Suspect: now - resume}, Decision{GiveUp: PeerGone}},
		"suspect, connection broke":                  {Facts{Pings: 9, Pinged: now, Suspect: now - resume, Resumed: now - ack}, Decision{Next: now + ack}},
		"suspect, it breaks again":                   {Facts{Pings: 9, Pinged: now, Suspect: now - resume, Resumed: now - 2*ack}, Decision{GiveUp: PeerGone}},
		"suspect, it always breaks":                  {Facts{Pings: 9, Pinged: now, Suspect: now - 2*resume, Resumed: now}, Decision{GiveUp: PeerGone}},

		"suspect, own patience":     {Facts{Pings: 9, Pinged: now, Suspect: now - resume, Patience: resume + 5}, Decision{Next: now + 5}},
		"suspect, patience is over": {Facts{Pings: 9, Pinged: now, Suspect: now - 200, Patience: 200}, Decision{GiveUp: PeerGone}},

		"acknowledgement outstanding":  {Facts{Heard: now, Unacked: true, Sent: now - 1}, Decision{Next: now + ack - 1}},
		"acknowledgement overdue":      {Facts{Heard: now, Unacked: true, Sent: now - ack}, Decision{Ping: true, Paid: true, Next: now + ack}},
		"credit overdue":               {Facts{Heard: now, Stalled: true, Sent: now - ack}, Decision{Ping: true, Paid: true, Next: now + ack}},
		"asked for it twice":           {Facts{Heard: now, Unacked: true, Pinged: now - ack, Asks: 2}, Decision{Next: now + 3*ack}},
		"asked for it often":           {Facts{Heard: now, Unacked: true, Pinged: now, Asks: 100}, Decision{Next: now + 64*ack}},
		"overdue since reconnect":      {Facts{Heard: now, Unacked: true, Sent: 1, Resumed: now}, Decision{Next: now + ack}},
		"overdue, question unanswered": {Facts{Unacked: true, Sent: 1, Pings: 1, Pinged: now - 1}, Decision{Next: now + ack - 1}},

		"end outstanding":      {Facts{Heard: now, Closed: now - 1}, Decision{Next: now + resume - 1}},
		"end unconfirmed":      {Facts{Heard: now, Closed: now - resume}, Decision{GiveUp: EndUnconfirmed}},
		"end before reconnect": {Facts{Heard: now, Closed: now - resume, Resumed: now}, Decision{Next: now + 2*ack}},

		"not answered yet":       {Facts{NoPeer: true, Consumer: true}, Decision{Next: now + keepAlive}},
		"request may be lost":    {Facts{NoPeer: true, Consumer: true, Lost: now - 1}, Decision{Next: now + resume - 1}},
		"request lost":           {Facts{NoPeer: true, Consumer: true, Lost: now - resume}, Decision{GiveUp: RequestLost}},
		"answered, subject lost": {Facts{NoPeer: true, Consumer: true, Lost: now - resume, Received: true}, Decision{Next: now + keepAlive}},
		"nobody to ask":          {Facts{NoPeer: true, Consumer: true, Suspect: now - 1}, Decision{Next: now + resume - 1}},
		"nobody to ask for long": {Facts{NoPeer: true, Consumer: true, Suspect: now - resume}, Decision{GiveUp: NobodyToAsk}},

		"down":                      {Facts{Disconnected: true, Registered: true, Down: now - 1}, Decision{Next: now + disconnect - 1}},
		"down, not seen yet":        {Facts{Disconnected: true, Registered: true}, Decision{Next: now + disconnect}},
		"down, handler to be found": {Facts{Disconnected: true, Down: now}, Decision{Next: now + ack}},
		"down, consumer":            {Facts{Disconnected: true, Consumer: true, Down: now}, Decision{Next: now + disconnect}},
		"down, born since":          {Facts{Disconnected: true, Consumer: true, Down: 1, Born: now}, Decision{Next: now + disconnect}},
		"down for long":             {Facts{Disconnected: true, Down: now - disconnect}, Decision{GiveUp: Disconnected}},
		"down, clocks stand still":  {Facts{Disconnected: true, Registered: true, Down: now, Closed: 1, Suspect: 1}, Decision{Next: now + disconnect}},
	} {
		t.Run(name, func(t *testing.T) {
			f := c.facts
			f.Now, f.Times, f.Repeat = now, &times, ack
			if d := Decide(&f); d != c.want {
				t.Errorf("%+v, want %+v", d, c.want)
			}
		})
	}
}

// stream plays the outbox for one stream: it looks when it is told to, or up to late after that, or earlier.
type stream struct {
	Facts
	answers bool // the peer answers each question within ack
	answer  int64
}

func (s *stream) look(t *rapid.T, late int64) Decision {
	if s.answer != 0 && s.answer <= s.Now {
		s.Heard, s.answer = s.answer, 0
		s.Pings, s.Suspect, s.Asks = 0, 0, 0
	}
	s.Jitter = rapid.Int64Range(0, keepAlive/10).Draw(t, "jitter")
	d := Decide(&s.Facts)
	if d.GiveUp != Alive {
		return d
	}
	if d.Next <= s.Now {
		t.Fatalf("%+v: the next look is at %d", s.Facts, d.Next)
	}
	if d.Ping {
		if s.Pings >= SuspectPings && s.Suspect == 0 {
			s.Suspect = s.Now
		}
		if !d.Repeated {
			s.Asks++
		}
		s.Pings++
		s.Pinged = s.Now
		if s.answers {
			s.answer = s.Now + rapid.Int64Range(1, ack).Draw(t, "answer")
		}
	}
	next := d.Next + rapid.Int64Range(0, late).Draw(t, "late")
	if rapid.IntRange(0, 4).Draw(t, "early") == 0 {
		next = s.Now + rapid.Int64Range(1, next-s.Now).Draw(t, "looks early")
	}
	if s.answer != 0 { // it is heard before the next look, as the outbox reads what arrived first
		s.answer = min(s.answer, next)
	}
	s.Now = next
	return d
}

func draw(t *rapid.T) *stream {
	b := func(name string) bool { return rapid.Bool().Draw(t, name) }
	return &stream{Facts: Facts{
		Now: 1, Born: 1, Times: &times, Repeat: ack, Registered: true,
		Consumer: b("consumer"), Unacked: b("unacked"), Stalled: b("stalled"), Silent: b("silent"), Sent: 1,
	}}
}

// A peer that is gone is given up in time, however the looks fall.
func TestDeadPeerIsGivenUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := draw(t)
		const late = 20
		const looks = SuspectPings + 3 // each may be late: the question, its repetitions, and the last one
		bound := int64(keepAlive + SuspectPings*ack + resume + looks*late)
		for s.look(t, late).GiveUp == Alive {
			if s.Now > 1+bound {
				t.Fatalf("not given up after %d, the bound is %d", s.Now-1, bound)
			}
		}
	})
}

// A peer that answers is never given up, however the looks fall.
func TestLivingPeerIsNotGivenUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := draw(t)
		s.answers = true
		for s.Now < 20*keepAlive {
			if d := s.look(t, ack); d.GiveUp != Alive {
				t.Fatalf("given up at %d, reason %d", s.Now, d.GiveUp)
			}
		}
	})
}

// DecidePeer for each way in which a peer can be.
func TestDecidePeer(t *testing.T) {
	const now = 10_000
	for name, c := range map[string]struct {
		facts PeerFacts
		want  PeerDecision
	}{
		"heard just now":             {PeerFacts{Heard: now}, PeerDecision{Next: now + keepAlive}},
		"jitter shortens silence":    {PeerFacts{Heard: now, Jitter: 7}, PeerDecision{Next: now + keepAlive - 7}},
		"silence over":               {PeerFacts{Heard: now - keepAlive}, PeerDecision{Ask: true, Next: now + ack}},
		"silence since reconnect":    {PeerFacts{Resumed: now - keepAlive + 5}, PeerDecision{Next: now + 5}},
		"question outstanding":       {PeerFacts{Questions: 1, Asked: now - 1, Suspect: now - 1}, PeerDecision{Next: now + ack - 1}},
		"question unanswered":        {PeerFacts{Questions: 1, Asked: now - ack, Suspect: now - ack}, PeerDecision{Ask: true, Next: now + ack}},
		"asked often":                {PeerFacts{Questions: 4, Asked: now, Suspect: now - patience + 2}, PeerDecision{Next: now + 2}},
		"asked for long":             {PeerFacts{Questions: 4, Asked: now, Suspect: now - patience}, PeerDecision{GiveUp: true, Next: now + ack}},
		"asked for long, too rarely": {PeerFacts{Questions: 2, Asked: now, Suspect: now - patience}, PeerDecision{Next: now + ack}},
		"asked for long, it queues":  {PeerFacts{Questions: 4, Asked: now, Suspect: now - patience, Queued: 3}, PeerDecision{Next: now + 3}},
		"it queues for too long":     {PeerFacts{Questions: 4, Asked: now, Suspect: now - patience - resume, Queued: 100 * resume}, PeerDecision{GiveUp: true, Next: now + ack}},
		"connection broke":           {PeerFacts{Questions: 4, Asked: now, Suspect: now - patience, Resumed: now - ack}, PeerDecision{Next: now + ack}},
		"connection always breaks":   {PeerFacts{Questions: 4, Asked: now, Suspect: now - patience - resume, Resumed: now}, PeerDecision{GiveUp: true, Next: now + ack}},
		"absent":                     {PeerFacts{Absent: true, Asked: now - ack, Suspect: now}, PeerDecision{Ask: true, Next: now + ack}},
		"absent for long":            {PeerFacts{Absent: true, Asked: now, Suspect: now - patience, Queued: 3}, PeerDecision{GiveUp: true, Next: now + ack}},
	} {
		t.Run(name, func(t *testing.T) {
			f := c.facts
			f.Now, f.Times, f.KeepAlive = now, &times, keepAlive
			if d := DecidePeer(&f); d != c.want {
				t.Errorf("%+v, want %+v", d, c.want)
			}
		})
	}
}

// However the looks fall, a peer that is gone is given up in time, one that answers never is, and no next look is in
// the past.
func TestPeerBounds(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		answers := rapid.Bool().Draw(t, "answers")
		late := rapid.Int64Range(0, 20).Draw(t, "lateness")
		f := PeerFacts{Now: 1, Heard: 1, Times: &times, KeepAlive: rapid.Int64Range(1, keepAlive).Draw(t, "KeepAlive")}
		f.Queued = rapid.Int64Range(0, resume).Draw(t, "queued")
		const looks = SuspectPings + 2
		bound := 1 + f.KeepAlive + max(patience, SuspectPings*ack) + f.Queued + looks*late
		for f.Now < 20*keepAlive {
			f.Jitter = rapid.Int64Range(0, f.KeepAlive/10).Draw(t, "jitter")
			d := DecidePeer(&f)
			if d.Next <= f.Now {
				t.Fatalf("%+v: the next look is at %d", f, d.Next)
			}
			if d.GiveUp && answers {
				t.Fatalf("%+v: given up", f)
			} else if d.GiveUp {
				return
			}
			if !answers && f.Now > bound {
				t.Fatalf("not given up at %d, the bound is %d", f.Now, bound)
			}
			next := d.Next + rapid.Int64Range(0, late).Draw(t, "late")
			if d.Ask {
				if f.Suspect == 0 {
					f.Suspect = f.Now
				}
				f.Questions++
				f.Asked = f.Now
				if answers {
					f.Heard = min(next, f.Now+rapid.Int64Range(1, ack).Draw(t, "answer"))
					f.Questions, f.Suspect = 0, 0
				}
			}
			f.Now = next
		}
	})
}
