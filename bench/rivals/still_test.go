package main

import (
	"errors"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A fakeLane carries records through a channel.
type fakeLane struct {
	records chan []byte
	done    chan struct{}
	sent    int
	lose    func(n int) bool // whether the record with this number, from 1, is lost
	block   int              // the send of the record with this number does not return; 0: each returns
	end     int              // the number of records after which the reader ends, 0: never
	failure error            // of the reader that ends
	pause   time.Duration    // of each send
	hold    time.Duration    // of the second send, and a sixth of it before that record arrives
}

func (l *fakeLane) send(rec []byte) error {
	l.sent++
	if l.sent == l.block {
		<-l.done
		return errors.New("closed")
	}
	time.Sleep(l.pause)
	if l.sent == 2 {
		time.Sleep(l.hold)
	}
	if l.lose == nil || !l.lose(l.sent) {
		select {
		case l.records <- slices.Clone(rec):
		case <-l.done:
		}
	}
	return nil
}

func (l *fakeLane) flush() error { return nil }

func (l *fakeLane) receive(take func([]byte)) error {
	for n := 1; ; n++ {
		select {
		case rec := <-l.records:
			if n == 2 {
				time.Sleep(l.hold / 6)
			}
			take(rec)
			if n == l.end {
				return l.failure
			}
		case <-l.done:
			return nil
		}
	}
}

// fakeRival has lanes like the given one.
func fakeRival(lossy bool, like fakeLane) rival {
	return rival{name: "fake", lossy: lossy, open: func(_ *env, streams int) ([]lane, func(), error) {
		done := make(chan struct{})
		lanes := make([]lane, streams)
		for i := range lanes {
			l := like
			l.records, l.done = make(chan []byte, 10_000), done
			lanes[i] = &l
		}
		return lanes, func() { close(done) }, nil
	}}
}

func never(int) bool { return false }

func always(int) bool { return true }

func after(k int) func(int) bool { return func(n int) bool { return n > k } }

// Every run ends by itself, also if records are lost, a producer is held up, a stream breaks off, or the rival is too
// slow. A rival that may lose records is shown with its share. Any other fails.
func TestRunsEndByThemselves(t *testing.T) {
	short := limits{sending: time.Minute, patience: 2 * time.Second, tail: time.Second}
	hasty := short
	hasty.sending = 500 * time.Millisecond
	broken := errors.New("broken")
	for name, c := range map[string]struct {
		lossy bool
		lane  fakeLane
		mode  mode
		n     int
		l     limits
		want  run // without its time
		some  int // if not 0, fewer than n are sent, and so many arrive. -1: all of them
		err   string
		spent bool
	}{
		"all arrive":                      {lane: fakeLane{lose: never}, n: 100, l: short, want: run{sent: 100}},
		"one is lost":                     {lane: fakeLane{lose: func(n int) bool { return n == 3 }}, n: 100, l: short, err: "got record 3, want record 2", spent: true},
		"one is lost, lossy":              {lossy: true, lane: fakeLane{lose: func(n int) bool { return n == 3 }}, n: 100, l: short, want: run{sent: 100, lost: 1}},
		"the last are lost":               {lane: fakeLane{lose: after(90)}, n: 100, l: short, err: "10 of 100 records are missing", spent: true},
		"the last are lost, lossy":        {lossy: true, lane: fakeLane{lose: after(90)}, n: 100, l: short, want: run{sent: 100, lost: 10}, spent: true},
		"all are lost, lossy":             {lossy: true, lane: fakeLane{lose: always}, n: 100, l: short, want: run{sent: 100, lost: 100}, spent: true},
		"a full window is lost, lossy":    {lossy: true, lane: fakeLane{lose: after(5)}, mode: inTurn, n: 5000, l: short, some: 5, spent: true},
		"the last is late, lossy":         {lossy: true, lane: fakeLane{hold: 1500 * time.Millisecond}, n: 2, l: short, want: run{sent: 2}},
		"a full window is lost":           {lane: fakeLane{lose: after(5)}, mode: inTurn, n: 5000, l: short, err: "the producer stands still", spent: true},
		"a send blocks":                   {lane: fakeLane{block: 7}, n: 100, l: short, err: "the producer stands still", spent: true},
		"a send blocks, lossy":            {lossy: true, lane: fakeLane{block: 7}, n: 100, l: short, err: "the producer stands still", spent: true},
		"the stream ends":                 {lane: fakeLane{end: 5}, n: 100, l: short, err: "a stream ended by itself", spent: true},
		"the stream ends, lossy":          {lossy: true, lane: fakeLane{end: 5}, n: 100, l: short, want: run{sent: 100, lost: 95}, spent: true},
		"the reader fails":                {lane: fakeLane{end: 5, failure: broken}, n: 100, l: short, err: "broken", spent: true},
		"the reader fails, lossy":         {lossy: true, lane: fakeLane{end: 5, failure: broken}, n: 100, l: short, want: run{sent: 100, lost: 95}, spent: true},
		"too slow for its time":           {lane: fakeLane{pause: 5 * time.Millisecond}, n: 100_000, l: hasty, some: -1, spent: true},
		"too slow for its time, in turns": {lane: fakeLane{pause: 5 * time.Millisecond}, mode: inTurn, n: 100_000, l: hasty, some: -1, spent: true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, err := newSession(nil, fakeRival(c.lossy, c.lane), 32, 1, c.mode)
				if err != nil {
					t.Fatal(err)
				}
				defer s.close()
				got, err := s.run(c.n, c.l)
				if c.err != "" {
					if err == nil || !strings.Contains(err.Error(), c.err) {
						t.Errorf("error %v, want %q", err, c.err)
					}
				} else if err != nil {
					t.Error(err)
				}
				got.took = 0
				if c.some != 0 && got.sent < c.n && (got.arrived() == c.some || c.some < 0 && got.lost == 0 && got.sent > 0) {
					c.want = got
				}
				if got != c.want {
					t.Errorf("%+v, want %+v", got, c.want)
				}
				if s.spent() != c.spent {
					t.Errorf("spent: %v, want %v", s.spent(), c.spent)
				}
			})
		})
	}
}

