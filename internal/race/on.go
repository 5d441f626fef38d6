//go:build race

package race

// Enabled reports whether the program was built with -race. It is a constant, so the compiler drops the branches that
// it makes unreachable.
const Enabled = true
