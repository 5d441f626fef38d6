package tap_test

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/natsstream/stream/internal/slab"
	"github.com/natsstream/stream/internal/tap"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds each wait of a test.
const patience = 20 * time.Second

// dialerFunc is a dialer of nats.go.
type dialerFunc func() (net.Conn, error)

func (f dialerFunc) Dial(string, string) (net.Conn, error) { return f() }

// scripted serves one connection of nats.go, which subscribes to inbox.* and other. It sends script in pieces of the
// given lengths, in turn, and ends the connection.
func scripted(conn net.Conn, script []byte, pieces []int) error {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(conn, `INFO {"server_id":"x","version":"2.10.0","headers":true,"max_payload":1048576}`+"\r\n"); err != nil {
		return err
	}
	lines := bufio.NewReader(conn)
	for subs := 0; subs < 2; {
		line, err := lines.ReadString('\n')
		if err != nil {
			return err
		}
		switch {
		case strings.HasPrefix(line, "PING"):
			if _, err := io.WriteString(conn, "PONG\r\n"); err != nil {
				return err
			}
		case strings.HasPrefix(line, "SUB"):
			subs++
		}
	}
	go func() { _, _ = io.Copy(io.Discard, lines) }() // answers to PING
	for i := 0; len(script) > 0; i++ {
		n := len(script)
		if len(pieces) > 0 {
			n = min(n, max(1, pieces[i%len(pieces)]))
		}
		if _, err := conn.Write(script[:n]); err != nil {
			return nil // nats.go did not like the script
		}
		script = script[n:]
	}
	return nil
}

// outcome has the messages that came out of a script.
type outcome struct {
	inbox, other []string
}

func describe(m *nats.Msg) string {
	if len(m.Data) > 1000 {
		return fmt.Sprintf("%s|%s|%v|%d bytes, %x", m.Subject, m.Reply, m.Header, len(m.Data), sha256.Sum256(m.Data))
	}
	return fmt.Sprintf("%s|%s|%v|%q", m.Subject, m.Reply, m.Header, m.Data)
}

// play returns the outcome of a script, with the messages to inbox.* taken out or not.
func play(t testing.TB, taken bool, script []byte, pieces []int) (o outcome) {
	var wait sync.WaitGroup
	defer wait.Wait()
	opts := nats.GetDefaultOptions()
	opts.Servers = []string{"nats://127.0.0.1:4222"}
	opts.AllowReconnect = false
	opts.Timeout = patience
	opts.AsyncErrorCB = func(*nats.Conn, *nats.Subscription, error) {}
	opts.CustomDialer = dialerFunc(func() (net.Conn, error) {
		client, server := net.Pipe()
		wait.Go(func() {
			if err := scripted(server, script, pieces); err != nil {
				t.Errorf("server: %v", err)
			}
		})
		return client, nil
	})
	if taken {
		if err := tap.Use(&opts); err != nil {
			t.Fatal(err)
		}
	}
	closed := make(chan struct{})
	opts.ClosedCB = func(*nats.Conn) { close(closed) }
	nc, err := opts.Connect()
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	inbox, other := make(chan *nats.Msg, 1<<12), make(chan *nats.Msg, 1<<12)
	if taken {
		tap.Of(nc).Register(nc, "inbox.*", func(m *nats.Msg, lent *slab.Slab) {
			o.inbox = append(o.inbox, describe(m))
			lent.Release()
		})
	}
	if _, err := nc.ChanSubscribe("inbox.*", inbox); err != nil { // the first, with number 1
		t.Fatal(err)
	}
	if _, err := nc.ChanSubscribe("other", other); err != nil {
		t.Fatal(err)
	}
	select {
	case <-closed:
	case <-time.After(patience):
		t.Fatal("waited in vain for the end of the connection")
	}
	for len(inbox) > 0 {
		o.inbox = append(o.inbox, describe(<-inbox))
	}
	for len(other) > 0 {
		o.other = append(o.other, describe(<-other))
	}
	return o
}

// compare plays a script with and without taking messages out.
func compare(t testing.TB, script []byte, pieces []int) {
	t.Helper()
	want, got := play(t, false, script, nil), play(t, true, script, pieces)
	for what, lists := range map[string][2][]string{"inbox": {want.inbox, got.inbox}, "other": {want.other, got.other}} {
		if w, g := strings.Join(lists[0], "\n"), strings.Join(lists[1], "\n"); w != g {
			t.Errorf("%s in pieces of %v:\n%s\nnats.go gets\n%s\nof %q", what, pieces, g, w, script[:min(len(script), 2000)])
		}
	}
}

// good is a script with all that servers send.
const good = "MSG inbox.a 1 3\r\nabc\r\n" +
	"MSG inbox.b 1 reply.c 0\r\n\r\n" +
	"PING\r\n" +
	"MSG other 2 5\r\nab\r\nc\r\n" +
	"HMSG inbox.c 1 22 25\r\nNATS/1.0\r\nKey: val\r\n\r\nxyz\r\n" +
	"HMSG other 2 rep 22 22\r\nNATS/1.0\r\nKey: val\r\n\r\n\r\n" +
	"HMSG inbox.d 1 16 16\r\nNATS/1.0 503\r\n\r\n\r\n" +
	"+OK\r\n" +
	"INFO {\"server_id\":\"y\",\"max_payload\":1048576,\"headers\":true}\r\n" +
	"-ERR 'Permissions Violation for Publish to \"x\"'\r\n" +
	"MSG unknown 3 4\r\nMSG \r\n" +
	"PONG\r\n" +
	"MSG inbox.e 1 12\r\nMSG inbox.a \r\n" +
	"MSG other 2 1\r\nz\r\n"

