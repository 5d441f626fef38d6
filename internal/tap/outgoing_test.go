//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package tap_test

import (
	"bytes"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/natsstream/stream/internal/tap"
)

// command returns a message as the server gets it.
func command(subject string, data []byte) []byte {
	return fmt.Appendf(nil, "PUB %s %d\r\n%s\r\n", subject, len(data), data)
}

// Messages that are lent reach the server in the order in which they were published, among those that were not. Their
// data may change after Recall. A message is kept only if the write has room for another one like it.
func TestLentMessagesKeepTheirOrder(t *testing.T) {
	conn, server := takenConn(t, asItIs)
	var want bytes.Buffer
	var lent [][]byte
	received := make(chan []byte)
	const rounds = 20
	data := func(i, n int) []byte { return bytes.Repeat([]byte{byte('a' + i%26)}, n) }
	lend := func(i, n int, kept bool) {
		t.Helper()
		d := data(i, n)
		want.Write(command("lent", d))
		if published, k := conn.Lend("lent", d); !published || k != kept {
			t.Fatalf("Lend of %d bytes: published %v, kept %v", n, published, k)
		}
		lent = append(lent, d)
	}
	publish := func(i, n int) {
		t.Helper()
		d := data(i, n)
		want.Write(command("copied", d))
		if !conn.Publish("copied", "", nil, d) {
			t.Fatal("not published")
		}
	}
	recall := func() {
		conn.Recall()
		for _, d := range lent {
			clear(d)
		}
		lent = nil
	}
	go func() {
		var got bytes.Buffer
		buf := make([]byte, 1<<16)
		for {
			n, err := server.Read(buf)
			got.Write(buf[:n])
			if err != nil || bytes.HasSuffix(got.Bytes(), command("copied", []byte("end"))) {
				received <- got.Bytes()
				return
			}
		}
	}()
	for i := range rounds {
		lend(i, 16<<10, true)
		lend(i, 16<<10, true)
		lend(i, 16<<10, false) // the third one fills the write
		publish(i, 100)
		lend(i, 20<<10, true)
		publish(i, 100)
		lend(i, 100, false) // is copied
		publish(i, 40<<10)
		lend(i, 32<<10, false)
		lend(i, 9<<10, true)
		publish(i, 31<<10)
		lend(i, 300<<10, false)
		lend(i, 12<<10, true)
		if i%2 == 0 {
			recall()
			recall()
		} else {
			conn.Push()
			recall()
		}
	}
	publish(0, 0)
	lend(0, 10<<10, true)
	recall()
	want.Write(command("copied", []byte("end")))
	conn.Publish("copied", "", nil, []byte("end"))
	conn.Push()
	if got := <-received; !bytes.Equal(got, want.Bytes()) {
		t.Errorf("%d bytes arrived that differ from the %d that were published", len(got), want.Len())
	}
	if published, _ := conn.Lend("a b", data(0, 16<<10)); published {
		t.Error("a message to a subject with a space was published")
	}
}

// Recall returns only when no write sends data of Lend any more: also if another goroutine has begun the write.
func TestRecallWaitsForWritesOfOthers(t *testing.T) {
	conn, server := takenConn(t, asItIs)
	var want bytes.Buffer
	for sent, rest := true, false; sent && !rest; { // until the network takes no more
		data := bytes.Repeat([]byte("0"), tap.MostNow)
		if sent, rest = conn.PublishNow("x", data); sent {
			want.Write(command("x", data))
		}
	}
	lent := bytes.Repeat([]byte("1"), 16<<10)
	want.Write(command("lent", lent))
	want.Write(command("other", []byte("2")))
	if _, kept := conn.Lend("lent", lent); !kept {
		t.Fatal("a message of 16 KiB was not kept")
	}
	pushed, recalled := make(chan struct{}), make(chan struct{})
	if !conn.Publish("other", "", nil, []byte("2")) {
		t.Fatal("not published")
	}
	go func() { conn.Push(); close(pushed) }()
	for deadline := time.Now().Add(patience); !conn.TakesNow(); time.Sleep(time.Millisecond) { // the write has begun
		if time.Now().After(deadline) {
			t.Fatal("waited in vain for the write")
		}
	}
	go func() {
		conn.Recall()
		clear(lent)
		close(recalled)
	}()
	time.Sleep(10 * time.Millisecond) // for a Recall that does not wait
	got := make([]byte, want.Len())
	if _, err := io.ReadFull(server, got); err != nil {
		t.Fatal(err)
	}
	<-pushed
	<-recalled
	if !bytes.Equal(got, want.Bytes()) {
		t.Error("lent data changed before it was sent")
	}
}

// A connection that fails keeps no data, and takes no more.
func TestLendOverABrokenConnection(t *testing.T) {
	conn, server := takenConn(t, asItIs)
	if _, kept := conn.Lend("x", make([]byte, 16<<10)); !kept {
		t.Fatal("a message of 16 KiB was not kept")
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if published, _ := conn.Lend("x", make([]byte, 16<<10)); published {
		t.Error("a closed connection took a message")
	}
	conn.Recall()
	if conn.Publish("x", "", nil, nil) {
		t.Error("a failed connection took a message")
	}
	if rest, err := io.ReadAll(server); err != nil || len(rest) > 0 {
		t.Errorf("%d bytes arrived, %v", len(rest), err)
	}
}

func TestLendAllocatesNothing(t *testing.T) {
	conn, server := takenConn(t, asItIs)
	go io.Copy(io.Discard, server)
	data := make([]byte, 16<<10)
	if n := testing.AllocsPerRun(100, func() {
		conn.Lend("x", data)
		conn.Lend("x", data)
		conn.Recall()
	}); n != 0 {
		t.Errorf("Lend and Recall allocate %v times", n)
	}
}
