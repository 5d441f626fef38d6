package streamtest_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/streamtest"
)

// TestOrphan kills a process that has started two servers, one of them paused, and sees that both end.
func TestOrphan(t *testing.T) {
	cmd := exec.Command(os.Args[0], "-test.run=^TestOrphanParent$", "-test.v")
	cmd.Env = append(os.Environ(), "ORPHAN_PARENT=1")
	in, err := cmd.StdinPipe() // held open, or it would end by itself
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var printed []byte
	var urls [][]byte
	for buf := make([]byte, 4096); len(urls) < 2; {
		n, err := out.Read(buf)
		printed = append(printed, buf[:n]...)
		if urls = bytes.Split(bytes.TrimSuffix(findURLs(printed), []byte(" ")), []byte(" ")); err != nil {
			t.Fatalf("%v after %s", err, printed)
		}
	}
	_ = cmd.Process.Kill()
	_, _ = io.Copy(io.Discard, out)
	_ = cmd.Wait()
	for _, url := range urls {
		await(t, "the end of an orphan", func() bool {
			nc, err := nats.Connect(string(url), nats.Timeout(100*time.Millisecond))
			if err == nil {
				nc.Close()
			}
			return errors.Is(err, nats.ErrNoServers) // refused; a paused one would be a timeout
		})
	}
}

// findURLs returns what stands between the brackets of a whole line "urls [a b ]".
func findURLs(b []byte) []byte {
	_, b, _ = bytes.Cut(b, []byte("urls ["))
	urls, _, ok := bytes.Cut(b, []byte("]"))
	if !ok {
		return nil
	}
	return urls
}

// TestOrphanParent is the process that TestOrphan kills. By itself it does nothing.
func TestOrphanParent(t *testing.T) {
	if os.Getenv("ORPHAN_PARENT") == "" {
		return
	}
	a, b := streamtest.RunProcess(t), streamtest.RunProcess(t)
	if err := b.Pause(); err != nil {
		t.Fatal(err)
	}
	_, _ = os.Stdout.WriteString("urls [" + a.URL() + " " + b.URL() + "]\n")
	_, _ = io.Copy(io.Discard, os.Stdin)
}
