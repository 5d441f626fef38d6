package main

import (
	"bytes"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
)

// machine names the machine and the versions that the figures depend on.
func machine() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d cores, %s/%s, %s", runtime.GOMAXPROCS(0), runtime.GOOS, runtime.GOARCH, runtime.Version())
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			if name, ok := measured[d.Path]; ok {
				fmt.Fprintf(&b, ", %s %s", name, d.Version)
			}
		}
	}
	return b.String()
}

// measured are the modules that are named, with their versions, beside the figures.
var measured = map[string]string{
	"github.com/nats-io/nats-server/v2":      "nats-server",
	"github.com/nats-io/nats.go":             "nats.go",
	"github.com/synadia-io/orbit.go/natsext": "orbit.go natsext",
	"github.com/livekit/psrpc":               "psrpc",
	"google.golang.org/grpc":                 "grpc-go",
	"connectrpc.com/connect":                 "connect-go",
	"github.com/hashicorp/yamux":             "yamux",
	"github.com/quic-go/quic-go":             "quic-go",
}

// residentMiB is the memory of this process that is in RAM, 0 if the system does not tell.
func residentMiB() float64 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(status) {
		if rest, ok := strings.CutPrefix(string(line), "VmRSS:"); ok {
			kib, _ := strconv.ParseFloat(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 64)
			return kib / 1024
		}
	}
	return 0
}
