package main

import (
	"os"
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
