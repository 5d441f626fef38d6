package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/micro"

	"github.com/natsstream/stream"
)

// find announces a service, and compares what the command nats shows of it with what happened.
func find(tool, url string) (err error) {
	nc, err := nats.Connect(url)
	if err != nil {
		return err
	}
	defer nc.Close()
	server, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		return err
	}
	defer server.Close()
	service, err := server.AddService("prices", "1.2.3", "tells prices", nil)
	if err != nil {
		return err
	}
	if _, err := service.Handle("quote", "svc.quote", func(_ *stream.Writer, r *stream.Request) error {
		if len(r.Data) == 0 {
			return errors.New("no symbol")
		}
		return nil
	}); err != nil {
		return err
	}
	if err := nc.FlushTimeout(patience); err != nil {
		return err
	}
	client, err := stream.NewClient(stream.ClientParams{Conn: nc})
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	const good, bad = 5, 2
	for i := range good + bad {
		s, err := client.Open(ctx, "svc.quote", []byte("x")[:min(1, i/bad)])
		if err != nil {
			return err
		}
		for err == nil {
			_, err = s.Recv()
		}
	}
	return compare(ctx, tool, url, good+bad, bad)
}

// compare returns an error unless the command shows the service with its requests and errors.
func compare(ctx context.Context, tool, url string, requests, failed int) error {
	ask := func(answer any, args ...string) error {
		out, err := exec.CommandContext(ctx, tool, append([]string{"--server", url, "service"}, args...)...).CombinedOutput()
		if err == nil && answer != nil {
			err = json.Unmarshal(out, answer)
		}
		if err != nil {
			return fmt.Errorf("%s service %v: %w\n%s", tool, args, err, out)
		}
		return nil
	}
	var list []micro.Info
	var one struct {
		Info  micro.Info  `json:"info"`
		Stats micro.Stats `json:"stats"`
	}
	var stats []micro.Stats
	if err := errors.Join(ask(&list, "ls", "--json"), ask(&one, "info", "prices", "--json"), ask(&stats, "stats", "prices", "--json"), ask(nil, "ping", "prices")); err != nil {
		return err
	}
	if len(list) != 1 || list[0].Name != "prices" || len(one.Info.Endpoints) != 1 || one.Info.Endpoints[0].Subject != "svc.quote" {
		return fmt.Errorf("%s shows the service as %+v and %+v", tool, list, one.Info)
	}
	if len(stats) != 1 || len(stats[0].Endpoints) != 1 {
		return fmt.Errorf("%s shows the statistics as %+v", tool, stats)
	}
	if e := stats[0].Endpoints[0]; e.NumRequests != requests || e.NumErrors != failed || e.LastError != "no symbol" || e.ProcessingTime <= 0 || len(e.Data) == 0 {
		return fmt.Errorf("%s shows the endpoint as %+v", tool, e)
	}
	return nil
}
