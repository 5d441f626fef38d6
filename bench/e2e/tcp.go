package e2e

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/natsstream/stream/internal/load"
)

// The ceiling: no protocol at all. A producer writes length-prefixed records
// through a buffer of 32 KiB into a TCP connection, a goroutine in the place of
// the server copies bytes to a second connection, the consumer cuts them apart
// again. All streams share the two connections and each end is one goroutine.

const tcpBuffer = 32 << 10

type tcpRelay struct {
	producer, consumer net.Conn // the ends
	in, out            net.Conn // the relay's side of them
	w                  *bufio.Writer
	r                  *bufio.Reader
}

func newTCPRelay() (*tcpRelay, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	connect := func() (near, far net.Conn, err error) {
		if near, err = net.Dial("tcp", l.Addr().String()); err != nil {
			return nil, nil, err
		}
		if far, err = l.Accept(); err != nil {
			near.Close()
			return nil, nil, err
		}
		return near, far, nil
	}
	t := new(tcpRelay)
	if t.producer, t.in, err = connect(); err != nil {
		return nil, err
	}
	if t.consumer, t.out, err = connect(); err != nil {
		t.producer.Close()
		t.in.Close()
		return nil, err
	}
	t.w = bufio.NewWriterSize(t.producer, tcpBuffer)
	t.r = bufio.NewReaderSize(t.consumer, tcpBuffer)
	go func() {
		// The wrappers keep io.Copy from splicing in the kernel: a server
		// that looks at the bytes it forwards has to copy too.
		type reader struct{ io.Reader }
		type writer struct{ io.Writer }
		io.CopyBuffer(writer{t.out}, reader{t.in}, make([]byte, 2*tcpBuffer))
		t.out.Close()
	}()
	return t, nil
}

func (t *tcpRelay) Close() {
	t.producer.Close()
	t.in.Close()
	t.consumer.Close()
	t.out.Close()
}

func (t *tcpRelay) write(rec []byte) error {
	var prefix [4]byte
	binary.LittleEndian.PutUint32(prefix[:], uint32(len(rec)))
	// Appending to the free part of the buffer spares the array's escape.
	if _, err := t.w.Write(append(t.w.AvailableBuffer(), prefix[:]...)); err != nil {
		return err
	}
	_, err := t.w.Write(rec)
	return err
}

// read returns the next record. It is valid until the next call.
func (t *tcpRelay) read() ([]byte, error) {
	prefix, err := t.r.Peek(4)
	if err != nil {
		return nil, err
	}
	n := 4 + int(binary.LittleEndian.Uint32(prefix))
	if n > tcpBuffer {
		return nil, fmt.Errorf("a record of %d bytes does not fit the buffer", n)
	}
	rec, err := t.r.Peek(n)
	if err != nil {
		return nil, err
	}
	_, err = t.r.Discard(n)
	return rec[4:], err
}

type tcpSession struct {
	*tcpRelay
	records  [][]byte
	sent     []uint64
	checkers []load.Checker
}

func openTCP(_ load.Dialer, cfg load.Config) (load.Session, error) {
	if cfg.Size+4 > tcpBuffer {
		return nil, errors.New("record larger than the relay's buffer")
	}
	relay, err := newTCPRelay()
	if err != nil {
		return nil, err
	}
	s := &tcpSession{tcpRelay: relay, sent: make([]uint64, cfg.Streams)}
	for i := range cfg.Streams {
		s.records = append(s.records, load.NewRecord(cfg.Size, i))
		s.checkers = append(s.checkers, load.Checker{Size: cfg.Size, Stream: uint64(i)})
	}
	return s, nil
}

func (s *tcpSession) Run(n int) error {
	results := make(chan error, 2)
	go func() { results <- s.produce(n) }()
	go func() { results <- s.consume(n) }()
	return load.Await(results, 2, n)
}

func (s *tcpSession) produce(n int) error {
	i := 0
	for range n {
		rec := s.records[i]
		load.Stamp(rec, s.sent[i])
		s.sent[i]++
		if err := s.write(rec); err != nil {
			return err
		}
		if i++; i == len(s.records) {
			i = 0
		}
	}
	return s.w.Flush()
}

func (s *tcpSession) consume(n int) error {
	for range n {
		rec, err := s.read()
		if err != nil {
			return err
		}
		i := load.StreamOf(rec)
		if i >= uint64(len(s.checkers)) {
			return fmt.Errorf("record of stream %d, which does not exist", i)
		}
		if c := &s.checkers[i]; !c.OK(rec) {
			return c.ErrorFor(rec)
		}
	}
	return nil
}

type tcpPinger struct {
	*tcpRelay
	rec  []byte
	seq  uint64
	pong chan error
}

func openTCPPinger(_ load.Dialer, size int) (load.Pinger, error) {
	relay, err := newTCPRelay()
	if err != nil {
		return nil, err
	}
	p := &tcpPinger{tcpRelay: relay, rec: load.NewRecord(size, 0), pong: make(chan error, 1)}
	go func() {
		c := load.Checker{Size: size}
		for {
			rec, err := p.read()
			if err == nil && !c.OK(rec) {
				err = c.ErrorFor(rec)
			}
			p.pong <- err
			if err != nil {
				return
			}
		}
	}()
	return p, nil
}

func (p *tcpPinger) Ping() error {
	load.Stamp(p.rec, p.seq)
	p.seq++
	if err := p.write(p.rec); err != nil {
		return err
	}
	if err := p.w.Flush(); err != nil {
		return err
	}
	return <-p.pong
}
