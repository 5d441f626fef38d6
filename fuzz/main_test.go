package fuzz

import (
	"testing"

	"github.com/natsstream/stream/internal/lifecycle"
)

// TestMain makes a transition that the table of lifecycles lacks stop the run.
func TestMain(m *testing.M) {
	lifecycle.Strict = true
	m.Run()
}