// A paced run of a rival that is too slow for its pace ends, and has the delays of the records that were sent.
func TestPacedRunsEndByThemselves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, err := newSession(nil, fakeRival(false, fakeLane{pause: 2 * time.Millisecond}), 32, 2, atPace)
		if err != nil {
			t.Fatal(err)
		}
		defer s.close()
		r, delays, err := s.pace(10_000, 10*time.Second, limits{sending: time.Second, patience: patience, tail: tail})
		if err != nil || r.sent == 0 || r.sent > 1000 || len(delays) != r.sent {
			t.Errorf("%+v, %d delays, %v", r, len(delays), err)
		}
	})
}

// testBounds are short.
var testBounds = bounds{
	open: time.Second, close: time.Second, all: time.Minute,
	run: limits{sending: time.Minute, patience: 2 * time.Second, tail: time.Second},
}

func noWarmUp(*session) error { return nil }

// A session that fails is replaced. Its rival keeps the figures of its other runs, with a note. It is left out after a
// third failure.
func TestFailedRunsAreRepeatedWithAnotherSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opened := 0
		r := fakeRival(false, fakeLane{})
		sound := r.open
		r.open = func(e *env, streams int) ([]lane, func(), error) {
			if opened++; opened == 2 || opened >= 4 {
				return fakeRival(false, fakeLane{lose: after(3)}).open(e, streams)
			}
			return sound(e, streams)
		}
		s := newSeat(new(env), r, 32, 1, together, testBounds, noWarmUp)
		defer s.close()
		once := func(x *session) error { _, err := x.run(10, testBounds.run); return err }
		var good []bool
		for round := range 7 {
			good = append(good, s.run(once))
			if round == 0 || round == 2 {
				s.close() // as if it had lost records
			}
		}
		if want := []bool{true, false, true, false, false, false, false}; !slices.Equal(good, want) || s.done != 2 || !s.over() {
			t.Errorf("good: %v, want %v; %d done, over: %v", good, want, s.done, s.over())
		}
		if len(s.notes) != 1 || !strings.Contains(s.notes[0], "7 of 10 records are missing") {
			t.Errorf("notes: %q", s.notes)
		}
	})
}

