package streamslog_test

import (
	"log/slog"
	"os"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamslog"
)

// The hooks of a client or server call these functions. Here the example calls them.
func ExampleNew() {
	logger := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
	hooks := streamslog.New(logger.With("client", "orders"))
	// client, err := stream.NewClient(stream.ClientParams{Conn: nc, Hooks: hooks})

	info := stream.StreamInfo{ID: 7, Subject: "logs"}
	hooks.Opened(info)                       // at the level Debug, which this logger does not take
	hooks.Closed(info, stream.Totals{}, nil) // the same
	hooks.Closed(info, stream.Totals{RecordsIn: 2, BytesIn: 64}, &stream.CloseError{Code: stream.CloseAbnormalClosure})
	// Output: level=WARN msg="stream closed" client=orders subject=logs side=consumer stream=7 duration=0s records_in=2 bytes_in=64 records_out=0 bytes_out=0 code=1006 error="nats stream: close 1006 (abnormal closure)"
}
