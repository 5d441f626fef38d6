package slab_test

import (
	"runtime"
	"testing"
	"time"

	"github.com/natsstream/stream/internal/poison"
	"github.com/natsstream/stream/internal/slab"
)

func mustGet(t *testing.T, n int) *slab.Slab {
	t.Helper()
	s := slab.Get(n)
	if s == nil {
		t.Fatalf("no slab of %d bytes with %d bytes live", n, slab.Live())
	}
	return s
}

// A slab is free when it was retired and every message is back, in either order.
func TestSlabIsUsedAgainOnceAllIsBack(t *testing.T) {
	for name, order := range map[string][]func(*slab.Slab){
		"retired first": {(*slab.Slab).Retire, (*slab.Slab).Release, (*slab.Slab).Release},
		"between":       {(*slab.Slab).Release, (*slab.Slab).Retire, (*slab.Slab).Release},
		"retired last":  {(*slab.Slab).Release, (*slab.Slab).Release, (*slab.Slab).Retire},
	} {
		s := mustGet(t, 1)
		s.Lend()
		s.Lend()
		s.Buf[7] = 1
		for i, step := range order {
			if other := mustGet(t, 1); other == s {
				t.Fatalf("%s: in use again after %d of 3 steps", name, i)
			} else {
				other.Retire()
			}
			step(s)
		}
		if again := mustGet(t, 1); again != s {
			t.Errorf("%s: the slab used last is not the next one", name)
		} else if overwritten := again.Buf[7] == poison.Byte; overwritten != poison.Enabled {
			t.Errorf("%s: overwritten %v, in a build with poison %v", name, overwritten, poison.Enabled)
		} else {
			again.Retire()
		}
	}
}

func TestSlabRestartsOnlyWithoutMessages(t *testing.T) {
	s := mustGet(t, 1)
	defer s.Retire()
	if !s.Restart(nil) {
		t.Error("a fresh slab does not restart")
	}
	s.Lend()
	if s.Restart(nil) {
		t.Error("restarted while a message is lent")
	}
	s.Share(1)
	s.Release()
	if s.Restart(nil) {
		t.Error("restarted while a message is shared")
	}
	s.Release()
	copy(s.Buf, "message, pending")
	if !s.Restart(s.Buf[9:16]) || string(s.Buf[:7]) != "pending" {
		t.Errorf("does not restart with what is pending, though all is back: %q", s.Buf[:16])
	}
	if overwritten := s.Buf[7] == poison.Byte; overwritten != poison.Enabled {
		t.Errorf("overwritten %v, in a build with poison %v", overwritten, poison.Enabled)
	}
}

func TestMessageIsGivenBackOnce(t *testing.T) {
	s := mustGet(t, 1)
	s.Lend()
	s.Retire()
	s.Release()
	defer func() {
		if recover() == nil {
			t.Error("a second release passes")
		}
	}()
	s.Release()
}

func TestSlabsHaveTwoSizes(t *testing.T) {
	for n, want := range map[int]int{0: slab.Size, slab.Size: slab.Size, slab.Size + 1: slab.LargeSize, slab.LargeSize: slab.LargeSize} {
		s := mustGet(t, n)
		if len(s.Buf) != want {
			t.Errorf("%d bytes for %d, want %d", len(s.Buf), n, want)
		}
		s.Retire()
	}
	if slab.Get(slab.LargeSize+1) != nil {
		t.Error("a slab larger than all")
	}
	(*slab.Slab)(nil).Release() // of a message in memory of its own
}

// The memory in slabs has a bound. Slabs that are never given back do not count once the garbage collector has taken
// them.
func TestSlabsHaveABound(t *testing.T) {
	var all []*slab.Slab
	for {
		s := slab.Get(slab.Size)
		if s == nil {
			break
		}
		if s.Lend(); len(all) > 1000 {
			t.Fatal("no bound")
		}
		all = append(all, s)
	}
	if !slab.Crowded() || slab.Live() > 32<<20 {
		t.Errorf("crowded %v with %d bytes", slab.Crowded(), slab.Live())
	}
	all[0].Retire()
	all[0].Release()
	if again := mustGet(t, 1); again != all[0] {
		t.Error("the one that is back is not used again")
	}
	clear(all)
	all = nil
	for end := time.Now().Add(20 * time.Second); slab.Live() > 4<<20; time.Sleep(time.Millisecond) {
		if runtime.GC(); time.Now().After(end) {
			t.Fatalf("%d bytes live, though nothing refers to them", slab.Live())
		}
	}
	mustGet(t, 1).Retire()
}
