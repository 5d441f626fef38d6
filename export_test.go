package stream

import "github.com/natsstream/stream/internal/race"

// RaceEnabled tells external tests whether the race detector watches: it costs time and memory, and Recv is exact then.
const RaceEnabled = race.Enabled

// testClosed is what an endpoint without a Client is closed with.
var testClosed = &ending{kind: endLocal, err: ErrClientClosed, reset: CloseError{CloseGoingAway, "client closed"}}
