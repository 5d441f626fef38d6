package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
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

// The modules of this repository require each other in the version of the next release, because users get them without the replace
// lines, which only this repository heeds.
func TestModulesRequireTheVersion(t *testing.T) {
	version, err := os.ReadFile("../../VERSION")
	if err != nil {
		t.Fatal(err)
	}
	want := "v" + strings.TrimSpace(string(version))
	require := regexp.MustCompile(`(?m)^\s*(?:require )?(github\.com/natsstream/stream\S*) (v\S+)`)
	found := 0
	err = fs.WalkDir(os.DirFS("../.."), ".", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || filepath.Base(path) != "go.mod" {
			return err
		}
		text, err := os.ReadFile(filepath.Join("../..", path))
		for _, line := range require.FindAllStringSubmatch(string(text), -1) {
			found++
			if line[2] != want {
				t.Errorf("%s requires %s %s, want %s, which is in VERSION", path, line[1], line[2], want)
			}
		}
		return err
	})
	if err != nil || found < 6 {
		t.Errorf("%d requirements, %v", found, err)
	}
}
