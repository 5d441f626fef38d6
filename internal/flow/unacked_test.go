package flow

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// TestUnackedHoldsWhatIsNotAcknowledged compares it with a plain list over random operations, also where sequence
// numbers begin again at 0.
func TestUnackedHoldsWhatIsNotAcknowledged(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		first := rapid.SampledFrom([]uint32{0, 1, 1<<31 - 5, 1<<32 - 20}).Draw(t, "first")
		q := Unacked[uint32]{acked: first, next: first, cursor: first}
		var held []uint32 // the packets, each its own number, the oldest first
		acked, next, cursor := first, first, first
		asked, askedAt := uint32(0), int64(0)
		const patience = 10
		now := int64(1)
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			now += rapid.Int64Range(0, patience/2).Draw(t, "wait")
			step := rapid.IntRange(0, 4).Draw(t, "step")
			switch {
			case step == 0:
				behind := cursor != next
				for range rapid.IntRange(1, 20).Draw(t, "packets") {
					q.Push(next)
					held = append(held, next)
					next++
				}
				if !behind {
					cursor = next
				}
			case step == 1: // an acknowledgement: of some of them, an old one, or one of what was never sent
				seq := acked + uint32(rapid.IntRange(-3, len(held)+3).Draw(t, "acknowledged"))
				n := seq - acked
				if n > uint32(len(held)) {
					n = 0
				}
				var freed []uint32
				if got := q.Release(seq, func(p uint32) { freed = append(freed, p) }); got != n || len(freed) != int(n) {
					t.Fatalf("Release(%d) of %d to %d: %d packets, %d freed, want %d", seq, acked, next, got, len(freed), n)
				}
				for i, p := range freed {
					if p != held[i] {
						t.Fatalf("packet %d was freed, want %d", p, held[i])
					}
				}
				held, acked = held[n:], acked+n
				if all := slices.Collect(q.All()); !slices.Equal(all, held) {
					t.Fatalf("All: %d, want %d", all, held)
				}
				if int32(cursor-acked) < 0 {
					cursor = acked
				}
			case step == 2: // a request for everything from a packet on
				seq := acked + uint32(rapid.IntRange(-1, 2).Draw(t, "missing"))
				heard := seq == acked && len(held) > 0 && (askedAt == 0 || asked != seq || now-askedAt >= patience)
				lost := cursor - acked
				again, n := q.Again(seq, now, patience)
				if again != heard || heard && n != lost || !heard && n != 0 {
					t.Fatalf("Again(%d) with %d acknowledged: %v, %d lost; want %v, %d", seq, acked, again, n, heard, lost)
				}
				if heard && lost != 0 {
					cursor, asked, askedAt = seq, seq, now
				}
			case step == 3: // publish again, all or some
				for range rapid.IntRange(0, 30).Draw(t, "again") {
					p, ok := q.Missing()
					if ok != (cursor != next) || ok && p != cursor {
						t.Fatalf("Missing: %d, %v; want %d of %d", p, ok, cursor, next)
					}
					if !ok {
						break
					}
					q.Resent()
					cursor++
				}
			case step == 4 && cursor != next:
				q.GiveUp()
				cursor = next
			}
			if q.Acked() != acked || q.Next() != next || q.Cursor() != cursor || q.Empty() != (acked == next) || q.OnTheWay() != cursor-acked {
				t.Fatalf("%d, %d, %d; want %d acknowledged, %d next, cursor %d", q.Acked(), q.Next(), q.Cursor(), acked, next, cursor)
			}
		}
	})
}

// TestUnackedReplaces: a packet that is replaced is released in its place.
func TestUnackedReplaces(t *testing.T) {
	var q Unacked[string]
	for _, p := range []string{"a", "b", "c", "d", "e"} {
		q.Push(p)
	}
	var got []string
	free := func(p string) { got = append(got, p) }
	q.Release(1, free)
	q.Replace("c", "C")
	q.Replace("a", "A") // is not held any more
	q.Release(5, free)
	if want := []string{"a", "b", "C", "d", "e"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestUnackedSkipHoldsNothing: a packet that nobody acknowledges counts and is not kept.
func TestUnackedSkipHoldsNothing(t *testing.T) {
	var q Unacked[*int]
	for range 10 {
		q.Skip()
	}
	if q.Next() != 10 || !q.Empty() || q.OnTheWay() != 0 {
		t.Errorf("%d counted, %d on their way", q.Next(), q.OnTheWay())
	}
	if _, ok := q.Missing(); ok {
		t.Error("a packet that is not kept is missing")
	}
}

// TestUnackedForgetsWhatItReleases: a released packet can be collected.
func TestUnackedForgetsWhatItReleases(t *testing.T) {
	var q Unacked[*int]
	for range 6 {
		q.Push(new(int))
	}
	q.Release(4, func(*int) {})
	for seq, p := range q.packets {
		if held := seq >= 4 && seq < 6; (p != nil) != held {
			t.Errorf("slot %d holds a packet: %v, want %v", seq, p != nil, held)
		}
	}
}

// TestUnackedDoesNotAllocate: once it has held as many packets, nothing allocates.
func TestUnackedDoesNotAllocate(t *testing.T) {
	var q Unacked[*int]
	p := new(int)
	round := func() {
		for range 32 {
			q.Push(p)
		}
		q.Again(q.Acked(), 1, 0)
		for _, ok := q.Missing(); ok; _, ok = q.Missing() {
			q.Resent()
		}
		sum := 0
		q.Release(q.Next(), func(p *int) { sum += *p })
	}
	round()
	if n := testing.AllocsPerRun(1000, round); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
