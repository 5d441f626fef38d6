package faults

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

// peerEnv in the environment makes the test's binary one end of streams, to be killed, instead of what it is. peerURL
// is where the NATS server is.
const peerEnv, peerURL = "FAULTS_PEER", "FAULTS_URL"

// What a peer does for each kind of stream: it reads, or it reads what it writes, or it is silent.
var kinds = []string{"down", "echo", "mute"}

const perKind = 3 // streams of a peer

// peer is the main function of a process that will be killed. It ends by itself when its standard input does.
func peer(role, url string) int {
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	var err error
	if leave, ok := leavers[role]; ok {
		err = leave(url)
	} else if role == "consumer" {
		err = peerConsumer(url)
	} else {
		err = peerProducer(url)
	}
	fmt.Println(err)
	return 1
}

func peerProducer(url string) error {
	nc, err := dial(url)
	if err != nil {
		return err
	}
	srv, err := stream.NewServer(stream.ServerParams{Conn: nc})
	if err != nil {
		return err
	}
	for subject, h := range map[string]stream.Handler{"down": paced, "echo": echo, "mute": mute} {
		if _, err := srv.Handle(subject, h); err != nil {
			return err
		}
	}
	if err := nc.Flush(); err != nil {
		return err
	}
	fmt.Println("ready")
	select {}
}

func peerConsumer(url string) error {
	nc, err := dial(url)
	if err != nil {
		return err
	}
	client, err := stream.NewClient(stream.ClientParams{Conn: nc})
	if err != nil {
		return err
	}
	return consume(context.Background(), client, func(string, error) {}, func() { fmt.Println("ready") })
}

// paced writes for ever, but not too fast.
func paced(w *stream.Writer, _ *stream.Request) error {
	for {
		for range 16 {
			if _, err := w.Write(chance[:1000]); err != nil {
				return err
			}
		}
		time.Sleep(time.Millisecond)
	}
}

// consume opens streams of each kind and reads them until they end. It calls ready when each has brought something.
func consume(ctx context.Context, client *stream.Client, ended func(kind string, err error), ready func()) error {
	var all, first sync.WaitGroup
	for _, kind := range kinds {
		for range perKind {
			s, err := client.Open(ctx, kind, nil)
			if err != nil {
				return err
			}
			if kind == "echo" {
				go func() {
					for {
						if _, err := s.Write(chance[:1000]); err != nil {
							return
						}
						time.Sleep(100 * time.Microsecond)
					}
				}()
			}
			first.Add(1)
			all.Go(func() {
				defer s.Close()
				_, err := s.Recv()
				first.Done()
				for err == nil {
					_, err = s.Recv()
				}
				ended(kind, err)
			})
		}
	}
	first.Wait()
	ready()
	all.Wait()
	return io.EOF
}

// startPeer starts a peer and returns when it is ready. kill kills it and waits until it is gone.
func startPeer(t *testing.T, role, url string) (kill func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), peerEnv+"="+role, peerURL+"="+url)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe() // held open, or it would end by itself
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill = func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // it fails, for the process was killed
		_ = in.Close()
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		kill()
		t.Fatalf("the %s says %q, %v", role, line, err)
	}
	return kill
}

// gone is how long a peer may be gone until the other end says so.
var gone = hasty.KeepAlive + hasty.ResumeTimeout + slack

// TestConsumerGone kills the process of a consumer. The handlers' contexts end in time.
func TestConsumerGone(t *testing.T) {
	nats := streamtest.Run(t)
	for range runs(3, 20) {
		leakless(t, func() {
			nc := connect(t, nats.URL())
			defer nc.Close()
			srv, err := stream.NewServer(stream.ServerParams{Conn: nc, KeepAlive: hasty.KeepAlive, AckTimeout: hasty.AckTimeout, ResumeTimeout: hasty.ResumeTimeout})
			if err != nil {
				t.Fatal(err)
			}
			defer srv.Close()
			var handlers sync.WaitGroup
			var killed atomic.Pointer[time.Time]
			handle := func(kind string, h stream.Handler) error {
				_, err := srv.Handle(kind, func(w *stream.Writer, q *stream.Request) error {
					handlers.Add(1)
					watched := make(chan struct{})
					go func() {
						defer handlers.Done()
						<-q.Context().Done()
						if at := killed.Load(); at == nil || time.Since(*at) > gone {
							t.Errorf("%s: the context ended at the wrong time: killed at %v, now %v", kind, at, time.Now())
						}
						if err := context.Cause(q.Context()); !isCode(stream.CloseAbnormalClosure)(err) {
							t.Errorf("%s: the context ended with %v", kind, err)
						}
						close(watched)
					}()
					err := h(w, q)
					<-watched
					return err
				})
				return err
			}
			if err := errors.Join(handle("down", paced), handle("echo", echo), handle("mute", mute), nc.Flush()); err != nil {
				t.Fatal(err)
			}
			kill := startPeer(t, "consumer", nats.URL())
			now := time.Now()
			killed.Store(&now)
			kill()
			handlers.Wait()
			giveBack(t, srv.Stats)
		})
	}
}

// TestProducerGone kills the process of a producer. Readers are told in time.
func TestProducerGone(t *testing.T) {
	nats := streamtest.Run(t)
	for range runs(3, 20) {
		leakless(t, func() {
			kill := startPeer(t, "producer", nats.URL())
			nc := connect(t, nats.URL())
			defer nc.Close()
			p := hasty
			p.Conn = nc
			client, err := stream.NewClient(p)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			var killed atomic.Pointer[time.Time]
			err = consume(ctx, client, func(kind string, err error) {
				if at := killed.Load(); at == nil || time.Since(*at) > gone || !isCode(stream.CloseAbnormalClosure)(err) {
					t.Errorf("%s ended with %v; killed at %v, now %v", kind, err, at, time.Now())
				}
			}, func() {
				now := time.Now()
				killed.Store(&now)
				kill()
			})
			if err != io.EOF {
				t.Error(err)
			}
			giveBack(t, client.Stats)
		})
	}
}

// giveBack fails the test unless the streams that stats counts are given back in time.
func giveBack(t *testing.T, stats ...func() stream.Stats) {
	t.Helper()
	for _, f := range stats {
		if !within(settled, func() bool { s := f(); return s.Streams == 0 && s.Reserved == 0 }) {
			t.Errorf("not given back: %+v", f())
		}
	}
}
