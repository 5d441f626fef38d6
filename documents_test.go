package stream_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func readText(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestReadmeBlocksStandInTheExamples holds the README to code that is compiled and run: each of its Go blocks stands in
// example_test.go, line by line, and each make target that it names exists.
func TestReadmeBlocksStandInTheExamples(t *testing.T) {
	readme, examples, makefile := readText(t, "README.md"), readText(t, "example_test.go"), readText(t, "Makefile")
	blocks := regexp.MustCompile("(?ms)^```go\n(.*?)^```$").FindAllStringSubmatch(readme, -1)
	if len(blocks) < 2 {
		t.Fatalf("%d blocks of Go in README.md, want a consumer and a producer at least", len(blocks))
	}
	for _, block := range blocks {
		if !strings.Contains("\n"+examples, "\n"+block[1]) {
			t.Errorf("not in example_test.go:\n%s", block[1])
		}
	}
	targets := regexp.MustCompile("(?m)(?:^|`)make ([a-z]+)").FindAllStringSubmatch(readme, -1)
	if len(targets) == 0 {
		t.Error("README.md names no make target")
	}
	for _, target := range targets {
		if !strings.Contains("\n"+makefile, "\n"+target[1]+": ") {
			t.Errorf("README.md says make %s; the Makefile has no such target", target[1])
		}
	}
}

// TestLinksOfDocumentsLeadSomewhere follows the relative links of the documents at the root and below docs and
// examples.
func TestLinksOfDocumentsLeadSomewhere(t *testing.T) {
	var documents []string
	for _, pattern := range []string{"*.md", "docs/*.md", "examples/*.md"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		documents = append(documents, found...)
	}
	link := regexp.MustCompile(`\]\(([^)#\s]+)(#[^)]*)?\)`)
	for _, document := range documents {
		for _, match := range link.FindAllStringSubmatch(readText(t, document), -1) {
			if strings.Contains(match[1], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(document), filepath.FromSlash(match[1]))); err != nil {
				t.Errorf("%s links to %s: %v", document, match[1], err)
			}
		}
	}
}
