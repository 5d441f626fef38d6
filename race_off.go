//go:build !race

package stream

// raceEnabled says that the race detector watches: see Stream.gate.
const raceEnabled = false
