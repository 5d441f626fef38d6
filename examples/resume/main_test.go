package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

func TestMain(m *testing.M) {
	if os.Getenv("RUN_RESUME") != "" { // the process of a client
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

const size = 16<<20 + 17

// receive runs a server for the test, and returns the address of NATS and the folder.
func receive(t *testing.T) (url, dir string) {
	t.Helper()
	nats, dir := streamtest.Run(t), t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	said, says := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := run(ctx, nats.URL(), dir, nil, says)
		_ = says.CloseWithError(io.ErrClosedPipe)
		done <- err
	}()
	if line, err := bufio.NewReader(said).ReadString('\n'); line != "ready\n" {
		t.Fatalf("%q, %v", line, err)
	}
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return nats.URL(), dir
}

// A client is killed in the middle of its upload. The next one sends the rest.
func TestUploadResumesAfterKill(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	url, dir := receive(t)
	content := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{}).Read(content)
	file := filepath.Join(t.TempDir(), "data.bin")
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}

	client := exec.CommandContext(ctx, os.Args[0], "-url", url, file)
	client.Env, client.Stderr = append(os.Environ(), "RUN_RESUME=1"), os.Stderr
	stdout, err := client.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Start(); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		if !strings.HasSuffix(lines.Text(), " 0 bytes are stored") {
			break
		}
	}
	if err := client.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = client.Wait()

	// The server notices the death within some seconds. Until then it refuses a second upload of the file.
	var out bytes.Buffer
	for {
		out.Reset()
		if err := run(ctx, url, "", []string{file}, &out); err == nil {
			break
		} else if ce, ok := errors.AsType[*stream.CloseError](err); !ok || ce.Code != stream.CloseTryAgainLater {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	stored, err := os.ReadFile(filepath.Join(dir, "data.bin"))
	if err != nil || !bytes.Equal(stored, content) {
		t.Fatalf("%d bytes are stored, %v; want %d", len(stored), err, size)
	}
	var sent int
	last := out.String()[strings.LastIndex(strings.TrimSpace(out.String()), "\n")+1:]
	if _, err := fmt.Sscanf(last, "data.bin: whole, %d bytes were sent", &sent); err != nil {
		t.Fatalf("%q: %v", last, err)
	}
	if sent >= size {
		t.Errorf("%d of %d bytes were sent again", sent, size)
	}
	if _, err := os.Stat(filepath.Join(dir, "data.bin.part")); !os.IsNotExist(err) {
		t.Error("the part is left")
	}
}

func TestNamesWithFoldersAreRefused(t *testing.T) {
	d := &store{dir: t.TempDir()}
	for _, name := range []string{"", ".", "..", "a/b", "../a", "/a"} {
		err := d.put(nil, &stream.Request{Data: fmt.Appendf(nil, `{"Name":%q,"Size":1}`, name)})
		if ce, ok := err.(*stream.CloseError); !ok || ce.Code != stream.CloseBadRequest {
			t.Errorf("%q: %v", name, err)
		}
	}
}
