// Package faults holds tests of the library under faults of the network and of its servers. It has no code of its own.
// STREAM_FAULTS=full in the environment runs each fault as often as a release needs; see make faults.
package faults
