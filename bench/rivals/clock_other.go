//go:build !linux

package main

import "time"

// A clock wakes one goroutine at given times, late by the grain of time.Sleep.
type clock struct{}

func newClock() (*clock, error) { return new(clock), nil }

// sleep returns when d has passed.
func (c *clock) sleep(d time.Duration) error { time.Sleep(d); return nil }

func (c *clock) close() {}
