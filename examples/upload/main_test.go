package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
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
	digest := sha256.New() // of what run sends, without a stream
	if _, err := io.CopyN(digest, rand.NewChaCha8([32]byte{}), size); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%d bytes arrived, SHA-256 %x at both ends\n", size, digest.Sum(nil))
	if got := out.String(); got != want {
		t.Errorf("output is\n%s\nwant\n%s", got, want)
	}
}
