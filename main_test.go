package stream_test

import (
	"testing"

	"go.uber.org/goleak"
)

// TestMain fails the run where a goroutine is left after all tests. checkLeaks does so for each of them.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
