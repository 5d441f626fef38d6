package main

import (
	"testing"

	"go.uber.org/goleak"

	"github.com/natsstream/stream/streamtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The checks hold for the server that the module requires.
func TestCheck(t *testing.T) {
	s := streamtest.RunProcess(t)
	version, err := check(s.URL(), func() error {
		s.Kill()
		return s.Restart()
	})
	if err != nil {
		t.Fatal(err)
	}
	if version == "" {
		t.Error("the server has no version")
	}
}
