// Package bench measures the library against plain NATS, against a bare TCP
// relay and against the design it replaces. docs/BENCHMARKS.md says what is
// measured and how to repeat it.
package bench
