package liveness

// Clock is the time by which peers are judged. It runs only while this end can hear them: it stands still while the
// connection is down, while this end drops answers, and while the process does not run. So time that the connection was
// up adds up over any number of reconnects, and a standstill of this end is not silence of its peers.
//
// The clock is corrected at its ticks. Between two ticks it runs, for limit at most. One goroutine, the outbox, owns
// it.
type Clock struct {
	limit   int64
	at      int64 // time of the last tick
	stopped int64 // for how long the clock stood still, altogether
	resumed int64 // when it began to run again, on this clock
	running bool
}

// NewClock returns a clock. A tick more than limit after the one before shows that the process stood still.
func NewClock(limit int64) Clock { return Clock{limit: limit, running: true} }

// Tick sets the clock at time now. hears says that this end can hear its peers, and broke that it could not at some
// time since the last tick.
func (c *Clock) Tick(now int64, hears, broke bool) {
	reads := c.Now(now)
	if hears && (broke || !c.running || now-c.at > c.limit) {
		c.resumed = reads
	}
	c.at, c.stopped, c.running = now, now-reads, hears
}

// Start sets the clock at time now, after a time without ticks in which nobody used the clock.
func (c *Clock) Start(now int64) { c.at, c.stopped = now, now-c.Now(now) }

// Now reads the clock. now is the time, as in Tick.
func (c *Clock) Now(now int64) int64 {
	if !c.running {
		now = c.at
	}
	return min(now, c.at+c.limit) - c.stopped
}

// Resumed reads when the clock began to run again, 0 if it never stood still.
func (c *Clock) Resumed() int64 { return c.resumed }

// Until returns when, at the earliest, the clock will read t.
func (c *Clock) Until(t int64) int64 { return t + c.stopped }

// At returns the reading of the clock at time t, or less if it stood still since.
func (c *Clock) At(t int64) int64 { return max(1, t-c.stopped) }
