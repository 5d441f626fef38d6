package streamtest

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"
)

// A child is one run of a Process.
type child struct {
	cmd     *exec.Cmd
	in      io.WriteCloser // closed, it ends the child
	seq     int            // of the last question
	reports chan report
	done    chan struct{} // closed when the child has ended
}

// startChild starts a server and returns it with its port when it accepts connections.
func startChild(ord order) (*child, int, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, 0, fmt.Errorf("streamtest: %w", err)
	}
	cmd := exec.Command(exe)
	cmd.Args[0] = "nats-server"
	cmd.Env = append(os.Environ(), childEnv+"=1")
	cmd.Stderr = os.Stderr // shows a panic of the server
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, 0, fmt.Errorf("streamtest: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, 0, fmt.Errorf("streamtest: %w", err)
	}
	if err := startTied(cmd); err != nil {
		return nil, 0, fmt.Errorf("streamtest: %w", err)
	}
	c := &child{cmd: cmd, in: in, reports: make(chan report, 16), done: make(chan struct{})}
	go c.watch(out)
	err = json.NewEncoder(in).Encode(ord)
	var r report
	if err == nil {
		select {
		case r = <-c.reports:
		case <-c.done:
			// It may have reported the reason before.
			select {
			case r = <-c.reports:
			default:
				r.Error = "the server ended while it started"
			}
		case <-time.After(readyTimeout + 5*time.Second):
			r.Error = errNotReady.Error()
		}
		if r.Error != "" {
			err = errors.New(r.Error)
		}
	}
	if err != nil {
		c.kill()
		return nil, 0, fmt.Errorf("streamtest: %w", err)
	}
	return c, r.Port, nil
}

// watch takes the child's reports until it ends.
func (c *child) watch(out io.Reader) {
	defer close(c.done)
	for lines := bufio.NewReader(out); ; {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			break
		}
		var r report
		if b, ok := bytes.CutPrefix(line, []byte(reportMark)); ok && json.Unmarshal(b, &r) == nil {
			select {
			case c.reports <- r:
			default: // no call waits for it
			}
		}
	}
	_ = c.cmd.Wait() // it fails for every child that was killed
}

// ask returns the child's report on its state.
func (c *child) ask() (report, error) {
	c.seq++
	if _, err := fmt.Fprintln(c.in, c.seq); err != nil {
		return report{}, fmt.Errorf("streamtest: %w", err)
	}
	timeout := time.After(time.Second)
	for {
		select {
		case r := <-c.reports:
			if r.Seq == c.seq { // a reply with another number answers a question that has timed out
				return r, nil
			}
		case <-c.done:
			return report{}, fmt.Errorf("streamtest: %w", os.ErrProcessDone)
		case <-timeout:
			return report{}, fmt.Errorf("streamtest: %w", os.ErrDeadlineExceeded)
		}
	}
}

func (c *child) kill() {
	_ = c.cmd.Process.Kill() // it fails if the process has ended
	<-c.done
}

func (c *child) stop() {
	if c.terminate() == nil {
		select {
		case <-c.done:
		case <-time.After(10 * time.Second):
		}
	}
	c.kill()
}
