package stream

import (
	"testing"
	"unsafe"
)

// The allocator has a size class for 768 bytes, and the next is for 896. Every idle stream of a consumer costs the difference if
// a Stream grows beyond.
func TestStreamFitsItsSizeClass(t *testing.T) {
	const class = 768
	size := unsafe.Sizeof(Stream{})
	t.Logf("a Stream has %d bytes of %d", size, class)
	if size > class {
		t.Errorf("a Stream has %d bytes, and its size class %d: keep what few streams need in a struct of its own, made on first use", size, class)
	}
}

// The mux looks at the first fields of a session for each packet. They lie on two cache lines, and its end of the ring on the
// next. The allocator aligns a Stream, and a session with its Writer, to cache lines.
func TestMuxFieldsLieTogether(t *testing.T) {
	const line = 64
	var s session
	if size := unsafe.Sizeof(uintptr(0)); size != 8 {
		return // what the processor caches differs
	}
	for name, end := range map[string]uintptr{
		"end":            unsafe.Offsetof(s.end) + unsafe.Sizeof(s.end),
		"controls":       unsafe.Offsetof(s.controls) + unsafe.Sizeof(s.controls),
		"sender":         unsafe.Offsetof(s.sender) + unsafe.Sizeof(s.sender),
		"received":       unsafe.Offsetof(s.bucket) + unsafe.Offsetof(s.bucket.received) + unsafe.Sizeof(s.bucket.received),
		"grantedPackets": unsafe.Offsetof(s.bucket) + unsafe.Offsetof(s.bucket.grantedPackets) + unsafe.Sizeof(s.bucket.grantedPackets),
		"park":           unsafe.Offsetof(s.bucket) + unsafe.Offsetof(s.bucket.park) + unsafe.Sizeof(s.bucket.park),
	} {
		if end > 2*line {
			t.Errorf("%s ends at byte %d, beyond the second cache line", name, end)
		}
	}
}
