package main

import (
	"fmt"
	"go/ast"
	"go/token"
	"io"
	"maps"
	"slices"
)

// tooComplex names the functions that are above the limit today, as "package.function" or "package.type.method". Remove
// a function when it is simpler. Add none.
var tooComplex = map[string]bool{
	"object.check": true,
}

// complexity prints the functions with a cyclomatic complexity above limit, except the exceptions. It returns an error
// if there are some, or if an exception is not above the limit.
func complexity(out io.Writer, files []source, limit int, exceptions map[string]bool) error {
	bad := 0
	left := maps.Clone(exceptions)
	for _, f := range files {
		if ast.IsGenerated(f.file) {
			continue
		}
		for _, decl := range f.file.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			n := waysThrough(fn)
			name := f.file.Name.Name + "." + functionName(fn)
			if n <= limit {
				continue
			}
			if left[name] {
				delete(left, name)
				continue
			}
			bad++
			fmt.Fprintf(out, "%s: %s has a cyclomatic complexity of %d\n", f.fset.Position(fn.Pos()), name, n)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(left)) {
		bad++
		fmt.Fprintf(out, "%s is within the limit or gone: take it out of the exceptions in internal/check/complexity.go\n", name)
	}
	if bad > 0 {
		return fmt.Errorf("complexity: %d findings, limit %d: split decisions from actions", bad, limit)
	}
	return nil
}

// waysThrough returns the cyclomatic complexity of fn: one, and one more for each branch, loop, case, && and ||.
// Functions within it count as parts of it.
func waysThrough(fn *ast.FuncDecl) int {
	n := 1
	ast.Inspect(fn, func(node ast.Node) bool {
		switch node := node.(type) {
		case *ast.IfStmt, *ast.ForStmt, *ast.RangeStmt:
			n++
		case *ast.CaseClause:
			if node.List != nil { // not default
				n++
			}
		case *ast.CommClause:
			if node.Comm != nil {
				n++
			}
		case *ast.BinaryExpr:
			if node.Op == token.LAND || node.Op == token.LOR {
				n++
			}
		}
		return true
	})
	return n
}

// functionName returns "function" or "type.method".
func functionName(fn *ast.FuncDecl) string {
	if fn.Recv == nil || len(fn.Recv.List) == 0 {
		return fn.Name.Name
	}
	return receiverType(fn.Recv.List[0].Type) + "." + fn.Name.Name
}

func receiverType(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiverType(e.X)
	case *ast.IndexExpr: // type parameters
		return receiverType(e.X)
	case *ast.IndexListExpr:
		return receiverType(e.X)
	case *ast.Ident:
		return e.Name
	}
	return "?"
}
