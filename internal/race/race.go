// Package race says whether the race detector watches. Code that trades exactness for speed is exact in race builds, and
// tests that measure time or memory do not assert under the detector, which costs much of both.
package race