// If a warm-up fails, the time of a record is not known, so the next session warms up as well.
func TestWarmUpsAreRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tries := 0
		s := newSeat(new(env), fakeRival(false, fakeLane{}), 32, 1, together, testBounds, func(*session) error {
			if tries++; tries == 1 {
				return errors.New("cold")
			}
			return nil
		})
		defer s.close()
		for range 2 {
			if !s.prepare() {
				t.Fatal(s.notes)
			}
			s.close()
		}
		if tries != 2 || s.failures != 1 {
			t.Errorf("%d warm-ups, %d failures, want 2 and 1", tries, s.failures)
		}
	})
}

// A rival that may lose records gets another session after a loss, and that is no failure.
func TestLossesAreNoFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSeat(new(env), fakeRival(true, fakeLane{lose: after(30)}), 32, 1, together, testBounds, noWarmUp)
		defer s.close()
		lost := 0
		for range 5 {
			if !s.run(func(x *session) error { r, err := x.run(40, testBounds.run); lost += r.lost; return err }) {
				t.Fatal(s.notes)
			}
		}
		if lost != 50 || s.failures != 0 {
			t.Errorf("%d lost, %d failures", lost, s.failures)
		}
	})
}

// If the streams of a rival do not open in time, or do not end, the run goes on without the rival, and a note gives the
// reason. Streams that open too late are closed.
func TestStuckRivalsAreLeftBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stuck := make(chan struct{})
		var closed atomic.Int32
		r := fakeRival(false, fakeLane{})
		sound := r.open
		r.open = func(e *env, streams int) ([]lane, func(), error) {
			<-stuck
			lanes, closer, err := sound(e, streams)
			return lanes, func() { closer(); closed.Add(1) }, err
		}
		s := newSeat(new(env), r, 32, 1, together, testBounds, noWarmUp)
		if s.prepare() || !s.over() || len(s.notes) != 1 || !strings.Contains(s.notes[0], "to open the streams took longer than 1s") {
			t.Errorf("over: %v, notes: %q", s.over(), s.notes)
		}
		close(stuck)
		for closed.Load() != maxFailures {
			time.Sleep(time.Millisecond) // the test ends after its timeout if a session stays
		}

		held := make(chan struct{})
		defer close(held)
		r.open = func(e *env, streams int) ([]lane, func(), error) {
			lanes, closer, err := sound(e, streams)
			return lanes, func() { closer(); <-held }, err
		}
		s = newSeat(new(env), r, 32, 1, together, testBounds, noWarmUp)
		if !s.prepare() {
			t.Fatal(s.notes)
		}
		s.close()
		if len(s.notes) != 1 || !strings.Contains(s.notes[0], "to close took longer than 1s") {
			t.Errorf("notes: %q", s.notes)
		}
	})
}

// A rival that has used up its time keeps the figures that it has.
func TestSlowRivalsGetFewerRounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := testBounds
		b.all = 50 * time.Millisecond
		s := newSeat(new(env), fakeRival(false, fakeLane{}), 32, 1, together, b, noWarmUp)
		defer s.close()
		rounds := 0
		for range 10 {
			s.run(func(*session) error { rounds++; time.Sleep(30 * time.Millisecond); return nil })
		}
		if rounds > 2 || s.done != rounds || !s.over() || len(s.notes) != 1 || !strings.HasPrefix(s.notes[0], "stopped after ") {
			t.Errorf("%d rounds, %d done, notes: %q", rounds, s.done, s.notes)
		}
	})
}

// An answer that never comes ends the measurement.
func TestMissingAnswersEndTheAsking(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		held := make(chan struct{})
		defer close(held)
		if n, err := askFor(func([]byte) error { <-held; return nil }, 2, time.Millisecond, 50*time.Millisecond); err == nil || n != 0 {
			t.Errorf("%d answers, %v", n, err)
		}
	})
}

