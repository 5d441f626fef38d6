package stream

import "testing"

// Numbers from the source differ, also beyond what is drawn at once, and those of consumers from those of producers.
func TestStreamsHaveNumbersOfTheirOwn(t *testing.T) {
	seen := make(map[uint64]bool)
	for i := range 1000 {
		n := newSender(i%2 == 1)
		if n > maxSender || n%2 != uint64(i%2) {
			t.Fatalf("sender number %#x of end %d", n, i%2)
		}
		seen[n] = true
	}
	if len(seen) != 1000 {
		t.Errorf("%d of 1000 sender numbers differ", len(seen))
	}
	s := &session{ep: &endpoint{prefix: "_SINBOX.abc."}}
	if reply := s.reply(); reply != "" {
		t.Errorf("a session without a token has the subject %s", reply)
	}
	tokens := make(map[string]bool)
	for range 1000 {
		s.token = newToken(Token{Codec: JSON, LogPackets: 5, LogBytes: 16})
		reply := s.reply()
		got, err := ParseToken(lastToken(reply))
		if err != nil || got.Codec != JSON || got.LogPackets != 5 || got.LogBytes != 16 || remoteName(reply) != "_SINBOX.abc" {
			t.Fatalf("reply subject %s: %+v, %v", reply, got, err)
		}
		tokens[reply] = true
	}
	if len(tokens) != 1000 {
		t.Errorf("%d of 1000 tokens differ", len(tokens))
	}
}
