//go:build unix

package streamtest

import (
	"fmt"
	"os"
	"syscall"
)

func (c *child) signal(sig os.Signal) error {
	if err := c.cmd.Process.Signal(sig); err != nil {
		return fmt.Errorf("streamtest: %w", err)
	}
	return nil
}

func (c *child) terminate() error {
	if err := c.signal(syscall.SIGTERM); err != nil {
		return err
	}
	return c.resume() // a paused process does not see the signal
}

func (c *child) lameDuck() error { return c.signal(syscall.SIGUSR2) }

func (c *child) pause() error {
	err := c.signal(syscall.SIGSTOP)
	if err == nil {
		awaitStop(c.cmd.Process.Pid)
	}
	return err
}

func (c *child) resume() error { return c.signal(syscall.SIGCONT) }
