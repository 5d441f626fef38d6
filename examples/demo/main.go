// Command demo streams real files, line by line, from a producer to a consumer through a NATS server, and shows that
// the received lines equal the sent ones.
//
//	go run ./examples/demo                                # an embedded server, the largest files of the Go tree
//	go run ./examples/demo -url nats://127.0.0.1:4222     # your own server
//	go run ./examples/demo -dir /var/log -n 16 -repeat 1  # your own files, sixteen streams at a time
//
// Producer and consumer have a connection and a client each, as two processes would. The consumer opens a stream by a
// request that names a file. Every line of the file is one record. After the end of each stream the consumer asks the
// producer, by an ordinary NATS request, for the number of records and their SHA-256, and compares. The exit code is 0
// if everything arrived, 1 if not, and 2 for a mistake in the flags.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/streamtest"
)

// config holds the values of the flags.
type config struct {
	url    string // "" = embedded server
	dir    string // "" = sources of the Go tree
	files  int    // how many of the largest files; 0 = all
	n      int    // streams at a time
	repeat int    // streams per file
}

func main() {
	var cfg config
	flag.StringVar(&cfg.url, "url", "", "NATS server to use (default: one embedded in this process)")
	flag.StringVar(&cfg.dir, "dir", "", "folder whose text files are served (default: the sources of the Go tree)")
	flag.IntVar(&cfg.files, "files", 8, "serve this many of the largest text files; 0 = all of them")
	flag.IntVar(&cfg.n, "n", 4, "streams open at the same time")
	flag.IntVar(&cfg.repeat, "repeat", 40, "times that each file is streamed")
	flag.Parse()
	if flag.NArg() > 0 || cfg.files < 0 || cfg.n < 1 || cfg.repeat < 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, cfg, os.Stdout, isTerminal(os.Stdout))
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// run runs the demo. It returns nil if every stream arrived complete. With redraw, progress is one line that is
// redrawn.
func run(ctx context.Context, cfg config, out io.Writer, redraw bool) error {
	dir, err := servedDir(ctx, cfg.dir)
	if err != nil {
		return err
	}
	files, err := textFiles(dir, cfg.files)
	if err != nil {
		return err
	}
	url := cfg.url
	if url == "" {
		server, err := streamtest.Start()
		if err != nil {
			return err
		}
		defer server.Shutdown()
		url = server.URL()
	}

	// Each run has its own subjects, so that demos on one server do not mix.
	subject := "demo." + nats.NewInbox()[len(nats.InboxPrefix):]
	p, err := startProducer(url, subject, dir, files)
	if err != nil {
		return err
	}
	defer p.stop()
	c, err := newConsumer(url, subject)
	if err != nil {
		return err
	}
	defer c.stop()

	where := "an embedded NATS server"
	if cfg.url != "" {
		where = c.nc.ConnectedUrlRedacted()
	}
	fmt.Fprintf(out, "%d files of %s through %s, %d streams at a time, each file %d times; a record is a line\n",
		len(files), dir, where, min(cfg.n, len(files)), cfg.repeat)

	progress := startProgress(out, redraw, len(files)*cfg.repeat, &c.total)
	results := c.fetchAll(ctx, files, cfg.n, cfg.repeat)
	elapsed := progress.stop()
	failed := printTable(out, results, elapsed)
	if err := ctx.Err(); err != nil {
		return errors.New("interrupted")
	}
	if failed > 0 {
		return fmt.Errorf("%d of %d files did not arrive whole", failed, len(files))
	}
	return nil
}

// servedDir returns dir, or the sources of the Go tree if dir is empty.
func servedDir(ctx context.Context, dir string) (string, error) {
	if dir != "" {
		return dir, nil
	}
	root, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("no Go tree to serve, name a folder with -dir: go env GOROOT: %w", err)
	}
	return filepath.Join(strings.TrimSpace(string(root)), "src"), nil
}

// isTerminal reports whether f can redraw a line.
func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"
}
