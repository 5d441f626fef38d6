package wheel_test

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/natsstream/stream/internal/wheel"
)

type item struct {
	id   int
	node wheel.Node[item]
}

func newWheel(tick time.Duration) *wheel.Wheel[item] {
	w := new(wheel.Wheel[item])
	w.Init(tick, func(x *item) *wheel.Node[item] { return &x.node })
	return w
}

// oracle is a list of items sorted by the time at which the wheel said that they are due.
type oracle []*item

func (o *oracle) remove(x *item) {
	*o = slices.DeleteFunc(*o, func(y *item) bool { return y == x })
}

// check holds the wheel to the list: the same items, each once, none of them overdue at now.
func (o oracle) check(t *testing.T, w *wheel.Wheel[item], now int64) {
	t.Helper()
	slices.SortFunc(o, func(a, b *item) int { return int(a.node.Due() - b.node.Due()) })
	if w.Len() != len(o) {
		t.Fatalf("%d items on the wheel, want %d", w.Len(), len(o))
	}
	if len(o) > 0 && o[0].node.Due() <= now {
		t.Fatalf("item %d was due at %d and is on the wheel at %d", o[0].id, o[0].node.Due(), now)
	}
	all := slices.SortedFunc(w.All(), func(a, b *item) int { return a.id - b.id })
	want := slices.SortedFunc(slices.Values(o), func(a, b *item) int { return a.id - b.id })
	if !slices.Equal(all, want) {
		t.Fatalf("All yields %d items that differ from the %d that were set", len(all), len(want))
	}
}

// TestWheelGivesOutWhatIsDue compares a wheel with a sorted list over random operations: an item comes off when Due
// says so, which is no earlier than it was set for, unless that is further ahead than the wheel reaches, and within a
// tick after.
func TestWheelGivesOutWhatIsDue(t *testing.T) {
	rounds := 60
	if testing.Short() {
		rounds = 10
	}
	for seed := range rounds {
		r := rand.New(rand.NewPCG(uint64(seed), 1))
		tick := 1 + r.Int64N(20)
		reach := wheel.Slots * tick
		w := newWheel(time.Duration(tick))
		items := make([]item, 20)
		for i := range items {
			items[i].id = i
		}
		var on oracle
		now, passed := int64(0), int64(0) // passed is the begin of the last tick that the wheel has passed for certain
		set := func(x *item, at int64) {
			old := x.node.Due()
			w.Set(x, at)
			due := x.node.Due()
			switch {
			case old != 0 && due > old:
				t.Fatalf("seed %d: Set for %d put off an item that was due at %d to %d", seed, at, old, due)
			case old != 0 && due == old:
			case due%tick != 0:
				t.Fatalf("seed %d: due at %d, which is no begin of a tick of %d", seed, due, tick)
			case due <= at && due < passed+reach-tick:
				t.Fatalf("seed %d: set for %d at %d, and due at %d", seed, at, passed, due)
			case due > max(at, now)+tick:
				t.Fatalf("seed %d: set for %d at %d, and due only at %d", seed, at, now, due)
			}
			on.remove(x)
			on = append(on, x)
		}
		for range 500 {
			x := &items[r.IntN(len(items))]
			switch r.IntN(4) {
			case 0, 1:
				set(x, now-tick+r.Int64N(2*reach))
			case 2:
				w.Remove(x)
				on.remove(x)
				if x.node.Due() != 0 {
					t.Fatalf("seed %d: a removed item is due at %d", seed, x.node.Due())
				}
			default:
				step := []int64{tick, 20 * tick, 3 * reach}[r.IntN(3)]
				now += r.Int64N(step)
				slept := now/tick-passed/tick > wheel.Slots // then ticks come in no order
				due := make(map[*item]int64)
				for _, x := range on {
					due[x] = x.node.Due()
				}
				last := int64(0)
				w.Advance(now, func(x *item) {
					at, ok := due[x]
					switch {
					case !ok:
						t.Fatalf("seed %d: item %d came off and was not on the wheel", seed, x.id)
					case at > now:
						t.Fatalf("seed %d: item %d came off at %d and was due at %d", seed, x.id, now, at)
					case at < last && !slept:
						t.Fatalf("seed %d: item %d, due at %d, came after one due at %d", seed, x.id, at, last)
					}
					last = max(last, at)
					delete(due, x)
					on.remove(x)
					switch y := &items[r.IntN(len(items))]; r.IntN(4) {
					case 0:
						y = x // set again, as an owner does that looked too early
						fallthrough
					case 1:
						set(y, now+r.Int64N(2*reach))
						if y.node.Due() <= now { // it was due already, or is out of reach while the wheel is behind
							due[y] = y.node.Due()
						}
					case 2:
						w.Remove(y)
						on.remove(y)
						delete(due, y)
					}
				})
				passed = now - now%tick
			}
			on.check(t, w, passed)
		}
	}
}

// TestWheelGivesOutAgainWhatWasSetForThePast: f may set an item for a time that has passed. It comes in the next tick,
// so an Advance over several ticks ends.
func TestWheelGivesOutAgainWhatWasSetForThePast(t *testing.T) {
	w := newWheel(10)
	var x item
	w.Set(&x, 0)
	calls := 0
	w.Advance(55, func(x *item) {
		calls++
		w.Set(x, 0)
	})
	if calls != 5 || x.node.Due() != 60 {
		t.Errorf("%d calls in five ticks, due next at %d", calls, x.node.Due())
	}
}

// TestWheelLetsAllBeRemovedWhileItYields: each item may be removed once it was yielded.
func TestWheelLetsAllBeRemovedWhileItYields(t *testing.T) {
	w := newWheel(10)
	items := make([]item, 100)
	for i := range items {
		w.Set(&items[i], int64(i/3*100))
	}
	n := 0
	for x := range w.All() {
		w.Remove(x)
		n++
	}
	if n != len(items) || w.Len() != 0 {
		t.Errorf("%d items yielded, %d left", n, w.Len())
	}
	w.Set(&items[0], 0)
	w.Set(&items[1], 0)
	for range w.All() {
		break
	}
	if w.Len() != 2 {
		t.Errorf("%d items on the wheel, want 2", w.Len())
	}
}

// TestWheelDoesNotAllocate: no operation allocates.
func TestWheelDoesNotAllocate(t *testing.T) {
	w := newWheel(10)
	items := make([]item, 10)
	now := int64(0)
	f := func(x *item) { w.Set(x, now+500) }
	for i := range items {
		w.Set(&items[i], int64(i*50))
	}
	if n := testing.AllocsPerRun(1000, func() {
		now += 100
		w.Advance(now, f)
		w.Remove(&items[3])
		w.Set(&items[3], now)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
