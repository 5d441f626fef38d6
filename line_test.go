package stream

import (
	"fmt"
	"testing"
	"time"

	"github.com/natsstream/stream/internal/lifecycle"
)

// Peers that come and go, each another one, do not fill the memory, and a peer that comes back finds its line.
func TestLinesWithoutUsersAreBounded(t *testing.T) {
	ep := &endpoint{started: time.Now()}
	ep.outbox.init(ep)
	o := &ep.outbox
	use := func(peer string) *line {
		s := &session{ep: ep, role: lifecycle.Writer, out: outboxState{peer: peer + ".x"}}
		l := o.lineOf(s)
		o.leaveLine(s, 0)
		return l
	}
	first := use("first")
	for i := range 3 * maxIdleLines {
		use(fmt.Sprint("peer", i))
		if again := use("first"); again != first {
			t.Fatalf("the line was forgotten after %d others", i)
		}
		if n := len(o.lines.byPeer); n > maxIdleLines || n != o.lines.idle {
			t.Fatalf("%d lines are remembered, %d are counted", n, o.lines.idle)
		}
	}
	o.tickLines(ep.now() + 2*lineIdle)
	if n := len(o.lines.byPeer); n != 0 || o.lines.idle != 0 {
		t.Errorf("%d lines are left, %d are counted", n, o.lines.idle)
	}
}
