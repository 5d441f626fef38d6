package stream_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// usersModules are all modules in the build list of a program that imports packages stream, fastconn and typed. A
// change here is a change for every user. docs/DESIGN.md says why each is here.
var usersModules = []string{
	"example.org/user",
	"github.com/natsstream/stream",
	// nats.go, and the modules that it lists
	"github.com/klauspost/compress",
	"github.com/nats-io/nats.go",
	"github.com/nats-io/nkeys",
	"github.com/nats-io/nuid",
	"golang.org/x/crypto",
	"golang.org/x/net",
	"golang.org/x/sys",
	"golang.org/x/term",
	"golang.org/x/text",
	// msgpack, and the modules that it lists
	"github.com/vmihailenco/msgpack/v5",
	"github.com/vmihailenco/tagparser/v2",
	"github.com/stretchr/testify",
	"github.com/davecgh/go-spew",
	"github.com/pmezard/go-difflib",
	"gopkg.in/yaml.v3",
	// the map of the mux
	"github.com/puzpuzpuz/xsync/v3",
	// for tests of the library: neither requires a module that users compile
	"go.uber.org/goleak",
	"pgregory.net/rapid",
}

// Users get neither the NATS server nor the tools of this repository, not even into their go.sum.
func TestUsersGetNoNATSServer(t *testing.T) {
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":  "module example.org/user\n\ngo 1.26.0\n\nreplace github.com/natsstream/stream => " + filepath.ToSlash(root) + "\n",
		"main.go": "package main\n\nimport (\n\t_ \"github.com/natsstream/stream\"\n\t_ \"github.com/natsstream/stream/fastconn\"\n\t_ \"github.com/natsstream/stream/typed\"\n)\n\nfunc main() {}\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("go", args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "PWD="+dir, "GOWORK=off", "GOFLAGS=-mod=mod")
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("go %v: %v\n%s", args, err, &stderr)
		}
		return string(out)
	}
	run("mod", "tidy")
	run("build", ".")

	modules := strings.Fields(run("list", "-m", "-f", "{{.Path}}", "all"))
	slices.Sort(modules)
	want := slices.Sorted(slices.Values(usersModules))
	if !slices.Equal(modules, want) {
		t.Errorf("a user's module has %d modules in its build list:\n%s\nand they were %d:\n%s",
			len(modules), strings.Join(modules, "\n"), len(want), strings.Join(want, "\n"))
	}
	for _, file := range []string{"go.mod", "go.sum"} {
		text, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		for _, module := range []string{"nats-server", "nats-io/jwt", "antithesis", "go-tpm", "highwayhash", "honnef.co/go/tools", "stream/streamtest"} {
			if strings.Contains(string(text), module) {
				t.Errorf("a user's %s names %s", file, module)
			}
		}
	}
}
