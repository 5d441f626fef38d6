package faults

import (
	"fmt"
	"testing"
	"time"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// TestSmallPending streams through a server that holds little for a connection. With no_fast_producer_stall it drops
// what comes while it holds more than three quarters of that; without, it cuts off the connection.
func TestSmallPending(t *testing.T) {
	for name, noStall := range map[string]bool{"dropped": true, "cut off": false} {
		t.Run(name, func(t *testing.T) {
			srv := streamtest.Run(t, streamtest.WithConfig(fmt.Sprintf(`
				no_fast_producer_stall: %v
				max_pending: 128KB
				max_payload: 32KB`, noStall)))
			for range runs(3, 30) {
				trial{server: srv.URL(), client: srv.URL(), records: 400, streams: 1, large: true, calm: true, // 6.5 MB each
					times: stream.ClientParams{AckTimeout: 20 * time.Millisecond}, fault: func(*rig) {}}.run(t)
			}
		})
	}
}
