//go:build !(darwin || dragonfly || freebsd || linux || netbsd || openbsd)

package tap

// mayWriteNow is set if this system can write without waiting.
const mayWriteNow = false

func writeNow(uintptr, []byte) int { return 0 }