// Figures of rounds are compared round by round, and a failed round is left out.
func TestRatiosPairRounds(t *testing.T) {
	nan := median(nil) / median(nil)
	if got := ratio([]float64{10, nan, 30}, []float64{5, 1, nan}); got != 2 {
		t.Errorf("ratio %v, want 2", got)
	}
	if got := ratio([]float64{10}, []float64{nan}); got != 0 {
		t.Errorf("ratio %v without a pair, want 0", got)
	}
}

// testCells are cells without a measurement.
func testCells(ran *[]string, names ...string) (cells []cell) {
	for _, name := range names {
		cells = append(cells, cell{name, time.Second, func(_ *env, o options, found *results) {
			o.progress(name, time.Second)
			*ran = append(*ran, name)
			found.Opens = append(found.Opens, opens{Name: name})
		}})
	}
	return cells
}

// A run that was interrupted goes on with its finished cells. With other flags, on another machine or at another
// revision it does not.
func TestInterruptedRunsGoOn(t *testing.T) {
	file := t.TempDir() + "/unfinished.json"
	var ran []string
	cells := testCells(&ran, "a", "b", "c")
	o := options{rounds: 3}
	found := newResults(o)
	interrupted := errors.New("interrupted")
	if err := measure(t.TempDir(), o, cells, found, func() error {
		if len(ran) == 2 {
			return interrupted
		}
		return found.save(file)
	}); err != interrupted {
		t.Fatal(err)
	}
	fresh := newResults(o)
	found, err := resume(file, fresh)
	if err != nil {
		t.Fatal(err)
	}
	ran = nil
	if err := measure(t.TempDir(), o, cells, found, func() error { return found.save(file) }); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(ran, []string{"b", "c"}) || !slices.Equal(found.Cells, []string{"a", "b", "c"}) || len(found.Opens) != 3 {
		t.Errorf("measured %q, have %q and %d results", ran, found.Cells, len(found.Opens))
	}
	if again, err := readResults(file); err != nil || !reflect.DeepEqual(again, found) {
		t.Errorf("stored %+v, %v; want %+v", again, err, found)
	}
	others := map[string]func(*results){
		"flags":    func(r *results) { r.Flags += " -rounds 4" },
		"machine":  func(r *results) { r.Machine += ", another" },
		"revision": func(r *results) { r.Revision += "-dirty" },
	}
	for what, change := range others {
		other := *fresh
		change(&other)
		if _, err := resume(file, &other); err == nil || !strings.Contains(err.Error(), "without -resume") {
			t.Errorf("a run with another %s: %v", what, err)
		}
	}
	if _, err := resume(file+"x", fresh); err == nil || !strings.Contains(err.Error(), "without -resume") {
		t.Errorf("without a file: %v", err)
	}
}

// The whole run fits into its time, and each cell has a name of its own.
func TestPlanFitsIntoItsTime(t *testing.T) {
	cells := plan(defaults())
	if d := total(cells); d > 40*time.Minute || d < 5*time.Minute {
		t.Errorf("a run takes %v", d)
	}
	var names []string
	for _, c := range cells {
		names = append(names, c.name)
	}
	slices.Sort(names)
	if len(slices.Compact(slices.Clone(names))) != len(names) {
		t.Errorf("two cells have the same name: %q", names)
	}
}

// Remarks and missing figures of the library are errors of a run, and those of a rival are not.
func TestFaultsAreThoseOfTheLibrary(t *testing.T) {
	found := &results{
		Throughput: []throughput{{Rival: "psrpc", outcome: outcome{Reason: "stands still"}}, {Rival: "stream"}},
		Idle:       []idle{{Name: "stream, handler", Streams: 5}},
	}
	if err := found.faults(); err != nil {
		t.Error(err)
	}
	found.Idle[0].Notes = []string{"1 of 5 streams ended by themselves"}
	found.Paced = []paced{{Rival: "stream, fast", outcome: outcome{Reason: "lost"}}}
	if err := found.faults(); err == nil || strings.Count(err.Error(), "\n") != 1 {
		t.Errorf("%v, want two errors", err)
	}
}
