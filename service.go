package stream

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream/internal/discovery"
)

// This file has Service, the view of a server that NATS tools find. Goroutines of the user run the exported functions.
// The callbacks of NATS run answer, and the goroutines of handlers run the functions that count. When the server ends,
// goroutines of its own run stopListening. Service.mu guards the subscriptions and endpoints.

// ServiceQueue is the queue group of the endpoints of a [Service], as in package micro of nats.go.
const ServiceQueue = "q"

// Service is a group of subjects that a [Server] serves, and that NATS tools find by name. The command nats shows it:
//
//	nats service ls
//	nats service info NAME
//	nats service stats NAME
//
// It answers requests on subjects below $SRV, in the format of package micro of nats.go. The statistics of an endpoint
// count handlers that have returned: their number, their errors and panics, and the time they took. Their field data is
// the [Stats] of the server. A Service is safe for use by many goroutines at once.
type Service struct {
	server *Server
	found  *discovery.Service

	mu        sync.Mutex
	stop      []func()
	endpoints []*Registration
	stopped   bool
}

// AddService announces a service to NATS tools. name has letters, digits, dashes and underscores; version has the form
// 1.2.3. description and metadata are for people. The service has no endpoints before [Service.Handle]. It ends with
// [Service.Stop], [Server.Drain] or [Server.Close].
//
// The server's user needs permission to subscribe to $SRV.> and to answer there, see docs/PROTOCOL.md section 15.
//
// Errors: an error that names the invalid argument; those of [nats.Conn.Subscribe]; [ErrServerClosed] after the
// server's end.
func (s *Server) AddService(name, version, description string, metadata map[string]string) (*Service, error) {
	found, err := discovery.NewService(name, version, description, metadata)
	if err != nil {
		return nil, fmt.Errorf("stream: AddService: %w", err)
	}
	v := &Service{server: s, found: found}
	v.mu.Lock() // until all subscriptions are made: Stop waits for them
	defer v.mu.Unlock()
	s.mu.Lock()
	ending := s.idle != nil
	if !ending {
		s.services[v] = struct{}{}
	}
	s.mu.Unlock()
	if ending {
		return nil, ErrServerClosed
	}
	for _, q := range found.Questions() {
		stop, err := s.ep.conn.Subscribe(q.Subject, "", func(m *nats.Msg) { v.answer(m, q) })
		if err != nil {
			s.mu.Lock()
			delete(s.services, v)
			s.mu.Unlock()
			unsubscribeAll(v.stop)
			return nil, fmt.Errorf("stream: AddService: subscribe to %s: %w", q.Subject, err)
		}
		v.stop = append(v.stop, stop)
	}
	return v, nil
}

// answer answers a question. A question without a reply subject is dropped.
func (v *Service) answer(m *nats.Msg, q discovery.Question) {
	if m.Reply == "" {
		return
	}
	b, err := q.Answer(func() any { return v.server.Stats() })
	if err == nil {
		err = v.server.ep.conn.Publish(m.Reply, "", b)
		v.server.ep.conn.Push()
	}
	if err != nil {
		v.server.journal.Warn("stream: a question about a service is not answered", "subject", m.Subject, "error", err)
	}
}

// Handle serves the requests on subject with h, as an endpoint of the service. It is [Server.HandleQueue] with the
// queue group [ServiceQueue]. name has letters, digits, dashes and underscores, and is unique in the service. Errors:
// an error for an invalid name; those of [Server.Handle]; [ErrServerClosed] after Stop.
func (v *Service) Handle(name, subject string, h Handler) (*Registration, error) {
	return v.HandleQueue(name, subject, ServiceQueue, h)
}

// HandleQueue is Handle with another queue group, or none if queue is empty. Each instance of the service then gets
// each request.
func (v *Service) HandleQueue(name, subject, queue string, h Handler) (*Registration, error) {
	var e *discovery.Endpoint // set before a request arrives
	var counted Handler
	if h != nil {
		counted = func(w *Writer, r *Request) error { return count(e, h, w, r) }
	}
	around, err := v.server.intercept(counted) // before the lock: interceptors may call methods of v
	if err != nil {
		return nil, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.stopped {
		return nil, ErrServerClosed
	}
	if e, err = v.found.Add(name, subject, queue); err != nil {
		return nil, fmt.Errorf("stream: Service.Handle: %w", err)
	}
	r, err := v.server.register(subject, queue, around)
	if err != nil {
		v.found.Remove(e)
		return nil, err
	}
	v.endpoints = append(v.endpoints, r)
	return r, nil
}

var errPanicked = errors.New("the handler panicked")

// count runs h and counts it.
func count(e *discovery.Endpoint, h Handler, w *Writer, r *Request) (err error) {
	start, returned := time.Now(), false
	defer func() {
		failed := err
		if !returned {
			failed = errPanicked
		} else if isNormal(err) {
			failed = nil
		}
		e.Count(time.Since(start), failed)
	}()
	err = h(w, r)
	returned = true
	return err
}

// Stop ends the service: tools do not find it any more, and no further requests reach its handlers. Running handlers go
// on. It returns when NATS has confirmed that, within about 2 s. A second call, or one after the server's end, does
// nothing.
func (v *Service) Stop() {
	v.stopListening()
	v.mu.Lock()
	endpoints := v.endpoints
	v.endpoints = nil
	v.mu.Unlock()
	var all sync.WaitGroup
	for _, r := range endpoints {
		all.Go(r.Stop)
	}
	all.Wait()
}

// stopListening ends the subscriptions to questions.
func (v *Service) stopListening() {
	v.mu.Lock()
	stop := v.stop
	v.stop, v.stopped = nil, true
	v.mu.Unlock()
	unsubscribeAll(stop)
	v.server.mu.Lock()
	delete(v.server.services, v)
	v.server.mu.Unlock()
}

func unsubscribeAll(stop []func()) {
	var all sync.WaitGroup
	for _, f := range stop {
		all.Go(f)
	}
	all.Wait()
}
