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
	const want = `consumer: nats stream: close 4000 (bad request): no job named "../build.log"
consumer: fetch
consumer: compile
consumer: test
consumer: context canceled
producer: nats stream: close 4001 (canceled)
`
	if got := out.String(); got != want {
		t.Errorf("output is\n%s\nwant\n%s", got, want)
	}
}
