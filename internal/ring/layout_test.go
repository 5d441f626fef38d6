package ring

import (
	"runtime"
	"testing"
	"unsafe"
	"weak"
)

// TestLayout: no cache line may hold words of both owners, wherever the Ring
// starts, and an idle ring must stay small.
func TestLayout(t *testing.T) {
	type R = Ring[*int]
	var r R
	const word = unsafe.Sizeof(uintptr(0)) // a Ring is aligned to words, so a line begins at a word
	producer := []uintptr{
		unsafe.Offsetof(r.slots), unsafe.Offsetof(r.slots) + 2*word, unsafe.Offsetof(r.link),
		unsafe.Offsetof(r.tail), unsafe.Offsetof(r.stop), unsafe.Offsetof(r.base),
	}
	consumer := []uintptr{
		unsafe.Offsetof(r.out), unsafe.Offsetof(r.out) + 2*word, unsafe.Offsetof(r.next),
		unsafe.Offsetof(r.head), unsafe.Offsetof(r.avail),
	}
	for start := uintptr(0); start < cacheLine; start += word {
		owner := map[uintptr]string{}
		for _, off := range producer {
			owner[(start+off)/cacheLine] = "producer"
		}
		for _, off := range consumer {
			if owner[(start+off)/cacheLine] == "producer" {
				t.Errorf("at address %d mod %d: offset %d of the consumer lies on a line of the producer", start, cacheLine, off)
			}
		}
		// Each side's own words fit in a line: at most two of them, badly placed.
		if len(owner) > 2 {
			t.Errorf("at address %d: the producer's words take %d lines", start, len(owner))
		}
	}
	if size := unsafe.Sizeof(r); size > 160 {
		t.Errorf("a Ring takes %d bytes, want at most 160", size)
	}
}

// TestWrap starts just below 2^32, so that positions wrap in every state:
// growing, grown, drained, with the consumer one or more segments behind.
func TestWrap(t *testing.T) {
	for _, limit := range []uint32{1, 3, 4, 100, 10_000} {
		for ahead := range uint32(70) {
			var r Ring[*uint32]
			r.Init(int(limit))
			start := ^ahead // 2^32 - 1 - ahead
			r.tail.Store(start)
			r.head.Store(start)
			r.stop, r.base, r.avail = start, start, start
			in, out := start, start
			for lap := range limit%97 + 40 {
				for range lap*7%limit + 1 {
					v := in
					if r.Push(&v) != (in-out < limit) {
						t.Fatalf("limit %d, start -%d: Push with %d queued", limit, ahead+1, in-out)
					}
					if v-out < limit {
						in++
					}
				}
				if r.Len() != int(in-out) || r.Pushed() != in {
					t.Fatalf("limit %d, start -%d: Len %d, Pushed %d", limit, ahead+1, r.Len(), r.Pushed())
				}
				for range lap*5%limit + 1 {
					v, ok := r.Pop()
					if ok != (in != out) || ok && *v != out {
						t.Fatalf("limit %d, start -%d: Pop = %v, %v, want %d", limit, ahead+1, v, ok, out)
					}
					if ok {
						out++
					}
				}
			}
		}
	}
}

// TestSegments: they double up to a maximum, are used in place once large
// enough, and are released once drained.
func TestSegments(t *testing.T) {
	const maxSlots = 4096 // 32 KiB of pointers, see the package comment
	var r Ring[*int]
	r.Init(1 << 20)
	if r.slots != nil {
		t.Error("slots before the first Push")
	}
	r.Push(nil)
	first := weak.Make(r.root.Load())
	want := 4
	for pushed := 1; pushed < 10*maxSlots; {
		if len(r.slots) != want {
			t.Fatalf("%d slots after %d pushes, want %d", len(r.slots), pushed, want)
		}
		for range want - 1 {
			r.Push(nil)
		}
		r.Push(nil) // the one that does not fit
		pushed += want
		want = min(2*want, maxSlots)
	}
	for range 5 {
		r.Pop()
	}
	runtime.GC()
	if first.Value() != nil {
		t.Error("a drained segment is kept alive")
	}
	for !r.Empty() {
		r.Pop()
	}
	slots := &r.slots[0]
	for range 10 {
		for range maxSlots {
			r.Push(nil)
		}
		for range maxSlots {
			r.Pop()
		}
	}
	if &r.slots[0] != slots || &r.out[0] != slots {
		t.Error("a segment that is large enough was replaced")
	}
}
