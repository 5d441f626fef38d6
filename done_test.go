package stream_test

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// wantDone fails the test unless done is closed in time and err is want.
func wantDone(t *testing.T, done <-chan struct{}, err func() error, want error) {
	t.Helper()
	waitFor(t, "Done", func() { <-done })
	if err := err(); !errors.Is(err, want) {
		t.Errorf("Err: %v, want %v", err, want)
	}
}

func wantNotDone(t *testing.T, done <-chan struct{}, err error) {
	t.Helper()
	select {
	case <-done:
		t.Error("Done is closed too early")
	default:
	}
	if err != nil {
		t.Errorf("Err too early: %v", err)
	}
}

func TestDoneTellsWhy(t *testing.T) {
	t.Run("closed", func(t *testing.T) {
		p := newPair(t)
		s := newService(t, p, stream.ServerParams{})
		wantNotDone(t, s.Done(), s.Err())
		wantNotDone(t, p.consumer.Done(), p.consumer.Err())
		if err := errors.Join(s.Close(), p.consumer.Close()); err != nil {
			t.Fatal(err)
		}
		wantDone(t, s.Done(), s.Err, stream.ErrServerClosed)
		wantDone(t, p.consumer.Done(), p.consumer.Err, stream.ErrClientClosed)
	})
	t.Run("drained", func(t *testing.T) {
		h := newHeld()
		p, s := newServed(t, stream.ServerParams{}, h.handle)
		st := begin(t, p, "svc")
		drained := make(chan error, 1)
		go func() { drained <- s.Drain(testContext(t)) }()
		eventually(t, "it takes no requests", func() bool { return errors.Is(refusedWith(t, p, "svc"), nats.ErrNoResponders) })
		wantNotDone(t, s.Done(), s.Err())
		close(h.release)
		wantEOF(t, st)
		wantDone(t, s.Done(), s.Err, stream.ErrServerClosed)
		if err := <-drained; err != nil {
			t.Error(err)
		}
	})
	t.Run("connection closed", func(t *testing.T) {
		p := newPair(t)
		s := newService(t, p, stream.ServerParams{})
		s.nc.Close()
		p.consumer.Conn.Close()
		wantDone(t, s.Done(), s.Err, nats.ErrConnectionClosed)
		wantDone(t, p.consumer.Done(), p.consumer.Err, nats.ErrConnectionClosed)
		if err := errors.Join(s.Close(), p.consumer.Close()); err != nil {
			t.Error(err)
		}
		wantDone(t, s.Done(), s.Err, nats.ErrConnectionClosed) // what came first
	})
	t.Run("connection down", func(t *testing.T) {
		p := newPair(t)
		s := newService(t, p, stream.ServerParams{}, nats.ReconnectWait(0))
		if err := s.nc.ForceReconnect(); err != nil {
			t.Fatal(err)
		}
		s.handle(t, "svc", nothing)
		wantEOF(t, open(t, p.consumer, "svc"))
		wantNotDone(t, s.Done(), s.Err())
	})
}

// A handler without an end of its own returns when its server drains, and Drain goes through.
func TestDrainingTellsHandlers(t *testing.T) {
	const followers = 20
	var following sync.WaitGroup
	following.Add(followers)
	p, s := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("a"))
		select {
		case <-r.Draining():
			t.Error("Draining is closed before Drain")
		default:
			following.Done()
		}
		select {
		case <-r.Draining():
		case <-r.Context().Done():
			t.Errorf("the context ended first: %v", context.Cause(r.Context()))
		}
		write(t, w, []byte("b"))
		return nil
	})
	var streams []*stream.Stream
	for range followers {
		streams = append(streams, open(t, p.consumer, "svc"))
	}
	waitFor(t, "all handlers to run", following.Wait)
	drained := make(chan error, 1)
	go func() { drained <- s.Drain(testContext(t)) }()
	for _, st := range streams {
		if records, err := readAll(st); len(records) != 2 || err != io.EOF {
			t.Errorf("%d records, %v", len(records), err)
		}
	}
	var err error
	waitFor(t, "Drain", func() { err = <-drained })
	if err != nil {
		t.Error(err)
	}
}

// Close ends what Drain would have waited for, and a handler that looks only at Draining returns too.
func TestDrainingIsClosedByClose(t *testing.T) {
	returned := make(chan struct{})
	p, s := newServed(t, stream.ServerParams{}, func(w *stream.Writer, r *stream.Request) error {
		write(t, w, []byte("a"))
		<-r.Draining()
		close(returned)
		return nil
	})
	st := begin(t, p, "svc")
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	waitFor(t, "the handler", func() { <-returned })
	if _, err := st.Recv(); !errors.Is(err, &stream.CloseError{Code: stream.CloseGoingAway}) {
		t.Errorf("the consumer reads %v", err)
	}
}

// An argument that is nil is named by the error, which matches that of nats.go.
func TestErrorsNameWhatIsNil(t *testing.T) {
	p := newPair(t)
	s := newService(t, p, stream.ServerParams{})
	var none context.Context
	_, noClientConn := stream.NewClient(stream.ClientParams{})
	_, noServerConn := stream.NewServer(stream.ServerParams{})
	_, noClient := stream.NewWriter(nil, "x").Write(nil)
	_, noOpen := p.consumer.Open(none, "x", nil)
	w, st := newWriterStream(t, p)
	noSync := w.Sync(none)
	for name, c := range map[string]struct{ err, is error }{
		"ClientParams.Conn": {noClientConn, nats.ErrInvalidConnection},
		"ServerParams.Conn": {noServerConn, nats.ErrInvalidConnection},
		"NewWriter":         {noClient, nats.ErrInvalidConnection},
		"Open":              {noOpen, nats.ErrInvalidContext},
		"Sync":              {noSync, nats.ErrInvalidContext},
		"Server.Drain":      {s.Drain(none), nats.ErrInvalidContext},
	} {
		if !errors.Is(c.err, c.is) || !strings.Contains(c.err.Error(), name) {
			t.Errorf("%s: %v", name, c.err)
		}
	}
	closeWriter(t, w)
	wantEOF(t, st)
}
