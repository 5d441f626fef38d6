package stream_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/natsstream/stream/internal/race"
	"github.com/natsstream/stream/streamtest"
)

// exampleFiles are the example files of two packages whose module requires no NATS server. The examples connect to
// nats.DefaultURL, so `go test` compiles them there and does not run them. A comment "Prints:" at the end of an example has
// its output.
var exampleFiles = map[string]string{"stream": "../example_test.go", "typed": "../typed/example_test.go"}

// Each example runs in a process and against a server of its own, and prints what its last comment says.
func TestExamplesPrintWhatTheySay(t *testing.T) {
	for pkg, file := range exampleFiles {
		source, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.NewReplacer(
			"nats.DefaultURL", `os.Getenv("NATS_URL")`,
			"// Prints:", "// Output:",
			"// Prints in any order:", "// Unordered output:",
		).Replace(string(source))
		if !strings.Contains(text, "\t\"os\"\n") {
			text = strings.Replace(text, "import (\n", "import (\n\t\"os\"\n", 1)
		}
		binary := buildExamples(t, text)
		names, err := exec.Command(binary, "-test.list=^Example").Output()
		if err != nil {
			t.Fatal(err)
		}
		examples := strings.Fields(string(names))
		if want := len(regexp.MustCompile(`(?m)^\t// (Output|Unordered output):`).FindAllString(text, -1)); len(examples) != want || want == 0 {
			t.Errorf("%s: %d examples run, %d print", file, len(examples), want)
		}
		for _, name := range examples {
			t.Run(pkg+"/"+name, func(t *testing.T) {
				cmd := exec.Command(binary, "-test.run=^"+name+"$", "-test.v", "-test.timeout="+patience.String())
				cmd.Env = append(os.Environ(), "NATS_URL="+streamtest.Run(t).URL(),
					"GORACE=atexit_sleep_ms=0") // a race build sleeps for a second otherwise when it exits
				out, err := cmd.CombinedOutput()
				if err != nil || !strings.Contains(string(out), "--- PASS: "+name+" ") {
					t.Errorf("%v\n%s", err, out)
				}
			})
		}
	}
}

// buildExamples returns the path of a test binary with text as its only file.
func buildExamples(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	file, binary := filepath.Join(dir, "example_test.go"), filepath.Join(dir, "examples.test")
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	args := []string{"test", "-c", "-o", binary}
	if race.Enabled {
		args = append(args, "-race")
	}
	if out, err := exec.Command("go", append(args, file)...).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return binary
}
