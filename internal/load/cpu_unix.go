//go:build unix

package load

import (
	"syscall"
	"time"
)

// CPUTime is the processor time this process has used, in user code and in the
// kernel. Neighbours on the machine disturb it less than the clock.
func CPUTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
