// Check holds the Go files of all modules, tests excepted, to limits that go vet and staticcheck do not know. Run it
// from the root of the repository:
//
//	go run ./internal/check words [-limit 3] [-worst 10]
//	go run ./internal/check complexity [-limit 25]
//	go run ./internal/check floors
//
// The check words counts the sentences of comments that contain a word which tends to hide their subject. The check
// complexity finds functions with too many ways through them, generated code excepted. The check floors holds the files
// of the root package to the floor plan in docs/DESIGN.md. The exit status is 1 if a limit is exceeded.
package main

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

const usage = "usage: go run ./internal/check words|complexity|floors [flags]"

func main() {
	if err := run(os.Stdout, os.DirFS("."), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "check:", err)
		os.Exit(1)
	}
}

func run(out io.Writer, root fs.FS, args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("say what to check; %s", usage)
	}
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	flags.SetOutput(out)
	var check func([]source) error
	switch args[0] {
	case "words":
		limit := flags.Float64("limit", 100, "largest share of sentences, percent")
		worst := flags.Int("worst", 10, "number of files to list")
		check = func(files []source) error { return words(out, files, *limit, *worst) }
	case "complexity":
		limit := flags.Int("limit", 25, "largest cyclomatic complexity of a function")
		check = func(files []source) error { return complexity(out, files, *limit, tooComplex) }
	case "floors":
		return floors(out, ".")
	default:
		return fmt.Errorf("there is no check %q; %s", args[0], usage)
	}
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	files, err := sources(root)
	if err != nil {
		return err
	}
	return check(files)
}

// source is one Go file.
type source struct {
	path string
	fset *token.FileSet
	file *ast.File
}

// sources parses the Go files below root, but for tests, testdata and hidden directories.
func sources(root fs.FS) ([]source, error) {
	fset := token.NewFileSet()
	var files []source
	err := fs.WalkDir(root, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name := d.Name(); d.IsDir() {
			if path != "." && (name == "testdata" || strings.HasPrefix(name, ".")) {
				return fs.SkipDir
			}
			return nil
		}
		if filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		text, err := fs.ReadFile(root, path)
		if err != nil {
			return err
		}
		file, err := parser.ParseFile(fset, path, text, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		files = append(files, source{path, fset, file})
		return nil
	})
	return files, err
}
