package e2e

import "github.com/natsstream/stream/internal/load"

// Many slow streams: each sends a record now and then. They are visited in
// turn, and at most load.SlowWindow records are in flight, fewer than there are
// streams, so that no stream ever has two records to share a packet.

// SlowImpls are the ways to send now and then on many streams. The floor is
// plain NATS with a single subject for all records, whatever cfg.Streams says;
// the implementation nats-subjects has a subject and a subscription per stream.
func SlowImpls() []Impl {
	return []Impl{
		{Name: "stream", Open: load.OpenSlow},
		{Name: "fast", Open: overFast(load.OpenSlow)},
		{Name: "nats", Open: func(d load.Dialer, cfg load.Config) (load.Session, error) {
			cfg.Streams = 1
			return newNATSSession(d, cfg, load.SlowWindow)
		}},
		{Name: "nats-subjects", Open: func(d load.Dialer, cfg load.Config) (load.Session, error) {
			return newNATSSession(d, cfg, load.SlowWindow)
		}},
	}
}
