package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/nats-io/nats.go"

	"github.com/natsstream/stream"
)

// sum describes the records of a stream that one end sent or received. The producer sends it as JSON.
type sum struct {
	Records int64  `json:"records"`
	Bytes   int64  `json:"bytes"`
	SHA256  string `json:"sha256"`
}

// hashBuffer is how many bytes of lines are hashed at once: SHA-256 is slow on a few bytes at a time.
const hashBuffer = 32 << 10

// producer serves files. It answers a request that names a file on <subject>.lines with a stream of the file's lines,
// and on <subject>.sum with the sum of the last finished stream of that file.
type producer struct {
	nc     *nats.Conn
	client *stream.Client
	root   *os.Root
	served map[string]bool // never changes

	streams sync.WaitGroup // one goroutine each

	mu   sync.Mutex
	sums map[string]sum
}

func startProducer(url, subject, dir string, files []file) (*producer, error) {
	p := &producer{served: make(map[string]bool), sums: make(map[string]sum)}
	for _, f := range files {
		p.served[f.name] = true
	}
	if err := p.start(url, subject, dir); err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

func (p *producer) start(url, subject, dir string) (err error) {
	if p.root, err = os.OpenRoot(dir); err != nil {
		return err
	}
	if p.nc, err = nats.Connect(url, nats.Name("stream demo: producer")); err != nil {
		return err
	}
	if p.client, err = stream.NewClient(stream.ClientParams{Conn: p.nc}); err != nil {
		return err
	}
	if _, err = p.nc.Subscribe(subject+".lines", p.serveLines); err != nil {
		return err
	}
	if _, err = p.nc.Subscribe(subject+".sum", p.serveSum); err != nil {
		return err
	}
	return p.nc.Flush() // returns when NATS knows the subscriptions
}

// stop ends the open streams: their writes fail when the client is closed. It may be called on a producer that started
// only in part.
func (p *producer) stop() {
	if p.client != nil {
		p.client.Close()
	}
	if p.nc != nil {
		p.nc.Close()
	}
	p.streams.Wait()
	if p.root != nil {
		p.root.Close()
	}
}

func (p *producer) serveLines(request *nats.Msg) {
	if request.Reply == "" {
		return
	}
	w := p.client.NewWriter(request.Reply)
	name := string(request.Data)
	// A name from the network opens no file that was not offered.
	if !p.served[name] {
		_ = w.CloseWithCode(stream.CloseBadRequest, "no such file: "+quoted(name))
		return
	}
	p.streams.Go(func() {
		s, err := p.writeLines(w, name)
		if err != nil {
			// This has no effect if the consumer ended the stream.
			_ = w.CloseWithCode(stream.CloseInternalServerErr, quoted(err.Error()))
			return
		}
		p.mu.Lock()
		p.sums[name] = s // before the close, because the consumer asks right after it
		p.mu.Unlock()
		_ = w.Close()
	})
}

// quoted turns any text into a close reason, which must be short and UTF-8.
func quoted(text string) string {
	return fmt.Sprintf("%.60q", text)
}

// writeLines writes a file to w, each line with its line feed as one record.
func (p *producer) writeLines(w *stream.Writer, name string) (sum, error) {
	f, err := p.root.Open(name)
	if err != nil {
		return sum{}, err
	}
	defer f.Close()
	var s sum
	digest := sha256.New()
	hashed := bufio.NewWriterSize(digest, hashBuffer)
	for r := bufio.NewReaderSize(f, 256<<10); ; {
		line, err := r.ReadSlice('\n')
		if err == bufio.ErrBufferFull {
			// A line longer than the reader's buffer, which is rare, gets a buffer of its own.
			head := append([]byte(nil), line...)
			line, err = r.ReadBytes('\n')
			line = append(head, line...)
		}
		if len(line) > 0 {
			if _, err := w.Write(line); err != nil {
				return sum{}, err
			}
			s.Records++
			s.Bytes += int64(len(line))
			hashed.Write(line)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return sum{}, err
		}
	}
	hashed.Flush()
	s.SHA256 = hex.EncodeToString(digest.Sum(nil))
	return s, nil
}

func (p *producer) serveSum(request *nats.Msg) {
	p.mu.Lock()
	s := p.sums[string(request.Data)]
	p.mu.Unlock()
	if body, err := json.Marshal(s); err == nil {
		_ = request.Respond(body)
	}
}
