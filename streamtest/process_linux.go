package streamtest

import (
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// startTied starts cmd so that the kernel kills it when this process ends. The end of its standard input does so too,
// but not while it is paused.
func startTied(cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	// The kernel kills it at the end of the thread that started it. A goroutine that is locked to its thread ends the
	// thread with itself, and the caller's goroutine may be locked.
	started := make(chan error)
	go func() { started <- cmd.Start() }()
	return <-started
}

// awaitStop returns when the process is stopped or has ended.
func awaitStop(pid int) {
	for unix.Waitid(unix.P_PID, pid, nil, unix.WSTOPPED|unix.WNOWAIT, nil) == unix.EINTR {
	}
}
