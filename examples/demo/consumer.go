package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// totals counts the records that all streams have received so far, for the progress line.
type totals struct {
	streams, records, bytes atomic.Int64
}

// consumer opens streams of the producer's files.
type consumer struct {
	nc      *nats.Conn
	client  *stream.Client
	subject string
	total   totals
}

// result is the outcome of all streams of one file.
type result struct {
	name    string
	streams int
	records int64
	bytes   int64
	elapsed time.Duration
	sha256  string // of one stream; all streams have the same if err is nil
	err     error
}

func newConsumer(url, subject string) (*consumer, error) {
	nc, err := nats.Connect(url, nats.Name("stream demo: consumer"))
	if err != nil {
		return nil, err
	}
	client, err := stream.NewClient(stream.ClientParams{Conn: nc})
	if err != nil {
		nc.Close()
		return nil, err
	}
	return &consumer{nc: nc, client: client, subject: subject}, nil
}

func (c *consumer) stop() {
	c.client.Close()
	c.nc.Close()
}

// fetchAll streams every file repeat times and returns a result for each, in the order of files. n streams are open at
// a time, of different files if there are as many. Streams of one file come one after the other, so that the producer's
// sum of its last stream belongs to the stream just received.
func (c *consumer) fetchAll(ctx context.Context, files []file, n, repeat int) []result {
	results := make([]result, len(files))
	var next atomic.Int64
	var workers sync.WaitGroup
	for range min(n, len(files)) {
		workers.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(files)); i = next.Add(1) - 1 {
				results[i] = c.fetchFile(ctx, files[i].name, repeat)
			}
		})
	}
	workers.Wait()
	return results
}

func (c *consumer) fetchFile(ctx context.Context, name string, repeat int) result {
	r := result{name: name}
	started := time.Now()
	for range repeat {
		received, err := c.receive(ctx, name)
		r.streams++
		r.records += received.Records
		r.bytes += received.Bytes
		r.sha256 = received.SHA256
		c.total.streams.Add(1)
		if err == nil {
			err = c.compare(ctx, name, received)
		}
		if err != nil {
			r.err = err
			break
		}
	}
	r.elapsed = time.Since(started)
	return r
}

// receive reads one stream to its end and returns the sum of the received records, also if the stream broke off.
func (c *consumer) receive(ctx context.Context, name string) (sum, error) {
	s, err := c.client.Open(ctx, c.subject+".lines", []byte(name))
	if err != nil {
		return sum{}, err
	}
	defer s.Close()

	var got, counted sum
	count := func() {
		c.total.records.Add(got.Records - counted.Records)
		c.total.bytes.Add(got.Bytes - counted.Bytes)
		counted = got
	}
	defer count()
	digest := sha256.New()
	hashed := bufio.NewWriterSize(digest, hashBuffer)
	for line, err := range s.All() {
		if err != nil {
			return got, err
		}
		got.Records++
		got.Bytes += int64(len(line))
		hashed.Write(line)
		if got.Records%1024 == 0 {
			count() // not for each record, because all streams share the counters
		}
	}
	hashed.Flush()
	got.SHA256 = hex.EncodeToString(digest.Sum(nil))
	return got, nil
}

// errDiffer is the error of a stream that ended normally with other records than the producer sent.
var errDiffer = errors.New("both ends differ")

// compare asks the producer for its sum and compares it with the received one.
func (c *consumer) compare(ctx context.Context, name string, received sum) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	answer, err := c.nc.RequestWithContext(ctx, c.subject+".sum", []byte(name))
	if err != nil {
		return fmt.Errorf("asking for the sum: %w", err)
	}
	var sent sum
	if err := json.Unmarshal(answer.Data, &sent); err != nil {
		return fmt.Errorf("the producer's sum: %w", err)
	}
	if sent != received {
		return fmt.Errorf("%w: sent %d records, %d bytes, %s; received %d records, %d bytes, %s", errDiffer,
			sent.Records, sent.Bytes, short(sent.SHA256), received.Records, received.Bytes, short(received.SHA256))
	}
	return nil
}
