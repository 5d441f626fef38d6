//go:build !linux

package main

import "time"

// A clock wakes one goroutine, late by the grain of time.Sleep.
type clock struct{}

func newClock(time.Duration) (*clock, error) { return new(clock), nil }

// wait returns after d.
func (c *clock) wait(d time.Duration) error { time.Sleep(d); return nil }

func (c *clock) close() {}
