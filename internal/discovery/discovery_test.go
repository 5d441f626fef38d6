package discovery

import (
	"encoding/json"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go/micro"
)

func TestQuestionsOfAService(t *testing.T) {
	s, err := NewService("a-b", "1.0.0-rc.1+5", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, q := range s.Questions() {
		got = append(got, q.Subject)
	}
	slices.Sort(got)
	id := s.identity.ID
	if want := []string{
		"$SRV.INFO", "$SRV.INFO.a-b", "$SRV.INFO.a-b." + id,
		"$SRV.PING", "$SRV.PING.a-b", "$SRV.PING.a-b." + id,
		"$SRV.STATS", "$SRV.STATS.a-b", "$SRV.STATS.a-b." + id,
	}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestCountersOfAnEndpoint(t *testing.T) {
	s, err := NewService("a", "1.0.0", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	e, err := s.Add("one", "svc.one", "q")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Add("one", "svc.other", "q"); err == nil {
		t.Error("two endpoints have one name")
	}
	e.Count(3*time.Second, nil)
	e.Count(time.Second, errors.New("broken"))
	got := s.stats(map[string]int{"n": 1}).Endpoints[0]
	want := micro.EndpointStats{
		Name: "one", Subject: "svc.one", QueueGroup: "q", NumRequests: 2, NumErrors: 1, LastError: "broken",
		ProcessingTime: 4 * time.Second, AverageProcessingTime: 2 * time.Second, Data: json.RawMessage(`{"n":1}`),
	}
	a, _ := json.Marshal(got)
	b, _ := json.Marshal(want)
	if string(a) != string(b) {
		t.Errorf("%s, want %s", a, b)
	}
	s.Remove(e)
	if n := len(s.info().Endpoints); n != 0 {
		t.Errorf("%d endpoints are left", n)
	}
}

// locking is an error. Its text says whether the lock of an endpoint was free.
type locking struct{ endpoint *Endpoint }

func (l locking) Error() string {
	if !l.endpoint.mu.TryLock() {
		return "locked"
	}
	l.endpoint.mu.Unlock()
	return "free"
}

// The error of a handler is code of the user, which may take locks of its own.
func TestErrorsAreAskedForTheirTextsWithoutLocks(t *testing.T) {
	e := new(Endpoint)
	e.Count(time.Second, locking{e})
	if got := e.stats(nil).LastError; got != "free" {
		t.Errorf("the lock was %s", got)
	}
}
