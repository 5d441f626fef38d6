package stream_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/vmihailenco/msgpack/v5"

	"github.com/natsstream/stream"
	"github.com/natsstream/stream/streamtest"
)

func TestWriteAfterClose(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	write(t, w, []byte("x"))
	for range 3 {
		closeWriter(t, w)
	}
	if err := w.CloseWithCode(4000, "too late to change"); err != nil {
		t.Errorf("CloseWithCode after Close: %v", err)
	}
	for i, err := range []error{
		errOf(w.Write([]byte("late"))), errOf(w.Write(nil)), errOf(w.WriteObject(1)), errOf(w.ReadFrom(strings.NewReader("late"))),
	} {
		if !errors.Is(err, stream.ErrClosed) {
			t.Errorf("call %d after Close: %v", i, err)
		}
	}
	if err := w.Flush(); err != nil {
		t.Errorf("Flush after Close: %v", err)
	}
	waitFor(t, "the writer's context to end", func() { <-w.Context().Done() })
	if got, err := readAll(s); err != io.EOF || len(got) != 1 {
		t.Errorf("%q, %v", got, err)
	}
}

// The first Close decides.
func TestCloseFromManyGoroutines(t *testing.T) {
	p := newPair(t)
	for range scaled(200) {
		w, s := newWriterStream(t, p)
		var wg sync.WaitGroup
		for k := range 4 {
			wg.Go(func() {
				if err := w.CloseWithCode(4000 + k); err != nil {
					t.Errorf("CloseWithCode: %v", err)
				}
			})
		}
		waitFor(t, "CloseWithCode", wg.Wait)
		got, err := readAll(s)
		if closed, ok := errors.AsType[*stream.CloseError](err); !ok || closed.Code < 4000 || closed.Code > 4003 || len(got) != 0 {
			t.Errorf("%q, %v", got, err)
		}
	}
}

func TestInvalidCloseCode(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	for _, code := range []int{-1, 0, 1, 999, 6000, 65536 + 1000, math.MaxInt, math.MinInt} {
		if err := w.CloseWithCode(code); !errors.Is(err, stream.ErrCloseCode) {
			t.Errorf("code %d: %v", code, err)
		}
	}
	write(t, w, []byte("goes on"))
	if err := w.CloseWithCode(4000, "valid"); err != nil {
		t.Errorf("then a valid one: %v", err)
	}
	got, err := readAll(s)
	if len(got) != 1 || !errors.Is(err, &stream.CloseError{Code: 4000, Text: "valid"}) {
		t.Errorf("%q, %v", got, err)
	}
}

// A reason is for people to read. It is made to fit and never keeps a stream from ending.
func TestCloseReason(t *testing.T) {
	p := newPair(t)
	for _, tt := range []struct{ name, give, want string }{
		{"longest", strings.Repeat("x", stream.MaxReason), strings.Repeat("x", stream.MaxReason)},
		{"too long", strings.Repeat("x", stream.MaxReason+1), strings.Repeat("x", stream.MaxReason)},
		{"cut in a character", "x" + strings.Repeat("ü", stream.MaxReason/2), "x" + strings.Repeat("ü", stream.MaxReason/2-1)},
		{"not UTF-8", "a\xffb\xc3", "a\uFFFDb\uFFFD"},
		{"much too long and not UTF-8", strings.Repeat("\xc3(", 1<<20), strings.Repeat("\uFFFD(", stream.MaxReason/4)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, s := newWriterStream(t, p)
			if err := w.CloseWithCode(4000, tt.give); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Recv(); !errors.Is(err, &stream.CloseError{Code: 4000, Text: tt.want}) {
				t.Errorf("the consumer's end: %q", err)
			}
			w, s = newWriterStream(t, p)
			write(t, w, []byte("x"))
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
			if err := s.CloseWithCode(4000, tt.give); err != nil {
				t.Fatal(err)
			}
			endedBy(t, w, &stream.CloseError{Code: 4000, Text: tt.want})
		})
	}
}

