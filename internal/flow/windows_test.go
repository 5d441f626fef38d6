package flow

import (
	"testing"

	"pgregory.net/rapid"
)

func TestResize(t *testing.T) {
	for _, tt := range []struct {
		name               string
		size               int64
		dry                bool
		room, share, floor int64
		want               int64
	}{
		{"doubles while there is room", 100, true, 1000, 10, 10, 200},
		{"takes the rest of the pool", 100, true, 30, 10, 10, 130},
		{"grows to its share of a full pool", 100, true, 0, 150, 10, 150},
		{"but at most doubles", 100, true, -50, 500, 10, 200},
		{"gives back what exceeds the pool", 100, true, -30, 10, 10, 70},
		{"but keeps its share", 100, true, -1000, 60, 10, 60},
		{"does not grow for a slow reader", 100, false, 1000, 500, 10, 100},
		{"shrinks for a slow reader if the pool is exceeded", 100, false, -1, 500, 10, 50},
		{"but not below the floor", 100, false, -1, 500, 70, 70},
		{"nor up to it", 100, false, -1, 500, 200, 100},
	} {
		if got := resize(tt.size, tt.dry, tt.room, tt.share, tt.floor); got != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, got, tt.want)
		}
	}
}

// First windows become smaller with the number of streams, and larger again when streams have gone.
func TestFirstWindows(t *testing.T) {
	p := NewWindows(4, 128)
	for i, want := range []uint64{64, 64, 32, 32, 16, 16, 16, 16, 8} {
		if got := p.First(64); got != want {
			t.Errorf("stream %d begins with %d, want %d", i, got, want)
		}
	}
	for range 100 {
		p.First(64)
	}
	if got := p.First(64); got != 4 {
		t.Errorf("one of many streams begins with %d, want 4", got)
	}
	for range 110 {
		p.Gone()
	}
	if got := p.First(64); got != 64 {
		t.Errorf("the first stream after that begins with %d, want 64", got)
	}
}

// A stream that is no longer busy does not count after two intervals.
func TestIdleWindowsDoNotCount(t *testing.T) {
	const pool, most = 1 << 20, 1 << 30
	p := NewWindows(1<<10, pool)
	now := int64(0)
	turn := func() {
		now += Interval
		p.Turn(now)
	}
	grow := func() (w Window) {
		w.Bytes, w.Packet = 1<<10, 100
		for range 50 {
			p.Resize(&w, true, most, most)
			if w.Bytes == pool {
				break
			}
		}
		return w
	}
	if w := grow(); w.Bytes != pool {
		t.Errorf("a window of %d, want the whole pool of %d", w.Bytes, pool)
	}
	if w := grow(); w.Bytes != pool/2 {
		t.Errorf("a second window of %d, want half of the pool of %d", w.Bytes, pool)
	}
	turn()
	if w := grow(); w.Bytes > pool/2 {
		t.Errorf("a window of %d beside two that were busy just now", w.Bytes)
	}
	turn()
	turn()
	if w := grow(); w.Bytes != pool {
		t.Errorf("a window of %d beside idle ones, want %d", w.Bytes, pool)
	}
	now += 10 * Interval
	p.Turn(now)
	if w := grow(); w.Bytes != pool {
		t.Errorf("a window of %d after a long silence, want %d", w.Bytes, pool)
	}
}

// Busy streams come to equal shares of the pool, from any windows, and use it up.
func TestBusyWindowsShareThePool(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const smallest, pool = 1 << 10, 1 << 20
		p := NewWindows(smallest, pool)
		all := make([]Window, rapid.IntRange(1, 200).Draw(t, "streams"))
		for i := range all {
			all[i].Bytes = smallest << rapid.IntRange(0, 9).Draw(t, "log2")
		}
		for round := range int64(100) {
			for i := range all {
				all[i].Packet = 100
				p.Resize(&all[i], true, 1<<19, 1<<30)
			}
			p.Turn((round + 1) * Interval)
		}
		share := min(uint64(pool/len(all)), 1<<19)
		for i := range all {
			if b := all[i].Bytes; b < share*9/10 || b > share*11/10 {
				t.Errorf("window %d of %d has %d bytes, want about %d", i, len(all), b, share)
			}
		}
	})
}

// A window has room for four packets, if half of the budget has for all of them.
func TestWindowHoldsFourPackets(t *testing.T) {
	p := NewWindows(1<<10, 1<<20)
	for range 10 {
		for range 20 {
			w := Window{Bytes: 1 << 18, Packet: 32 << 10}
			p.Resize(&w, false, 1<<20, 1<<30)
			if w.Bytes < 4*32<<10 {
				t.Fatalf("a window of %d bytes for packets of %d", w.Bytes, w.Packet)
			}
		}
	}
}
