package main

import (
	"bytes"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const root = "../.."

func TestCommittedFilesAreUpToDate(t *testing.T) {
	files, err := generate(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		committed, err := os.ReadFile(filepath.Join(root, f.path))
		if err != nil {
			t.Error(err)
			continue
		}
		// Git may have checked the file out with the line ends of its system.
		committed = bytes.ReplaceAll(committed, []byte("\r\n"), []byte("\n"))
		if !bytes.Equal(committed, f.data) {
			t.Errorf("%s is out of date: run go generate", f.path)
		}
	}
}

func TestOutputIsDeterministic(t *testing.T) {
	first, err := generate(root)
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		again, err := generate(root)
		if err != nil {
			t.Fatal(err)
		}
		for i := range again {
			if !bytes.Equal(first[i].data, again[i].data) {
				t.Fatalf("%s differs from run to run", first[i].path)
			}
		}
	}
}

// The generator works from nothing but the prose.
func TestRunWritesMissingFiles(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "docs"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range documents {
		doc, err := os.ReadFile(filepath.Join(root, d.path))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, d.path), doc, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := run(dir); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"frame_gen.go", "testdata/vectors.json", "docs/PROTOCOL.md", "docs/DESIGN.md"} {
		if _, err := os.Stat(filepath.Join(dir, path)); err != nil {
			t.Error(err)
		}
	}
	if err := run(t.TempDir()); err == nil {
		t.Error("no error although the documents are missing")
	}
}

func TestFillTables(t *testing.T) {
	var all strings.Builder
	for name := range tables() {
		all.WriteString("text\n" + beginMark + name + markClose + "old\n" + endMark + name + markClose)
	}
	once, err := fillTables([]byte(all.String()), tables())
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(once, []byte("old\n")) {
		t.Error("old contents are still there")
	}
	twice, err := fillTables(once, tables())
	if err != nil || !bytes.Equal(once, twice) {
		t.Errorf("filling again changes the text (%v)", err)
	}
	for name, doc := range map[string]string{
		"missing":  "no tables here",
		"twice":    string(once) + string(once),
		"unknown":  string(once) + beginMark + "nonsense" + markClose,
		"no end":   strings.ReplaceAll(string(once), endMark+"credit", "<!-- "),
		"unclosed": string(once) + beginMark + "credit",
	} {
		if _, err := fillTables([]byte(doc), tables()); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// The description must say of every accepted number what it is, and of every flag bit only one thing in one frame.
func TestDescription(t *testing.T) {
	for i, ft := range frameTypes {
		if int(ft.value) != i+1 {
			t.Errorf("%s is %d, want %d: the tables count on a run from 1", ft.name, ft.value, i+1)
		}
		seen := map[uint8]bool{}
		for _, f := range ft.flags {
			if seen[f.value] {
				t.Errorf("%s: two flags of value %#x", ft.name, f.value)
			}
			seen[f.value] = true
		}
	}
	for _, l := range []layout{packetHeader, frameHeader, credit, fragment} {
		if l.size()%8 != 0 {
			t.Errorf("%s has %d bytes", l.name, l.size())
		}
	}
	if tokenSize(false) != 16 || tokenSize(true) != 5 {
		t.Errorf("token of %d characters, offer of %d", tokenSize(false), tokenSize(true))
	}
}

func TestEncode(t *testing.T) {
	got := packet(values{"flags": 3, "sender": 0xA1A2A3A4BEEF, "seq": 0x01020304}, []byte{9})
	if want := []byte{0xF5, 0x13, 0xA1, 0xA2, 0xA3, 0xA4, 0xBE, 0xEF, 1, 2, 3, 4, 0, 0, 0, 17, 9}; !bytes.Equal(got, want) {
		t.Errorf("packet % x, want % x", got, want)
	}
	if got := number62(big.NewInt(62*62+61), 4); got != "010z" {
		t.Errorf("62*62+61 is %q in base 62", got)
	}
}

func TestCloseCodesAreDistinctAndInRange(t *testing.T) {
	seen := map[string]bool{}
	last := 0
	for _, c := range closeCodes {
		if v := int(c.value); v < minCloseCode || v > maxCloseCode || v <= last {
			t.Errorf("code %d is out of range or out of order", v)
		}
		last = int(c.value)
		for _, name := range []string{c.goName, c.name, c.doc} {
			if name == "" || seen[name] {
				t.Errorf("code %d: %q is empty or stands there twice", c.value, name)
			}
			seen[name] = true
		}
	}
}

// A diagram shows each state of its dimension, and each arrow once.
func TestDiagramsShowEveryState(t *testing.T) {
	for _, d := range []dimension{sendDimension, recvDimension, phaseDimension} {
		drawn := stateDiagram(d)
		seen := map[string]bool{}
		for line := range strings.Lines(drawn) {
			arrow, events, found := strings.Cut(strings.TrimSpace(line), " : ")
			if !found {
				continue
			}
			if seen[arrow] || events == "" {
				t.Errorf("arrow %q twice or without an event in:\n%s", arrow, drawn)
			}
			seen[arrow] = true
		}
		for _, w := range d.words {
			if !strings.Contains(drawn, "--> "+w.Name+" : ") {
				t.Errorf("no arrow leads to %s in:\n%s", w.Name, drawn)
			}
		}
	}
}
