package race_test

import (
	"runtime/debug"
	"testing"

	"github.com/natsstream/stream/internal/race"
)

// TestEnabledIsTrueInRaceBuildsOnly compares the constant with what the go command recorded about the build.
func TestEnabledIsTrueInRaceBuildsOnly(t *testing.T) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		t.Fatal("the test binary holds no build information")
	}
	built := false
	for _, s := range info.Settings {
		if s.Key == "-race" {
			built = s.Value == "true"
		}
	}
	if race.Enabled != built {
		t.Errorf("Enabled is %v in a build with -race=%v", race.Enabled, built)
	}
}
