package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// The first section of the changelog is that of VERSION, or of changes since its release.
func TestChangelogBeginsWithTheVersion(t *testing.T) {
	version, err := os.ReadFile("../../VERSION")
	if err != nil {
		t.Fatal(err)
	}
	changes, err := os.ReadFile("../../CHANGELOG.md")
	if err != nil {
		t.Fatal(err)
	}
	v := strings.TrimSpace(string(version))
	if !regexp.MustCompile(`^\d+\.\d+\.\d+$`).MatchString(v) {
		t.Fatalf("VERSION is %q, want three numbers", v)
	}
	sections := regexp.MustCompile(`(?m)^## \[(.*?)\](?: - (.*))?$`).FindAllStringSubmatch(string(changes), -1)
	if len(sections) == 0 {
		t.Fatal("CHANGELOG.md has no section")
	}
	switch name, date := sections[0][1], sections[0][2]; name {
	case "Unreleased":
	case v:
		if !regexp.MustCompile(`^\d{4}-\d\d-\d\d$`).MatchString(date) {
			t.Errorf("the section of version %s has the date %q, want one such as 2026-12-31", v, date)
		}
	default:
		t.Errorf("CHANGELOG.md begins with version %q, VERSION is %s", name, v)
	}
}

// modules returns the folders of all modules of the repository.
func modules(t *testing.T) (folders []string) {
	t.Helper()
	err := fs.WalkDir(os.DirFS("../.."), ".", func(path string, _ fs.DirEntry, err error) error {
		if err == nil && filepath.Base(path) == "go.mod" {
			folders = append(folders, filepath.ToSlash(filepath.Dir(path)))
		}
		return err
	})
	if err != nil || len(folders) < 6 {
		t.Fatalf("modules %q, %v", folders, err)
	}
	return folders
}

// The modules of this repository require each other in the version of the next release, because users get them without
// the replace lines, which only this repository heeds.
func TestModulesRequireTheVersion(t *testing.T) {
	version, err := os.ReadFile("../../VERSION")
	if err != nil {
		t.Fatal(err)
	}
	want := "v" + strings.TrimSpace(string(version))
	require := regexp.MustCompile(`(?m)^\s*(?:require )?(github\.com/natsstream/stream\S*) (v\S+)`)
	found := 0
	for _, module := range modules(t) {
		text, err := os.ReadFile(filepath.Join("../..", module, "go.mod"))
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range require.FindAllStringSubmatch(string(text), -1) {
			found++
			if line[2] != want {
				t.Errorf("%s/go.mod requires %s %s, want %s, which is in VERSION", module, line[1], line[2], want)
			}
		}
	}
	if found < 6 {
		t.Errorf("%d requirements", found)
	}
}

// Tests and checks of the Makefile cover each module, and go.work has each. The module tools has no package to test.
func TestModulesAreInTheMakefileAndTheWorkspace(t *testing.T) {
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	workspace, err := os.ReadFile("../../go.work")
	if err != nil {
		t.Fatal(err)
	}
	var made []string // by the variables that end up in MODULES
	for _, line := range regexp.MustCompile(`(?m)^(?:SERVED|ADAPTERS|MODULES) := (.*)$`).FindAllStringSubmatch(string(makefile), -1) {
		made = append(made, strings.Fields(line[1])...)
	}
	for _, module := range modules(t) {
		if module != "." && module != "tools" && !slices.Contains(made, module) {
			t.Errorf("the module in %s is not in MODULES of the Makefile: add it, so that make test and make lint cover it", module)
		}
		use := "\n\t./" + module + "\n"
		if module == "." {
			use = "\n\t.\n"
		}
		if listed, newer := strings.Contains(string(workspace), use), module == "streamprom/grafana"; listed == newer {
			t.Errorf("the module in %s: it is in go.work: %v, want %v: only modules that need a newer Go than the library stay out", module, listed, !newer)
		}
	}
}
