package main

import (
	"errors"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A clock wakes one goroutine at given times. time.Sleep is late by up to a millisecond in an idle process, many times the
// latency that is to be measured. A timer of the kernel wakes the goroutine like a message that arrives.
type clock struct {
	timer *os.File
	raw   syscall.RawConn
	buf   [8]byte
}

func newClock() (*clock, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("timerfd_create", err)
	}
	c := &clock{timer: os.NewFile(uintptr(fd), "timer")}
	if c.raw, err = c.timer.SyscallConn(); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// sleep returns when d has passed.
func (c *clock) sleep(d time.Duration) error {
	var set error
	err := c.raw.Control(func(fd uintptr) {
		set = unix.TimerfdSettime(int(fd), 0, &unix.ItimerSpec{Value: unix.NsecToTimespec(max(int64(d), 1))}, nil)
	})
	if err = errors.Join(err, set); err == nil {
		_, err = c.timer.Read(c.buf[:])
	}
	return err
}

func (c *clock) close() { c.timer.Close() }