// A reason that the server takes no message for must not make a stream that cannot be closed.
func TestCloseReasonBeyondMaxPayload(t *testing.T) {
	reason := strings.Repeat("x", stream.MaxReason)
	t.Run("producer's", func(t *testing.T) {
		p := newPair(t, pairOptions{server: []streamtest.Option{streamtest.WithMaxPayload(512)}})
		w, s := newWriterStream(t, p)
		write(t, w, []byte("x"))
		if err := w.CloseWithCode(4000, reason); err != nil {
			if err := w.CloseWithCode(4000, "short"); err != nil {
				t.Fatalf("CloseWithCode with a short reason afterwards: %v", err)
			}
		}
		got, err := readAll(s)
		if len(got) != 1 || !errors.Is(err, &stream.CloseError{Code: 4000}) {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("consumer's", func(t *testing.T) {
		p := newPair(t, pairOptions{server: []streamtest.Option{streamtest.WithMaxPayload(512)}})
		w, s := newWriterStream(t, p)
		write(t, w, []byte("x"))
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		if err := s.CloseWithCode(4000, reason); err != nil {
			s.Close()
			t.Fatalf("CloseWithCode: %v", err)
		}
		waitFor(t, "the producer to notice", func() { <-w.Context().Done() })
	})
}

// Records of many goroutines on one writer: all arrive once, those of one goroutine in its order.
func TestConcurrentWrite(t *testing.T) {
	for _, tt := range []struct {
		name    string
		options pairOptions
		size    func(r *rand.Rand) int
		count   int
	}{
		{"small", pairOptions{}, func(r *rand.Rand) int { return r.IntN(100) }, 10000},
		{"mixed", pairOptions{}, func(r *rand.Rand) int { return r.IntN(1 + r.IntN(100<<10)) }, 300},
		{"pieces", pairOptions{}, func(r *rand.Rand) int { return r.IntN(3 * singleLimit) }, 30},
		{"smallest window", pairOptions{consumer: stream.ClientParams{Window: smallestWindow}}, func(r *rand.Rand) int { return r.IntN(3000) }, 1000},
		{"max_payload", pairOptions{server: []streamtest.Option{streamtest.WithMaxPayload(1 << 10)}}, func(r *rand.Rand) int { return r.IntN(3000) }, 1000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const writers = 8
			p := newPair(t, tt.options)
			w, s := newWriterStream(t, p)
			count := scaled(tt.count)
			p.handlers.Go(func() {
				var wg sync.WaitGroup
				for k := range writers {
					wg.Go(func() {
						r := rand.New(rand.NewPCG(uint64(k), 7))
						for i := range count {
							rec := binary.BigEndian.AppendUint32(nil, uint32(k<<24|i))
							rec = append(rec, testRecord(k<<24|i, tt.size(r))...)
							write(t, w, rec)
							if i%100 == 99 {
								if err := w.Flush(); err != nil {
									t.Errorf("Flush: %v", err)
								}
							}
						}
					})
				}
				wg.Wait()
				closeWriter(t, w)
			})
			var next [writers]int
			for rec, err := range s.All() {
				if err != nil {
					t.Fatal(err)
				}
				id := int(binary.BigEndian.Uint32(rec))
				if k, i := id>>24, id&(1<<24-1); i != next[k] {
					t.Fatalf("record %d of goroutine %d, want %d", i, k, next[k])
				} else {
					next[k]++
				}
				if !bytes.Equal(rec[4:], testRecord(id, len(rec)-4)) {
					t.Fatalf("record %x differs", id)
				}
			}
			for k, n := range next {
				if n != count {
					t.Errorf("%d records of goroutine %d", n, k)
				}
			}
		})
	}
}

type keyed struct {
	Writer, N int
	Pad       string
}

// WriteObject, Write, Flush and Close at the same time: what was taken arrives, in order, and nothing else.
func TestConcurrentCalls(t *testing.T) {
	for _, codec := range []stream.Codec{stream.JSON, stream.MsgPack} {
		t.Run(codec.String(), func(t *testing.T) {
			p := newPair(t, pairOptions{consumer: stream.ClientParams{Codec: codec}})
			for round := range scaled(50) {
				const writers = 6
				w, s := newWriterStream(t, p)
				var taken [writers]atomic.Int64
				for k := range writers {
					p.handlers.Go(func() {
						for i := 0; ; i++ {
							v := keyed{k, i, strings.Repeat("x", i*i%5000)}
							var err error
							switch k % 3 {
							case 0:
								_, err = w.WriteObject(v)
							case 1:
								var b []byte
								if codec == stream.JSON {
									b, _ = json.Marshal(v)
								} else {
									b, _ = msgpack.Marshal(v)
								}
								_, err = w.Write(b)
							case 2:
								if _, err = w.WriteObject(&v); err == nil {
									err = w.Flush()
									if err == nil || errors.Is(err, stream.ErrClosed) {
										taken[k].Add(1)
										continue
									}
								}
							}
							if err != nil {
								if !errors.Is(err, stream.ErrClosed) {
									t.Errorf("goroutine %d: %v", k, err)
								}
								return
							}
							taken[k].Add(1)
						}
					})
				}
				p.handlers.Go(func() {
					for range round * 100 {
						runtime.Gosched()
					}
					closeWriter(t, w)
				})
				var next [writers]int
				for {
					var v keyed
					err := s.RecvObject(&v)
					if err == io.EOF {
						break
					}
					if err != nil {
						t.Fatal(err)
					}
					if v.N != next[v.Writer] || len(v.Pad) != v.N*v.N%5000 {
						t.Fatalf("object %d of goroutine %d, %d bytes; want object %d", v.N, v.Writer, len(v.Pad), next[v.Writer])
					}
					next[v.Writer]++
				}
				waitFor(t, "the writers", p.handlers.Wait)
				for k := range writers {
					if n := int(taken[k].Load()); n != next[k] {
						t.Fatalf("%d objects of goroutine %d were taken, %d arrived", n, k, next[k])
					}
				}
			}
		})
	}
}

// custom is an object whose encoding a test controls.
type custom struct{ encode func() ([]byte, error) }

func (c custom) MarshalJSON() ([]byte, error) { return c.encode() }

func (c custom) MarshalMsgpack() ([]byte, error) { return c.encode() }

func encoded(codec stream.Codec, v any) []byte {
	var b []byte
	var err error
	if codec == stream.JSON {
		b, err = json.Marshal(v)
	} else {
		b, err = msgpack.Marshal(v)
	}
	if err != nil {
		panic(err)
	}
	return b
}

func TestEncoderFails(t *testing.T) {
	failure := errors.New("cannot encode")
	for _, codec := range []stream.Codec{stream.JSON, stream.MsgPack} {
		t.Run(codec.String(), func(t *testing.T) {
			p := newPair(t, pairOptions{consumer: stream.ClientParams{Codec: codec}})
			w, s := newWriterStream(t, p)
			bad := custom{func() ([]byte, error) { return nil, failure }}
			panics := custom{func() ([]byte, error) { panic(failure) }}
			exits := custom{func() ([]byte, error) { runtime.Goexit(); return nil, nil }}
			var want []string
			for i := range 20 {
				if n, err := w.WriteObject(bad); n != 0 || !errors.Is(err, failure) {
					t.Errorf("WriteObject: %d, %v", n, err)
				}
				if _, err := w.WriteObject([]any{strings.Repeat("begun", 10<<i%2000), bad}); !errors.Is(err, failure) {
					t.Errorf("WriteObject: %v", err)
				}
				if codec == stream.JSON { // MessagePack encodes a channel's address of nothing, as an error of its own
					if _, err := w.WriteObject(make(chan int)); err == nil {
						t.Error("a channel was encoded")
					}
				}
				func() {
					defer func() {
						if v := recover(); v != failure {
							t.Errorf("recovered %v", v)
						}
					}()
					_, err := w.WriteObject([]any{"begun", panics})
					t.Errorf("WriteObject of an object that panics returned %v", err)
				}()
				waitFor(t, "an encoder that exits", func() { w.WriteObject([]any{"begun", exits}) })
				write(t, w, encoded(codec, fmt.Sprint("raw", i)))
				if _, err := w.WriteObject(fmt.Sprint("object", i)); err != nil {
					t.Errorf("WriteObject afterwards: %v", err)
				}
				want = append(want, fmt.Sprint("raw", i), fmt.Sprint("object", i))
				if i%5 == 0 {
					if err := w.Flush(); err != nil {
						t.Errorf("Flush: %v", err)
					}
				}
			}
			closeWriter(t, w)
			for _, want := range want {
				var got string
				if err := s.RecvObject(&got); err != nil || got != want {
					t.Fatalf("%q, %v; want %q", got, err, want)
				}
			}
			wantEOF(t, s)
		})
	}
}

// An encoder that takes its time holds up its own writer alone, and not even that one for ever: its end is noticed.
func TestEncoderBlocks(t *testing.T) {
	for _, codec := range []stream.Codec{stream.JSON, stream.MsgPack} {
		t.Run(codec.String(), func(t *testing.T) {
			p := newPair(t, pairOptions{consumer: stream.ClientParams{Codec: codec}})
			entered, leave := make(chan struct{}), make(chan struct{})
			slow := custom{func() ([]byte, error) {
				close(entered)
				<-leave
				return encoded(codec, "slow"), nil
			}}
			w, s := newWriterStream(t, p)
			write(t, w, encoded(codec, "before"))
			var got string
			if err := s.RecvObject(&got); err != nil || got != "before" {
				t.Fatalf("%q, %v", got, err)
			}
			p.handlers.Go(func() {
				if _, err := w.WriteObject(slow); err != nil {
					t.Errorf("WriteObject: %v", err)
				}
			})
			waitFor(t, "the encoder", func() { <-entered })
			p.handlers.Go(func() {
				write(t, w, encoded(codec, "behind"))
				closeWriter(t, w)
			})
			other, otherStream := newWriterStream(t, p)
			for i := range 1000 {
				write(t, other, testRecord(i, 100))
				if rec, err := otherStream.Recv(); err != nil || !bytes.Equal(rec, testRecord(i, 100)) {
					t.Fatalf("%q, %v", rec, err)
				}
			}
			closeWriter(t, other)
			wantEOF(t, otherStream)
			close(leave)
			for _, want := range []string{"slow", "behind"} {
				if err := s.RecvObject(&got); err != nil || got != want {
					t.Fatalf("%q, %v; want %q", got, err, want)
				}
			}
			wantEOF(t, s)
		})
		t.Run(codec.String()+"/and the consumer leaves", func(t *testing.T) {
			p := newPair(t, pairOptions{consumer: stream.ClientParams{Codec: codec}})
			entered, leave := make(chan struct{}), make(chan struct{})
			w, s := newWriterStream(t, p)
			write(t, w, []byte("before"))
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
			p.handlers.Go(func() {
				_, err := w.WriteObject(custom{func() ([]byte, error) {
					close(entered)
					<-leave
					return encoded(codec, strings.Repeat("slow", 1000)), nil
				}})
				if !errors.Is(err, &stream.CloseError{Code: stream.CloseCanceled}) {
					t.Errorf("WriteObject: %v", err)
				}
			})
			waitFor(t, "the encoder", func() { <-entered })
			s.Close()
			endedBy(t, w, &stream.CloseError{Code: stream.CloseCanceled})
			close(leave)
		})
	}
}

// What was written before an encoder that blocks is not held back by it.
func TestEncoderWaitsForEarlierRecord(t *testing.T) {
	p := newPair(t)
	for range scaled(200) {
		w, s := newWriterStream(t, p)
		arrived := make(chan struct{})
		p.handlers.Go(func() {
			write(t, w, []byte("before"))
			if _, err := w.WriteObject(custom{func() ([]byte, error) {
				select {
				case <-arrived:
				case <-w.Context().Done():
				}
				return encoded(stream.MsgPack, "slow"), nil
			}}); err != nil {
				t.Errorf("WriteObject: %v", err)
			}
			if err := w.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
		waitFor(t, "the record before a blocking encoder", func() {
			if rec, err := s.Recv(); err != nil || string(rec) != "before" {
				t.Errorf("%q, %v", rec, err)
			}
		})
		close(arrived)
		if got, err := readAll(s); err != io.EOF || len(got) != 1 {
			t.Fatalf("%q, %v", got, err)
		}
	}
}

func TestFlush(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	if err := w.Flush(); err != nil {
		t.Errorf("Flush of nothing: %v", err)
	}
	if n := p.producer.Stats().PacketsSent; n != 0 {
		t.Errorf("Flush of nothing sent %d packets", n)
	}
	for i := range 100 {
		write(t, w, testRecord(i, 10))
		before := p.producer.Stats()
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		after := p.producer.Stats()
		if after.PacketsSent == 0 || after.PacketsSent < before.PacketsSent {
			t.Fatalf("after Flush %d: %+v", i, after)
		}
		if rec, err := s.Recv(); err != nil || !bytes.Equal(rec, testRecord(i, 10)) {
			t.Fatalf("%x, %v", rec, err)
		}
	}
	closeWriter(t, w)
	wantEOF(t, s)
}

func TestWriteReturnsLength(t *testing.T) {
	p := newPair(t)
	w, s := newWriterStream(t, p)
	p.handlers.Go(func() {
		for _, n := range []int{0, 1, 100, coalesceLimit, coalesceLimit + 1, singleLimit + 1, 1 << 20} {
			if got, err := w.Write(make([]byte, n)); got != n || err != nil {
				t.Errorf("Write of %d bytes: %d, %v", n, got, err)
			}
		}
		if n, err := fmt.Fprintf(w, "%s", "five!"); n != 5 || err != nil {
			t.Errorf("Fprintf: %d, %v", n, err)
		}
		for _, v := range []any{nil, 1, "text", strings.Repeat("x", 100<<10), make([]byte, 1<<20)} {
			if n, err := w.WriteObject(v); n != len(encoded(stream.MsgPack, v)) || err != nil {
				t.Errorf("WriteObject of %T: %d, %v; want %d", v, n, err, len(encoded(stream.MsgPack, v)))
			}
		}
		closeWriter(t, w)
	})
	if got, err := readAll(s); err != io.EOF || len(got) != 13 {
		t.Errorf("%d records, %v", len(got), err)
	}
}

func TestReadFrom(t *testing.T) {
	content := testRecord(1, 3<<20+12345)
	failure := errors.New("disk broken")
	for _, tt := range []struct {
		name   string
		from   io.Reader
		n      int
		want   error
		server []streamtest.Option
	}{
		{"whole", bytes.NewReader(content), len(content), nil, nil},
		{"empty", bytes.NewReader(nil), 0, nil, nil},
		{"byte by byte", iotest.OneByteReader(bytes.NewReader(content[:10000])), 10000, nil, nil},
		{"data with EOF", iotest.DataErrReader(bytes.NewReader(content)), len(content), nil, nil},
		{"failing", io.MultiReader(bytes.NewReader(content[:50000]), iotest.ErrReader(failure)), 50000, failure, nil},
		{"small max_payload", bytes.NewReader(content), len(content), nil, []streamtest.Option{streamtest.WithMaxPayload(1 << 10)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPair(t, pairOptions{server: tt.server})
			w, s := newWriterStream(t, p)
			p.handlers.Go(func() {
				n, err := io.Copy(w, struct{ io.Reader }{tt.from}) // without WriterTo, as a file
				if n != int64(tt.n) || err != tt.want {
					t.Errorf("%d, %v; want %d, %v", n, err, tt.n, tt.want)
				}
				closeWriter(t, w)
			})
			var got bytes.Buffer
			if _, err := io.Copy(&got, s); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got.Bytes(), content[:tt.n]) {
				t.Errorf("%d bytes arrived and differ", got.Len())
			}
		})
	}
	t.Run("smaller MaxRecordSize", func(t *testing.T) {
		p := newPair(t, pairOptions{producer: stream.ClientParams{MaxRecordSize: 1000}})
		w, s := newWriterStream(t, p)
		p.handlers.Go(func() {
			if n, err := w.ReadFrom(bytes.NewReader(content)); n != int64(len(content)) || err != nil {
				t.Errorf("%d, %v", n, err)
			}
			closeWriter(t, w)
		})
		got, err := io.ReadAll(s)
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	})
	t.Run("stream to stream", func(t *testing.T) {
		p := newPair(t)
		w, s := newWriterStream(t, p)
		w2, s2 := newWriterStream(t, p)
		p.handlers.Go(func() {
			for i := range 1000 {
				write(t, w, testRecord(i, i))
			}
			closeWriter(t, w)
		})
		p.handlers.Go(func() {
			if _, err := io.Copy(w2, s); err != nil { // record by record
				t.Errorf("io.Copy: %v", err)
			}
			closeWriter(t, w2)
		})
		got, err := readAll(s2)
		if err != io.EOF || len(got) != 1000 {
			t.Fatalf("%d records, %v", len(got), err)
		}
		for i, rec := range got {
			if !bytes.Equal(rec, testRecord(i, i)) {
				t.Fatalf("record %d differs", i)
			}
		}
	})
}

// blocked writes records to w until one fails, and returns when that has come to a halt: how many bytes were taken, and
// where the error will come.
func blocked(t *testing.T, p *pair, w *stream.Writer, atLeast int) (*atomic.Int64, <-chan error) {
	t.Helper()
	taken := new(atomic.Int64)
	failed := make(chan error, 1)
	p.handlers.Go(func() {
		rec := make([]byte, 1000)
		for {
			n, err := w.Write(rec)
			taken.Add(int64(n))
			if err != nil {
				failed <- err
				return
			}
		}
	})
	last := int64(-1)
	eventually(t, "Write blocks", func() bool {
		time.Sleep(20 * time.Millisecond)
		was := last
		last = taken.Load()
		return last == was && last >= int64(atLeast)
	})
	return taken, failed
}

func TestWriteBlocks(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(t *testing.T, p *pair, s *stream.Stream)
		want error
	}{
		{"consumer closes", func(_ *testing.T, _ *pair, s *stream.Stream) { s.Close() }, &stream.CloseError{Code: stream.CloseCanceled}},
		{"consumer closes with a code", func(t *testing.T, _ *pair, s *stream.Stream) {
			if err := s.CloseWithCode(4321, "enough"); err != nil {
				t.Error(err)
			}
		}, &stream.CloseError{Code: 4321, Text: "enough"}},
		{"consumer's client closes", func(_ *testing.T, p *pair, _ *stream.Stream) { p.consumer.Close() }, &stream.CloseError{Code: stream.CloseGoingAway}},
		{"client closes", func(_ *testing.T, p *pair, _ *stream.Stream) { p.producer.Close() }, stream.ErrClientClosed},
		{"connection closes", func(_ *testing.T, p *pair, _ *stream.Stream) { p.producer.Conn.Close() }, &stream.CloseError{Code: stream.CloseAbnormalClosure}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newPair(t, pairOptions{consumer: stream.ClientParams{Window: smallestWindow}})
			w, s := newWriterStream(t, p)
			taken, failed := blocked(t, p, w, smallestWindow/2)
			others := make(chan error, 3)
			p.handlers.Go(func() { others <- errOf(w.WriteObject(strings.Repeat("x", 40<<10))) })
			p.handlers.Go(func() { others <- errOf(w.Write(make([]byte, 300<<10))) })
			p.handlers.Go(func() { others <- errOf(w.ReadFrom(strings.NewReader(strings.Repeat("x", 40<<10)))) })
			time.Sleep(5 * time.Millisecond) // most likely they wait by now; either way they must fail
			tt.end(t, p, s)
			waitFor(t, "the blocked calls to fail", func() {
				for range cap(others) {
					if err := <-others; !errors.Is(err, tt.want) {
						t.Errorf("a call that was blocked: %v; want %v", err, tt.want)
					}
				}
				if err := <-failed; !errors.Is(err, tt.want) {
					t.Errorf("Write: %v; want %v", err, tt.want)
				}
			})
			if n := taken.Load(); n > smallestWindow+2*(32<<10) {
				t.Errorf("%d bytes were taken for a window of %d", n, smallestWindow)
			}
			endedBy(t, w, tt.want)
			s.Close()
		})
	}
	t.Run("consumer reads", func(t *testing.T) {
		p := newPair(t, pairOptions{consumer: stream.ClientParams{Window: smallestWindow}})
		w, s := newWriterStream(t, p)
		taken, failed := blocked(t, p, w, smallestWindow/2)
		was := taken.Load()
		for range 2 * was / 1000 {
			if rec, err := s.Recv(); err != nil || len(rec) != 1000 {
				t.Fatalf("%d bytes, %v", len(rec), err)
			}
		}
		if taken.Load() <= was {
			t.Errorf("%d bytes were taken, %d before anything was read", taken.Load(), was)
		}
		s.Close()
		waitFor(t, "Write to fail", func() { <-failed })
	})
	t.Run("Close needs no credit", func(t *testing.T) {
		p := newPair(t, pairOptions{consumer: stream.ClientParams{Window: smallestWindow}})
		w, s := newWriterStream(t, p)
		write(t, w, make([]byte, smallestWindow))
		waitFor(t, "Close", func() {
			if err := w.CloseWithCode(4000, strings.Repeat("x", stream.MaxReason)); err != nil {
				t.Error(err)
			}
		})
		got, err := readAll(s)
		if len(got) != 1 || !errors.Is(err, &stream.CloseError{Code: 4000}) {
			t.Errorf("%d records, %v", len(got), err)
		}
	})
}

func TestNewWriterErrors(t *testing.T) {
	p := newPair(t)
	all := func(t *testing.T, w *stream.Writer, want error) {
		t.Helper()
		waitFor(t, "the calls to fail", func() {
			for i, err := range []error{
				errOf(w.Write(nil)), errOf(w.Write([]byte("x"))), errOf(w.WriteObject(1)), errOf(w.ReadFrom(strings.NewReader("x"))),
				errOf(fmt.Fprint(w, "x")), w.Close(), w.CloseWithCode(4000),
			} {
				if !errors.Is(err, want) {
					t.Errorf("call %d: %v; want %v", i, err, want)
				}
			}
			w.Flush() // has nothing to do
			if w.Context() == nil {
				t.Error("there is no context")
			}
		})
	}
	all(t, stream.NewWriter(nil, "a.b"), nats.ErrInvalidConnection)
	all(t, (*stream.Client)(nil).NewWriter("a.b"), nats.ErrInvalidConnection)
	all(t, stream.NewWriter(new(stream.Client), "a.b"), nats.ErrInvalidConnection)
	all(t, stream.NewWriter(p.producer, ""), nats.ErrBadSubject)
	all(t, p.producer.NewWriter("_SINBOX.x.~2m5IAAAAAAAAAAA"), stream.ErrVersion)
	if n := p.producer.Stats(); n.Streams != 0 || n.PacketsSent != 0 {
		t.Errorf("%+v", n)
	}
}

// A writer may be made and used within a NATS callback, also on the connection and the client that opened the stream:
// what a callback may write without waiting is the window.
func TestWriterInCallback(t *testing.T) {
	for _, shared := range []bool{false, true} {
		t.Run(fmt.Sprint("shared=", shared), func(t *testing.T) {
			p := newPair(t, pairOptions{shared: shared})
			sub, err := p.producer.Conn.Subscribe("callback", func(m *nats.Msg) {
				w := stream.NewWriter(p.producer, m.Reply)
				for i := range 1000 {
					write(t, w, testRecord(i, 100))
				}
				if _, err := w.WriteObject("object"); err != nil {
					t.Errorf("WriteObject: %v", err)
				}
				if err := w.Flush(); err != nil {
					t.Errorf("Flush: %v", err)
				}
				closeWriter(t, w)
			})
			if err != nil {
				t.Fatal(err)
			}
			defer sub.Unsubscribe()
			if err := p.producer.Conn.Flush(); err != nil {
				t.Fatal(err)
			}
			var streams []*stream.Stream
			for range 10 {
				streams = append(streams, open(t, p.consumer, "callback"))
			}
			for _, s := range streams {
				got, err := readAll(s)
				if err != io.EOF || len(got) != 1001 {
					t.Fatalf("%d records, %v", len(got), err)
				}
				for i, rec := range got[:1000] {
					if !bytes.Equal(rec, testRecord(i, 100)) {
						t.Fatalf("record %d differs", i)
					}
				}
			}
		})
	}
}

// Producer, consumer and writers on one client, many streams at once, in both directions of every pair.
func TestSharedClient(t *testing.T) {
	p := newPair(t, pairOptions{shared: true})
	serve(t, p, "shared", func(w *stream.Writer, _ *nats.Msg) {
		for i := range scaled(5000) {
			write(t, w, testRecord(i, 100))
		}
		closeWriter(t, w)
	})
	var wg sync.WaitGroup
	for range 8 {
		s := open(t, p.consumer, "shared")
		wg.Go(func() {
			got, err := readAll(s)
			if err != io.EOF || len(got) != scaled(5000) {
				t.Errorf("%d records, %v", len(got), err)
			}
			for i, rec := range got {
				if !bytes.Equal(rec, testRecord(i, 100)) {
					t.Errorf("record %d differs", i)
					return
				}
			}
		})
	}
	waitFor(t, "the streams", wg.Wait)
}
