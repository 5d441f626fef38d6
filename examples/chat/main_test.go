package main

import (
	"bytes"
	"context"
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
	const want = `Alice hears: hello, this is Bob
Alice hears: the build is green
Bob hears: hello, this is Alice
Bob hears: how is the build?
Bob hears: bye
`
	if got := out.String(); got != want {
		t.Errorf("output is\n%s\nwant\n%s", got, want)
	}
}
