//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package tap

import "syscall"

// mayWriteNow is set if this system can write without waiting.
const mayWriteNow = true

// writeNow writes to a socket without waiting, also if somebody has put its descriptor into blocking mode, as
// [os.File.Fd] does. It returns a number below 0 for an error.
func writeNow(fd uintptr, data []byte) int {
	n, err := syscall.SendmsgN(int(fd), data, nil, nil, syscall.MSG_DONTWAIT)
	if err != nil {
		return -1
	}
	return n
}