// Whatever the reads are cut into, the same messages come out.
func TestReadsMayBeCutAnywhere(t *testing.T) {
	for cut := range len(good) {
		if cut%7 == 0 || !testing.Short() {
			compare(t, []byte(good), []int{max(cut, 1), len(good)})
		}
	}
	compare(t, []byte(good), []int{1})
	compare(t, []byte(good), []int{2, 3, 5})
}

// A script that ends within a message, and one that servers do not send, are left to nats.go.
func TestBytesThatAreNotUnderstoodAreLeftToNATS(t *testing.T) {
	for end := range len(good) {
		if end%5 == 0 || !testing.Short() {
			compare(t, []byte(good[:end]), nil)
		}
	}
	for _, odd := range []string{
		"msg inbox.a 1 3\r\nabc\r\n", "MSG  inbox.a  1  3\r\nabc\r\n", "MSG\tinbox.a\t1\t3\r\nabc\r\n", "MSG inbox.a 1 3\nabc\r\n",
		"MSG inbox.a 1 3\r\nabcdefg\r\n", "MSG inbox.a 1 3 \r\nabc\r\n", "MSG inbox.a 1 x\r\nabc\r\n", "MSG inbox.a 01 003\r\nabc\r\n",
		"HMSG inbox.a 1 5 3\r\nabc\r\n", "HMSG inbox.a 1 3 3\r\nabc\r\n", "HMSG inbox.a 1 0 3\r\nabc\r\n", "MSH inbox.a 1 3\r\nabc\r\n",
		"MSG inbox.a 1 a b 3\r\nabc\r\n", "MSG other 2 3\r\nabcMSG inbox.a 1 3\r\nabc\r\n", "\r\nMSG inbox.a 1 3\r\nabc\r\n", "PINGMSG inbox.a 1 3\r\nabc\r\n",
		"MSG inbox.a 1 3\r\nabc\rMSG inbox.b 1 0\r\n\r\n", "MSG inbox.a 12345678901 3\r\nabc\r\n", "MSG " + strings.Repeat("x", 20<<10) + " 1 3\r\nabc\r\n",
	} {
		compare(t, []byte(good+odd+good), nil)
		compare(t, []byte(good+odd+good), []int{1})
	}
}

// Messages of all sizes come out whole: small ones, those that fill a buffer nearly, or are larger than all buffers.
func TestMessagesOfAllSizesAreTaken(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	sizes := []int{0, 1, 100, 1000, 4 << 10, 32<<10 - 1, 32 << 10, 32<<10 + 30, 60 << 10, slab.Size - 40, slab.Size, 200 << 10, 256 << 10, slab.LargeSize - 20, slab.LargeSize, 1 << 20}
	for round := range 6 {
		var script bytes.Buffer
		for range 30 {
			size := sizes[r.IntN(len(sizes))]
			if round < len(sizes)-4 && round%2 == 0 && r.IntN(8) > 0 {
				size = sizes[round+4] // many of one size
			}
			data := make([]byte, size)
			for i := range data {
				data[i] = byte(r.Uint32())
			}
			if r.IntN(3) == 0 {
				fmt.Fprintf(&script, "MSG other 2 %d\r\n%s\r\n", len(data), data)
			} else {
				fmt.Fprintf(&script, "MSG inbox.%d 1 %d\r\n%s\r\n", r.IntN(1000), len(data), data)
			}
		}
		compare(t, script.Bytes(), []int{1 + r.IntN(100_000), 1 + r.IntN(3000), 1 << 20})
	}
}

// unsuitable finds scripts that nats.go does not handle in one way: it allocates as much as a line says, and closes the
// connection some time after most errors.
var unsuitable = regexp.MustCompile(`[0-9]{7}|(?i:-err)`)

// FuzzMessages compares the messages that come out of any bytes with those of nats.go alone.
func FuzzMessages(f *testing.F) {
	good := strings.Replace(good, "-ERR 'Permissions Violation for Publish to \"x\"'\r\n", "", 1)
	f.Add([]byte(good), uint16(0), uint16(0))
	f.Add([]byte(good), uint16(1), uint16(1))
	for i, line := range strings.SplitAfter(good, "\r\n") {
		f.Add([]byte(line+good), uint16(i), uint16(3))
	}
	f.Fuzz(func(t *testing.T, script []byte, first, second uint16) {
		if len(script) > 1<<14 || unsuitable.Match(script) {
			return
		}
		pieces := []int{int(first), int(second)}
		whole := play(t, false, script, nil)
		for _, cut := range [][]int{pieces, {1}} {
			if !reflect.DeepEqual(play(t, false, script, cut), whole) {
				return // nats.go alone depends on the cuts
			}
		}
		compare(t, script, pieces)
	})
}

func TestOptionIsUsedOnce(t *testing.T) {
	opts := nats.GetDefaultOptions()
	if err := tap.Use(&opts); err != nil {
		t.Fatal(err)
	}
	d := opts.CustomDialer
	if err := tap.Use(&opts); err != nil || d == nil || opts.CustomDialer != d {
		t.Errorf("%T over %T, %v", opts.CustomDialer, d, err)
	}
}
