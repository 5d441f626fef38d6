package main

import (
	"fmt"
	"strconv"
	"time"
)

// A gatherer pairs the two ends of streams: the consumer opens stream i with i as its question, and the producer's
// handler hands over its sender.
type gatherer[T any] struct {
	arrived chan arrival[T]
	done    chan struct{} // closed when the handlers may return
}

type arrival[T any] struct {
	i      int
	sender T
}

func newGatherer[T any](streams int) *gatherer[T] {
	return &gatherer[T]{arrived: make(chan arrival[T], streams), done: make(chan struct{})}
}

func question(i int) []byte { return strconv.AppendInt(nil, int64(i), 10) }

// add is called by the producer's handler with the question it got.
func (g *gatherer[T]) add(question []byte, sender T) error {
	i, err := strconv.Atoi(string(question))
	if err != nil {
		return err
	}
	g.arrived <- arrival[T]{i, sender}
	return nil
}

// hold is the body of a handler with a sender that must not outlive it. It returns when all is over.
func (g *gatherer[T]) hold(question []byte, sender T) error {
	if err := g.add(question, sender); err != nil {
		return err
	}
	<-g.done
	return nil
}

// wait returns the senders of n streams, in the order of their numbers.
func (g *gatherer[T]) wait(n int) ([]T, error) {
	senders := make([]T, n)
	limit := time.NewTimer(30 * time.Second)
	defer limit.Stop()
	for got := range n {
		select {
		case a := <-g.arrived:
			senders[a.i] = a.sender
		case <-limit.C:
			return nil, fmt.Errorf("%d of %d requests arrived at their producer", got, n)
		}
	}
	return senders, nil
}
