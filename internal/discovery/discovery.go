// Package discovery answers the questions by which NATS tools find services: PING, INFO and STATS on subjects below
// $SRV, in the format of package micro of nats.go (ADR-32 of github.com/nats-io/nats-architecture-and-design). It knows
// neither connections nor streams. Any goroutine may call it.
package discovery

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/micro"
	"github.com/nats-io/nuid"
)

// Subjects begins the subjects of all questions.
const Subjects = micro.APIPrefix + "."

// Service is a service and the counters of its endpoints. Its methods may be called concurrently.
type Service struct {
	identity    micro.ServiceIdentity
	description string
	started     time.Time

	mu        sync.Mutex
	endpoints []*Endpoint
}

// Endpoint is a subject of a service, with its counters.
type Endpoint struct {
	info micro.EndpointInfo

	mu       sync.Mutex
	requests int
	errors   int
	last     string
	took     time.Duration
}

var (
	name    = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)
	version = regexp.MustCompile(`^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?(\+[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?$`)
)

// NewService returns a service with an ID of its own. It returns an error for a name or version that tools do not
// accept.
func NewService(service, number, description string, metadata map[string]string) (*Service, error) {
	if !name.MatchString(service) {
		return nil, fmt.Errorf("the name of a service has letters, digits, dashes and underscores only, it is %q", service)
	}
	if !version.MatchString(number) {
		return nil, fmt.Errorf("the version of a service has the form 1.2.3 (semver.org), it is %q", number)
	}
	if metadata == nil {
		metadata = map[string]string{}
	}
	return &Service{
		identity:    micro.ServiceIdentity{Name: service, ID: nuid.Next(), Version: number, Metadata: metadata},
		description: description, started: time.Now().UTC(),
	}, nil
}

// Add adds an endpoint. It returns an error for a name that tools do not accept, or that the service has already.
func (s *Service) Add(endpoint, subject, queue string) (*Endpoint, error) {
	if !name.MatchString(endpoint) {
		return nil, fmt.Errorf("the name of an endpoint has letters, digits, dashes and underscores only, it is %q", endpoint)
	}
	e := &Endpoint{info: micro.EndpointInfo{Name: endpoint, Subject: subject, QueueGroup: queue}}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, other := range s.endpoints {
		if other.info.Name == endpoint {
			return nil, fmt.Errorf("the service has an endpoint %q already", endpoint)
		}
	}
	s.endpoints = append(s.endpoints, e)
	return e, nil
}

// Remove takes an endpoint out.
func (s *Service) Remove(e *Endpoint) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endpoints = slices.DeleteFunc(s.endpoints, func(other *Endpoint) bool { return other == e })
}

// Question is a subject that a service listens on, and its answer. The answer calls data for the further data of STATS.
type Question struct {
	Subject string
	Answer  func(data func() any) ([]byte, error)
}

// Questions returns all questions that a service answers: each of PING, INFO and STATS to all services, to those of its
// name, and to it alone.
func (s *Service) Questions() []Question {
	var all []Question
	for verb, answer := range map[micro.Verb]func(func() any) any{
		micro.PingVerb:  func(func() any) any { return micro.Ping{ServiceIdentity: s.identity, Type: micro.PingResponseType} },
		micro.InfoVerb:  func(func() any) any { return s.info() },
		micro.StatsVerb: func(data func() any) any { return s.stats(data()) },
	} {
		for _, to := range [][2]string{{}, {s.identity.Name}, {s.identity.Name, s.identity.ID}} {
			subject, err := micro.ControlSubject(verb, to[0], to[1])
			if err != nil {
				panic(err) // an ID without a name
			}
			all = append(all, Question{subject, func(data func() any) ([]byte, error) { return json.Marshal(answer(data)) }})
		}
	}
	return all
}

func (s *Service) info() micro.Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := micro.Info{ServiceIdentity: s.identity, Type: micro.InfoResponseType, Description: s.description, Endpoints: []micro.EndpointInfo{}}
	for _, e := range s.endpoints {
		i.Endpoints = append(i.Endpoints, e.info)
	}
	return i
}

// stats returns the counters of all endpoints. Each has data as its further data.
func (s *Service) stats(data any) micro.Stats {
	raw, err := json.Marshal(data)
	if err != nil {
		raw = nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st := micro.Stats{ServiceIdentity: s.identity, Type: micro.StatsResponseType, Started: s.started, Endpoints: []*micro.EndpointStats{}}
	for _, e := range s.endpoints {
		st.Endpoints = append(st.Endpoints, e.stats(raw))
	}
	return st
}

// Count counts a request that took d and failed with err, or succeeded.
func (e *Endpoint) Count(d time.Duration, err error) {
	var text string
	if err != nil {
		text = err.Error() // code of the user, so before the lock
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.requests++
	e.took += d
	if err != nil {
		e.errors++
		e.last = text
	}
}

func (e *Endpoint) stats(data json.RawMessage) *micro.EndpointStats {
	e.mu.Lock()
	defer e.mu.Unlock()
	st := &micro.EndpointStats{
		Name: e.info.Name, Subject: e.info.Subject, QueueGroup: e.info.QueueGroup,
		NumRequests: e.requests, NumErrors: e.errors, LastError: e.last, ProcessingTime: e.took, Data: data,
	}
	if e.requests > 0 {
		st.AverageProcessingTime = e.took / time.Duration(e.requests)
	}
	return st
}
