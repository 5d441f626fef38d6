package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"slices"
	"strings"
	"testing"
)

// The files of package stream keep to the floor plan of docs/DESIGN.md.
func TestStreamKeepsItsFloorPlan(t *testing.T) {
	var out strings.Builder
	if err := floors(&out, "../.."); err != nil {
		t.Errorf("%v\n%s", err, &out)
	}
}

func testPackage(t *testing.T, files ...string) (*token.FileSet, []*ast.File) {
	t.Helper()
	fset := token.NewFileSet()
	var parsed []*ast.File
	for i := 0; i < len(files); i += 2 {
		f, err := parser.ParseFile(fset, files[i], "package p\n"+files[i+1], parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		parsed = append(parsed, f)
	}
	return fset, parsed
}

func testPlan(lines ...string) string {
	return "# A document\n\n" + planBegin + strings.Join(lines, "\n") + "\n" + planEnd + "\nand more"
}

func TestFloorPlanFindsBreaches(t *testing.T) {
	const (
		high = "type high struct{ n int }\nfunc (h *high) call() { low() }\nconst size = 3\nvar all []high\n"
		low  = "func low() {}\n"
	)
	for name, c := range map[string]struct {
		plan  []string
		files []string
		want  string
	}{
		"calls downward": {[]string{"top a.go", "ground b.go"}, []string{"a.go", high, "b.go", low}, ""},
		"calls on its floor, both ways": {[]string{"only a.go b.go"},
			[]string{"a.go", high, "b.go", low + "func back(h *high) { h.call() }"}, ""},
		"types, fields, constants and variables upward": {[]string{"top a.go", "ground b.go"},
			[]string{"a.go", high, "b.go", low + "func sum(h high) int { return h.n + size + len(all) }"}, ""},
		"a function upward": {[]string{"top b.go", "ground a.go"}, []string{"a.go", high, "b.go", low},
			"a.go (ground) uses low of b.go (top), a higher floor"},
		"a method upward": {[]string{"top a.go", "ground b.go"}, []string{"a.go", high, "b.go", low + "func back(h *high) { h.call() }"},
			"b.go (ground) uses call of a.go (top), a higher floor"},
		"a method value upward": {[]string{"top a.go", "ground b.go"}, []string{"a.go", high, "b.go", low + "var f = (*high).call"},
			"b.go (ground) uses call of a.go (top), a higher floor"},
		"a method of a generic type upward": {[]string{"top a.go", "ground b.go"},
			[]string{"a.go", "type list[T any] struct{}\nfunc (list[T]) add(T) {}", "b.go", "func f(l list[int]) { l.add(1) }"},
			"b.go (ground) uses add of a.go (top), a higher floor"},
		"a file on no floor":        {[]string{"top a.go"}, []string{"a.go", high, "b.go", low}, "b.go is on no floor"},
		"a floor without the file":  {[]string{"top a.go", "ground b.go c.go"}, []string{"a.go", high, "b.go", low}, "c.go is on a floor and does not exist"},
		"two floors, many breaches": {[]string{"top c.go", "ground a.go"}, []string{"a.go", high, "b.go", low}, "b.go is on no floor\nc.go is on a floor and does not exist"},
	} {
		t.Run(name, func(t *testing.T) {
			plan, err := parsePlan(testPlan(c.plan...))
			if err != nil {
				t.Fatal(err)
			}
			fset, files := testPackage(t, c.files...)
			arrows, err := findArrows(fset, files, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(plan.problems(fileNames(fset, files), arrows), "\n"); got != c.want {
				t.Errorf("problems:\n%s\nwant:\n%s", got, c.want)
			}
		})
	}
}

func TestFloorPlanMustBeReadable(t *testing.T) {
	for name, text := range map[string]string{
		"no list":            "# A document\n",
		"the list never end": planBegin + "top a.go\n",
		"a floor of no file": testPlan("top a.go", "ground"),
		"an empty line":      testPlan("top a.go", "", "ground b.go"),
		"a file twice":       testPlan("top a.go", "ground b.go a.go"),
	} {
		if plan, err := parsePlan(text); err == nil {
			t.Errorf("%s: no error, floors %v", name, plan.names)
		}
	}
	plan, err := parsePlan(testPlan("top a.go  b.go", "ground   c.go"))
	if err != nil || !slices.Equal(plan.names, []string{"top", "ground"}) || plan.of["b.go"] != 0 || plan.of["c.go"] != 1 || len(plan.of) != 3 {
		t.Errorf("plan %v, error %v", plan, err)
	}
}
