//go:build !linux

package streamtest

import "os/exec"

func startTied(cmd *exec.Cmd) error { return cmd.Start() }

func awaitStop(int) {}
