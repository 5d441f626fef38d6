package stream

// RaceEnabled tells external tests whether the race detector watches: it costs time and memory, and Recv is exact then.
const RaceEnabled = raceEnabled
