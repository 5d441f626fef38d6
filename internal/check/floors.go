package main

import (
	"errors"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// The floor plan is a list in a document. Each line between planBegin and planEnd has the name of a floor and its
// files, the highest floor first.
const (
	planDocument = "docs/DESIGN.md"
	planBegin    = "```floors\n"
	planEnd      = "```\n"
)

// floors checks that the files of the package in dir call functions and methods only of their own floor and of lower
// ones.
func floors(out io.Writer, dir string) error {
	text, err := os.ReadFile(filepath.Join(dir, planDocument))
	if err != nil {
		return err
	}
	plan, err := parsePlan(string(text))
	if err != nil {
		return fmt.Errorf("%s: %w", planDocument, err)
	}
	imports, err := exportData(dir)
	if err != nil {
		return err
	}
	fset, files, err := parsePackage(dir)
	if err != nil {
		return err
	}
	arrows, err := findArrows(fset, files, importer.ForCompiler(fset, "gc", imports))
	if err != nil {
		return err
	}
	problems := plan.problems(fileNames(fset, files), arrows)
	for _, p := range problems {
		fmt.Fprintln(out, p)
	}
	if len(problems) > 0 {
		return fmt.Errorf("%d breaches of the floor plan in %s: move the declaration, let the lower file return what happened, or change the plan",
			len(problems), planDocument)
	}
	return nil
}

// floorPlan maps a file to its floor. Floors are counted from the top.
type floorPlan struct {
	names []string
	of    map[string]int
}

func parsePlan(text string) (floorPlan, error) {
	_, list, ok := strings.Cut(text, planBegin)
	list, _, closed := strings.Cut(list, planEnd)
	if !ok || !closed {
		return floorPlan{}, fmt.Errorf("no list between %q and %q", planBegin, planEnd)
	}
	plan := floorPlan{of: make(map[string]int)}
	for line := range strings.Lines(list) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			return floorPlan{}, fmt.Errorf("a floor is a name and files, not %q", line)
		}
		for _, file := range fields[1:] {
			if floor, twice := plan.of[file]; twice {
				return floorPlan{}, fmt.Errorf("%s is on the floors %s and %s", file, plan.names[floor], fields[0])
			}
			plan.of[file] = len(plan.names)
		}
		plan.names = append(plan.names, fields[0])
	}
	return plan, nil
}

// arrow says that code in one file uses a function or method that another file declares.
type arrow struct{ from, to, function string }

// problems returns the upward arrows, the files without a floor, and the entries of the plan without a file.
func (p floorPlan) problems(files []string, arrows []arrow) (list []string) {
	for _, f := range files {
		if _, ok := p.of[f]; !ok {
			list = append(list, f+" is on no floor")
		}
	}
	for _, f := range slices.Sorted(maps.Keys(p.of)) {
		if !slices.Contains(files, f) {
			list = append(list, f+" is on a floor and does not exist")
		}
	}
	for _, a := range arrows {
		from, known := p.of[a.from]
		to, both := p.of[a.to]
		if known && both && to < from {
			list = append(list, fmt.Sprintf("%s (%s) uses %s of %s (%s), a higher floor", a.from, p.names[from], a.function, a.to, p.names[to]))
		}
	}
	return list
}

// findArrows returns the arrows between the files of one package. Types, fields, constants and variables make no
// arrows: they are the vocabulary that all floors share.
func findArrows(fset *token.FileSet, files []*ast.File, imports types.Importer) ([]arrow, error) {
	info := &types.Info{Uses: make(map[*ast.Ident]types.Object)}
	config := types.Config{Importer: imports}
	pkg, err := config.Check("", fset, files, info)
	if err != nil {
		return nil, err
	}
	found := make(map[arrow]bool)
	for id, object := range info.Uses {
		f, ok := object.(*types.Func)
		if !ok || f.Pkg() != pkg {
			continue
		}
		f = f.Origin()
		a := arrow{fileName(fset, id.Pos()), fileName(fset, f.Pos()), f.Name()}
		if a.from != a.to {
			found[a] = true
		}
	}
	return slices.SortedFunc(maps.Keys(found), func(a, b arrow) int {
		return strings.Compare(a.from+" "+a.to+" "+a.function, b.from+" "+b.to+" "+b.function)
	}), nil
}

func fileName(fset *token.FileSet, pos token.Pos) string {
	return filepath.Base(fset.Position(pos).Filename)
}

func fileNames(fset *token.FileSet, files []*ast.File) (names []string) {
	for _, f := range files {
		names = append(names, fileName(fset, f.Pos()))
	}
	return names
}

// parsePackage parses the Go files in dir, tests excepted.
func parsePackage(dir string) (*token.FileSet, []*ast.File, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, nil, err
	}
	fset := token.NewFileSet()
	var files []*ast.File
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, nil, err
		}
		files = append(files, f)
	}
	if len(files) == 0 {
		return nil, nil, errors.New("no Go files in " + dir)
	}
	return fset, files, nil
}

// exportData returns a function that opens the export data of the packages that the package in dir imports. The go
// command writes them to its build cache.
func exportData(dir string) (func(path string) (io.ReadCloser, error), error) {
	list := exec.Command("go", "list", "-export", "-deps", "-f", "{{.ImportPath}} {{.Export}}", ".")
	list.Dir, list.Stderr = dir, os.Stderr
	text, err := list.Output()
	if err != nil {
		return nil, fmt.Errorf("go list -export: %w", err)
	}
	exports := make(map[string]string)
	for line := range strings.Lines(string(text)) {
		if path, file, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			exports[path] = file
		}
	}
	return func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) }, nil
}
