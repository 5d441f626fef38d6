package poison_test

import (
	"bytes"
	"testing"

	"github.com/natsstream/stream/internal/poison"
	"github.com/natsstream/stream/internal/race"
)

func TestFillOverwritesInItsBuildsOnly(t *testing.T) {
	b := []byte("record")
	poison.Fill(b)
	if overwritten := bytes.Count(b, []byte{poison.Byte}) == len(b); overwritten != poison.Enabled || !overwritten && string(b) != "record" {
		t.Errorf("with Enabled %v: %q", poison.Enabled, b)
	}
	if race.Enabled && !poison.Enabled {
		t.Error("race builds overwrite nothing")
	}
}
