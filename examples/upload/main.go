// Command upload sends a file from the consumer to the producer. The consumer opens a stream, copies the file into it
// and half-closes. The handler answers with a receipt for the received bytes, and the consumer compares.
//
//	go run ./examples/upload
package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"os"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/examples/internal/local"
)

func main() {
	if err := run(context.Background(), os.Stdout); err != nil {
		log.Fatal(err)
	}
}

// receipt describes the bytes of a file that one end sent or received.
type receipt struct {
	Size   int64
	SHA256 string
}

// receive is the handler. A real handler would also store the file, with io.MultiWriter.
func receive(w *stream.Writer, r *stream.Request) error {
	digest := sha256.New()
	n, err := io.Copy(digest, r)
	if err != nil {
		return err // the upload is incomplete: no receipt
	}
	_, err = w.WriteObject(receipt{n, hex.EncodeToString(digest.Sum(nil))})
	return err
}

var errDiffer = errors.New("what arrived is not what was sent")

// upload sends the content of f and returns the receipt that both ends agree on.
func upload(ctx context.Context, client *stream.Client, f io.Reader) (receipt, error) {
	s, err := client.Open(ctx, "upload", nil)
	if err != nil {
		return receipt{}, err
	}
	defer s.Close() // if f cannot be read to its end, the handler gets an error and not the end of the file
	digest := sha256.New()
	n, err := io.Copy(s, io.TeeReader(f, digest)) // waits while the handler is slower
	if err != nil {
		return receipt{}, err
	}
	if err := s.CloseSend(); err != nil {
		return receipt{}, err
	}
	sent := receipt{n, hex.EncodeToString(digest.Sum(nil))}
	var got receipt
	if err := s.RecvObject(&got); err != nil {
		return receipt{}, err
	}
	if got != sent {
		return receipt{}, fmt.Errorf("%w: %+v, not %+v", errDiffer, got, sent)
	}
	if _, err := s.Recv(); err != io.EOF { // the stream must end here, normally
		return receipt{}, fmt.Errorf("after the receipt: %v, not io.EOF", err)
	}
	return got, nil
}

// size is the size of the file to send. It is larger than a window, so the sender needs credit.
const size = 8<<20 + 17

func run(ctx context.Context, out io.Writer) error {
	producer, consumer, stop, err := local.Connect()
	if err != nil {
		return err
	}
	defer stop()
	server, err := stream.NewServer(stream.ServerParams{Conn: producer})
	if err != nil {
		return err
	}
	defer server.Close()
	if _, err := server.Handle("upload", receive); err != nil {
		return err
	}
	if err := producer.Flush(); err != nil { // returns when NATS knows the subscription
		return err
	}
	client, err := stream.NewClient(stream.ClientParams{Conn: consumer})
	if err != nil {
		return err
	}
	defer client.Close()

	// Random bytes stand for a file; an *os.File works as well. The seed is fixed, so that the digest is the same in
	// each run.
	file := io.LimitReader(rand.NewChaCha8([32]byte{}), size)
	got, err := upload(ctx, client, file)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "%d bytes arrived, SHA-256 %s at both ends\n", got.Size, got.SHA256)
	return server.Drain(ctx)
}
