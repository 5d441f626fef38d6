// Package race reports whether the race detector is on. Code that trades exactness for speed is exact in race builds.
// Tests that measure time or memory do not assert in race builds, because the detector costs much of both.
package race
