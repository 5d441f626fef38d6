package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// measurement runs the benchmarks of two revisions.
type measurement struct {
	count       int           // rounds
	slices      int           // of a round
	bench       string        // for go test -bench
	time        time.Duration // of a benchmark in a round
	pkgs        []string
	short       bool
	dir         string // for the binaries and the tree of the base, removed at the end
	out         string // for the figures
	log         io.Writer
	interrupted <-chan os.Signal

	root string // of the working tree
	tree string // of the base, if it exists
}

// side is one of the two that are compared.
type side struct {
	name, revision string
	tree           string
	overlay        string            // for go build -overlay, if not empty
	env            []string          // of the benchmarks, in addition
	binaries       map[string]string // by package
}

// checkOut returns the sides of revision base and of the working tree. It checks the base out.
func (m *measurement) checkOut(base string) (_, _ side, err error) {
	git := func(args ...string) (string, error) {
		var stderr bytes.Buffer
		cmd := exec.Command("git", args...)
		cmd.Dir, cmd.Stderr = m.root, &stderr
		b, err := cmd.Output()
		if err != nil {
			return "", fmt.Errorf("git %s: %w: %s", strings.Join(args, " "), err, stderr.Bytes())
		}
		return strings.TrimSpace(string(b)), nil
	}
	if m.root, err = git("rev-parse", "--show-toplevel"); err != nil {
		return side{}, side{}, err
	}
	revision, err := git("rev-parse", "--verify", "--quiet", base+"^{commit}")
	if err != nil {
		return side{}, side{}, fmt.Errorf("no revision %s: name a commit, tag or branch of this repository", base)
	}
	tree := filepath.Join(m.dir, "tree")
	if _, err = git("worktree", "add", "--quiet", "--detach", tree, revision); err != nil {
		return side{}, side{}, err
	}
	m.tree = tree
	here, err := git("describe", "--always", "--dirty")
	if err != nil {
		return side{}, side{}, err
	}
	return side{name: "base", revision: revision, tree: tree}, side{name: "head", revision: here, tree: m.root}, nil
}

// compile makes the test binaries of s. A package that s does not have is left out.
func (m *measurement) compile(s *side) error {
	s.binaries = map[string]string{}
	for i, pkg := range m.pkgs {
		if _, err := os.Stat(filepath.Join(s.tree, pkg)); errors.Is(err, os.ErrNotExist) {
			fmt.Fprintf(m.log, "%s has no package %s\n", s.name, pkg)
			continue
		}
		binary := filepath.Join(m.dir, s.name+strconv.Itoa(i)+".test")
		args := []string{"test", "-c", "-o", binary}
		if s.overlay != "" {
			args = append(args, "-overlay", s.overlay)
		}
		cmd := exec.Command("go", append(args, ".")...)
		// A package may lie in another module than before.
		cmd.Dir = filepath.Join(s.tree, pkg)
		cmd.Env = append(os.Environ(), "PWD="+cmd.Dir, "GOWORK=off")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("building the benchmarks of %s in %s: %w\n%s", pkg, s.name, err, out)
		}
		if _, err := os.Stat(binary); err == nil { // a package without tests has none
			s.binaries[pkg] = binary
		}
	}
	return nil
}

// clean removes the tree of the base.
func (m *measurement) clean() {
	if m.tree == "" {
		return
	}
	cmd := exec.Command("git", "worktree", "remove", "--force", m.tree)
	cmd.Dir = m.root
	if out, err := cmd.CombinedOutput(); err != nil {
		fmt.Fprintf(m.log, "git worktree remove: %v\n%s", err, out)
	}
}

// run measures a and b in turn and returns the files with their figures. The side that goes second finds a warmer
// machine, so the two change places in each round.
func (m *measurement) run(name string, a, b side) (fileA, fileB string, err error) {
	if err := os.MkdirAll(m.out, 0o755); err != nil {
		return "", "", err
	}
	fileA, fileB = filepath.Join(m.out, name+"-base.txt"), filepath.Join(m.out, name+"-head.txt")
	figures := [2]bytes.Buffer{}
	for i, s := range []side{a, b} {
		fmt.Fprintf(&figures[i], "run: %s\nrevision: %s\n", name, s.revision)
	}
	for i := range m.count {
		fmt.Fprintf(m.log, "%s: round %d of %d\n", name, i+1, m.count)
		for j := range 2 {
			k := (i + j) % 2
			fmt.Fprintf(&figures[k], "round: %d\n", i+1)
			if err := m.once([]side{a, b}[k], &figures[k]); err != nil {
				return "", "", err
			}
		}
	}
	for i, file := range []string{fileA, fileB} {
		if err := os.WriteFile(file, figures[i].Bytes(), 0o644); err != nil {
			return "", "", err
		}
	}
	return fileA, fileB, nil
}

// once runs each benchmark of s for one round.
func (m *measurement) once(s side, out io.Writer) error {
	for _, pkg := range m.pkgs {
		binary, ok := s.binaries[pkg]
		if !ok {
			continue
		}
		args := []string{
			"-test.run=^$", "-test.bench=" + m.bench, "-test.count=" + strconv.Itoa(m.slices),
			"-test.benchtime=" + (m.time / time.Duration(m.slices)).String(), "-test.benchmem", "-test.timeout=30m",
		}
		if m.short {
			args = append(args, "-test.short")
		}
		var stdout, stderr bytes.Buffer
		cmd := exec.Command(binary, args...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = filepath.Join(s.tree, pkg), &stdout, &stderr
		cmd.Env = append(os.Environ(), s.env...)
		done := make(chan error, 1)
		if err := cmd.Start(); err != nil {
			return err
		}
		go func() { done <- cmd.Wait() }()
		select {
		case err := <-done:
			if err != nil {
				return fmt.Errorf("the benchmarks of %s in %s: %w\n%s%s", pkg, s.name, err, stdout.Bytes(), stderr.Bytes())
			}
		case sig := <-m.interrupted:
			_ = cmd.Process.Kill()
			<-done
			return fmt.Errorf("stopped by signal: %v", sig)
		}
		if _, err := out.Write(stdout.Bytes()); err != nil {
			return err
		}
	}
	return nil
}
