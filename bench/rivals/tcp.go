package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"math/big"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
	"github.com/quic-go/quic-go"
)

// Over bytes, a record has a prefix of four bytes with its length. Writers and readers have a buffer of byteBuffer.
const byteBuffer = 32 << 10

type byteLane struct {
	w *bufio.Writer
	r *bufio.Reader
	// buf holds a record that is larger than the reader's buffer.
	buf []byte
}

func newByteLane(w io.Writer, r io.Reader) *byteLane {
	return &byteLane{w: bufio.NewWriterSize(w, byteBuffer), r: bufio.NewReaderSize(r, byteBuffer)}
}

func (l *byteLane) send(rec []byte) error {
	// To append to the free part of the buffer spares the escape of an array.
	if _, err := l.w.Write(binary.LittleEndian.AppendUint32(l.w.AvailableBuffer(), uint32(len(rec)))); err != nil {
		return err
	}
	_, err := l.w.Write(rec)
	return err
}

func (l *byteLane) flush() error { return l.w.Flush() }

// next returns the next record. It is valid until the next call.
func (l *byteLane) next() ([]byte, error) {
	prefix, err := l.r.Peek(4)
	if err != nil {
		return nil, err
	}
	n := int(binary.LittleEndian.Uint32(prefix))
	if 4+n <= byteBuffer {
		rec, err := l.r.Peek(4 + n)
		if err != nil {
			return nil, err
		}
		_, err = l.r.Discard(4 + n)
		return rec[4:], err
	}
	if _, err := l.r.Discard(4); err != nil {
		return nil, err
	}
	if cap(l.buf) < n {
		l.buf = make([]byte, n)
	}
	_, err = io.ReadFull(l.r, l.buf[:n])
	return l.buf[:n], err
}

func (l *byteLane) receive(take func([]byte)) error {
	for {
		rec, err := l.next()
		if err != nil {
			return err
		}
		take(rec)
	}
}

// connectTCP returns the two ends of a TCP connection over loopback.
func connectTCP() (near, far net.Conn, err error) {
	l, err := listenTCP()
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	if near, err = net.Dial("tcp", l.Addr().String()); err != nil {
		return nil, nil, err
	}
	if far, err = l.Accept(); err != nil {
		near.Close()
		return nil, nil, err
	}
	return near, far, nil
}

// openYamux returns the producer's and the consumer's ends of n streams.
func openYamux(n int) (producers, consumers []*yamux.Stream, closer func(), err error) {
	near, far, err := connectTCP()
	if err != nil {
		return nil, nil, nil, err
	}
	cfg := yamux.DefaultConfig()
	cfg.LogOutput = io.Discard
	cfg.AcceptBacklog = max(cfg.AcceptBacklog, n)
	server, err := yamux.Server(far, cfg)
	if err != nil {
		near.Close()
		far.Close()
		return nil, nil, nil, err
	}
	client, err := yamux.Client(near, cfg)
	if err != nil {
		near.Close()
		server.Close()
		return nil, nil, nil, err
	}
	closer = func() { client.Close(); server.Close() }
	for range n {
		c, err := client.OpenStream()
		if err != nil {
			closer()
			return nil, nil, nil, err
		}
		p, err := server.AcceptStream()
		if err != nil {
			closer()
			return nil, nil, nil, err
		}
		producers, consumers = append(producers, p), append(consumers, c)
	}
	return producers, consumers, closer, nil
}

func yamuxRival() rival {
	return rival{
		name: "yamux", settings: "over loopback TCP, defaults, records with a length prefix through buffers of 32 KiB",
		open: func(_ *env, streams int) ([]lane, func(), error) {
			producers, consumers, closer, err := openYamux(streams)
			if err != nil {
				return nil, nil, err
			}
			lanes := make([]lane, streams)
			for i := range lanes {
				lanes[i] = newByteLane(producers[i], consumers[i])
			}
			return lanes, closer, nil
		},
	}
}

