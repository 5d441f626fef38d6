package tap

import (
	"fmt"
	"reflect"
	"testing"
)

// Subscriptions and the ends of commands are found for every way to cut them into writes.
func TestCommandsMayBeCutAnywhere(t *testing.T) {
	commands := []string{
		"CONNECT {\"verbose\":false,\"user\":\"SUB a  1\"}\r\n", "PING\r\n", "SUB inbox.*  1\r\n", "SUB other queue 2\r\n",
		"PUB a 5\r\nab\r\nc\r\n", "PUB a reply 0\r\n\r\n", "HPUB a 12 14\r\nNATS/1.0\r\n\r\nxy\r\n", "PUB a 13\r\nSUB in.*  9\r\n\r\n",
		"UNSUB 2 \r\n", "SUB more.*  30\r\n", "PONG\r\n",
	}
	var all string
	ends := map[int]bool{0: true}
	for _, c := range commands {
		all += c
		ends[len(all)] = true
	}
	want := []string{"inbox.*  1", "other queue 2", "more.*  30"}
	for first := range len(all) + 1 {
		for second := first; second <= len(all); second += 1 + len(all)/20 {
			var c tracker
			at := 0
			for _, cut := range []int{first, second, len(all)} {
				c.commands.write([]byte(all[at:cut]), c.note)
				if at = cut; c.commands.boundary() != ends[at] {
					t.Fatalf("cut at %d and %d: at %d, between two commands: %v", first, second, at, c.commands.boundary())
				}
			}
			if !reflect.DeepEqual(c.subs, want) {
				t.Fatalf("cut at %d and %d: %q", first, second, c.subs)
			}
		}
	}
}

type tracker struct {
	commands commands
	subs     []string
}

func (c *tracker) note(subject, queue []byte, sid int64) {
	c.subs = append(c.subs, fmt.Sprintf("%s %s %d", subject, queue, sid))
}

// After a command that is not understood, nothing is written between commands any more, and no subscription is found.
func TestCommandsThatAreNotUnderstoodEndTheSearch(t *testing.T) {
	for _, bad := range []string{"PUB a x\r\n", "PUB a 99999999999\r\n", "PING\n", "PUB a \r\n"} {
		var c tracker
		c.commands.write([]byte(bad+"SUB inbox.*  1\r\n"), c.note)
		if c.commands.boundary() || len(c.subs) != 0 {
			t.Errorf("after %q: %q, boundary %v", bad, c.subs, c.commands.boundary())
		}
	}
}
