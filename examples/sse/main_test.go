package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/natsstream/stream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRun(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out bytes.Buffer
	if err := run(ctx, &out); err != nil {
		t.Fatalf("%v, after this output:\n%s", err, &out)
	}
	want := `without a model: 503 Service Unavailable
nonsense: 400 Bad Request, events []
{"tokens":3}: 200 OK, events ["{\"index\":0,\"text\":\"word0 \"}" "{\"index\":1,\"text\":\"word1 \"}" "{\"index\":2,\"text\":\"word2 \"}" "done" "{}"]
the browser left; the model heard: nats stream: close 4001 (canceled)
`
	if got := out.String(); got != want {
		t.Errorf("output is\n%s\nwant\n%s", got, want)
	}
}

func TestStatuses(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{nats.ErrNoResponders, http.StatusServiceUnavailable},
		{fmt.Errorf("wrapped: %w", context.DeadlineExceeded), http.StatusGatewayTimeout},
		{&stream.CloseError{Code: stream.CloseBadRequest}, http.StatusBadRequest},
		{&stream.CloseError{Code: stream.CloseTryAgainLater}, http.StatusTooManyRequests},
		{&stream.CloseError{Code: stream.CloseInternalServerErr}, http.StatusInternalServerError},
		{&stream.CloseError{Code: stream.CloseAbnormalClosure}, http.StatusBadGateway},
		{errors.New("any other"), http.StatusBadGateway},
	} {
		if got := statusOf(c.err); got != c.want {
			t.Errorf("%v: %d, want %d", c.err, got, c.want)
		}
	}
}
