package flow

import "testing"

// Envelopes begin small, grow as they arrive, and become smaller if they do not.
func TestEnvelopesGrowAsTheyArrive(t *testing.T) {
	type event struct {
		at     int64 // in seconds
		passed int
		lost   int
		most   int // afterwards
	}
	for name, events := range map[string][]event{
		"nothing is known":              {{at: 0, most: FirstEnvelope}},
		"small ones arrive":             {{passed: 300, most: FirstEnvelope}, {passed: FirstEnvelope, most: 2 * FirstEnvelope}},
		"they grow to the largest":      {{passed: 20 << 10, most: MaxEnvelope}, {passed: MaxEnvelope, most: MaxEnvelope}},
		"a smaller one changes nothing": {{passed: 5000, most: 10_000}, {passed: 100, most: 10_000}},
		"the first is lost":             {{lost: 200, most: 0}, {at: 2, most: FirstEnvelope}},
		"a larger one is lost":          {{passed: 5000, most: 10_000}, {lost: 9000, most: 5000}, {lost: 9500, most: 5000}, {at: 2, most: 10_000}},
		"and again": {{passed: 5000, most: 10_000}, {lost: 9000, most: 5000}, {at: 2, most: 10_000}, {at: 2, lost: 9000, most: 5000},
			{at: 9, most: 5000}, {at: 10, most: 10_000}},
		"and then passes": {{passed: 5000, most: 10_000}, {lost: 9000, most: 5000}, {at: 2, passed: 9000, most: 18_000}, {at: 2, lost: 12_000, most: 9000},
			{at: 3, most: 18_000}},
		"one of a size that passes is lost": {{passed: 5000, most: 10_000}, {at: 3, lost: 4000, most: 10_000}},
		"none arrives any more":             {{passed: 5000, most: 10_000}, {at: 4, lost: 4000, most: 0}, {at: 5, most: FirstEnvelope}},
	} {
		var e Envelopes
		for i, ev := range events {
			now := ev.at * second
			if ev.passed != 0 {
				e.Passed(ev.passed, now)
			}
			if ev.lost != 0 {
				e.Lost(ev.lost, now)
			}
			if got := e.Most(now); got != ev.most {
				t.Errorf("%s: at most %d after event %d, want %d", name, got, i, ev.most)
			}
		}
	}
}

// However often envelopes are lost, they are tried again.
func TestEnvelopesAreTriedAgain(t *testing.T) {
	var e Envelopes
	now := int64(1)
	for range 100 {
		e.Lost(200, now)
		now += maxEnvelopeWait
		if e.Most(now) == 0 {
			t.Fatalf("none after %d s", maxEnvelopeWait/second)
		}
	}
}
