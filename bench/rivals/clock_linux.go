package main

import (
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A clock wakes one goroutine in a fixed rhythm. time.Sleep is late by up to a millisecond in an idle process, many
// times the latency that is to be measured. A timer of the kernel wakes the goroutine like a message that arrives.
type clock struct {
	timer *os.File
	buf   [8]byte
}

// newClock starts a clock that ticks from now on.
func newClock(every time.Duration) (*clock, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("timerfd_create", err)
	}
	c := &clock{timer: os.NewFile(uintptr(fd), "timer")}
	tick := unix.NsecToTimespec(int64(every))
	if err := unix.TimerfdSettime(fd, 0, &unix.ItimerSpec{Interval: tick, Value: tick}, nil); err != nil {
		c.close()
		return nil, os.NewSyscallError("timerfd_settime", err)
	}
	return c, nil
}

// wait returns at the next tick, or at once if there was one since the last call.
func (c *clock) wait(time.Duration) error {
	_, err := c.timer.Read(c.buf[:])
	return err
}

func (c *clock) close() { c.timer.Close() }
