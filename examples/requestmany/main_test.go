package main

import (
	"bytes"
	"context"
	"regexp"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRun(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out bytes.Buffer
	if err := run(ctx, &out); err != nil {
		t.Fatalf("%v, after this output:\n%s", err, &out)
	}
	// The old way gets three replies, or fewer where the machine is slower than its timeout; never all of them.
	want := regexp.MustCompile(`^request-many: [0-3] of 5 replies, and no error
stream: 5 of 5 replies, and the end is known
$`)
	if !want.MatchString(out.String()) {
		t.Errorf("output is\n%s\nwant a match of\n%s", &out, want)
	}
}
