//go:build !unix

package e2e

import "time"

// CPUTime is not known on this system.
func CPUTime() time.Duration { return 0 }
