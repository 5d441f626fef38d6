// Framegen writes everything that follows mechanically from the description of the wire format in spec.go: the
// package's frame_gen.go, the byte tables between the markers of docs/PROTOCOL.md, and testdata/vectors.json. It also
// writes the table of internal/lifecycle into docs/PROTOCOL.md, and draws it in docs/DESIGN.md.
//
// It runs from the module root, as go generate does. Of the module it imports only internal/lifecycle. So it works
// while frame_gen.go is missing, and the vectors are computed from the description and not by the code that they test.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	root := flag.String("root", ".", "module root")
	flag.Parse()
	if err := run(*root); err != nil {
		fmt.Fprintln(os.Stderr, "framegen:", err)
		os.Exit(1)
	}
}

func run(root string) error {
	files, err := generate(root)
	if err != nil {
		return err
	}
	for _, f := range files {
		path := filepath.Join(root, f.path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, f.data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

type file struct {
	path string // relative to the module root
	data []byte
}

// generate returns the generated files. It reads the documents, because their prose is written by hand.
func generate(root string) ([]file, error) {
	code, err := goCode()
	if err != nil {
		return nil, err
	}
	vectors, err := vectorsJSON()
	if err != nil {
		return nil, err
	}
	files := []file{{"frame_gen.go", code}, {"testdata/vectors.json", vectors}}
	for _, d := range documents {
		doc, err := os.ReadFile(filepath.Join(root, d.path))
		if err != nil {
			return nil, err
		}
		if doc, err = fillTables(doc, d.parts()); err != nil {
			return nil, fmt.Errorf("%s: %w", d.path, err)
		}
		files = append(files, file{d.path, doc})
	}
	return files, nil
}
