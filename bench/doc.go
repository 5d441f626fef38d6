// Package bench measures the library against plain NATS, against a bare TCP
// relay and against the design it replaces. docs/BENCHMARKS.md describes the
// measurements and how to repeat them.
package bench