func yamuxHolder() holder {
	return holder{"yamux", func(_ *env, n int) (idleStreams, error) {
		_, _, closer, err := openYamux(n)
		return idleStreams{closer: closer}, err
	}}
}

func quicRival() rival {
	return rival{
		name: "quic-go", settings: "over loopback UDP, limit of incoming streams raised, records with a length prefix through buffers of 32 KiB", maxStreams: 100,
		open: openQUIC,
	}
}

func openQUIC(_ *env, streams int) ([]lane, func(), error) {
	certificate, err := selfSigned()
	if err != nil {
		return nil, nil, err
	}
	const protocol = "records"
	cfg := &quic.Config{MaxIncomingStreams: 20_000, MaxIdleTimeout: time.Hour}
	l, err := quic.ListenAddr("127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{certificate}, NextProtos: []string{protocol}}, cfg)
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	// This process made the certificate, and both ends are in this process.
	near, err := quic.DialAddr(ctx, l.Addr().String(), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{protocol}}, cfg) //nolint:gosec
	if err != nil {
		l.Close()
		return nil, nil, err
	}
	closer := func() { _ = near.CloseWithError(0, ""); l.Close() }
	far, err := l.Accept(ctx)
	if err != nil {
		closer()
		return nil, nil, err
	}
	lanes := make([]lane, streams)
	for i := range lanes {
		c, err := near.OpenStreamSync(ctx)
		if err == nil {
			_, err = c.Write([]byte{0}) // a stream exists for its peer when it carries a byte
		}
		if err != nil {
			closer()
			return nil, nil, err
		}
		p, err := far.AcceptStream(ctx)
		if err == nil {
			_, err = io.ReadFull(p, make([]byte, 1))
		}
		if err != nil {
			closer()
			return nil, nil, err
		}
		lanes[i] = newByteLane(p, c)
	}
	return lanes, closer, nil
}

// selfSigned makes a certificate for this run.
func selfSigned() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, &key.PublicKey, key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}

// relayRival is the ceiling, no protocol at all: a goroutine in the place of a NATS server copies bytes from the
// producer's connection to the consumer's. All streams share the two connections.
func relayRival() rival {
	return rival{name: "relay", settings: "bare TCP through a relay that copies bytes, records with a length prefix through buffers of 32 KiB", shared: true, open: openRelay}
}

type relay struct {
	*byteLane
	registered sync.WaitGroup
	takes      []func([]byte)
	done       chan struct{}
}

type relayLane struct {
	*relay
	i int
}

func openRelay(_ *env, streams int) ([]lane, func(), error) {
	producer, in, err := connectTCP()
	if err != nil {
		return nil, nil, err
	}
	out, consumer, err := connectTCP()
	if err != nil {
		producer.Close()
		in.Close()
		return nil, nil, err
	}
	go func() {
		// The wrappers keep io.Copy from a splice within the kernel: a server that looks at the bytes has to copy them.
		type reader struct{ io.Reader }
		type writer struct{ io.Writer }
		_, _ = io.CopyBuffer(writer{out}, reader{in}, make([]byte, 2*byteBuffer))
		out.Close()
	}()
	r := &relay{byteLane: newByteLane(producer, consumer), takes: make([]func([]byte), streams), done: make(chan struct{})}
	r.registered.Add(streams)
	lanes := make([]lane, streams)
	for i := range lanes {
		lanes[i] = &relayLane{r, i}
	}
	return lanes, func() { producer.Close(); in.Close(); consumer.Close(); out.Close(); close(r.done) }, nil
}

// receive of the first lane reads for all, because their records share a connection.
func (l *relayLane) receive(take func([]byte)) error {
	l.takes[l.i] = take
	l.registered.Done()
	if l.i != 0 {
		<-l.done
		return nil
	}
	l.registered.Wait()
	for {
		rec, err := l.next()
		if err != nil {
			return err
		}
		i := streamOf(rec)
		if i >= uint64(len(l.takes)) {
			return errors.New("a record of a stream that does not exist")
		}
		l.takes[i](rec)
	}
}
