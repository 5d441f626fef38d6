package stream_test

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/natsstream/stream/internal/lifecycle"
)

// TestMain fails the run if a goroutine is left after all tests, and stops it at a transition that the table of lifecycles
// lacks. checkLeaks looks for goroutines after each test.
func TestMain(m *testing.M) {
	lifecycle.Strict = true
	goleak.VerifyTestMain(m)
}
