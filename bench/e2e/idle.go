package e2e

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/internal/load"
)

// IdleCost is the cost at the consumer of one open stream that the producer does
// not answer.
type IdleCost struct {
	HeapBytes  float64 // heap in use after collection
	StackBytes float64
	Goroutines float64
	OpenTime   time.Duration // to open one
}

// Bytes is heap and stacks together.
func (c IdleCost) Bytes() float64 { return c.HeapBytes + c.StackBytes }

// Idle opens n streams to a producer that takes requests and never answers,
// measures by how much the process has grown, and closes them.
func Idle(env *Env, n int) (_ IdleCost, err error) {
	conns, err := load.DialPair(env)
	if err != nil {
		return IdleCost{}, err
	}
	defer conns.Close()
	var requests atomic.Int64
	subject := nats.NewInbox()
	sub, err := conns.Producer.Subscribe(subject, func(*nats.Msg) { requests.Add(1) })
	if err != nil {
		return IdleCost{}, err
	}
	if err := sub.SetPendingLimits(noPendingLimit, noPendingLimit); err != nil {
		return IdleCost{}, err
	}
	if err := conns.Producer.Flush(); err != nil {
		return IdleCost{}, err
	}
	client, err := stream.NewClient(stream.ClientParams{Conn: conns.Consumer})
	if err != nil {
		return IdleCost{}, err
	}
	defer func() { err = errors.Join(err, client.Close()) }()

	streams := make([]*stream.Stream, 0, n)
	open := func(n int) error {
		want := requests.Load() + int64(n)
		for range n {
			s, err := client.Open(context.Background(), subject, nil)
			if err != nil {
				return err
			}
			streams = append(streams, s)
		}
		for limit := time.Now().Add(30 * time.Second); requests.Load() < want; time.Sleep(time.Millisecond) {
			if time.Now().After(limit) {
				return errors.New("idle: a request did not arrive")
			}
		}
		return nil
	}
	defer func() {
		for _, s := range streams {
			err = errors.Join(err, s.Close())
		}
	}()

	// The first streams cause allocations that are made once. They are not a
	// cost of an idle stream.
	first := min(100, n/10)
	if err := open(first); err != nil {
		return IdleCost{}, err
	}
	heap0, stack0, goroutines0 := inUse()
	start := time.Now()
	if err := open(n - first); err != nil {
		return IdleCost{}, err
	}
	took := time.Since(start)
	heap1, stack1, goroutines1 := inUse()
	count := float64(n - first)
	return IdleCost{
		HeapBytes:  (heap1 - heap0) / count,
		StackBytes: (stack1 - stack0) / count,
		Goroutines: (goroutines1 - goroutines0) / count,
		OpenTime:   took / time.Duration(n-first),
	}, env.Err()
}

func inUse() (heap, stack, goroutines float64) {
	runtime.GC()
	runtime.GC() // the first collection keeps the pools' contents for one more round; this one frees them
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapInuse), float64(m.StackInuse), float64(runtime.NumGoroutine())
}

// KeepAlive measures the cost of liveness checks for n idle streams: the processor time of both ends and of the NATS
// server between them, as a part of the time that passes, which is about d.
func KeepAlive(env *Env, n int, d time.Duration) (_ float64, err error) {
	conns, err := load.DialPair(env)
	if err != nil {
		return 0, err
	}
	defer conns.Close()
	server, err := stream.NewServer(stream.ServerParams{Conn: conns.Producer, MaxStreams: n})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, server.Close()) }()
	subject := nats.NewInbox()
	var running atomic.Int64
	if _, err := server.Handle(subject, func(_ *stream.Writer, r *stream.Request) error {
		running.Add(1)
		<-r.Context().Done()
		return nil
	}); err != nil {
		return 0, err
	}
	if err := conns.Producer.Flush(); err != nil {
		return 0, err
	}
	client, err := stream.NewClient(stream.ClientParams{Conn: conns.Consumer})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, client.Close()) }()
	for i := range n {
		if _, err := client.Open(context.Background(), subject, nil); err != nil {
			return 0, err
		}
		for limit := time.Now().Add(30 * time.Second); running.Load() < int64(i-1000); time.Sleep(time.Millisecond) {
			if time.Now().After(limit) {
				return 0, errors.New("keep-alive: a request did not arrive")
			}
		}
	}
	time.Sleep(d / 4) // until all streams have asked their first questions
	runtime.GC()
	start, used := time.Now(), load.CPUTime()
	time.Sleep(d)
	cost := float64(load.CPUTime()-used) / float64(time.Since(start))
	if got := client.Stats().Streams; got != n {
		return 0, fmt.Errorf("keep-alive: %d of %d streams are left", got, n)
	}
	return cost, env.Err()
}
